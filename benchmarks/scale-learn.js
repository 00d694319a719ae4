/**
 * What does a step of learning take on a model of the size that people ship? Coefficients of a pack whose sides are both shared, on the file in
 * 4 bits, beside PEFT's LoRA in f32. Needs what benchmarks/scale.js does.
 */
import { number, readArguments } from "./lib/arguments.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { FILES, scaleFiles } from "./lib/scale-files.js";

const { size, folder } = FILES;
const given = readArguments("What does a step of learning take on a model of the size that people ship?", {
  ...{ size, folder },
  rounds: number("steps", 5, 1),
});
const { model, packs } = await scaleFiles({ ...given, only: "core" });
const steps = new URL("lib/scale-steps.js", import.meta.url);
const [pack] = packs;
if (!pack) throw new Error("no pack");
pack.packed();
progress("learning");
const ours = inFreshProcess(steps, "learnSteps", [model, pack.path, given.rounds]);
const serving = inFreshProcess(steps, "learnSteps", [model, pack.path, 0]);
progress("learning, PEFT");
const peer = python("scale_step.py", [given.size, String(given.rounds)], JSON.stringify(ours.rows));
const peft = "figures" in peer ? peer.figures : undefined;
/** @type {import("./lib/report.js").Row[]} */
const rows = [
  {
    name: "coefficients of all layers, 4 bits",
    "creation, CPU s": ours.creation / 1000,
    "until the first step, CPU s": ours.first / 1000,
    "step, CPU s": ours.ms / 1000,
    "step ÷ PEFT": peft ? ours.ms / peft.ms : null,
    "peak, MB": ours.peak / 1e6,
    "peak ÷ serving": ours.peak / serving.peak,
  },
];
if (peft) rows.push({ name: "PEFT, LoRA r 16, f32", "step, CPU s": peft.ms / 1000, "peak, MB": peft.peak / 1e6 });
const question = `What does a step of learning take? ${given.size}, 8 rows of 32 tokens, 6 of them learned; one thread, fastest of ${given.rounds}.`;
const notes = [
  "Until the first step, two starts are tried for six steps each, and gradients are checked. serving: a run of as many tokens.",
];
print(given.json, [{ question, rows, notes }], [peerLine("PEFT", peer)]);

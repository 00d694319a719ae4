/**
 * What do tasks cost on a model of the size that people ship? Qwen2.5's shapes in 4 bits with seeded random weights, 20 LoRAs of rank 16
 * on all linear layers: packing, creation, memory, switches and tokens beside the plain model, one thread, onnxruntime-node.
 *
 * Needs a Python (PYTHON) with onnxruntime-genai, onnx-ir, onnx, torch, transformers and gguf, which makes the models and the adapters once,
 * and for llama.cpp a folder with llama/node_modules/node-llama-cpp (EIGENLORA_RUNTIMES).
 */
import { spawnSync } from "node:child_process";
import { existsSync, rmSync } from "node:fs";
import { mkdir, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { choice, flag, number, readArguments, text } from "./lib/arguments.js";
import { findLlama } from "./lib/llm-llama.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print, progress } from "./lib/report.js";

const given = readArguments("What do tasks cost on a model of the size that people ship?", {
  size: choice(["0.5b", "1.5b", "3b"], "of the model", "0.5b"),
  form: choice(["q4", "q4f16"], "of the model: what is not in 4 bits is f32 or f16", "q4"),
  folder: text("FOLDER", "where models, adapters and packs are kept", join(tmpdir(), "eigenlora-scale")),
  only: choice(["core", "shared", "apart"], "this pack alone"),
  learn: flag(
    "how long a step of learning takes beside PEFT's, and nothing else; with the pack whose sides are both shared",
  ),
  skills: number(
    "what a process holds with so many of them, and nothing else; beyond 20 they are copies",
    undefined,
    1,
  ),
  tab: flag("what a tab of Chromium takes with onnxruntime-web on WebAssembly, and nothing else"),
  rounds: number("rounds of steps", 5, 1),
});
const folder = join(given.folder, given.size);
const model = join(folder, given.form === "q4" ? "model" : "model-q4f16", "model.onnx");

/** Packs by name: the adapters, what the command is told, and what it gives. */
const PACKS = /** @type {const} */ ({
  core: ["shared", ["--k", "32", "--dtype", "int4"], "both sides shared, K 32, int4"],
  shared: ["shared", [], "A shared, default"],
  apart: ["apart", [], "nothing shared, default"],
});

await mkdir(folder, { recursive: true });
if (!existsSync(join(folder, "apart", "19", "adapter_config.json")) || !existsSync(model)) {
  progress(`making a model of ${given.size} and its adapters`);
  if (!made("scale_model.py")) process.exit(2);
}

const steps = new URL("lib/scale-steps.js", import.meta.url);
if (given.learn) {
  learning();
  process.exit();
}
if (given.skills) {
  holding(given.skills);
  process.exit();
}
if (given.tab) {
  tabs();
  process.exit();
}
const [packing, memory, times] = [[], [], []].map((rows) => /** @type {import("./lib/report.js").Row[]} */ (rows));
memory.push({ name: "plain", ...inFreshProcess(steps, "holdModel", [model, ""]) });
for (const name of /** @type {(keyof typeof PACKS)[]} */ (Object.keys(PACKS))) {
  if (given.only && given.only !== name) continue;
  const [, , what] = PACKS[name];
  const pack = join(folder, `${name}.eigen`);
  if (!existsSync(pack)) packing.push({ name: what, ...packed(name) });
  progress(what);
  const { size } = await stat(pack);
  memory.push({ name: what, "pack, MB": size / 1e6, ...inFreshProcess(steps, "holdModel", [model, pack]) });
  times.push({ name: what, ...inFreshProcess(steps, "timeSteps", [model, pack, given.rounds]) });
}
progress("PEFT");
const peer = python("scale_hold.py", [given.size, join(folder, "apart"), String(given.rounds)]);
if ("figures" in peer) {
  const { resident, ...peft } = peer.figures;
  memory.push({ name: "PEFT, f32", "resident, MB": resident / 1e6 });
  times.push({
    name: "PEFT, f32",
    "again, ms": peft.switch,
    "plain token, ms": peft.plain,
    "token ÷ plain": peft.token,
  });
}
const llama = await besideLlama();
print(
  given.json,
  [
    {
      question: "What does packing 20 adapters take?",
      rows: packing,
      notes: ["Packs are kept: remove them to pack again."],
    },
    {
      question: "How long does creation take, and what does a process hold? Each in a process of its own.",
      rows: memory,
      notes: [
        "resident: after a switch to each of 20 skills and a token, above the plain model. very first: switch, from the file.",
      ],
    },
    {
      question: `What do switches and tokens take? In turns with the plain model in one process, medians of ${given.rounds} rounds.`,
      rows: times,
      notes: [
        "CPU time. first: to a skill whose bytes are in memory, but were never used. again: to one that was used before.",
        "Peers' are beside their own plain models, 20 adapters in memory: PEFT's in f32, by set_adapter; llama.cpp's in Q4_0, by a method",
        "that node-llama-cpp keeps to itself.",
      ],
    },
  ],
  [peerLine("PEFT", peer), llama],
);

/** Whether a script has made its files for this size. @param {string} script */
function made(script) {
  const path = fileURLToPath(new URL(`lib/${script}`, import.meta.url));
  const options = { stdio: /** @type {any} */ (["ignore", "ignore", "inherit"]) };
  return spawnSync(process.env.PYTHON ?? "python3", [path, folder, given.size, given.form], options).status === 0;
}

/** Adds what llama.cpp takes with the same weights and adapters. @returns {Promise<import("./lib/report.js").Peer>} */
async function besideLlama() {
  progress("llama.cpp");
  const gguf = join(folder, "model.gguf");
  const peer = await findLlama(existsSync(gguf) || made("scale_gguf.py") ? gguf : undefined);
  if ("reason" in peer) return peer;
  const llama = new URL("lib/llm-llama.js", import.meta.url);
  await inScratch(async (scratch) => {
    const adapters = join(scratch, "adapters");
    inFreshProcess(llama, "qwen2Adapters", [join(folder, "apart"), adapters]);
    const [plain, held] = ["", adapters].map((one) => inFreshProcess(llama, "holdLlama", [gguf, one]));
    memory.push({ name: "llama.cpp, plain", "peak, MB": plain.peak / 1e6, "resident, MB": plain.resident / 1e6 });
    memory.push({ name: "llama.cpp", "resident, MB": (held.resident - plain.resident) / 1e6 });
    times.push({ name: "llama.cpp", ...inFreshProcess(llama, "tokensLlama", [gguf, adapters, given.rounds]) });
  });
  return peer;
}

/** @param {keyof typeof PACKS} name @returns {import("./lib/report.js").Row} */
function packed(name) {
  const [adapters, options, what] = PACKS[name];
  progress(`packing: ${what}`);
  const packing = new URL("lib/scale-packing.js", import.meta.url);
  return inFreshProcess(packing, "packed", [join(folder, adapters), join(folder, `${name}.eigen`), options.join(" ")]);
}

/** @param {number} skills */
function holding(skills) {
  /** @type {import("./lib/report.js").Row[]} */
  const rows = [];
  const plain = inFreshProcess(steps, "holdModel", [model, ""])["resident, MB"];
  for (const name of /** @type {(keyof typeof PACKS)[]} */ (Object.keys(PACKS))) {
    if (given.only && given.only !== name) continue;
    const [pack, more] = [join(folder, `${name}.eigen`), join(folder, `${name}, ${skills}.eigen`)];
    if (!existsSync(pack)) packed(name);
    progress(`${skills} skills: ${PACKS[name][2]}`);
    const bytes = inFreshProcess(steps, "manySkills", [pack, more, skills]);
    const [few, many] = [pack, more].map((one) => inFreshProcess(steps, "holdModel", [model, one])["resident, MB"]);
    rmSync(more);
    rows.push({
      name: PACKS[name][2],
      "pack, MB": bytes / 1e6,
      "20 skills, MB": few,
      "all, MB": many,
      "with the model, ÷ 20": (plain + many) / (plain + few),
    });
  }
  const question = `What does a process hold of ${skills} skills above the plain model, after a switch to each and a token?`;
  print(given.json, [{ question, rows, notes: [`The plain model takes ${Math.round(plain)} MB.`] }]);
}

function tabs() {
  const tab = new URL("lib/scale-tab.js", import.meta.url);
  progress("the plain model in a tab");
  const plain = inFreshProcess(tab, "holdInTab", [model, ""]);
  /** @type {import("./lib/report.js").Row[]} */
  const rows = [{ name: "plain", ...plain }];
  for (const name of /** @type {(keyof typeof PACKS)[]} */ (Object.keys(PACKS))) {
    if (given.only && given.only !== name) continue;
    const pack = join(folder, `${name}.eigen`);
    if (!existsSync(pack)) packed(name);
    progress(PACKS[name][2]);
    const found = inFreshProcess(tab, "holdInTab", [model, pack]);
    const keys = ["creation, s", "peak, MB", "peak in use, MB"];
    const ratios = keys.map((key) => [`${key.split(",")[0]} ÷ plain`, found[key] / plain[key]]);
    rows.push({ name: PACKS[name][2], ...found, ...Object.fromEntries(ratios) });
  }
  const question =
    "What does a tab take, with a switch to each of 20 skills and tokens? A browser each, WebAssembly, one thread.";
  print(given.json, [
    {
      question,
      rows,
      notes: [
        "Peaks: resident set of the tab's process, once the session is there, and behind 20 switches and 17 tokens. Times by the clock.",
      ],
    },
  ]);
}

function learning() {
  const pack = join(folder, "core.eigen");
  if (!existsSync(pack)) packed("core");
  progress("learning");
  const ours = inFreshProcess(steps, "learnSteps", [model, pack, given.rounds]);
  const serving = inFreshProcess(steps, "learnSteps", [model, pack, 0]);
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
  const question = `What does a step of learning take? 8 rows of 32 tokens, 6 of them learned; one thread, fastest of ${given.rounds}.`;
  const notes = [
    "Until the first step, two starts are tried for six steps each, and gradients are checked. serving: a run of as many tokens.",
  ];
  print(given.json, [{ question, rows, notes }], [peerLine("PEFT", peer)]);
}

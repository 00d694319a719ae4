/**
 * What do tasks cost on a model of the size that people ship? Qwen2.5's shapes in 4 bits with seeded random weights, 20 LoRAs of rank 16
 * on all linear layers: packing, creation, memory, switches and tokens beside the plain model, one thread, onnxruntime-node.
 *
 * Needs a Python that makes the files (lib/scale-files.js), and for llama.cpp a folder with llama/node_modules/node-llama-cpp
 * (EIGENLORA_RUNTIMES).
 */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { number, readArguments } from "./lib/arguments.js";
import { findLlama } from "./lib/llm-llama.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { FILES, FORM, scaleFiles } from "./lib/scale-files.js";

const given = readArguments("What do tasks cost on a model of the size that people ship?", {
  ...FILES,
  form: FORM,
  rounds: number("rounds of steps", 5, 1),
});
const { adapters, model, packs, gguf } = await scaleFiles(given);
const steps = new URL("lib/scale-steps.js", import.meta.url);
const llama = new URL("lib/llm-llama.js", import.meta.url);
const [packing, memory, times] = [[], [], []].map((rows) => /** @type {import("./lib/report.js").Row[]} */ (rows));
memory.push({ name: "plain", ...inFreshProcess(steps, "holdModel", [model, ""]) });
for (const { what, path, packed } of packs) {
  const row = packed();
  if (row) packing.push(row);
  progress(what);
  const { size } = await stat(path);
  memory.push({ name: what, "pack, MB": size / 1e6, ...inFreshProcess(steps, "holdModel", [model, path]) });
  times.push({ name: what, ...inFreshProcess(steps, "timeSteps", [model, path, given.rounds]) });
}
const peers = [besidePeft(), await besideLlama()];
const form = `${given.size}, ${given.form}`;
print(
  given.json,
  [
    {
      question: `What does packing 20 adapters take? ${given.size}.`,
      rows: packing,
      notes: ["Packs are kept: remove them to pack again."],
    },
    {
      question: `How long does creation take, and what does a process hold? ${form}, each in a process of its own.`,
      rows: memory,
      notes: [
        "peak: of creation. resident: after a switch to each of 20 skills and a token, above the plain model; a pack keeps some of them,",
        "and all: once `prefetch` has read all 20. very first: switch, from the file.",
      ],
    },
    {
      question: `What do switches and tokens take? ${form}, in turns with the plain model, medians of ${given.rounds} rounds.`,
      rows: times,
      notes: [
        "CPU time. first: to a skill whose bytes are in memory, but were never used. again: to one that was used before; all are in memory.",
        "Peers are beside their own plain models, 20 adapters in memory. PEFT: f32, set_adapter, plain tokens first. llama.cpp: Q4_0, adapters",
        "in f32, twice their files; a switch hands over a pointer by a method that node-llama-cpp keeps to itself, and the next run builds its",
        "graph anew.",
      ],
    },
  ],
  peers,
);

/** Adds PEFT's rows. */
function besidePeft() {
  progress("PEFT");
  const peer = python("scale_hold.py", [given.size, adapters, String(given.rounds)]);
  if ("figures" in peer) {
    const { resident, switch: again, plain, token } = peer.figures;
    memory.push({ name: "PEFT, f32", "all, MB": resident / 1e6 });
    times.push({ name: "PEFT, f32", "again, ms": again, "plain token, ms": plain, "token ÷ plain": token });
  }
  return peerLine("PEFT", peer);
}

/** Adds llama.cpp's rows, with the same weights. @returns {Promise<import("./lib/report.js").Peer>} */
async function besideLlama() {
  progress("llama.cpp");
  const peer = await findLlama(gguf);
  if ("reason" in peer) return peer;
  try {
    await inScratch(async (scratch) => {
      const folder = join(scratch, "adapters");
      inFreshProcess(llama, "qwen2Adapters", [adapters, folder]);
      const [plain, held] = ["", folder].map((one) => inFreshProcess(llama, "holdLlama", [peer.base, one]));
      memory.push({ name: "llama.cpp, plain", "resident, MB": plain.resident / 1e6 });
      memory.push({ name: "llama.cpp, Q4_0", "all, MB": (held.resident - plain.resident) / 1e6 });
      times.push({
        name: "llama.cpp, Q4_0",
        ...inFreshProcess(llama, "tokensLlama", [peer.base, folder, given.rounds]),
      });
    });
    return peer;
  } catch (error) {
    return { name: peer.name, reason: /** @type {Error} */ (error).message };
  }
}

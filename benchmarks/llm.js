/**
 * Measures the cost of tasks on a real language model (SmolLM2-135M, 120 layers adapted, one thread). Switches, first
 * tokens and tokens a second compared with the plain model; caches that are kept across a switch; memory of many
 * skills, compared with PEFT's and llama.cpp's; a training step compared with PEFT's.
 *
 * Needs SmolLM2 (EIGENLORA_SMOLLM2). For llama.cpp EIGENLORA_RUNTIMES names a folder with
 * llama/node_modules/node-llama-cpp, and `--gguf` a file of the base.
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { data } from "../examples/minilm.js";
import { packOf, withAdapters } from "./lib/adapters.js";
import { choice, flag, number, readArguments, text } from "./lib/arguments.js";
import { judgeCaches, timeCaches } from "./lib/llm-caches.js";
import { llamaSteps } from "./lib/llm-llama.js";
import { memoryRows } from "./lib/llm-memory-rows.js";
import { stepsPart } from "./lib/llm-steps.js";
import { trainingPart } from "./lib/llm-training.js";
import { inScratch } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { NO_SMOLLM2, smollm2 } from "./lib/skills.js";

const given = readArguments("What do tasks cost on a real language model?", {
  part: choice(["steps", "caches", "memory", "training"], "this part alone"),
  adapters: text("FOLDER", "PEFT adapters of SmolLM2", data("smollm2/adapters")),
  pack: text("FILE", "a pack of them, instead of one made here"),
  gguf: text("FILE", "the base for llama.cpp"),
  k: number("components per side", 32, 1),
  rounds: number("rounds of steps", 11, 1),
  rows: number("test rows of a task, to judge caches", 40, 1),
  quick: flag("less of everything, to see that it runs"),
});
if (!smollm2) {
  process.stderr.write(`llm: ${NO_SMOLLM2}\n`);
  process.exit(2);
}
const { quick, part, k } = given;
const wants = (/** @type {string} */ one) => part === undefined || part === one;
const [rounds, count] = quick ? [1, 4] : [given.rounds, given.rows];

/** @type {import("./lib/report.js").Part[]} */
const parts = [];
/** @type {import("./lib/report.js").Peer[]} */
const peers = [];

await inScratch(async (scratch) => {
  const pack = given.pack ?? (await made(scratch));
  if (wants("steps")) {
    const llama = await llamaSteps(pack, given.gguf, rounds);
    parts.push(stepsPart(pack, rounds, quick), ...llama.parts);
    peers.push(...llama.peers);
  }
  if (wants("caches")) {
    progress("caches");
    const lengths = quick ? [32] : [32, 256];
    parts.push({
      question:
        "How soon is the first token of a skill there, behind a text that the base has read? f32, the switch counted.",
      rows: await timeCaches(pack, lengths, rounds),
    });
    parts.push({
      question: `What does a kept cache cost? ${count} test rows of each task, f32.`,
      rows: await judgeCaches(pack, count, quick ? 2 : Infinity),
      notes: ["Means over tasks; by teacher forcing, answers ended by <|im_end|>."],
    });
  }
  if (wants("training")) {
    const { part, peer } = trainingPart(pack, quick ? 1 : 5);
    parts.push(part);
    peers.push(peer);
  }
  if (wants("memory")) {
    const { gguf, adapters } = given;
    const found = await memoryRows({ pack, gguf, adapters, scratch, quick });
    parts.push({
      question: "How much memory does a process with N skills hold? Each in a process of its own.",
      rows: found.rows,
      notes: [
        "resident: after one switch to every skill and a run on the first 20. skills: what is above the same model without any, where both are",
        "loaded alike. Beyond the real skills ours are blends of these, read on demand (maxResidentBytes 4 MB); PEFT and llama.cpp have the real ones repeated.",
      ],
    });
    peers.push(...found.peers);
  }
});
print(given.json, parts, peers);

/** @param {string} folder */
async function made(folder) {
  progress(`a pack of ${given.adapters}`);
  const file = join(folder, "skills.eigen");
  const dtype = /** @type {const} */ ({ basis: "f16", coefficients: "f16", head: "f16" });
  await withAdapters([given.adapters], async (adapters) =>
    writeFile(file, await packOf(adapters, { select: { kind: "k", k }, gauge: "balanced", dtype })),
  );
  return file;
}

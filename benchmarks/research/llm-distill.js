/**
 * What does distilling give back of what a small pack has lost? Every skill of a pack of SmolLM2's tasks is distilled on the prompts and
 * completions of its own training rows, until it answers as its adapter does. The pack with all of them is written to a file, which
 * `bench llm-score --pack FILE` judges on the test rows.
 *
 * Needs SmolLM2 (EIGENLORA_SMOLLM2).
 */
import { writeFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { distill } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import { parseTaskFile } from "../../dist/src/core/task-file.js";
import { freshPack, tasksOf } from "../../dist/src/pack/write.js";
import { data } from "../../examples/minilm.js";
import { number, readArguments, text } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import {
  createEncode,
  encodeForTrainer,
  examplesOf,
  NO_SMOLLM2,
  readSkills,
  smollm2,
  smollm2File,
} from "../lib/skills.js";

const QUESTION = "What does distilling give back of what a small pack has lost?";
const given = readArguments(QUESTION, {
  pack: text("FILE", "the pack", data("smollm2/twenty.eigen")),
  adapters: text("FOLDER", "adapters to answer like", data("smollm2/adapters")),
  model: text("FILE", "ONNX file in the model's folder", "onnx/model.onnx"),
  steps: number("steps of each skill", 60),
  batch: number("rows of a step", 8, 1),
  rate: number("learning rate, if not the one by the rule of `distill`"),
  skills: text("NAMES", "these alone, between commas"),
  output: text("FILE", "the pack to write", "distilled.eigen"),
});
if (!smollm2) {
  process.stderr.write(`llm-distill: ${NO_SMOLLM2}\n`);
  process.exit(2);
}

ort.env.logLevel = "error";
const [skills, tokens] = await Promise.all([readSkills(), createEncode()]);
const encode = encodeForTrainer(tokens);
const pack = await openPack(given.pack);
const session = await createEigenSession(ort, smollm2File(given.model), pack, {
  trainable: true,
  session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const adapters = await readAdapters([given.adapters]);
/** @type {Map<string, Uint8Array>} */
const blobs = new Map();
/** @type {import("../lib/report.js").Row[]} */
const rows = [];
const { steps, batch, rate } = given;
const wanted = given.skills?.split(",");
for (const adapter of adapters) {
  const skill = skills.get(adapter.id);
  if (!skill || !pack.tasks.has(adapter.id) || wanted?.includes(adapter.id) === false) continue;
  const examples = examplesOf(skill, skill.train);
  const started = performance.now();
  const { id, file, divergenceBefore, divergenceAfter, kept } = await distill(session, {
    ...{ adapter, examples, encode, steps, batch },
    ...(rate === undefined ? {} : { learningRates: { terms: rate } }),
  });
  blobs.set(id, parseTaskFile(file, id).blob);
  const seconds = (performance.now() - started) / 1000;
  rows.push({ name: id, "KL projected": divergenceBefore, "KL distilled": divergenceAfter, kept, seconds });
  progress(`${id}: ${divergenceBefore.toFixed(4)} → ${divergenceAfter.toFixed(4)}, ${seconds.toFixed(0)} s`);
}
await session.close();
const chunks = [];
for await (const chunk of (await freshPack(pack, await tasksOf(pack, blobs))).chunks) chunks.push(chunk);
await writeFile(given.output, chunks);
await pack.close();
for (const adapter of adapters) await adapter.close();
for (const key of /** @type {const} */ (["KL projected", "KL distilled"]))
  progress(`${key}: ${mean(rows.map((row) => Number(row[key]))).toFixed(4)}`);
const notes = [`${steps} steps of ${batch} rows, written to ${given.output}.`];
print(given.json, [{ question: QUESTION, rows, notes }]);

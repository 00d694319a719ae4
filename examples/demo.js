/**
 * The demo: a pack of 20 LoRA adapters on the real model in onnxruntime-web (WebAssembly, nothing native). It
 * classifies sentences while switching tasks, compares the answers with PEFT's, learns a new task, shows memory, and
 * returns to the base bit for bit. Exits 1 if the base is not restored or the answers are not close enough to PEFT's.
 *
 * The pack, tasks.eigen, was made by one command, which takes a quarter of an hour; `npm run demo -- --pack` makes one
 * anew and shows that. Run with `npm run demo`, or `npm run demo -- --all` for all test rows. Everything it reads is in
 * test/data.
 *
 *   eigenlora pack test/data/adapters/own-seed --model test/data/minilm/model_fp16.onnx --tokens 32 -o examples/tasks.eigen
 */
import { readFile, stat } from "node:fs/promises";
import { openPack } from "eigenlora";
import { searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEngine } from "eigenlora/onnxruntime";
import { createTrainer, packByAnswers } from "eigenlora/train";
import * as ort from "onnxruntime-web";
import {
  agreement,
  createEncoder,
  data,
  labelOf,
  model,
  packed,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "./minilm.js";

/** Test rows per task, without `--all`. */
const ROWS = process.argv.includes("--all") ? Infinity : 16;
const SENTENCES = [
  "a fast mail reader for the terminal",
  "Python library to draw charts and plots",
  "first-person shooter with network play",
  "development files for reading and writing archives in C",
];
const TASKS = ["debtags-role", "debtags-use", "debtags-works-with", "debtags-implemented-in"];
/** A task that the pack lacks: what a package of the X Window System is. */
const LEARNED = "hub-54-x11";
const STEPS = 24;
/** The most mean accuracy that the pack may lose, and the least share of answers that are PEFT's. */
const [MAX_ACCURACY_LOST, MIN_SAME] = [0.04, 0.9];
/** The least share of right answers of the learned task; 0.25 is chance. */
const MIN_LEARNED = 0.8;

/** @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session */

ort.env.wasm.numThreads = 1;
const encode = await createEncoder(ort);
const reference = new Map([...(await readReference("hub")), ...(await readReference("own-seed"))]);

const adapters = await readAdapters([data("adapters/own-seed")]);
const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
const file = new Blob(process.argv.includes("--pack") ? await packedAnew() : [await readFile(packed)]);
const pack = await openPack(file);
await pack.prefetch(pack.tasks.keys());
await showPack();

const session = await createEigenSession(ort, model, pack);
const base = await session.run(encode(SENTENCES));
await showSentences();
const { lost, same } = await showAccuracy();
const learned = await showLearning();
await showMemory();

await session.switchTask(null);
const identical = sameBits(base.logits, (await session.run(encode(SENTENCES))).logits);
console.log(`back to the base: its logits are ${identical ? "bit-identical" : "NOT THE SAME"}`);
await session.close();
for (const adapter of adapters) await adapter.close();
if (!identical || lost > MAX_ACCURACY_LOST || same < MIN_SAME || learned < MIN_LEARNED) {
  console.error(
    `FAILED: expected the same bits, at most ${percent(MAX_ACCURACY_LOST)} of accuracy lost, ${percent(MIN_SAME)} of PEFT's answers, ` +
      `and ${percent(MIN_LEARNED)} right of the learned task`,
  );
  process.exitCode = 1;
}

/** Packs with a model, as `eigenlora pack` does: the smallest pack whose tasks answer as their adapters. */
async function packedAnew() {
  const onProgress = (/** @type {import("eigenlora/build").WorkProgress} */ { stage, detail, done, total }) =>
    console.error(`${stage} ${detail}, step ${done} of ${total}`);
  const { chunks } = await packByAnswers(createEngine(ort), model, { adapters, encode, onProgress });
  return /** @type {BlobPart[]} */ (chunks);
}

/** Compares the pack with the adapters and with a pack that is made without a model. */
async function showPack() {
  const { report } = await searchPack(adapters, {});
  const bytes = file.size;
  const tasks = sum([...pack.tasks.values()].map((task) => task.bytes));
  const count = pack.tasks.size;
  print([
    [`${count} tasks of one model`, "on disk", "one task"],
    ["adapters, as PEFT saved them", kB(adapterBytes), kB(adapterBytes / count)],
    ["packed without a model", kB(report.bytes), kB((report.bytes - (report.shared?.bytes ?? 0)) / count)],
    ["packed with the model", `${kB(bytes)} (${(adapterBytes / bytes).toFixed(0)}× smaller)`, kB(tasks / count)],
    ["  components, stored once", kB(bytes - tasks), ""],
    ["  coefficients and heads", kB(tasks), ""],
  ]);
}

/** The answers of some tasks to the sentences. */
async function showSentences() {
  const runtime = `onnxruntime-web ${ort.env.versions.web}`;
  console.log(`MiniLM in ${runtime}, one session, mode "${session.mode}": ${session.reason}\n`);
  /** @type {string[][]} */
  const answers = [];
  for (const id of TASKS) {
    await session.switchTask(id);
    const labels = pack.tasks.get(id)?.metadata.labels ?? [];
    const logits = await runBatches(session, toBatches(encode, SENTENCES));
    answers.push(logits.map((row) => labels[labelOf(row)]));
  }
  print([["sentence", ...TASKS], ...SENTENCES.map((sentence, s) => [sentence, ...answers.map((row) => row[s])])]);
}

/**
 * Accuracy of each task and PEFT's on the same rows; returns the means of what is lost, and of answers that are PEFT's.
 */
async function showAccuracy() {
  const rows = [["task", "rows", "PEFT", "pack", "same answer", "takes", "switch", "run, per text"]];
  /** @type {number[][]} */
  const figures = [];
  for (const id of pack.tasks.keys()) {
    const test = (await readTask(id)).test.slice(0, ROWS);
    const labels = test.map(([, label]) => label);
    const peft = reference.get(id)?.predictions ?? [];
    const batches = toBatches(
      encode,
      test.map(([text]) => text),
    );
    const { milliseconds } = await session.switchTask(id);
    const started = performance.now();
    const found = (await runBatches(session, batches)).map(labelOf);
    const perText = (performance.now() - started) / test.length;
    const accuracies = [peft, found].map((answers) => agreement(answers, labels));
    const shares = [...accuracies, agreement(found, peft)];
    figures.push([...shares, milliseconds.total, perText]);
    const blob = pack.tasks.get(id)?.bytes ?? 0;
    rows.push([id, String(test.length), ...shares.map(percent), kB(blob), ms(milliseconds.total), ms(perText)]);
  }
  const means = figures[0].map((_, c) => figures.reduce((sum, row) => sum + row[c], 0) / figures.length);
  const total = sum(rows.slice(1).map((row) => Number(row[1])));
  rows.push(["mean", `of ${total}`, ...means.slice(0, 3).map(percent), "", ms(means[3]), ms(means[4])]);
  print(rows);
  return { lost: means[0] - means[1], same: means[2] };
}

/**
 * Learns a task from labelled lines, as on a user's device, and asks it what it has not seen; returns the share that is
 * right.
 */
async function showLearning() {
  const { train, test, labels } = await readTask(LEARNED);
  const trainable = await createEigenSession(ort, model, pack, { trainable: true, session: { logSeverityLevel: 3 } });
  const trainer = await createTrainer(trainable, { labels, encode });
  const examples = train.map(([text, label]) => ({ text, label: labels[label] }));
  const started = performance.now();
  for await (const _ of trainer.fit(examples, { steps: STEPS, batch: 8 }));
  const seconds = (performance.now() - started) / 1000;
  await session.addTask(LEARNED, await trainer.task());
  await trainable.close();
  await session.switchTask(LEARNED);
  const texts = test.map(([text]) => text);
  const found = (await runBatches(session, toBatches(encode, texts))).map(labelOf);
  const expected = test.map(([, label]) => label);
  const right = agreement(found, expected);
  const peft = reference.get(LEARNED)?.predictions ?? [];
  print([
    [`learned here: ${labels.join(", ")}`, `${STEPS * 8} examples`, "a LoRA, trained by PEFT"],
    ["right answers to new lines", percent(right), percent(agreement(peft, expected))],
    ["takes", kB(pack.tasks.get(LEARNED)?.bytes ?? 0), kB(adapterBytes / adapters.length)],
    ["time", `${seconds.toFixed(1)} s`, ""],
  ]);
  return right;
}

/** Memory in addition to the model, compared with other ways to have these tasks. */
async function showMemory() {
  const { total, ...owners } = session.memory();
  const count = adapters.length;
  print([
    ["in memory, in addition to one model", ""],
    ...Object.entries(owners).map(([owner, bytes]) => [`  ${owner}`, kB(bytes)]),
    [`${pack.tasks.size} tasks, this session`, kB(total)],
    [`${count} separate adapters`, kB(adapterBytes)],
    [`${count} separate models, ${count - 1} more`, kB((count - 1) * (await stat(model)).size)],
  ]);
}

/** @param {ort.Tensor} a @param {ort.Tensor} b */
function sameBits(a, b) {
  const [x, y] = [a, b].map(({ data }) => new Uint32Array(/** @type {Float32Array} */ (data).slice().buffer));
  return x.length === y.length && x.every((bits, i) => bits === y[i]);
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

/** @param {number} n */
function kB(n) {
  return n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(2)} MB`;
}

/** @param {number} share */
function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/** @param {number} milliseconds */
function ms(milliseconds) {
  return `${milliseconds.toFixed(2)} ms`;
}

/** @param {string[][]} rows the first is the heading */
function print(rows) {
  const widths = rows[0].map((_, c) => Math.max(...rows.map((row) => row[c].length)));
  for (const row of rows) {
    console.log(
      row
        .map((cell, c) => (c ? cell.padStart(widths[c]) : cell.padEnd(widths[c])))
        .join("   ")
        .trimEnd(),
    );
  }
  console.log();
}

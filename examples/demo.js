/**
 * The demo: packs 20 LoRA adapters, puts the pack on the real model in onnxruntime-web (WebAssembly, nothing native),
 * classifies sentences while switching tasks, compares the answers with PEFT's, and returns to the base bit for bit.
 * Exits 1 if the base is not restored or the answers do not agree with PEFT's.
 *
 * Run with `npm run demo`, or `npm run demo -- --all` for all test rows. Everything it reads is in test/data.
 */
import { stat } from "node:fs/promises";
import { openPack } from "eigenlora";
import { buildPack, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web";
import {
  agreement,
  createEncoder,
  data,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "./minilm.js";

/** Test rows per task, without `--all`. */
const ROWS = process.argv.includes("--all") ? Infinity : 40;
const SENTENCES = [
  "a fast mail reader for the terminal",
  "Python library to draw charts and plots",
  "first-person shooter with network play",
  "development files for reading and writing archives in C",
];
const TASKS = ["debtags-role", "debtags-use", "debtags-works-with", "debtags-implemented-in"];
/** Largest differences from PEFT that are accepted: of logits for a lossless pack, of mean accuracy for the default pack. */
const [MAX_LOGIT_DIFFERENCE, MAX_ACCURACY_LOST] = [2e-3, 0.05];

/** @typedef {import("eigenlora/build").BuildOptions} BuildOptions */
/** @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session */

ort.env.wasm.numThreads = 1;
const encode = await createEncoder(ort);
const reference = await readReference("own-seed");

const adapters = await readAdapters([data("adapters/own-seed")]);
const { chunks, report } = await searchPack(adapters, { base: await openOnnxHost(model) });
const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
const session = await createEigenSession(ort, model, pack);
const base = await session.run(encode(SENTENCES));

await pack.prefetch(pack.tasks.keys());
await showSentences();
const lost = await showAccuracy();
await showMemory();

await session.switchTask(null);
const identical = sameBits(base.logits, (await session.run(encode(SENTENCES))).logits);
await session.close();
const { agree, difference } = await compareLossless();

console.log(`back to the base: its logits are ${identical ? "bit-identical" : "NOT THE SAME"}`);
console.log(
  `packed without loss: ${percent(agree)} of the answers are PEFT's, logits within ${difference.toExponential(1)} ` +
    `(the first 16 rows of each task)`,
);
const passed = identical && lost <= MAX_ACCURACY_LOST && agree === 1 && difference <= MAX_LOGIT_DIFFERENCE;
if (!passed) {
  console.error(
    `FAILED: expected the same bits, the same answers, logits within ${MAX_LOGIT_DIFFERENCE} of PEFT's, and at most ` +
      `${percent(MAX_ACCURACY_LOST)} of accuracy lost in the small pack`,
  );
  process.exitCode = 1;
}

/** The answers of some tasks to the sentences. */
async function showSentences() {
  const runtime = `onnxruntime-web ${ort.env.versions.web}`;
  console.log(`${pack.tasks.size} tasks on MiniLM in ${runtime}, mode "${session.mode}": ${session.reason}\n`);
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

/** Accuracy of each task and PEFT's on the same rows; returns the mean loss. */
async function showAccuracy() {
  const rows = [["task", "rows", "head only", "PEFT", "pack", "same answer", "blob", "switch", "run, per text"]];
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
    // A strength of 0 leaves the task's head on the base.
    await session.switchTask({ [id]: 0 });
    const headOnly = (await runBatches(session, batches)).map(labelOf);
    const { milliseconds } = await session.switchTask(id);
    const started = performance.now();
    const found = (await runBatches(session, batches)).map(labelOf);
    const perText = (performance.now() - started) / test.length;
    const accuracies = [headOnly, peft, found].map((answers) => agreement(answers, labels));
    const shares = [...accuracies, agreement(found, peft)];
    figures.push([...shares, milliseconds.total, perText]);
    const blob = pack.tasks.get(id)?.bytes ?? 0;
    rows.push([id, String(test.length), ...shares.map(percent), kB(blob), ms(milliseconds.total), ms(perText)]);
  }
  const means = figures[0].map((_, c) => figures.reduce((sum, row) => sum + row[c], 0) / figures.length);
  const total = rows.slice(1).reduce((sum, row) => sum + Number(row[1]), 0);
  rows.push(["mean", `of ${total}`, ...means.slice(0, 4).map(percent), "", ms(means[4]), ms(means[5])]);
  print(rows);
  return means[1] - means[2];
}

/** Memory in addition to the model, compared with other ways to have these tasks. */
async function showMemory() {
  const blobs = [...pack.tasks.values()].map(({ bytes }) => bytes);
  const mean = (/** @type {number[]} */ values) => values.reduce((a, b) => a + b, 0) / values.length;
  print([
    ["", "adapters", "pack"],
    ["all tasks, on disk", kB(report.adapterBytes), `${kB(report.bytes)} (${report.ratio.toFixed(1)}× smaller)`],
    ["one more task", kB(mean(adapters.map((a) => a.byteLength))), kB(mean(blobs))],
  ]);
  const { total, ...owners } = session.memory();
  print([
    ["in memory beside one model", ""],
    ...Object.entries(owners).map(([owner, bytes]) => [`  ${owner}`, kB(bytes)]),
    [`${blobs.length} tasks, this session`, kB(total)],
    [`${blobs.length} separate adapters`, kB(report.adapterBytes)],
    [`${blobs.length} separate models, ${blobs.length - 1} more`, kB((blobs.length - 1) * (await stat(model)).size)],
  ]);
}

/** Packs all components as f32, so only rounding separates the logits from PEFT's. On the rows with PEFT's logits. */
async function compareLossless() {
  /** @type {BuildOptions} */
  const lossless = { select: { kind: "energy", share: 1 }, dtype: { basis: "f32", coefficients: "f32", head: "f32" } };
  const { chunks } = await buildPack(adapters, lossless);
  for (const adapter of adapters) await adapter.close();
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const session = await createEigenSession(ort, model, pack);
  /** @type {[number[], number[]]} */
  const [found, expected] = [[], []];
  let difference = 0;
  for (const id of pack.tasks.keys()) {
    const { logits16, predictions } = /** @type {import("./minilm.js").Reference} */ (reference.get(id));
    await session.switchTask(id);
    const texts = (await readTask(id)).test.slice(0, logits16.length).map(([text]) => text);
    const logits = await runBatches(session, toBatches(encode, texts));
    found.push(...logits.map(labelOf));
    expected.push(...predictions.slice(0, logits.length));
    for (const [r, row] of logits.entries()) {
      for (const [c, value] of row.entries()) difference = Math.max(difference, Math.abs(value - logits16[r][c]));
    }
  }
  await session.close();
  return { agree: agreement(found, expected), difference };
}

/** @param {ort.Tensor} a @param {ort.Tensor} b */
function sameBits(a, b) {
  const [x, y] = [a, b].map(({ data }) => new Uint32Array(/** @type {Float32Array} */ (data).slice().buffer));
  return x.length === y.length && x.every((bits, i) => bits === y[i]);
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

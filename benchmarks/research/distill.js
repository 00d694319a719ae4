/**
 * Measures the gain of distilling. Real adapters of one suite in a pack of few components, distilled on train texts
 * without their labels, asked on test rows through onnxruntime-node: as projected and as distilled (or as projected,
 * where that is better on the texts held back), compared with PEFT's own answers with the adapters. A task's own train
 * texts come first; where they are fewer than half of `--texts`, other tasks' fill up. No text of any test split of the
 * suite is among them.
 *
 * `--into` keeps the row of each task as a line of JSON as soon as it is there; a later run with the same file goes on.
 */
import { appendFile, readFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import { distill } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean, sum } from "simple-statistics";
import { parseTaskFile } from "../../dist/src/core/read-task-file.js";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { MeanDivergence, softmax } from "../../dist/src/train/supervision.js";
import {
  agreement,
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../../examples/minilm.js";
import { bytesOfAdapter, folderOf, plainTexts, SUITES, testTexts, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments, text } from "../lib/arguments.js";
import { clocked } from "../lib/process.js";
import { print, progress } from "../lib/report.js";
import { LOSSLESS } from "../lib/suite.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("../lib/report.js").Row} Row
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 */

const MOST_ROWS = 240;
/** Texts of a step. */
const BATCH = 8;
const DTYPE = "basis=f16";

const given = readArguments("What does distilling win back?", {
  suite: choice(SUITES, "which adapters", "own-seed"),
  k: number("components of the pack; 0: each task by itself", 8, 0),
  rank: number("strongest directions of each module that are kept. Default: all"),
  step: number("entropy-coded integers of this step, instead of --dtype"),
  "head-step": number("the same of heads"),
  dtype: text("PART=TYPE,…", "number formats of basis, coefficients and head", DTYPE),
  tasks: number("distil so many tasks", Infinity, 1),
  texts: number("of a task's own texts at most; 0: text made of the tokenizer's words", 512),
  steps: number("steps of each task", 240),
  rate: number("learning rate of coefficients. Default: distill's own"),
  "head-rate": number("learning rate of the head. Default: distill's own"),
  gauge: choice(["balanced", "as-trained"], "gauge of the pack", "balanced"),
  into: text("FILE", "keep rows there, and go on from those that are there"),
});
const { suite, k, rank, gauge, texts: MOST_TEXTS, steps, rate, into } = given;
const dtype = Object.fromEntries(given.dtype.split(",").map((part) => part.split("=")));

const settings = JSON.stringify({
  SUITE: suite,
  K: k,
  ...(given.step === undefined ? {} : { STEP: given.step, HEAD_STEP: given["head-step"] }),
  // Rows that were kept before these were named have the defaults.
  ...(rank === undefined ? {} : { RANK: rank }),
  ...(given.step !== undefined || given.dtype === DTYPE ? {} : { TYPES: dtype }),
  TEXTS: MOST_TEXTS,
  STEPS: steps,
  BATCH,
  RATE: rate ?? "own",
  HEAD: given["head-rate"] ?? "own",
  GAUGE: gauge,
  TEMPERATURE: "own",
});
const reference = await readReference(suite);
const encode = await createEncoder(ort);

await withAdapters([folderOf(suite)], async (adapters) => {
  const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
  const texts = { tests: testTexts(tasks), pool: plainTexts(tasks) };
  // Counted as f32, whatever the files hold.
  const adapterBytes = sum(adapters.map(bytesOfAdapter));
  const { step, "head-step": headStep } = given;
  const how = step === undefined ? { gauge, rank, dtype } : { gauge, rank, step, headStep };
  const { chunks, report } = await buildPack(adapters, { ...how, select: { kind: "k", k } });
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const session = await createEigenSession(ort, model, pack, {
    trainable: true,
  });
  const { chunks: whole } = await buildPack(adapters, LOSSLESS);
  const exact = await createEigenSession(ort, model, await openPack(new Blob(/** @type {BlobPart[]} */ (whole))));
  const earlier = await readEarlier();
  /** @type {Row[]} */
  const rows = [];
  for (const [i, adapter] of adapters.slice(0, given.tasks).entries()) {
    const known = earlier.get(adapter.id);
    const row = known ?? (await measure({ session, exact }, adapter, tasks[i], texts));
    if (into && !known) await appendFile(into, `${JSON.stringify({ settings, bytes: report.bytes, row })}\n`);
    rows.push(row);
    progress(JSON.stringify(row));
  }
  await Promise.all([session.close(), exact.close()]);
  // Entropy-coded blobs grow or shrink.
  const bytes =
    report.bytes + sum(rows.map((row) => Number(row["blob after, bytes"]) - Number(row["blob before, bytes"])));
  const question = `What does distilling win back (MiniLM, ${suite}, ${adapters.length} adapters of r 8, K ${report.components.max}, ${report.step ? `step ${report.step}` : Object.values(report.dtype).join("/")}, ${bytes} bytes, ${(adapterBytes / bytes).toFixed(1)}× fewer than f32)?`;
  const notes = [
    `${steps} steps of ${BATCH} texts without labels, ${MOST_TEXTS > 0 ? `${MOST_TEXTS} of the task's own at most, filled up to ${MOST_TEXTS / 2}` : "made of the tokenizer's words"}; some are held back for KL(adapter ‖ pack), in nats.`,
    `Accuracy on ${MOST_ROWS} test rows of each task at most. LoRA: PEFT's answers. s: to distil one task.`,
  ];
  print(given.json, [{ question, rows: [...rows, meanOf(rows)], notes }]);
});

/** Rows of the same settings that are in the file, by task. @returns {Promise<Map<string, Row>>} */
async function readEarlier() {
  const lines = into ? (await readFile(into, "utf8").catch(() => "")).split("\n").filter((line) => line !== "") : [];
  return new Map(
    lines
      .map((line) => JSON.parse(line))
      .filter((one) => one.settings === settings)
      .map(({ row }) => [row.name, row]),
  );
}

/** @param {Row[]} rows @returns {Row} */
function meanOf(rows) {
  const numbers = Object.keys(rows[0]).filter((key) => typeof rows[0][key] === "number");
  return {
    name: `mean of ${rows.length}`,
    ...Object.fromEntries(numbers.map((key) => [key, mean(rows.map((row) => Number(row[key])))])),
    kept: `distilled ${rows.filter(({ kept }) => kept === "distilled").length}`,
  };
}

/**
 * @param {{ session: Session, exact: Session }} sessions of the pack, and of the adapters as they are
 * @param {Adapter} adapter
 * @param {import("../../examples/minilm.js").Task} task
 * @param {{ tests: ReadonlySet<string>, pool: readonly string[] }} suite texts of all test splits, and others
 */
async function measure({ session, exact }, adapter, task, { tests, pool }) {
  const { id } = adapter;
  const test = task.test.slice(0, MOST_ROWS);
  const labels = test.map(([, label]) => label);
  const own = shuffle(
    [...new Set(task.train.map(([text]) => text))].filter((text) => !tests.has(text)),
    uniform(2),
  ).slice(0, MOST_TEXTS);
  const texts = [...new Set([...own, ...pool])].slice(0, Math.max(own.length, MOST_TEXTS / 2));
  const batches = toBatches(
    encode,
    test.map(([text]) => text),
  );
  /** @param {string} task */
  const accuracy = async (task) => {
    await session.switchTask(task);
    return 100 * agreement((await runBatches(session, batches)).map(labelOf), labels);
  };
  const rates = {
    ...(rate === undefined ? {} : { terms: rate }),
    ...(given["head-rate"] === undefined ? {} : { head: given["head-rate"] }),
  };
  const options = {
    adapter,
    ...(MOST_TEXTS > 0 ? { texts } : {}),
    encode: /** @type {any} */ (encode),
    steps,
    batch: BATCH,
    learningRates: rates,
  };
  const { ms, cpu, result: made } = await clocked(() => distill(session, options));
  await session.addTask("distilled", made.file);
  const { pack } = session;
  const stored = parseTaskFile(made.file, id).blob;
  const [projected, distilled] = [await accuracy(id), await accuracy("distilled")];
  await exact.switchTask(id);
  const [wanted, found] = [await runBatches(exact, batches), await runBatches(session, batches)];
  const between = new MeanDivergence();
  for (const [i, logits] of found.entries()) between.add([{ probabilities: softmax(wanted[i]) }], [logits]);
  await session.switchTask(id);
  await session.removeTask("distilled");
  return {
    name: id,
    texts: texts.length,
    "own texts": own.length,
    "blob before, bytes": pack.tasks.get(id)?.bytes ?? 0,
    "blob after, bytes": stored.length,
    "KL before": made.divergenceBefore,
    "KL after": made.divergenceAfter,
    "projected, %": projected,
    "distilled, %": distilled,
    "KL of test rows": between.mean,
    "as LoRA, %": 100 * agreement(found.map(labelOf), wanted.map(labelOf)),
    kept: made.kept,
    "LoRA, %": 100 * agreement(reference.get(id)?.predictions ?? [], labels),
    s: ms / 1000,
    "s of a core": cpu / 1000,
  };
}

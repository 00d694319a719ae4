/**
 * What does distilling win back? Real adapters of one suite in a pack of few components, distilled on train texts without their
 * labels, asked on test rows through onnxruntime-node: as projected and as distilled (or as projected, where that is better on the
 * texts held back), beside PEFT's own answers with the adapters. A task's own train texts come first; where they are fewer than
 * half of `--texts`, other tasks' fill up. No text of any test split of the suite is among them.
 *
 * node benchmarks/distill.js [--suite own-seed|shared-seed|hub] [--k N] [--tasks N] [--texts N] [--steps N] [--batch N]
 *   [--ratio R --rank N --dtype basis=int3,coefficients=int3,head=int4]  a pack of a size instead of a number of components
 *   [--rate X] [--head-rate X] [--gauge balanced|as-trained] [--temperature X] [--threads N] [--into FILE] [--json]
 *
 * `--into` keeps the row of each task as a line of JSON as soon as it is there; a later run with the same file goes on.
 */
import { appendFile, readFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { buildPack, searchPack } from "eigenlora/build";
import { distill } from "eigenlora/distill";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { shuffle, uniform } from "../dist/src/tensor/random.js";
import {
  agreement,
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../examples/minilm.js";
import { data, option, print } from "./report.js";
import { bytesOfAdapter } from "./size/suite.js";

const SUITE = /** @type {"own-seed" | "shared-seed" | "hub"} */ (option("suite") ?? "own-seed");
const K = Number(option("k") ?? 8);
const RATIO = option("ratio") === undefined ? undefined : Number(option("ratio"));
const RANK = option("rank") === undefined ? undefined : Number(option("rank"));
const TYPES = Object.fromEntries((option("dtype") ?? "basis=f16").split(",").map((part) => part.split("=")));
const TASKS = Number(option("tasks") ?? Infinity);
const TEXTS = Number(option("texts") ?? 512);
const STEPS = Number(option("steps") ?? 240);
const BATCH = Number(option("batch") ?? 8);
/** distil's own choice unless given, as the temperature. */
const [RATE, HEAD] = [option("rate"), option("head-rate")].map((rate) =>
  rate === undefined ? undefined : Number(rate),
);
const GAUGE = /** @type {"balanced" | "as-trained"} */ (option("gauge") ?? "balanced");
const TEMPERATURE = option("temperature") === undefined ? undefined : Number(option("temperature"));
const THREADS = Number(option("threads") ?? 0);
const INTO = option("into");
const MOST_ROWS = 240;

const adapters = await readAdapters([data(`adapters/${SUITE}`)]);
const reference = await readReference(SUITE);
const encode = await createEncoder(ort);
const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
// The tasks are about the same packages, so another one's train text may be a test text.
const tests = new Set(tasks.flatMap(({ test }) => test.map(([text]) => text)));
const pool = [...new Set(tasks.flatMap(({ train }) => train.map(([text]) => text)))].filter((text) => !tests.has(text));
shuffle(pool, uniform(1));

const how = { gauge: GAUGE, rank: RANK, dtype: TYPES };
// As numbers in f32, whatever their files hold.
const adapterBytes = adapters.reduce((sum, adapter) => sum + bytesOfAdapter(adapter), 0);
const { chunks, report } =
  RATIO === undefined
    ? await buildPack(adapters, { ...how, select: { kind: "k", k: K } })
    : await searchPack(adapters, { goal: { kind: "bytes", max: adapterBytes / RATIO }, ways: [how] });
const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
const options = { trainable: true, session: THREADS > 0 ? { intraOpNumThreads: THREADS } : {} };
const session = await createEigenSession(ort, model, pack, options);
const settings = JSON.stringify({
  SUITE,
  ...(RATIO === undefined ? { K } : { RATIO, RANK, TYPES }),
  TEXTS,
  STEPS,
  BATCH,
  RATE: RATE ?? "own",
  HEAD: HEAD ?? "own",
  GAUGE,
  TEMPERATURE: TEMPERATURE ?? "own",
});
const lines = INTO ? (await readFile(INTO, "utf8").catch(() => "")).split("\n").filter((line) => line !== "") : [];
const earlier = new Map(
  lines
    .map((line) => JSON.parse(line))
    .filter((one) => one.settings === settings)
    .map(({ row }) => [row.name, row]),
);
/** @type {import("./report.js").Row[]} */
const rows = [];
for (const [i, adapter] of adapters.slice(0, TASKS).entries()) {
  const row = earlier.get(adapter.id) ?? (await measure(adapter, tasks[i]));
  if (INTO && !earlier.has(adapter.id))
    await appendFile(INTO, `${JSON.stringify({ settings, bytes: report.bytes, row })}\n`);
  rows.push(row);
  process.stderr.write(`${JSON.stringify(row)}\n`);
}
/** @type {import("./report.js").Row} */
const mean = { name: `mean of ${rows.length}` };
for (const [key, value] of Object.entries(rows[0] ?? {})) {
  if (typeof value === "number") mean[key] = rows.reduce((sum, row) => sum + Number(row[key]), 0) / rows.length;
}
mean.kept = `distilled ${rows.filter(({ kept }) => kept === "distilled").length}`;
rows.push(mean);
await session.release();
for (const adapter of adapters) await adapter.close();

print({
  question: `What does distilling win back (MiniLM, ${SUITE}, ${adapters.length} adapters of r 8, K ${report.components.max}, ${Object.values(report.dtype).join("/")}, ${report.bytes} bytes, ${(adapterBytes / report.bytes).toFixed(1)}× fewer than f32)?`,
  rows,
  peers: [],
  notes: [
    `${STEPS} steps of ${BATCH} texts without labels, ${TEXTS} of the task's own at most, filled up to ${TEXTS / 2}; an eighth is held back for KL(adapter ‖ pack), in nats.`,
    `Accuracy on ${MOST_ROWS} test rows of each task at most. LoRA: PEFT's answers. s: to distil one task.`,
  ],
});

/**
 * @param {import("eigenlora/build").Adapter} adapter
 * @param {import("../examples/minilm.js").Task} task
 */
async function measure(adapter, task) {
  const { id } = adapter;
  const test = task.test.slice(0, MOST_ROWS);
  const own = shuffle(
    [...new Set(task.train.map(([text]) => text))].filter((text) => !tests.has(text)),
    uniform(2),
  ).slice(0, TEXTS);
  const texts = [...new Set([...own, ...pool])].slice(0, Math.max(own.length, TEXTS / 2));
  const labels = test.map(([, label]) => label);
  const batches = toBatches(
    encode,
    test.map(([text]) => text),
  );
  /** @param {string} task */
  const accuracy = async (task) => {
    await session.switchTask(task);
    return 100 * agreement((await runBatches(session, batches)).map(labelOf), labels);
  };
  const started = performance.now();
  const settings = {
    steps: STEPS,
    batch: BATCH,
    rates: { ...(RATE === undefined ? {} : { terms: RATE }), ...(HEAD === undefined ? {} : { head: HEAD }) },
    temperature: TEMPERATURE,
  };
  const made = await distill(session, { adapter, texts, encode: /** @type {any} */ (encode), ...settings });
  const seconds = (performance.now() - started) / 1000;
  await session.addTask("distilled", made.file);
  const [projected, distilled] = [await accuracy(id), await accuracy("distilled")];
  await session.switchTask(id);
  await session.removeTask("distilled");
  return {
    name: id,
    texts: texts.length,
    "own texts": own.length,
    "KL before": made.divergenceBefore,
    "KL after": made.divergenceAfter,
    "projected, %": projected,
    "distilled, %": distilled,
    kept: made.kept,
    "LoRA, %": 100 * agreement(reference.get(id)?.predictions ?? [], labels),
    s: seconds,
  };
}

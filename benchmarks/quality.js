/**
 * How accurate are the tasks, and for how many bytes? Real adapters (own-seed) on real test rows through
 * onnxruntime-node: our packs at several numbers of components and formats, beside every adapter kept on its own and
 * cut to a lower rank by its singular values, beside the heads alone. Heads are counted for all: every way needs them.
 *
 * node benchmarks/quality.js [--all] [--json] [--svg FILE]
 *
 * 32 rows of each task, two minutes on two cores; `--all` takes all 6075 rows and a quarter of an hour.
 */
import { writeFile } from "node:fs/promises";
import * as ort from "onnxruntime-node";
import { openPack } from "eigenlora";
import { buildPack, readAdapters } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import { decodeTensor, tensorBytes } from "../dist/src/dtypes.js";
import { encodeTensor } from "../dist/src/encode.js";
import { deltaError } from "../dist/src/extract/error.js";
import { balance } from "../dist/src/extract/gauge.js";
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
import { drawLines } from "./chart.js";
import { data, print } from "./report.js";

const ROWS = process.argv.includes("--all") ? Infinity : 32;
const COMPONENTS = [4, 8, 16, 32, 48];
const TYPES = /** @type {const} */ (["f32", "f16", "int8", "int4"]);
const RANKS = [1, 2, 4, 8];
/** In the chart; f32 is as accurate as f16 at twice the size. */
const CHARTED = TYPES.slice(1);
const CUT_TYPES = /** @type {const} */ (["f16", "int4"]);

/** @typedef {import("eigenlora/build").Adapter} Adapter */
/** @typedef {import("eigenlora/build").AdapterModule} AdapterModule */
/** @typedef {import("eigenlora").TensorType} TensorType */
/** @typedef {import("eigenlora/build").BuildOptions} BuildOptions */
/** @typedef {import("../examples/minilm.js").Batch<ort.Tensor>} Batch */
/** @typedef {{ batches: Batch[], labels: number[], peft: number[] }} Questions */

/**
 * Nothing of ΔW is lost but the last bits of f32: a way into the session for adapters that are not ours to compress.
 * @param {TensorType} head
 * @returns {BuildOptions}
 */
const lossless = (head) => ({
  select: { kind: "energy", share: 1 },
  types: { basis: "f32", coefficients: "f32", head },
});

const adapters = await readAdapters([data("adapters/own-seed")]);
const questions = await readQuestions();
const peft = mean([...questions.values()].map(({ labels, peft }) => agreement(peft, labels)));
const asked = sum([...questions.values()].map(({ labels }) => labels.length));

const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
/** @type {import("./report.js").Row[]} */
const rows = [];
await addRow("heads alone, f16", adapters, lossless("f16"), { bytes: headBytes("f16"), error: 1, strength: 0 });
await addRow("LoRA as trained, f32", adapters, lossless("f32"), { bytes: adapterBytes, error: 0 });
for (const type of CUT_TYPES) {
  for (const rank of RANKS) {
    const cut = await Promise.all(adapters.map((adapter) => cutAdapter(adapter, rank, type)));
    const bytes = headBytes(type) + sum(cut.map((one) => one.bytes));
    const error = mean(cut.flatMap(({ errors }) => errors));
    const members = cut.map(({ adapter }) => adapter);
    await addRow(`LoRA cut to rank ${rank}, ${type}`, members, lossless(type), { bytes, error });
  }
}
for (const type of TYPES) {
  for (const k of COMPONENTS) {
    const types = { basis: type, coefficients: type, head: type };
    await addRow(`pack K ${k}, ${type}`, adapters, { select: { kind: "k", k }, types });
  }
}
for (const adapter of adapters) await adapter.close();

const svg = process.argv.indexOf("--svg");
if (svg > 0) await writeFile(process.argv[svg + 1] ?? "quality.svg", draw());
print({
  question: `How accurate are ${adapters.length} tasks for how many bytes (MiniLM, r 8; ${asked} test rows)?`,
  rows,
  peers: [{ name: "PEFT", version: `0.21 (test/data/reference): ${(100 * peft).toFixed(1)} % accurate on these rows` }],
  notes: [
    "Means over tasks. kB: all tasks with their heads, 1 kB = 1000 B. Packs are whole files; of LoRA cut to a rank",
    "only the numbers count, no names or headers. PEFT's answer: rows with the label PEFT predicts, right or wrong.",
  ],
});

/** The test rows as inputs, and the answers. @returns {Promise<Map<string, Questions>>} */
async function readQuestions() {
  const encode = await createEncoder(ort);
  const reference = await readReference("own-seed");
  /** @type {Map<string, Questions>} */
  const all = new Map();
  for (const { id } of adapters) {
    const test = (await readTask(id)).test.slice(0, ROWS);
    const peft = /** @type {import("../examples/minilm.js").Reference} */ (reference.get(id)).predictions;
    all.set(id, {
      batches: toBatches(encode, test.map(([text]) => text)),
      labels: test.map(([, label]) => label),
      peft: peft.slice(0, test.length),
    });
  }
  return all;
}

/**
 * Packs adapters, asks every task, adds what came out.
 * @param {string} name
 * @param {Adapter[]} members
 * @param {BuildOptions} options
 * @param {{ bytes: number, error: number, strength?: number }} [instead] figures that count in place of the pack's own,
 *   where the pack is only a way into the session; strength of ΔW
 */
async function addRow(name, members, options, instead) {
  const { chunks, report } = await buildPack(members, options);
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const session = await createEigenSession(ort, model, pack);
  /** @type {number[]} */
  const accuracies = [];
  /** @type {number[]} */
  const agreements = [];
  for (const [id, { batches, labels, peft }] of questions) {
    await session.switchTask({ [id]: instead?.strength ?? 1 });
    const found = (await runBatches(session, batches)).map(labelOf);
    accuracies.push(agreement(found, labels));
    agreements.push(agreement(found, peft));
  }
  await session.release();
  await pack.close();
  const bytes = instead?.bytes ?? report.bytes;
  rows.push({
    name,
    kB: bytes / 1000,
    "kB per task": bytes / 1000 / members.length,
    "× smaller": adapterBytes / bytes,
    "ΔW error": instead?.error ?? report.error.mean,
    "accuracy, %": 100 * mean(accuracies),
    "PEFT's answer, %": 100 * mean(agreements),
  });
  process.stderr.write(`${name}\n`);
}

/**
 * Bytes of all heads; their biases are f16 where the weights are integers, as in a pack.
 * @param {TensorType} type
 */
function headBytes(type) {
  const shapes = adapters.flatMap(({ saved }) => saved.map(({ shape }) => shape));
  return sum(shapes.map(([rows, width]) => (width === undefined ? 2 * rows : tensorBytes(type, rows, width))));
}

/**
 * An adapter cut to its `rank` largest singular values, module by module, and stored as `type`, a scale per row.
 * @param {Adapter} adapter
 * @param {number} rank
 * @param {TensorType} type
 * @returns {Promise<{ adapter: Adapter, bytes: number, errors: number[] }>} bytes of the factors, ΔW error by module
 */
async function cutAdapter(adapter, rank, type) {
  let bytes = 0;
  /** @type {number[]} */
  const errors = [];
  /** @type {Map<string, AdapterModule>} */
  const modules = new Map();
  for (const [name, module] of adapter.modules) {
    const pair = balance(toPair(module.rank, await module.read()), module.out, module.in);
    const kept = Math.min(rank, pair.rank);
    /** @param {Float64Array} side @param {number} width */
    const store = (side, width) => {
      const encoded = encodeTensor(type, side.subarray(0, kept * width), kept, width);
      bytes += encoded.length;
      return decodeTensor(type, encoded, kept, width);
    };
    const factors = { A: store(pair.A, module.in), Bt: store(pair.Bt, module.out) };
    modules.set(name, { ...module, rank: kept, read: async () => factors });
    const { difference, norm } = deltaError(pair, toPair(kept, factors));
    errors.push(difference / norm);
  }
  return { adapter: { ...adapter, modules }, bytes, errors };
}

/**
 * @param {number} rank
 * @param {import("eigenlora/build").Factors} factors
 */
function toPair(rank, { A, Bt }) {
  return { rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
}

/** Accuracy against bytes. */
function draw() {
  /** @param {string} name */
  const accuracy = (name) => Number(rows.find((row) => row.name === name)?.["accuracy, %"]);
  /** @param {string} name @param {RegExp} which */
  const series = (name, which) => {
    const own = rows.filter((row) => which.test(String(row.name)));
    return { name, points: own.map((row) => [Number(row.kB), Number(row["accuracy, %"])]) };
  };
  return drawLines({
    title: `${adapters.length} LoRA tasks on one model: accuracy and bytes`,
    x: "kB for all tasks, heads included",
    y: "mean accuracy, %",
    linear: true,
    lines: [{ name: "LoRA as trained", y: accuracy("LoRA as trained, f32") }],
    series: [
      ...CUT_TYPES.map((type) => series(`each cut by SVD, ${type}`, new RegExp(`^LoRA cut.* ${type}$`))),
      ...CHARTED.map((type) => series(`pack, ${type}`, new RegExp(`^pack.* ${type}$`))),
    ],
  });
}

/** @param {readonly number[]} values */
function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

/** @param {readonly number[]} values */
function mean(values) {
  return sum(values) / values.length;
}

/** A suite of real adapters, whose test rows a live session answers; and adapters that are stored by themselves. */
import { openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { balance } from "../../dist/src/extract/factors.js";
import { decodeTensor } from "../../dist/src/tensor/dtypes.js";
import { encodeTensor } from "../../dist/src/tensor/encode.js";
import {
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../../examples/minilm.js";
import { folderOf } from "./adapters.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("./adapters.js").SuiteName} SuiteName
 * @typedef {{ batches: import("../../examples/minilm.js").Batch<ort.Tensor>[], labels: number[], peft: number[] }}
 *   Questions
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 */

/** Most rows of each task: the first of its test split. */
const MOST_ROWS = 240;
/** One thread gives the same numbers on every machine. */
const SESSION = { intraOpNumThreads: 1, interOpNumThreads: 1 };

/** Build options that lose only the last bits of f32. */
export const LOSSLESS = /** @type {const} */ ({
  select: { kind: "energy", share: 1 },
  dtype: { basis: "f32", coefficients: "f32", head: "f32" },
});

export class Suite {
  /** @type {Map<string, Questions> | undefined} */
  #questions;

  /** @param {SuiteName} name */
  static async open(name) {
    ort.env.logLevel = "error";
    return new Suite(name, await readAdapters([folderOf(name)]));
  }

  /** @param {SuiteName} name @param {Adapter[]} adapters by id */
  constructor(name, adapters) {
    this.name = name;
    this.adapters = adapters;
  }

  /** @returns {Promise<Map<string, Questions>>} by task */
  async questions() {
    if (this.#questions) return this.#questions;
    const [reference, encode] = await Promise.all([readReference(this.name), createEncoder(ort)]);
    this.#questions = new Map();
    for (const { id } of this.adapters) {
      const rows = (await readTask(id)).test.slice(0, MOST_ROWS);
      const peft = reference.get(id)?.predictions.slice(0, rows.length) ?? [];
      const texts = rows.map(([text]) => text);
      this.#questions.set(id, { batches: toBatches(encode, texts), labels: rows.map(([, label]) => label), peft });
    }
    return this.#questions;
  }

  /**
   * Asks the tasks of a pack their test rows.
   * @param {Uint8Array[]} chunks of the pack
   * @returns {Promise<{ id: string, right: number, same: number, peft: number }[]>} shares of rows: right, answered as
   *   PEFT does, and right by PEFT
   */
  async answers(chunks) {
    const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
    const session = await createEigenSession(ort, model, pack, { session: SESSION });
    const found = [];
    for (const [id, { batches, labels, peft }] of await this.questions()) {
      await session.switchTask(id);
      const own = (await runBatches(session, batches)).map(labelOf);
      const share = (/** @type {number[]} */ a, /** @type {number[]} */ b) =>
        a.filter((label, i) => label === b[i]).length / labels.length;
      found.push({ id, right: share(own, labels), same: share(own, peft), peft: share(peft, labels) });
    }
    await session.close();
    await pack.close();
    return found;
  }

  async close() {
    for (const adapter of this.adapters) await adapter.close();
  }
}

/**
 * An adapter stored by itself, a scale for each row; cut to its largest singular values where a rank is given.
 * @param {Adapter} adapter
 * @param {{ rank?: number | undefined, type: import("eigenlora").Dtype }} way
 * @returns {Promise<{ adapter: Adapter, bytes: number }>} bytes of the factors: numbers and scales, no names or headers
 */
export async function storeOne(adapter, { rank, type }) {
  let bytes = 0;
  /** @type {Map<string, import("eigenlora/build").AdapterModule>} */
  const modules = new Map();
  for (const [name, module] of adapter.modules) {
    const { A, Bt } = await module.read();
    const given = { rank: module.rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
    const pair = rank === undefined ? given : balance(given, module.out, module.in);
    const kept = Math.min(rank ?? Infinity, pair.rank);
    /** @param {Float64Array} factor @param {number} width */
    const stored = (factor, width) => {
      const encoded = encodeTensor(type, factor.subarray(0, kept * width), kept, width);
      bytes += encoded.length;
      return decodeTensor(type, encoded, kept, width);
    };
    const term = { rank: kept, A: stored(pair.A, module.in), Bt: stored(pair.Bt, module.out) };
    modules.set(name, { ...module, rank: kept, read: async () => term });
  }
  return { adapter: { ...adapter, modules }, bytes };
}

/**
 * One suite of real adapters: smaller sets of them, their size, and their test rows asked through a live session.
 */

import { openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEngine } from "eigenlora/onnxruntime";
import { createJudge } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { shuffle, uniform } from "../../../dist/src/tensor/random.js";
import {
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../../../examples/minilm.js";
import { bytesOfAdapter, folderOf, plainTexts } from "../../lib/adapters.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("../../lib/adapters.js").SuiteName} SuiteName
 * @typedef {{ right: number, same: number }} Answers rows with the right label, and with the label that PEFT predicts
 * @typedef {{ batches: import("../../../examples/minilm.js").Batch<ort.Tensor>[], labels: number[], peft: number[] }} Questions
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 */

/** Most rows of each task: the first of its test split. */
export const MOST_ROWS = 240;

/** Plain texts that every task is asked when a judge chooses. */
const JUDGED = 16;

/** Options with one thread: the same numbers on every machine, and room for others on this one. */
const SESSION = { intraOpNumThreads: 1, interOpNumThreads: 1 };

export class Suite {
  /** @type {Map<string, Questions> | undefined} */
  #questions;
  /** @type {Awaited<ReturnType<typeof createEncoder<ort.Tensor>>> | undefined} */
  #encode;

  /** @param {string} name @param {string} [folder] of adapters. Default: of the bundled suite of this name */
  static async open(name, folder = folderOf(/** @type {SuiteName} */ (name))) {
    ort.env.logLevel = "error";
    return new this(name, await readAdapters([folder]));
  }

  /** @param {string} name @param {Adapter[]} adapters by id */
  constructor(name, adapters) {
    this.name = name;
    this.adapters = adapters;
  }

  /** File of the answering model. */
  get model() {
    return model;
  }

  /** Numbers of adapters to compare: 5, 10, 20 and all. */
  get sizes() {
    const all = this.adapters.length;
    return [...[5, 10, 20].filter((n) => n < all), all];
  }

  /** `n` adapters, by id; a larger set holds the smaller ones. @param {number} n */
  take(n) {
    const chosen = new Set(
      shuffle(
        this.adapters.map(({ id }) => id),
        uniform(1),
      ).slice(0, n),
    );
    return this.adapters.filter(({ id }) => chosen.has(id));
  }

  async encode() {
    return (this.#encode ??= await createEncoder(ort));
  }

  /** @returns {Promise<Map<string, Questions>>} by task */
  async questions() {
    if (this.#questions) return this.#questions;
    const reference = await readReference(/** @type {SuiteName} */ (this.name));
    const encode = await this.encode();
    this.#questions = new Map();
    for (const { id } of this.adapters) {
      const { test } = await readTask(id);
      const rows = test.slice(0, MOST_ROWS);
      const peft = /** @type {import("../../../examples/minilm.js").Reference} */ (reference.get(id)).predictions.slice(
        0,
        rows.length,
      );
      const texts = rows.map(([text]) => text);
      this.#questions.set(id, { batches: toBatches(encode, texts), labels: rows.map(([, label]) => label), peft });
    }
    return this.#questions;
  }

  /** Number of test rows that a task is asked. @param {string} id */
  async rowsOf(id) {
    return (await this.questions()).get(id)?.labels.length ?? NaN;
  }

  /** Shares of test rows that the adapters themselves answer right, where known. @returns {Promise<number[] | undefined>} */
  async reference() {
    return undefined;
  }

  /** A judge of packs by plain text (`eigenlora/train`), some texts of each task. @param {readonly Adapter[]} adapters */
  async judge(adapters) {
    const encode = /** @type {any} */ (await this.encode());
    return createJudge(createEngine(ort), model, { adapters, texts: await this.texts(), encode, most: JUDGED });
  }

  /**
   * Runs `work` on a session of a pack.
   * @template T
   * @param {Uint8Array[]} chunks
   * @param {(session: Session) => Promise<T>} work
   */
  async withSession(chunks, work) {
    const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
    const session = await createEigenSession(ort, this.model, pack, { session: SESSION });
    try {
      return await work(session);
    } finally {
      await session.close();
      await pack.close();
    }
  }

  /**
   * Asks a task's test rows.
   * @param {Session} session
   * @param {string} id whose rows
   * @param {Parameters<Session["switchTask"]>[0]} [task] what answers them. Default: the task itself
   * @returns {Promise<Answers>}
   */
  async ask(session, id, task = id) {
    const { batches, labels, peft } = /** @type {Questions} */ ((await this.questions()).get(id));
    await session.switchTask(task);
    const found = (await runBatches(session, batches)).map(labelOf);
    const equal = (/** @type {number[]} */ expected) => found.filter((label, i) => label === expected[i]).length;
    return { right: equal(labels), same: equal(peft) };
  }

  /** Plain texts of the suite's kind. */
  async texts() {
    return plainTexts(await Promise.all(this.adapters.map(({ id }) => readTask(id))));
  }

  async close() {
    for (const adapter of this.adapters) await adapter.close();
  }
}

/** Bytes of an adapter's file beside its numbers; numbers are f32, or all f16. @param {Adapter} adapter */
export function headerBytes(adapter) {
  const numbers = bytesOfAdapter(adapter);
  return adapter.byteLength - (adapter.byteLength >= numbers ? numbers : numbers / 2);
}

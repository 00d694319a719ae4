/** The bundled adapters (test/data), packs of them, plain text of their tasks, and synthetic adapters. */
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { writeSafetensors } from "../../dist/src/tensor/safetensors.js";
import { data } from "../../examples/minilm.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {"own-seed" | "shared-seed" | "hub"} SuiteName
 * @typedef {import("../../examples/minilm.js").Task} Task
 */

/** @type {readonly SuiteName[]} */
export const SUITES = ["own-seed", "hub", "shared-seed"];

/** Folder of a suite, or of one of its adapters. @param {SuiteName} suite @param {string} [id] */
export const folderOf = (suite, id = "") => data(`adapters/${suite}/${id}`);

/**
 * Reads adapters, and closes them after the work.
 * @template T
 * @param {readonly string[]} folders
 * @param {(adapters: Adapter[]) => Promise<T>} work
 */
export async function withAdapters(folders, work) {
  const adapters = await readAdapters(folders);
  try {
    return await work(adapters);
  } finally {
    for (const adapter of adapters) await adapter.close();
  }
}

/**
 * A pack as bytes.
 * @param {readonly Adapter[]} adapters
 * @param {import("eigenlora/build").BuildOptions} options
 */
export async function packOf(adapters, options) {
  const { chunks } = await buildPack(adapters, options);
  return new Uint8Array(Buffer.concat(chunks));
}

/** Packs with k components per module and side. @param {readonly Adapter[]} adapters @param {number} k */
export const packOfK = (adapters, k) => packOf(adapters, { select: { kind: "k", k } });

/**
 * Stacks for extraction: all adapters' factors of each module of the first.
 * @param {readonly Adapter[]} adapters
 * @returns {Promise<import("../../dist/src/extract/components.js").ModuleStack[]>}
 */
export async function stacksOf(adapters) {
  const stacks = [];
  for (const [name, { out, in: inputs }] of adapters[0].modules) {
    const members = [];
    for (const { id, modules } of adapters) {
      const module = modules.get(name);
      if (module) members.push({ id, ...(await module.read()) });
    }
    stacks.push({ name, out, in: inputs, members });
  }
  return stacks;
}

/** Bytes of an adapter's numbers in f32, its head among them. @param {Adapter} adapter */
export function bytesOfAdapter({ modules, saved }) {
  const factors = [...modules.values()].reduce((sum, one) => sum + one.rank * (one.in + one.out), 0);
  return 4 * (factors + saved.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0));
}

/** Texts of all test splits. @param {readonly Task[]} tasks */
export const testTexts = (tasks) => new Set(tasks.flatMap(({ test }) => test.map(([text]) => text)));

/**
 * Training texts of all tasks, in a fixed order. The tasks share package descriptions, so a training text of one may be
 * a test text of another; those are left out.
 * @param {readonly Task[]} tasks
 */
export function plainTexts(tasks) {
  const tests = testTexts(tasks);
  const all = new Set(tasks.flatMap(({ train }) => train.map(([text]) => text)));
  return shuffle(
    [...all].filter((text) => !tests.has(text)),
    uniform(1),
  );
}

/** Seeded numbers in [-0.05, 0.05), equal on every machine. @param {number} length @param {number} seed */
export function smallNumbers(length, seed) {
  const random = uniform(seed);
  return Float32Array.from({ length }, () => (random() - 0.5) / 10);
}

/**
 * A tensor of a safetensors file.
 * @param {string} name
 * @param {readonly number[]} shape
 * @param {Float32Array} values
 */
export const f32Entry = (name, shape, values) => ({
  name,
  dtype: "F32",
  shape,
  read: () => new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
});

/** @param {Parameters<typeof writeSafetensors>[0]} entries */
export async function safetensorsOf(entries) {
  const chunks = [];
  for await (const chunk of writeSafetensors(entries)) chunks.push(chunk);
  return new Uint8Array(Buffer.concat(chunks));
}

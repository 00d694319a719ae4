/**
 * The paper's two settings by shape, filled with adapters whose numbers are made when a module is read, so that
 * gigabytes of them need neither memory nor disk. Seeded: the same numbers in every run.
 *
 * The rows of a factor lie near a subspace that all adapters share (directions of falling strength, the last a quarter
 * of the first) plus noise in all directions. Real adapters share less: sizes and times depend only on shapes and K as
 * long as the spectrum falls off, but errors mean nothing.
 */
import { smallNumbers } from "./adapters.js";

/**
 * @typedef {[number, number, number]} Group how many modules of one shape, out, in
 * @typedef {{ model: string, paper: string, rank: number, adapters: number, components: number, groups: Group[], why:
 *   string[] }} Setting why: why our sizes are not the paper's
 * @typedef {"sdxl" | "flan-t5"} SettingName
 */

/** @type {Record<SettingName, Setting>} */
export const SETTINGS = {
  sdxl: {
    model: "SDXL's UNet, attention",
    paper: "4.6 GB to 261 MB, 18×",
    rank: 32,
    adapters: 20,
    components: 14,
    groups: [
      [360, 1280, 1280],
      [120, 1280, 2048],
      [60, 640, 640],
      [20, 640, 2048],
    ],
    why: [
      "The paper's 4.6 GB are 230 MB an adapter; attention of the UNet at rank 32 in f32 is 185.8 MB, so 24 % of its bytes lie in layers it",
      "does not name. Its 261 MB are 5.7 % of 4.6 GB, ours 3.4 % of 3.7 GB: K 14 for 20·32 rows is 2.2 %, coefficients 1.1 %, means 0.2 %.",
      "By this arithmetic 261 MB would hold K 24 at the paper's sizes: it stores more than components and coefficients at K 14, or not all in one type.",
    ],
  },
  "flan-t5": {
    model: "FLAN-T5-large, query and value",
    paper: "about 5×",
    rank: 16,
    adapters: 8,
    components: 32,
    groups: [[144, 1024, 1024]],
    why: [
      "K 32 for 8·16 rows is 4× at best, before means and coefficients: the paper's 5× at K 32 takes 13 adapters by this arithmetic.",
    ],
  },
};

/** Noise of a row, relative to its length along the strongest direction. */
const NOISE = 1;

/** Noise is cut from one table at places drawn for each row. */
const TABLE = smallNumbers(2 ** 20, 1);

/**
 * Adapters of a setting, or of a part of it.
 * @param {SettingName} name
 * @param {readonly Group[]} [groups]
 * @returns {import("eigenlora/build").Adapter[]}
 */
export function adaptersOf(name, groups = SETTINGS[name].groups) {
  const { rank, adapters, components } = SETTINGS[name];
  const shared = components + 2;
  const shapes = groups.flatMap(([count, out, inputs], group) =>
    Array.from({ length: count }, (_, i) => ({
      name: `block.${group}.${String(i).padStart(3, "0")}`,
      out,
      in: inputs,
    })),
  );
  /** The directions of the module that is being read: all its adapters are read together. */
  let [at, A, B] = [-1, new Float32Array(), new Float32Array()];
  /** @param {number} task @param {number} index */
  const read = async (task, index) => {
    const shape = shapes[index];
    if (at !== index)
      [at, A, B] = [index, smallNumbers(shared * shape.in, 2 * index), smallNumbers(shared * shape.out, 2 * index + 1)];
    const seed = 100_000 * (task + 1) + 2 * index;
    return { rank, A: factor(A, shared, rank, seed), Bt: factor(B, shared, rank, seed + 1) };
  };
  return Array.from({ length: adapters }, (_, task) => ({
    id: `adapter-${String(task + 1).padStart(2, "0")}`,
    file: `adapter-${task + 1}`,
    byteLength: 4 * rank * shapes.reduce((sum, shape) => sum + shape.out + shape.in, 0),
    baseModel: undefined,
    saved: [],
    metadata: {},
    warnings: [],
    modules: new Map(
      shapes.map((shape, index) => [
        shape.name,
        { ...shape, rank, layout: /** @type {const} */ ("out-in"), read: () => read(task, index) },
      ]),
    ),
    close: async () => {},
  }));
}

/**
 * @param {Float32Array} directions [shared, width]
 * @param {number} shared @param {number} rank @param {number} seed
 * @returns {Float32Array} [rank, width]
 */
function factor(directions, shared, rank, seed) {
  const width = directions.length / shared;
  const drawn = smallNumbers(rank * (shared + 1), seed);
  const rows = new Float32Array(rank * width);
  for (let i = 0; i < rank; i++) {
    const place = Math.floor((drawn[rank * shared + i] * 10 + 0.5) * (TABLE.length - width));
    for (let j = 0; j < width; j++) rows[i * width + j] = NOISE * 0.03 * TABLE[place + j];
    for (let k = 0; k < shared; k++) {
      const share = drawn[i * shared + k] * 4 ** (-k / (shared - 1));
      for (let j = 0; j < width; j++) rows[i * width + j] += share * directions[k * width + j];
    }
  }
  return rows;
}

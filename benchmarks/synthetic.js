/**
 * Adapters of given shapes whose numbers are made when a module is read, so that gigabytes of them need neither memory nor disk.
 * Seeded: the same numbers in every run.
 *
 * The rows of a factor lie near a subspace that all adapters share, `shared` directions of falling strength, the last a quarter
 * of the first, plus noise in all directions. Real adapters share less: sizes and times follow from shapes and K alone as long
 * as the spectrum falls off, errors mean nothing.
 */
import { uniform } from "./report.js";

/**
 * @typedef {{ name: string, out: number, in: number }} Shape
 * @typedef {{ rank: number, adapters: number, modules: Shape[], shared: number, noise: number }} Setting
 */

/** Noise is cut from one table at places drawn for each row. */
const TABLE = uniform(2 ** 20, 1);

/**
 * @param {Setting} setting `noise`: of a row, as a share of the strongest direction's length in it
 * @returns {import("eigenlora/build").Adapter[]}
 */
export function syntheticAdapters({ rank, adapters, modules, shared, noise }) {
  const byteLength = 4 * rank * modules.reduce((sum, shape) => sum + shape.out + shape.in, 0);
  /** The directions of the module that is read at the moment: all its adapters are read together. */
  let [at, A, B] = [-1, new Float32Array(), new Float32Array()];
  return Array.from({ length: adapters }, (_, task) => ({
    id: `adapter-${String(task + 1).padStart(2, "0")}`,
    file: `adapter-${task + 1}`,
    byteLength,
    baseModel: undefined,
    saved: [],
    metadata: {},
    warnings: [],
    modules: new Map(
      modules.map((shape, index) => [
        shape.name,
        {
          ...shape,
          rank,
          layout: /** @type {const} */ ("out-in"),
          async read() {
            if (at !== index)
              [at, A, B] = [index, uniform(shared * shape.in, 2 * index), uniform(shared * shape.out, 2 * index + 1)];
            const seed = 100_000 * (task + 1) + 2 * index;
            return { rank, A: factor(A, shared, rank, noise, seed), Bt: factor(B, shared, rank, noise, seed + 1) };
          },
        },
      ]),
    ),
    close: async () => {},
  }));
}

/**
 * @param {Float32Array} directions [shared, width]
 * @param {number} shared @param {number} rank @param {number} noise @param {number} seed
 * @returns {Float32Array} [rank, width]
 */
function factor(directions, shared, rank, noise, seed) {
  const width = directions.length / shared;
  const drawn = uniform(rank * (shared + 1), seed);
  const rows = new Float32Array(rank * width);
  for (let i = 0; i < rank; i++) {
    const place = Math.floor((drawn[rank * shared + i] * 10 + 0.5) * (TABLE.length - width));
    for (let j = 0; j < width; j++) rows[i * width + j] = noise * 0.03 * TABLE[place + j];
    for (let k = 0; k < shared; k++) {
      const share = drawn[i * shared + k] * 4 ** (-k / (shared - 1));
      for (let j = 0; j < width; j++) rows[i * width + j] += share * directions[k * width + j];
    }
  }
  return rows;
}

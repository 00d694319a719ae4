/**
 * What would another quantiser than ours save? Rank-1 terms of real adapters, in the balanced gauge and with one step for all of a
 * task, become integers by
 *
 * - nearest: each number's nearest, as in packs
 * - weighed: of the nearest and its neighbour towards zero the one with the least squared error and bits (rate-distortion optimised)
 * - trellis of 4 or 8 states: dependent quantisation, where the parities before decide between two grids (H. Schwarz et al.,
 *   "Quantization and Entropy Coding in the Versatile Video Coding (VVC) Standard", IEEE TCSVT 31, 2021), with the states of H.266 or
 *   of JPEG 2000, part 2; Viterbi's algorithm finds the best path
 *
 * and are coded ideally, by counts that adapt to the sizes of the numbers before. Beside it stand our coder's bytes, and the bits
 * below which no quantiser of normally distributed rows comes, in any dimension (reverse water-filling).
 */
import { findAdapters } from "eigenlora/node";
import { balance, pairOf } from "../../dist/src/extract/gauge.js";
import { isWorth, rowSteps } from "../../dist/src/extract/row-steps.js";
import { encodeSection } from "../../dist/src/format/encode-coded.js";
import { encodeTensor } from "../../dist/src/tensor/encode.js";
import { folderOf, SUITES, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";

/**
 * @typedef {{ values: Float64Array, singular: number, width: number, side: object }} Row one side of a rank-1 term, which a step of 1
 *   would make integers of; `width` is the mean of both sides', rows of one side of a module share `side`
 * @typedef {{ name: string, next: readonly (readonly [number, number])[], odd: readonly boolean[], coarse: number }} Trellis which state
 *   follows by parity, which ones read odd numbers, and how much coarser a grid is than the step
 * @typedef {{ bits: number, error: number, bytes: number | undefined }} Point bits of all numbers of all rows, and the error of ΔW
 */

/** @type {readonly Trellis[]} */
const TRELLISES = [
  { name: "weighed", next: [[0, 0]], odd: [false], coarse: 1 },
  {
    name: "trellis, 4 states",
    next: [
      [0, 2],
      [2, 0],
      [1, 3],
      [3, 1],
    ],
    odd: [false, false, true, true],
    coarse: 2,
  },
  {
    name: "trellis, 8 states",
    next: [
      [0, 1],
      [3, 2],
      [5, 4],
      [6, 7],
      [1, 0],
      [2, 3],
      [4, 5],
      [7, 6],
    ],
    odd: [false, true, false, true, false, true, false, true],
    coarse: 2,
  },
];
/** Sizes from here on share one place in a table, and cost more bits. */
const MOST = 30;
/** Classes of rows by size, for which bits are estimated before they are known. */
const CLASSES = 16;
/** Passes, each with bits estimated from the integers of the one before. */
const PASSES = 3;
/** Worth of a bit, relative to its worth at high rates: 2 ln 2 times the squared error. */
const WORTHS = [0.6, 1, 1.4];
/** Ratio of a step to the next: the grid lies around the wanted error. */
const RATIO = 1.12;

const given = readArguments("What would another quantiser than ours save?", {
  suite: choice(SUITES, "which adapters", "own-seed"),
  adapters: number("so many of them, spread over the suite", 4, 1),
  every: number("of their modules every so many", 4, 1),
});
const ERRORS = [0.05, 0.15, 0.3, 0.5, 0.7];

/** Counts bits by adaptive tables, one for each level of the sizes before, and for each grid. */
class Coder {
  bits = 0;
  /** @type {Map<number, { counts: Float64Array, all: number }>} */
  #tables = new Map();
  #recent = 0;

  /** @param {readonly number[]} integers @param {Trellis} [trellis] */
  row(integers, trellis) {
    let state = 0;
    for (const k of integers) {
      const level = Math.min(40, Math.round(6 * Math.log2(1 + 4 * this.#recent)));
      const size = Math.abs(k);
      this.#code(2 * level + Number(trellis?.odd[state] ?? false), Math.min(size, MOST));
      if (size > 0) this.bits += 1;
      if (size >= MOST) this.bits += 2 * Math.floor(Math.log2(size - MOST + 1)) + 1;
      this.#recent += (size - this.#recent) / 24;
      if (trellis) state = trellis.next[state][k & 1];
    }
  }

  /** @param {number} table @param {number} size */
  #code(table, size) {
    let found = this.#tables.get(table);
    if (!found)
      this.#tables.set(table, (found = { counts: new Float64Array(MOST + 1).fill(0.05), all: 0.05 * (MOST + 1) }));
    this.bits += Math.log2(found.all / found.counts[size]);
    found.counts[size]++;
    found.all++;
  }
}

const rows = await readRows();
const square = rows.reduce((sum, { singular }) => sum + singular ** 2, 0) / 2;
const numbers = rows.reduce((sum, { values }) => sum + values.length, 0);
const table = ERRORS.map((error) => {
  progress(`error ${error}`);
  const start = startStep(error);
  const nearest = atError(error, start, nearestPoint);
  const found = TRELLISES.map((trellis) => {
    const all = WORTHS.map((worth) =>
      atError(error, start / trellis.coarse ** 0.67, (step) => trellisPoint(trellis, step, worth)),
    );
    return all.reduce((best, one) => (one.bits < best.bits ? one : best));
  });
  const bound = boundAt(error);
  return {
    name: `error ${error}`,
    "bits a number, nearest": nearest.bits / numbers,
    "our coder ÷ ideal": (8 * (nearest.bytes ?? NaN)) / nearest.bits,
    ...Object.fromEntries(found.map(({ bits }, i) => [`${TRELLISES[i].name} ÷ nearest`, bits / nearest.bits])),
    "bound ÷ nearest": bound / nearest.bits,
  };
});
print(given.json, [
  { question: `${given.suite}: what would another quantiser than ours save, at equal error of ΔW?`, rows: table },
]);

/** Both sides of all rank-1 terms. @returns {Promise<Row[]>} */
async function readRows() {
  const folders = (await findAdapters([folderOf(given.suite)])).map(({ path }) => path);
  const some = Array.from(
    { length: given.adapters },
    (_, i) => folders[Math.floor((i * folders.length) / given.adapters)],
  );
  return withAdapters(some, async (adapters) => {
    const rows = [];
    for (const { modules } of adapters) {
      for (const module of [...modules.values()].filter((_, i) => i % given.every === 0)) {
        const pair = balance(pairOf(await module.read()), module.out, module.in);
        const steps = rowSteps(pair, 1);
        for (const [side, length] of /** @type {const} */ ([
          ["A", module.in],
          ["Bt", module.out],
        ])) {
          const of = {};
          for (let i = 0; i < pair.rank; i++) {
            if (steps[side][i] === 0) continue;
            const values = pair[side].slice(i * length, (i + 1) * length).map((value) => value / steps[side][i]);
            const singular = Math.hypot(...values);
            rows.push({ values, singular, width: (module.in + module.out) / 2, side: of });
          }
        }
      }
    }
    return rows;
  });
}

/** Step at which uniform noise would have the error. @param {number} error */
function startStep(error) {
  let step = Math.sqrt((12 * error ** 2 * square) / numbers);
  while (lossOfDropped(step) > error ** 2 * square) step /= RATIO;
  return step;
}

/** Loss of rows that are not worth their bits. @param {number} step */
function lossOfDropped(step) {
  return rows.reduce((lost, { singular, width }) => lost + (isWorth(singular, width, step) ? 0 : singular ** 2 / 2), 0);
}

/**
 * Bits at an error, between two measured steps. @param {number} error @param {number} start @param {(step: number) => Point} ask @returns
 * {Point}
 */
function atError(error, start, ask) {
  let [step, point] = [start, ask(start)];
  const factor = point.error > error ? 1 / RATIO : RATIO;
  for (;;) {
    const next = ask(step * factor);
    if (point.error > error === next.error > error) {
      [step, point] = [step * factor, next];
      continue;
    }
    const share = Math.log(error / point.error) / Math.log(next.error / point.error);
    const between = (/** @type {number} */ a, /** @type {number} */ b) => a * (b / a) ** share;
    const bytes = point.bytes && next.bytes && between(point.bytes, next.bytes);
    return { error, bits: between(point.bits, next.bits), bytes };
  }
}

/** @param {number} step @returns {Point} */
function nearestPoint(step) {
  const coder = new Coder();
  /** @type {Map<object, number[][]>} */
  const stored = new Map();
  let lost = 0;
  for (const { values, singular, width, side } of rows) {
    if (!isWorth(singular, width, step)) {
      lost += singular ** 2 / 2;
      continue;
    }
    const integers = Array.from(values, (value) => Math.round(value / step));
    coder.row(integers);
    for (const [i, k] of integers.entries()) lost += (values[i] - k * step) ** 2;
    stored.set(side, [...(stored.get(side) ?? []), integers]);
  }
  return { bits: coder.bits, error: Math.sqrt(lost / square), bytes: codedBytes([...stored.values()]) };
}

/** Codes integers of tensors by our coder. @param {readonly number[][][]} tensors */
function codedBytes(tensors) {
  let end = 0;
  const parts = tensors.map((rows) => {
    const [byteOffset, width] = [end, rows[0].length];
    const encoded = encodeTensor("int8", rows.flat(), rows.length, width, Array(rows.length).fill(1));
    end += encoded.length;
    return {
      encoded,
      dtype: /** @type {const} */ ("int8"),
      rows: rows.length,
      width,
      byteOffset,
      byteLength: encoded.length,
    };
  });
  const section = Buffer.concat(parts.map(({ encoded }) => encoded));
  return encodeSection(section, parts, 4)?.length;
}

/** @param {Trellis} trellis @param {number} step @param {number} worth of a bit @returns {Point} */
function trellisPoint(trellis, step, worth) {
  const kept = rows.filter(({ singular, width }) => isWorth(singular, width, step * trellis.coarse ** 0.67));
  let lost = rows.reduce((sum, row) => sum + (kept.includes(row) ? 0 : row.singular ** 2 / 2), 0);
  const noise = (trellis.coarse ** 1.33 / 12) * 0.9;
  const lambda = worth * 2 * Math.LN2 * noise;
  /** @type {number[][]} */
  let paths = kept.map(({ values }) => Array.from(values, (value) => Math.round(value / step / trellis.coarse)));
  for (let pass = 0; pass < PASSES; pass++) {
    const tables = estimates(trellis, kept, paths, step);
    paths = kept.map((row) => bestPath(trellis, row.values, step, tables[classOf(row, step)], lambda));
  }
  const coder = new Coder();
  for (const [r, path] of paths.entries()) {
    coder.row(path, trellis);
    let state = 0;
    for (const [i, k] of path.entries()) {
      lost += (kept[r].values[i] - valueOf(k, trellis, state) * step) ** 2;
      state = trellis.next[state][k & 1];
    }
  }
  return { bits: coder.bits, error: Math.sqrt(lost / square), bytes: undefined };
}

/** Value of integer k in a state, in steps. @param {number} k @param {Trellis} trellis @param {number} state */
function valueOf(k, { coarse, odd }, state) {
  return coarse * k - (odd[state] ? Math.sign(k) : 0);
}

/** @param {Row} row @param {number} step */
function classOf({ values, singular }, step) {
  const size = singular / Math.sqrt(values.length) / step;
  return Math.max(0, Math.min(CLASSES - 1, Math.round(2 * Math.log2(size)) + 4));
}

/**
 * Bits of each size, by grid, for rows of each class. @param {Trellis} trellis @param {readonly Row[]} kept @param {readonly number[][]}
 * paths @param {number} step
 */
function estimates(trellis, kept, paths, step) {
  const counts = Array.from({ length: CLASSES }, () => [0, 1].map(() => new Float64Array(MOST + 1).fill(0.1)));
  for (const [r, path] of paths.entries()) {
    let state = 0;
    for (const k of path) {
      counts[classOf(kept[r], step)][Number(trellis.odd[state])][Math.min(Math.abs(k), MOST)]++;
      state = trellis.next[state][k & 1];
    }
  }
  return counts.map((grids) =>
    grids.map((sizes) => {
      const all = sizes.reduce((a, b) => a + b);
      // A sign costs one bit.
      return sizes.map((count, size) => Math.log2(all / count) + (size > 0 ? 1 : 0));
    }),
  );
}

/**
 * The integers of a row with the least loss and bits. @param {Trellis} trellis @param {Float64Array} values @param {number} step @param
 * {readonly Float64Array[]} bits @param {number} lambda
 */
function bestPath(trellis, values, step, bits, lambda) {
  const { next, odd, coarse } = trellis;
  const states = next.length;
  const from = new Int8Array(values.length * states);
  const taken = new Int32Array(values.length * states);
  let costs = Float64Array.from({ length: states }, (_, state) => (state === 0 ? 0 : Infinity));
  for (const [i, value] of values.entries()) {
    const x = value / step;
    const sign = x < 0 ? -1 : 1;
    const after = new Float64Array(states).fill(Infinity);
    for (let state = 0; state < states; state++) {
      if (costs[state] === Infinity) continue;
      const offset = odd[state] ? 1 : 0;
      const high = Math.ceil((Math.abs(x) + offset) / coarse);
      for (let size = Math.max(0, high - 2); size <= high; size++) {
        const lost = (Math.abs(x) - (size > 0 ? coarse * size - offset : 0)) ** 2;
        const cost = costs[state] + lost + lambda * bits[offset][Math.min(size, MOST)];
        const to = next[state][size & 1];
        if (cost >= after[to]) continue;
        after[to] = cost;
        from[i * states + to] = state;
        taken[i * states + to] = sign * size;
      }
    }
    costs = after;
  }
  let state = costs.indexOf(Math.min(...costs));
  const path = new Array(values.length);
  for (let i = values.length - 1; i >= 0; i--) {
    path[i] = taken[i * states + state];
    state = from[i * states + state];
  }
  return path;
}

/** Least bits of normally distributed rows. @param {number} error */
function boundAt(error) {
  let [low, high] = [1e-12, 1e6];
  const all = rows.map(({ values, singular }) => ({ n: values.length, variance: singular ** 2 / values.length }));
  while (high > 1.0001 * low) {
    const level = Math.sqrt(low * high);
    const lost = all.reduce((sum, { n, variance }) => sum + n * Math.min(variance, level), 0);
    if (lost > error ** 2 * square) high = level;
    else low = level;
  }
  return all.reduce((sum, { n, variance }) => sum + (n / 2) * Math.max(0, Math.log2(variance / low)), 0);
}

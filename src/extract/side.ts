/**
 * One side of a module, from the stacked rows of all tasks to a basis that is ready to be written: mean, components, encoding.
 */
import type { Dtype } from "../tensor/dtypes.ts";
import { encodeSteps, encodeTensor, toInteger } from "../tensor/encode.ts";
import { type Components, centred, columnMeans, principalComponents, ROUNDING } from "./components.ts";
import { fewBits, mix } from "./gauge.ts";
import { norm, type Products, rowSquares, scale } from "./linalg.ts";
import { type ExtractOptions, wanted } from "./options.ts";
import type { StoredBasis } from "./subspace.ts";

/** One side's basis, ready to be written, and what is known of the stack it came from. */
export interface SideBasis extends StoredBasis {
  /** Singular values of the (centred) stack, descending, min(rows, width) of them; the smallest may be rounding. */
  singular: Float64Array;
  /** Share of the squared singular values that the components hold; 1 where there are none to hold. */
  explained: number;
}

/** One side of a stack, decomposed. */
export interface Side {
  /** Width of a vector: that of a row, times the rank in flat mode. */
  width: number;
  rank: number | undefined;
  /** All tasks' rows, stacked [Σ ranks, width], those without coefficients too. */
  rows: Float64Array;
  mean: Float64Array | undefined;
  components: Components;
}

/**
 * Mean and components of one side.
 * @param all factors whole
 * @param factors what is kept of them
 * @param rank in flat mode, of all factors [rank, inner]
 */
export function decompose(
  all: readonly Float64Array[],
  factors: readonly Float64Array[],
  inner: number,
  rank: number | undefined,
  options: ExtractOptions,
): Side {
  const width = inner * (rank ?? 1);
  // Only balanced rows are mirrored later.
  const view = options.gauge === "as-trained";
  const rows = stacked(factors, view);
  const count = rows.length / width;
  const own = rowSquares(rows, count, width).map(Math.sqrt);
  if (options.gauge === "balanced" && rank === undefined) {
    // Row i counts in ΔW by its square, s_i, and carries the rounding errors of all of ΔW, s_1, magnified by √s_i.
    let at = 0;
    for (const factor of factors) {
      const first = own[at]!;
      for (const end = at + factor.length / width; at < end; at++) own[at] = own[at]! > 0 ? first ** 2 / own[at]! : 0;
    }
  }
  const weights = options.normalize ? ofRows(factors.map(reciprocal), factors, width) : undefined;
  const apart = meanWeights(factors, width, options.normalize);
  const counted = apart && ofRows(apart, factors, width);
  const mean = options.centering === "keep" ? columnMeans(rows, count, width, counted) : undefined;
  const x = centred(rows, count, width, mean);
  // A row is as large as what is stored of it: coefficients for the centred row, the mean for the rest.
  const left = rowSquares(x, count, width);
  const floors = own.map((size, i) => ROUNDING * Math.max(size, Math.sqrt(left[i]!)));
  weights?.forEach((weight, i) => {
    scale(weight, x, i * width, width);
    floors[i]! *= weight;
  });
  const components = principalComponents(x, count, width, floors, wanted(options), options.products);
  return { width, rank, rows: options.rank === undefined ? rows : stacked(all, view), mean, components };
}

/** Tasks whose rows are so many times as long as those of others: a mean of both would take digits from the shorter ones. */
const FAR_APART = 8;

/**
 * What the rows of each factor count in their mean. All rows count alike, as in the paper, unless tasks are to count alike, or a mean would
 * be much longer than the rows of some: coefficients cancel it to the digits of f32 of the longer one.
 * @returns undefined where all count alike
 */
export function meanWeights(
  factors: readonly Float64Array[],
  width: number,
  normalize: boolean | undefined,
): number[] | undefined {
  let [shortest, longest] = [Infinity, 0];
  for (const factor of factors) {
    const length = norm(factor) / Math.sqrt(factor.length / width);
    if (length > 0) [shortest, longest] = [Math.min(shortest, length), Math.max(longest, length)];
  }
  if (!normalize && longest <= FAR_APART * shortest) return undefined;
  // Least squares of factors that are scaled to one length.
  return factors.map((factor) => reciprocal(factor) ** 2);
}

/** A number of each factor, for each of its rows. */
function ofRows(numbers: readonly number[], factors: readonly Float64Array[], width: number): number[] {
  return factors.flatMap((factor, i) => Array<number>(factor.length / width).fill(numbers[i]!));
}

/** Reciprocal of a factor's length; 0 where the length is 0. */
export function reciprocal(factor: Float64Array): number {
  return 1 / (norm(factor) || Infinity);
}

/**
 * The rows of factors, one below the other.
 * @param view factors that lie one behind the other in memory are not copied: for rows that are not written to. Default: false
 */
export function stacked(factors: readonly Float64Array[], view: boolean = false): Float64Array {
  const length = factors.reduce((sum, factor) => sum + factor.length, 0);
  const { buffer, byteOffset } = factors[0]!;
  let end = byteOffset;
  const behind = (factor: Float64Array): boolean =>
    factor.buffer === buffer && factor.byteOffset === end && (end += factor.byteLength) > 0;
  if (view && factors.every(behind)) return new Float64Array(buffer as ArrayBuffer, byteOffset, length);
  const rows = new Float64Array(length);
  let at = 0;
  for (const factor of factors) {
    rows.set(factor, at);
    at += factor.length;
  }
  return rows;
}

/** How components are stored. */
export interface StoredAs {
  readonly type: Dtype;
  /** Steps of their integers and of the mean's; those that would be all zeros are left out. `type` then means nothing. */
  readonly steps?: Float64Array | undefined;
}

/** The first `count` components and the mean as they are stored. */
export function encodeSide(side: Omit<Side, "rows">, most: number, stored: StoredAs, products?: Products): SideBasis {
  const { type, steps } = stored;
  const mixed = !steps && fewBits(type);
  const { width, rank, mean } = side;
  const { vectors, singular, total } = side.components;
  const first = vectors.subarray(0, most * width);
  const all = new Float64Array((most + (mean ? 1 : 0)) * width);
  all.set(mixed ? mix(first, most, width, products) : first);
  if (mean) all.set(mean, most * width);
  const count = steps ? alive(all, most, width, steps) : most;
  if (count === 0 && !mean) {
    // No reader takes a side with neither components nor a mean.
    const zeros = { ...side, mean: new Float64Array(width) };
    return encodeSide(zeros, 0, { type, steps: steps && Float64Array.of(1) }, products);
  }
  // The mean lies behind the components that are left.
  const values = all.copyWithin(count * width, most * width).subarray(0, all.length - (most - count) * width);
  const rows = values.length / width;
  let held = 0;
  for (let k = 0; k < count; k++) held += singular[k]! ** 2;
  const own = steps && [...steps.subarray(0, count), ...(mean ? [steps.at(-1)!] : [])];
  const encoded = own
    ? encodeSteps(values, rows, width, own)
    : { dtype: type, encoded: encodeTensor(type, values, rows, width, undefined, products?.findScale) };
  return {
    ...encoded,
    components: count,
    width,
    rank,
    mean: mean !== undefined,
    singular,
    explained: total > 0 ? Math.min(1, held / total) : 1,
  };
}

/** How many components there are up to the last that does not become all zeros. */
function alive(values: Float64Array, count: number, width: number, steps: Float64Array): number {
  for (let k = count; k > 0; k--) {
    const row = values.subarray((k - 1) * width, k * width);
    const step = steps[k - 1]!;
    if (step > 0 && row.some((value) => toInteger(value / step, 1) !== 0)) return k;
  }
  return 0;
}

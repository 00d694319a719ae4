/**
 * A stored basis opened for projection: what the reader of a pack will see, decoded to f64, with all that least squares
 * against it needs. Quantised components are no longer orthonormal, so coefficients are always solved for, never read
 * off by products (DESIGN.md 2.5).
 *
 * The Cholesky factor L of the components' Gram matrix turns coefficients α into coordinates α·L on an orthonormal
 * basis of the same span. In these coordinates errors are sums of squares, and no row is ever expanded.
 */
import { type Dtype, decodeTensor, isQuantized } from "../tensor/dtypes.ts";
import { encodeTensor, type FindScale } from "../tensor/encode.ts";
import { centred, ROUNDING } from "./components.ts";
import { type SideError, sideError } from "./error.ts";
import {
  addScaled,
  backwardSolve,
  cholesky,
  dot,
  forwardSolve,
  multiplyTransposed,
  PLAIN,
  type Products,
} from "./linalg.ts";

/** One side's basis as it lies in a pack. */
export interface StoredBasis {
  dtype: Dtype;
  /** K. */
  components: number;
  width: number;
  /** Flat mode: how many rows of a factor a vector is, one behind the other; absent in column mode, where it is one. */
  rank?: number | undefined;
  /** Whether a mean follows the components as the last row. */
  mean: boolean;
  /** Encoded tensor [K + (mean ? 1 : 0), width]. */
  encoded: Uint8Array;
}

/** A stored basis, decoded and factored. */
export interface Subspace {
  components: number;
  width: number;
  /** Rank of the basis. */
  rank: number | undefined;
  /** M [width]; undefined where the basis has none. */
  mean: Float64Array | undefined;
  /** E [components, width]. */
  vectors: Float64Array;
  /** L, E·Eᵀ = L·Lᵀ (`cholesky` of linalg.ts: components that depend on earlier ones are left out). */
  factor: Float64Array;
  /** M in the orthonormal coordinates [components]; zeros where there is no mean. */
  meanAt: Float64Array;
  /** What multiplies the large matrices. */
  products: Products;
}

/** Rows that are to be approximated on a subspace, x = rows − M. In flat mode the one row is a whole factor. */
export interface Target {
  rank: number;
  /** So many rows, the first ones, have coefficients; the rest is left out of what is stored and counts as lost. */
  kept: number;
  /** [rank, width]. */
  values: Float64Array;
  /** rows·rowsᵀ. */
  rows: Float64Array;
  /** x·xᵀ. */
  squares: Float64Array;
  /** x·M [rank]; zeros where there is no mean. */
  alongMean: Float64Array;
  /** x in the orthonormal coordinates [rank, components]. */
  at: Float64Array;
  /** x⊥·x⊥ᵀ, where x⊥ is the part of x outside the span of all components, which no coefficients reach. */
  outside: Float64Array;
  /** rows·x⊥ᵀ. */
  rowsOutside: Float64Array;
}

/** Decodes and factors a basis. */
export function openSubspace(stored: StoredBasis, products: Products = PLAIN): Subspace {
  const { components, width } = stored;
  const rows = components + (stored.mean ? 1 : 0);
  const values = new Float64Array(decodeTensor(stored.dtype, stored.encoded, rows, width));
  const vectors = values.subarray(0, components * width);
  const mean = stored.mean ? values.subarray(components * width) : undefined;
  const factor = cholesky(products.gram(vectors, components, width), components);
  const meanAt = mean ? multiplyTransposed(mean, vectors, 1, components, width) : new Float64Array(components);
  forwardSolve(factor, components, meanAt, 1);
  return { components, width, rank: stored.rank, mean, vectors, factor, meanAt, products };
}

/**
 * Takes the stacked rows [Σ ranks, width] of tasks as targets, one for each rank. All at once, because one large
 * product costs less than many small ones.
 * @param most rows of a task that have coefficients
 */
export function targetsOf(
  space: Subspace,
  rows: Float64Array,
  ranks: readonly number[],
  most: number = Infinity,
): Target[] {
  const { components, width, mean } = space;
  const total = ranks.reduce((sum, rank) => sum + rank, 0);
  const x = centred(rows, total, width, mean);
  const at = space.products.multiplyTransposed(x, space.vectors, total, components, width);
  forwardSolve(space.factor, components, at, total);
  const alongMean = mean ? multiplyTransposed(x, mean, total, 1, width) : new Float64Array(total);
  let from = 0;
  return ranks.map((rank) => {
    const to = from + rank;
    const values = rows.subarray(from * width, to * width);
    const target = {
      rank,
      kept: Math.min(rank, most),
      values,
      rows: space.products.gram(values, rank, width),
      squares: space.products.gram(x.subarray(from * width, to * width), rank, width),
      alongMean: alongMean.subarray(from, to),
      at: at.subarray(from * components, to * components),
    };
    from = to;
    return { ...target, ...outsideOf(space, target) };
  });
}

/** A difference of squares below this share of them has too few digits. */
const CANCELLED = 1e-11;

/**
 * What is outside the span is a difference of squares: where it is below the rounding of an f32 (`ROUNDING`) it cannot be told from
 * zero and counts as zero. Where the mean is much larger than a row, as in a small task beside large ones, that may be much of the row:
 * there it is computed from what all components make of the rows.
 */
function outsideOf(
  space: Subspace,
  target: Omit<Target, "outside" | "rowsOutside">,
): Pick<Target, "outside" | "rowsOutside"> {
  const { components, meanAt, width, products } = space;
  const { rank, kept, values, rows, squares, alongMean, at } = target;
  const left = new Float64Array(rank);
  let isLost = false;
  for (let i = 0; i < rank; i++) {
    const square = squares[i * rank + i]!;
    left[i] = square - dot(at, i * components, at, i * components, components);
    if (i < kept && left[i]! <= CANCELLED * square && square > 4 * rows[i * rank + i]!) isLost = true;
    if (left[i]! <= ROUNDING ** 2 * square) left[i] = 0;
  }
  if (space.rank === undefined && isLost) {
    const all = expand(space, solve(space, { at, kept: rank }), rank);
    const { lost, cross } = sideError(values, all, rank, width, products);
    return { outside: lost, rowsOutside: cross };
  }
  const outside = new Float64Array(rank * rank);
  for (let i = 0; i < rank; i++) {
    outside[i * rank + i] = left[i]!;
    for (let j = 0; left[i] && j < i; j++) {
      if (!left[j]) continue;
      const both = squares[i * rank + j]! - dot(at, i * components, at, j * components, components);
      outside[i * rank + j] = outside[j * rank + i] = both;
    }
  }
  const rowsOutside = outside.slice();
  for (let j = 0; j < rank; j++) {
    const mean = alongMean[j]! - dot(meanAt, 0, at, j * components, components);
    for (let ij = j; ij < rank * rank; ij += rank) rowsOutside[ij]! += mean;
  }
  return { outside, rowsOutside };
}

/** Least squares coefficients [kept, components] of a target on the components as stored, about the mean as stored. */
export function solve({ components, factor }: Subspace, { at, kept }: Pick<Target, "at" | "kept">): Float64Array {
  const out = at.slice(0, kept * components);
  backwardSolve(factor, components, components, out, kept);
  return out;
}

/** Theorem 1's δ: the largest sine of the angle between a row of x and the span; 0 for rows that are the mean. */
export function largestSine(space: Subspace, target: Target): number {
  const { components } = space;
  const { rank, kept, at } = target;
  let largest = 0;
  for (let i = 0; i < kept; i++) {
    const square = target.squares[i * rank + i]!;
    if (square <= ROUNDING ** 2 * target.rows[i * rank + i]!) continue;
    largest = Math.max(largest, 1 - dot(at, i * components, at, i * components, components) / square);
  }
  return Math.sqrt(largest);
}

/**
 * What coefficients α [kept, components] make of a target: the part outside the span, and what α·L misses inside it. In flat mode the rows of
 * a factor share coefficients, and what they lose is seen on the expanded factor only.
 */
export function lossOf(space: Subspace, target: Target, coefficients: Float64Array): SideError {
  const { components, factor, meanAt } = space;
  if (space.rank !== undefined)
    return sideError(target.values, expand(space, coefficients, 1), space.rank, space.width / space.rank);
  const { rank, kept, rows, at, outside, rowsOutside } = target;
  const missed = at.slice(0, kept * components);
  for (let i = 0; i < kept; i++)
    for (let n = 0; n < components; n++)
      addScaled(-coefficients[i * components + n]!, factor, n * components, missed, i * components, n + 1);
  const lost = new Float64Array(rank * rank);
  const cross = new Float64Array(rank * rank);
  for (let j = 0; j < kept; j++) {
    const mean = dot(meanAt, 0, missed, j * components, components);
    for (let i = 0; i < rank; i++) {
      const ij = i * rank + j;
      if (i <= j) {
        const both = outside[ij]! + dot(missed, i * components, missed, j * components, components);
        lost[ij] = lost[j * rank + i] = both;
      }
      cross[ij] = rowsOutside[ij]! + dot(at, i * components, missed, j * components, components) + mean;
    }
  }
  leaveOut({ rank, rows, lost, cross }, kept);
  return { rank, rows, lost, cross };
}

/** Fills in what rows without coefficients lose: themselves, mean and all. */
function leaveOut({ rank, rows, lost, cross }: SideError, kept: number): void {
  for (let i = 0; i < rank; i++) {
    for (let j = kept; j < rank; j++) {
      cross[i * rank + j] = rows[i * rank + j]!;
      lost[i * rank + j] = lost[j * rank + i] = i < kept ? cross[j * rank + i]! : rows[i * rank + j]!;
    }
  }
}

/** α·E + M: the rows [rank, width] that coefficients [rank, components] stand for. */
export function expand(space: Subspace, coefficients: Float64Array, rank: number): Float64Array {
  const { components, width, mean } = space;
  const rows = space.products.multiply(coefficients, space.vectors, rank, width, components);
  if (mean) for (let i = 0; i < rows.length; i++) rows[i]! += mean[i % width]!;
  return rows;
}

/** Values [rows, width] as a tensor of `type` and as its reader will see them. @param steps as of `encodeTensor`, as `find` */
export function rounded(
  type: Dtype,
  values: Float64Array,
  rows: number,
  width: number,
  steps?: ArrayLike<number>,
  find?: FindScale,
): { encoded: Uint8Array<ArrayBuffer>; values: Float64Array } {
  if (!isQuantized(type)) {
    const encoded = encodeTensor(type, values, rows, width);
    return { encoded, values: new Float64Array(decodeTensor(type, encoded, rows, width)) };
  }
  const seen = new Float64Array(rows * width);
  return { encoded: encodeTensor(type, values, rows, width, steps, find, seen), values: seen };
}

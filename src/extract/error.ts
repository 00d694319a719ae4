/**
 * The error of an approximated adapter, ‖ΔW − ΔW'‖ and ‖ΔW‖ in the Frobenius norm, from the factors alone: ΔW is never
 * formed. With D_A = A − A' and D_B = B − B',
 *
 *     ΔW − ΔW' = D_B·A + B'·D_A,
 *
 * whose squared norm is a sum of products of r×r Gram matrices. In one gauge they are of the same size as the result, where the
 * textbook form ‖ΔW‖² + ‖ΔW'‖² − 2⟨ΔW, ΔW'⟩ would cancel.
 */
import type { Pair } from "./gauge.ts";
import { gram, lengthened, lq, multiply, norm, PLAIN, type Products, transpose } from "./linalg.ts";

/** What one side of an approximation contributes: r×r matrices of its rows and of D = rows − approximation. */
export interface SideError {
  /** r. */
  rank: number;
  /** rows·rowsᵀ */
  rows: Float64Array;
  /** D·Dᵀ */
  lost: Float64Array;
  /** rows·Dᵀ */
  cross: Float64Array;
}

/** An error of a pair of factors. */
export interface PairError {
  /** ‖ΔW − ΔW'‖. */
  difference: number;
  /** ‖ΔW‖. */
  norm: number;
  /** ‖D_B‖·‖A‖ + ‖B'‖·‖D_A‖ ≥ difference. */
  bound: number;
}

/** Gram matrices of rows [rank, width] and their approximation. */
export function sideError(
  rows: Float64Array,
  approximation: Float64Array,
  rank: number,
  width: number,
  { gram, multiplyTransposed }: Products = PLAIN,
): SideError {
  // A loop, since packing spends much of its time here, and a callback for each number is slow.
  const lost = new Float64Array(rows.length);
  for (let i = 0; i < lost.length; i++) lost[i] = rows[i]! - approximation[i]!;
  return {
    rank,
    rows: gram(rows, rank, width),
    lost: gram(lost, rank, width),
    cross: multiplyTransposed(rows, lost, rank, rank, width),
  };
}

/** ‖ΔW‖. */
export function pairNorm({ rank, A, Bt }: Pair): number {
  const [a, b] = [gram(A, rank, A.length / rank), gram(Bt, rank, Bt.length / rank)];
  return Math.sqrt(
    Math.max(
      0,
      a.reduce((sum, value, i) => sum + value * b[i]!, 0),
    ),
  );
}

/** The error of ΔW from those of its two sides, which are of one rank. */
export function pairError(a: SideError, b: SideError): PairError {
  const { rank } = a;
  let squared = 0;
  let norm = 0;
  let rowsA = 0;
  let lostA = 0;
  let storedB = 0;
  let lostB = 0;
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < rank; j++) {
      const ij = i * rank + j;
      const ji = j * rank + i;
      // B'·B'ᵀ and D_B·B'ᵀ, from B' = B − D_B.
      const stored = b.rows[ij]! - b.cross[ij]! - b.cross[ji]! + b.lost[ij]!;
      const mixed = b.cross[ji]! - b.lost[ij]!;
      squared += b.lost[ij]! * a.rows[ij]! + stored * a.lost[ij]! + 2 * mixed * a.cross[ij]!;
      norm += b.rows[ij]! * a.rows[ij]!;
      if (i !== j) continue;
      rowsA += a.rows[ij]!;
      lostA += a.lost[ij]!;
      storedB += stored;
      lostB += b.lost[ij]!;
    }
  }
  const root = (x: number): number => Math.sqrt(Math.max(0, x));
  return {
    difference: root(squared),
    norm: root(norm),
    bound: root(lostB) * root(rowsA) + root(storedB) * root(lostA),
  };
}

/** Share of ‖ΔW‖; 0 by definition for an adapter that is zero, which has no share to speak of. */
export function relative(value: number, norm: number): number {
  return norm > 0 ? value / norm : 0;
}

/** Below this share of its bound a difference has too few digits, since squares of the bound have cancelled in its square. */
const CANCELLED = 1e-6;

/**
 * ‖ΔW − ΔW'‖ and ‖ΔW‖ of two pairs of factors for the same module; ranks and gauges may differ. Exact to a few 1e-15·bound.
 * @param differenceOf ‖ΔW − ΔW'‖ without squares that could cancel. Default: from the factors, for several times the work
 * @throws RangeError when the pairs are of different shapes
 */
export function deltaError(
  exact: Pair,
  approximation: Pair,
  products?: Products,
  differenceOf: () => number = () => thinNorm(stackedPairs(exact, approximation, -1)),
): PairError {
  const rank = Math.max(exact.rank, approximation.rank);
  const side = (rows: Float64Array, other: Float64Array): SideError => {
    const width = rows.length / exact.rank;
    if (other.length / approximation.rank !== width) {
      throw new RangeError(`deltaError: factors of width ${width} and ${other.length / approximation.rank}`);
    }
    return sideError(lengthened(rows, rank * width), lengthened(other, rank * width), rank, width, products);
  };
  const found = pairError(side(exact.A, approximation.A), side(exact.Bt, approximation.Bt));
  return found.difference < CANCELLED * found.bound ? { ...found, difference: differenceOf() } : found;
}

/** ‖ΔW‖ without squares that could cancel. */
function thinNorm({ rank, A, Bt }: Pair): number {
  const { L: a, size: m } = lq(A.slice(), rank, A.length / rank, false);
  const { L: b, size: n } = lq(Bt.slice(), rank, Bt.length / rank, false);
  return norm(multiply(transpose(b, rank, n), a, n, m, rank));
}

/** ΔW of one plus `sign` times ΔW of the other. May be one of them: not to be written to. */
export function stackedPairs(one: Pair, other: Pair, sign: 1 | -1): Pair {
  if (other.rank === 0) return one;
  if (one.rank === 0 && sign === 1) return other;
  const join = (a: Float64Array, b: Float64Array, factor: number): Float64Array => {
    const all = new Float64Array(a.length + b.length);
    all.set(a);
    for (let i = 0; i < b.length; i++) all[a.length + i] = factor * b[i]!;
    return all;
  };
  return { rank: one.rank + other.rank, A: join(one.A, other.A, 1), Bt: join(one.Bt, other.Bt, sign) };
}

/**
 * The error of an approximated adapter, ‖ΔW − ΔW'‖ and ‖ΔW‖ in the Frobenius norm, from the factors alone: ΔW is never
 * formed. With D_A = A − A' and D_B = B − B',
 *
 *     ΔW − ΔW' = D_B·A + B'·D_A,
 *
 * whose squared norm is a sum of products of r×r Gram matrices of the same size as the result. The textbook form
 * ‖ΔW‖² + ‖ΔW'‖² − 2⟨ΔW, ΔW'⟩ would cancel instead.
 */
import type { Pair } from "./gauge.ts";
import { gram, lengthened, PLAIN, type Products } from "./linalg.ts";

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
  const lost = rows.map((value, i) => value - approximation[i]!);
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

/**
 * ‖ΔW − ΔW'‖ and ‖ΔW‖ of two pairs of factors for the same module; ranks may differ. For pairs in the same gauge the
 * result is exact to a few 1e-15·bound, for pairs in different gauges to about 1e-8·bound.
 * @throws RangeError when the pairs are of different shapes
 */
export function deltaError(exact: Pair, approximation: Pair, products?: Products): PairError {
  const rank = Math.max(exact.rank, approximation.rank);
  const side = (rows: Float64Array, other: Float64Array): SideError => {
    const width = rows.length / exact.rank;
    if (other.length / approximation.rank !== width) {
      throw new RangeError(`deltaError: factors of width ${width} and ${other.length / approximation.rank}`);
    }
    return sideError(lengthened(rows, rank * width), lengthened(other, rank * width), rank, width, products);
  };
  return pairError(side(exact.A, approximation.A), side(exact.Bt, approximation.Bt));
}

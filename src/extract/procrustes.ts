/**
 * Turning adapters towards each other, for flat mode: (Bᵀ, A) and (R·Bᵀ, R·A) are the same ΔW for every orthogonal R, but
 * flat mode compares whole factors, so rotations left to chance spread the adapters apart (generalised Procrustes
 * analysis). Balanced pairs stay balanced: A·Aᵀ = Bᵀ·B holds after any turn.
 */
import { type Direction, type Pair, squareOf } from "./gauge.ts";
import { addScaled, dot, multiply, multiplyTransposed, scale, straighten, svd, transpose } from "./linalg.ts";

/** Settled when the mean moves by less than this share of its length: a tenth of that changes no error by 1e-3. */
const SETTLED = 1e-2;
/** Slow cases gain nothing that counts any more. */
const MOST_ROUNDS = 100;

/**
 * Turns all pairs, of one rank, to lie nearest to their common mean. It starts from the longest, so that the order of
 * the adapters does not matter; no round lengthens the distances to the mean.
 */
export function turnTogether(pairs: readonly Pair[], outputs: number, inputs: number): void {
  const longest = pairs.reduce((a, b) => (squareOf(b) > squareOf(a) ? b : a));
  let mean: Direction = { A: longest.A.slice(), Bt: longest.Bt.slice() };
  for (let round = 0; round < MOST_ROUNDS; round++) {
    for (const pair of pairs) turnTo(pair, mean, outputs, inputs);
    const next = { A: meanOf(pairs, "A"), Bt: meanOf(pairs, "Bt") };
    const moved = distance(next.A, mean.A) + distance(next.Bt, mean.Bt);
    mean = next;
    if (moved <= SETTLED ** 2 * squareOf(next)) return;
  }
}

/** Turns a pair to lie nearest to factors of its shape. */
export function turnTo(pair: Pair, { A, Bt }: Direction, outputs: number, inputs: number): void {
  const { rank } = pair;
  const cross = multiplyTransposed(A, pair.A, rank, rank, inputs);
  addScaled(1, multiplyTransposed(Bt, pair.Bt, rank, rank, outputs), 0, cross, 0, rank * rank);
  const { U, V } = svd(cross, rank, rank);
  orthonormalize(V, rank);
  const turn = multiply(transpose(U, rank, rank), V, rank, rank, rank);
  pair.A = multiply(turn, pair.A, rank, inputs, rank);
  pair.Bt = multiply(turn, pair.Bt, rank, outputs, rank);
}

/**
 * Makes the rows of a matrix orthonormal, one behind the other: of weak singular vectors rounding leaves little, and a zero
 * row or one that leans on others would change ΔW. Where nothing is left of a row, an axis takes its place.
 */
function orthonormalize(rows: Float64Array, n: number): void {
  for (let i = 0; i < n; i++) {
    let left = cleared(rows, i, n);
    // Of n axes one at least is that far from fewer than n others.
    for (let axis = 0; left * n * 2 < 1; axis++) {
      rows.fill(0, i * n, (i + 1) * n);
      rows[i * n + axis] = 1;
      left = cleared(rows, i, n);
    }
    scale(1 / Math.sqrt(left), rows, i * n, n);
  }
}

/** Takes out of row i what lies along the rows before it (twice is enough). Returns the square of what is left. */
function cleared(rows: Float64Array, i: number, n: number): number {
  for (let pass = 0; pass < 2; pass++) straighten(rows, i, n);
  return dot(rows, i * n, rows, i * n, n);
}

function meanOf(pairs: readonly Pair[], side: "A" | "Bt"): Float64Array {
  const mean = new Float64Array(pairs[0]![side].length);
  for (const pair of pairs) addScaled(1 / pairs.length, pair[side], 0, mean, 0, mean.length);
  return mean;
}

function distance(x: Float64Array, y: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += (x[i]! - y[i]!) ** 2;
  return sum;
}

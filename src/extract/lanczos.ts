/**
 * The largest eigenpairs of a positive semidefinite matrix that is known by what it makes of vectors, by block Lanczos with full
 * reorthogonalisation (Golub & Van Loan, "Matrix Computations", 10.3.6). For the few components of a large stack whose spectrum
 * falls off, without its Gram matrix; `eigen.ts` solves the rest, and everything small.
 */
import { uniform } from "../tensor/random.ts";
import { SEED, symmetricEigen } from "./eigen.ts";
import { addScaled, norm, type Products, scale, straighten } from "./linalg.ts";

/** A block holds so many vectors more than are asked for: the gap that counts is the one behind them. */
const EXTRA = 8;

/**
 * A pair is accepted when ‖G·v − θ·v‖ is at most this share of θ itself: a weak direction must be as right as a strong one. The
 * squares that the vectors miss are of the order of its square.
 */
const RESIDUAL = 1e-7;

/** Vectors to try, as a share of n. Their products then cost at most what the Gram matrix costs. */
const MOST = 1 / 4;

/** So many steps must fit, or it is not worth a try. */
const LEAST_STEPS = 4;

/** G [n, n] = X·Xᵀ. */
export interface Operator {
  n: number;
  /** Rows V [k, n] → V·G [k, n]. */
  apply(v: Float64Array, k: number): Float64Array;
  /** Rows [k, n] to start from: some rows times Xᵀ. They are half a step ahead of random ones. */
  start(k: number, random: () => number): Float64Array;
}

/**
 * @returns the `count` largest eigenvalues of G, descending, and their unit vectors [count, n]; undefined where n is small beside
 *   `count`, or where a pair fails its residual test: then take `symmetricEigen`
 */
export function largestEigen(
  { n, apply, start }: Operator,
  count: number,
  products: Products,
): { values: Float64Array; vectors: Float64Array } | undefined {
  const block = count + EXTRA;
  const steps = Math.floor((MOST * n) / block);
  if (steps < LEAST_STEPS) return undefined;
  const random = uniform(SEED);
  const most = steps * block;
  const [basis, images, projected] = [
    new Float64Array(most * n),
    new Float64Array(most * n),
    new Float64Array(most * most),
  ];
  let next = start(block, random);
  let before = Infinity;
  for (let step = 1; step <= steps; step++) {
    const [from, size] = [(step - 1) * block, step * block];
    const v = basis.subarray(0, size * n);
    basis.set(orthonormal(next, basis.subarray(0, from * n), n, random, products), from * n);
    next = apply(basis.subarray(from * n, size * n), block);
    images.set(next, from * n);
    addRows(projected, most, from, products.multiplyTransposed(next, v, block, size, n), size);
    const small = Float64Array.from(
      { length: size * size },
      (_, i) => projected[Math.floor(i / size) * most + (i % size)]!,
    );
    const ritz = symmetricEigen(small, size, products.tridiagonalize);
    const [values, turns] = [ritz.values, ritz.vectors(count)];
    // The last pair is the last to settle; all are looked at when it has.
    const turn = turns.subarray((count - 1) * size);
    const [last, image] = [new Float64Array(n), new Float64Array(n)];
    for (let i = 0; i < size; i++) {
      addScaled(turn[i]!, basis, i * n, last, 0, n);
      addScaled(turn[i]!, images, i * n, image, 0, n);
    }
    const residual = worstResidual(image, last, values.subarray(count - 1), n);
    if (residual <= RESIDUAL) {
      const vectors = products.multiply(turns, v, count, n, size);
      const moved = products.multiply(turns, images, count, n, size);
      if (worstResidual(moved, vectors, values, n) <= RESIDUAL) return { values: values.slice(0, count), vectors };
    }
    // Convergence speeds up if anything: a try that would still fail at this rate, squared, is given up. So is one with a zero value.
    if (!(residual * (residual / before) ** (2 * (steps - step)) <= RESIDUAL)) return undefined;
    before = residual;
  }
  return undefined;
}

/** Adds rows [_, size] from row `from` on to a symmetric matrix, and their mirror image; `stride` values from row to row. */
function addRows(matrix: Float64Array, stride: number, from: number, rows: Float64Array, size: number): void {
  for (let i = 0; i < rows.length; i++) {
    const [row, column] = [from + Math.floor(i / size), i % size];
    matrix[row * stride + column] = matrix[column * stride + row] = rows[i]!;
  }
}

/** The largest ‖G·v − θ·v‖ / θ of pairs with `images` G·v; infinite where a θ is 0. */
function worstResidual(images: Float64Array, vectors: Float64Array, values: Float64Array, n: number): number {
  let worst = 0;
  for (let k = 0; k * n < vectors.length; k++) {
    let square = 0;
    for (let i = k * n; i < (k + 1) * n; i++) square += (images[i]! - values[k]! * vectors[i]!) ** 2;
    worst = Math.max(worst, values[k]! > 0 ? Math.sqrt(square) / values[k]! : Infinity);
  }
  return worst;
}

/** A row that keeps less than this share of its length has lost too many digits and is made orthogonal once more. */
const LOST = 1e-4;

/** A row that keeps less than this share is rounding. */
const SPENT = 1e-12;

/**
 * Makes rows [k, n] orthonormal, and orthogonal to those of `before`, in place. A row that vanishes, as in a space that is spent,
 * becomes a random one.
 */
function orthonormal(
  rows: Float64Array,
  before: Float64Array,
  n: number,
  random: () => number,
  products: Products,
): Float64Array {
  const [count, size] = [rows.length / n, before.length / n];
  for (let again = true; again; ) {
    again = false;
    const inside = products.multiply(products.multiplyTransposed(rows, before, count, size, n), before, count, n, size);
    for (let i = 0; i < count; i++) {
      const at = i * n;
      const length = norm(rows, at, n);
      for (let j = 0; j < n; j++) rows[at + j]! -= inside[at + j]!;
      straighten(rows, i, n);
      let left = norm(rows, at, n);
      if (!(left > LOST * length)) again = true;
      if (!(left > SPENT * length)) {
        for (let j = 0; j < n; j++) rows[at + j] = random() - 0.5;
        left = norm(rows, at, n);
      }
      scale(1 / left, rows, at, n);
    }
  }
  return rows;
}

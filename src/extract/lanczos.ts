/**
 * The largest eigenpairs of a positive semidefinite matrix that is known by what it makes of vectors, by block Lanczos with full
 * reorthogonalisation (Golub & Van Loan, "Matrix Computations", 10.3.6). For the few components of a large stack whose spectrum
 * falls off, without its Gram matrix; `eigen.ts` solves the rest, and everything small.
 */
import { generator, symmetricEigen } from "./eigen.ts";
import { addScaled, dot, scale, transpose, type Products } from "./linalg.ts";

/** A block holds so many vectors more than are asked for: the gap that counts is the one behind them. */
const EXTRA = 8;

/** A pair is accepted when ‖G·v − θ·v‖ is at most this share of θ itself: a weak direction must be as right as a strong one. */
const RESIDUAL = 1e-8;

/** Vectors to try, as a share of n. Their products then cost at most what the Gram matrix costs. */
const MOST = 1 / 4;

/** So many steps must fit, or it is not worth a try. */
const LEAST_STEPS = 4;

/**
 * @param apply rows V [k, n] → V·G [k, n]
 * @returns the `count` largest eigenvalues of G [n, n], descending, and their unit vectors [count, n]; undefined where n is small
 *   beside `count`, or where a pair fails its residual test: then take `symmetricEigen`
 */
export function largestEigen(
  apply: (v: Float64Array, k: number) => Float64Array,
  n: number,
  count: number,
  products: Products,
): { values: Float64Array; vectors: Float64Array } | undefined {
  const block = count + EXTRA;
  const steps = Math.floor((MOST * n) / block);
  if (steps < LEAST_STEPS) return undefined;
  const random = generator();
  const basis = new Float64Array(steps * block * n);
  const images = new Float64Array(steps * block * n);
  let next: Float64Array = Float64Array.from({ length: block * n }, () => random() - 0.5);
  let [left, before] = [steps, Infinity];
  for (let size = 0; left > 0; ) {
    basis.set(orthonormal(next, basis.subarray(0, size * n), n, random, products), size * n);
    next = apply(basis.subarray(size * n, (size + block) * n), block);
    images.set(next, size * n);
    size += block;
    const [v, image] = [basis.subarray(0, size * n), images.subarray(0, size * n)];
    const ritz = symmetricEigen(products(v, image, size, size, n), size);
    const turns = ritz.vectors(count);
    const vectors = products(turns, transpose(v, size, n), count, n, size);
    const residuals = products(turns, transpose(image, size, n), count, n, size);
    const worst = worstResidual(residuals, vectors, ritz.values, n);
    if (worst <= RESIDUAL) return { values: ritz.values.slice(0, count), vectors };
    // Convergence speeds up if anything: a try that would still fail at this rate, squared, is given up.
    left--;
    if (worst * (worst / before) ** (2 * left) > RESIDUAL) return undefined;
    before = worst;
  }
  return undefined;
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

/** Below this share of its length what is left of a row is mostly rounding. */
const SPENT = 1e-10;

/**
 * Rows [block, n] made orthonormal, and orthogonal to those of `before`, in place. A row of which nothing is left, as in a
 * space that is spent, becomes a random one.
 */
function orthonormal(rows: Float64Array, before: Float64Array, n: number, random: () => number, products: Products): Float64Array {
  const [count, size] = [rows.length / n, before.length / n];
  const columns = transpose(before, size, n);
  // Twice is enough, once more after a row had to be replaced.
  for (let clean = 0; clean < 2; clean++) {
    const inside = products(products(rows, before, count, size, n), columns, count, n, size);
    for (let i = 0; i < count; i++) {
      const at = i * n;
      const length = norm(rows, at, n);
      for (let j = 0; j < n; j++) rows[at + j]! -= inside[at + j]!;
      for (let j = 0; j < at; j += n) addScaled(-dot(rows, j, rows, at, n), rows, j, rows, at, n);
      if (norm(rows, at, n) <= SPENT * length) {
        for (let j = 0; j < n; j++) rows[at + j] = random() - 0.5;
        clean = -1;
      }
      scale(1 / norm(rows, at, n), rows, at, n);
    }
  }
  return rows;
}

function norm(x: Float64Array, at: number, count: number): number {
  return Math.sqrt(dot(x, at, x, at, count));
}

/**
 * Principal components of a stack of rows (Algorithm 1 of the paper): mean, singular values, right singular vectors, as
 * many as asked but never a direction that is only rounding error. In f64, from whichever Gram matrix is smaller. Knows
 * nothing of tasks, gauges or stored types.
 */
import { type Eigen, largestEigen, type Operator, symmetricEigen } from "./eigen.ts";
import { addScaled, norm, PLAIN, type Products, rowSquares, scale, straighten, transpose } from "./linalg.ts";

/** The singular value decomposition of a stack as far as it was asked for. */
export interface Components {
  /** How many components there are: at most as many as were asked for. */
  count: number;
  /** [count, width], orthonormal within 1e-8, strongest first, the largest entry of each positive. */
  vectors: Float64Array;
  /**
   * All min(rows, width) singular values, descending, or only those of the components where a number of them was asked for that
   * could be found without the rest. Those below 1e-7 of the largest are rounding errors unless the components asked for go
   * down to them.
   */
  singular: Float64Array;
  /** ‖X‖², the sum of the squared singular values; 0 where no row is above its floor. */
  total: number;
}

/**
 * A row is represented when what is left of it is below this share of its length: one step of f32, which is what
 * storing components and coefficients in f32 loses anyway. What lies below is the rounding error of trained weights,
 * not a direction.
 */
export const ROUNDING: number = 2 ** -23;

/**
 * Squared singular values below this share of the largest are not taken from a Gram matrix: squaring leaves of them
 * fewer than six digits. They are found in a second Gram matrix, of the stack without its strong directions.
 */
const RESOLVED = 2 ** -33;

/** Components weaker than this share of the strongest are orthogonalised again; stronger ones come out to 1e-8. */
const WEAK = 1e-3;

/**
 * Column means of rows [rows, width], rounded to f32, so that a pack in f32 stores exactly the mean that was subtracted
 * and identical rows become exactly zero.
 */
export function columnMeans(x: Float64Array, rows: number, width: number, weights?: readonly number[]): Float64Array {
  const mean = new Float64Array(width);
  for (let i = 0; i < rows; i++) addScaled(weights?.[i] ?? 1, x, i * width, mean, 0, width);
  const total = weights?.reduce((a, b) => a + b, 0) || rows;
  return mean.map((sum) => Math.fround(sum / total));
}

/** A copy of rows [rows, width] without `mean`; just a copy where that is undefined. */
export function centred(x: Float64Array, rows: number, width: number, mean: Float64Array | undefined): Float64Array {
  if (!mean) return x.slice();
  const out = new Float64Array(rows * width);
  for (let at = 0; at < out.length; at += width) {
    for (let j = 0; j < width; j++) out[at + j] = x[at + j]! - mean[j]!;
  }
  return out;
}

/**
 * The strongest components of X [rows, width].
 *
 * Numerical rank: the fewest components with which every row is represented (`ROUNDING`). It is judged row by row
 * and not by the largest singular value, so that an adapter a thousand times smaller than its neighbours still counts.
 *
 * @param floors per row, the length below which what is left of it is rounding error: `ROUNDING` times its own size
 * @param choose how many components are wanted, or what says so, given all singular values and their sum of squares; clipped
 *   to the numerical rank
 */
export function principalComponents(
  x: Float64Array,
  rows: number,
  width: number,
  floors: Float64Array,
  choose: number | ((singular: Float64Array, total: number) => number),
  products: Products = PLAIN,
): Components {
  const limit = Math.min(rows, width);
  let singular = new Float64Array(limit);
  const vectors = new Float64Array(limit * width);
  let rest = x;
  let count = 0;
  let total = 0;
  let wanted = 0;
  for (let level = 0; ; level++) {
    const squares = rowSquares(rest, rows, width);
    if (level === 0) total = squares.reduce((sum, square) => sum + square, 0);
    if (squares.every((square, i) => Math.sqrt(square) <= floors[i]!)) {
      if (level === 0) total = 0;
      break;
    }
    const few = level === 0 && typeof choose === "number" ? Math.min(limit, choose) : undefined;
    const eigen = gramEigen(rest, rows, width, products, few);
    if (eigen.values.length < limit) singular = new Float64Array(eigen.values.length);
    const strongest = eigen.values[0]!;
    let resolved = 0;
    for (let i = 0; count + i < singular.length; i++) {
      const value = Math.max(0, eigen.values[i]!);
      singular[count + i] = Math.sqrt(value);
      if (value > RESOLVED * strongest) resolved++;
    }
    if (level === 0) wanted = few ?? Math.min(limit, typeof choose === "number" ? choose : choose(singular, total));
    const take = Math.min(wanted - count, resolved);
    if (take <= 0) break;
    vectors.set(eigen.vectors(take), count * width);
    orthonormalize(vectors, count, take, width, singular);
    if (level === 0 && take === wanted) {
      // What a first Gram matrix resolves is far above rounding: no need to look at what is left.
      count = wanted;
      break;
    }
    const added = vectors.subarray(count * width, (count + take) * width);
    const along = products.multiplyTransposed(rest, added, rows, take, width);
    rest = without(rest, products.multiply(along, added, rows, width, take));
    if (level === 0) count += take;
    else {
      const kept = needed(rowSquares(rest, rows, width), along, take, floors);
      count += kept;
      if (kept < take) break;
    }
    if (count === wanted) break;
  }
  fixSigns(vectors, count, width);
  return { count, vectors: vectors.slice(0, count * width), singular: singular.sort().reverse(), total };
}

/** A stack on its components: how far each row lies along each of them says how many are worth it, before any is made. */
export interface Coordinates extends Pick<Components, "singular" | "total"> {
  /** How many components there are; those below 2⁻¹⁶ of the strongest are not among them. */
  readonly count: number;
  /** [rows, count]. */
  readonly along: Float64Array;
  /** The strongest `count` components. */
  strongest(count: number): Components;
}

/** X [rows, width] on its components. */
export function coordinates(x: Float64Array, rows: number, width: number, products: Products = PLAIN): Coordinates {
  const n = Math.min(rows, width);
  const eigen = symmetricEigen(smallerGram(x, rows, width, products), n, products.tridiagonalize);
  const singular = eigen.values.map((value) => Math.sqrt(Math.max(0, value)));
  const total = rowSquares(x, rows, width).reduce((sum, square) => sum + square, 0);
  const count = eigen.values.filter((value) => value > RESOLVED * eigen.values[0]!).length;
  const found = eigen.vectors(count);
  const across = rows <= width;
  // The smaller Gram matrix of X = U·S·Vᵀ has U or V.
  const along = across
    ? transpose(
        found.map((value, at) => value * singular[Math.floor(at / rows)]!),
        count,
        rows,
      )
    : products.multiplyTransposed(x, found, rows, count, width);
  const strongest = (count: number): Components => {
    const own = found.slice(0, count * n);
    const vectors = across ? products.multiply(own, x, count, width, rows) : own;
    for (let k = 0; across && k < count; k++) scale(1 / singular[k]!, vectors, k * width, width);
    orthonormalize(vectors, 0, count, width, singular);
    fixSigns(vectors, count, width);
    return { count, vectors, singular, total };
  };
  return { count, singular, total, along, strongest };
}

/**
 * Eigenvalues of the smaller Gram matrix of X, with vectors in the row space either way.
 * @param few so many are enough, where they are found alone for less
 */
function gramEigen(x: Float64Array, rows: number, width: number, products: Products, few?: number): Eigen {
  const found = few === undefined ? undefined : fewEigen(x, rows, width, few, products);
  const eigen =
    found ?? symmetricEigen(smallerGram(x, rows, width, products), Math.min(rows, width), products.tridiagonalize);
  if (rows > width) return eigen;
  return {
    values: eigen.values,
    vectors(count) {
      const out = products.multiply(eigen.vectors(count), x, count, width, rows);
      for (let k = 0; k < count; k++) scale(1 / Math.sqrt(eigen.values[k]!), out, k * width, width);
      return out;
    },
  };
}

function smallerGram(x: Float64Array, rows: number, width: number, products: Products): Float64Array {
  return rows > width ? products.gram(transpose(x, rows, width), width, rows) : products.gram(x, rows, width);
}

/** The largest eigenpairs alone; undefined where that does not pay, or where one is not resolved. */
function fewEigen(x: Float64Array, rows: number, width: number, few: number, products: Products): Eigen | undefined {
  // G = Y·Yᵀ, where Y [n, other] is X or lies across it.
  const across = rows > width;
  const [n, other] = across ? [width, rows] : [rows, width];
  const { multiply, multiplyTransposed } = products;
  const [toY, fromY] = across ? [multiplyTransposed, multiply] : [multiply, multiplyTransposed];
  const half = (v: Float64Array, k: number): Float64Array => fromY(v, x, k, n, other);
  const operator: Operator = {
    n,
    apply: (v, k) => half(toY(v, x, k, other, n), k),
    start: (k, random) =>
      half(
        Float64Array.from({ length: k * other }, () => random() - 0.5),
        k,
      ),
  };
  const release = products.hold?.(x);
  try {
    const found = largestEigen(operator, few, products);
    if (!found || found.values.at(-1)! <= RESOLVED * found.values[0]!) return undefined;
    return { values: found.values, vectors: () => found.vectors };
  } finally {
    release?.();
  }
}

/**
 * Makes vectors `from` to `from + count` unit vectors, the weak ones orthogonal to all before them (twice is enough).
 */
export function orthonormalize(
  v: Float64Array,
  from: number,
  count: number,
  width: number,
  singular: Float64Array,
): void {
  for (let k = from; k < from + count; k++) {
    const weak = singular[k]! < WEAK * singular[0]!;
    for (let pass = 0; pass < (weak ? 2 : 0); pass++) straighten(v, k, width);
    scale(1 / norm(v, k * width, width), v, k * width, width);
  }
}

/** X − Y in a new array. */
function without(x: Float64Array, y: Float64Array): Float64Array {
  return x.map((value, i) => value - y[i]!);
}

/** How many of the last `count` components every row needs, given the squares left of the rows with all. */
function needed(rest: Float64Array, along: Float64Array, count: number, floors: Float64Array): number {
  for (let k = count; k > 0; k--) {
    for (let i = 0; i < rest.length; i++) {
      rest[i]! += along[i * count + k - 1]! ** 2;
      if (Math.sqrt(rest[i]!) > floors[i]!) return k;
    }
  }
  return 0;
}

/** Signs of singular vectors are arbitrary. The largest entry (the first of equals) is made positive. */
export function fixSigns(vectors: Float64Array, count: number, width: number): void {
  for (let k = 0; k < count; k++) {
    if (dominant(vectors, k * width, width) < 0) scale(-1, vectors, k * width, width);
  }
}

/** The entry of largest magnitude among `count` values from `at`, the first of equals. */
export function dominant(x: Float64Array, at: number, count: number): number {
  let peak = 0;
  for (let k = at; k < at + count; k++) if (Math.abs(x[k]!) > Math.abs(peak)) peak = x[k]!;
  return peak;
}

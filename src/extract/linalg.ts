/**
 * Dense linear algebra in f64 for packing: products of row-major matrices, LQ, a small SVD, Cholesky, the symmetric
 * eigenproblem. Nothing here knows of adapters. Every matrix is a flat row-major Float64Array; a "row" is a vector of
 * the space we work in, so products are taken between rows, which lie contiguous in memory. Own code, since ml-matrix
 * holds an array for each row, which WebAssembly cannot take over, and computes all eigenvectors where a pack keeps a
 * few.
 */
import { uniform } from "../tensor/random.ts";

const EPSILON = Number.EPSILON;

/**
 * One step of f32: the rest of a vector below this share of its length is the rounding error of trained weights, not a
 * direction.
 */
export const ROUNDING: number = 2 ** -23;

/** Products in which extraction spends its time: the plain loops of this file, or faster ones. */
export interface Products {
  /** X·Y [m, n] of X [m, width] and Y [width, n]. */
  multiply(x: Float64Array, y: Float64Array, m: number, n: number, width: number): Float64Array;
  /** X·Yᵀ [m, n] of X [m, width] and Y [n, width]: every dot product between their rows. */
  multiplyTransposed(x: Float64Array, y: Float64Array, m: number, n: number, width: number): Float64Array;
  /** X·Xᵀ [rows, rows] of X [rows, width]: symmetric to the bit. */
  gram(x: Float64Array, rows: number, width: number): Float64Array;
  /** Reduces a symmetric matrix [n, n], in place of the plain loop. */
  tridiagonalize?(a: Float64Array, n: number): Tridiagonal;
  /**
   * Finds the scale that loses least of a row of values, rounded to integers up to `largest`. Default: the plain loop
   * of `encodeTensor`.
   */
  findScale?(values: Float64Array, scales: Float64Array, largest: number): number;
}

export const multiply: Products["multiply"] = (x, y, m, n, width) =>
  multiplyTransposed(x, transpose(y, width, n), m, n, width);

export const multiplyTransposed: Products["multiplyTransposed"] = (x, y, m, n, width) => {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) out[i * n + j] = dot(x, i * width, y, j * width, width);
  return out;
};

export const gram: Products["gram"] = (x, rows, width) => {
  const out = new Float64Array(rows * rows);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j <= i; j++) out[i * rows + j] = dot(x, i * width, x, j * width, width);
  return mirrored(out, rows);
};

/** The products as plain loops, for engines without WebAssembly. */
export const PLAIN: Products = { multiply, multiplyTransposed, gram };

/** A matrix [n, n] whose entries right of the diagonal are those left of it. In place. */
export function mirrored(matrix: Float64Array, n: number): Float64Array {
  for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) matrix[j * n + i] = matrix[i * n + j]!;
  return matrix;
}

/** T of A = H·T·Hᵀ, A symmetric, H orthogonal. */
export interface Tridiagonal {
  /** [n]. */
  diagonal: Float64Array;
  /** [n], the last is 0. */
  off: Float64Array;
  /** z ← z·Hᵀ in place: vectors [count, n] of T become those of A. */
  turn(z: Float64Array, count: number): void;
}

/**
 * Xᵀ [width, rows] of X [rows, width]. In strips of 16 rows, because each column of the result is a cache line of its
 * own.
 */
export function transpose(x: Float64Array, rows: number, width: number): Float64Array {
  const out = new Float64Array(rows * width);
  for (let from = 0; from < rows; from += 16) {
    const to = Math.min(from + 16, rows);
    for (let j = 0; j < width; j++) {
      for (let i = from; i < to; i++) out[j * rows + i] = x[i * width + j]!;
    }
  }
  return out;
}

/** Σ x[xAt + k]·y[yAt + k] over `count` values. Four partial sums, because one would wait for each addition to end. */
export function dot<T extends Float32Array | Float64Array>(
  x: T,
  xAt: number,
  y: T,
  yAt: number,
  count: number,
): number {
  let s0 = 0;
  let s1 = 0;
  let s2 = 0;
  let s3 = 0;
  let k = 0;
  for (; k + 3 < count; k += 4) {
    s0 += x[xAt + k]! * y[yAt + k]!;
    s1 += x[xAt + k + 1]! * y[yAt + k + 1]!;
    s2 += x[xAt + k + 2]! * y[yAt + k + 2]!;
    s3 += x[xAt + k + 3]! * y[yAt + k + 3]!;
  }
  for (; k < count; k++) s0 += x[xAt + k]! * y[yAt + k]!;
  return s0 + s1 + (s2 + s3);
}

export function addScaled(
  factor: number,
  x: Float64Array,
  xAt: number,
  y: Float64Array,
  yAt: number,
  count: number,
): void {
  for (let k = 0; k < count; k++) y[yAt + k]! += factor * x[xAt + k]!;
}

/** Values with zeros behind: rows, and rows of zeros. */
export function lengthened(x: Float64Array, length: number): Float64Array {
  if (x.length === length) return x;
  const out = new Float64Array(length);
  out.set(x);
  return out;
}

/** ‖x‖ of `count` values from `at`. */
export function norm(x: Float64Array, at: number = 0, count: number = x.length): number {
  return Math.sqrt(dot(x, at, x, at, count));
}

export function scale(factor: number, x: Float64Array, at: number, count: number): void {
  for (let k = 0; k < count; k++) x[at + k]! *= factor;
}

/** The entry of largest magnitude among `count` values from `at`, the first of equals. */
export function dominant(x: Float64Array, at: number, count: number): number {
  let peak = 0;
  for (let k = at; k < at + count; k++) if (Math.abs(x[k]!) > Math.abs(peak)) peak = x[k]!;
  return peak;
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

export function rowSquares(x: Float64Array, rows: number, width: number): Float64Array {
  return Float64Array.from({ length: rows }, (_, i) => dot(x, i * width, x, i * width, width));
}

/**
 * Makes a Householder reflector H = I − tau·v·vᵀ of the `count` values from `at`: H·x = (beta, 0, …, 0). They are
 * replaced by v, whose first value is 1. tau is 0, and v means nothing, where x is already of that form.
 */
function reflector(x: Float64Array, at: number, count: number): { tau: number; beta: number } {
  const alpha = x[at]!;
  const tail = dot(x, at + 1, x, at + 1, count - 1);
  if (tail === 0) return { tau: 0, beta: alpha };
  const beta = -Math.sign(alpha || 1) * Math.sqrt(alpha * alpha + tail);
  scale(1 / (alpha - beta), x, at + 1, count - 1);
  x[at] = 1;
  return { tau: (beta - alpha) / beta, beta };
}

/**
 * Applies H = I − tau·v·vᵀ to `rows` vectors of `length` values, `stride` apart. Four at a time share the reads of v.
 */
function reflect(
  tau: number,
  v: Float64Array,
  vAt: number,
  x: Float64Array,
  at: number,
  stride: number,
  rows: number,
  length: number,
): void {
  let i = 0;
  for (; i + 3 < rows; i += 4) {
    const x0 = at + i * stride;
    const x1 = x0 + stride;
    const x2 = x1 + stride;
    const x3 = x2 + stride;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    for (let k = 0; k < length; k++) {
      const value = v[vAt + k]!;
      s0 += value * x[x0 + k]!;
      s1 += value * x[x1 + k]!;
      s2 += value * x[x2 + k]!;
      s3 += value * x[x3 + k]!;
    }
    s0 *= tau;
    s1 *= tau;
    s2 *= tau;
    s3 *= tau;
    for (let k = 0; k < length; k++) {
      const value = v[vAt + k]!;
      x[x0 + k]! -= s0 * value;
      x[x1 + k]! -= s1 * value;
      x[x2 + k]! -= s2 * value;
      x[x3 + k]! -= s3 * value;
    }
  }
  for (; i < rows; i++) {
    const row = at + i * stride;
    addScaled(-tau * dot(v, vAt, x, row, length), v, vAt, x, row, length);
  }
}

/** X = L·Q: L [rows, size] lower trapezoidal, Q [size, width] with orthonormal rows, size = min(rows, width). */
interface LQ {
  L: Float64Array;
  Q: Float64Array;
  size: number;
}

/**
 * Thin LQ of X [rows, width] by Householder reflectors: stable for any rank, zero rows included. X is overwritten.
 * @param whole false: without Q, which is half of the work and then empty
 */
export function lq(x: Float64Array, rows: number, width: number, whole: boolean = true): LQ {
  const size = Math.min(rows, width);
  const taus = new Float64Array(size);
  const L = new Float64Array(rows * size);
  for (let k = 0; k < size; k++) {
    const at = k * width + k;
    const { tau, beta } = reflector(x, at, width - k);
    taus[k] = tau;
    L[k * size + k] = beta;
    if (tau !== 0) reflect(tau, x, at, x, at + width, width, rows - k - 1, width - k);
    for (let i = k + 1; i < rows; i++) L[i * size + k] = x[i * width + k]!;
  }
  const Q = new Float64Array(whole ? size * width : 0);
  for (let k = size - 1; whole && k >= 0; k--) {
    const at = k * width + k;
    Q[at] = 1;
    // Reflector k leaves the unit vectors before row k alone: its own vector begins further right.
    if (taus[k] !== 0) reflect(taus[k]!, x, at, Q, at, width, size - k, width - k);
  }
  return { L, Q, size };
}

/** C = Uᵀ·diag(S)·V by rows: U [m, m], V [m, n], S [m] descending. */
export interface SVD {
  /** Left singular vectors, one a row. */
  U: Float64Array;
  S: Float64Array;
  /** Right singular vectors, one a row; a zero row where S is 0. */
  V: Float64Array;
}

/**
 * SVD of a small matrix C [m, n] by one-sided Jacobi: rows are rotated until all are orthogonal. Small singular values
 * come out accurate relative to themselves where the rows of C allow it, which a Gram matrix would not give.
 */
export function svd(c: Float64Array, m: number, n: number): SVD {
  const w = c.slice();
  const u = new Float64Array(m * m);
  for (let i = 0; i < m; i++) u[i * m + i] = 1;
  // Squared norms of the rows, each valid until its row is rotated.
  const squares = rowSquares(w, m, n);
  // Convergence is quadratic, 5 to 8 sweeps in practice; the cap only rules out an endless loop between rounding
  // errors.
  for (let sweep = 0, turned = true; turned && sweep < 60; sweep++) {
    turned = false;
    for (let p = 0; p < m; p++) {
      for (let q = p + 1; q < m; q++) {
        const pp = squares[p]!;
        const qq = squares[q]!;
        const pq = dot(w, p * n, w, q * n, n);
        if (Math.abs(pq) <= EPSILON * Math.sqrt(pp) * Math.sqrt(qq)) continue;
        turned = true;
        const zeta = (qq - pp) / (2 * pq);
        const tangent = Math.sign(zeta || 1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta));
        const cosine = 1 / Math.sqrt(1 + tangent * tangent);
        rotate(w, p * n, q * n, n, cosine, cosine * tangent);
        squares[p] = dot(w, p * n, w, p * n, n);
        squares[q] = dot(w, q * n, w, q * n, n);
        rotate(u, p * m, q * m, m, cosine, cosine * tangent);
      }
    }
  }
  const norms = squares.map(Math.sqrt);
  const order = Array.from(norms.keys()).sort((a, b) => norms[b]! - norms[a]!);
  const out: SVD = { U: new Float64Array(m * m), S: new Float64Array(m), V: new Float64Array(m * n) };
  order.forEach((from, to) => {
    const s = norms[from]!;
    out.S[to] = s;
    out.U.set(u.subarray(from * m, (from + 1) * m), to * m);
    if (s > 0) addScaled(1 / s, w, from * n, out.V, to * n, n);
  });
  return out;
}

function rotate(x: Float64Array, p: number, q: number, count: number, cosine: number, sine: number): void {
  for (let k = 0; k < count; k++) {
    const a = x[p + k]!;
    const b = x[q + k]!;
    x[p + k] = cosine * a - sine * b;
    x[q + k] = sine * a + cosine * b;
  }
}

/** A pivot below this share of its diagonal entry means: the vector depends on those before it. */
const DEPENDENT = 2 ** -36;

/**
 * Lower Cholesky factor L of a positive semidefinite Gram matrix G [n, n]. A vector that depends on those before it (to
 * six digits of its length) gets a zero row and column: `choleskySolve` then leaves it out, so that a least squares
 * problem with dependent vectors is solved by the independent ones instead of failing or blowing up.
 * The leading block of L is the factor of the leading block of G: one factor serves every prefix of the vectors.
 */
export function cholesky(g: Float64Array, n: number): Float64Array {
  const l = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < i; j++) {
      const pivot = l[j * n + j]!;
      if (pivot > 0) l[i * n + j] = (g[i * n + j]! - dot(l, i * n, l, j * n, j)) / pivot;
    }
    const square = g[i * n + i]! - dot(l, i * n, l, i * n, i);
    if (square > DEPENDENT * g[i * n + i]!) l[i * n + i] = Math.sqrt(square);
    else l.fill(0, i * n, i * n + i);
  }
  return l;
}

/**
 * Solves L·y = h in place, for `rows` right-hand sides [rows, n]. ‖y‖² is the squared length of the projection onto the
 * vectors whose Gram matrix was factored, and the first k values solve the problem of the first k vectors.
 */
export function forwardSolve(l: Float64Array, n: number, h: Float64Array, rows: number): void {
  for (let at = 0; at < rows * n; at += n) {
    for (let k = 0; k < n; k++) {
      const pivot = l[k * n + k]!;
      h[at + k] = pivot > 0 ? (h[at + k]! - dot(l, k * n, h, at, k)) / pivot : 0;
    }
  }
}

/** Solves Lᵀ·x = y in place with the leading [count, count] block of L [n, n], for right-hand sides [rows, count]. */
export function backwardSolve(l: Float64Array, n: number, count: number, y: Float64Array, rows: number): void {
  for (let at = 0; at < rows * count; at += count) {
    for (let k = count - 1; k >= 0; k--) {
      const pivot = l[k * n + k]!;
      const x = pivot > 0 ? y[at + k]! / pivot : 0;
      y[at + k] = x;
      if (x !== 0) addScaled(-x, l, k * n, y, at, k);
    }
  }
}

// The symmetric eigenproblem: all eigenvalues, but eigenvectors of the largest ones only, since a pack keeps a fraction
// of the components. Householder tridiagonalisation, implicit QL for the values, inverse iteration for the vectors
// (Golub & Van Loan, "Matrix Computations", 8.3 and 8.2.2).

/** Eigenvalues and, on demand, eigenvectors of a symmetric matrix. */
export interface Eigen {
  /** All n, descending. Absolute accuracy: a few EPSILON times the largest magnitude. */
  readonly values: Float64Array;
  /** Unit eigenvectors [count, n] of the `count` largest values, orthogonal to 1e-10, signs arbitrary. */
  vectors(count: number): Float64Array;
}

/**
 * Solves the symmetric eigenproblem of A [n, n]. A is overwritten.
 * @param reduce brings A to tridiagonal form, in place of the plain loop
 * @throws RangeError when A holds NaN or infinity
 */
export function symmetricEigen(a: Float64Array, n: number, reduce: typeof tridiagonalize = tridiagonalize): Eigen {
  const t = normed(reduce(a, n));
  const values = tridiagonalValues(t);
  return {
    values,
    vectors(count) {
      const z = tridiagonalVectors(t, values, count);
      t.turn(z, count);
      return z;
    },
  };
}

/** A form with its norm ‖T‖∞, the unit of all tolerances. */
type Normed = Tridiagonal & { n: number; norm: number };

function normed(t: Tridiagonal): Normed {
  const { diagonal, off } = t;
  const n = diagonal.length;
  let norm = 0;
  for (let i = 0; i < n; i++) {
    norm = Math.max(norm, Math.abs(diagonal[i]!) + Math.abs(off[i]!) + Math.abs(off[i - 1] ?? 0));
  }
  if (!Number.isFinite(norm)) throw new RangeError("symmetricEigen: the matrix holds NaN or infinity");
  return { ...t, n, norm };
}

/** Reduces A to tridiagonal form: H₀·A·H₀, and so on, one row at a time. Reads and writes the upper triangle only. */
function tridiagonalize(a: Float64Array, n: number): Tridiagonal {
  const diagonal = new Float64Array(n);
  const off = new Float64Array(n);
  const taus = new Float64Array(n);
  const v = new Float64Array(n);
  const p = new Float64Array(n);
  for (let k = 0; k < n - 1; k++) {
    const first = k + 1;
    const { tau, beta } = reflector(a, k * n + first, n - first);
    taus[k] = tau;
    off[k] = beta;
    if (tau === 0) continue;
    for (let j = first; j < n; j++) v[j] = a[k * n + j]!;
    multiplyUpper(a, n, first, v, p);
    const half = (tau * tau * dot(p, first, v, first, n - first)) / 2;
    for (let j = first; j < n; j++) p[j] = tau * p[j]! - half * v[j]!;
    subtractUpper(a, n, first, v, p);
  }
  for (let i = 0; i < n; i++) diagonal[i] = a[i * n + i]!;
  return {
    diagonal,
    off,
    turn(z, count) {
      // H = H₀·H₁·…: last one first.
      for (let k = n - 2; k >= 0; k--) {
        if (taus[k] !== 0) reflect(taus[k]!, a, k * n + k + 1, z, k + 1, n, count, n - k - 1);
      }
    },
  };
}

/** out = A·v over the trailing block from `first`, A symmetric by its upper triangle. */
function multiplyUpper(a: Float64Array, n: number, first: number, v: Float64Array, out: Float64Array): void {
  out.fill(0, first);
  for (let i = first; i < n; i++) {
    const row = i * n;
    out[i]! += dot(a, row + i, v, i, n - i);
    addScaled(v[i]!, a, row + i + 1, out, i + 1, n - i - 1);
  }
}

/** A −= v·wᵀ + w·vᵀ over the upper triangle of the trailing block from `first`. */
function subtractUpper(a: Float64Array, n: number, first: number, v: Float64Array, w: Float64Array): void {
  for (let i = first; i < n; i++) {
    addScaled(-v[i]!, w, i, a, i * n + i, n - i);
    addScaled(-w[i]!, v, i, a, i * n + i, n - i);
  }
}

/** Eigenvalues, descending, by the QL algorithm with implicit Wilkinson shifts. */
function tridiagonalValues(t: Normed): Float64Array {
  const { n } = t;
  const d = t.diagonal.slice();
  const e = t.off.slice();
  const tiny = t.norm * EPSILON * EPSILON;
  const negligible = (i: number): boolean =>
    Math.abs(e[i]!) <= EPSILON * (Math.abs(d[i]!) + Math.abs(d[i + 1]!)) + tiny;
  for (let low = 0; low < n; low++) {
    for (;;) {
      let m = low;
      while (m < n - 1 && !negligible(m)) m++;
      if (m === low) break;
      // Shift: the eigenvalue of the leading 2×2 block nearer to d[low]. Converges cubically, under two rounds a value.
      let g = (d[low + 1]! - d[low]!) / (2 * e[low]!);
      let r = Math.sqrt(g * g + 1);
      g = d[m]! - d[low]! + e[low]! / (g + Math.sign(g || 1) * r);
      let s = 1;
      let c = 1;
      let p = 0;
      let i = m - 1;
      for (; i >= low; i--) {
        const f = s * e[i]!;
        const b = c * e[i]!;
        r = Math.sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r === 0) {
          d[i + 1]! -= p;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1]! - p;
        r = (d[i]! - g) * s + 2 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
      }
      if (i >= low) continue;
      d[low]! -= p;
      e[low] = g;
      e[m] = 0;
    }
  }
  return d.sort().reverse();
}

/**
 * Eigenvectors nearer than this (as a share of ‖T‖) are orthogonalised against each other; others come out orthogonal
 * to EPSILON / 1e-4 by themselves.
 */
const CLUSTER = 1e-4;

/** Eigenvectors of the `count` largest values by inverse iteration, each made orthogonal to its close predecessors. */
function tridiagonalVectors(t: Normed, values: Float64Array, count: number): Float64Array {
  const { n, norm: size } = t;
  const z = new Float64Array(count * n);
  const solve = shiftedSolver(t);
  const random = uniform(SEED);
  for (let k = 0, first = 0; k < count; k++) {
    while (values[first]! - values[k]! > CLUSTER * size) first++;
    const x = z.subarray(k * n, (k + 1) * n);
    const restart = (): void => {
      for (let i = 0; i < n; i++) x[i] = random() - 0.5;
      normalize(x);
    };
    solve.shift(values[k]!);
    restart();
    // The growth of a solve is 1 / residual. Two rounds reach rounding level but for clusters, which need a few more.
    for (let round = 0; round < 12; round++) {
      solve.apply(x);
      const grown = normalize(x);
      let kept = 1;
      for (let pass = 0; pass < 2; pass++) {
        for (let j = first; j < k; j++) addScaled(-dot(z, j * n, x, 0, n), z, j * n, x, 0, n);
        kept *= normalize(x);
      }
      if (!(kept > 0) || !Number.isFinite(grown)) restart();
      else if (round > 0 && grown * kept * size * EPSILON * n > 0.1) break;
    }
  }
  return z;
}

/** LU of T − λ with partial pivoting. Pivots that vanish become EPSILON·‖T‖: T − λ is meant to be nearly singular. */
function shiftedSolver(t: Normed): { shift(value: number): void; apply(x: Float64Array): void } {
  const { n, diagonal, off } = t;
  const floor = EPSILON * t.norm || 1;
  const pivots = new Float64Array(n);
  const above = new Float64Array(n);
  const above2 = new Float64Array(n);
  const factors = new Float64Array(n);
  const swapped = new Uint8Array(n);
  return {
    shift(value) {
      let pivot = diagonal[0]! - value;
      let next = off[0]!;
      for (let i = 0; i < n - 1; i++) {
        const below = off[i]!;
        const own = diagonal[i + 1]! - value;
        if (Math.abs(below) > Math.abs(pivot)) {
          const factor = pivot / below;
          swapped[i] = 1;
          factors[i] = factor;
          pivots[i] = below;
          above[i] = own;
          above2[i] = off[i + 1]!;
          pivot = next - factor * own;
          next = -factor * off[i + 1]!;
        } else {
          if (Math.abs(pivot) < floor) pivot = pivot < 0 ? -floor : floor;
          const factor = below / pivot;
          swapped[i] = 0;
          factors[i] = factor;
          pivots[i] = pivot;
          above[i] = next;
          above2[i] = 0;
          pivot = own - factor * next;
          next = off[i + 1]!;
        }
      }
      pivots[n - 1] = pivot;
      for (let i = 0; i < n; i++) {
        if (Math.abs(pivots[i]!) < floor) pivots[i] = pivots[i]! < 0 ? -floor : floor;
      }
    },
    apply(x) {
      for (let i = 0; i < n - 1; i++) {
        if (swapped[i] === 1) {
          const upper = x[i]!;
          x[i] = x[i + 1]!;
          x[i + 1] = upper - factors[i]! * x[i]!;
        } else {
          x[i + 1]! -= factors[i]! * x[i]!;
        }
      }
      for (let i = n - 1; i >= 0; i--) {
        let value = x[i]!;
        if (i + 1 < n) value -= above[i]! * x[i + 1]!;
        if (i + 2 < n) value -= above2[i]! * x[i + 2]!;
        x[i] = value / pivots[i]!;
      }
    },
  };
}

/** Scales x to length 1 and returns its former length; x stays as it is when that is 0 or not finite. */
function normalize(x: Float64Array): number {
  const length = norm(x);
  if (length > 0 && Number.isFinite(length)) scale(1 / length, x, 0, x.length);
  return length;
}

/** Seed of all start vectors, so that packs are the same in every run and runtime. */
const SEED = 0x9e3779b9;

/**
 * Dense linear algebra in f64 for extraction: products of row-major matrices, LQ, a small SVD, Cholesky. Nothing here
 * knows of adapters. Eigenproblems are in `eigen.ts`. Every matrix is a flat row-major Float64Array; a "row" is a
 * vector of the space we work in, so products are taken between rows, which lie contiguous in memory. Own code, since ml-matrix holds an
 * array for each row, which WebAssembly cannot take over, and computes all eigenvectors where a pack keeps a few.
 */

/** Spacing of doubles at 1. */
export const EPSILON: number = Number.EPSILON;

/** What extraction spends its time in: the plain loops of this file, or faster ones. */
export interface Products {
  /** X·Y [m, n] of X [m, width] and Y [width, n]. */
  multiply(x: Float64Array, y: Float64Array, m: number, n: number, width: number): Float64Array;
  /** X·Yᵀ [m, n] of X [m, width] and Y [n, width]: every dot product between their rows. */
  multiplyTransposed(x: Float64Array, y: Float64Array, m: number, n: number, width: number): Float64Array;
  /** X·Xᵀ [rows, rows] of X [rows, width]: symmetric to the bit. */
  gram(x: Float64Array, rows: number, width: number): Float64Array;
  /** Keeps a copy of an array that is multiplied several times and does not change meanwhile. Returns what frees it. */
  hold?(operand: Float64Array): () => void;
  /** Does what `tridiagonalize` of `eigen.ts` does, which runs where this is absent. */
  tridiagonalize?(a: Float64Array, n: number): Tridiagonal;
  /** Which of these scales loses least of a row of values, rounded to integers up to `largest`. Default: the plain loop of `encodeTensor`. */
  findScale?(values: Float64Array, scales: Float64Array, largest: number): number;
}

export const multiply: Products["multiply"] = (x, y, m, n, width) =>
  multiplyTransposed(x, transpose(y, width, n), m, n, width);

export const multiplyTransposed: Products["multiplyTransposed"] = (x, y, m, n, width) =>
  tiles(x, y, m, n, width, () => 0);

export const gram: Products["gram"] = (x, rows, width) =>
  mirrored(
    tiles(x, x, rows, rows, width, (j) => j),
    rows,
  );

/** The products as plain loops. */
export const PLAIN: Products = { multiply, multiplyTransposed, gram };

/** A matrix [n, n] whose entries right of the diagonal are those left of it. In place. */
export function mirrored(matrix: Float64Array, n: number): Float64Array {
  for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) matrix[j * n + i] = matrix[i * n + j]!;
  return matrix;
}

/**
 * X·Yᵀ [m, n], of each column j the rows from `first(j)` on. A Gram matrix needs those from j on, half of the work.
 *
 * Tiles of 2×4 keep eight sums in registers: 2.3 GMAC/s in V8 against 0.8 for one dot product at a time. At the edges
 * the last row or column stands in for the missing ones; it is computed again and stored to the same place.
 */
function tiles(
  x: Float64Array,
  y: Float64Array,
  m: number,
  n: number,
  width: number,
  first: (j: number) => number,
): Float64Array {
  const out = new Float64Array(m * n);
  for (let j = 0; j < n; j += 4) {
    const j1 = Math.min(j + 1, n - 1);
    const j2 = Math.min(j + 2, n - 1);
    const j3 = Math.min(j + 3, n - 1);
    const y0 = j * width;
    const y1 = j1 * width;
    const y2 = j2 * width;
    const y3 = j3 * width;
    for (let i = first(j); i < m; i += 2) {
      const i1 = Math.min(i + 1, m - 1);
      const x0 = i * width;
      const x1 = i1 * width;
      let s00 = 0;
      let s01 = 0;
      let s02 = 0;
      let s03 = 0;
      let s10 = 0;
      let s11 = 0;
      let s12 = 0;
      let s13 = 0;
      for (let k = 0; k < width; k++) {
        const a = x[x0 + k]!;
        const b = x[x1 + k]!;
        const c = y[y0 + k]!;
        const d = y[y1 + k]!;
        const e = y[y2 + k]!;
        const f = y[y3 + k]!;
        s00 += a * c;
        s01 += a * d;
        s02 += a * e;
        s03 += a * f;
        s10 += b * c;
        s11 += b * d;
        s12 += b * e;
        s13 += b * f;
      }
      const row0 = i * n;
      const row1 = i1 * n;
      out[row0 + j] = s00;
      out[row0 + j1] = s01;
      out[row0 + j2] = s02;
      out[row0 + j3] = s03;
      out[row1 + j] = s10;
      out[row1 + j1] = s11;
      out[row1 + j2] = s12;
      out[row1 + j3] = s13;
    }
  }
  return out;
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

/** Xᵀ [width, rows] of X [rows, width]. In strips of 16 rows, because each column of the result is a cache line of its own. */
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
export function dot(x: Float64Array, xAt: number, y: Float64Array, yAt: number, count: number): number {
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

/** y[yAt + k] += factor·x[xAt + k] over `count` values. */
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

/** Takes out of row `i` of X [_, width] what lies along each of the unit rows before it. */
export function straighten(x: Float64Array, i: number, width: number): void {
  for (let j = 0; j < i; j++) addScaled(-dot(x, j * width, x, i * width, width), x, j * width, x, i * width, width);
}

/** Multiplies `count` values from `at` by `factor`. */
export function scale(factor: number, x: Float64Array, at: number, count: number): void {
  for (let k = 0; k < count; k++) x[at + k]! *= factor;
}

/** ‖x‖² of each row of X [rows, width]. */
export function rowSquares(x: Float64Array, rows: number, width: number): Float64Array {
  return Float64Array.from({ length: rows }, (_, i) => dot(x, i * width, x, i * width, width));
}

/**
 * Makes a Householder reflector H = I − tau·v·vᵀ of the `count` values from `at`: H·x = (beta, 0, …, 0). They are
 * replaced by v, whose first value is 1. tau is 0, and v means nothing, where x is already of that form.
 */
export function reflector(x: Float64Array, at: number, count: number): { tau: number; beta: number } {
  const alpha = x[at]!;
  const tail = dot(x, at + 1, x, at + 1, count - 1);
  if (tail === 0) return { tau: 0, beta: alpha };
  const beta = -Math.sign(alpha || 1) * Math.sqrt(alpha * alpha + tail);
  scale(1 / (alpha - beta), x, at + 1, count - 1);
  x[at] = 1;
  return { tau: (beta - alpha) / beta, beta };
}

/**
 * Applies H = I − tau·v·vᵀ to `rows` vectors of `length` values, the first at `at`, `stride` apart. Four at a time
 * share the reads of v.
 */
export function reflect(
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
export interface LQ {
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

/**
 * The symmetric eigenproblem for extraction, in f64: all eigenvalues, but eigenvectors of the largest ones only, since
 * a pack keeps a fraction of the components. Householder tridiagonalisation, implicit QL for the values, inverse
 * iteration for the vectors (Golub & Van Loan, "Matrix Computations", 8.3 and 8.2.2). Not a general eigensolver: no
 * generalised or complex problems.
 */
import { uniform } from "../tensor/random.ts";
import {
  addScaled,
  dot,
  EPSILON,
  norm,
  type Products,
  reflect,
  reflector,
  scale,
  straighten,
  type Tridiagonal,
} from "./linalg.ts";

/** Eigenvalues and, on demand, eigenvectors of a symmetric matrix. */
export interface Eigen {
  /** All n, descending. Absolute accuracy: a few EPSILON times the largest magnitude. */
  readonly values: Float64Array;
  /** Unit eigenvectors [count, n] of the `count` largest values, orthogonal to 1e-10, signs arbitrary. */
  vectors(count: number): Float64Array;
}

/**
 * Solves the symmetric eigenproblem of A [n, n]. A is overwritten.
 * @param reduce what brings A to tridiagonal form, in place of the plain loop
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

/**
 * Reduces A to tridiagonal form: H₀·A·H₀, and so on, one row at a time. Reads and writes the upper triangle only, two
 * rows at a time, because this loop is bound by loads and stores.
 */
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
  let i = first;
  for (; i + 1 < n; i += 2) {
    const row0 = i * n;
    const row1 = row0 + n;
    const v0 = v[i]!;
    const v1 = v[i + 1]!;
    const between = a[row0 + i + 1]!;
    let sum0 = a[row0 + i]! * v0 + between * v1;
    let sum1 = between * v0 + a[row1 + i + 1]! * v1;
    for (let j = i + 2; j < n; j++) {
      const a0 = a[row0 + j]!;
      const a1 = a[row1 + j]!;
      const vj = v[j]!;
      sum0 += a0 * vj;
      sum1 += a1 * vj;
      out[j]! += a0 * v0 + a1 * v1;
    }
    out[i]! += sum0;
    out[i + 1]! += sum1;
  }
  if (i < n) out[i]! += a[i * n + i]! * v[i]!;
}

/** A −= v·wᵀ + w·vᵀ over the upper triangle of the trailing block from `first`. */
function subtractUpper(a: Float64Array, n: number, first: number, v: Float64Array, w: Float64Array): void {
  for (let i = first; i < n; i += 2) {
    const row0 = i * n;
    const row1 = row0 + n;
    const v0 = v[i]!;
    const w0 = w[i]!;
    a[row0 + i]! -= 2 * v0 * w0;
    if (i + 1 === n) return;
    const v1 = v[i + 1]!;
    const w1 = w[i + 1]!;
    a[row0 + i + 1]! -= v0 * w1 + w0 * v1;
    a[row1 + i + 1]! -= 2 * v1 * w1;
    for (let j = i + 2; j < n; j++) {
      const vj = v[j]!;
      const wj = w[j]!;
      a[row0 + j]! -= v0 * wj + w0 * vj;
      a[row1 + j]! -= v1 * wj + w1 * vj;
    }
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
export const SEED = 0x9e3779b9;

// The largest eigenpairs of a positive semidefinite matrix that is known by what it makes of vectors, by block Lanczos with full
// reorthogonalisation (Golub & Van Loan, "Matrix Computations", 10.3.6). For the few components of a large stack whose spectrum
// falls off, without its Gram matrix; `eigen.ts` solves the rest, and everything small.

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

/**
 * The symmetric eigenproblem for extraction, in f64: all eigenvalues, but eigenvectors of the largest ones only, since
 * a pack keeps a fraction of the components. Householder tridiagonalisation, implicit QL for the values, inverse
 * iteration for the vectors (Golub & Van Loan, "Matrix Computations", 8.3 and 8.2.2). Not a general eigensolver: no
 * generalised or complex problems.
 */
import { uniform } from "../tensor/random.ts";
import { addScaled, dot, EPSILON, norm, reflect, reflector, scale, type Tridiagonal } from "./linalg.ts";

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

/**
 * Reduces a symmetric f64 matrix to tridiagonal form by Householder reflectors (Golub & Van Loan, 8.3.1).
 *
 * The update that ends one step, A −= v·wᵀ + w·vᵀ, and the product A·u that begins the next touch the same values, and
 * the loop is bound by loads and stores. So both are done in one pass, two rows at a time, on the upper triangle only.
 */

import { dot, totalOfPair } from "./lanes";

@inline
function pair(at: usize): v128 {
  return v128.load(at);
}

@inline
function twice(a: v128, b: v128, c: v128, d: v128): v128 {
  return f64x2.add(f64x2.mul(a, b), f64x2.mul(c, d));
}

/** y = factor·x + other·y over `length` bytes. */
function combine(factor: f64, x: usize, other: f64, y: usize, length: usize): void {
  for (let at: usize = 0; at < length; at += 8) store<f64>(y + at, factor * load<f64>(x + at) + other * load<f64>(y + at));
}

/**
 * Updates row `row0` and the one below it, from their diagonal on, `length` bytes of the upper one: −= v·wᵀ + w·vᵀ,
 * then adds their part to p = A·u. All addresses are those of the upper row's column.
 */
function step(row0: usize, stride: usize, length: usize, v: usize, w: usize, u: usize, p: usize): void {
  const v0 = load<f64>(v), w0 = load<f64>(w), u0 = load<f64>(u);
  const a = load<f64>(row0) - 2 * v0 * w0;
  store<f64>(row0, a);
  if (length === 8) {
    store<f64>(p, load<f64>(p) + a * u0);
    return;
  }
  const row1 = row0 + stride;
  const v1 = load<f64>(v, 8), w1 = load<f64>(w, 8), u1 = load<f64>(u, 8);
  const b = load<f64>(row0, 8) - v0 * w1 - w0 * v1;
  const c = load<f64>(row1, 8) - 2 * v1 * w1;
  store<f64>(row0, b, 8);
  store<f64>(row1, c, 8);
  let s0 = a * u0 + b * u1, s1 = b * u0 + c * u1;
  let at: usize = 16;
  if (ASC_FEATURE_SIMD) {
    const vv0 = f64x2.splat(v0), vv1 = f64x2.splat(v1), ww0 = f64x2.splat(w0), ww1 = f64x2.splat(w1);
    const uu0 = f64x2.splat(u0), uu1 = f64x2.splat(u1);
    let ss0 = f64x2.splat(0), ss1 = ss0;
    for (; at + 16 <= length; at += 16) {
      const vj = pair(v + at), wj = pair(w + at), uj = pair(u + at);
      const a0 = f64x2.sub(pair(row0 + at), twice(vv0, wj, ww0, vj));
      const a1 = f64x2.sub(pair(row1 + at), twice(vv1, wj, ww1, vj));
      v128.store(row0 + at, a0);
      v128.store(row1 + at, a1);
      ss0 = f64x2.add(ss0, f64x2.mul(a0, uj));
      ss1 = f64x2.add(ss1, f64x2.mul(a1, uj));
      v128.store(p + at, f64x2.add(pair(p + at), twice(a0, uu0, a1, uu1)));
    }
    s0 += totalOfPair(ss0);
    s1 += totalOfPair(ss1);
  }
  for (; at < length; at += 8) {
    const vj = load<f64>(v + at), wj = load<f64>(w + at), uj = load<f64>(u + at);
    const a0 = load<f64>(row0 + at) - (v0 * wj + w0 * vj);
    const a1 = load<f64>(row1 + at) - (v1 * wj + w1 * vj);
    store<f64>(row0 + at, a0);
    store<f64>(row1 + at, a1);
    s0 += a0 * uj;
    s1 += a1 * uj;
    store<f64>(p + at, load<f64>(p + at) + a0 * u0 + a1 * u1);
  }
  store<f64>(p, load<f64>(p) + s0);
  store<f64>(p, load<f64>(p, 8) + s1, 8);
}

/**
 * A [n, n] → T. Reflector k, its first value 1, is left in row k of A right of the diagonal.
 * @param taus n values, followed by room for 2·n more
 */
export function tridiagonalize(a: usize, n: i32, diagonal: usize, off: usize, taus: usize): void {
  const width = <usize>n << 3, stride = width + 8;
  let w = taus + width, p = w + width, v = a;
  memory.fill(w, 0, 2 * width);
  for (let at: usize = 0; at < width; at += 8) {
    // Row k from its diagonal on lacks the update of the step before: v is the row above.
    const row = a + (at >> 3) * stride, rest = width - at;
    const vk = load<f64>(v + at), wk = load<f64>(w + at);
    for (let j: usize = 0; j < rest; j += 8) {
      store<f64>(row + j, load<f64>(row + j) - vk * load<f64>(w + at + j) - wk * load<f64>(v + at + j));
    }
    store<f64>(diagonal + at, load<f64>(row));
    store<f64>(taus + at, 0);
    store<f64>(off + at, 0);
    if (rest === 8) return;
    const u = row + 8, length = rest - 8;
    const alpha = load<f64>(u), tail = dot(u + 8, u + 8, length - 8);
    let tau: f64 = 0, beta = alpha;
    if (tail !== 0) {
      beta = -copysign(sqrt(alpha * alpha + tail), alpha);
      tau = (beta - alpha) / beta;
      combine(0, u, 1 / (alpha - beta), u, length);
      store<f64>(u, 1);
    }
    store<f64>(taus + at, tau);
    store<f64>(off + at, beta);
    memory.fill(p + at + 8, 0, length);
    for (let i: usize = 8; i <= length; i += 16) {
      const column = at + i;
      step(row + i / 8 * stride, width, rest - i, v + column, w + column, row + i, p + column);
    }
    // w of this step, in the place of p: tau·p − tau²·(p·u)/2·u.
    combine(-tau * tau * dot(p + at + 8, u, length) / 2, u, tau, p + at + 8, length);
    const done = w;
    w = p;
    p = done;
    v = row - at;
  }
}

/** Transforms vectors Z [count, n] of T to those of A, through the reflectors, last one first. */
export function turnBack(a: usize, n: i32, taus: usize, z: usize, count: i32): void {
  const width = <usize>n << 3;
  for (let k = n - 2; k >= 0; k--) {
    const tau = load<f64>(taus + (<usize>k << 3));
    if (tau === 0) continue;
    const v = a + <usize>k * width + (<usize>(k + 1) << 3), length = <usize>(n - k - 1) << 3;
    let x = z + (<usize>(k + 1) << 3);
    for (let i = 0; i < count; i++, x += width) {
      const factor = tau * dot(v, x, length);
      let at: usize = 0;
      if (ASC_FEATURE_SIMD) {
        const factors = f64x2.splat(factor);
        for (; at + 16 <= length; at += 16) v128.store(x + at, f64x2.sub(pair(x + at), f64x2.mul(factors, pair(v + at))));
      }
      for (; at < length; at += 8) store<f64>(x + at, load<f64>(x + at) - factor * load<f64>(v + at));
    }
  }
}

/**
 * Peak speed of a machine, for benchmarks/fold.js; not shipped. It moves bytes with memory.copy, and multiply-adds on registers alone, in
 * two forms: which one is faster depends on whether the machine fuses the two operations.
 */
import { accumulate, add, bytes, spread, zero } from "./lanes";

export function copy(to: usize, from: usize, length: usize): void {
  memory.copy(to, from, length);
}

/** Multiply-adds of one round of either form: vectors times lanes. */
export function perRound(): i32 {
  return 8 * <i32>(ASC_FEATURE_SIMD ? bytes<v128>() : bytes<f32>()) / 4;
}

/** Stores the sum, so that nothing is optimised away. */
// @ts-ignore: decorator
@inline
function keep<V>(at: usize, a: V, b: V, c: V, d: V, e: V, f: V, g: V, h: V): void {
  store<V>(at, add<V>(add<V>(add<V>(a, b), add<V>(c, d)), add<V>(add<V>(e, f), add<V>(g, h))));
}

/** Eight sums s = s·x + y, each waiting for its own last value only. `at`: ten f32, then room for a vector. */
// @ts-ignore: decorator
@inline
function runChained<V>(at: usize, rounds: i32): void {
  let a = spread<V>(at), b = spread<V>(at + 4), c = spread<V>(at + 8), d = spread<V>(at + 12);
  let e = spread<V>(at + 16), f = spread<V>(at + 20), g = spread<V>(at + 24), h = spread<V>(at + 28);
  const x = spread<V>(at + 32), y = spread<V>(at + 36);
  for (; rounds > 0; rounds--) {
    a = accumulate<V>(y, a, x);
    b = accumulate<V>(y, b, x);
    c = accumulate<V>(y, c, x);
    d = accumulate<V>(y, d, x);
    e = accumulate<V>(y, e, x);
    f = accumulate<V>(y, f, x);
    g = accumulate<V>(y, g, x);
    h = accumulate<V>(y, h, x);
  }
  keep<V>(at + 48, a, b, c, d, e, f, g, h);
}

/** Eight sums s += x·y of two x and four y; the x change places, so that no product stays the same. */
// @ts-ignore: decorator
@inline
function runCrossed<V>(at: usize, rounds: i32): void {
  let x = spread<V>(at), z = spread<V>(at + 4);
  const p = spread<V>(at + 8), q = spread<V>(at + 12), r = spread<V>(at + 16), s = spread<V>(at + 20);
  let a = zero<V>(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  for (; rounds > 0; rounds--) {
    a = accumulate<V>(a, x, p);
    b = accumulate<V>(b, x, q);
    c = accumulate<V>(c, x, r);
    d = accumulate<V>(d, x, s);
    e = accumulate<V>(e, z, p);
    f = accumulate<V>(f, z, q);
    g = accumulate<V>(g, z, r);
    h = accumulate<V>(h, z, s);
    const t = x;
    x = z;
    z = t;
  }
  keep<V>(at + 48, a, b, c, d, e, f, g, h);
}

export function chained(at: usize, rounds: i32): void {
  if (ASC_FEATURE_SIMD) runChained<v128>(at, rounds);
  else runChained<f32>(at, rounds);
}

export function crossed(at: usize, rounds: i32): void {
  if (ASC_FEATURE_SIMD) runCrossed<v128>(at, rounds);
  else runCrossed<f32>(at, rounds);
}

/**
 * Peak speed of a machine, for benchmarks/fold.js; not shipped. It moves bytes with memory.copy, and multiply-adds on registers alone.
 */
import { accumulate, add, bytes, spread, zero } from "./lanes";

export function copy(to: usize, from: usize, length: usize): void {
  memory.copy(to, from, length);
}

/** Multiply-adds of one round: vectors times lanes. */
export function perRound(): i32 {
  return 8 * <i32>(ASC_FEATURE_SIMD ? bytes<v128>() : bytes<f32>()) / 4;
}

/**
 * Eight sums s += x·y of two x and four y, `at`: six f32, then room for a vector. The x change places, so that no product stays the same. The
 * sum of all is stored, so that nothing is optimised away.
 */
@inline
function run<V>(at: usize, rounds: i32): void {
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
  store<V>(at + 32, add<V>(add<V>(add<V>(a, b), add<V>(c, d)), add<V>(add<V>(e, f), add<V>(g, h))));
}

export function multiplyAdds(at: usize, rounds: i32): void {
  if (ASC_FEATURE_SIMD) run<v128>(at, rounds);
  else run<f32>(at, rounds);
}

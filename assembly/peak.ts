/**
 * What a machine can do at best, for benchmarks/fold.js; not shipped. Moving bytes with memory.copy, and multiply-adds
 * on registers alone: ten independent sums, more than latency times throughput of any machine in use.
 */
import { accumulate, spread, zero } from "./lanes";

/** Multiply-adds of one round of `run`, per lane. */
// @ts-ignore: decorator
@inline
const PER_ROUND: i32 = 20;

function run<V>(rounds: i32, factors: usize): V {
  const x = spread<V>(factors), y = spread<V>(factors + 4);
  let a = zero<V>(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;
  for (; rounds > 0; rounds--) {
    a = accumulate<V>(a, x, y);
    b = accumulate<V>(b, x, y);
    c = accumulate<V>(c, x, y);
    d = accumulate<V>(d, x, y);
    e = accumulate<V>(e, x, y);
    f = accumulate<V>(f, x, y);
    g = accumulate<V>(g, x, y);
    h = accumulate<V>(h, x, y);
    i = accumulate<V>(i, x, y);
    j = accumulate<V>(j, x, y);
  }
  return a;
}

export function copy(to: usize, from: usize, length: usize): void {
  memory.copy(to, from, length);
}

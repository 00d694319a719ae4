/**
 * The one matrix product behind expand, fold and scale: out = base + leftᵀ·right on f32 of any alignment and stride.
 *
 * A tile is 2 rows × 4 vectors: eight sums, four values of right and two of left fit the 15 vector registers that
 * engines leave on x86-64, and each row of a tile is a whole cache line. k is innermost and the loop is not unrolled by
 * hand: V8 keeps all loads of a loop body in front of its arithmetic, and two steps' worth of them spills. Base is
 * added last, so that a small update is summed at its own magnitude.
 *
 * Tiles go down a strip of 16 rows before they go right. Right is then read once per strip, and the cache misses of a
 * strip's 16 lines overlap; row by row, or in tiles of more rows than lines, each miss would be waited for in turn.
 */
import { f32x8BelowToF16, finiteF16x4Plus, highHalves } from "./convert";
import { accumulate, add, bytes, spread, zero } from "./lanes";

// @ts-ignore: decorator
@inline
const STRIP: i32 = 16;

/** Stores base + sum at byte `at`. */
// @ts-ignore: decorator
@inline
function put<V>(out: usize, base: usize, at: usize, sum: V): void {
  store<V>(out + at, add<V>(load<V>(base + at), sum));
}

/** Adds sums to four halves of base. */
// @ts-ignore: decorator
@inline
function halvesPlus(base: usize, sums: v128): v128 {
  return finiteF16x4Plus(v128.load_ext<i16>(base), sums);
}

/** Adds sums to sixteen halves each of two rows. Returns false and stores nothing where one is not finite or reaches 2¹⁶. */
// @ts-ignore: decorator
@inline
function putHalves(
  out: usize, outStride: usize, base: usize, baseStride: usize,
  a0: v128, a1: v128, a2: v128, a3: v128, b0: v128, b1: v128, b2: v128, b3: v128,
): bool {
  const next = base + baseStride, to = out + outStride;
  // Signs are dropped: infinity is 0x7c00 among halves, and 2¹⁶ is 0x4780 in the high bits of an f32.
  const before = i16x8.max_u(
    i16x8.max_u(i16x8.shl(v128.load(base), 1), i16x8.shl(v128.load(base, 16), 1)),
    i16x8.max_u(i16x8.shl(v128.load(next), 1), i16x8.shl(v128.load(next, 16), 1)),
  );
  a0 = halvesPlus(base, a0);
  a1 = halvesPlus(base + 8, a1);
  a2 = halvesPlus(base + 16, a2);
  a3 = halvesPlus(base + 24, a3);
  b0 = halvesPlus(next, b0);
  b1 = halvesPlus(next + 8, b1);
  b2 = halvesPlus(next + 16, b2);
  b3 = halvesPlus(next + 24, b3);
  const a = highHalves(a0, a1), c = highHalves(a2, a3), b = highHalves(b0, b1), d = highHalves(b2, b3);
  const after = i16x8.max_u(
    i16x8.max_u(i16x8.shl(a, 1), i16x8.shl(c, 1)),
    i16x8.max_u(i16x8.shl(b, 1), i16x8.shl(d, 1)),
  );
  const large = v128.or(i16x8.ge_u(before, i16x8.splat(<i16>0xf800)), i16x8.ge_u(after, i16x8.splat(<i16>0x8f00)));
  if (v128.any_true(large)) return false;
  v128.store(out, f32x8BelowToF16(a0, a1, a));
  v128.store(out, f32x8BelowToF16(a2, a3, c), 16);
  v128.store(to, f32x8BelowToF16(b0, b1, b));
  v128.store(to, f32x8BelowToF16(b2, b3, d), 16);
  return true;
}

/** Computes a tile of 2 rows × 4 V, of f32 or, with T = u16, of halves. Returns false if `putHalves` cannot store it. */
// @ts-ignore: decorator
@inline
export function tileOf<V, T>(
  out: usize, outStride: usize, base: usize, baseStride: usize,
  left: usize, leftRow: usize, leftStep: usize, right: usize, rightStep: usize, rank: i32,
): bool {
  let a0 = zero<V>(), a1 = zero<V>(), a2 = zero<V>(), a3 = zero<V>();
  let b0 = zero<V>(), b1 = zero<V>(), b2 = zero<V>(), b3 = zero<V>();
  for (; rank > 0; rank--) {
    const a = spread<V>(left), b = spread<V>(left + leftRow);
    const r0 = load<V>(right), r1 = load<V>(right + bytes<V>());
    const r2 = load<V>(right + 2 * bytes<V>()), r3 = load<V>(right + 3 * bytes<V>());
    a0 = accumulate<V>(a0, a, r0);
    a1 = accumulate<V>(a1, a, r1);
    a2 = accumulate<V>(a2, a, r2);
    a3 = accumulate<V>(a3, a, r3);
    b0 = accumulate<V>(b0, b, r0);
    b1 = accumulate<V>(b1, b, r1);
    b2 = accumulate<V>(b2, b, r2);
    b3 = accumulate<V>(b3, b, r3);
    left += leftStep;
    right += rightStep;
  }
  if (isInteger<T>()) {
    return putHalves(out, outStride, base, baseStride, a0, a1, a2, a3, b0, b1, b2, b3);
  } else {
    put<V>(out, base, 0, a0);
    put<V>(out, base, bytes<V>(), a1);
    put<V>(out, base, 2 * bytes<V>(), a2);
    put<V>(out, base, 3 * bytes<V>(), a3);
    out += outStride;
    base += baseStride;
    put<V>(out, base, 0, b0);
    put<V>(out, base, bytes<V>(), b1);
    put<V>(out, base, 2 * bytes<V>(), b2);
    put<V>(out, base, 3 * bytes<V>(), b3);
    return true;
  }
}

/** A tile of f32. */
function tile<V>(
  out: usize, outStride: usize, base: usize, baseStride: usize,
  left: usize, leftRow: usize, leftStep: usize, right: usize, rightStep: usize, rank: i32,
): void {
  tileOf<V, f32>(out, outStride, base, baseStride, left, leftRow, leftStep, right, rightStep, rank);
}

/** One row of one V, for the edges. */
function dot<V>(
  out: usize, base: usize, left: usize, leftStep: usize, right: usize, rightStep: usize, rank: i32,
): void {
  let sum = zero<V>();
  for (; rank > 0; rank--, left += leftStep, right += rightStep) {
    sum = accumulate<V>(sum, spread<V>(left), load<V>(right));
  }
  put<V>(out, base, 0, sum);
}

/** Computes the columns of a strip from `from` on, as far as they fill whole V. Returns the first column that is left. */
// @ts-ignore: decorator
@inline
function strip<V>(
  out: usize, outStride: usize, base: usize, baseStride: usize, left: usize, leftRow: usize, leftStep: usize,
  right: usize, rightStep: usize, rank: i32, rows: i32, columns: i32, from: i32,
): i32 {
  const wide = <i32>(4 * bytes<V>() / 4), narrow = <i32>(bytes<V>() / 4);
  let j = from;
  while (j + narrow <= columns) {
    const at = <usize>j << 2;
    let o = out + at, b = base + at, l = left, i = 0;
    if (j + wide <= columns) {
      for (; i + 2 <= rows; i += 2) {
        tile<V>(o, outStride, b, baseStride, l, leftRow, leftStep, right + at, rightStep, rank);
        o += 2 * outStride;
        b += 2 * baseStride;
        l += 2 * leftRow;
      }
      if (i < rows) {
        for (let v: usize = 0; v < 4 * bytes<V>(); v += bytes<V>()) {
          dot<V>(o + v, b + v, l, leftStep, right + at + v, rightStep, rank);
        }
      }
      j += wide;
    } else {
      for (; i < rows; i++) {
        dot<V>(o, b, l, leftStep, right + at, rightStep, rank);
        o += outStride;
        b += baseStride;
        l += leftRow;
      }
      j += narrow;
    }
  }
  return j;
}

/**
 * out[i, j] = base[i, j] + Σ_k left[k, i]·right[k, j], for i < rows, j < columns, k < rank, all f32.
 * Strides are in bytes: `leftRow` from i to i + 1, `leftStep` from k to k + 1. `base` may be `out`.
 */
export function multiplyAdd(
  out: usize, outStride: usize, base: usize, baseStride: usize, left: usize, leftRow: usize, leftStep: usize,
  right: usize, rightStep: usize, rank: i32, rows: i32, columns: i32,
): void {
  for (let i = 0; i < rows; i += STRIP) {
    const n = min(STRIP, rows - i);
    let done = 0;
    if (ASC_FEATURE_SIMD) {
      done = strip<v128>(
        out, outStride, base, baseStride, left, leftRow, leftStep, right, rightStep, rank, n, columns, 0,
      );
    }
    strip<f32>(
      out, outStride, base, baseStride, left, leftRow, leftStep, right, rightStep, rank, n, columns, done,
    );
    out += STRIP * outStride;
    base += STRIP * baseStride;
    left += STRIP * leftRow;
  }
}

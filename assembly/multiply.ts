/**
 * The one matrix product behind expand, fold and scale: out = base + leftᵀ·right on f32 of any alignment and stride.
 *
 * A tile is 4 rows × 2 vectors: eight sums, two values of right and four of left fit the 15 vector registers that
 * engines leave on x86-64. k is innermost and the loop is not unrolled by hand: V8 keeps all loads of a loop body in
 * front of its arithmetic, and two steps' worth of them spills. Base is added last, so that a small update is summed at
 * its own magnitude.
 *
 * The rows of a tile lie a quarter of all rows apart, and tiles go right. So memory is four streams that go on from row
 * to row, which the machine fetches ahead of their use. Streams of neighbouring rows would end with each row, and
 * multiplications would wait for memory.
 */
import { decode, encode, f32x8BelowToF16, finiteF16x4Plus, highHalves } from "./convert";
import { accumulate, add, bytes, zero } from "./lanes";
import { F16, LEFT, MOST_RANK, PANEL } from "./layout";

/** Takes the lower four of eight halves, each into the high bits of a lane. */
@inline
function low(halves: v128): v128 {
  return v128.shuffle<i16>(i16x8.splat(0), halves, 0, 8, 1, 9, 2, 10, 3, 11);
}

/** Takes the higher four. */
@inline
function high(halves: v128): v128 {
  return v128.shuffle<i16>(i16x8.splat(0), halves, 4, 12, 5, 13, 6, 14, 7, 15);
}

/** Takes the larger magnitude of halves without signs, or of the high bits of f32. */
@inline
function larger(a: v128, b: v128): v128 {
  return i16x8.max_u(i16x8.shl(a, 1), i16x8.shl(b, 1));
}

/**
 * Adds sums to eight halves each of four rows. Returns false and stores nothing where one is not finite or reaches 2¹⁶.
 */
@inline
function putHalves(
  out: usize, base: usize, row1: usize, row2: usize, row3: usize,
  a0: v128, a1: v128, b0: v128, b1: v128, c0: v128, c1: v128, d0: v128, d1: v128,
): bool {
  const x = v128.load(base), y = v128.load(base + row1), z = v128.load(base + row2), w = v128.load(base + row3);
  // Signs are dropped: infinity is 0x7c00 among halves, and 2¹⁶ is 0x4780 in the high bits of an f32.
  const before = i16x8.max_u(larger(x, y), larger(z, w));
  a0 = finiteF16x4Plus(low(x), a0);
  a1 = finiteF16x4Plus(high(x), a1);
  b0 = finiteF16x4Plus(low(y), b0);
  b1 = finiteF16x4Plus(high(y), b1);
  c0 = finiteF16x4Plus(low(z), c0);
  c1 = finiteF16x4Plus(high(z), c1);
  d0 = finiteF16x4Plus(low(w), d0);
  d1 = finiteF16x4Plus(high(w), d1);
  const a = highHalves(a0, a1), b = highHalves(b0, b1), c = highHalves(c0, c1), d = highHalves(d0, d1);
  const after = i16x8.max_u(larger(a, b), larger(c, d));
  const large = v128.or(i16x8.ge_u(before, i16x8.splat(<i16>0xf800)), i16x8.ge_u(after, i16x8.splat(<i16>0x8f00)));
  if (v128.any_true(large)) return false;
  v128.store(out, f32x8BelowToF16(a0, a1, a));
  v128.store(out + row1, f32x8BelowToF16(b0, b1, b));
  v128.store(out + row2, f32x8BelowToF16(c0, c1, c));
  v128.store(out + row3, f32x8BelowToF16(d0, d1, d));
  return true;
}

/**
 * Computes a tile of f32 or, with T = u16, of halves; `LEFT` has its part of left. Returns false if `putHalves` does.
 * All rows are read before one is written, since two of them may be the same.
 */
@inline
function tile<V, T>(
  out: usize, base: usize, row1: usize, row2: usize, row3: usize, right: usize, rightStep: usize, rank: i32,
): bool {
  let a0 = zero<V>(), a1 = zero<V>(), b0 = zero<V>(), b1 = zero<V>();
  let c0 = zero<V>(), c1 = zero<V>(), d0 = zero<V>(), d1 = zero<V>();
  for (let left = LEFT, end = LEFT + (<usize>rank << 4); left != end; left += 16, right += rightStep) {
    let a: V, b: V, c: V, d: V;
    // Offsets have to be constants.
    if (isVector<V>()) {
      a = v128.load_splat<f32>(left);
      b = v128.load_splat<f32>(left, 4);
      c = v128.load_splat<f32>(left, 8);
      d = v128.load_splat<f32>(left, 12);
    } else {
      a = <V>load<f32>(left);
      b = <V>load<f32>(left, 4);
      c = <V>load<f32>(left, 8);
      d = <V>load<f32>(left, 12);
    }
    const r0 = load<V>(right), r1 = load<V>(right, bytes<V>());
    a0 = accumulate<V>(a0, a, r0);
    a1 = accumulate<V>(a1, a, r1);
    b0 = accumulate<V>(b0, b, r0);
    b1 = accumulate<V>(b1, b, r1);
    c0 = accumulate<V>(c0, c, r0);
    c1 = accumulate<V>(c1, c, r1);
    d0 = accumulate<V>(d0, d, r0);
    d1 = accumulate<V>(d1, d, r1);
  }
  if (isInteger<T>()) return putHalves(out, base, row1, row2, row3, a0, a1, b0, b1, c0, c1, d0, d1);
  a0 = add<V>(load<V>(base), a0);
  a1 = add<V>(load<V>(base, bytes<V>()), a1);
  b0 = add<V>(load<V>(base + row1), b0);
  b1 = add<V>(load<V>(base + row1, bytes<V>()), b1);
  c0 = add<V>(load<V>(base + row2), c0);
  c1 = add<V>(load<V>(base + row2, bytes<V>()), c1);
  d0 = add<V>(load<V>(base + row3), d0);
  d1 = add<V>(load<V>(base + row3, bytes<V>()), d1);
  store<V>(out, a0);
  store<V>(out, a1, bytes<V>());
  store<V>(out + row1, b0);
  store<V>(out + row1, b1, bytes<V>());
  store<V>(out + row2, c0);
  store<V>(out + row2, c1, bytes<V>());
  store<V>(out + row3, d0);
  store<V>(out + row3, d1, bytes<V>());
  return true;
}

/**
 * Copies four rows of left to `LEFT`. Where they are, their values lie so far apart that they would share few sets of a
 * cache.
 */
@inline
function gather(left: usize, left1: usize, left2: usize, left3: usize, leftStep: usize, rank: i32): void {
  for (let to = LEFT, end = LEFT + (<usize>rank << 4); to != end; to += 16, left += leftStep) {
    store<f32>(to, load<f32>(left));
    store<f32>(to, load<f32>(left + left1), 4);
    store<f32>(to, load<f32>(left + left2), 8);
    store<f32>(to, load<f32>(left + left3), 12);
  }
}

/** Computes a tile of halves through f32. */
function throughFloats(
  out: usize, base: usize, row1: usize, row2: usize, row3: usize, right: usize, rightStep: usize, rank: i32,
): void {
  decode(F16, base, 0, PANEL, 8);
  decode(F16, base + row1, 0, PANEL + 32, 8);
  decode(F16, base + row2, 0, PANEL + 64, 8);
  decode(F16, base + row3, 0, PANEL + 96, 8);
  // Copies `LEFT` to itself.
  multiplyAdd(PANEL, PANEL, 32, LEFT, 4, 16, right, rightStep, rank, 4, 8);
  encode(F16, PANEL, out, 8);
  encode(F16, PANEL + 32, out + row1, 8);
  encode(F16, PANEL + 64, out + row2, 8);
  encode(F16, PANEL + 96, out + row3, 8);
}

/** Computes whole tiles, of f32 or, with T = u16, of halves. Returns the first column that is left. */
@inline
function tiles<V, T>(
  out: usize, base: usize, stride: usize, left: usize, leftRow: usize, leftStep: usize, right: usize, rightStep: usize,
  rank: i32, rows: i32, columns: i32,
): i32 {
  const wide = <i32>(bytes<V>() / 2), whole = columns & ~(wide - 1), quarter = (rows + 3) >> 2;
  const outQuarter = quarter * stride, leftQuarter = quarter * leftRow;
  for (let i = 0; i < quarter; i++) {
    // Where a row is missing, the first is computed again.
    let row1: usize = 0, row2: usize = 0, row3: usize = 0, left1: usize = 0, left2: usize = 0, left3: usize = 0;
    if (i + quarter < rows) {
      row1 = outQuarter;
      left1 = leftQuarter;
    }
    if (i + 2 * quarter < rows) {
      row2 = 2 * outQuarter;
      left2 = 2 * leftQuarter;
    }
    if (i + 3 * quarter < rows) {
      row3 = 3 * outQuarter;
      left3 = 3 * leftQuarter;
    }
    gather(left, left1, left2, left3, leftStep, rank);
    let o = out, b = base, r = right;
    for (let j = 0; j < whole; j += wide) {
      const done = tile<V, T>(o, b, row1, row2, row3, r, rightStep, rank);
      if (isInteger<T>() && !done) throughFloats(o, b, row1, row2, row3, r, rightStep, rank);
      o += <usize>wide * sizeof<T>();
      b += <usize>wide * sizeof<T>();
      r += 2 * bytes<V>();
    }
    out += stride;
    base += stride;
    left += leftRow;
  }
  return whole;
}

/**
 * out[i, j] = base[i, j] + Σ_k left[k, i]·right[k, j], for i < rows, j < columns, k < rank, all f32. Sums of more than
 * MOST_RANK products are made in parts. Strides are in bytes: `stride` of out and base, `leftRow` from i to i + 1,
 * `leftStep` from k to k + 1. `base` may be `out`.
 */
export function multiplyAdd(
  out: usize, base: usize, stride: usize, left: usize, leftRow: usize, leftStep: usize, right: usize, rightStep: usize,
  rank: i32, rows: i32, columns: i32,
): void {
  // Zero is added where there are no products, since it changes -0.
  do {
    const part = min(rank, MOST_RANK);
    let j = ASC_FEATURE_SIMD
      ? tiles<v128, f32>(out, base, stride, left, leftRow, leftStep, right, rightStep, part, rows, columns)
      : tiles<f32, f32>(out, base, stride, left, leftRow, leftStep, right, rightStep, part, rows, columns);
    for (; j < columns; j++) {
      const at = <usize>j << 2;
      let o = out + at, b = base + at, l = left;
      for (let i = 0; i < rows; i++) {
        let sum: f32 = 0, x = l, y = right + at;
        for (let k = 0; k < part; k++, x += leftStep, y += rightStep) sum = accumulate<f32>(sum, load<f32>(x), load<f32>(y));
        store<f32>(o, load<f32>(b) + sum);
        o += stride;
        b += stride;
        l += leftRow;
      }
    }
    left += MOST_RANK * leftStep;
    right += MOST_RANK * rightStep;
    base = out;
    rank -= MOST_RANK;
  } while (rank > 0);
}

/**
 * Computes the same on halves, rounded once, by SIMD. Leaves the columns beside whole tiles, or all where sums have
 * parts. Returns the first column that is left.
 */
export function multiplyAddHalves(
  out: usize, base: usize, stride: usize, left: usize, leftStep: usize, right: usize, rightStep: usize, rank: i32,
  rows: i32, columns: i32,
): i32 {
  if (rank > MOST_RANK) return 0;
  return tiles<v128, u16>(out, base, stride, left, 4, leftStep, right, rightStep, rank, rows, columns);
}

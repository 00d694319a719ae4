/**
 * The products of extraction: X·Yᵀ of f64 rows, every dot product between them, in tiles of 2 × 4.
 *
 * Rows of Y are copied to a panel that stays in a first-level cache, four rows interleaved. Read in place, they would
 * come from memory again for every two rows of X, and at widths near a power of two they would evict each other from
 * the cache.
 */
import { dot, totalOfPair } from "./lanes";
import { PANEL } from "./layout";

/** Rows and columns of a panel, 16 KiB. */
@inline const ROWS: i32 = 16;
@inline const COLUMNS: usize = 128;

@inline
function addTo(at: usize, value: f64): void {
  store<f64>(at, load<f64>(at) + value);
}

/**
 * Sums 2 rows from `x` times 4 rows of the panel at `y`, two columns at a time; `length` bytes of each row, a multiple
 * of 16.
 */
function tilePairs(x: usize, stride: usize, y: usize, length: usize, out: usize, outStride: usize): void {
  let a0 = f64x2.splat(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (const end = x + length; x < end; x += 16, y += 64) {
    const a = v128.load(x), b = v128.load(x + stride);
    const c0 = v128.load(y), c1 = v128.load(y, 16), c2 = v128.load(y, 32), c3 = v128.load(y, 48);
    a0 = f64x2.add(a0, f64x2.mul(a, c0));
    a1 = f64x2.add(a1, f64x2.mul(a, c1));
    a2 = f64x2.add(a2, f64x2.mul(a, c2));
    a3 = f64x2.add(a3, f64x2.mul(a, c3));
    b0 = f64x2.add(b0, f64x2.mul(b, c0));
    b1 = f64x2.add(b1, f64x2.mul(b, c1));
    b2 = f64x2.add(b2, f64x2.mul(b, c2));
    b3 = f64x2.add(b3, f64x2.mul(b, c3));
  }
  addTo(out, totalOfPair(a0));
  addTo(out + 8, totalOfPair(a1));
  addTo(out + 16, totalOfPair(a2));
  addTo(out + 24, totalOfPair(a3));
  out += outStride;
  addTo(out, totalOfPair(b0));
  addTo(out + 8, totalOfPair(b1));
  addTo(out + 16, totalOfPair(b2));
  addTo(out + 24, totalOfPair(b3));
}

/** Copies `length` bytes each of `rows` rows to the panel, in fours. */
function fillPanel(y: usize, stride: usize, length: usize, rows: i32): void {
  let to = PANEL;
  for (; rows > 0; rows -= 4, y += 4 * stride) {
    for (let at: usize = 0; at < length; at += 16, to += 64) {
      v128.store(to, v128.load(y + at));
      v128.store(to, v128.load(y + stride + at), 16);
      v128.store(to, v128.load(y + 2 * stride + at), 32);
      v128.store(to, v128.load(y + 3 * stride + at), 48);
    }
  }
}

/** Copies rows that lie across: value k of row j is k·`step` + j. */
function fillAcross(y: usize, step: usize, length: usize, rows: i32): void {
  let to = PANEL;
  for (; rows > 0; rows -= 4, y += 32) {
    for (let at: usize = 0, p = y; at < length; at += 16, p += 2 * step, to += 64) {
      const a = v128.load(p), b = v128.load(p, 16), c = v128.load(p + step), d = v128.load(p + step, 16);
      v128.store(to, v128.shuffle<f64>(a, c, 0, 2));
      v128.store(to, v128.shuffle<f64>(a, c, 1, 3), 16);
      v128.store(to, v128.shuffle<f64>(b, d, 0, 2), 32);
      v128.store(to, v128.shuffle<f64>(b, d, 1, 3), 48);
    }
  }
}

/**
 * Adds one dot product: entries outside the tiles, and all entries in the scalar build. `step` bytes from value to
 * value of y.
 */
function addDot(x: usize, y: usize, step: usize, length: usize, out: usize): void {
  let sum: f64 = 0;
  if (step === 8) sum = dot(x, y, length);
  else for (let at: usize = 0; at < length; at += 8, y += step) sum += load<f64>(x + at) * load<f64>(y);
  addTo(out, sum);
}

/**
 * out[m, n] = X·Yᵀ for X [m, width] and Y [n, width], all f64; with `across` X·Y for Y [width, n]. With `lower`,
 * entries right of the diagonal are unspecified: half the work for a Gram matrix.
 */
export function products(x: usize, y: usize, m: i32, n: i32, width: i32, lower: bool, across: bool, out: usize): void {
  const stride = <usize>width << 3, outStride = <usize>n << 3;
  const yRow = across ? 8 : stride, yStep = across ? outStride : 8;
  memory.fill(out, 0, outStride * <usize>m);
  // The part that tiles cover; none in the scalar build.
  const rows = ASC_FEATURE_SIMD ? m & ~1 : 0, columns = n & ~3, pairs = stride & ~15;
  for (let block = 0; block < columns && rows > 0; block += ROWS) {
    const own = min(ROWS, columns - block);
    for (let from: usize = 0; from < pairs; from += COLUMNS << 3) {
      const length = min<usize>(COLUMNS << 3, pairs - from);
      if (ASC_FEATURE_SIMD) {
        if (across) fillAcross(y + (from >> 3) * outStride + (<usize>block << 3), outStride, length, own);
        else fillPanel(y + <usize>block * stride + from, stride, length, own);
      }
      for (let i = lower ? block & ~1 : 0; i < rows; i += 2) {
        const to = out + <usize>i * outStride + (<usize>block << 3);
        for (let j = 0, end = lower ? min(own, i + 2 - block) : own; j < end; j += 4) {
          if (ASC_FEATURE_SIMD) tilePairs(x + <usize>i * stride + from, stride, PANEL + <usize>j * length, length, to + (<usize>j << 3), outStride);
        }
      }
    }
  }
  for (let i = 0; i < m; i++) {
    for (let j = i < rows && pairs === stride ? columns : 0, end = lower ? i + 1 : n; j < end; j++) {
      const done = i < rows && j < columns ? pairs : 0;
      addDot(x + <usize>i * stride + done, y + <usize>j * yRow + (done >> 3) * yStep, yStep, stride - done, out + <usize>i * outStride + (<usize>j << 3));
    }
  }
}

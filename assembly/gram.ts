/**
 * The Gram matrix of extraction: G = X·Xᵀ of f32 rows, products and sums in f64. Half is computed, in tiles of 2 × 4
 * dot products, and mirrored.
 */
import { accumulateWide, loadWide, totalWide, zeroWide } from "./lanes";

// @ts-ignore: decorator
@inline
function addTo(at: usize, value: f64): void {
  store<f64>(at, load<f64>(at) + value);
}

/** Adds the dot products of 2 rows from `x` with 4 rows from `y` to `out`; `length` bytes of each row. */
function tile<V>(x: usize, y: usize, stride: usize, length: usize, out: usize, outStride: usize): void {
  const y1 = y + stride, y2 = y1 + stride, y3 = y2 + stride;
  let a0 = zeroWide<V>(), a1 = zeroWide<V>(), a2 = zeroWide<V>(), a3 = zeroWide<V>();
  let b0 = zeroWide<V>(), b1 = zeroWide<V>(), b2 = zeroWide<V>(), b3 = zeroWide<V>();
  for (let at: usize = 0; at < length; at += sizeof<V>() / 2) {
    const a = loadWide<V>(x + at), b = loadWide<V>(x + stride + at);
    const c0 = loadWide<V>(y + at), c1 = loadWide<V>(y1 + at), c2 = loadWide<V>(y2 + at), c3 = loadWide<V>(y3 + at);
    a0 = accumulateWide<V>(a0, a, c0);
    a1 = accumulateWide<V>(a1, a, c1);
    a2 = accumulateWide<V>(a2, a, c2);
    a3 = accumulateWide<V>(a3, a, c3);
    b0 = accumulateWide<V>(b0, b, c0);
    b1 = accumulateWide<V>(b1, b, c1);
    b2 = accumulateWide<V>(b2, b, c2);
    b3 = accumulateWide<V>(b3, b, c3);
  }
  addTo(out, totalWide<V>(a0));
  addTo(out + 8, totalWide<V>(a1));
  addTo(out + 16, totalWide<V>(a2));
  addTo(out + 24, totalWide<V>(a3));
  out += outStride;
  addTo(out, totalWide<V>(b0));
  addTo(out + 8, totalWide<V>(b1));
  addTo(out + 16, totalWide<V>(b2));
  addTo(out + 24, totalWide<V>(b3));
}

/** Adds one dot product, for the edges. */
function dot<V>(x: usize, y: usize, length: usize, out: usize): void {
  let sum = zeroWide<V>();
  for (let at: usize = 0; at < length; at += sizeof<V>() / 2) {
    sum = accumulateWide<V>(sum, loadWide<V>(x + at), loadWide<V>(y + at));
  }
  addTo(out, totalWide<V>(sum));
}

/** G[rows, rows] f64 = X·Xᵀ, X f32 [rows, width]. Both triangles are written. */
export function gram(x: usize, rows: i32, width: i32, out: usize): void {
  const stride = <usize>width << 2, outStride = <usize>rows << 3;
  const pairs: usize = ASC_FEATURE_SIMD ? stride & ~7 : 0;
  memory.fill(out, 0, outStride * <usize>rows);
  for (let i = 0; i < rows; i += 2) {
    for (let j = 0; j < min(i + 2, rows); j += 4) {
      const a = x + <usize>i * stride, b = x + <usize>j * stride, to = out + <usize>i * outStride + (<usize>j << 3);
      if (i + 2 <= rows && j + 4 <= rows) {
        if (ASC_FEATURE_SIMD) tile<v128>(a, b, stride, pairs, to, outStride);
        tile<f64>(a + pairs, b + pairs, stride, stride - pairs, to, outStride);
        continue;
      }
      for (let m: usize = 0; m < <usize>min(2, rows - i); m++) {
        for (let n: usize = 0; n < <usize>min(4, rows - j); n++) {
          const p = a + m * stride, q = b + n * stride, at = to + m * outStride + (n << 3);
          if (ASC_FEATURE_SIMD) dot<v128>(p, q, pairs, at);
          dot<f64>(p + pairs, q + pairs, stride - pairs, at);
        }
      }
    }
  }
  for (let i: usize = 0; i < <usize>rows; i++) {
    for (let j: usize = 0; j < i; j++) {
      store<f64>(out + j * outStride + (i << 3), load<f64>(out + i * outStride + (j << 3)));
    }
  }
}

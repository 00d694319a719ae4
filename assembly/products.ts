/**
 * The products of extraction: X·Yᵀ of f64 rows, every dot product between them, in tiles of 2 × 4.
 */

// @ts-ignore: decorator
@inline
function addTo(at: usize, value: f64): void {
  store<f64>(at, load<f64>(at) + value);
}

// @ts-ignore: decorator
@inline
function total(pair: v128): f64 {
  return f64x2.extract_lane(pair, 0) + f64x2.extract_lane(pair, 1);
}

/** Sums 2 rows from `x` times 4 rows from `y`, two columns at a time; `length` bytes of each row, a multiple of 16. */
function tilePairs(x: usize, y: usize, stride: usize, length: usize, out: usize, outStride: usize): void {
  const y1 = y + stride, y2 = y1 + stride, y3 = y2 + stride;
  let a0 = f64x2.splat(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (let at: usize = 0; at < length; at += 16) {
    const a = v128.load(x + at), b = v128.load(x + stride + at);
    const c0 = v128.load(y + at), c1 = v128.load(y1 + at), c2 = v128.load(y2 + at), c3 = v128.load(y3 + at);
    a0 = f64x2.add(a0, f64x2.mul(a, c0));
    a1 = f64x2.add(a1, f64x2.mul(a, c1));
    a2 = f64x2.add(a2, f64x2.mul(a, c2));
    a3 = f64x2.add(a3, f64x2.mul(a, c3));
    b0 = f64x2.add(b0, f64x2.mul(b, c0));
    b1 = f64x2.add(b1, f64x2.mul(b, c1));
    b2 = f64x2.add(b2, f64x2.mul(b, c2));
    b3 = f64x2.add(b3, f64x2.mul(b, c3));
  }
  addTo(out, total(a0));
  addTo(out + 8, total(a1));
  addTo(out + 16, total(a2));
  addTo(out + 24, total(a3));
  out += outStride;
  addTo(out, total(b0));
  addTo(out + 8, total(b1));
  addTo(out + 16, total(b2));
  addTo(out + 24, total(b3));
}

/** Adds one dot product: the edges, the odd last column, and everything in the scalar build. */
function dot(x: usize, y: usize, length: usize, out: usize): void {
  let s0: f64 = 0, s1: f64 = 0;
  let at: usize = 0;
  for (const end = length & ~15; at < end; at += 16) {
    s0 += load<f64>(x + at) * load<f64>(y + at);
    s1 += load<f64>(x + at, 8) * load<f64>(y + at, 8);
  }
  if (at < length) s0 += load<f64>(x + at) * load<f64>(y + at);
  addTo(out, s0 + s1);
}

/**
 * out[m, n] = X·Yᵀ for X [m, width] and Y [n, width], all f64. With `lower`, entries right of the diagonal are unspecified:
 * half the work for a Gram matrix.
 */
export function products(x: usize, y: usize, m: i32, n: i32, width: i32, lower: bool, out: usize): void {
  const stride = <usize>width << 3, outStride = <usize>n << 3;
  memory.fill(out, 0, outStride * <usize>m);
  for (let i = 0; i < m; i += 2) {
    const columns = lower ? min(i + 2, n) : n;
    for (let j = 0; j < columns; j += 4) {
      const a = x + <usize>i * stride, b = y + <usize>j * stride, to = out + <usize>i * outStride + (<usize>j << 3);
      let pairs: usize = 0;
      if (ASC_FEATURE_SIMD && i + 2 <= m && j + 4 <= n) {
        pairs = stride & ~15;
        tilePairs(a, b, stride, pairs, to, outStride);
        if (pairs === stride) continue;
      }
      for (let p: usize = 0; p < <usize>min(2, m - i); p++) {
        for (let q: usize = 0; q < <usize>min(4, n - j); q++) {
          dot(a + p * stride + pairs, b + q * stride + pairs, stride - pairs, to + p * outStride + (q << 3));
        }
      }
    }
  }
}

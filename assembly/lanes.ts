/**
 * Arithmetic on "one or four": every loop is written once over a type V that is f32 or v128 (f64 or v128 for sums in
 * double precision), and compiled for both. The SIMD builds run it on vectors and use the scalar form for the rest at
 * the edges. The three builds differ only in these functions and in the number conversions.
 */

/**
 * Which build this is: 0 scalar; 1 SIMD, which every engine has had since 2021; 2 relaxed SIMD, which fuses multiply
 * and add where the machine can.
 */
export const variant: i32 = ASC_FEATURE_RELAXED_SIMD ? 2 : ASC_FEATURE_SIMD ? 1 : 0;

/** Bytes of V. */
@inline
export function bytes<V>(): usize {
  return isVector<V>() ? 16 : sizeof<V>();
}

/** Loads the f32 at `at` into every lane. */
@inline
export function spread<V>(at: usize): V {
  if (isVector<V>()) return v128.load_splat<f32>(at);
  return <V>load<f32>(at);
}

@inline
export function zero<V>(): V {
  if (isVector<V>()) return f32x4.splat(0);
  return <V>0;
}

@inline
export function add<V>(a: V, b: V): V {
  if (isVector<V>()) return v128.add<f32>(a, b);
  return a + b;
}

@inline
export function multiply<V>(a: V, b: V): V {
  if (isVector<V>()) return v128.mul<f32>(a, b);
  return a * b;
}

/** The sum of the lanes. */
@inline
export function total<V>(a: V): f32 {
  if (isVector<V>()) {
    const pairs = v128.add<f32>(a, v128.shuffle<f32>(a, a, 2, 3, 0, 1));
    return f32x4.extract_lane(pairs, 0) + f32x4.extract_lane(pairs, 1);
  }
  return <f32>a;
}

/** sum + a·b, rounded after each step, or once where the relaxed build's machine fuses them. */
@inline
export function accumulate<V>(sum: V, a: V, b: V): V {
  if (isVector<V>()) {
    if (ASC_FEATURE_RELAXED_SIMD) return f32x4.relaxed_madd(a, b, sum);
    return v128.add<f32>(sum, v128.mul<f32>(a, b));
  }
  return sum + a * b;
}

/** The sum of both f64. */
@inline
export function totalOfPair(pair: v128): f64 {
  return f64x2.extract_lane(pair, 0) + f64x2.extract_lane(pair, 1);
}

/** Σ x·y over `length` bytes of f64, in several sums, so that additions need not wait for one another. */
export function dot(x: usize, y: usize, length: usize): f64 {
  let sum: f64 = 0;
  let at: usize = 0;
  if (ASC_FEATURE_SIMD) {
    let s0 = f64x2.splat(0), s1 = s0;
    for (; at + 32 <= length; at += 32) {
      s0 = f64x2.add(s0, f64x2.mul(v128.load(x + at), v128.load(y + at)));
      s1 = f64x2.add(s1, f64x2.mul(v128.load(x + at, 16), v128.load(y + at, 16)));
    }
    sum = totalOfPair(f64x2.add(s0, s1));
  } else {
    let s0: f64 = 0, s1: f64 = 0;
    for (; at + 16 <= length; at += 16) {
      s0 += load<f64>(x + at) * load<f64>(y + at);
      s1 += load<f64>(x + at, 8) * load<f64>(y + at, 8);
    }
    sum = s0 + s1;
  }
  for (; at < length; at += 8) sum += load<f64>(x + at) * load<f64>(y + at);
  return sum;
}

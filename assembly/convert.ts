/**
 * Converts number formats to f32 and back, bit for bit as `src/tensor/dtypes.ts`: rows of encoded tensors in, halves in
 * and out. WebAssembly has no half-precision arithmetic, so halves are converted with integer operations.
 */
import { accumulate } from "./lanes";
import { BF16, F16, F32, INT4, INT8 } from "./layout";

/** The f32 of a half. Scaling by 2¹¹² moves the exponent's bias and normalises subnormals exactly. */
export function f16ToF32(half: u32): f32 {
  const magnitude = half & 0x7fff;
  let bits = reinterpret<u32>(reinterpret<f32>(magnitude << 13) * reinterpret<f32>(0x77800000));
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  return reinterpret<f32>(bits | ((half & 0x8000) << 16));
}

/** The nearest half, ties to even. See `f32ToF16` in dtypes.ts for the subnormal case. */
function f32ToF16(value: f32): u32 {
  const bits = reinterpret<u32>(value);
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    return sign | (reinterpret<u32>(reinterpret<f32>(magnitude) + <f32>0.5) - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
}

/** The nearest bfloat16, ties to even. */
function f32ToBf16(value: f32): u32 {
  const bits = reinterpret<u32>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** Four halves in the low 16 bits of each lane to four f32. */
@inline
function f16x4ToF32(half: v128): v128 {
  const magnitude = v128.and(half, i32x4.splat(0x7fff));
  const scaled = f32x4.mul(i32x4.shl(magnitude, 13), i32x4.splat(0x77800000));
  const infinite = v128.and(i32x4.gt_s(magnitude, i32x4.splat(0x7bff)), i32x4.splat(0x7f800000));
  return v128.or(v128.or(scaled, infinite), i32x4.shl(v128.xor(half, magnitude), 16));
}

/**
 * Four f32 to four halves in the low 16 bits of each lane. Selections are the costly part, so overflow and infinity are
 * one minimum (2¹⁶ rounds to infinity by itself) and NaN is a bit set on top.
 */
@inline
function f32x4ToF16(value: v128): v128 {
  const absolute = v128.and(value, i32x4.splat(0x7fffffff));
  const magnitude = i32x4.min_s(absolute, i32x4.splat(0x47800000));
  const odd = v128.and(i32x4.shr_u(magnitude, 13), i32x4.splat(1));
  const normal = i32x4.shr_u(i32x4.add(i32x4.add(magnitude, i32x4.splat(0xfff - 0x38000000)), odd), 13);
  const subnormal = i32x4.sub(f32x4.add(magnitude, f32x4.splat(0.5)), i32x4.splat(0x3f000000));
  const half = v128.bitselect(normal, subnormal, i32x4.gt_s(magnitude, i32x4.splat(0x387fffff)));
  const nan = v128.and(f32x4.ne(value, value), i32x4.splat(0x200));
  return v128.or(v128.or(half, nan), i32x4.shr_u(v128.xor(value, absolute), 16));
}

/** Four f32 to four bfloat16 in the low 16 bits of each lane. */
@inline
function f32x4ToBf16(value: v128): v128 {
  const high = i32x4.shr_u(value, 16);
  const odd = v128.and(high, i32x4.splat(1));
  const rounded = i32x4.shr_u(i32x4.add(i32x4.add(value, i32x4.splat(0x7fff)), odd), 16);
  return v128.bitselect(rounded, v128.or(high, i32x4.splat(0x40)), f32x4.eq(value, value));
}

/** Copies `count` f32 of any alignment. A loop, because a call of memory.copy costs more than a short row. */
function copyF32(from: usize, to: usize, count: i32): void {
  let i = 0;
  if (ASC_FEATURE_SIMD) {
    for (; i + 4 <= count; i += 4, from += 16, to += 16) v128.store(to, v128.load(from));
  }
  for (; i < count; i++, from += 4, to += 4) store<f32>(to, load<f32>(from));
}

/**
 * Adds four halves, in the high bits of each lane, to `sums` if they are finite: a shift brings exponent and mantissa
 * to their places and leaves the sign in its own, and scaling is as in `f16ToF32`. It is exact, so nothing depends on
 * whether the machine rounds after it.
 */
@inline
export function finiteF16x4Plus(half: v128, sums: v128): v128 {
  const bits = v128.and(i32x4.shr_s(half, 3), i32x4.splat(0x8fffffff));
  return accumulate<v128>(sums, bits, i32x4.splat(0x77800000));
}

/** Takes exponents and signs of eight f32: the high 16 bits of each lane. */
@inline
export function highHalves(low: v128, high: v128): v128 {
  return v128.shuffle<i16>(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
}

/**
 * Converts eight f32 below 2¹⁶ to halves; `tops` are their high 16 bits. A power of two whose last place is that of the
 * half is added to each, so that the addition rounds and the sum's mantissa ends in the half's. The power's own low
 * bits, 0x3c00, make up for what its exponent adds.
 */
@inline
export function f32x8BelowToF16(low: v128, high: v128, tops: v128): v128 {
  const exponents = i16x8.max_s(v128.and(tops, i16x8.splat(0x7f80)), i16x8.splat(0x3880));
  const powers = i16x8.add(exponents, i16x8.splat(13 << 7));
  const ends = i16x8.splat(0x3c00), magnitude = i32x4.splat(0x7fffffff);
  const a = f32x4.add(v128.and(low, magnitude), v128.shuffle<i16>(ends, powers, 0, 8, 1, 9, 2, 10, 3, 11));
  const b = f32x4.add(v128.and(high, magnitude), v128.shuffle<i16>(ends, powers, 4, 12, 5, 13, 6, 14, 7, 15));
  const magnitudes = i16x8.add(v128.shuffle<i16>(a, b, 0, 2, 4, 6, 8, 10, 12, 14), i16x8.shl(exponents, 3));
  return v128.or(magnitudes, v128.and(tops, i16x8.splat(<i16>0x8000)));
}

/** Decodes `count` halves to f32. */
function decodeHalves(type: i32, from: usize, to: usize, count: i32): void {
  let i = 0;
  if (ASC_FEATURE_SIMD) {
    for (; i + 8 <= count; i += 8, from += 16, to += 32) {
      const low = v128.load_ext<u16>(from), high = v128.load_ext<u16>(from, 8);
      v128.store(to, type == F16 ? f16x4ToF32(low) : i32x4.shl(low, 16));
      v128.store(to, type == F16 ? f16x4ToF32(high) : i32x4.shl(high, 16), 16);
    }
  }
  for (; i < count; i++, from += 2, to += 4) {
    const half = <u32>load<u16>(from);
    store<f32>(to, type == F16 ? f16ToF32(half) : reinterpret<f32>(half << 16));
  }
}

/** Decodes `count` packed integers that begin at a whole byte: least significant bit first, two's complement. */
export function decodeIntegers(type: i32, from: usize, scale: f32, to: usize, count: i32): void {
  const bits = <i32>bitsOf(type);
  let i = 0;
  if (ASC_FEATURE_SIMD) {
    // Eight values are `bits` whole bytes. Multiplying by 2ⁿ shifts each lane by its own n, which SIMD shifts cannot.
    const scales = f32x4.splat(scale);
    for (; i + 8 <= count; i += 8, from += bits, to += 32) {
      let low: v128, high: v128;
      if (type == INT8) {
        const wide = v128.load_ext<i8>(from);
        low = i32x4.extend_low_i16x8_s(wide);
        high = i32x4.extend_high_i16x8_s(wide);
      } else if (type == INT4) {
        const word = v128.load_splat<u32>(from);
        low = i32x4.shr_s(i32x4.mul(word, i32x4(1 << 28, 1 << 24, 1 << 20, 1 << 16)), 28);
        high = i32x4.shr_s(i32x4.mul(word, i32x4(1 << 12, 1 << 8, 1 << 4, 1)), 28);
      } else {
        const word = i32x4.splat(<i32>load<u16>(from) | (<i32>load<u8>(from, 2) << 16));
        low = i32x4.shr_s(i32x4.mul(word, i32x4(1 << 29, 1 << 26, 1 << 23, 1 << 20)), 29);
        high = i32x4.shr_s(i32x4.mul(word, i32x4(1 << 17, 1 << 14, 1 << 11, 1 << 8)), 29);
      }
      v128.store(to, f32x4.mul(f32x4.convert_i32x4_s(low), scales));
      v128.store(to, f32x4.mul(f32x4.convert_i32x4_s(high), scales), 16);
    }
  }
  for (let bit: i32 = 0; i < count; i++, bit += bits, to += 4) {
    const at = from + <usize>(bit >> 3);
    const shift = bit & 7;
    let word = <i32>load<u8>(at);
    if (shift + bits > 8) word |= <i32>load<u8>(at, 1) << 8;
    store<f32>(to, scale * <f32>((word << (32 - bits - shift)) >> (32 - bits)));
  }
}

/** Bits of an integer. */
@inline
function bitsOf(type: i32): usize {
  return type == INT8 ? 8 : type == INT4 ? 4 : 3;
}

/** Bytes of `count` values of `type`, for counts whose bits fill whole bytes. */
@inline
export function packedBytes(type: i32, count: usize): usize {
  if (type == F32) return count << 2;
  return type <= BF16 ? count << 1 : (count * bitsOf(type)) >> 3;
}

/** Bytes of a whole row of `width` values, padded to a byte. */
export function rowBytes(type: i32, width: usize): usize {
  return type < INT8 ? packedBytes(type, width) : (width * bitsOf(type) + 7) >> 3;
}

/** Bytes of the f16 scales in front of `rows` rows. */
export function scaleBytes(type: i32, rows: usize): usize {
  return type >= INT8 ? (2 * rows + 3) & ~3 : 0;
}

/** Decodes `count` values of `type`; `scale` points at the row's f16 scale and is read for integers only. */
export function decode(type: i32, from: usize, scale: usize, to: usize, count: i32): void {
  if (type == F32) copyF32(from, to, count);
  else if (type <= BF16) decodeHalves(type, from, to, count);
  else decodeIntegers(type, from, f16ToF32(load<u16>(scale)), to, count);
}

/** Rounds `count` f32 to `type`, a float type. */
export function encode(type: i32, from: usize, to: usize, count: i32): void {
  if (type == F32) return copyF32(from, to, count);
  let i = 0;
  if (ASC_FEATURE_SIMD) {
    for (; i + 8 <= count; i += 8, from += 32, to += 16) {
      const low = v128.load(from), high = v128.load(from, 16);
      v128.store(
        to,
        type == F16
          ? i16x8.narrow_i32x4_u(f32x4ToF16(low), f32x4ToF16(high))
          : i16x8.narrow_i32x4_u(f32x4ToBf16(low), f32x4ToBf16(high)),
      );
    }
  }
  for (; i < count; i++, from += 4, to += 2) {
    const value = load<f32>(from);
    store<u16>(to, <u16>(type == F16 ? f32ToF16(value) : f32ToBf16(value)));
  }
}

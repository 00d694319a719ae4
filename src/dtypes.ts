/**
 * Number formats of weights and packs: f32, f16, bf16, and the packed integers int8, int4, int3 with one f16 scale per
 * row (SPEC.md, "Tensors"). This file is the plain-JS oracle: the WASM and WebGPU decoders are tested against it.
 * No I/O, no allocation beyond what is returned.
 */

/** Types that hold a weight by itself. */
export type FloatType = "f32" | "f16" | "bf16";
/** Types of packed rows: symmetric integers times the row's f16 scale. */
export type QuantizedType = "int8" | "int4" | "int3";
/** Every type a tensor of a pack may have. The order is the code in the file. */
export type TensorType = FloatType | QuantizedType;

/** File code of a type is its index here. */
export const TENSOR_TYPES: readonly TensorType[] = ["f32", "f16", "bf16", "int8", "int4", "int3"];

const BITS: Record<TensorType, number> = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, int3: 3 };

/** Largest integer a quantised type stores; the smallest is its negative, so that 0 is exact and the range symmetric. */
export const QUANTIZED_MAX: Record<QuantizedType, number> = { int8: 127, int4: 7, int3: 3 };

/** Whether rows of this type carry an f16 scale. */
export function isQuantized(type: TensorType): type is QuantizedType {
  return type === "int8" || type === "int4" || type === "int3";
}

/** Bytes of one row's values: `width` values of `type`, padded to a whole byte. */
export function rowBytes(type: TensorType, width: number): number {
  return Math.ceil((width * BITS[type]) / 8);
}

/** Bytes of the scales in front of the rows: f16 per row, padded to 4; 0 for float types. */
export function scaleBytes(type: TensorType, rows: number): number {
  return isQuantized(type) ? align4(2 * rows) : 0;
}

/** Bytes of an encoded tensor [rows, width], scales and final padding to 4 included. */
export function tensorBytes(type: TensorType, rows: number, width: number): number {
  return scaleBytes(type, rows) + align4(rows * rowBytes(type, width));
}

/** Least multiple of 4 that is ≥ n. */
export function align4(n: number): number {
  return Math.ceil(n / 4) * 4;
}

const word = new DataView(new ArrayBuffer(4));
const bits = new Uint32Array(1);
const float = new Float32Array(bits.buffer);

/** The f32 value of an IEEE half. Exact. */
export function f16ToF32(half: number): number {
  if ((half & 0x7c00) === 0x7c00) return half & 1023 ? NaN : half & 0x8000 ? -Infinity : Infinity;
  // The half's fields placed in an f32 give the value times 2⁻¹¹², for normal and subnormal halves alike.
  bits[0] = (half & 0x7fff) << 13;
  const magnitude = float[0]! * 2 ** 112;
  return half & 0x8000 ? -magnitude : magnitude;
}

/** The half nearest to an f32 value, ties to even; beyond 65519 infinity. NaN stays NaN. */
export function f32ToF16(value: number): number {
  word.setFloat32(0, value);
  const pattern = word.getUint32(0);
  const sign = (pattern >>> 16) & 0x8000;
  const magnitude = pattern & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Subnormal half, or zero: adding 0.5 moves the value's 2⁻²⁴ unit to the last place of an f32, which rounds it to even.
    word.setUint32(0, magnitude);
    word.setFloat32(0, word.getFloat32(0) + 0.5);
    return sign | (word.getUint32(0) - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
}

/** The f32 value of a bfloat16. Exact. */
export function bf16ToF32(half: number): number {
  word.setUint32(0, half << 16);
  return word.getFloat32(0);
}

/** The bfloat16 nearest to an f32 value, ties to even. NaN stays NaN. */
export function f32ToBf16(value: number): number {
  word.setFloat32(0, value);
  const pattern = word.getUint32(0);
  if ((pattern & 0x7fffffff) > 0x7f800000) return (pattern >>> 16) | 0x40;
  return (pattern + 0x7fff + ((pattern >>> 16) & 1)) >>> 16;
}

/**
 * Decodes an encoded tensor [rows, width] to f32, row-major.
 * @param bytes at least `tensorBytes(type, rows, width)` bytes, at any alignment
 */
export function decodeTensor(
  type: TensorType,
  bytes: Uint8Array,
  rows: number,
  width: number,
  out: Float32Array = new Float32Array(rows * width),
): Float32Array {
  const need = tensorBytes(type, rows, width);
  if (bytes.byteLength < need) {
    throw new RangeError(`decodeTensor: ${type} [${rows}, ${width}] needs ${need} bytes, got ${bytes.byteLength}`);
  }
  if (out.length < rows * width) {
    throw new RangeError(`decodeTensor: out holds ${out.length} values, ${rows * width} are needed`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const count = rows * width;
  if (type === "f32") {
    for (let i = 0; i < count; i++) out[i] = view.getFloat32(4 * i, true);
  } else if (type === "f16") {
    for (let i = 0; i < count; i++) out[i] = f16ToF32(view.getUint16(2 * i, true));
  } else if (type === "bf16") {
    for (let i = 0; i < count; i++) out[i] = bf16ToF32(view.getUint16(2 * i, true));
  } else {
    const start = scaleBytes(type, rows);
    const stride = rowBytes(type, width);
    for (let row = 0; row < rows; row++) {
      const scale = f16ToF32(view.getUint16(2 * row, true));
      for (let i = 0; i < width; i++) {
        out[row * width + i] = scale * quantizedAt(bytes, type, start + row * stride, i);
      }
    }
  }
  return out;
}

/** The `index`-th integer of the packed row that begins at `byteOffset`: two's complement, least significant bit first. */
export function quantizedAt(bytes: Uint8Array, type: QuantizedType, byteOffset: number, index: number): number {
  const bits = BITS[type];
  const bit = index * bits;
  const at = byteOffset + (bit >> 3);
  const pair = (bytes[at] ?? 0) | ((bytes[at + 1] ?? 0) << 8);
  return (pair << (32 - bits - (bit & 7))) >> (32 - bits);
}

/**
 * Encodes f32 values [rows, width] as a tensor of `type`. Quantised rows use scale = max|row| / QUANTIZED_MAX rounded up
 * to an f16, so that no value is clipped.
 * @throws RangeError when a value is not finite or does not fit the type
 */
export function encodeTensor(
  type: TensorType,
  values: ArrayLike<number>,
  rows: number,
  width: number,
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(tensorBytes(type, rows, width));
  const view = new DataView(bytes.buffer);
  const count = rows * width;
  for (let i = 0; i < count; i++) {
    if (!Number.isFinite(values[i])) throw new RangeError(`encodeTensor: value ${i} is ${values[i]}`);
  }
  if (isQuantized(type)) {
    const max = QUANTIZED_MAX[type];
    const start = scaleBytes(type, rows);
    const stride = rowBytes(type, width);
    const bits = BITS[type];
    for (let row = 0; row < rows; row++) {
      let peak = 0;
      for (let i = 0; i < width; i++) peak = Math.max(peak, Math.abs(values[row * width + i]!));
      const half = scaleToF16(peak / max);
      view.setUint16(2 * row, half, true);
      const scale = f16ToF32(half);
      if (scale === 0) continue;
      for (let i = 0; i < width; i++) {
        const q = Math.max(-max, Math.min(max, Math.round(values[row * width + i]! / scale)));
        const bit = i * bits;
        const at = start + row * stride + (bit >> 3);
        const field = (q & ((1 << bits) - 1)) << (bit & 7);
        bytes[at]! |= field;
        if (field > 255) bytes[at + 1]! |= field >> 8;
      }
    }
    return bytes;
  }
  for (let i = 0; i < count; i++) {
    const value = values[i]!;
    if (type === "f32") view.setFloat32(4 * i, value, true);
    else view.setUint16(2 * i, type === "f16" ? f32ToF16(value) : f32ToBf16(value), true);
    const fits = type === "f16" ? Math.abs(value) < 65520 : Number.isFinite(Math.fround(value));
    if (!fits) throw new RangeError(`encodeTensor: value ${i} is ${value}, too large for ${type}; use f32`);
  }
  return bytes;
}

function scaleToF16(scale: number): number {
  if (scale >= 65504) throw new RangeError(`encodeTensor: a row needs the scale ${scale}, too large for f16; use f32`);
  const half = f32ToF16(scale);
  return f16ToF32(half) < scale ? half + 1 : half;
}

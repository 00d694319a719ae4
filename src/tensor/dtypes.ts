/**
 * Number formats of weights and packs: f32, f16, bf16, and the packed integers int8, int4, int3 with one f16 scale per
 * row (SPEC.md, "Tensors"), on little-endian machines. This file is the plain-JS oracle: the WASM and WebGPU decoders
 * are tested against it. No I/O, no allocation beyond what is returned.
 */

/** Types that hold a weight by itself. */
export type FloatDtype = "f32" | "f16" | "bf16";
/** Types of packed rows: symmetric integers times the row's f16 scale. */
export type QuantizedDtype = "int8" | "int4" | "int3";
/** Every type a tensor of a pack may have. The order is the code in the file. */
export type Dtype = FloatDtype | QuantizedDtype;

/** Number formats of what a pack stores. */
export interface Dtypes {
  readonly basis: Dtype;
  readonly coefficients: Dtype;
  /** Saved modules; vectors of one dimension are stored as f16 where this is an integer type. */
  readonly head: Dtype;
}

/** Number formats of what a task stores: of coefficients and private terms, and of the head. */
export type TaskDtypes = Omit<Dtypes, "basis">;

/** File code of a type is its index here. */
export const DTYPES: readonly Dtype[] = ["f32", "f16", "bf16", "int8", "int4", "int3"];

/** Bits of one value. */
export const BITS: Record<Dtype, number> = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, int3: 3 };

/** True if rows of this type carry an f16 scale. */
export function isQuantized(type: Dtype): type is QuantizedDtype {
  return BITS[type] < 16;
}

/** Bytes of one row's values: `width` values of `type`, padded to a whole byte. */
export function rowBytes(type: Dtype, width: number): number {
  return Math.ceil((width * BITS[type]) / 8);
}

/** Bytes of the scales in front of the rows: f16 per row, padded to 4; 0 for float types. */
export function scaleBytes(type: Dtype, rows: number): number {
  return isQuantized(type) ? align4(2 * rows) : 0;
}

/** Bytes of an encoded tensor [rows, width], scales and final padding to 4 included. */
export function tensorBytes(type: Dtype, rows: number, width: number): number {
  return scaleBytes(type, rows) + align4(rows * rowBytes(type, width));
}

/** Number of elements of a tensor. */
export function elementsOf(shape: readonly number[]): number {
  let count = 1;
  for (const size of shape) count *= size;
  return count;
}

/** @param of a number of each value. Default: the value itself */
export function sum<T>(values: Iterable<T>, of: (value: T) => number = Number): number {
  let total = 0;
  for (const value of values) total += of(value);
  return total;
}

/** 0 without values. @param of as of `sum` */
export function mean<T>(values: ArrayLike<T> & Iterable<T>, of?: (value: T) => number): number {
  return sum(values, of) / (values.length || 1);
}

/** Least multiple of 4 that is ≥ n. */
export function align4(n: number): number {
  return Math.ceil(n / 4) * 4;
}

const word = new DataView(new ArrayBuffer(4));

/**
 * The f32 value of an IEEE half. Exact. Exponent and fraction moved to their places in an f32 make a number that is
 * 2¹¹² times too small, but for infinity and NaN.
 */
export function f16ToF32(half: number): number {
  const magnitude = half & 0x7fff;
  word.setUint32(0, ((half & 0x8000) << 16) | (magnitude << 13));
  const scaled = word.getFloat32(0) * 2 ** 112;
  if (magnitude < 0x7c00) return scaled;
  return magnitude === 0x7c00 ? scaled * Infinity : NaN;
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
    // Subnormal half, or zero: adding 0.5 moves the value's 2⁻²⁴ unit to the last place of an f32, which rounds it to
    // even.
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
  type: Dtype,
  bytes: Uint8Array,
  rows: number,
  width: number,
  out: Float32Array = new Float32Array(rows * width),
): Float32Array {
  const need = tensorBytes(type, rows, width);
  const count = rows * width;
  if (bytes.byteLength < need || out.length < count) {
    throw new RangeError(`${type} [${rows}, ${width}]: expected ${need} bytes, got ${bytes.byteLength}`);
  }
  if (isQuantized(type)) decodePart(type, bytes, rows, width, [0, rows, 0, width], out);
  else readFloats(type, bytes, 0, count, out);
  return out;
}

/** Decodes `count` floats that begin at the byte `start`, to `out` from `to` on. */
export function readFloats(
  type: Dtype,
  bytes: Uint8Array,
  start: number,
  count: number,
  out: Float32Array,
  to = 0,
): void {
  const at = bytes.byteOffset + start;
  const view = new DataView(bytes.buffer, at, bytes.byteLength - start);
  if (type === "f32") {
    const aligned = at % 4 ? new Uint8Array(bytes.subarray(start, start + 4 * count)) : undefined;
    out.set(aligned ? new Float32Array(aligned.buffer) : new Float32Array(bytes.buffer, at, count), to);
  } else if (type === "f16") for (let i = 0; i < count; i++) out[to + i] = f16ToF32(view.getUint16(2 * i, true));
  else for (let i = 0; i < count; i++) out[to + i] = bf16ToF32(view.getUint16(2 * i, true));
}

/**
 * Decodes a part of an encoded tensor [rows, width] to its places in all of it.
 * @param column a multiple of 8, where integers are whole bytes
 */
export function decodePart(
  type: Dtype,
  bytes: Uint8Array,
  rows: number,
  width: number,
  [row, height, column, columns]: readonly [row: number, rows: number, column: number, columns: number],
  out: Float32Array,
): void {
  // Whole rows of floats lie side by side.
  if (!isQuantized(type) && columns === width)
    return readFloats(type, bytes, row * rowBytes(type, width), height * width, out, row * width);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  // A small array costs more than the numbers of a small tensor.
  const integers = new Int8Array(isQuantized(type) ? columns : 0);
  for (let i = row; i < row + height; i++) {
    const start = scaleBytes(type, rows) + i * rowBytes(type, width) + rowBytes(type, column);
    const to = i * width + column;
    if (isQuantized(type)) {
      const scale = f16ToF32(view.getUint16(2 * i, true));
      unpackRow(type, bytes, start, integers);
      for (let c = 0; c < columns; c++) out[to + c] = scale * integers[c]!;
    } else readFloats(type, bytes, start, columns, out, to);
  }
}

/** Where rows are put: the value `column` of `row` at `at + row · down + column · along`. */
interface RowPlaces {
  readonly at: number;
  readonly down: number;
  readonly along: number;
}

/**
 * Decodes an encoded tensor [rows, width] to its places in a larger array, row-major or turned, times a factor: the
 * same numbers as of `decodeTensor`, multiplied afterwards.
 * @param bytes of the tensor
 */
export function placeTensor(
  type: Dtype,
  bytes: Uint8Array,
  rows: number,
  width: number,
  out: Float32Array,
  { at, down, along }: RowPlaces,
  factor = 1,
): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (!isQuantized(type)) {
    for (let row = 0, i = 0; row < rows; row++) {
      let o = at + row * down;
      const end = o + width * along;
      if (type === "f16") for (; o < end; o += along, i += 2) out[o] = f16ToF32(view.getUint16(i, true)) * factor;
      else if (type === "f32") for (; o < end; o += along, i += 4) out[o] = view.getFloat32(i, true) * factor;
      else for (; o < end; o += along, i += 2) out[o] = bf16ToF32(view.getUint16(i, true)) * factor;
    }
    return;
  }
  const integers = new Int8Array(width);
  for (let row = 0; row < rows; row++) {
    const scale = f16ToF32(view.getUint16(2 * row, true));
    unpackRow(type, bytes, scaleBytes(type, rows) + row * rowBytes(type, width), integers);
    for (let i = 0, o = at + row * down; i < width; i++, o += along)
      out[o] = Math.fround(scale * integers[i]!) * factor;
  }
}

/** The integers of a quantised tensor [rows, width], row-major. */
export function decodeIntegers(type: QuantizedDtype, bytes: Uint8Array, rows: number, width: number): Int8Array {
  const out = new Int8Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const start = scaleBytes(type, rows) + row * rowBytes(type, width);
    unpackRow(type, bytes, start, out.subarray(row * width, (row + 1) * width));
  }
  return out;
}

/** The scales of a quantised tensor's rows. */
export function decodeScales(bytes: Uint8Array, rows: number): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float32Array.from({ length: rows }, (_, row) => f16ToF32(view.getUint16(2 * row, true)));
}

/**
 * The integers of a packed row that begins at `start`. Each type has a loop of its own; `quantizedAt` takes four times
 * as long.
 */
export function unpackRow(type: QuantizedDtype, bytes: Uint8Array, start: number, out: Int8Array): void {
  const width = out.length;
  if (type === "int8") {
    for (let i = 0; i < width; i++) out[i] = bytes[start + i]!;
    return;
  }
  let i = 0;
  if (type === "int4") {
    for (let at = start; i < width - 1; i += 2, at++) {
      out[i] = (bytes[at]! << 28) >> 28;
      out[i + 1] = (bytes[at]! << 24) >> 28;
    }
  } else {
    for (let at = start; i < width - 7; at += 3) {
      const eight = bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16);
      for (let left = 29; left >= 8; left -= 3) out[i++] = (eight << left) >> 29;
    }
  }
  for (; i < width; i++) out[i] = quantizedAt(bytes, type, start, i);
}

/**
 * The `index`-th integer of the packed row that begins at `byteOffset`: two's complement, least significant bit first.
 */
export function quantizedAt(bytes: Uint8Array, type: QuantizedDtype, byteOffset: number, index: number): number {
  const bits = BITS[type];
  // Eight integers are whole bytes; bits of a long row are too many for 32.
  const bit = (index & 7) * bits;
  const at = byteOffset + (index >> 3) * bits + (bit >> 3);
  const pair = (bytes[at] ?? 0) | ((bytes[at + 1] ?? 0) << 8);
  return (pair << (32 - bits - (bit & 7))) >> (32 - bits);
}

/** Lowest and highest bits of the integers in three or four bytes, and how many bytes these are. */
const FIELDS = {
  int8: [0x01010101, 0x80808080, 4],
  int4: [0x11111111, 0x88888888, 4],
  int3: [0x249249, 0x924924, 3],
} as const;

/**
 * Index of the first integer of a packed row that is the least of its type, as no encoder writes it; `width` where
 * there is none.
 */
export function leastAt(bytes: Uint8Array, type: QuantizedDtype, start: number, width: number): number {
  const [lowest, highest, step] = FIELDS[type];
  const bits = BITS[type];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  // These bytes hold whole integers. The least has its highest bit alone.
  const end = start + rowBytes(type, width) - 3;
  let at = start;
  for (; at < end; at += step) {
    const fields = view.getInt32(at, true) ^ highest;
    // A field that has become 0 borrows when 1 is taken from it.
    if ((fields - lowest) & ~fields & highest) break;
  }
  let index = ((at - start) * 8) / bits;
  while (index < width && quantizedAt(bytes, type, start, index) !== -(2 ** (bits - 1))) index++;
  return Math.min(index, width);
}

/** Writes the `index`-th integer of the packed row that begins at `start`, where zeros stand. */
export function setInteger(bytes: Uint8Array, bits: number, start: number, index: number, value: number): void {
  const bit = (index & 7) * bits;
  const at = start + (index >> 3) * bits + (bit >> 3);
  const field = (value & ((1 << bits) - 1)) << (bit & 7);
  bytes[at]! |= field;
  if (field > 255) bytes[at + 1]! |= field >> 8;
}

/**
 * Encodes values as f32, f16 or bf16, rounded to nearest even: the values only, without a tensor's final padding.
 * @param out where to, aligned to 4 bytes. Default: new memory
 * @throws RangeError when a value is not finite or does not fit the type
 */
export function encodeFloats(
  type: FloatDtype,
  values: ArrayLike<number>,
  out?: Uint8Array<ArrayBuffer>,
): Uint8Array<ArrayBuffer> {
  const bytes = out ?? new Uint8Array(rowBytes(type, values.length));
  if (type === "f32") new Float32Array(bytes.buffer, bytes.byteOffset, values.length).set(values);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  // The least magnitudes that round to infinity.
  const most = type === "f16" ? 65520 : type === "bf16" ? 3.396e38 : 3.4028235e38;
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (!(Math.abs(value) < most)) {
      const why = Number.isFinite(value) ? `too large for ${type}` : "not a finite number";
      throw new RangeError(`value ${i} is ${value}, ${why}`);
    }
    if (type !== "f32") view.setUint16(2 * i, type === "f16" ? f32ToF16(value) : f32ToBf16(value), true);
  }
  return bytes;
}

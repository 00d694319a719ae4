/**
 * Number formats of weights and packs: f32, f16, bf16, and the packed integers int8, int4, int3 with one f16 scale per
 * row (SPEC.md, "Tensors"), on little-endian machines, as all that JavaScript engines run on today are. This file is the
 * plain-JS oracle: the WASM and WebGPU decoders are tested against it.
 * No I/O, no allocation beyond what is returned.
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

/** Whether rows of this type carry an f16 scale. */
export function isQuantized(type: Dtype): type is QuantizedDtype {
  return type === "int8" || type === "int4" || type === "int3";
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

/** Least multiple of 4 that is ≥ n. */
export function align4(n: number): number {
  return Math.ceil(n / 4) * 4;
}

const word = new DataView(new ArrayBuffer(4));

/**
 * The f32 value of an IEEE half. Exact. Exponent and fraction moved to their places in an f32 make a number that is 2¹¹² times too small,
 * but for infinity and NaN.
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
  type: Dtype,
  bytes: Uint8Array,
  rows: number,
  width: number,
  out: Float32Array = new Float32Array(rows * width),
): Float32Array {
  const need = tensorBytes(type, rows, width);
  const count = rows * width;
  if (bytes.byteLength < need || out.length < count) {
    const found = `got ${bytes.byteLength} for ${out.length} values`;
    throw new RangeError(`decodeTensor: ${type} [${rows}, ${width}] needs ${need} bytes, ${found}`);
  }
  if (type === "f32") {
    const aligned = bytes.byteOffset % 4 ? new Uint8Array(bytes) : bytes;
    out.set(new Float32Array(aligned.buffer, aligned.byteOffset, count));
  } else decodePart(type, bytes, rows, width, [0, rows, 0, width], out);
  return out;
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
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const integers = new Int8Array(columns);
  for (let i = row; i < row + height; i++) {
    const start = scaleBytes(type, rows) + i * rowBytes(type, width) + rowBytes(type, column);
    const to = i * width + column;
    if (isQuantized(type)) {
      const scale = f16ToF32(view.getUint16(2 * i, true));
      unpackRow(type, bytes, start, integers);
      for (let c = 0; c < columns; c++) out[to + c] = scale * integers[c]!;
    } else if (type === "f32") for (let c = 0; c < columns; c++) out[to + c] = view.getFloat32(start + 4 * c, true);
    else {
      const float = type === "f16" ? f16ToF32 : bf16ToF32;
      for (let c = 0; c < columns; c++) out[to + c] = float(view.getUint16(start + 2 * c, true));
    }
  }
}

/** Where rows are put: the value `column` of `row` at `at + row · down + column · along`. */
export interface RowPlaces {
  readonly at: number;
  readonly down: number;
  readonly along: number;
}

/**
 * Decodes an encoded tensor [rows, width] to its places in a larger array, row-major or turned, times a factor: the same numbers as of
 * `decodeTensor`, multiplied afterwards.
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
  if (!isQuantized(type)) {
    const values = decodeTensor(type, bytes, rows, width);
    for (let row = 0, i = 0; row < rows; row++)
      for (let o = at + row * down, end = o + width * along; o < end; o += along) out[o] = values[i++]! * factor;
    return;
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const integers = new Int8Array(width);
  for (let row = 0; row < rows; row++) {
    const scale = f16ToF32(view.getUint16(2 * row, true));
    unpackRow(type, bytes, scaleBytes(type, rows) + row * rowBytes(type, width), integers);
    for (let i = 0, o = at + row * down; i < width; i++, o += along)
      out[o] = Math.fround(scale * integers[i]!) * factor;
  }
}

/** The integers of a packed row that begins at `start`. Each type has a loop of its own; `quantizedAt` takes four times as long. */
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

/** The `index`-th integer of the packed row that begins at `byteOffset`: two's complement, least significant bit first. */
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

/** Index of the first integer of a packed row that is the least of its type, as no encoder writes it; `width` where there is none. */
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
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    // The least magnitudes that round to infinity.
    if (!(Math.abs(value) < (type === "f16" ? 65520 : type === "bf16" ? 3.396e38 : 3.4028235e38))) {
      const why = Number.isFinite(value) ? `too large for ${type}` : "not a finite number";
      throw new RangeError(`value ${i} is ${value}, ${why}`);
    }
    if (type !== "f32") view.setUint16(2 * i, type === "f16" ? f32ToF16(value) : f32ToBf16(value), true);
  }
  return bytes;
}

/** Largest integer a quantised type stores; the smallest is its negative, so that 0 is exact and the range symmetric. */
const LARGEST: Record<QuantizedDtype, number> = { int8: 127, int4: 7, int3: 3 };

/**
 * Says which of these f64 scales loses least of a row of values when it is rounded to integers of at most `largest`; the first of equals.
 * What is faster than the plain loop; it finds the same.
 */
export type FindScale = (values: Float64Array, scales: Float64Array, largest: number) => number;

/** A value that its number format cannot hold. */
export class UnstorableError extends RangeError {
  /** The adapter that it comes from; undefined when it comes from all together. */
  readonly owner: string | undefined;
  /** Whether a smaller value could be stored, and the message does not say what to do. */
  readonly tooLarge: boolean;

  constructor(message: string, cause: unknown, owner?: string, tooLarge: boolean = false) {
    super(message, { cause });
    this.owner = owner;
    this.tooLarge = tooLarge;
  }
}

/** What an error says, and what to do where a value is too large. */
export function advised(error: unknown, advice: string): string {
  const { message } = error as Error;
  return error instanceof UnstorableError && error.tooLarge ? `${message}; ${advice}` : message;
}

/** What helps where values have a limit in any number format (SPEC.md, section 5). */
export const SCALE_DOWN = "scale the adapter down";

/**
 * Says in the errors of `encode` what was to be stored.
 * @param owner the adapter that it belongs to, or a function that finds it
 * @throws UnstorableError
 */
export function storing<T>(
  what: string,
  owner: string | undefined | (() => string),
  encode: () => T,
  advice: string = SCALE_DOWN,
): T {
  try {
    return encode();
  } catch (cause) {
    if (!(cause instanceof UnstorableError)) throw cause;
    const whose = typeof owner === "function" ? owner() : owner;
    throw new UnstorableError(`${what} cannot be stored: ${advised(cause, advice)}`, cause, whose);
  }
}

/**
 * Encodes f32 values [rows, width] as a tensor of `type`. A quantised row has the scale, an f16, that loses least of its squares:
 * with few integers it pays to clip the largest values for finer steps of all others.
 * @param steps [rows]: wanted scales of rows as integers; coarser where a value would not fit. They become halves whose lower byte is
 *   0 (four of them lie between 1 and 2), since those take few bits where a section is coded
 * @param find in place of the plain loop
 * @param seen gets the values of a quantised tensor as its reader will see them
 * @throws UnstorableError when a value is not finite or does not fit the type
 */
export function encodeTensor(
  type: Dtype,
  values: ArrayLike<number>,
  rows: number,
  width: number,
  steps?: ArrayLike<number>,
  find: FindScale = findScale,
  seen?: Float64Array,
): Uint8Array<ArrayBuffer> {
  if (values.length !== rows * width) {
    throw new RangeError(`encodeTensor: ${values.length} values, expected ${rows} rows of ${width}`);
  }
  try {
    const bytes = new Uint8Array(tensorBytes(type, rows, width));
    return isQuantized(type)
      ? encodeIntegers(type, values, rows, width, bytes, steps ?? find, seen)
      : encodeFloats(type, values, bytes);
  } catch (cause) {
    const tooLarge = Array.prototype.every.call(values, Number.isFinite);
    throw new UnstorableError((cause as Error).message, cause, undefined, tooLarge);
  }
}

function encodeIntegers(
  type: QuantizedDtype,
  values: ArrayLike<number>,
  rows: number,
  width: number,
  bytes: Uint8Array<ArrayBuffer>,
  scales: ArrayLike<number> | FindScale,
  seen: Float64Array | undefined,
): Uint8Array<ArrayBuffer> {
  const view = new DataView(bytes.buffer);
  const largest = LARGEST[type];
  const bits = BITS[type];
  const coded = typeof scales !== "function";
  for (let row = 0; row < rows; row++) {
    let peak = 0;
    for (let i = 0; i < width; i++) {
      const value = Math.abs(values[row * width + i]!);
      if (!Number.isFinite(value))
        throw new RangeError(`value ${row * width + i} is ${values[row * width + i]}, not a finite number`);
      peak = Math.max(peak, value);
    }
    const half =
      typeof scales === "function"
        ? bestScale(values, row * width, width, peak, largest, scales)
        : stepToF16(scales[row]!, peak / largest);
    view.setUint16(2 * row, half, true);
    const scale = f16ToF32(half);
    if (scale === 0) continue;
    const start = scaleBytes(type, rows) + row * rowBytes(type, width);
    for (let i = 0; i < width; i++) {
      const value = values[row * width + i]! / scale;
      const integer = coded ? toInteger(value, largest) : nearest(value, largest);
      if (bits === 8) bytes[start + i] = integer;
      else setInteger(bytes, bits, start, i, integer);
      if (seen) seen[row * width + i] = Math.fround(scale * integer);
    }
  }
  return bytes;
}

/**
 * Fraction from which a number is rounded away from zero, where integers are entropy-coded: a little above one half, since small
 * integers take fewer bits.
 */
const UPWARDS = 0.42;

/** The integer of a number in steps. @param largest in magnitude */
export function toInteger(value: number, largest: number): number {
  const size = Math.min(largest, Math.floor(Math.abs(value) + UPWARDS));
  return value < 0 ? -size : size;
}

function nearest(value: number, largest: number): number {
  return Math.max(-largest, Math.min(largest, Math.round(value)));
}

/** How many scales are tried between `LEAST_SCALE` and 1 of the one that clips nothing. */
const SCALES = 24;
const LEAST_SCALE = 0.4;

/** The f16 scale of a row with the least squared error. */
function bestScale(
  values: ArrayLike<number>,
  start: number,
  width: number,
  peak: number,
  largest: number,
  find: FindScale,
): number {
  const whole = scaleToF16(peak / largest);
  // Clipping the largest value never pays with 127 steps.
  if (largest > 7) return whole;
  const halves: number[] = [];
  for (let i = 0; i <= SCALES; i++) {
    const half = scaleToF16((peak / largest) * (1 - ((1 - LEAST_SCALE) * i) / SCALES));
    if (f16ToF32(half) === 0) break;
    halves.push(half);
  }
  if (halves.length === 0) return whole;
  const row = values instanceof Float64Array ? values.subarray(start, start + width) : rowOf(values, start, width);
  return halves[find(row, Float64Array.from(halves, f16ToF32), largest)]!;
}

function rowOf(values: ArrayLike<number>, start: number, width: number): Float64Array {
  const row = new Float64Array(width);
  for (let i = 0; i < width; i++) row[i] = values[start + i]!;
  return row;
}

const findScale: FindScale = (values, scales, largest) => {
  let [best, least] = [0, Infinity];
  for (let i = 0; i < scales.length; i++) {
    const scale = scales[i]!;
    let lost = 0;
    for (let j = 0; j < values.length && lost < least; j++) {
      const rest = values[j]! - scale * nearest(values[j]! / scale, largest);
      lost += rest * rest;
    }
    if (lost < least) [best, least] = [i, lost];
  }
  return best;
};

/** @param least what the largest value needs */
function stepToF16(step: number, least: number): number {
  if (least === 0) return 0;
  const wanted = f32ToF16(Math.min(step, 32768));
  // One that was stored before stays.
  const rounded = f16ToF32(wanted) === step ? wanted : (wanted + 0x80) & 0xff00;
  const half = rounded > 0x100 ? rounded : Math.max(wanted, 1);
  return f16ToF32(half) * 1.0000001 < least ? (scaleToF16(least) + 0xff) & 0xff00 : half;
}

function scaleToF16(scale: number): number {
  if (scale >= 65504) throw new RangeError(`a row needs the scale ${scale}, too large for f16`);
  const half = f32ToF16(scale);
  return f16ToF32(half) < scale ? half + 1 : half;
}

/** Clipping may add this share to what rounding loses, for fewer bits in memory. */
const CLIPPED = 0.02;

/**
 * Values [rows, width] by steps [rows], as of `encodeTensor`, in the smallest type of integers that hardly clips them.
 * @throws UnstorableError
 */
export function encodeSteps(
  values: ArrayLike<number>,
  rows: number,
  width: number,
  wanted: ArrayLike<number>,
): { dtype: QuantizedDtype; encoded: Uint8Array<ArrayBuffer> } {
  const steps = Float64Array.from(wanted, (step) => f16ToF32(stepToF16(step, Number.MIN_VALUE)));
  const dtype = (["int3", "int4"] as const).find((type) => {
    let [clipped, total] = [0, 0];
    for (let row = 0; row < rows; row++) {
      const most = (LARGEST[type] + 0.5) * steps[row]!;
      for (let i = row * width; i < (row + 1) * width; i++) {
        clipped += Math.max(0, Math.abs(values[i]!) - most) ** 2;
        total += Math.min(Math.abs(values[i]!), steps[row]! / 2) ** 2 / 3;
      }
    }
    return clipped <= CLIPPED * total;
  });
  if (dtype === undefined) return { dtype: "int8", encoded: encodeTensor("int8", values, rows, width, steps) };
  return { dtype, encoded: clippedTensor(dtype, values, rows, width, steps) };
}

function clippedTensor(
  dtype: QuantizedDtype,
  values: ArrayLike<number>,
  rows: number,
  width: number,
  steps: ArrayLike<number>,
): Uint8Array<ArrayBuffer> {
  const clipped = Float64Array.from(values, (value, i) => {
    const most = LARGEST[dtype] * steps[Math.floor(i / width)]!;
    return Math.max(-most, Math.min(most, value));
  });
  return encodeTensor(dtype, clipped, rows, width, steps);
}

/** Integers [rows, width] as they are stored. */
interface Integers {
  readonly rows: number;
  readonly width: number;
  readonly dtype: QuantizedDtype;
  readonly encoded: Uint8Array;
}

/** The same integers in the smallest type that all of these tensors fit. */
export function narrowed(tensors: readonly Integers[]): { dtype: QuantizedDtype; encoded: Uint8Array[] } {
  const integers = tensors.map(({ dtype, encoded, rows, width }) => decodeIntegers(dtype, encoded, rows, width));
  let peak = 0;
  for (const all of integers) for (let i = 0; i < all.length; i++) peak = Math.max(peak, Math.abs(all[i]!));
  const dtype = (["int3", "int4", "int8"] as const).find((type) => peak <= LARGEST[type])!;
  const encoded = tensors.map(({ rows, width, dtype: given, encoded: from }, i) => {
    if (given === dtype) return from;
    const bytes = new Uint8Array(tensorBytes(dtype, rows, width));
    bytes.set(from.subarray(0, 2 * rows));
    const start = scaleBytes(dtype, rows);
    for (let row = 0; row < rows; row++)
      for (let k = 0; k < width; k++)
        setInteger(bytes, BITS[dtype], start + row * rowBytes(dtype, width), k, integers[i]![row * width + k]!);
    return bytes;
  });
  return { dtype, encoded };
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

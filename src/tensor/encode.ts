/**
 * Writes encoded tensors (SPEC.md, section 5). They are read in `dtypes.ts`: apps that switch or learn on a session do
 * without this file.
 */
import {
  BITS,
  type Dtype,
  decodeIntegers,
  encodeFloats,
  f16ToF32,
  f32ToF16,
  isQuantized,
  type QuantizedDtype,
  rowBytes,
  scaleBytes,
  setInteger,
  tensorBytes,
} from "./dtypes.ts";

/**
 * Largest integer a quantised type stores; the smallest is its negative, so that 0 is exact and the range symmetric.
 */
const LARGEST: Record<QuantizedDtype, number> = { int8: 127, int4: 7, int3: 3 };

/**
 * Says which of these f64 scales loses least of a row of values when it is rounded to integers of at most `largest`;
 * the first of equals. What is faster than the plain loop; it finds the same.
 */
export type FindScale = (values: Float64Array, scales: Float64Array, largest: number) => number;

/** A value that its number format cannot hold. */
export class UnstorableError extends RangeError {
  /** The adapter that it comes from; undefined when it comes from all together. */
  readonly owner: string | undefined;
  /** True if a smaller value could be stored, and the message does not say what to do. */
  readonly tooLarge: boolean;

  constructor(message: string, cause: unknown, owner?: string, tooLarge: boolean = false) {
    super(message, { cause });
    this.owner = owner;
    this.tooLarge = tooLarge;
  }
}

/** Advice for a value that is too large. */
export function advised(error: unknown, advice: string): string {
  const { message } = error as Error;
  return error instanceof UnstorableError && error.tooLarge ? `${message}; ${advice}` : message;
}

/** Advice for values that have a limit in any number format (SPEC.md, section 5). */
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
 * Encodes f32 values [rows, width] as a tensor of `type`. A quantised row has the scale, an f16, that loses least of
 * its squares: with few integers it pays to clip the largest values for finer steps of all others.
 * @param steps [rows]: wanted scales of rows as integers; coarser where a value would not fit. They become halves whose
 *   lower byte is 0 (four of them lie between 1 and 2), since those take few bits where a section is coded
 * @param find in place of the plain loop
 * @param seen gets the values of a quantised tensor as its reader will see them
 * @throws UnstorableError when a value is not finite or does not fit the type
 */
export function encodeTensor(
  type: Dtype,
  values: Float32Array | Float64Array,
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
  values: Float32Array | Float64Array,
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
 * Fraction from which a number is rounded away from zero, where integers are entropy-coded: a little above one half,
 * since small integers take fewer bits.
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

/** Number of scales tried between `LEAST_SCALE` and 1 of the one that clips nothing. */
const SCALES = 24;
const LEAST_SCALE = 0.4;

/** The f16 scale of a row with the least squared error. */
function bestScale(
  values: Float32Array | Float64Array,
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
  const row = new Float64Array(values.subarray(start, start + width));
  return halves[find(row, Float64Array.from(halves, f16ToF32), largest)]!;
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
  values: Float32Array | Float64Array,
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
  const clipped = Float64Array.from(values, (value, i) => {
    const most = LARGEST[dtype] * steps[Math.floor(i / width)]!;
    return Math.max(-most, Math.min(most, value));
  });
  return { dtype, encoded: encodeTensor(dtype, clipped, rows, width, steps) };
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

/**
 * Writes encoded tensors (SPEC.md, section 5). The reading half is `dtypes.ts`; a run-time bundle does without this one.
 */
import {
  BITS,
  type Dtype,
  encodeFloats,
  f16ToF32,
  f32ToF16,
  isQuantized,
  type QuantizedDtype,
  rowBytes,
  scaleBytes,
  tensorBytes,
} from "./dtypes.ts";

/** Largest integer a quantised type stores; the smallest is its negative, so that 0 is exact and the range symmetric. */
const LARGEST: Record<QuantizedDtype, number> = { int8: 127, int4: 7, int3: 3 };

/** A value that its number format cannot hold. */
export class UnstorableError extends RangeError {
  /** Of which adapter's it is; undefined when of all together. */
  readonly owner: string | undefined;

  constructor(message: string, cause: unknown, owner?: string) {
    super(message, { cause });
    this.owner = owner;
  }
}

/**
 * Says in the errors of `encode` what was to be stored.
 * @throws UnstorableError
 */
export function storing<T>(what: string, owner: string | undefined, encode: () => T): T {
  try {
    return encode();
  } catch (cause) {
    if (!(cause instanceof UnstorableError)) throw cause;
    throw new UnstorableError(`${what} cannot be stored: ${cause.message}`, cause, owner);
  }
}

/**
 * Encodes f32 values [rows, width] as a tensor of `type`. A quantised row has the scale, an f16, that loses least of its squares:
 * with few integers it pays to clip the largest values for finer steps of all others.
 * @throws UnstorableError when a value is not finite or does not fit the type
 */
export function encodeTensor(
  type: Dtype,
  values: ArrayLike<number>,
  rows: number,
  width: number,
): Uint8Array<ArrayBuffer> {
  if (values.length !== rows * width) {
    throw new RangeError(`encodeTensor: ${values.length} values, expected ${rows} rows of ${width}`);
  }
  try {
    const bytes = new Uint8Array(tensorBytes(type, rows, width));
    return isQuantized(type) ? encodeIntegers(type, values, rows, width, bytes) : encodeFloats(type, values, bytes);
  } catch (cause) {
    throw new UnstorableError((cause as Error).message, cause);
  }
}

function encodeIntegers(
  type: QuantizedDtype,
  values: ArrayLike<number>,
  rows: number,
  width: number,
  bytes: Uint8Array<ArrayBuffer>,
): Uint8Array<ArrayBuffer> {
  const view = new DataView(bytes.buffer);
  const largest = LARGEST[type];
  const bits = BITS[type];
  for (let row = 0; row < rows; row++) {
    let peak = 0;
    for (let i = 0; i < width; i++) {
      const value = Math.abs(values[row * width + i]!);
      if (!Number.isFinite(value))
        throw new RangeError(`value ${row * width + i} is ${values[row * width + i]}, not a finite number`);
      peak = Math.max(peak, value);
    }
    const half = bestScale(values, row * width, width, peak, largest);
    view.setUint16(2 * row, half, true);
    const scale = f16ToF32(half);
    if (scale === 0) continue;
    const start = scaleBytes(type, rows) + row * rowBytes(type, width);
    for (let i = 0; i < width; i++) {
      const q = nearest(values[row * width + i]! / scale, largest);
      const bit = i * bits;
      const field = (q & ((1 << bits) - 1)) << (bit & 7);
      bytes[start + (bit >> 3)]! |= field;
      if (field > 255) bytes[start + (bit >> 3) + 1]! |= field >> 8;
    }
  }
  return bytes;
}

function nearest(value: number, largest: number): number {
  return Math.max(-largest, Math.min(largest, Math.round(value)));
}

/** How many scales are tried between `LEAST_SCALE` and 1 of the one that clips nothing. */
const SCALES = 24;
const LEAST_SCALE = 0.4;

/** The f16 scale of a row with the least squared error. */
function bestScale(values: ArrayLike<number>, start: number, width: number, peak: number, largest: number): number {
  let best = scaleToF16(peak / largest);
  // Of 127 steps the largest value is worth the first.
  if (largest > 7) return best;
  let least = Infinity;
  for (let i = 0; i <= SCALES; i++) {
    const half = scaleToF16((peak / largest) * (1 - ((1 - LEAST_SCALE) * i) / SCALES));
    const scale = f16ToF32(half);
    if (scale === 0) break;
    let lost = 0;
    for (let j = start; j < start + width && lost < least; j++)
      lost += (values[j]! - scale * nearest(values[j]! / scale, largest)) ** 2;
    if (lost < least) [best, least] = [half, lost];
  }
  return best;
}

function scaleToF16(scale: number): number {
  if (scale >= 65504) throw new RangeError(`a row needs the scale ${scale}, too large for f16; use f32`);
  const half = f32ToF16(scale);
  return f16ToF32(half) < scale ? half + 1 : half;
}

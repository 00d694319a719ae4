/**
 * The writing half of coded sections (`coded.ts`).
 */
import { isQuantized } from "../tensor/dtypes.ts";
import { CODED_HEAD_BYTES, type Coder, code, LEAST_COPY, mostDecoded, type Plan, type TensorRun } from "./coded.ts";
import { FREQUENCY_BITS, SYMBOLS, Tables, WORD_BITS } from "./coded-tables.ts";
import { CODED_MAGIC, type TensorRef } from "./format.ts";

/** How far back copies are looked for, and at how many places. */
const WINDOW_BYTES = 1 << 16;
const MOST_TRIES = 64;
const HASH_BITS = 14;
/** What a copy from as far back as the one before saves, in bytes. */
const AGAIN = 2;

/**
 * A section, coded.
 * @param tensors of it, in order
 * @param step each tensor begins at a multiple of it
 * @param before as `decodeSection` takes it
 * @returns undefined where that takes no fewer bytes
 */
export function encodeSection(
  section: Uint8Array,
  tensors: readonly TensorRef[],
  step: TensorRun["step"],
  before: Uint8Array = new Uint8Array(),
): Uint8Array<ArrayBuffer> | undefined {
  const encoder = new Encoder(section.length);
  // What is coded is read from the section, and written to it again as it is.
  code(encoder, section, () => {}, before, { runs: runsOf(tensors, step), copyAt: copies(before, section) });
  const bytes = encoder.finish(section.length);
  return bytes.length < section.length && section.length <= mostDecoded(bytes.length) ? bytes : undefined;
}

/** Neighbours of one shape and type, together. */
function runsOf(tensors: readonly TensorRef[], step: TensorRun["step"]): TensorRun[] {
  const runs: TensorRun[] = [];
  let end = -1;
  for (const { dtype, rows, width, byteOffset, byteLength } of tensors) {
    if (!isQuantized(dtype) || rows === 0) continue;
    const last = runs.at(-1);
    const next = Math.ceil(end / step) * step === byteOffset;
    if (last && next && last.dtype === dtype && last.rows === rows && last.width === width)
      runs[runs.length - 1] = { ...last, count: last.count + 1 };
    else runs.push({ dtype, rows, width, count: 1, step, byteOffset });
    end = byteOffset + byteLength;
  }
  return runs;
}

/** Finds the longest copies at the last places that begin with the same bytes. Asked of ascending places. */
function copies(before: Uint8Array, section: Uint8Array): Plan["copyAt"] {
  // Places count from the beginning of what is before.
  const byteAt = (at: number): number => (at < before.length ? before[at]! : section[at - before.length]!);
  const hash = (at: number): number => {
    const four = byteAt(at) | (byteAt(at + 1) << 8) | (byteAt(at + 2) << 16) | (byteAt(at + 3) << 24);
    return Math.imul(four, 0x9e3779b1) >>> (32 - HASH_BITS);
  };
  const lengthOf = (distance: number, at: number, end: number): number => {
    let length = 0;
    while (at + length < end && byteAt(at + length - distance) === byteAt(at + length)) length++;
    return length < LEAST_COPY ? 0 : length;
  };
  /** The last place with a hash, and the one before each. */
  const last = new Int32Array(1 << HASH_BITS).fill(-1);
  const earlier = new Int32Array(WINDOW_BYTES);
  let known = 0;
  let again = 0;
  return (place, stop) => {
    const [at, end] = [before.length + place, before.length + stop];
    if (at + LEAST_COPY > end) return undefined;
    for (; known < at; known++) {
      const key = hash(known);
      earlier[known % WINDOW_BYTES] = last[key]!;
      last[key] = known;
    }
    let [length, distance] = [again && lengthOf(again, at, end), again];
    let from = last[hash(at)]!;
    for (let tries = 0; tries < MOST_TRIES && from >= 0 && at - from < WINDOW_BYTES; tries++) {
      const found = lengthOf(at - from, at, end);
      if (found > length + (distance === again && length > 0 ? AGAIN : 0)) [length, distance] = [found, at - from];
      from = earlier[from % WINDOW_BYTES]!;
    }
    if (length > 0) again = distance;
    return length > 0 ? { length, distance } : undefined;
  };
}

/** Notes of a block, in powers of 2: at most 32 MB, which allocators give back to the system as soon as they are free. */
const LEAST_BLOCK = 10;
const MOST_BLOCK = 23;

/** Notes what is coded; rANS codes it from the last to the first, so that a decoder reads it from the first on. */
export class Encoder implements Coder {
  readonly #tables = new Tables();
  /** In blocks, the start and above it the frequency of each symbol; of bits their value, and how many they are as a negative number. */
  readonly #notes: Int32Array[] = [];
  readonly #block: number;
  #count = 0;

  /** @param size of the section, about. Default: small */
  constructor(size: number = 0) {
    this.#block = 2 ** Math.min(MOST_BLOCK, Math.max(LEAST_BLOCK, Math.ceil(Math.log2(2 * size + 1))));
  }

  symbol(table: number, symbol: number): number {
    const at = table * (SYMBOLS + 1) + symbol;
    const { sums } = this.#tables;
    this.#note(sums[at]!, sums[at + 1]! - sums[at]!);
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number, value: number): number {
    const low = value & (2 ** count - 1);
    this.#note(low, -count);
    return low;
  }

  #note(start: number, width: number): void {
    const at = this.#count++ & (this.#block - 1);
    if (at === 0) this.#notes.push(new Int32Array(this.#block));
    this.#notes[this.#notes.length - 1]![at] = (width << WORD_BITS) | start;
  }

  /** @param size of the section */
  finish(size: number): Uint8Array<ArrayBuffer> {
    let words = new Uint16Array(1 << 12);
    let count = 0;
    // An unsigned number of 32 bits.
    let state = 2 ** WORD_BITS;
    const word = (): void => {
      if (count === words.length) {
        const longer = new Uint16Array(2 * count);
        longer.set(words);
        words = longer;
      }
      words[count++] = state;
      state >>>= WORD_BITS;
    };
    for (let i = this.#count - 1; i >= 0; i--) {
      const note = this.#notes[Math.floor(i / this.#block)]![i & (this.#block - 1)]!;
      const [start, width] = [note & 0xffff, note >> WORD_BITS];
      if (width <= 0) {
        if (width < 0 && state >>> (32 + width) > 0) word();
        state = ((state << -width) | start) >>> 0;
      } else {
        if (state >>> (2 * WORD_BITS - FREQUENCY_BITS) >= width) word();
        const whole = (state / width) >>> 0;
        state = ((whole << FREQUENCY_BITS) >>> 0) + (state - whole * width) + start;
      }
    }
    word();
    word();
    const bytes = new Uint8Array(CODED_HEAD_BYTES + 2 * count);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, CODED_MAGIC, true);
    view.setUint32(4, size, true);
    for (let i = 0; i < count; i++) view.setUint16(CODED_HEAD_BYTES + 2 * i, words[count - 1 - i]!, true);
    return bytes;
  }
}

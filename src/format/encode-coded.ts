/**
 * The writing half of coded sections (`coded.ts`).
 */
import { isQuantized } from "../tensor/dtypes.ts";
import {
  CODED_HEAD_BYTES,
  type Coder,
  code,
  FREQUENCY_BITS,
  LEAST_COPY,
  mostDecoded,
  type Plan,
  SYMBOLS,
  Tables,
  type TensorRun,
  WORD_BITS,
} from "./coded.ts";
import type { TensorInput } from "./encode.ts";
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
 * @param before see `Decoding`
 * @returns undefined where that takes no fewer bytes
 */
export function encodeSection(
  section: Uint8Array,
  tensors: readonly TensorRef[],
  step: TensorRun["step"],
  before: Uint8Array = new Uint8Array(),
): Uint8Array<ArrayBuffer> | undefined {
  const encoder = new Encoder(section.length);
  const refuse = (fault: number, at: number): never => {
    throw new RangeError(`a section that cannot be coded: ${fault} at byte ${at}`);
  };
  // What is coded is read from the section, and written to it again as it is.
  const pieces = code(encoder, section, refuse, before, {
    runs: runsOf(tensors, step),
    copyAt: copies(before, section),
  });
  while (!pieces.next().done);
  const bytes = encoder.finish(section.length);
  return bytes.length < section.length && section.length <= mostDecoded(bytes.length) ? bytes : undefined;
}

/** 15 − log2 of a frequency: the bits of a symbol that has it. */
const BITS_OF: Float64Array = Float64Array.from(
  { length: 2 ** FREQUENCY_BITS + 1 },
  (_, frequency) => FREQUENCY_BITS - Math.log2(frequency),
);

/** Counts bits, and writes none. */
class Counter implements Coder {
  readonly #tables = new Tables();
  bitCount = 0;
  state: 0 | 1 = 0;

  symbol(table: number, symbol: number): number {
    const { sums } = this.#tables;
    const at = table * (SYMBOLS + 1) + symbol;
    this.bitCount += BITS_OF[sums[at + 1]! - sums[at]!]!;
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number, value: number): number {
    this.bitCount += count;
    return value & ((1 << count) - 1);
  }

  /** What a state takes is counted nowhere. */
  beginSecond(): void {}
}

/** Bits that encoded tensors take once they are coded, one behind the other. */
export function codedBits(tensors: readonly (Omit<TensorRef, "byteOffset" | "byteLength"> & TensorInput)[]): number {
  const counter = new Counter();
  const refuse = (fault: number): never => {
    throw new RangeError(`a tensor that cannot be coded: ${fault}`);
  };
  for (const { dtype, rows, width, encoded } of tensors) {
    const runs = runsOf([{ dtype, rows, width, byteOffset: 0, byteLength: encoded.length }], 4);
    const pieces = code(counter, encoded, refuse, NONE, { runs, copyAt: () => undefined });
    while (!pieces.next().done);
  }
  return counter.bitCount;
}

const NONE = new Uint8Array();

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

/** Notes of a block, in powers of 2. */
const LEAST_BLOCK = 10;
const MOST_BLOCK = 20;
/** Notes of large blocks lie together in 32 MB, which allocators give back to the system as soon as they are free. */
const TOGETHER = 2 ** 24;
/** A note of bits: how many they are, above their value. The value of more than 10 is a note of its own behind one that says LONG. */
const BITS = 0x8000;
const VALUE_BITS = 10;
const LONG = 15;
/** Set in a note that the second state codes. */
const SECOND_BIT = 14;
const SECOND: number = 1 << SECOND_BIT;
/** A note where the second state begins. */
const BEGINS: number = BITS | SECOND | (LONG << VALUE_BITS);

const START: number = (1 << FREQUENCY_BITS) - 1;
/** Steps that are coded in one go. */
const CHUNK = 1 << 12;

/** Place of the bit that names the state in a step of bits. */
const BITS_SECOND = 24;
/** Number of bits that stands for a whole state. */
const STATE = 32;

/** Some notes, and the tables as the first of them found them. */
interface Block {
  /** Long enough for one more than it is filled with: both notes of long bits lie in one block. */
  readonly notes: Uint16Array;
  readonly tables: Tables;
  count: number;
}

/**
 * Notes what is coded; rANS codes it from the last to the first, so that a decoder reads it from the first on. A section has many times
 * more notes than bytes, so each is a symbol in 16 bits; what frequency the symbol had is found by going through a block again.
 */
export class Encoder implements Coder {
  readonly #tables = new Tables();
  readonly #blocks: Block[] = [];
  readonly #length: number;
  /** Room for notes of the next blocks. */
  #room = new Uint16Array(0);
  #second = false;
  state: 0 | 1 = 0;

  /** @param size of the section, about. Default: small */
  constructor(size: number = 0) {
    this.#length = 2 ** Math.min(MOST_BLOCK, Math.max(LEAST_BLOCK, Math.ceil(Math.log2(2 * size + 1))));
    this.#begin();
  }

  symbol(table: number, symbol: number): number {
    this.#note(this.state * SECOND + table * SYMBOLS + symbol);
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number, value: number): number {
    const low = value & ((1 << count) - 1);
    const kind = BITS + this.state * SECOND;
    if (count <= VALUE_BITS) this.#note(kind | (count << VALUE_BITS) | low);
    else this.#note(kind | (LONG << VALUE_BITS) | count, low);
    return low;
  }

  beginSecond(): void {
    if (!this.#second) this.#note(BEGINS);
    this.#second = true;
  }

  #note(note: number, value?: number): void {
    let block = this.#blocks[this.#blocks.length - 1]!;
    if (block.count >= this.#length) block = this.#begin();
    block.notes[block.count++] = note;
    if (value !== undefined) block.notes[block.count++] = value;
  }

  #begin(): Block {
    const length = this.#length + 1;
    if (this.#room.length < length) this.#room = new Uint16Array(length < 2 ** MOST_BLOCK ? length : TOGETHER);
    const block = { notes: this.#room.subarray(0, length), tables: this.#tables.copy(), count: 0 };
    this.#room = this.#room.subarray(length);
    this.#blocks.push(block);
    return block;
  }

  /** @param size of the section */
  finish(size: number): Uint8Array<ArrayBuffer> {
    let words = new Uint16Array(4 * CHUNK);
    let count = 0;
    const states = Int32Array.of(2 ** WORD_BITS, 2 ** WORD_BITS);
    const steps = new Int32Array(this.#length + 1);
    for (const block of this.#blocks.toReversed()) {
      for (let end = stepsOf(block, steps); end > 0; end -= CHUNK) {
        // A step writes one word at most; where a state begins, two.
        if (words.length < count + CHUNK + 4) {
          const longer = new Uint16Array(2 * words.length);
          longer.set(words);
          words = longer;
        }
        count = codeSteps(steps.subarray(Math.max(0, end - CHUNK), end), states, words, count);
      }
    }
    words[count++] = states[0]!;
    words[count++] = states[0]! >>> WORD_BITS;
    const bytes = new Uint8Array(CODED_HEAD_BYTES + 2 * count);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, CODED_MAGIC, true);
    view.setUint32(4, size, true);
    for (let i = 0; i < count; i++) view.setUint16(CODED_HEAD_BYTES + 2 * i, words[count - 1 - i]!, true);
    return bytes;
  }
}

/**
 * Codes steps from the last to the first.
 * @param states 32 bits each; they move
 * @param words gets words from `count` on
 * @returns how many words there are then
 */
function codeSteps(steps: Int32Array, states: Int32Array, words: Uint16Array, count: number): number {
  for (let i = steps.length - 1; i >= 0; i--) {
    const step = steps[i]!;
    const which = (step >> (step < 0 ? BITS_SECOND : FREQUENCY_BITS)) & 1;
    let state = states[which]!;
    if (step < 0) {
      const bits = (step >> WORD_BITS) & 0xff;
      if (bits === STATE || (bits > 0 && state >>> (32 - bits) > 0)) {
        words[count++] = state;
        state >>>= WORD_BITS;
      }
      if (bits === STATE) words[count++] = state;
      else state = (state << bits) | (step & 0xffff);
    } else {
      const width = step >> WORD_BITS;
      if (state >>> (2 * WORD_BITS - FREQUENCY_BITS) >= width) {
        words[count++] = state;
        state >>>= WORD_BITS;
      }
      const whole = ((state >>> 0) / width) | 0;
      const start = step & START;
      state = ((whole << FREQUENCY_BITS) + (state - Math.imul(whole, width)) + start) | 0;
    }
    states[which] = state;
  }
  return count;
}

/**
 * Steps of a block's notes. Of a symbol: its start, the state that codes it, and above them its frequency. Of bits, as a negative number:
 * their value, how many they are, and the state. The block's tables move with them.
 * @param steps gets them
 * @returns how many there are
 */
function stepsOf({ notes, tables, count }: Block, steps: Int32Array): number {
  const { sums } = tables;
  let end = 0;
  for (let i = 0; i < count; i++) {
    const note = notes[i]!;
    const second = (note >> SECOND_BIT) & 1;
    if (note < BITS) {
      const at = note & (SECOND - 1);
      const table = (at / SYMBOLS) | 0;
      const start = sums[at + table]!;
      steps[end++] = ((sums[at + table + 1]! - start) << WORD_BITS) | (second << FREQUENCY_BITS) | start;
      tables.use(table, at % SYMBOLS);
      continue;
    }
    const value = note & ((1 << VALUE_BITS) - 1);
    const bits = (note >> VALUE_BITS) & LONG;
    const many = bits < LONG ? bits : value > 0 ? value : STATE;
    const low = bits < LONG ? value : value > 0 ? notes[++i]! : 0;
    steps[end++] = (1 << 31) | (second << BITS_SECOND) | (many << WORD_BITS) | low;
  }
  return end;
}

/**
 * The writing half of coded sections (`coded.ts`).
 */

import { atOnce } from "../pace.ts";
import { isQuantized, sum } from "../tensor/dtypes.ts";
import {
  CODED_HEAD_BYTES,
  type Coder,
  code,
  FREQUENCY_BITS,
  type Frequencies,
  GIVEN,
  GIVEN_BITS,
  GIVEN_LEVELS,
  GIVEN_SYMBOLS,
  givenSums,
  LANES,
  LEAST_COPY,
  MOST_GIVEN,
  MOST_PLACES,
  mostDecoded,
  type Plan,
  placeOfGiven,
  runBytes,
  SYMBOLS,
  Tables,
  type TensorRun,
  WORD_BITS,
} from "./coded.ts";
import { CODED_MAGIC, type TensorRef } from "./format.ts";

/** Distance of copies that are looked for, and the most places tried. */
const WINDOW_BYTES = 1 << 16;
const MOST_TRIES = 64;
const HASH_BITS = 14;
/** Bytes saved by a copy from as far back as the previous one. */
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
  before: Uint8Array = NONE,
): Uint8Array<ArrayBuffer> | undefined {
  const encoder = new Encoder(section.length);
  const runs = runsOf(tensors, step);
  codeAll(encoder, section, before, {
    runs,
    frequencies: frequenciesOf(section, runs),
    copyAt: copies(before, section),
  });
  const bytes = encoder.finish(section.length);
  return bytes.length < section.length && section.length <= mostDecoded(bytes.length) ? bytes : undefined;
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
/** A note: above, its lane; below, a symbol with its table, a symbol of given frequencies with its level, or bits. */
const LANE_SHIFT = 13;
const GIVEN_NOTE = 1 << 12;
const LEVEL_SHIFT = 6;
/**
 * A note of bits: how many they are, above their value. The value of more than 9 is a note of its own behind one that
 * says LONG.
 */
const BITS = 1 << 15;
const VALUE_BITS = 9;
const LONG = 15;
/** A note where the states of other lanes begin. */
const BEGINS: number = BITS | (LONG << VALUE_BITS);

/** Steps that are coded in one go. */
const CHUNK = 1 << 12;
/** Kinds of steps. */
const [SYMBOL, GIVEN_SYMBOL, SOME_BITS, BEGIN] = [0, 1, 2, 3];

/** Symbols that pass through the states, in the order of reading. */
class Steps {
  /** A symbol's frequency, or how many bits they are, above the sum in front of it or their value. */
  readonly what: Uint32Array;
  /** The lane, above the kind. */
  readonly how: Uint8Array;
  count = 0;

  constructor(most: number) {
    this.what = new Uint32Array(most);
    this.how = new Uint8Array(most);
  }

  add(lane: number, kind: number, high: number, low: number): void {
    this.what[this.count] = (high << WORD_BITS) | low;
    this.how[this.count++] = (lane << 2) | kind;
  }
}

/** Some notes, and the tables as the first of them found them. */
interface Block {
  /** Long enough for one more than it is filled with: both notes of long bits lie in one block. */
  readonly notes: Uint16Array;
  readonly tables: Tables;
  count: number;
}

/**
 * Notes what is coded; rANS codes it from the last to the first, so that a decoder reads it from the first on. A
 * section has many times more notes than bytes, so each is a symbol in 16 bits; what frequency the symbol had is found
 * by going through a block again.
 */
export class Encoder implements Coder {
  readonly #tables = new Tables();
  readonly #blocks: Block[] = [];
  readonly #length: number;
  /** Room for notes of the next blocks. */
  #room = new Uint16Array(0);
  #given: Uint16Array | undefined;
  lane = 0;

  /** @param size of the section, about. Default: small */
  constructor(size: number = 0) {
    this.#length = 2 ** Math.min(MOST_BLOCK, Math.max(LEAST_BLOCK, Math.ceil(Math.log2(2 * size + 1))));
    this.#begin();
  }

  symbol(table: number, symbol: number): number {
    this.#note((this.lane << LANE_SHIFT) | (table * SYMBOLS + symbol));
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number, value: number): number {
    if (count === 0) return 0;
    const low = value & ((1 << count) - 1);
    const kind = BITS | (this.lane << LANE_SHIFT);
    if (count <= VALUE_BITS) this.#note(kind | (count << VALUE_BITS) | low);
    else this.#note(kind | (LONG << VALUE_BITS) | count, low);
    return low;
  }

  given(level: number, symbol: number): number {
    this.#note((this.lane << LANE_SHIFT) | GIVEN_NOTE | (level << LEVEL_SHIFT) | placeOfGiven(symbol));
    return symbol;
  }

  give(frequencies: Frequencies): void {
    this.#given = givenSums(frequencies);
    this.#note(BEGINS);
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
    const states = new Int32Array(LANES).fill(2 ** WORD_BITS);
    const steps = new Steps(this.#length + 1);
    for (const block of this.#blocks.toReversed()) {
      stepsOf(block, this.#given, steps);
      for (let end = steps.count; end > 0; end -= CHUNK) {
        // A step writes one word at most; where states begin, two for each.
        if (words.length < count + CHUNK + 2 * LANES) {
          const longer = new Uint16Array(2 * words.length);
          longer.set(words);
          words = longer;
        }
        count = codeSteps(steps, Math.max(0, end - CHUNK), end, states, words, count);
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
function codeSteps(
  { what, how }: Steps,
  begin: number,
  end: number,
  states: Int32Array,
  words: Uint16Array,
  count: number,
): number {
  for (let i = end - 1; i >= begin; i--) {
    const [kind, lane] = [how[i]! & 3, how[i]! >> 2];
    if (kind === BEGIN) {
      for (let other = LANES - 1; other > 0; other--) {
        words[count++] = states[other]!;
        words[count++] = states[other]! >>> WORD_BITS;
      }
      continue;
    }
    const [high, low] = [what[i]! >>> WORD_BITS, what[i]! & 0xffff];
    let state = states[lane]!;
    const bits = kind === SYMBOL ? FREQUENCY_BITS : kind === GIVEN_SYMBOL ? GIVEN_BITS : high;
    const width = kind === SOME_BITS ? 1 : high;
    if (bits > 0 && state >>> (2 * WORD_BITS - bits) >= width) {
      words[count++] = state;
      state >>>= WORD_BITS;
    }
    const whole = kind === SOME_BITS ? state : ((state >>> 0) / width) | 0;
    states[lane] = ((whole << bits) + (state - Math.imul(whole, width)) + low) | 0;
  }
  return count;
}

/**
 * Steps of a block's notes. The block's tables move with them.
 * @param given sums of given frequencies
 * @param steps gets them
 */
function stepsOf({ notes, tables, count }: Block, given: Uint16Array | undefined, steps: Steps): void {
  const { sums } = tables;
  steps.count = 0;
  for (let i = 0; i < count; i++) {
    const note = notes[i]!;
    const lane = (note >> LANE_SHIFT) & (LANES - 1);
    if (note >= BITS) {
      const value = note & ((1 << VALUE_BITS) - 1);
      const bits = (note >> VALUE_BITS) & LONG;
      if (bits < LONG) steps.add(lane, SOME_BITS, bits, value);
      else if (value > 0) steps.add(lane, SOME_BITS, value, notes[++i]!);
      else steps.add(0, BEGIN, 0, 0);
      continue;
    }
    const at = note & (GIVEN_NOTE - 1);
    if (note & GIVEN_NOTE) {
      const place = (at >> LEVEL_SHIFT) * (GIVEN_SYMBOLS + 1) + (at & ((1 << LEVEL_SHIFT) - 1));
      steps.add(lane, GIVEN_SYMBOL, given![place + 1]! - given![place]!, given![place]!);
    } else {
      const table = (at / SYMBOLS) | 0;
      const start = sums[at + table]!;
      steps.add(lane, SYMBOL, sums[at + table + 1]! - start, start);
      tables.use(table, at % SYMBOLS);
    }
  }
}

// Sizes of entropy-coded tensors (`coded.ts`), and the frequencies that suit them.

/** Given frequencies take some 200 bytes: they pay for this many integers, in tensors of at least so many. */
const MANY = 1 << 16;
const WIDE = 512;

/** Coded tensors are read from the section and written to it unchanged. */
function codeAll(coder: Coder, section: Uint8Array, before: Uint8Array, plan: Plan): void {
  const refuse = (fault: string, at: number): never => {
    throw new RangeError(`what cannot be coded: ${fault} at byte ${at}`);
  };
  atOnce(code(coder, section, refuse, before, plan));
}

/** Frequencies for runs; undefined where none has given ones. */
function frequenciesOf(section: Uint8Array, runs: readonly TensorRun[]): Frequencies | undefined {
  const given = runs.filter((run) => run.given);
  if (given.length === 0) return undefined;
  const counter = new Counter();
  for (const run of given) counter.add(section.subarray(run.byteOffset), run);
  return counter.frequencies();
}

/** 15 − log2 of a frequency: the bits of a symbol that has it. */
const BITS_OF: Float64Array = Float64Array.from(
  { length: 2 ** FREQUENCY_BITS + 1 },
  (_, frequency) => FREQUENCY_BITS - Math.log2(frequency),
);

/** Bits that frequencies of other integers lose against a tensor's own: half a nat for each symbol. */
const LEARNED: number = 0.5 / Math.LN2;

/** Counts bits, and writes none. */
class Counter implements Coder {
  readonly #tables = new Tables();
  /** [levels, 17]: how often a level had each magnitude. */
  readonly #counts = new Float64Array(GIVEN_LEVELS * GIVEN);
  #bits = 0;
  lane = 0;

  symbol(table: number, symbol: number): number {
    const { sums } = this.#tables;
    const at = table * (SYMBOLS + 1) + symbol;
    this.#bits += BITS_OF[sums[at + 1]! - sums[at]!]!;
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number, value: number): number {
    this.#bits += count;
    return value & ((1 << count) - 1);
  }

  given(level: number, symbol: number): number {
    this.#counts[level * GIVEN + Math.abs(symbol)]!++;
    return symbol;
  }

  /** Bytes of states and frequencies are not counted. */
  give(): void {}

  /** Counts a run's tensors. @param bytes from the first of them on */
  add(bytes: Uint8Array, run: TensorRun): void {
    const own = bytes.subarray(0, runBytes(run));
    codeAll(this, own, NONE, { runs: [{ ...run, byteOffset: 0 }], copyAt: () => undefined });
  }

  bitCount(): number {
    let bits = this.#bits;
    for (const counts of this.#levels()) {
      const all = sum(counts);
      counts.forEach((count, magnitude) => {
        const signed = magnitude > 0 && magnitude <= MOST_GIVEN ? 1 : 0;
        if (count > 0) bits += count * (Math.log2(all / count) + signed) + LEARNED;
      });
    }
    return bits;
  }

  /** Frequencies of what was counted. */
  frequencies(): Frequencies {
    const found: Frequencies = new Uint16Array(GIVEN_LEVELS * GIVEN);
    for (const [level, counts] of this.#levels().entries()) {
      const own = found.subarray(level * GIVEN, (level + 1) * GIVEN);
      const share = 2 ** GIVEN_BITS / (sum(counts) || 1);
      let left = 2 ** GIVEN_BITS;
      for (let i = 1; i < GIVEN; i++) {
        const signs = i <= MOST_GIVEN ? 2 : 1;
        if (counts[i]! > 0) own[i] = Math.max(1, Math.round((counts[i]! * share) / signs));
        left -= signs * own[i]!;
      }
      // The largest frequency pays for those that rounding raised from 0.
      for (const least = Number(counts[0]! > 0); left < least; ) {
        const largest = own.indexOf(Math.max(...own.subarray(1)), 1);
        own[largest]!--;
        left += largest <= MOST_GIVEN ? 2 : 1;
      }
      own[0] = left;
    }
    return found;
  }

  #levels(): Float64Array[] {
    return Array.from({ length: GIVEN_LEVELS }, (_, level) =>
      this.#counts.subarray(level * GIVEN, (level + 1) * GIVEN),
    );
  }
}

/** Bits that encoded tensors take about, one behind the other: each as if it were all that its section has. */
export function codedBits(
  tensors: readonly (Omit<TensorRef, "byteOffset" | "byteLength"> & { readonly encoded: Uint8Array })[],
): number {
  const counter = new Counter();
  for (const { dtype, rows, width, encoded } of tensors)
    for (const run of runsOf([{ dtype, rows, width, byteOffset: 0, byteLength: encoded.length }], 4))
      counter.add(encoded, run);
  return counter.bitCount();
}

/** Nothing to copy from. */
const NONE: Uint8Array<ArrayBuffer> = new Uint8Array();

/** Neighbours of one shape and type, together. */
function runsOf(tensors: readonly TensorRef[], step: TensorRun["step"]): TensorRun[] {
  const sizes = tensors.map(({ dtype, rows, width }) => (isQuantized(dtype) ? rows * width : 0));
  const many = sizes.reduce((all, size) => all + (size >= WIDE ? size : 0), 0) >= MANY;
  const runs: TensorRun[] = [];
  let end = -1;
  for (const [i, { dtype, rows, width, byteOffset, byteLength }] of tensors.entries()) {
    if (!isQuantized(dtype) || rows === 0) continue;
    const last = runs.at(-1);
    const next = Math.ceil(end / step) * step === byteOffset;
    if (last && next && last.dtype === dtype && last.rows === rows && last.width === width)
      runs[runs.length - 1] = { ...last, count: last.count + 1 };
    else {
      const given = sizes[i]! > MOST_PLACES || (many && sizes[i]! >= WIDE);
      runs.push({ dtype, rows, width, count: 1, step, given, byteOffset });
    }
    end = byteOffset + byteLength;
  }
  return runs;
}

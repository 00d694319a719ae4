/**
 * The writing half of coded sections (`coded.ts`).
 */
import { isQuantized } from "../tensor/dtypes.ts";
import {
  CODED_HEAD_BYTES,
  CODED_MAGIC,
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
import type { TensorRef } from "./format.ts";

/** How far back copies are looked for. */
const WINDOW_BYTES = 1 << 16;

/**
 * A section, coded.
 * @param tensors of it, in order
 * @param step each tensor begins at a multiple of it
 * @returns undefined where that takes no fewer bytes
 */
export function encodeSection(
  section: Uint8Array,
  tensors: readonly TensorRef[],
  step: TensorRun["step"],
): Uint8Array<ArrayBuffer> | undefined {
  const encoder = new Encoder();
  // What is coded is read from the section and written to it again.
  code(encoder, section.slice(), () => {}, { runs: runsOf(tensors, step), copyAt: copies(section) });
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

/** Finds copies: the last place with the same four bytes. Asked of ascending places. */
function copies(section: Uint8Array): Plan["copyAt"] {
  const places = new Map<number, number>();
  let known = 0;
  const key = (at: number): number =>
    section[at]! + section[at + 1]! * 2 ** 8 + section[at + 2]! * 2 ** 16 + section[at + 3]! * 2 ** 24;
  return (at, end) => {
    for (; known < at; known++) places.set(key(known), known);
    const from = places.get(key(at));
    if (from === undefined || at - from > WINDOW_BYTES || at + LEAST_COPY > end) return undefined;
    let length = 0;
    while (at + length < end && section[from + length] === section[at + length]) length++;
    return { length, distance: at - from };
  };
}

/** Notes what is coded; rANS codes it from the last to the first, so that a decoder reads it from the first on. */
class Encoder implements Coder {
  readonly #tables = new Tables();
  /** Start and frequency of each symbol; of bits their value, and how many they are as a negative number. */
  #starts = new Uint16Array(1 << 16);
  #widths = new Int16Array(1 << 16);
  #count = 0;

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
    if (this.#count === this.#starts.length) {
      const [starts, widths] = [new Uint16Array(2 * this.#count), new Int16Array(2 * this.#count)];
      starts.set(this.#starts);
      widths.set(this.#widths);
      [this.#starts, this.#widths] = [starts, widths];
    }
    this.#starts[this.#count] = start;
    this.#widths[this.#count++] = width;
  }

  /** @param size of the section */
  finish(size: number): Uint8Array<ArrayBuffer> {
    const words: number[] = [];
    let state = 2 ** WORD_BITS;
    const room = (most: number): void => {
      if (state < most) return;
      words.push(state & 0xffff);
      state = Math.floor(state / 2 ** WORD_BITS);
    };
    for (let i = this.#count - 1; i >= 0; i--) {
      const [start, width] = [this.#starts[i]!, this.#widths[i]!];
      if (width <= 0) {
        room(2 ** (32 + width));
        state = state * 2 ** -width + start;
      } else {
        room(width * 2 ** (2 * WORD_BITS - FREQUENCY_BITS));
        state = Math.floor(state / width) * 2 ** FREQUENCY_BITS + (state % width) + start;
      }
    }
    words.push(state % 2 ** WORD_BITS, Math.floor(state / 2 ** WORD_BITS));
    const bytes = new Uint8Array(CODED_HEAD_BYTES + 2 * words.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, CODED_MAGIC, true);
    view.setUint32(4, size, true);
    for (const [i, word] of words.reverse().entries()) view.setUint16(CODED_HEAD_BYTES + 2 * i, word, true);
    return bytes;
  }
}

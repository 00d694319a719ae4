/** What entropy-coded tensors would take (`coded.ts`), and the frequencies that suit them. */
import { isQuantized } from "../tensor/dtypes.ts";
import { type Coder, code, MOST_PLACES, type Plan, runBytes, type TensorRun } from "./coded.ts";
import {
  FREQUENCY_BITS,
  type Frequencies,
  GIVEN,
  GIVEN_BITS,
  GIVEN_LEVELS,
  MOST_GIVEN,
  SYMBOLS,
  Tables,
} from "./coded-tables.ts";
import type { TensorInput } from "./encode.ts";
import type { TensorRef } from "./format.ts";

/** Given frequencies take some 200 bytes: they pay for this many integers, in tensors of at least so many. */
const MANY = 1 << 16;
const WIDE = 512;

/** What is coded is read from the section, and written to it again as it is. */
export function codeAll(coder: Coder, section: Uint8Array, before: Uint8Array, plan: Plan): void {
  const refuse = (fault: number, at: number): never => {
    throw new RangeError(`what cannot be coded: ${fault} at byte ${at}`);
  };
  const pieces = code(coder, section, refuse, before, plan);
  while (!pieces.next().done);
}

/** Frequencies for runs; undefined where none has given ones. */
export function frequenciesOf(section: Uint8Array, runs: readonly TensorRun[]): Frequencies | undefined {
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

  /** What states and frequencies take is counted nowhere. */
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
      // What rounding has taken from 0 is given back by the largest.
      for (const least = Number(counts[0]! > 0); left < least; ) {
        const largest = largestOf(own);
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

/** Index of the largest frequency behind that of 0. */
function largestOf(own: Frequencies): number {
  let largest = 1;
  for (let i = 2; i < GIVEN; i++) if (own[i]! > own[largest]!) largest = i;
  return largest;
}

function sum(numbers: Float64Array): number {
  return numbers.reduce((a, b) => a + b, 0);
}

/** Bits that encoded tensors take about, one behind the other: each as if it were all that its section has. */
export function codedBits(tensors: readonly (Omit<TensorRef, "byteOffset" | "byteLength"> & TensorInput)[]): number {
  const counter = new Counter();
  for (const { dtype, rows, width, encoded } of tensors)
    for (const run of runsOf([{ dtype, rows, width, byteOffset: 0, byteLength: encoded.length }], 4))
      counter.add(encoded, run);
  return counter.bitCount();
}

/** Nothing to copy from. */
export const NONE: Uint8Array<ArrayBuffer> = new Uint8Array();

/** Neighbours of one shape and type, together. */
export function runsOf(tensors: readonly TensorRef[], step: TensorRun["step"]): TensorRun[] {
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

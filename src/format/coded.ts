/**
 * Entropy-coded sections (SPEC.md, appendix A): integers of tensors in as many bits as they are worth. Coding loses nothing: a
 * section is what it was, byte for byte, once decoded. The coder is rANS (J. Duda, "Asymmetric numeral systems", 2013) over
 * frequencies that adapt. `code` tells what is coded in which order, for both directions: `encode-coded.ts` and `decode-coded.ts`.
 */
import {
  BITS,
  type QuantizedDtype,
  quantizedAt,
  rowBytes,
  scaleBytes,
  setInteger,
  tensorBytes,
} from "../tensor/dtypes.ts";
import { CODED_MAGIC, CODED_MASK } from "./format.ts";

/** Bits of a frequency, and of a word. */
export const FREQUENCY_BITS = 15;
export const WORD_BITS = 16;
/** Symbols of a table; the last of an integer's says that more follows. */
export const SYMBOLS = 8;
const ESCAPE: number = SYMBOLS - 1;
/** No frequency falls below about this. */
const LEAST = 16;
/** How far a table moves by how often it was used before, this often at least: the share is a power of 2. */
const STEPS: Uint8Array = Uint8Array.from({ length: 41 }, (_, used) =>
  used < 4 ? 4 : used < 12 ? 5 : used < 40 ? 6 : 7,
);

/** What is above the likeliest symbol when all others have their least frequency. */
const RAISED = (1 << FREQUENCY_BITS) - SYMBOLS * LEAST;

/**
 * First tables, by the level of a mean magnitude (`LEVELS`): 2^15 times the probability that a value of a normal distribution with
 * such a mean magnitude, rounded, is at most 0, 1, … 6.
 */
const FIRST: readonly (readonly number[])[] = [
  [31897, 32672, 32688, 32704, 32720, 32736, 32752],
  [29879, 32672, 32688, 32704, 32720, 32736, 32752],
  [27029, 32672, 32688, 32704, 32720, 32736, 32752],
  [23060, 32634, 32688, 32704, 32720, 32736, 32752],
  [18047, 31955, 32688, 32704, 32720, 32736, 32752],
  [13182, 29051, 32448, 32704, 32720, 32736, 32752],
  [9338, 23833, 30543, 32399, 32706, 32736, 32752],
  [6559, 18123, 26052, 30279, 32031, 32595, 32736],
  [4582, 13198, 20365, 25637, 29067, 31041, 32046],
  [3204, 9423, 15106, 19997, 23960, 26984, 29157],
  [2247, 6674, 10909, 14843, 18390, 21496, 24136],
];
/** A level begins at this mean magnitude, in 1/64. */
const LEVELS: readonly number[] = [4, 8, 15, 24, 38, 56, 83, 120, 174, 248];
/** Means above this, in 1/64, have the lowest bits of their integers stored as they are. */
const MOST_MEAN = 256;
const MEAN_UNIT = 64;
export const LEVEL_OF: Uint8Array = Uint8Array.from(
  { length: MOST_MEAN + 1 },
  (_, mean) => LEVELS.filter((begin) => begin <= mean).length,
);

/** Tables: of integers by level and bits left out, one for each other kind of number, and those of bytes. */
const SHIFTS = 6;
const TABLES_OF_A_SHIFT: number = FIRST.length;
const INTEGERS = SHIFTS * FIRST.length;
export const MORE: number = INTEGERS;
const SCALE: number = INTEGERS + 1;
const FINE: number = INTEGERS + 2;
export const SHAPE: number = INTEGERS + 3;
export const LITERALS: number = INTEGERS + 4;
export const LENGTH: number = INTEGERS + 5;
export const DISTANCE: number = INTEGERS + 6;
/** Tables from this one on move four times as far, since their use is not known before. */
const QUICK = LITERALS;
/** A byte is coded in 3, 3 and 2 bits: after the byte before, by what is known of it. */
const HIGH: number = DISTANCE + 1;
const MIDDLE: number = HIGH + 8;
const LOW: number = MIDDLE + 8;
const TABLES = LOW + 64;
/** Where no mean is known. */
const UNKNOWN_LEVEL = 7;

/** Where the sums of a table move to by the use of a symbol: [symbol, i]. */
const TARGETS: Int32Array = Int32Array.from({ length: SYMBOLS * SYMBOLS }, (_, at) => {
  const [symbol, i] = [Math.floor(at / SYMBOLS), at % SYMBOLS];
  return (i > symbol ? RAISED : 0) + i * LEAST;
});

/** What all tables begin with. */
const FIRST_SUMS: Int32Array = Int32Array.from({ length: TABLES * (SYMBOLS + 1) }, (_, at) => {
  const [table, i] = [Math.floor(at / (SYMBOLS + 1)), at % (SYMBOLS + 1)];
  const first = FIRST[table < INTEGERS ? table % FIRST.length : UNKNOWN_LEVEL]!;
  return i === 0 ? 0 : (first[i - 1] ?? 1 << FREQUENCY_BITS);
});

/** Tables of cumulative frequencies that move towards what they are used for. */
export class Tables {
  /** [tables, 9]: of each, the sum of the frequencies of all symbols below the i-th. */
  readonly sums: Int32Array = FIRST_SUMS.slice();
  readonly #used = new Uint8Array(TABLES);

  copy(): Tables {
    const copy = new Tables();
    copy.sums.set(this.sums);
    copy.#used.set(this.#used);
    return copy;
  }

  /** Makes `symbol` likelier. */
  use(table: number, symbol: number): void {
    const { sums } = this;
    const used = this.#used[table]!;
    const slow = STEPS[used]! - (table < QUICK ? 0 : 2);
    if (used < STEPS.length - 1) this.#used[table] = used + 1;
    const at = table * (SYMBOLS + 1);
    const to = symbol * SYMBOLS;
    for (let i = 1; i < SYMBOLS; i++) {
      const sum = sums[at + i]!;
      sums[at + i] = sum + ((TARGETS[to + i]! - sum) >> slow);
    }
  }
}

/** Bytes in front of the words: magic, and the length of the section once decoded. */
export const CODED_HEAD_BYTES = 8;
/** What a section has at most once decoded. @param stored its bytes, coded */
export function mostDecoded(stored: number): number {
  return 16 * stored + 4096;
}

/** Symbols, or bytes of copies, between two looks at the clock where there is no WebAssembly. */
const PIECE = 1 << 12;
/** Rows, which may be short, between two such looks. */
const ROWS = 1 << 8;

/** What may be wrong with a section, numbered as `assembly/coded.ts` does. */
export const FAULT = {
  early: 1,
  state: 2,
  bytes: 3,
  single: 4,
  copy: 5,
  type: 6,
  tensors: 7,
  magnitude: 8,
  late: 9,
} as const;

/** Throws for a fault at a byte of the section. */
export type Refuse = (fault: number, at: number) => never;

/** Types of integers, by their code here. */
const TYPES: readonly QuantizedDtype[] = ["int8", "int4", "int3"];

/** Columns of more numbers than this are not remembered; their rows go in pairs. */
const MOST_COLUMNS = 4096;
/** Fewest bytes of a copy of earlier ones. */
export const LEAST_COPY = 4;

/** Codes one value after another: a decoder returns what it read, an encoder what it was given. */
export interface Coder {
  /** 0 to 7, by a table. */
  symbol(table: number, value: number): number;
  /** The lowest `count` bits, at most 16. */
  bits(count: number, value: number): number;
  /** Begins the second of two states, where it has not begun. */
  beginSecond(): void;
  /** Which of the states codes what follows. */
  state: 0 | 1;
}

/** Tensors of one shape and type, one behind the other. */
export interface TensorRun {
  readonly dtype: QuantizedDtype;
  readonly rows: number;
  readonly width: number;
  readonly count: number;
  /** Each begins at a multiple of it: 4 or 16. */
  readonly step: 4 | 16;
  /** Where the first begins. */
  readonly byteOffset: number;
}

/** What an encoder knows of a section. */
export interface Plan {
  readonly runs: readonly TensorRun[];
  /** Earlier bytes that are the same as those at `at`: how many, and how far back. Undefined where there are too few. */
  copyAt(at: number, end: number): { readonly length: number; readonly distance: number } | undefined;
}

/** Whether a task blob is coded. Its first bytes say so; of bases the section table does. */
export function isCoded(blob: Uint8Array): boolean {
  if (blob.length < 4) return false;
  const magic = new DataView(blob.buffer, blob.byteOffset).getUint32(0, true);
  return (magic & CODED_MASK) === (CODED_MAGIC & CODED_MASK);
}

/**
 * Codes a section, or fills one with what is decoded, in pieces. Bytes that belong to no run are copies of earlier ones, or stand as they are.
 * @param before what copies may be of beside the section itself
 * @param plan of an encoder
 */
export function* code(
  coder: Coder,
  section: Uint8Array,
  refuse: Refuse,
  before: Uint8Array,
  plan?: Plan,
): Generator<void> {
  let at = 0;
  for (let i = 0; at < section.length; i++) {
    const run = plan?.runs[i];
    at = yield* codeBytes(coder, section, at, run ? run.byteOffset : section.length, refuse, before, plan);
    if (at === section.length) break;
    const type = coder.bits(2, run ? TYPES.indexOf(run.dtype) : 0);
    const dtype = TYPES[type] ?? refuse(FAULT.type, at);
    const rows = codeNumber(coder, SHAPE, run?.rows ?? 0);
    const width = codeNumber(coder, SHAPE, run?.width ?? 0);
    const count = codeNumber(coder, SHAPE, run?.count ?? 0);
    const step = coder.bits(1, Number(run?.step === 16)) ? 16 : 4;
    const bytes = Math.ceil(tensorBytes(dtype, rows, width) / step) * step;
    const end = at + (count - 1) * bytes + tensorBytes(dtype, rows, width);
    if (!(count > 0 && rows > 0 && end <= section.length)) refuse(FAULT.tensors, at);
    const memory = new Memory(rows, width);
    for (let k = 0; k < count; k++)
      yield* codeTensor(coder, section, at + k * bytes, { dtype, rows, width }, memory, refuse);
    at = end;
  }
}

/** A number below 2^31 − 1: how many bits it has more than one, by a table, then those bits. */
function codeNumber(coder: Coder, table: number, value: number): number {
  let count = 31 - Math.clz32(value + 1);
  const short = coder.symbol(table, Math.min(count, ESCAPE));
  count = short < ESCAPE ? short : Math.min(30, ESCAPE + coder.bits(5, count - ESCAPE));
  const low = Math.min(count, WORD_BITS);
  const high = coder.bits(count - low, (value + 1) >>> low);
  return ((1 << count) | (high << low) | coder.bits(low, value + 1)) - 1;
}

/** Bytes as they are, and copies of earlier ones, in turns. */
function* codeBytes(
  coder: Coder,
  section: Uint8Array,
  start: number,
  stop: number,
  refuse: Refuse,
  before: Uint8Array,
  plan: Plan | undefined,
): Generator<void, number> {
  const end = start + codeNumber(coder, LENGTH, stop - start);
  if (end > section.length) refuse(FAULT.bytes, start);
  let at = start;
  let distance = 0;
  while (at < end) {
    let next = at;
    let copy: ReturnType<Plan["copyAt"]>;
    if (plan) while (next < end && !(copy = plan.copyAt(next, end))) next++;
    next = at + codeNumber(coder, LITERALS, next - at);
    if (next > end) refuse(FAULT.single, at);
    for (; at < next; at++) {
      section[at] = codeByte(coder, section[at - 1] ?? 0, section[at]!);
      if (at % PIECE === 0) yield;
    }
    if (at === end) break;
    const length = LEAST_COPY + codeNumber(coder, LENGTH, (copy?.length ?? LEAST_COPY) - LEAST_COPY);
    distance = codeNumber(coder, DISTANCE, copy && copy.distance !== distance ? copy.distance : 0) || distance;
    if (!(distance > 0 && distance <= at + before.length && at + length <= end)) refuse(FAULT.copy, at);
    for (const until = at + length; at < until; at++) {
      section[at] = (distance > at ? before[before.length + at - distance] : section[at - distance])!;
      if (at % PIECE === 0) yield;
    }
  }
  return end;
}

/** @param last the byte before */
function codeByte(coder: Coder, last: number, byte: number): number {
  const high = coder.symbol(HIGH + (last >> 5), byte >> 5);
  const middle = coder.symbol(MIDDLE + high, (byte >> 2) & 7);
  return (high << 5) | (middle << 2) | (coder.symbol(LOW + 8 * high + middle, byte & 3) & 3);
}

/** What a run has seen: of each row the upper byte of the last scale, and the mean magnitude in 1/64; of each number where they are few. */
class Memory {
  readonly scales: Uint8Array;
  readonly rows: Int32Array;
  readonly columns: Int32Array | undefined;

  constructor(rows: number, width: number) {
    this.scales = new Uint8Array(rows);
    this.rows = new Int32Array(rows).fill(-1);
    this.columns = rows * width <= MOST_COLUMNS ? new Int32Array(rows * width).fill(-1) : undefined;
  }
}

function* codeTensor(
  coder: Coder,
  section: Uint8Array,
  start: number,
  { dtype, rows, width }: Pick<TensorRun, "dtype" | "rows" | "width">,
  memory: Memory,
  refuse: Refuse,
): Generator<void> {
  const [values, stride] = [start + scaleBytes(dtype, rows), rowBytes(dtype, width)];
  let [before, likely] = [MEAN_UNIT, 0x3c];
  const together = memory.columns ? 1 : 2;
  for (let row = 0; row < rows; row += together) {
    if (row % ROWS === 0) yield;
    const turns: Integers[] = [];
    for (let r = row; r < Math.min(rows, row + together); r++) {
      const [lower, upper] = [start + 2 * r, start + 2 * r + 1];
      likely = section[upper] = codeUpper(coder, section[upper]!, memory.scales[r]! || likely);
      memory.scales[r] = likely;
      section[lower] = coder.symbol(FINE, Number(section[lower] !== 0)) && coder.bits(8, section[lower]!);
      const mean = memory.rows[r]! < 0 ? before : memory.rows[r]!;
      turns.push({ dtype, from: values + r * stride, columns: memory.columns, column: r * width, mean });
    }
    if (turns.length > 1) coder.beginSecond();
    for (let i = 0; i < width; i += PIECE) {
      if (i > 0) yield;
      codeIntegers(coder, section, turns, i, Math.min(width, i + PIECE), refuse);
    }
    for (const [turn, { mean }] of turns.entries()) before = memory.rows[row + turn] = mean;
  }
}

/** A row, as far as its integers are concerned: where they begin, and where in `columns` what was seen of them. */
interface Integers {
  readonly dtype: QuantizedDtype;
  readonly from: number;
  readonly columns: Int32Array | undefined;
  readonly column: number;
  /** Mean of the magnitudes so far, in 1/64. */
  mean: number;
}

/** Integers `i` to `end` of one row, or of two in turns, with a state each. */
function codeIntegers(
  coder: Coder,
  section: Uint8Array,
  turns: readonly Integers[],
  i: number,
  end: number,
  refuse: Refuse,
): void {
  const bits = BITS[turns[0]!.dtype];
  const largest = (1 << (bits - 1)) - 1;
  for (; i < end; i++) {
    for (let turn = 0; turn < turns.length; turn++) {
      coder.state = turn as 0 | 1;
      const row = turns[turn]!;
      const { dtype, from, columns, mean } = row;
      const column = columns?.[row.column + i] ?? -1;
      const given = bits === 8 ? (section[from + i]! << 24) >> 24 : quantizedAt(section, dtype, from, i);
      const value = codeInteger(coder, column < 0 ? mean : (mean + column) >> 1, given, largest);
      if (value > largest) refuse(FAULT.magnitude, from + Math.floor((i * bits) / 8));
      if (value !== given) setInteger(section, bits, from, i, value);
      const seen = Math.abs(value) * MEAN_UNIT;
      if (columns) columns[row.column + i] = column < 0 ? (mean + seen) >> 1 : column + ((seen - column) >> 3);
      row.mean += (seen - mean) >> (i < 7 ? 3 : i < 15 ? 4 : 5);
    }
  }
  coder.state = 0;
}

/** The upper byte of a scale, by the difference to what is likely. */
function codeUpper(coder: Coder, byte: number, likely: number): number {
  const difference = byte - likely;
  const folded = codeNumber(coder, SCALE, difference < 0 ? -2 * difference - 1 : 2 * difference);
  return (likely + (folded & 1 ? -(folded + 1) / 2 : folded / 2)) & 255;
}

/** @param mean expected of its magnitude, in 1/64 @returns one above `largest` for all whose magnitude is larger */
function codeInteger(coder: Coder, mean: number, value: number, largest: number): number {
  let shift = 0;
  while (mean >> shift > MOST_MEAN) shift++;
  const magnitude = Math.abs(value);
  let found = coder.symbol(shift * TABLES_OF_A_SHIFT + LEVEL_OF[mean >> shift]!, Math.min(magnitude >> shift, ESCAPE));
  if (found === ESCAPE) found += codeNumber(coder, MORE, (magnitude >> shift) - ESCAPE);
  // Checked before a shift takes the highest bits away.
  if (found > largest) return largest + 1;
  if (shift > 0) found = (found << shift) | coder.bits(shift, magnitude & ((1 << shift) - 1));
  if (found > largest) return largest + 1;
  return found && coder.bits(1, Number(value < 0)) ? -found : found;
}

/**
 * Entropy-coded sections (SPEC.md, appendix A): integers of tensors in as many bits as they are worth. Coding loses
 * nothing: a section is what it was, byte for byte, once decoded. The coder is rANS (J. Duda, "Asymmetric numeral
 * systems", 2013) over frequencies that adapt, or that the section gives where integers are many. `code` tells what is
 * coded in which order, for both directions; the reading half is below, the writing half in `encode-coded.ts`.
 */
import { FormatError } from "../errors.ts";
import { Changes, type Pause, paced, pacer, throwIfAborted } from "../pace.ts";
import {
  BITS,
  type QuantizedDtype,
  quantizedAt,
  rowBytes,
  scaleBytes,
  setInteger,
  tensorBytes,
} from "../tensor/dtypes.ts";
import { type CodedWork, wasmWork } from "./coded-wasm.ts";
import { align64, Fields } from "./fields.ts";
import {
  CODED_MAGIC,
  CODED_MASK,
  DIRECTORY_HEAD_BYTES,
  SECTION_BASES,
  SECTION_CODED,
  SECTION_ENTRY_BYTES,
  type Superblock,
  WINDOW_BYTES,
} from "./format.ts";

/** Bytes in front of the words: magic, and the length of the section once decoded. */
export const CODED_HEAD_BYTES = 8;
/** Largest decoded size of a section. @param stored its bytes, coded */
export function mostDecoded(stored: number): number {
  return 16 * stored + 4096;
}

/** Largest decoded size of a coded directory; a larger one is stored as it is. */
export const MOST_CODED_DIRECTORY: number = 2 ** 25;

/** Symbols, or bytes of copies, between two looks at the clock where there is no WebAssembly. */
const PIECE = 1 << 12;
/** Rows, which may be short, between two such looks. */
const ROWS = 1 << 8;

/** Faults of a section, in the order of their numbers in `assembly/coded.ts`; those that have a place end before it. */
const FAULT = {
  early: "its words end too early",
  state: "it begins with a wrong state",
  bytes: "more bytes are announced than are left at",
  single: "more single bytes are announced than are left at",
  copy: "a copy does not fit at",
  type: "a tensor of unknown type is announced at",
  tensors: "tensors do not fit at",
  magnitude: "an integer is larger than its type allows at",
  late: "it does not end where its words do",
  frequencies: "too large frequencies are given at",
} as const;

/** Throws for a fault at a byte of the section. */
type Refuse = (fault: string, at: number) => never;

/** Types of integers, by their code here. */
const TYPES: readonly QuantizedDtype[] = ["int8", "int4", "int3"];

/** Integers of a row that go together where frequencies are given, each with a state of its own. */
export const LANES = 4;
/** Places of a tensor where what was seen is remembered. Larger ones have given frequencies. */
export const MOST_PLACES = 4096;
/** Fewest bytes of a copy of earlier ones. */
export const LEAST_COPY = 4;

/** Codes one value after another: a decoder returns what it read, an encoder what it was given. */
export interface Coder {
  /** 0 to 7, by a table. */
  symbol(table: number, value: number): number;
  /** The lowest `count` bits, at most 16. */
  bits(count: number, value: number): number;
  /** An integer from −15 to 15, or OTHER, by the given frequencies of a level. */
  given(level: number, value: number): number;
  /** Takes the given frequencies, and begins the states of the second to fourth lane. */
  give(frequencies: Frequencies): void;
  /** The lane whose state codes what follows; 0 for all but integers of given frequencies. */
  lane: number;
}

/** Tensors of one shape and type, one behind the other. */
export interface TensorRun {
  readonly dtype: QuantizedDtype;
  readonly rows: number;
  readonly width: number;
  readonly count: number;
  /** Each begins at a multiple of it: 4 or 16. */
  readonly step: 4 | 16;
  /** True if given frequencies code their integers. */
  readonly given: boolean;
  /** Where the first begins. */
  readonly byteOffset: number;
}

type Shape = Omit<TensorRun, "byteOffset" | "given">;

/** Bytes from one tensor to the next. */
function strideOf({ dtype, rows, width, step }: Shape): number {
  return Math.ceil(tensorBytes(dtype, rows, width) / step) * step;
}

/** Bytes of all tensors. */
export function runBytes(run: Shape): number {
  return (run.count - 1) * strideOf(run) + tensorBytes(run.dtype, run.rows, run.width);
}

/** Facts about a section that its encoder knows. */
export interface Plan {
  readonly runs: readonly TensorRun[];
  /** Frequencies of the runs that want them. Default: none are coded, since all is only counted. */
  readonly frequencies?: Frequencies | undefined;
  /**
   * Earlier bytes that are the same as those at `at`: how many, and how far back. Undefined where there are too few.
   */
  copyAt(at: number, end: number): { readonly length: number; readonly distance: number } | undefined;
}

/** True if a task blob is coded. Its first bytes say so; of bases the section table does. */
export function isCoded(blob: Uint8Array): boolean {
  if (blob.length < 4) return false;
  const magic = new DataView(blob.buffer, blob.byteOffset).getUint32(0, true);
  return (magic & CODED_MASK) === (CODED_MAGIC & CODED_MASK);
}

/**
 * Codes a section, or fills one with what is decoded, in pieces. Bytes that belong to no run are copies of earlier
 * ones, or stand as they are.
 * @param before bytes that copies may repeat, in addition to the section itself
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
  let begun = false;
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
    const found = { dtype, rows, width, count, step } as const;
    const end = at + runBytes(found);
    if (!(count > 0 && rows > 0 && end <= section.length)) refuse(FAULT.tensors, at);
    const given = rows * width > MOST_PLACES || coder.bits(1, Number(run?.given)) > 0;
    if (given && !begun && (!plan || plan.frequencies))
      coder.give(codeFrequencies(coder, plan?.frequencies, () => refuse(FAULT.frequencies, at)));
    begun ||= given;
    const memory = new Memory(rows, given ? undefined : rows * width);
    for (let k = 0; k < count; k++) yield* codeTensor(coder, section, at + k * strideOf(found), found, memory, refuse);
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

/** The frequencies of each level: of 0, of 1, … until none are left. */
function codeFrequencies(coder: Coder, given: Frequencies | undefined, refuse: () => never): Frequencies {
  const found: Frequencies = new Uint16Array(GIVEN_LEVELS * GIVEN);
  for (let at = 0; at < found.length; at += GIVEN) {
    let left = 1 << GIVEN_BITS;
    for (let i = 0; i <= MOST_GIVEN && left > 0; i++) {
      const frequency = codeNumber(coder, FREQUENCY, given?.[at + i] ?? 0);
      // Both signs have it.
      left -= i > 0 ? 2 * frequency : frequency;
      if (left < 0) refuse();
      found[at + i] = frequency;
    }
    found[at + GIVEN - 1] = left;
  }
  return found;
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

/**
 * Statistics of a run: of each row the upper byte of the last scale, and the mean magnitude; of each place where they
 * are few.
 */
class Memory {
  readonly scales: Uint8Array;
  readonly rows: Int32Array;
  readonly places: Int32Array | undefined;

  constructor(rows: number, places: number | undefined) {
    this.scales = new Uint8Array(rows);
    this.rows = new Int32Array(rows).fill(-1);
    this.places = places === undefined ? undefined : new Int32Array(places).fill(-1);
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
  const codeIntegers = memory.places ? codeOnes : codeFours;
  let [mean, likely] = [memory.places ? MEAN_UNIT : MEAN_UNIT << FINER, 0x3c];
  for (let row = 0; row < rows; row++) {
    if (row % ROWS === 0) yield;
    const [lower, upper] = [start + 2 * row, start + 2 * row + 1];
    likely = section[upper] = codeUpper(coder, section[upper]!, memory.scales[row]! || likely);
    memory.scales[row] = likely;
    section[lower] = coder.symbol(FINE, Number(section[lower] !== 0)) && coder.bits(8, section[lower]!);
    if (memory.rows[row]! >= 0) mean = memory.rows[row]!;
    const places = memory.places?.subarray(row * width);
    const integers: Integers = { section, dtype, from: values + row * stride, places, mean, refuse };
    for (let i = 0; i < width; i += PIECE) {
      if (i > 0) yield;
      codeIntegers(coder, integers, i, Math.min(width, i + PIECE));
    }
    mean = memory.rows[row] = integers.mean;
  }
}

/** The integers of a row. */
interface Integers {
  readonly section: Uint8Array;
  readonly dtype: QuantizedDtype;
  /** Where they begin in the section. */
  readonly from: number;
  /** Magnitude seen at each place, in 1/64; −1 where none was. */
  readonly places: Int32Array | undefined;
  /** Mean of the magnitudes so far, in 1/64; in 1/1024 where frequencies are given. */
  mean: number;
  readonly refuse: Refuse;
}

/** Integers `i` to `end` of a row by tables that move, each after what was seen at its place. */
function codeOnes(coder: Coder, row: Integers, i: number, end: number): void {
  const places = row.places!;
  for (; i < end; i++) {
    const [mean, place] = [row.mean, places[i]!];
    const value = codeInteger(coder, place < 0 ? mean : (mean + place) >> 1, row, i);
    const seen = Math.abs(value) * MEAN_UNIT;
    places[i] = place < 0 ? (mean + seen) >> 1 : place + ((seen - place) >> 3);
    row.mean += (seen - mean) >> slowness(i, 5);
  }
}

/** A mean moves by a share of 2 to the power of minus this: a larger one at the beginning of a row. */
function slowness(i: number, slow: number): number {
  return i < 7 ? 3 : i < 15 ? 4 : slow;
}

/**
 * Integers `i` to `end` of a row by given frequencies, four at a time: first the symbols of all lanes, then what they
 * do not say.
 */
function codeFours(coder: Coder, row: Integers, i: number, end: number): void {
  const symbols = [0, 0, 0, 0];
  for (; i < end; i += LANES) {
    const lanes = Math.min(LANES, end - i);
    let shift = 0;
    while (row.mean >> (FINER + shift) > MOST_GIVEN_MEAN) shift++;
    const level = GIVEN_LEVEL_OF[row.mean >> (FINER + shift)]!;
    for (let lane = 0; lane < lanes; lane++) {
      coder.lane = lane;
      const value = integerAt(row, i + lane);
      const high = Math.abs(value) >> shift;
      symbols[lane] = coder.given(level, high > MOST_GIVEN ? OTHER : value < 0 ? -high : high);
    }
    let sum = 0;
    for (let lane = 0; lane < lanes; lane++) {
      coder.lane = lane;
      sum += Math.abs(codeRest(coder, row, i + lane, symbols[lane]!, shift));
    }
    row.mean += (sum * (MEAN_UNIT << FINER) - lanes * row.mean) >> slowness(i, 6);
  }
  coder.lane = 0;
}

/** Low bits of an integer that a symbol of given frequencies leaves out. @param shift bits that it leaves out */
function codeRest(coder: Coder, row: Integers, i: number, symbol: number, shift: number): number {
  const value = integerAt(row, i);
  const magnitude = Math.abs(value);
  const other = symbol === OTHER;
  let found = other ? -OTHER + codeNumber(coder, MORE, (magnitude >> shift) + OTHER) : Math.abs(symbol);
  check(row, i, found);
  if (shift > 0) found = (found << shift) | coder.bits(shift, magnitude);
  check(row, i, found);
  const signed = !other && symbol !== 0;
  const negative = signed ? symbol < 0 : found > 0 && coder.bits(1, Number(value < 0)) > 0;
  return put(row, i, negative ? -found : found, value);
}

function integerAt({ section, dtype, from }: Integers, i: number): number {
  return dtype === "int8" ? (section[from + i]! << 24) >> 24 : quantizedAt(section, dtype, from, i);
}

/** Refuses a magnitude beyond the type's: before a shift, which takes the highest bits away, and behind it. */
function check({ dtype, from, refuse }: Integers, i: number, magnitude: number): void {
  const bits = BITS[dtype];
  if (magnitude >= 1 << (bits - 1)) refuse(FAULT.magnitude, from + Math.floor((i * bits) / 8));
}

/** Writes an integer where another is. */
function put({ section, dtype, from }: Integers, i: number, value: number, given: number): number {
  if (value !== given) setInteger(section, BITS[dtype], from, i, value);
  return value;
}

/** The upper byte of a scale, by the difference to what is likely. */
function codeUpper(coder: Coder, byte: number, likely: number): number {
  const difference = byte - likely;
  const folded = codeNumber(coder, SCALE, difference < 0 ? -2 * difference - 1 : 2 * difference);
  return (likely + (folded & 1 ? -(folded + 1) / 2 : folded / 2)) & 255;
}

/** @param mean expected of its magnitude, in 1/64 */
function codeInteger(coder: Coder, mean: number, row: Integers, i: number): number {
  const value = integerAt(row, i);
  const magnitude = Math.abs(value);
  let shift = 0;
  while (mean >> shift > MOST_MEAN) shift++;
  let found = coder.symbol(shift * TABLES_OF_A_SHIFT + LEVEL_OF[mean >> shift]!, Math.min(magnitude >> shift, ESCAPE));
  if (found === ESCAPE) found += codeNumber(coder, MORE, (magnitude >> shift) - ESCAPE);
  check(row, i, found);
  if (shift > 0) found = (found << shift) | coder.bits(shift, magnitude & ((1 << shift) - 1));
  check(row, i, found);
  return put(row, i, found && coder.bits(1, Number(value < 0)) ? -found : found, value);
}

// Tables of coded sections (SPEC.md, appendix A): frequencies that adapt, and those that a section gives where integers
// are many.

/** Bits of a frequency, and of a word. */
export const FREQUENCY_BITS = 15;
export const WORD_BITS = 16;
/** Symbols of a table; the last of an integer's says that more follows. */
export const SYMBOLS = 8;
const ESCAPE: number = SYMBOLS - 1;
/** No frequency falls below about this. */
const LEAST = 16;
/** Adaptation rate of a table by the number of its uses, as a power of 2. */
const STEPS: Uint8Array = Uint8Array.from({ length: 41 }, (_, used) =>
  used < 4 ? 4 : used < 12 ? 5 : used < 40 ? 6 : 7,
);

/** Sum of the frequencies above the likeliest symbol when all others have the least. */
const RAISED = (1 << FREQUENCY_BITS) - SYMBOLS * LEAST;

/**
 * First tables, by the level of a mean magnitude (`LEVELS`): 2^15 times the probability that a value of a normal
 * distribution with such a mean magnitude, rounded, is at most 0, 1, … 6.
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

/** The same for given frequencies. */
const GIVEN_FROM: readonly number[] = [3, 6, 10, 16, 24, 34, 46, 62, 83, 112, 150, 205, 280, 380];
export const GIVEN_LEVELS: number = GIVEN_FROM.length + 1;
const MOST_GIVEN_MEAN = 512;
/** Means of rows are finer there, in 1/1024: 2^4 of these are 1/64. */
const FINER = 4;
/** Bits of a given frequency. */
export const GIVEN_BITS = 11;
/** Symbols of given frequencies: integers from −15 to 15, and one for all others. */
export const MOST_GIVEN = 15;
const OTHER: number = -MOST_GIVEN - 1;
/** Numbers of a level in `Frequencies`. */
export const GIVEN: number = MOST_GIVEN + 2;
/** Places of a level in the order of its symbols: 0, 1, −1, … 15, −15, one that nothing has, OTHER. */
export const GIVEN_SYMBOLS: number = 2 * MOST_GIVEN + 3;

/**
 * [levels, 17]: of 2^11 integers at a level, how many are 0, how many are 1 and as many −1, and so on to 15; how many
 * are none of these.
 */
export type Frequencies = Uint16Array<ArrayBuffer>;

/** Place of a symbol of given frequencies in their order. */
export function placeOfGiven(symbol: number): number {
  return symbol > 0 ? 2 * symbol - 1 : -2 * symbol;
}

/** The symbol at a place. */
function symbolAt(place: number): number {
  return place & 1 ? (place + 1) >> 1 : -(place >> 1);
}

/** [levels, 34]: of each level, the sum of the frequencies of all symbols in front of the i-th. */
export function givenSums(frequencies: Frequencies): Uint16Array<ArrayBuffer> {
  const sums = new Uint16Array(GIVEN_LEVELS * (GIVEN_SYMBOLS + 1));
  for (let level = 0, at = 0; level < GIVEN_LEVELS; level++, at++)
    for (let i = 0; i < GIVEN_SYMBOLS; i++, at++) {
      const [magnitude, other] = [(i + 1) >> 1, i === GIVEN_SYMBOLS - 1];
      const own = magnitude <= MOST_GIVEN || other ? frequencies[level * GIVEN + magnitude]! : 0;
      sums[at + 1] = sums[at]! + own;
    }
  return sums;
}

/** Levels of means in 1/64. */
const LEVEL_OF: Uint8Array = levelsOf(LEVELS, MOST_MEAN);
const GIVEN_LEVEL_OF: Uint8Array = levelsOf(GIVEN_FROM, MOST_GIVEN_MEAN);

function levelsOf(begins: readonly number[], most: number): Uint8Array {
  return Uint8Array.from({ length: most + 1 }, (_, mean) => begins.filter((begin) => begin <= mean).length);
}

/** Tables: of integers by level and bits left out, one for each other kind of number, and those of bytes. */
const SHIFTS = 6;
const TABLES_OF_A_SHIFT: number = FIRST.length;
const INTEGERS = SHIFTS * FIRST.length;
const MORE = INTEGERS;
const SCALE: number = INTEGERS + 1;
const FINE: number = INTEGERS + 2;
const SHAPE = INTEGERS + 3;
const FREQUENCY: number = INTEGERS + 4;
const LITERALS = INTEGERS + 5;
const LENGTH = INTEGERS + 6;
const DISTANCE = INTEGERS + 7;
/** Tables from this one on move four times as far, since their use is not known before. */
const QUICK = FREQUENCY;
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

/** Initial values of all tables. */
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

// The reading half: in one pass, in pieces, by WebAssembly where there is some. Either decoder says the same of a
// section that breaks a rule.

/** First tables as `coded-wasm.ts` wants them. */
export const FIRST_TABLES: CodedWork["tables"] = [FIRST_SUMS, LEVEL_OF, GIVEN_LEVEL_OF];

/** Where a section lies, for messages, and how it is decoded. */
export interface Decoding {
  readonly file: string;
  readonly part: string;
  /**
   * Bytes that copies may repeat, in addition to the section itself: of bases and task blobs the basis description.
   * Default: nothing.
   */
  readonly before?: Uint8Array;
  /** Bytes that it must become. Default: what it says. */
  readonly expected?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Pauses of the work around it, so that its pieces are counted together. Default: its own. */
  readonly pause?: Pause | undefined;
  /** Default: WebAssembly where there is some. */
  readonly by?: typeof wasmWork;
}

/**
 * A task blob, decoded where it is coded.
 * @param how with the description of its basis
 * @throws FormatError as `decodeSection`
 */
export async function plainTask(blob: Uint8Array, how: Decoding): Promise<Uint8Array> {
  return isCoded(blob) ? decodeSection(blob, how) : blob;
}

/**
 * The directory as it was, with the places of sections in it, which it does not say while it is coded.
 * @param stored bytes of the right length and checksum
 * @throws FormatError when it is damaged, or says places
 */
export async function plainDirectory(
  { bytes, file, part }: Fields,
  superblock: Superblock,
  pause: Pause,
): Promise<Fields> {
  // All of a directory is read at once, so that it may not grow as bases and tasks may.
  const coded: Fields = new Fields(bytes, file, part);
  const size = bytes.length < CODED_HEAD_BYTES ? 0 : coded.u32(4);
  if (size > MOST_CODED_DIRECTORY)
    coded.fail(`it is coded, and becomes ${size} bytes, at most ${MOST_CODED_DIRECTORY} are allowed`);
  const f: Fields = new Fields(await decodeSection(bytes, { file, part, pause }), file, part);
  const view = new DataView(f.bytes.buffer);
  const { directoryOffset, directoryLength, basesOffset } = superblock;
  let end = WINDOW_BYTES;
  const count = f.bytes.length < DIRECTORY_HEAD_BYTES ? 0 : f.u32(0);
  for (let i = 0; i < count; i++) {
    const at = DIRECTORY_HEAD_BYTES + i * SECTION_ENTRY_BYTES;
    if (at + SECTION_ENTRY_BYTES > f.bytes.length) f.fail(`${f.bytes.length} bytes for ${count} sections`);
    if (f.u64(at + 8) !== 0) f.fail(`it is coded, and section ${i} says that it starts at ${f.u64(at + 8)}`);
    if (align64(end) === directoryOffset) end = directoryOffset + directoryLength;
    const bases = [SECTION_BASES, SECTION_BASES + SECTION_CODED].includes(f.u32(at));
    const offset = bases ? basesOffset : align64(end);
    view.setUint32(at + 8, offset >>> 0, true);
    view.setUint32(at + 12, offset / 2 ** 32, true);
    end = offset + f.u64(at + 16);
    if (i % 4096 === 4095) await pause();
  }
  return f;
}

/**
 * A coded section or directory as it was, in one pass. Long work lets others have a turn.
 * @throws FormatError when it is no such section, or damaged, saying where; the reason of `signal`, once it is aborted
 */
export async function decodeSection(
  bytes: Uint8Array,
  { file, part, before = new Uint8Array(), expected, signal, pause, by = wasmWork }: Decoding,
): Promise<Uint8Array<ArrayBuffer>> {
  const sound = (condition: boolean, what: string): void => {
    if (!condition) throw new FormatError(`as it is coded, ${what}`, { file, part });
  };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const whole = bytes.length >= CODED_HEAD_BYTES + 4 && bytes.length % 2 === 0;
  sound(whole, "it is not whole: the file is damaged");
  sound(view.getUint32(0, true) === CODED_MAGIC, "it is damaged, or of another version: pack the adapters again");
  const size = view.getUint32(4, true);
  sound(size <= mostDecoded(bytes.length), `it says that it becomes ${size} bytes, of ${bytes.length} that are stored`);
  sound(expected === undefined || size === expected, `it becomes ${size} bytes, its tensors need ${expected}`);
  const refuse: Refuse = (fault, at) => {
    const where = fault.endsWith(" at") ? ` byte ${at} of the ${size} that it becomes` : "";
    sound(false, `${fault}${where}: the file is damaged, fetch it again`);
    throw new RangeError();
  };
  const work: CodedWork = {
    ...{ stored: bytes, before, size, tables: FIRST_TABLES },
    refuse: (fault, at) => refuse(Object.values(FAULT)[fault - 1]!, at),
  };
  return (size < SMALL ? small : large).change(async () => {
    throwIfAborted(signal);
    return paced(by(work) ?? scriptWork(work, refuse), pause ?? pacer(signal));
  });
}

/**
 * One section after the other: side by side they would take as long, and a memory each. Small ones do not wait for
 * large ones.
 */
const [small, large] = [new Changes(), new Changes()];
const SMALL = 1 << 20;

/** The same as `wasmWork`, for engines without WebAssembly. */
function* scriptWork({ stored, before, size }: CodedWork, refuse: Refuse): Generator<void, Uint8Array<ArrayBuffer>> {
  const section = new Uint8Array(size);
  const decoder = new Decoder(stored, refuse);
  yield* code(decoder, section, refuse, before);
  decoder.end();
  return section;
}

class Decoder implements Coder {
  readonly #view: DataView;
  readonly #refuse: Refuse;
  readonly #tables = new Tables();
  /** A state for each lane. An array, since engines keep numbers above 2^30 apart from objects. */
  readonly #states = new Int32Array(LANES).fill(1 << WORD_BITS);
  /** [levels, 2^11]: a symbol, above its frequency, above a number's distance to the first that stands for it. */
  #given = new Int32Array(0);
  #at = CODED_HEAD_BYTES;
  lane = 0;

  constructor(bytes: Uint8Array, refuse: Refuse) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#refuse = refuse;
    this.#begin(0);
  }

  #begin(lane: number): void {
    this.#states[lane] = (this.#word() << WORD_BITS) | this.#word();
    if (this.#states[lane]! >>> WORD_BITS === 0) this.#refuse(FAULT.state, 0);
  }

  give(frequencies: Frequencies): void {
    const sums = givenSums(frequencies);
    this.#given = new Int32Array(GIVEN_LEVELS << GIVEN_BITS);
    for (let level = 0, at = 0; level < GIVEN_LEVELS; level++, at++)
      for (let i = 0; i < GIVEN_SYMBOLS; i++, at++) {
        const [start, end] = [sums[at]!, sums[at + 1]!];
        const entry = (symbolAt(i) << (2 * GIVEN_BITS + 1)) | ((end - start) << GIVEN_BITS);
        for (let slot = start; slot < end; slot++) this.#given[(level << GIVEN_BITS) + slot] = entry | (slot - start);
      }
    for (let lane = 1; lane < LANES; lane++) this.#begin(lane);
  }

  given(level: number): number {
    const state = this.#states[this.lane]!;
    const entry = this.#given[(level << GIVEN_BITS) + (state & ((1 << GIVEN_BITS) - 1))]!;
    const frequency = (entry >> GIVEN_BITS) & ((2 << GIVEN_BITS) - 1);
    this.#take((Math.imul(frequency, state >>> GIVEN_BITS) + (entry & ((1 << GIVEN_BITS) - 1))) | 0);
    return entry >> (2 * GIVEN_BITS + 1);
  }

  symbol(table: number): number {
    const { sums } = this.#tables;
    const at = table * (SYMBOLS + 1);
    const state = this.#states[this.lane]!;
    const slot = state & ((1 << FREQUENCY_BITS) - 1);
    let symbol = 0;
    while (sums[at + symbol + 1]! <= slot) symbol++;
    const start = sums[at + symbol]!;
    this.#take((Math.imul(sums[at + symbol + 1]! - start, state >>> FREQUENCY_BITS) + slot - start) | 0);
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number): number {
    const state = this.#states[this.lane]!;
    this.#take((state >>> count) | 0);
    return state & ((1 << count) - 1);
  }

  /** All words were read, and the encoder's first states are left. */
  end(): void {
    if (this.#states.some((state) => state !== 1 << WORD_BITS) || this.#at !== this.#view.byteLength)
      this.#refuse(FAULT.late, 0);
  }

  #take(state: number): void {
    this.#states[this.lane] = state >>> WORD_BITS === 0 ? (state << WORD_BITS) | this.#word() : state;
  }

  #word(): number {
    if (this.#at >= this.#view.byteLength) this.#refuse(FAULT.early, 0);
    const word = this.#view.getUint16(this.#at, true);
    this.#at += 2;
    return word;
  }
}

/**
 * Entropy-coded sections (SPEC.md, appendix A): integers of tensors in as many bits as they are worth. Coding loses nothing: a
 * section is what it was, byte for byte, once decoded. The coder is rANS (J. Duda, "Asymmetric numeral systems", 2013) over
 * frequencies that adapt. `code` tells what is coded in which order, for both directions; the other half is `encode-coded.ts`.
 */
import { pacer } from "../pace.ts";
import {
  BITS,
  type QuantizedDtype,
  quantizedAt,
  rowBytes,
  scaleBytes,
  setInteger,
  tensorBytes,
} from "../tensor/dtypes.ts";
import {
  DISTANCE,
  ESCAPE,
  FINE,
  FREQUENCY_BITS,
  HIGH,
  LENGTH,
  LEVEL_OF,
  LITERALS,
  LOW,
  MEAN_UNIT,
  MIDDLE,
  MORE,
  MOST_MEAN,
  SCALE,
  SHAPE,
  SYMBOLS,
  TABLES_OF_A_SHIFT,
  Tables,
  WORD_BITS,
} from "./coded-tables.ts";
import { type Work, wasmWork } from "./coded-wasm.ts";
import { align64, Fields } from "./fields.ts";
import {
  CODED_MAGIC,
  DIRECTORY_HEAD_BYTES,
  SECTION_BASES,
  SECTION_CODED,
  SECTION_ENTRY_BYTES,
  type Superblock,
  WINDOW_BYTES,
} from "./format.ts";
import { check } from "./messagepack.ts";

/** In front of the words: magic, and the bytes of the section once decoded. */
export const CODED_HEAD_BYTES = 8;
/** What a section has at most once decoded. @param stored its bytes, coded */
export function mostDecoded(stored: number): number {
  return 16 * stored + 4096;
}

/** Milliseconds of decoding after which the others have a turn: half of what a page may take for a frame. */
const TURN = 8;
/** Symbols, or bytes of copies, between two looks at the clock where there is no WebAssembly. */
const PIECE = 1 << 12;
/** Rows, which may be short, between two such looks. */
const ROWS = 1 << 8;

/** What is wrong with a section, numbered as `assembly/coded.ts` does; those that have one name a place. */
const FAULTS = [
  "",
  "its words end too early",
  "it begins with a wrong state",
  "more bytes are announced than are left at",
  "more single bytes are announced than are left at",
  "a copy does not fit at",
  "a tensor of unknown type is announced at",
  "tensors do not fit at",
  "an integer is larger than its type allows at",
  "it does not end where its words do",
] as const;
const [EARLY, STATE, BYTES, LITERAL, COPY, TYPE, TENSORS, MAGNITUDE, LATE] = [1, 2, 3, 4, 5, 6, 7, 8, 9];

/** Throws for a fault at a byte of the section. */
type Refuse = (fault: number, at: number) => never;

/** Types of integers, by their code here. */
const TYPES: readonly QuantizedDtype[] = ["int8", "int4", "int3"];

/** Columns of more numbers than this are not remembered. */
const MOST_COLUMNS = 4096;
/** A copy of earlier bytes has at least so many. */
export const LEAST_COPY = 4;

/** Codes one value after another: a decoder returns what it read, an encoder what it was given. */
export interface Coder {
  /** 0 to 7, by a table. */
  symbol(table: number, value: number): number;
  /** The lowest `count` bits, at most 16. */
  bits(count: number, value: number): number;
}

/** Tensors of one shape and type, one behind the other. */
export interface TensorRun {
  readonly dtype: QuantizedDtype;
  readonly rows: number;
  readonly width: number;
  readonly count: number;
  /** Each begins at a multiple of it: 4 or 16. */
  readonly step: 4 | 16;
  /** Of the first. */
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
  return blob.length >= 4 && new DataView(blob.buffer, blob.byteOffset).getUint32(0, true) === CODED_MAGIC;
}

/** Where a section lies, for messages, and how it is decoded. */
export interface Decoding {
  readonly file: string;
  readonly part: string;
  /** What copies may be of beside the section itself: of bases and task blobs the basis description. Default: nothing. */
  readonly before?: Uint8Array;
  /** Bytes that it must become. Default: what it says. */
  readonly expected?: number | undefined;
  readonly signal?: AbortSignal | undefined;
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
  signal?: AbortSignal,
): Promise<Fields> {
  const f: Fields = new Fields(await decodeSection(bytes, { file, part, signal }), file, part);
  const view = new DataView(f.bytes.buffer);
  const { directoryOffset, directoryLength, basesOffset } = superblock;
  let end = WINDOW_BYTES;
  const count = f.bytes.length < DIRECTORY_HEAD_BYTES ? 0 : f.u32(0);
  for (let i = 0; i < count; i++) {
    const at = DIRECTORY_HEAD_BYTES + i * SECTION_ENTRY_BYTES;
    f.check(at + SECTION_ENTRY_BYTES <= f.bytes.length, () => `${f.bytes.length} bytes for ${count} sections`);
    f.check(f.u64(at + 8) === 0, () => `it is coded, and section ${i} says that it starts at ${f.u64(at + 8)}`);
    if (align64(end) === directoryOffset) end = directoryOffset + directoryLength;
    const bases = [SECTION_BASES, SECTION_BASES + SECTION_CODED].includes(f.u32(at));
    const offset = bases ? basesOffset : align64(end);
    view.setUint32(at + 8, offset >>> 0, true);
    view.setUint32(at + 12, offset / 2 ** 32, true);
    end = offset + f.u64(at + 16);
  }
  return f;
}

/**
 * A coded section or directory as it was, in one pass. Long work lets others have a turn.
 * @throws FormatError when it is no such section, or damaged, saying where; the reason of `signal`, once it is aborted
 */
export async function decodeSection(
  bytes: Uint8Array,
  { file, part, before = new Uint8Array(), expected, signal, by = wasmWork }: Decoding,
): Promise<Uint8Array<ArrayBuffer>> {
  const sound = (condition: boolean, what: string): void =>
    check(condition, file, part, () => `as it is coded, ${what}`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const whole = bytes.length >= CODED_HEAD_BYTES + 4 && bytes.length % 2 === 0;
  sound(whole && view.getUint32(0, true) === CODED_MAGIC, "it has no head: the file is damaged");
  const size = view.getUint32(4, true);
  sound(size <= mostDecoded(bytes.length), `it says that it becomes ${size} bytes, of ${bytes.length} that are stored`);
  sound(expected === undefined || size === expected, `it becomes ${size} bytes, its tensors need ${expected}`);
  const refuse: Refuse = (fault, at) => {
    const where = FAULTS[fault]!.endsWith(" at") ? ` byte ${at} of the ${size} that it becomes` : "";
    sound(false, `${FAULTS[fault]}${where}: the file is damaged, fetch it again`);
    throw new RangeError();
  };
  const work = by(bytes, before, size, refuse) ?? scriptWork(bytes, before, size, refuse);
  const pause = pacer(signal, TURN);
  while (!work.next()) {
    const turn = pause();
    if (turn) await turn;
  }
  return work.section();
}

/** The same as `wasmWork`, for engines without WebAssembly. */
function scriptWork(bytes: Uint8Array, before: Uint8Array, size: number, refuse: Refuse): Work {
  const section = new Uint8Array(size);
  let decoder: Decoder | undefined;
  let pieces: Generator<void> | undefined;
  return {
    next() {
      decoder ??= new Decoder(bytes, refuse);
      pieces ??= code(decoder, section, refuse, before);
      const { done = false } = pieces.next();
      if (done) decoder.end();
      return done;
    },
    section: () => section,
  };
}

/**
 * Codes a section, or fills one with what is decoded, in pieces. Bytes that belong to no run are copies of earlier ones, or stand as they are.
 * @param before see `Decoding`
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
    const dtype = TYPES[type] ?? refuse(TYPE, at);
    const rows = codeNumber(coder, SHAPE, run?.rows ?? 0);
    const width = codeNumber(coder, SHAPE, run?.width ?? 0);
    const count = codeNumber(coder, SHAPE, run?.count ?? 0);
    const step = coder.bits(1, Number(run?.step === 16)) ? 16 : 4;
    const bytes = Math.ceil(tensorBytes(dtype, rows, width) / step) * step;
    const end = at + (count - 1) * bytes + tensorBytes(dtype, rows, width);
    if (!(count > 0 && rows > 0 && end <= section.length)) refuse(TENSORS, at);
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
  if (end > section.length) refuse(BYTES, start);
  let at = start;
  let distance = 0;
  while (at < end) {
    let next = at;
    let copy: ReturnType<Plan["copyAt"]>;
    if (plan) while (next < end && !(copy = plan.copyAt(next, end))) next++;
    next = at + codeNumber(coder, LITERALS, next - at);
    if (next > end) refuse(LITERAL, at);
    for (; at < next; at++) {
      section[at] = codeByte(coder, section[at - 1] ?? 0, section[at]!);
      if (at % PIECE === 0) yield;
    }
    if (at === end) break;
    const length = LEAST_COPY + codeNumber(coder, LENGTH, (copy?.length ?? LEAST_COPY) - LEAST_COPY);
    distance = codeNumber(coder, DISTANCE, copy && copy.distance !== distance ? copy.distance : 0) || distance;
    if (!(distance > 0 && distance <= at + before.length && at + length <= end)) refuse(COPY, at);
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
  const [values, stride, bits] = [start + scaleBytes(dtype, rows), rowBytes(dtype, width), BITS[dtype]];
  const largest = 2 ** (bits - 1) - 1;
  let [before, likely] = [MEAN_UNIT, 0x3c];
  for (let row = 0; row < rows; row++) {
    if (row % ROWS === 0) yield;
    const [lower, upper] = [start + 2 * row, start + 2 * row + 1];
    likely = section[upper] = codeUpper(coder, section[upper]!, memory.scales[row]! || likely);
    memory.scales[row] = likely;
    section[lower] = coder.symbol(FINE, Number(section[lower] !== 0)) && coder.bits(8, section[lower]!);
    let mean = memory.rows[row]! < 0 ? before : memory.rows[row]!;
    const from = values + row * stride;
    for (let i = 0; i < width; i++) {
      const at = row * width + i;
      if (i % PIECE === PIECE - 1) yield;
      const column = memory.columns?.[at] ?? -1;
      const given = quantizedAt(section, dtype, from, i);
      const value = codeInteger(coder, column < 0 ? mean : (mean + column) >> 1, given, largest);
      if (value > largest) refuse(MAGNITUDE, from + ((i * bits) >> 3));
      if (value !== given) setInteger(section, bits, from, i, value);
      const seen = Math.abs(value) * MEAN_UNIT;
      if (memory.columns) memory.columns[at] = column < 0 ? (mean + seen) >> 1 : column + ((seen - column) >> 3);
      mean += (seen - mean) >> (i < 7 ? 3 : i < 15 ? 4 : 5);
    }
    before = memory.rows[row] = mean;
  }
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
  // Before a shift takes the highest bits away.
  if (found > largest) return largest + 1;
  if (shift > 0) found = (found << shift) | coder.bits(shift, magnitude & ((1 << shift) - 1));
  if (found > largest) return largest + 1;
  return found && coder.bits(1, Number(value < 0)) ? -found : found;
}

class Decoder implements Coder {
  readonly #view: DataView;
  readonly #refuse: Refuse;
  readonly #tables = new Tables();
  /** An array, since engines keep numbers above 2^30 apart from objects. */
  readonly #state = new Int32Array(1);
  #at = CODED_HEAD_BYTES;

  constructor(bytes: Uint8Array, refuse: Refuse) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#refuse = refuse;
    this.#state[0] = (this.#word() << WORD_BITS) | this.#word();
    if (this.#state[0] >>> WORD_BITS === 0) refuse(STATE, 0);
  }

  symbol(table: number): number {
    const { sums } = this.#tables;
    const at = table * (SYMBOLS + 1);
    const state = this.#state[0]!;
    const slot = state & ((1 << FREQUENCY_BITS) - 1);
    let symbol = 0;
    while (sums[at + symbol + 1]! <= slot) symbol++;
    const start = sums[at + symbol]!;
    this.#take((Math.imul(sums[at + symbol + 1]! - start, state >>> FREQUENCY_BITS) + slot - start) | 0);
    this.#tables.use(table, symbol);
    return symbol;
  }

  bits(count: number): number {
    const state = this.#state[0]!;
    this.#take((state >>> count) | 0);
    return state & ((1 << count) - 1);
  }

  /** All words were read, and the encoder's first state is left. */
  end(): void {
    if (this.#at !== this.#view.byteLength || this.#state[0] !== 1 << WORD_BITS) this.#refuse(LATE, 0);
  }

  #take(state: number): void {
    this.#state[0] = state >>> WORD_BITS === 0 ? (state << WORD_BITS) | this.#word() : state;
  }

  #word(): number {
    if (this.#at >= this.#view.byteLength) this.#refuse(EARLY, 0);
    const word = this.#view.getUint16(this.#at, true);
    this.#at += 2;
    return word;
  }
}

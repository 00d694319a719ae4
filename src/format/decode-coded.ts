/**
 * The reading half of coded sections (`coded.ts`): in one pass, in pieces, by WebAssembly where there is some. Either decoder says the same
 * of a section that breaks a rule.
 */
import { FormatError } from "../errors.ts";
import { Changes, type Pause, paced, pacer, throwIfAborted } from "../pace.ts";
import {
  CODED_HEAD_BYTES,
  type Coder,
  code,
  FAULT,
  FREQUENCY_BITS,
  type Frequencies,
  GIVEN_BITS,
  GIVEN_LEVELS,
  GIVEN_SYMBOLS,
  givenSums,
  isCoded,
  LANES,
  MOST_CODED_DIRECTORY,
  mostDecoded,
  type Refuse,
  SYMBOLS,
  symbolAt,
  Tables,
  WORD_BITS,
} from "./coded.ts";
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

/** The same in words, by number; those that have a place end before it. */
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
  "too large frequencies are given at",
] as const;

/** Where a section lies, for messages, and how it is decoded. */
export interface Decoding {
  readonly file: string;
  readonly part: string;
  /** Bytes that copies may repeat, in addition to the section itself: of bases and task blobs the basis description. Default: nothing. */
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
  const another =
    "it begins otherwise: the file is damaged, or of another version, and its adapters must be packed again";
  sound(view.getUint32(0, true) === CODED_MAGIC, another);
  const size = view.getUint32(4, true);
  sound(size <= mostDecoded(bytes.length), `it says that it becomes ${size} bytes, of ${bytes.length} that are stored`);
  sound(expected === undefined || size === expected, `it becomes ${size} bytes, its tensors need ${expected}`);
  const refuse: Refuse = (fault, at) => {
    const where = FAULTS[fault]!.endsWith(" at") ? ` byte ${at} of the ${size} that it becomes` : "";
    sound(false, `${FAULTS[fault]}${where}: the file is damaged, fetch it again`);
    throw new RangeError();
  };
  return (size < SMALL ? small : large).change(async () => {
    throwIfAborted(signal);
    const work = (await by(bytes, before, size, refuse)) ?? scriptWork(bytes, before, size, refuse);
    const pieces = function* (): Generator<void, Uint8Array<ArrayBuffer>> {
      while (!work.next()) yield;
      return yield* work.section();
    };
    return paced(pieces(), pause ?? pacer(signal));
  });
}

/** One section after the other: side by side they would take as long, and a memory each. Small ones do not wait for large ones. */
const [small, large] = [new Changes(), new Changes()];
const SMALL = 1 << 20;

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
    *section() {
      yield;
      return section;
    },
  };
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

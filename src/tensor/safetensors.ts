/**
 * The safetensors format (github.com/huggingface/safetensors, "Format"): 8 bytes of header length, a JSON header, raw
 * little-endian tensors. The reader trusts nothing: every rule of the reference's `validate` is checked before a tensor
 * is read. It does not know what the tensors mean. `TensorFile` is what readers of other formats give, too.
 */
import { FormatError, isPlain, SourceError } from "../errors.ts";
import { paced, pacer } from "../pace.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import { fromUtf8 } from "../text.ts";
import { type FloatDtype, readFloats } from "./dtypes.ts";

/** Facts about a tensor before it is read. */
export interface TensorInfo {
  /** "F32", "BF16", "I64", …; in GGUF also "Q8_0" and others. */
  readonly dtype: string;
  /** Row-major: the last dimension is the one whose elements lie side by side. */
  readonly shape: readonly number[];
}

/** Tensors by name, each read on demand. */
export interface TensorFile {
  /** Name of the source, for messages. */
  readonly name: string;
  /** Size of the whole file. */
  readonly byteLength: number;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /**
   * A tensor's values as f32, row-major. F16, BF16 and Q8_0 are exact, F64 is rounded.
   * @throws FormatError when there is no such tensor or its dtype is none of these and F32; SourceError when the bytes
   *   cannot be had
   */
  readF32(name: string, options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** True if `readF32` decodes this dtype. */
export function isFloatDtype(dtype: string): boolean {
  return dtype === "F32" || dtype === "F16" || dtype === "BF16" || dtype === "F64" || dtype === "Q8_0";
}

/** Where one tensor lies. */
interface SafetensorsTensor extends TensorInfo {
  /** Counted from the beginning of the file. */
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** An opened file: names and places of its tensors, values on demand. */
export interface SafetensorsFile extends TensorFile {
  /** Tensors in the order of the header. */
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;
  /** `__metadata__` of the header. */
  readonly metadata: ReadonlyMap<string, string>;
  /**
   * The tensor's bytes, as they are in the file. May be a view of shared memory: do not write to it.
   * @throws FormatError when there is no such tensor; SourceError when the bytes cannot be had
   */
  read(name: string, options?: ReadOptions): Promise<Uint8Array>;
}

/** Options of reading a header. */
interface HeaderOptions extends ReadOptions {
  /** Most bytes of the header. Default: 10 000 000, some 70 000 tensors; the format allows 100 000 000. */
  readonly maxHeaderBytes?: number | undefined;
}

const MAX_HEADER_BYTES = 10_000_000;
/** Cap of the format. */
const FORMAT_BYTES = 100_000_000;
/** Most bytes of what the header says of a tensor. A text of its metadata may take half of it. */
const MAX_ENTRY_BYTES = 2 ** 16;

/** Bits of one element, by dtype. */
export const SAFETENSORS_BITS: ReadonlyMap<string, number> = new Map([
  ...["F64", "I64", "U64", "C64"].map((dtype) => [dtype, 64] as const),
  ...["F32", "I32", "U32"].map((dtype) => [dtype, 32] as const),
  ...["F16", "BF16", "I16", "U16"].map((dtype) => [dtype, 16] as const),
  ...["F8_E5M2", "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL"].map((dtype) => [dtype, 8] as const),
  ...["F6_E2M3", "F6_E3M2"].map((dtype) => [dtype, 6] as const),
  ["F4", 4],
]);

/** Bytes of a tensor, or undefined when it is not a whole number of bytes or not a safe integer. */
export function tensorByteLength(bits: number, shape: readonly number[]): number | undefined {
  let count = 1;
  for (const size of shape) {
    count *= size;
    if (!Number.isSafeInteger(count)) return undefined;
  }
  const total = count * bits;
  return Number.isSafeInteger(total) && total % 8 === 0 ? total / 8 : undefined;
}

/**
 * Reads and checks the header; tensors are read later, one range each.
 * @throws FormatError when a rule of the format is broken, naming the tensor, what was expected and what was found
 * @throws SourceError when the bytes cannot be had
 */
export async function openSafetensors(source: ByteSource, options: HeaderOptions = {}): Promise<SafetensorsFile> {
  const file = source.name;
  const { maxHeaderBytes = MAX_HEADER_BYTES } = options;
  const fail = (part: string, message: string, cause?: unknown): FormatError =>
    new FormatError(message, { file, part, cause });

  if (source.byteLength !== undefined && source.byteLength < 8) {
    throw fail("header", `has ${source.byteLength} bytes, a safetensors file has at least 8; download it again`);
  }
  const prefix = await source.read(0, 8, options);
  const byteLength = source.byteLength;
  if (byteLength === undefined) throw new SourceError("does not say its size after the first read", { file });

  const prefixView = new DataView(prefix.buffer, prefix.byteOffset, 8);
  const headerLength = prefixView.getUint32(0, true) + prefixView.getUint32(4, true) * 2 ** 32;
  if (headerLength > FORMAT_BYTES) {
    throw fail("header", `is larger than the ${FORMAT_BYTES} bytes that are allowed; not a safetensors file`);
  }
  if (8 + headerLength > byteLength) {
    const end = 8 + headerLength;
    throw fail("header", `ends at byte ${end}, but the file has ${byteLength}; truncated, download it again`);
  }
  if (headerLength > maxHeaderBytes) {
    const most = `at most ${maxHeaderBytes} are read; save its tensors in several files`;
    throw fail("header", `has ${headerLength} bytes, ${most}`);
  }
  const header = await source.read(8, headerLength, options);
  const { tensors, metadata } = await paced(
    parseHeader(header, byteLength, maxHeaderBytes / 2, fail),
    pacer(options.signal),
  );

  const find = (name: string): SafetensorsTensor => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw fail(`tensor ${name}`, `is not in the file, which holds ${tensors.size} tensors`);
    return tensor;
  };
  const read = async (name: string, readOptions?: ReadOptions): Promise<Uint8Array> => {
    const { byteOffset, byteLength: length } = find(name);
    return length === 0 ? new Uint8Array(0) : source.read(byteOffset, length, readOptions);
  };
  return {
    name: file,
    byteLength,
    tensors,
    metadata,
    read,
    async readF32(name, readOptions) {
      const { dtype } = find(name);
      if (!isFloatDtype(dtype)) {
        throw fail(`tensor ${name}`, `is ${dtype}, expected F32, F16, BF16 or F64; convert it to one of these`);
      }
      return decodeFloats(dtype, await read(name, readOptions));
    },
  };
}

type Fail = (part: string, message: string, cause?: unknown) => FormatError;

/** Reads what there is of each tensor by itself, in pieces: all at once 10 MB would take 100 ms. */
function* parseHeader(
  bytes: Uint8Array,
  byteLength: number,
  mostText: number,
  fail: Fail,
): Generator<void, Pick<SafetensorsFile, "tensors" | "metadata">> {
  const tensors = new Map<string, SafetensorsTensor>();
  const metadata = new Map<string, string>();
  const dataStart = 8 + bytes.length;
  if (bytes[0] !== 0x7b) throw fail("header", `does not begin with "{"; not a safetensors file`);
  const text = new JsonBytes(bytes, fail);
  for (const name of text.members()) {
    if (name === "__metadata__") {
      if (text.next() !== "{") throw fail(name, "is not a JSON object");
      for (const key of text.members()) {
        yield;
        const value = text.value(mostText, `${name}, ${key}`);
        if (typeof value !== "string") throw fail(name, `${key} is ${show(value)}, expected a string`);
        if (metadata.has(key)) throw fail("header", `names ${show(key)} twice; damaged, download it again`);
        metadata.set(key, value);
      }
    } else {
      if (tensors.has(name)) throw fail("header", `names ${show(name)} twice; damaged, download it again`);
      tensors.set(name, checkTensor(name, text.value(MAX_ENTRY_BYTES, `tensor ${name}`), dataStart, fail));
    }
    yield;
  }
  text.end();
  yield* checkCoverage(tensors, dataStart, byteLength, fail);
  return { tensors, metadata };
}

/** No file that is read here needs more; code that walks what was read may be recursive. */
const MAX_DEPTH = 64;

/**
 * The value of a JSON text.
 * @throws SyntaxError for what is not JSON, is nested deeper than 64 levels, or has an object that names a key twice:
 *   `JSON.parse` keeps the last
 */
export function parseJson(text: string): unknown {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new SyntaxError(`is not valid JSON: ${(cause as Error).message}`, { cause });
  }
  checkKeys(text);
  return value;
}

/** @param text valid JSON */
function checkKeys(text: string): void {
  /** Keys of the objects around a place, undefined for arrays. */
  const around: (Set<string> | undefined)[] = [];
  let string = "";
  let escaped = false;
  for (let at = 0; at < text.length; at++) {
    switch (text[at]) {
      case '"': {
        const start = at++;
        escaped = false;
        for (; text[at] !== '"'; at++) {
          if (text[at] !== "\\") continue;
          escaped = true;
          at++;
        }
        string = text.slice(start, at + 1);
        break;
      }
      case ":": {
        const keys = around[around.length - 1]!;
        const key = escaped ? (JSON.parse(string) as string) : string.slice(1, -1);
        if (keys.has(key)) throw new SyntaxError(`names ${show(key)} twice`);
        keys.add(key);
        break;
      }
      case "{":
      case "[":
        around.push(text[at] === "{" ? new Set() : undefined);
        if (around.length > MAX_DEPTH) throw new SyntaxError(`is nested deeper than ${MAX_DEPTH} levels`);
        break;
      case "}":
      case "]":
        around.pop();
    }
  }
}

/** A value of JSON for a message, cut short: a file can hold anything. */
export function show(value: unknown): string {
  let text: string;
  try {
    text = JSON.stringify(value) ?? "missing";
  } catch {
    // A caller may parse by other means: too deep for the stack, or no JSON at all.
    return typeof value;
  }
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}

/** A JSON text whose values are parsed one after the other. */
class JsonBytes {
  #at = 0;
  readonly #bytes: Uint8Array;
  readonly #fail: Fail;

  constructor(bytes: Uint8Array, fail: Fail) {
    this.#bytes = bytes;
    this.#fail = fail;
  }

  /** The letter that comes next; "" at the end. */
  next(): string {
    while ([0x20, 0x09, 0x0a, 0x0d].includes(this.#bytes[this.#at]!)) this.#at++;
    return this.#at < this.#bytes.length ? String.fromCharCode(this.#bytes[this.#at]!) : "";
  }

  /** The names in an object. The caller takes the value of each. */
  *members(): Generator<string> {
    this.#take("{");
    if (this.next() !== "}") {
      for (;;) {
        if (this.next() !== '"') this.#invalid(`a name in quotes is missing at byte ${this.#at}`);
        const name = this.value(MAX_ENTRY_BYTES, "a name") as string;
        this.#take(":");
        yield name;
        if (this.next() !== ",") break;
        this.#take(",");
      }
    }
    this.#take("}");
  }

  /** Nothing but white space is left. */
  end(): void {
    if (this.next() !== "") this.#invalid(`it goes on behind its object, at byte ${this.#at}`);
  }

  /** The next value. @param what it is called where it has more than `most` bytes */
  value(most: number, what: string): unknown {
    this.next();
    const start = this.#at;
    const end = this.#endOf(Math.min(this.#bytes.length, start + most + 1));
    if (end - start > most)
      throw this.#fail(what, `takes more than ${most} bytes of the header; not a safetensors file`);
    this.#at = end;
    let text: string;
    try {
      text = fromUtf8(this.#bytes.subarray(start, end));
    } catch (cause) {
      throw this.#fail("header", "is not UTF-8; damaged, download it again", cause);
    }
    try {
      return parseJson(text);
    } catch (cause) {
      throw this.#fail("header", `${(cause as Error).message}; damaged, download it again`, cause);
    }
  }

  /** Where the value ends that begins here: its brackets close, or what is around it goes on. */
  #endOf(stop: number): number {
    let depth = 0;
    for (let at = this.#at; at < stop; at++) {
      const byte = this.#bytes[at]!;
      if (byte === 0x22) {
        for (at++; at < stop && this.#bytes[at] !== 0x22; at++) if (this.#bytes[at] === 0x5c) at++;
        if (depth === 0) return Math.min(stop, at + 1);
      } else if (byte === 0x7b || byte === 0x5b) depth++;
      else if (byte === 0x7d || byte === 0x5d) {
        if (depth < 2) return at + depth;
        depth--;
      } else if (depth === 0 && (byte === 0x2c || byte === 0x3a || byte <= 0x20)) return at;
    }
    return stop;
  }

  #take(letter: string): void {
    if (this.next() !== letter) this.#invalid(`"${letter}" is missing at byte ${this.#at}`);
    this.#at++;
  }

  #invalid(message: string): never {
    throw this.#fail("header", `is not valid JSON: ${message}; damaged, download it again`);
  }
}

export function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function checkTensor(name: string, value: unknown, dataStart: number, fail: Fail): SafetensorsTensor {
  const part = `tensor ${name}`;
  if (!isPlain(value)) throw fail(part, `is ${show(value)}, expected {dtype, shape, data_offsets}`);
  const { dtype, shape, data_offsets: offsets } = value;
  const bits = typeof dtype === "string" ? SAFETENSORS_BITS.get(dtype) : undefined;
  if (bits === undefined) {
    throw fail(part, `has dtype ${show(dtype)}, expected one of ${[...SAFETENSORS_BITS.keys()].join(", ")}`);
  }
  if (!Array.isArray(shape) || !shape.every(isSize)) {
    throw fail(part, `has shape ${show(shape)}, expected an array of integers ≥ 0`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize) || offsets[0]! > offsets[1]!) {
    throw fail(part, `has data_offsets ${show(offsets)}, expected [begin, end] with 0 ≤ begin ≤ end`);
  }
  const expected = tensorByteLength(bits, shape);
  const found = offsets[1]! - offsets[0]!;
  if (expected === undefined) {
    throw fail(part, `${dtype} [${shape.join(", ")}] overflows or is not a whole number of bytes; save the file again`);
  }
  if (expected !== found) {
    throw fail(part, `${dtype} [${shape.join(", ")}] takes ${expected} bytes, but its data_offsets span ${found}`);
  }
  return { dtype: dtype as string, shape, byteOffset: dataStart + offsets[0]!, byteLength: found };
}

/** Tensors lie one after another, without overlap or hole, up to the last byte: no byte is hidden or read twice. */
function* checkCoverage(
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  dataStart: number,
  byteLength: number,
  fail: Fail,
): Generator<void> {
  // The next tensor is looked up by the end of the last: sorting as many as a header may have is one long piece of
  // work.
  const ends = new Map<number, number>();
  const empty = new Set<number>();
  let wrong = Infinity;
  let count = 0;
  for (const { byteOffset, byteLength: length } of tensors.values()) {
    if (++count % 256 === 0) yield;
    if (length === 0) empty.add(byteOffset);
    else if (ends.has(byteOffset)) wrong = Math.min(wrong, byteOffset);
    else ends.set(byteOffset, byteOffset + length);
  }
  let end = dataStart;
  empty.delete(end);
  for (let next = ends.get(end); next !== undefined; next = ends.get(end)) {
    if (++count % 256 === 0) yield;
    ends.delete(end);
    end = next;
    empty.delete(end);
  }
  for (const begins of [ends.keys(), empty]) for (const begin of begins) wrong = Math.min(wrong, begin);
  yield;
  if (wrong < Infinity) {
    let name: string | undefined;
    let expected = end;
    for (const [other, { byteOffset, byteLength: length }] of tensors) {
      if (++count % 256 === 0) yield;
      if (byteOffset === wrong && name === undefined) name = other;
      else if (byteOffset <= wrong && byteOffset + length > wrong) expected = byteOffset + length;
    }
    const what = wrong < expected ? "it overlaps the one before" : "there is a hole before it";
    throw fail(`tensor ${name}`, `begins at byte ${wrong}, expected ${expected}: ${what}; save the file again`);
  }
  if (end > byteLength) {
    throw fail("tensors", `end at byte ${end}, but the file has ${byteLength}; truncated, download it again`);
  }
  if (end < byteLength) {
    const extra = byteLength - end;
    throw fail("tensors", `end at byte ${end}, but ${extra} more bytes follow; damaged, download the file again`);
  }
}

/** Little-endian F32, F64, F16 or BF16 as f32. */
export function decodeFloats(dtype: string, bytes: Uint8Array): Float32Array<ArrayBuffer> {
  const out = new Float32Array(bytes.byteLength / (SAFETENSORS_BITS.get(dtype)! / 8));
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (dtype === "F64") for (let i = 0; i < out.length; i++) out[i] = view.getFloat64(8 * i, true);
  else readFloats(dtype.toLowerCase() as FloatDtype, bytes, 0, out.length, out);
  return out;
}

/** A tensor to write. */
export interface SafetensorsEntry {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Its bytes, little-endian, row-major. Called once, when the tensor's turn has come. */
  read(): Uint8Array | Promise<Uint8Array>;
}

/**
 * The bytes of a safetensors file, chunk by chunk: the header, then one tensor at a time, so that a file of any size is
 * written with one tensor in memory. Like the reference, wide dtypes come first and the header is padded to 8, so that
 * every tensor is aligned to its element.
 * @throws RangeError when an entry's name is taken or its dtype or shape invalid, or when it reads other than its size
 */
export async function* writeSafetensors(
  entries: readonly SafetensorsEntry[],
  metadata?: ReadonlyMap<string, string>,
): AsyncGenerator<Uint8Array, void> {
  const bitsOf = (entry: SafetensorsEntry): number => SAFETENSORS_BITS.get(entry.dtype) ?? 0;
  const inOrder = [...entries].sort((a, b) => bitsOf(b) - bitsOf(a) || (a.name < b.name ? -1 : 1));
  const names = new Set(["__metadata__"]);
  const lengths: number[] = [];
  const fields = metadata === undefined ? [] : [`"__metadata__":${JSON.stringify(Object.fromEntries(metadata))}`];
  let end = 0;
  for (const entry of inOrder) {
    const { name, dtype, shape } = entry;
    const length = shape.every(isSize) ? tensorByteLength(bitsOf(entry), shape) : undefined;
    if (names.has(name)) throw new RangeError(`writeSafetensors: two tensors or metadata are called ${name}`);
    if (length === undefined || !SAFETENSORS_BITS.has(dtype)) {
      throw new RangeError(`writeSafetensors: ${name} cannot be ${dtype} [${shape.join(", ")}]`);
    }
    names.add(name);
    lengths.push(length);
    fields.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [end, end + length] })}`);
    end += length;
  }
  const json = new TextEncoder().encode(`{${fields.join(",")}}`);
  const header = new Uint8Array(8 + 8 * Math.ceil(json.length / 8)).fill(0x20);
  new DataView(header.buffer).setBigUint64(0, BigInt(header.length - 8), true);
  header.set(json, 8);
  yield header;
  for (const [i, entry] of inOrder.entries()) {
    const bytes = await entry.read();
    if (bytes.byteLength !== lengths[i]) {
      throw new RangeError(`writeSafetensors: ${entry.name} takes ${lengths[i]} bytes, got ${bytes.byteLength}`);
    }
    yield bytes;
  }
}

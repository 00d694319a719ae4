/**
 * The GGUF format, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md): a header of typed fields, names and
 * places of the tensors, then their data. Trusts nothing: every length is checked against the file before it is used.
 * It does not know what the tensors mean.
 */
import { FormatError, SourceError } from "../errors.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import { elementsOf, f16ToF32 } from "./dtypes.ts";
import { decodeFloats, isFloatDtype, type TensorFile, type TensorInfo } from "./safetensors.ts";

/** A field of the header. Arrays are given by their length alone, since the words of a vocabulary are not needed. */
type GgufField = string | number | boolean | { readonly length: number };

/** A GGUF file: fields of the header, and tensors with their dimensions in the order that all other formats have. */
export interface GgufFile extends TensorFile {
  readonly fields: ReadonlyMap<string, GgufField>;
}

/** Where a tensor lies. */
interface GgufTensor extends TensorInfo {
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** "GGUF" */
const MAGIC = 0x46554747;
/** The header is read in pieces that grow, up to this: one of a model holds its vocabulary. */
const FIRST_BYTES = 64 * 1024;
const MOST_BYTES = 256 * 1024 * 1024;
const MOST_DIMS = 4;
const DEFAULT_ALIGNMENT = 32;

/** Bytes of a value and its reader, by the number of its type; strings are 8, arrays 9. */
const SIZES = [1, 1, 2, 2, 4, 4, 4, 1, NaN, NaN, 8, 8, 8];
const READERS = [
  ...(["getUint8", "getInt8", "getUint16", "getInt16", "getUint32", "getInt32", "getFloat32", "getUint8"] as const),
  ...([undefined, undefined, "getBigUint64", "getBigInt64", "getFloat64"] as const),
];
const BOOLEAN = 7;
const STRING = 8;
const ARRAY = 9;

/** Types of tensors that are read: name, elements of a block, bytes of a block. */
const TYPES: ReadonlyMap<number, readonly [dtype: string, elements: number, bytes: number]> = new Map([
  [0, ["F32", 1, 4]],
  [1, ["F16", 1, 2]],
  [8, ["Q8_0", 32, 34]],
  [28, ["F64", 1, 8]],
  [30, ["BF16", 1, 2]],
]);

/** The piece that was read is too short. */
class Short extends Error {}

/** Reads the header: little-endian, 8-byte counts. */
class Cursor {
  readonly bytes: Uint8Array;
  readonly #view: DataView;
  at = 0;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  #next(size: number): number {
    const start = this.at;
    // The comparison fails for lengths that are no safe integers too.
    if (!(start + size <= this.bytes.length)) throw new Short();
    this.at += size;
    return start;
  }

  u32(): number {
    return this.#view.getUint32(this.#next(4), true);
  }

  u64(): number {
    const at = this.#next(8);
    return this.#view.getUint32(at, true) + this.#view.getUint32(at + 4, true) * 2 ** 32;
  }

  skip(size: number): void {
    this.#next(size);
  }

  text(): string {
    const length = this.u64();
    const start = this.#next(length);
    return new TextDecoder("utf-8", { fatal: true }).decode(this.bytes.subarray(start, start + length));
  }

  scalar(type: number): number | boolean {
    const value = Number(this.#view[READERS[type]!](this.#next(SIZES[type]!), true));
    return type === BOOLEAN ? value !== 0 : value;
  }
}

type Fail = (part: string, message: string, cause?: unknown) => FormatError;

/**
 * Reads and checks the header; tensors are read later, one range each.
 * @throws FormatError when a rule of the format is broken, SourceError when the bytes cannot be had
 */
export async function openGguf(source: ByteSource, options?: ReadOptions): Promise<GgufFile> {
  const fail: Fail = (part, message, cause) => new FormatError(message, { file: source.name, part, cause });
  const { fields, tensors } = await readHeader(source, fail, options);
  return {
    name: source.name,
    byteLength: source.byteLength!,
    fields,
    tensors,
    async readF32(name, readOptions) {
      const tensor = tensors.get(name);
      if (tensor === undefined) throw fail(`tensor ${name}`, `is not in the file, which holds ${tensors.size} tensors`);
      const { dtype, byteOffset, byteLength } = tensor;
      if (!isFloatDtype(dtype)) {
        throw fail(`tensor ${name}`, `is ${dtype}, expected F32, F16, BF16, F64 or Q8_0; convert it to one of these`);
      }
      const bytes = byteLength === 0 ? new Uint8Array(0) : await source.read(byteOffset, byteLength, readOptions);
      return dtype === "Q8_0" ? decodeQ8(bytes) : decodeFloats(dtype, bytes);
    },
  };
}

type Header = Pick<GgufFile, "fields"> & { readonly tensors: ReadonlyMap<string, GgufTensor> };

async function readHeader(source: ByteSource, fail: Fail, options?: ReadOptions): Promise<Header> {
  if (source.byteLength !== undefined && source.byteLength < 24)
    throw fail("header", `has ${source.byteLength} bytes, a GGUF file has at least 24; download it again`);
  for (let length = 24; ; length = Math.max(FIRST_BYTES, 2 * length)) {
    const size = source.byteLength ?? Infinity;
    const cursor = new Cursor(await source.read(0, Math.min(length, size), options));
    if (source.byteLength === undefined)
      throw new SourceError("does not say its size after the first read", { file: source.name });
    try {
      return parseHeader(cursor, source.byteLength, fail);
    } catch (error) {
      if (!(error instanceof Short)) {
        if (error instanceof TypeError) throw fail("header", "holds text that is not UTF-8; damaged", error);
        throw error;
      }
      const damaged = "damaged or truncated, download it again";
      if (length >= source.byteLength) throw fail("header", `goes on behind the end of the file; ${damaged}`);
      if (length >= MOST_BYTES) throw fail("header", `has more than ${MOST_BYTES} bytes; ${damaged}`);
    }
  }
}

function parseHeader(cursor: Cursor, byteLength: number, fail: Fail): Header {
  if (cursor.u32() !== MAGIC) throw fail("header", `does not begin with "GGUF"; not a GGUF file`);
  const version = cursor.u32();
  if (version !== 2 && version !== 3)
    throw fail("header", `is of version ${version}, expected 2 or 3; convert it with a newer llama.cpp`);
  const tensorCount = cursor.u64();
  const fieldCount = cursor.u64();
  const fields = new Map<string, GgufField>();
  for (let i = 0; i < fieldCount; i++) {
    const name = cursor.text();
    if (fields.has(name)) throw fail(`field ${name}`, "is there twice; save the file again");
    fields.set(name, readField(cursor, name, fail));
  }
  const found = new Map<string, { shape: number[]; type: number; offset: number }>();
  for (let i = 0; i < tensorCount; i++) {
    const name = cursor.text();
    const dims = cursor.u32();
    if (dims > MOST_DIMS)
      throw fail(`tensor ${name}`, `has ${dims} dimensions, expected ${MOST_DIMS} at most; save the file again`);
    const shape = Array.from({ length: dims }, () => cursor.u64()).reverse();
    if (found.has(name)) throw fail(`tensor ${name}`, "is there twice; save the file again");
    found.set(name, { shape, type: cursor.u32(), offset: cursor.u64() });
  }
  const alignment = fields.get("general.alignment") ?? DEFAULT_ALIGNMENT;
  if (typeof alignment !== "number" || !Number.isSafeInteger(alignment) || alignment < 1)
    throw fail("general.alignment", "is no whole number from 1 on; save the file again");
  const start = Math.ceil(cursor.at / alignment) * alignment;
  const tensors = new Map<string, GgufTensor>();
  for (const [name, { shape, type, offset }] of found) {
    const tensor = place(shape, type, start + offset);
    const { dtype, byteOffset, byteLength: length } = tensor;
    const what = `${dtype} [${shape.join(", ")}]`;
    if (Number.isNaN(length)) throw fail(`tensor ${name}`, `${what} is not a whole number of blocks; save it again`);
    if (!(byteOffset + length <= byteLength) || offset % alignment !== 0)
      throw fail(
        `tensor ${name}`,
        `${what} at byte ${byteOffset} ends behind the file or is not aligned; download it again`,
      );
    tensors.set(name, tensor);
  }
  refuseOverlap(tensors, fail);
  return { fields, tensors };
}

function readField(cursor: Cursor, name: string, fail: Fail): GgufField {
  const type = cursor.u32();
  if (type === STRING) return cursor.text();
  if (type !== ARRAY && SIZES[type] === undefined) throw fail(`field ${name}`, `has type ${type}, expected 0 to 12`);
  if (type !== ARRAY) return cursor.scalar(type);
  const element = cursor.u32();
  const length = cursor.u64();
  if (element === STRING) for (let i = 0; i < length; i++) cursor.skip(cursor.u64());
  else if (element !== ARRAY && SIZES[element] !== undefined) cursor.skip(length * SIZES[element]);
  else throw fail(`field ${name}`, `is an array of type ${element}, expected 0 to 8 or 10 to 12`);
  return { length };
}

/** Where a tensor of a shape lies; a length that is not known is 0, one that is no whole number of blocks NaN. */
function place(shape: readonly number[], type: number, byteOffset: number): GgufTensor {
  const known = TYPES.get(type);
  if (known === undefined) return { dtype: `GGML type ${type}`, shape, byteOffset, byteLength: 0 };
  const [dtype, elements, bytes] = known;
  const count = elementsOf(shape);
  const whole = Number.isSafeInteger(count) && (shape.at(-1) ?? 1) % elements === 0;
  return { dtype, shape, byteOffset, byteLength: whole ? (count / elements) * bytes : NaN };
}

function refuseOverlap(tensors: ReadonlyMap<string, GgufTensor>, fail: Fail): void {
  let end = 0;
  for (const [name, { byteOffset, byteLength }] of [...tensors].sort(([, a], [, b]) => a.byteOffset - b.byteOffset)) {
    if (byteOffset < end) throw fail(`tensor ${name}`, "overlaps the one before; save the file again");
    end = byteOffset + byteLength;
  }
}

/** Blocks of an f16 scale and 32 integers. */
function decodeQ8(bytes: Uint8Array): Float32Array<ArrayBuffer> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const blocks = bytes.byteLength / 34;
  const out = new Float32Array(32 * blocks);
  for (let b = 0; b < blocks; b++) {
    const scale = f16ToF32(view.getUint16(34 * b, true));
    for (let i = 0; i < 32; i++) out[32 * b + i] = scale * view.getInt8(34 * b + 2 + i);
  }
  return out;
}

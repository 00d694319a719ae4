/**
 * Checked reads of the parts of a file: little-endian fields with their checksum (CRC-32C), plain MessagePack, and tensors one behind the other.
 * Nothing that a file says is believed before it is held against the bytes that follow.
 */
import { FormatError } from "../errors.ts";
import { type Dtype, tensorBytes } from "../tensor/dtypes.ts";
import { fromUtf8, toUtf8 } from "../text.ts";
import type { TensorRef } from "./format.ts";

let tables: Uint32Array | undefined;

function makeTables(): Uint32Array {
  const t = new Uint32Array(8 * 256);
  for (let i = 0; i < 256; i++) {
    let c = i;
    for (let bit = 0; bit < 8; bit++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
    t[i] = c;
  }
  for (let i = 256; i < t.length; i++) {
    const c = t[i - 256]!;
    t[i] = (c >>> 8) ^ t[c & 255]!;
  }
  return t;
}

/**
 * CRC-32C of `bytes`, continuing from `crc` when given, so that crc32c(b, crc32c(a)) is the CRC of a followed by b.
 * @example crc32c(new TextEncoder().encode("123456789")) === 0xe3069283
 */
export function crc32c(bytes: Uint8Array, crc = 0): number {
  const t = (tables ??= makeTables());
  let c = ~crc;
  let i = 0;
  for (const end = bytes.length - 7; i < end; i += 8) {
    c ^= bytes[i]! | (bytes[i + 1]! << 8) | (bytes[i + 2]! << 16) | (bytes[i + 3]! << 24);
    c =
      t[0x700 | (c & 255)]! ^
      t[0x600 | ((c >>> 8) & 255)]! ^
      t[0x500 | ((c >>> 16) & 255)]! ^
      t[0x400 | (c >>> 24)]! ^
      t[0x300 | bytes[i + 4]!]! ^
      t[0x200 | bytes[i + 5]!]! ^
      t[0x100 | bytes[i + 6]!]! ^
      t[bytes[i + 7]!]!;
  }
  for (; i < bytes.length; i++) c = (c >>> 8) ^ t[(c ^ bytes[i]!) & 255]!;
  return ~c >>> 0;
}

/** The least multiple of 64 that is ≥ n: sections start there. */
export function align64(n: number): number {
  return Math.ceil(n / 64) * 64;
}

/** Checked reads of little-endian fields of one part of one file. */
export class Fields {
  readonly view: DataView;
  readonly bytes: Uint8Array;
  readonly file: string;
  readonly part: string;

  constructor(bytes: Uint8Array, file: string, part: string) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.bytes = bytes;
    this.file = file;
    this.part = part;
  }

  u32(at: number): number {
    return this.view.getUint32(at, true);
  }

  u64(at: number): number {
    const high = this.u32(at + 4);
    this.check(high < 0x200000, () => `the number at byte ${at} is larger than 2^53`);
    return high * 2 ** 32 + this.u32(at);
  }

  magic(expected: readonly number[], what: string): void {
    this.check(
      expected.every((byte, i) => this.bytes[i] === byte),
      () => `this is not ${what}${this.bytes.length ? "" : ": it is empty"}`,
    );
  }

  version(): string {
    const version = this.u32(8);
    const text = `${version & 0xffff}.${version >>> 16}`;
    this.check((version & 0xffff) === 1, () => `version ${text}, but this reader knows version 1; update eigenlora`);
    return text;
  }

  /** The first `length` bytes, Default: all, against their checksum. */
  crc(expected: number, length?: number): void {
    const found = crc32c(this.bytes.subarray(0, length));
    this.check(found === expected, () => "its checksum does not match: the file is damaged, fetch it again");
  }

  limit(found: number, most: number, what: string): void {
    this.check(found <= most, () => `${found} ${what}, at most ${most} are allowed`);
  }

  /** Checks bytes without a meaning in version 1. */
  zero(from: number, to: number): void {
    this.check(
      this.bytes.subarray(from, to).every((byte) => byte === 0),
      () => `bytes ${from} to ${to} are not all zero: the file is damaged`,
    );
  }

  check(condition: boolean, message: () => string): asserts condition {
    check(condition, this.file, this.part, message);
  }
}

/** @throws FormatError with `message()` when the condition does not hold */
export function check(condition: boolean, file: string, part: string, message: () => string): asserts condition {
  if (!condition) throw new FormatError(message(), { file, part });
}

/**
 * Decodes one value that fills `bytes` exactly; maps become `Map`s.
 * @param path what the value is called in errors
 * @param depth of maps and arrays that it may have
 * @throws FormatError when it is malformed or not plain
 */
export function decode(bytes: Uint8Array, file: string, part: string, path: string, depth = 16): Value {
  const reader = new Reader(bytes);
  try {
    const value = reader.value(depth);
    if (reader.at !== bytes.length) throw new RangeError(`${bytes.length - reader.at} bytes are left over`);
    return new Value(value, file, part, path);
  } catch (cause) {
    throw new FormatError(`its MessagePack is malformed: ${(cause as Error).message}`, { file, part, cause });
  }
}

/** Reads values one after the other. A DataView does the bounds checks; counts are held against the bytes that are left. */
class Reader {
  at = 0;
  /** Maps and arrays that may still come: in memory each is a hundred times the byte that an empty one takes in the file. */
  #collections: number;
  readonly #bytes: Uint8Array;
  readonly #view: DataView;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#collections = 1024 + bytes.length / 3;
  }

  /** @param depth levels of nesting still allowed */
  value(depth: number): unknown {
    if (depth < 0) throw new RangeError("it is nested deeper than 16 levels");
    const code = this.#number(1);
    if (code <= 0x7f) return code;
    if (code <= 0x8f) return this.#map(code & 15, depth);
    if (code <= 0x9f) return this.#array(code & 15, depth);
    if (code <= 0xbf) return this.#string(code & 31);
    if (code >= 0xe0) return code - 256;
    // The low bits of the code say how many bytes follow, 1, 2, 4 or 8, from 0xcc on and for lengths.
    if (code >= 0xcc && code <= 0xcf) return this.#number(1 << (code & 3));
    if (code >= 0xd0 && code <= 0xd3) return this.#number(1 << (code & 3), true);
    if (code >= 0xd9 && code <= 0xdb) return this.#string(this.#number(1 << (code - 0xd9)));
    if (code >= 0xdc) {
      const items = this.#number(2 << (code & 1));
      return code < 0xde ? this.#array(items, depth) : this.#map(items, depth);
    }
    if (code === 0xc0) return null;
    if (code === 0xc2 || code === 0xc3) return code === 0xc3;
    if (code === 0xca) return this.#view.getFloat32(this.#skip(4));
    if (code === 0xcb) return this.#view.getFloat64(this.#skip(8));
    throw new RangeError(`it uses bytes or an extension type (0x${code.toString(16)})`);
  }

  #skip(count: number): number {
    const start = this.at;
    if (count > this.#bytes.length - start) throw new RangeError("it ends in the middle of a value");
    this.at += count;
    return start;
  }

  #number(width: number, signed = false): number {
    const start = this.#skip(width);
    let value = signed ? this.#view.getInt8(start) : this.#bytes[start]!;
    for (let at = start + 1; at < start + width; at++) value = value * 256 + this.#bytes[at]!;
    return value;
  }

  #string(length: number): string {
    const at = this.#skip(length);
    return fromUtf8(this.#bytes.subarray(at, at + length));
  }

  /** Every item takes a byte or more, so a count can be checked before anything is made of it. */
  #count(items: number): number {
    const left = this.#bytes.length - this.at;
    if (items > left) throw new RangeError(`it declares ${items} items with ${left} bytes left`);
    if (--this.#collections < 0) throw new RangeError("it has more maps and arrays than a third of its bytes");
    return items;
  }

  #array(items: number, depth: number): unknown[] {
    return Array.from({ length: this.#count(items) }, () => this.value(depth - 1));
  }

  #map(items: number, depth: number): Map<string, unknown> {
    const map = new Map<string, unknown>();
    for (let i = this.#count(items); i > 0; i--) {
      const key = this.value(depth - 1);
      if (typeof key !== "string") throw new RangeError("a key is not a string");
      if (map.has(key)) throw new RangeError(`the key ${JSON.stringify(key.slice(0, 80))} is there twice`);
      map.set(key, this.value(depth - 1));
    }
    return map;
  }
}

/** A decoded MessagePack value that knows where it stands, so that every mismatch names its place. */
export class Value {
  readonly value: unknown;
  readonly file: string;
  readonly part: string;
  readonly path: string;

  constructor(value: unknown, file: string, part: string, path: string) {
    this.value = value;
    this.file = file;
    this.part = part;
    this.path = path;
  }

  get absent(): boolean {
    return this.value === undefined || this.value === null;
  }

  check(condition: boolean, message: () => string): asserts condition {
    check(condition, this.file, this.part, () => `${this.path}: ${message()}`);
  }

  /** Applies `read` to it, unless it is absent. */
  maybe<T>(read: (value: Value) => T): T | undefined {
    return this.absent ? undefined : read(this);
  }

  #expected(what: string): never {
    const found = this.absent ? "nothing" : typeof this.value === "object" ? "a collection" : String(this.value);
    throw new FormatError(`${this.path}: expected ${what}, found ${found.slice(0, 80)}`, {
      file: this.file,
      part: this.part,
    });
  }

  #part(value: unknown, key: string): Value {
    return new Value(value, this.file, this.part, this.path + key);
  }

  /** Puts another value in its place. */
  of(value: unknown): Value {
    return this.#part(value, "");
  }

  /** An array of exactly `count` items: one more would mean something that this reader does not know. */
  items(count: number): Value[] {
    const items = this.array(count);
    this.check(items.length === count, () => `${items.length} items, expected ${count}`);
    return items;
  }

  get(key: string): Value {
    if (!(this.value instanceof Map)) this.#expected("a map");
    return this.#part(this.value.get(key), `.${key}`);
  }

  array(max: number): Value[] {
    if (!Array.isArray(this.value)) this.#expected("an array");
    this.check(this.value.length <= max, () => `${(this.value as unknown[]).length} items, at most ${max} are allowed`);
    return this.value.map((v, i) => this.#part(v, `[${i}]`));
  }

  integer(min: number, max: number): number {
    return this.number(min, max, true);
  }

  number(min: number, max: number, whole = false): number {
    const v = this.value;
    if (typeof v === "number" && v >= min && v <= max && (!whole || Number.isInteger(v))) return v;
    return this.#expected(`${whole ? "an integer" : "a number"} from ${min} to ${max}`);
  }

  boolean(): boolean {
    if (this.absent) return false;
    if (typeof this.value !== "boolean") this.#expected("true or false");
    return this.value;
  }

  string(maxBytes: number): string {
    if (typeof this.value !== "string") this.#expected("a string");
    const bytes = toUtf8(this.value).length;
    this.check(bytes > 0 && bytes <= maxBytes, () => `a string of ${bytes} bytes, expected 1 to ${maxBytes}`);
    return this.value;
  }

  /** A map of plain values as an object, own properties only, whatever the keys are called. */
  plain(): Record<string, unknown> {
    if (this.absent) return {};
    if (!(this.value instanceof Map)) this.#expected("a map");
    const convert = (v: unknown): unknown => {
      if (v instanceof Map) return Object.fromEntries([...v].map(([k, x]) => [k, convert(x)]));
      return Array.isArray(v) ? v.map(convert) : v;
    };
    return convert(this.value) as Record<string, unknown>;
  }
}

/**
 * @param step each begins at a multiple of it
 * @param start where the first may begin
 * @param size of the section
 * @returns `place` for the next tensor, `full` once all are placed, and where they `end`; the first two throw FormatError where sizes do not agree
 */
export function placing(
  step: number,
  start: number,
  size: number,
  file: string,
  part: string,
): { place(dtype: Dtype, rows: number, width: number): TensorRef; full(): void; end(): number } {
  let end = start;
  const fits = (condition: boolean): void =>
    check(condition, file, part, () => `its tensors need ${end} bytes, there are ${size}`);
  return {
    place(dtype, rows, width) {
      const byteOffset = Math.ceil(end / step) * step;
      const byteLength = tensorBytes(dtype, rows, width);
      end = byteOffset + byteLength;
      fits(end <= size);
      return { dtype, rows, width, byteOffset, byteLength };
    },
    full: () => fits(end === size),
    end: () => end,
  };
}

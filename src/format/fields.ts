/**
 * Checked reads of the parts of a file: little-endian fields, checksums (CRC-32C) and hashes (SHA-256), plain
 * MessagePack, and tensors one behind the other.
 * Nothing that a file says is believed before it is held against the bytes that follow.
 */

import { FormatError } from "../errors.ts";
import { joined } from "../source.ts";
import { type Dtype, tensorBytes } from "../tensor/dtypes.ts";
import { fromBase64, fromLatin1, fromUtf8, toBase64, utf8Until } from "../text.ts";
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

/** Bytes of a checksum between two looks at the clock: one or two milliseconds. */
const CRC_PIECE = 1 << 20;

/** The least multiple of 64 that is ≥ n: sections start there. */
export function align64(n: number): number {
  return Math.ceil(n / 64) * 64;
}

/**
 * An integer as V8's small integers where it is one: loops that count to the same number as a double take twice as
 * long.
 */
const integer = (value: number): number => (value === (value | 0) ? value | 0 : value);

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
    if (high >= 0x200000) this.fail(`the number at byte ${at} is larger than 2^53`);
    return integer(high * 2 ** 32 + this.u32(at));
  }

  magic(expected: readonly number[], what: string): void {
    if (expected.some((byte, i) => this.bytes[i] !== byte))
      this.fail(`this is not ${what}${this.bytes.length ? "" : ": it is empty"}`);
  }

  version(): string {
    const version = this.u32(8);
    const text = `${version & 0xffff}.${version >>> 16}`;
    if ((version & 0xffff) !== 1) this.fail(`version ${text}, but this reader knows version 1; update eigenlora`);
    return text;
  }

  /** Holds the first `length` bytes, Default: all, against their checksum, in pieces. */
  *crc(expected: number, length: number = this.bytes.length): Generator<void> {
    let found = 0;
    for (let at = 0; at < length; at += CRC_PIECE) {
      if (at > 0) yield;
      found = crc32c(this.bytes.subarray(at, Math.min(length, at + CRC_PIECE)), found);
    }
    if (found !== expected) this.fail("its checksum does not match: the file is damaged, fetch it again");
  }

  /** Checks bytes without a meaning in version 1. */
  zero(from: number, to: number): void {
    if (this.bytes.subarray(from, to).some(Boolean))
      this.fail(`bytes ${from} to ${to} are not all zero: the file is damaged`);
  }

  fail(message: string): never {
    throw new FormatError(message, this);
  }
}

/**
 * Most maps and arrays of one MessagePack value, most values in it, keys included, and most keys of a map (SPEC.md,
 * section 10).
 */
const MOST_COLLECTIONS = 1e6;
const MOST_VALUES = 2e6;
const MOST_KEYS = 65_536;
/** Values, or bytes of a string, between two looks at the clock. */
const PIECE = 1 << 13;

/**
 * Checks one MessagePack value that fills `bytes` exactly, in pieces. Nothing is made of it before it is asked for.
 * @param path names the value in errors
 * @param depth of maps and arrays that it may have
 * @param most values that it may hold
 * @throws FormatError when it is malformed or not plain
 */
export function* decode(
  bytes: Uint8Array,
  file: string,
  part: string,
  path: string,
  depth = 16,
  most: number = MOST_VALUES,
): Generator<void, Value> {
  const reader = new Reader(bytes, file, part);
  yield* reader.check(depth, most);
  return new Value(reader, 0, path);
}

/** The types of a MessagePack value. */
type Kind = "nil" | "boolean" | "number" | "string" | "array" | "map";

/** A map or array whose items are being checked. */
interface Frame {
  readonly index: number;
  readonly isMap: boolean;
  /** Items that are still to come; keys and values of a map. */
  left: number;
  keys?: Set<string>;
}

/** Reads values one after the other, and remembers where each lies. Values go by their number in the file. */
class Reader extends Fields {
  at = 0;
  /** Content of the last head: the number, the boolean as 0 or 1, or how many bytes, items or pairs follow. */
  count = 0;
  /** First byte of each value. */
  starts: Int32Array = new Int32Array(0);
  /** Number of the value that follows each, behind all that is in it. */
  nexts: Int32Array = new Int32Array(0);

  #malformed(message: string): never {
    return this.fail(`its MessagePack is malformed: ${message}`);
  }

  /** Reads the head of a value. Default: of the one that comes next. */
  head(index?: number): Kind {
    if (index !== undefined) this.at = this.starts[index]!;
    const code = this.#number(1);
    if (code <= 0x7f || code >= 0xe0) return this.#is("number", (code << 24) >> 24);
    if (code <= 0x8f) return this.#is("map", code & 15);
    if (code <= 0x9f) return this.#is("array", code & 15);
    if (code <= 0xbf) return this.#is("string", code & 31);
    // The low bits of the code say how many bytes follow, 1, 2, 4 or 8, from 0xcc on and for lengths.
    if (code >= 0xcc && code <= 0xd3) return this.#is("number", this.#number(1 << (code & 3), code >= 0xd0));
    if (code >= 0xd9 && code <= 0xdb) return this.#is("string", this.#number(1 << (code - 0xd9)));
    if (code >= 0xdc) return this.#is(code < 0xde ? "array" : "map", this.#number(2 << (code & 1)));
    if (code === 0xc0) return this.#is("nil", 0);
    if (code === 0xc2 || code === 0xc3) return this.#is("boolean", code & 1);
    if (code === 0xca) return this.#is("number", this.view.getFloat32(this.#skip(4)));
    if (code === 0xcb) return this.#is("number", this.view.getFloat64(this.#skip(8)));
    return this.#malformed(`it uses bytes or an extension type (0x${code.toString(16)})`);
  }

  #is(kind: Kind, count: number): Kind {
    this.count = count;
    return kind;
  }

  #skip(count: number): number {
    const start = this.at;
    if (count > this.bytes.length - start) this.#malformed("it ends in the middle of a value");
    this.at += count;
    return start;
  }

  #number(width: number, signed = false): number {
    const start = this.#skip(width);
    let value = signed ? this.view.getInt8(start) : this.bytes[start]!;
    for (let at = start + 1; at < start + width; at++) value = value * 256 + this.bytes[at]!;
    return value;
  }

  /** A value, whatever is in it. Default: the one that comes next. */
  plain(index?: number): unknown {
    const kind = this.head(index);
    const { count } = this;
    if (kind === "nil") return null;
    if (kind === "boolean") return count > 0;
    if (kind === "number") return count;
    if (kind === "string") return fromUtf8(this.bytes.subarray(this.at, (this.at += count)));
    const items = Array.from({ length: count }, () => (kind === "map" ? [this.plain(), this.plain()] : this.plain()));
    return kind === "map" ? Object.fromEntries(items as [string, unknown][]) : items;
  }

  /** True if a string is this one, of ASCII. */
  is(index: number, text: string): boolean {
    this.head(index);
    if (this.count !== text.length) return false;
    for (let i = 0; i < text.length; i++) if (this.bytes[this.at + i] !== text.charCodeAt(i)) return false;
    return true;
  }

  /** Checks all that there is, without making anything of it. */
  *check(depth: number, most: number): Generator<void> {
    const { length } = this.bytes;
    // Every value takes a byte or more.
    this.starts = new Int32Array(Math.min(most, length));
    this.nexts = new Int32Array(this.starts.length);
    let left = Math.min(MOST_COLLECTIONS, 1024 + length / 3);
    const around: Frame[] = [];
    let frame: Frame = { index: 0, isMap: false, left: 1 };
    for (let index = 0; frame.left > 0; ) {
      if (around.length > depth) this.#malformed("it is nested deeper than 16 levels");
      if (index === most) this.#malformed(`it has more than ${most} values`);
      const isKey = frame.isMap && frame.left % 2 === 0;
      frame.left--;
      this.starts[index] = this.at;
      const kind = this.head();
      if (isKey && kind !== "string") this.#malformed("a key is not a string");
      if (kind === "string") {
        const start = this.#skip(this.count);
        for (let at = start; at < this.at; ) {
          const end = Math.min(this.at, at + PIECE);
          const sound = utf8Until(this.bytes, at, end);
          // A character may reach into the next piece.
          if (sound < end && (end === this.at || sound < end - 3)) this.#malformed("a string is not UTF-8");
          at = sound;
          if (at < this.at) yield;
        }
        if (isKey) this.#addKey(frame, start);
      } else if (kind === "array" || kind === "map") {
        const items = this.count;
        const bytes = length - this.at;
        if (items > bytes) this.#malformed(`it declares ${items} items with ${bytes} bytes left`);
        if (--left < 0)
          this.#malformed(`it has more maps and arrays than a third of its bytes, or than ${MOST_COLLECTIONS}`);
        around.push(frame);
        frame = { index, isMap: kind === "map", left: kind === "map" ? 2 * items : items };
      }
      index++;
      this.nexts[index - 1] = index;
      for (; frame.left === 0 && around.length > 0; frame = around.pop()!) this.nexts[frame.index] = index;
      if (index % PIECE === 0) yield;
    }
    if (this.at < length) this.#malformed(`${length - this.at} bytes are left over`);
  }

  #addKey(map: Frame, start: number): void {
    // The last key of a map of one is like no other.
    if (map.left === 1 && !map.keys) return;
    const key = fromLatin1(this.bytes.subarray(start, this.at));
    map.keys ??= new Set();
    if (map.keys.size === MOST_KEYS) this.#malformed(`a map has more than ${MOST_KEYS} keys`);
    if (map.keys.has(key)) this.#malformed(`the key ${JSON.stringify(key.slice(0, 80))} is there twice`);
    map.keys.add(key);
  }
}

/**
 * A MessagePack value in its file: made when it is asked for, so that its size is compared first. Every mismatch names
 * its place.
 */
export class Value {
  /** "nil" where a map lacks it, too. */
  readonly kind: Kind;
  /** The number, the boolean as 0 or 1, or how many bytes, items or pairs there are. */
  readonly count: number;
  /** The value that this is a part of, and its name there: paths are made when they are told. */
  readonly #around: Value | undefined;
  readonly #name: string | number;
  readonly #reader: Reader;
  readonly #index: number;

  constructor(reader: Reader, index: number | undefined, name: string | number, around?: Value) {
    this.kind = index === undefined ? "nil" : reader.head(index);
    this.count = reader.count;
    this.#around = around;
    this.#name = name;
    this.#reader = reader;
    this.#index = index ?? 0;
  }

  get path(): string {
    const name = this.#name;
    return this.#around ? this.#around.path + (typeof name === "number" ? `[${name}]` : `.${name}`) : `${name}`;
  }

  get absent(): boolean {
    return this.kind === "nil";
  }

  /** @throws FormatError with the path of the value */
  fail(message: string): never {
    return this.#reader.fail(`${this.path}: ${message}`);
  }

  /** Applies `read` to it, unless it is absent. */
  maybe<T>(read: (value: Value) => T): T | undefined {
    return this.absent ? undefined : read(this);
  }

  #expected(expected: string): never {
    const long = this.kind === "array" || this.kind === "map" || (this.kind === "string" && this.count > 1024);
    const found = this.absent ? "nothing" : long ? `a ${this.kind} of ${this.count}` : String(this.plain());
    return this.fail(`expected ${expected}, found ${found.slice(0, 80)}`);
  }

  get(key: string): Value {
    if (this.kind !== "map") this.#expected("a map");
    const reader = this.#reader;
    for (let i = 0, index = this.#index + 1; i < this.count; i++, index = reader.nexts[index + 1]!)
      if (reader.is(index, key)) return new Value(reader, index + 1, key, this);
    return new Value(reader, undefined, key, this);
  }

  /** The items of an array, one after the other. */
  *each(max: number): Generator<Value, void> {
    if (this.kind !== "array") this.#expected("an array");
    if (this.count > max) this.fail(`${this.count} items, at most ${max} are allowed`);
    for (let i = 0, index = this.#index + 1; i < this.count; i++, index = this.#reader.nexts[index]!)
      yield new Value(this.#reader, index, i, this);
  }

  array(max: number): Value[] {
    return [...this.each(max)];
  }

  /** An array of exactly `count` items: one more would mean something that this reader does not know. */
  items(count: number): Value[] {
    const items = this.array(count);
    if (items.length !== count) this.fail(`${items.length} items, expected ${count}`);
    return items;
  }

  /** Applies `read` to the items of an array, in pieces. */
  *list<T>(max: number, read: (item: Value) => T): Generator<void, T[]> {
    const found: T[] = [];
    for (const item of this.each(max)) if (found.push(read(item)) % 256 === 0) yield;
    return found;
  }

  /** The item of a list that an integer stands for. */
  choice<T>(list: readonly T[]): T {
    return list[this.integer(0, list.length - 1)]!;
  }

  integer(min: number, max: number): number {
    return integer(this.number(min, max, true));
  }

  number(min: number, max: number, whole = false): number {
    const { count } = this;
    if (this.kind === "number" && count >= min && count <= max && (!whole || Number.isInteger(count))) return count;
    return this.#expected(`${whole ? "an integer" : "a number"} from ${min} to ${max}`);
  }

  boolean(): boolean {
    if (!this.absent && this.kind !== "boolean") this.#expected("true or false");
    return this.kind === "boolean" && this.count > 0;
  }

  string(maxBytes: number): string {
    if (this.kind !== "string") this.#expected("a string");
    const bytes = this.count;
    if (bytes === 0 || bytes > maxBytes) this.fail(`a string of ${bytes} bytes, expected 1 to ${maxBytes}`);
    return this.plain() as string;
  }

  /** Checks that it takes at most so many bytes of MessagePack. */
  within(maxBytes: number): void {
    const { starts, nexts, bytes: all } = this.#reader;
    // Bytes behind the last value start at 0, or nowhere.
    const bytes = (starts[nexts[this.#index]!] || all.length) - starts[this.#index]!;
    if (bytes > maxBytes) this.fail(`${bytes} bytes, at most ${maxBytes} are allowed`);
  }

  /** All of it; maps become objects of own properties, whatever their keys are called. */
  plain(): unknown {
    return this.#reader.plain(this.#index);
  }
}

/**
 * @param step each begins at a multiple of it
 * @param start where the first may begin
 * @param size of the section
 * @returns `place` for the next tensor, `full` once all are placed, and where they `end`; the first two throw
 *   FormatError where sizes do not agree
 */
export function placing(
  step: number,
  start: number,
  size: number,
  file: string,
  part: string,
): { place(dtype: Dtype, rows: number, width: number): TensorRef; full(): void; end(): number } {
  let end = start;
  const fits = (condition: boolean): void => {
    if (!condition) throw new FormatError(`its tensors need ${end} bytes, there are ${size}`, { file, part });
  };
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

/**
 * SHA-256 of the parts, one behind the other.
 * @throws TypeError where the platform has no WebCrypto
 */
export async function sha256(...parts: readonly Uint8Array[]): Promise<Uint8Array<ArrayBuffer>> {
  if (!globalThis.crypto?.subtle) {
    throw new TypeError("SHA-256 needs WebCrypto (crypto.subtle), which is missing here; pages have it over https");
  }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", joined(parts) as BufferSource));
}

/** The same as text. */
export async function integrityOf(...parts: readonly Uint8Array[]): Promise<string> {
  return toIntegrity(await sha256(...parts));
}

/** @param hash 32 bytes */
export function toIntegrity(hash: Uint8Array): string {
  return `sha256-${toBase64(hash)}`;
}

/**
 * @throws TypeError when it is not "sha256-" and the base64 of 32 bytes, written in the only way that `toIntegrity`
 *   writes it: hashes are compared as text
 */
export function fromIntegrity(text: string): Uint8Array<ArrayBuffer> {
  // The last letter before the padding holds four bits.
  if (!/^sha256-[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$/.test(text)) {
    throw new TypeError(`expected "sha256-" and the base64 of 32 bytes, got ${JSON.stringify(text)}`);
  }
  return fromBase64(text.slice(7));
}

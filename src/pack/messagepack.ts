/**
 * Plain MessagePack, read with suspicion: the bytes are walked and checked before the decoder, which allocates what counts
 * say, sees them; the result is a `Value` that names its place in every mismatch. Not a general decoder: SPEC.md, section 1.
 */
import { Unpackr } from "msgpackr/unpack";
import { FormatError } from "../errors.ts";

/** @throws FormatError with `message()` when the condition does not hold */
export function check(condition: boolean, file: string, part: string, message: () => string): asserts condition {
  if (!condition) throw new FormatError(message(), { file, part });
}

const unpackr = new Unpackr({ useRecords: false, mapsAsObjects: false, int64AsType: "number" });

/** Decodes one value that fills `bytes` exactly. @throws FormatError when it is malformed or not plain */
export function decode(bytes: Uint8Array, file: string, part: string): unknown {
  try {
    const end = skipValue(bytes, 0, 16);
    if (end !== bytes.length) throw new RangeError(`${bytes.length - end} bytes are left over`);
    return unpackr.unpack(bytes);
  } catch (cause) {
    throw new FormatError(`its MessagePack is malformed: ${(cause as Error).message}`, { file, part, cause });
  }
}

/** Walks one MessagePack value and returns the offset behind it. Throws on anything SPEC.md, section 1, does not allow. */
function skipValue(b: Uint8Array, at: number, depth: number): number {
  const size = (from: number, n: number): number => {
    let value = 0;
    for (let i = 0; i < n; i++) value = value * 256 + (b[from + i] ?? 0);
    return value;
  };
  const code = b[at];
  if (code === undefined) throw new RangeError("it ends in the middle of a value");
  if (depth < 0) throw new RangeError("it is nested deeper than 16 levels");
  let next = at + 1;
  let items = -1;
  let map = false;
  if (code <= 0x7f || code >= 0xe0 || code === 0xc0 || code === 0xc2 || code === 0xc3) return next;
  if (code <= 0x8f) [items, map] = [code & 15, true];
  else if (code <= 0x9f) items = code & 15;
  else if (code <= 0xbf) next += code & 31;
  else if (code >= 0xc4 && code <= 0xc6) next += (1 << (code - 0xc4)) + size(next, 1 << (code - 0xc4));
  else if (code === 0xca) next += 4;
  else if (code === 0xcb) next += 8;
  else if (code >= 0xcc && code <= 0xcf) next += 1 << (code - 0xcc);
  else if (code >= 0xd0 && code <= 0xd3) next += 1 << (code - 0xd0);
  else if (code >= 0xd9 && code <= 0xdb) next += (1 << (code - 0xd9)) + size(next, 1 << (code - 0xd9));
  else if (code >= 0xdc) {
    const width = code & 1 ? 4 : 2;
    [items, map] = [size(next, width), code >= 0xde];
    next += width;
  } else throw new RangeError(`it uses an extension type (0x${code.toString(16)})`);
  if (next > b.length) throw new RangeError("it ends in the middle of a value");
  if (items > b.length - next) throw new RangeError(`it declares ${items} items with ${b.length - next} bytes left`);
  for (let i = 0; i < items; i++) {
    if (map) {
      const key = b[next] ?? 0;
      if (!((key >= 0xa0 && key <= 0xbf) || (key >= 0xd9 && key <= 0xdb))) throw new RangeError("a key is not a string");
      next = skipValue(b, next, depth - 1);
    }
    next = skipValue(b, next, depth - 1);
  }
  return next;
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

  #expected(what: string): never {
    const found = this.absent ? "nothing" : typeof this.value === "object" ? "a collection" : String(this.value);
    throw new FormatError(`${this.path}: expected ${what}, found ${found.slice(0, 80)}`, this);
  }

  missing(index: number): Value {
    return new Value(undefined, this.file, this.part, `${this.path}[${index}]`);
  }

  get(key: string): Value {
    if (!(this.value instanceof Map)) this.#expected("a map");
    return new Value(this.value.get(key), this.file, this.part, `${this.path}.${key}`);
  }

  array(max: number): Value[] {
    if (!Array.isArray(this.value)) this.#expected("an array");
    this.check(this.value.length <= max, () => `${(this.value as unknown[]).length} items, at most ${max} are allowed`);
    return this.value.map((v, i) => new Value(v, this.file, this.part, `${this.path}[${i}]`));
  }

  integer(min: number, max: number): number {
    const v = this.value;
    if (typeof v !== "number" || !Number.isInteger(v) || v < min || v > max) {
      this.#expected(`an integer from ${min} to ${max}`);
    }
    return v;
  }

  number(min: number, max: number): number {
    const v = this.value;
    if (typeof v !== "number" || !(v >= min && v <= max)) this.#expected(`a number from ${min} to ${max}`);
    return v;
  }

  boolean(): boolean {
    if (this.absent) return false;
    if (typeof this.value !== "boolean") this.#expected("true or false");
    return this.value;
  }

  string(maxBytes: number): string {
    if (typeof this.value !== "string") this.#expected("a string");
    const bytes = new TextEncoder().encode(this.value).length;
    this.check(bytes > 0 && bytes <= maxBytes, () => `a string of ${bytes} bytes, expected 1 to ${maxBytes}`);
    return this.value;
  }

  /** A map of plain values as an object, own properties only, whatever the keys are called. */
  plain(): Record<string, unknown> {
    if (this.absent) return {};
    if (!(this.value instanceof Map)) this.#expected("a map");
    const convert = (v: unknown): unknown => {
      if (v instanceof Map) return Object.fromEntries([...v].map(([k, x]) => [k, convert(x)]));
      if (Array.isArray(v)) return v.map(convert);
      const scalar = v === null || typeof v === "string" || typeof v === "boolean" || typeof v === "number";
      return scalar ? v : this.#expected("plain values");
    };
    return convert(this.value) as Record<string, unknown>;
  }
}

/**
 * Plain MessagePack, written: null, booleans, numbers, strings, arrays, objects and maps, each in its shortest form, as msgpackr
 * writes them. What reads it is `messagepack.ts`.
 */
import { toUtf8 } from "../text.ts";

/** MessagePack of a value, keys with undefined left out. */
export function pack(value: unknown): Uint8Array<ArrayBuffer> {
  const writer = new Writer();
  writer.value(value);
  return writer.bytes.slice(0, writer.length);
}

/** Whether it is a map, and no object of another kind: a Date, bytes, a Set. */
function isMap(value: unknown): value is object {
  return value instanceof Map || Object.prototype.toString.call(value) === "[object Object]";
}

class Writer {
  bytes: Uint8Array<ArrayBuffer> = new Uint8Array(4096);
  length = 0;
  #view = new DataView(this.bytes.buffer);

  value(value: unknown): void {
    if (value === null || value === undefined) this.#code(0xc0);
    else if (typeof value === "boolean") this.#code(value ? 0xc3 : 0xc2);
    else if (typeof value === "number") this.#number(value);
    else if (typeof value === "string") {
      const text = toUtf8(value);
      this.#head(text.length, 0xa0, 32, [0xd9, 0xda, 0xdb]);
      // Growing may put other bytes in place of these.
      const at = this.#grow(text.length);
      this.bytes.set(text, at);
    } else if (Array.isArray(value)) {
      this.#head(value.length, 0x90, 16, [0, 0xdc, 0xdd]);
      for (const item of value) this.value(item);
    } else if (!isMap(value)) {
      // Of no type that readers take: they refuse it, and so does whoever holds what was written against the rules.
      this.#code(0xc1);
    } else {
      const entries = value instanceof Map ? [...value] : Object.entries(value).filter(([, one]) => one !== undefined);
      this.#head(entries.length, 0x80, 16, [0, 0xde, 0xdf]);
      for (const [key, one] of entries) {
        this.value(key);
        this.value(one);
      }
    }
  }

  /** Integers of up to 32 bits as such; all others, and fractions, in binary64. */
  #number(value: number): void {
    if (value >>> 0 === value) this.#head(value, 0, 128, [0xcc, 0xcd, 0xce]);
    else if (value >> 0 !== value) {
      this.#code(0xcb);
      const at = this.#grow(8);
      this.#view.setFloat64(at, value);
    } else if (value >= -32) this.#code(256 + value);
    else {
      const width = value >= -0x80 ? 1 : value >= -0x8000 ? 2 : 4;
      this.#code(0xd0 + Math.log2(width));
      this.#unsigned(value, width);
    }
  }

  /**
   * A count, or a number that is none.
   * @param short the code of 0, up to `below`
   * @param codes for 8, 16 and 32 bits; 0 where there is none
   */
  #head(count: number, short: number, below: number, codes: readonly [number, number, number]): void {
    if (count < below) {
      this.#code(short + count);
      return;
    }
    const width = count < 0x100 && codes[0] > 0 ? 0 : count < 0x10000 ? 1 : 2;
    this.#code(codes[width]!);
    this.#unsigned(count, 1 << width);
  }

  #unsigned(value: number, width: number): void {
    for (let at = this.#grow(width), shift = 8 * (width - 1); shift >= 0; shift -= 8) this.bytes[at++] = value >> shift;
  }

  #code(code: number): void {
    const at = this.#grow(1);
    this.bytes[at] = code;
  }

  /** @returns where so many bytes go */
  #grow(count: number): number {
    const at = this.length;
    this.length += count;
    if (this.length > this.bytes.length) {
      const larger = new Uint8Array(2 * this.length);
      larger.set(this.bytes);
      this.bytes = larger;
      this.#view = new DataView(larger.buffer);
    }
    return at;
  }
}

/**
 * Plain MessagePack (SPEC.md, section 1), written: each value in the fewest bytes. What reads it is `messagepack.ts`.
 */
import { toUtf8 } from "../text.ts";

/** Tags: those of 8, 16 and 32 bits follow each other. */
const [NIL, FALSE, TRUE, BYTES, DOUBLE, UNSIGNED, SIGNED] = [0xc0, 0xc2, 0xc3, 0xc4, 0xcb, 0xcc, 0xd0];
const [STRING, ARRAY, MAP] = [0xd9, 0xdc, 0xde];

/**
 * MessagePack of a value: null, booleans, numbers, strings, bytes, arrays, and maps or objects with strings as keys; keys with undefined
 * are left out.
 * @throws TypeError for anything else
 */
export function pack(value: unknown): Uint8Array<ArrayBuffer> {
  const writer = new Writer();
  writer.value(value);
  return writer.bytes();
}

class Writer {
  #bytes = new Uint8Array(256);
  #view = new DataView(this.#bytes.buffer);
  #end = 0;

  bytes(): Uint8Array<ArrayBuffer> {
    return this.#bytes.slice(0, this.#end);
  }

  value(value: unknown): void {
    if (value === null || value === undefined) this.#tag(NIL);
    else if (typeof value === "boolean") this.#tag(value ? TRUE : FALSE);
    else if (typeof value === "number") this.#number(value);
    else if (typeof value === "string") {
      const text = toUtf8(value);
      if (text.length < 32) this.#tag(0xa0 | text.length);
      else this.#sized(STRING, text.length);
      this.#raw(text);
    } else if (value instanceof Uint8Array) {
      this.#sized(BYTES, value.length);
      this.#raw(value);
    } else if (Array.isArray(value)) {
      this.#counted(0x90, ARRAY, value.length);
      for (const item of value) this.value(item);
    } else if (value instanceof Map) this.#map([...value]);
    else if (typeof value === "object") this.#map(Object.entries(value));
    else throw new TypeError(`MessagePack has no ${typeof value}`);
  }

  #map(entries: readonly [unknown, unknown][]): void {
    const kept = entries.filter(([, value]) => value !== undefined);
    this.#counted(0x80, MAP, kept.length);
    for (const [key, value] of kept) {
      this.value(String(key));
      this.value(value);
    }
  }

  #number(value: number): void {
    if (!Number.isInteger(value) || value > 0xffffffff || value < -0x80000000) {
      this.#tag(DOUBLE);
      this.#grow(8).setFloat64(this.#end, value);
      this.#end += 8;
    } else if (value >= 0) {
      if (value < 0x80) this.#tag(value);
      else this.#sized(UNSIGNED, value);
    } else if (value >= -0x20) this.#tag(value + 0x100);
    else {
      const size = value >= -0x80 ? 0 : value >= -0x8000 ? 1 : 2;
      this.#tag(SIGNED + size);
      this.#unsigned(value, size);
    }
  }

  /** A tag with the count in its low bits, or one of 16 or 32 bits. */
  #counted(short: number, tag: number, count: number): void {
    if (count < 16) return this.#tag(short | count);
    const size = count < 0x10000 ? 1 : 2;
    this.#tag(tag + size - 1);
    this.#unsigned(count, size);
  }

  /** The first of three tags, for as many bits as a number needs, and the number. */
  #sized(tag: number, count: number): void {
    const size = count < 0x100 ? 0 : count < 0x10000 ? 1 : 2;
    this.#tag(tag + size);
    this.#unsigned(count, size);
  }

  /** @param size of 8, 16 or 32 bits: 0, 1 or 2 */
  #unsigned(value: number, size: number): void {
    const view = this.#grow(4);
    if (size === 0) view.setUint8(this.#end, value);
    else if (size === 1) view.setUint16(this.#end, value);
    else view.setUint32(this.#end, value);
    this.#end += 1 << size;
  }

  #tag(tag: number): void {
    this.#grow(1).setUint8(this.#end++, tag);
  }

  #raw(bytes: Uint8Array): void {
    this.#grow(bytes.length);
    this.#bytes.set(bytes, this.#end);
    this.#end += bytes.length;
  }

  #grow(count: number): DataView {
    if (this.#end + count > this.#bytes.length) {
      const larger = new Uint8Array(2 * (this.#end + count));
      larger.set(this.#bytes);
      [this.#bytes, this.#view] = [larger, new DataView(larger.buffer)];
    }
    return this.#view;
  }
}

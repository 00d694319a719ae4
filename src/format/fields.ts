/**
 * Little-endian fields of one part of one file, read with checks, and what alignment the parts have.
 */
import { crc32c } from "./crc32c.ts";
import { check } from "./messagepack.ts";

/** Where the next section may start: the least multiple of 64 that is ≥ n. */
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

  /** Bytes that no version 1 gives a meaning to. */
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

/** CRC-32C as in `src/pack/crc32c.ts`, eight bytes per step. Tables are made on first use: they would add 8 kB. */
import { CRC_TABLES } from "./layout";

// @ts-ignore: decorator
@inline
function entry(table: usize, index: u32): u32 {
  return load<u32>(CRC_TABLES + (table << 10) + (<usize>index << 2));
}

function makeTables(): void {
  for (let i: u32 = 0; i < 2048; i++) {
    let c = i;
    if (i < 256) {
      for (let bit = 0; bit < 8; bit++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
    } else {
      c = entry(0, i - 256);
      c = (c >>> 8) ^ entry(0, c & 255);
    }
    store<u32>(CRC_TABLES + (<usize>i << 2), c);
  }
}

/** CRC-32C of `length` bytes, continuing from `crc`. */
export function crc32c(at: usize, length: usize, crc: u32): u32 {
  if (entry(0, 1) == 0) makeTables();
  const end = at + length;
  let c = ~crc;
  for (; end - at >= 8; at += 8) {
    const low = load<u32>(at) ^ c, high = load<u32>(at, 4);
    c = entry(7, low & 255) ^ entry(6, (low >>> 8) & 255) ^ entry(5, (low >>> 16) & 255) ^ entry(4, low >>> 24)
      ^ entry(3, high & 255) ^ entry(2, (high >>> 8) & 255) ^ entry(1, (high >>> 16) & 255) ^ entry(0, high >>> 24);
  }
  for (; at < end; at++) c = (c >>> 8) ^ entry(0, (c ^ load<u8>(at)) & 255);
  return ~c;
}

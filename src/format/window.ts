/**
 * The window of a pack: which generation counts, and where its parts are (SPEC.md, section 2).
 */
import { toHex } from "../tensor/hex.ts";
import { crc32c } from "./crc32c.ts";
import { Fields } from "./fields.ts";
import {
  BLOCK_BYTES,
  HEAD_BYTES,
  MAGIC,
  SIGNATURE_BYTES,
  SIGNATURE_OFFSET,
  type Signature,
  type Superblock,
  WINDOW_BYTES,
  type Window,
} from "./format.ts";

/**
 * Checks the window and picks the current superblock.
 * @param bytes the first 1 536 bytes of the file
 * @param size size of the file, when known
 * @throws FormatError when this is not a pack of version 1, or no superblock is whole, or the file is truncated
 */
export function parseWindow(bytes: Uint8Array, file: string, size?: number): Window {
  const f: Fields = new Fields(bytes, file, "window");
  f.magic(MAGIC, "an EigenLoRA pack");
  f.check(bytes.length >= WINDOW_BYTES, () => `truncated: ${bytes.length} bytes, the window alone has ${WINDOW_BYTES}`);
  const version = f.version();
  f.check(f.u32(12) === WINDOW_BYTES, () => `window of ${f.u32(12)} bytes, expected ${WINDOW_BYTES}`);
  f.crc(f.u32(HEAD_BYTES), HEAD_BYTES);
  f.zero(HEAD_BYTES + 4, 512);
  const whole = [0, 1]
    .map(
      (index) => new Fields(bytes.subarray(BLOCK_BYTES * (index + 1), BLOCK_BYTES * (index + 2)), file, "superblock"),
    )
    .filter(isWhole)
    .sort((a, b) => generationOf(b) - generationOf(a));
  f.check(whole[0] !== undefined, () => "neither superblock is whole: the file is damaged, fetch it again");
  // All other rules are of the one that counts.
  const superblock = parseSuperblock(whole[0]);
  const { committed, directoryOffset, directoryLength, basesOffset, basesLength } = superblock;
  f.check(size === undefined || size >= committed, () => `truncated: ${size} bytes of ${committed}; fetch it again`);
  const inside = (offset: number, length: number): boolean =>
    offset >= WINDOW_BYTES && offset % 64 === 0 && offset + length <= committed;
  f.check(
    inside(directoryOffset, directoryLength) && inside(basesOffset, basesLength),
    () => "directory or bases lie outside the file",
  );
  // A copy: as a view it would keep what else was read with it.
  const head = bytes.slice(0, HEAD_BYTES);
  return { version, basisId: toHex(head.subarray(16)), superblock, head };
}

const generationOf = (f: Fields): number => f.u32(4) * 2 ** 32 + f.u32(0);

/** Whether a superblock was written, and not torn. */
function isWhole(f: Fields, index: number): boolean {
  if (generationOf(f) === 0 || f.u32(0) % 2 !== index || f.u32(60) !== crc32c(f.bytes.subarray(0, 60))) return false;
  const end = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  // Both are written at once: where the signature is torn, so is the whole.
  if (f.u32(52) > 0) return f.u32(end - 4) === crc32c(f.bytes.subarray(0, end - 4));
  return !f.bytes.subarray(SIGNATURE_OFFSET, end).some(Boolean);
}

function parseSuperblock(f: Fields): Superblock {
  const flags = f.u32(52);
  const signatureEnd = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  f.check(flags <= 1, () => `flags ${flags}, expected 0 or 1`);
  f.zero(56, 60);
  f.zero(signatureEnd, BLOCK_BYTES);
  return {
    generation: f.u64(0),
    committed: f.u64(8),
    directoryOffset: f.u64(16),
    directoryLength: f.u64(24),
    basesOffset: f.u64(32),
    basesLength: f.u64(40),
    directoryCrc: f.u32(48),
    signature: flags ? signatureOf(f.bytes.subarray(SIGNATURE_OFFSET, signatureEnd)) : undefined,
  };
}

/** @param bytes key, signature, CRC */
export function signatureOf(bytes: Uint8Array): Signature {
  return { key: bytes.slice(0, 32), bytes: bytes.slice(32, 96) };
}

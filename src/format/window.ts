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
  let best: Superblock | undefined;
  for (const index of [0, 1]) {
    const at = BLOCK_BYTES * (index + 1);
    const block = parseSuperblock(bytes.subarray(at, at + BLOCK_BYTES), file);
    if (block && block.generation % 2 === index && block.generation > (best?.generation ?? 0)) best = block;
  }
  f.check(best !== undefined, () => "neither superblock is whole: the file is damaged, fetch it again");
  const { committed, directoryOffset, directoryLength, basesOffset, basesLength } = best;
  f.check(size === undefined || size >= committed, () => `truncated: ${size} bytes of ${committed}; fetch it again`);
  const inside = (offset: number, length: number): boolean =>
    offset >= WINDOW_BYTES && offset % 64 === 0 && offset + length <= committed;
  f.check(
    inside(directoryOffset, directoryLength) && inside(basesOffset, basesLength),
    () => "directory or bases lie outside the file",
  );
  // A copy: as a view it would keep what else was read with it.
  const head = bytes.slice(0, HEAD_BYTES);
  return { version, basisId: toHex(head.subarray(16)), superblock: best, head };
}

/** Undefined where the block is not whole: never written, or torn. */
function parseSuperblock(bytes: Uint8Array, file: string): Superblock | undefined {
  const f: Fields = new Fields(bytes, file, "superblock");
  if (f.u32(60) !== crc32c(bytes.subarray(0, 60))) return undefined;
  const signatureEnd = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  const flags = f.u32(52);
  const behind = bytes.subarray(SIGNATURE_OFFSET, signatureEnd);
  // Both are written at once: where the signature is torn, so is the whole.
  const sound =
    flags > 0 ? f.u32(signatureEnd - 4) === crc32c(bytes.subarray(0, signatureEnd - 4)) : !behind.some(Boolean);
  if (!sound) return undefined;
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
    signature: flags ? signatureOf(behind) : undefined,
  };
}

/** @param bytes key, signature, CRC */
export function signatureOf(bytes: Uint8Array): Signature {
  return { key: bytes.slice(0, 32), bytes: bytes.slice(32, 96) };
}

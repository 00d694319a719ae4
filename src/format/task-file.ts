/**
 * A task as a file of its own (SPEC.md, section 7). Loaded when an app adds such a task.
 */
import { toHex } from "../tensor/hex.ts";
import { crc32c } from "./crc32c.ts";
import { parseEntry } from "./directory.ts";
import { align64, Fields } from "./fields.ts";
import { SIGNATURE_BYTES, type Signature, TASK_FILE_MAGIC, type TaskFile } from "./format.ts";
import { decode } from "./messagepack.ts";
import { signatureOf } from "./window.ts";

/**
 * Checks a task file and cuts it into entry and blob.
 * @throws FormatError saying which rule of SPEC.md, section 7, does not hold
 */
export function parseTaskFile(bytes: Uint8Array, file: string): TaskFile {
  const f: Fields = new Fields(bytes, file, "task file");
  f.check(bytes.length >= 64, () => `truncated: ${bytes.length} bytes, its head alone has 64`);
  f.magic(TASK_FILE_MAGIC, "an EigenLoRA task file");
  f.version();
  f.crc(f.u32(60), 60);
  const start = align64(64 + f.u32(12));
  const end = start + f.u32(48);
  const signatureAt = align64(end);
  const signed = bytes.length === signatureAt + SIGNATURE_BYTES;
  f.check(end === bytes.length || signed, () => `${bytes.length} bytes, expected ${end}; fetch it again`);
  const entry = bytes.subarray(64, 64 + f.u32(12));
  f.zero(64 + entry.length, start);
  const blob = bytes.subarray(start, end);
  f.check(
    crc32c(entry) === f.u32(52) && crc32c(blob) === f.u32(56),
    () => "its checksum does not match: it is damaged",
  );
  // As deep as it may come to lie in the list of a pack.
  const parsed = parseEntry(decode(entry, file, f.part, "entry", 15), []);
  let signature: Signature | undefined;
  if (signed) {
    f.zero(end, signatureAt);
    const behind: Fields = new Fields(bytes.subarray(signatureAt), file, "signature");
    behind.crc(behind.u32(SIGNATURE_BYTES - 4), SIGNATURE_BYTES - 4);
    signature = signatureOf(behind.bytes);
  }
  return { ...parsed, basisId: toHex(bytes.subarray(16, 48)), blob, content: bytes.subarray(0, end), signature };
}

/**
 * Kinds of files, recognised by their first bytes, and messages for those that are refused. Loaded when that happens:
 * people swap arguments, and name the file beside.
 */
import { FormatError, type TrustError } from "../errors.ts";
import type { ByteSource } from "../source.ts";
import { MAGIC, TASK_FILE_MAGIC } from "./format.ts";

/** Kinds that can be told, in the words of messages. */
export type FileKind =
  | "an EigenLoRA pack"
  | "an EigenLoRA task file"
  | "a safetensors file"
  | "an ONNX model"
  | "a GGUF file"
  | "a zip archive, as torch.save writes them"
  | "a Python pickle"
  | "a Git LFS pointer"
  | "JSON"
  | "HTML";

/** Bytes that tell the kind. */
const HEAD = 16;

/** Tags of the fields that may follow the version at the beginning of a ModelProto. */
const AFTER_VERSION = [0x12, 0x1a, 0x22, 0x28, 0x32, 0x3a, 0x42];

/** @param head the first 16 bytes of a file, or all that it has */
export function kindOf(head: Uint8Array): FileKind | undefined {
  const begins = (bytes: readonly number[], at = 0): boolean => bytes.every((byte, i) => byte === head[at + i]);
  if (begins(MAGIC)) return "an EigenLoRA pack";
  if (begins(TASK_FILE_MAGIC)) return "an EigenLoRA task file";
  // A header of less than 100 MB, and its first letter.
  if (begins([0, 0, 0], 5) && head[4] === 0 && head[8] === 0x7b) return "a safetensors file";
  if (head[0] === 0x08 && head[1]! > 0 && head[1]! < 32 && AFTER_VERSION.includes(head[2]!)) return "an ONNX model";
  const text = String.fromCharCode(...head.subarray(0, HEAD));
  if (text.startsWith("GGUF")) return "a GGUF file";
  if (text.startsWith("PK\u0003\u0004")) return "a zip archive, as torch.save writes them";
  if (head[0] === 0x80 && head[1]! > 0 && head[1]! < 6) return "a Python pickle";
  if (text.startsWith("version https://")) return "a Git LFS pointer";
  if (/^\s*</.test(text)) return "HTML";
  if (/^\s*[{[]/.test(text)) return "JSON";
  return undefined;
}

/** The kind of an open file; undefined where it cannot be read, too. */
export async function kindOfSource(source: ByteSource): Promise<FileKind | undefined> {
  const head = await source.read(0, Math.min(HEAD, source.byteLength ?? HEAD)).catch(() => undefined);
  return head && kindOf(head);
}

/** Replaces a FormatError by one that names the kind of the file, where that is not the expected one. */
export async function wrongKind(error: unknown, source: ByteSource, expected: string): Promise<unknown> {
  if (!(error instanceof FormatError)) return error;
  const found = await kindOfSource(source);
  if (found === undefined || found === expected) return error;
  const { file, part } = error;
  const advice = found === "a Git LFS pointer" ? "; fetch the file itself: git lfs pull" : "";
  return new FormatError(`this is ${found}, expected ${expected}${advice}`, { file, part, cause: error });
}

/**
 * Error for a pack that was refused, perhaps since it is another kind of file. Clears a cache, which may hold the
 * damage, so that the next try reads the file itself.
 */
export async function refusal(error: FormatError | TrustError, source: ByteSource): Promise<unknown> {
  await source.clear?.().catch(() => undefined);
  return "part" in error && error.part === "window" ? wrongKind(error, source, "an EigenLoRA pack") : error;
}

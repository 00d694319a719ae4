/**
 * A task that comes as a file of its own (SPEC.md, section 7), for an open pack. Loaded when one is added.
 */
import { checkOptions, described, TaskError } from "../errors.ts";
import { isCoded, plainTask } from "../format/coded.ts";
import { isTaskId, parseEntry, parseTask, signatureOf } from "../format/directory.ts";
import { align64, decode, Fields, integrityOf } from "../format/fields.ts";
import {
  type Directory,
  type PackModule,
  SIGNATURE_BYTES,
  type Signature,
  TASK_BLOB_MAGIC,
  TASK_FILE_MAGIC,
  type TaskBlob,
  type TaskEntry,
  type TaskFile,
} from "../format/format.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import { paced, pacer } from "../pace.ts";
import { type ByteSource, type ReadOptions, readAll, type SourceInput } from "../source.ts";
import { toHex } from "../text.ts";
import type { AddTaskOptions, Trust } from "./trust.ts";

/** Facts about the pack that a task file belongs to; an open pack has them. */
export interface TaskBasis {
  readonly basisId: string;
  readonly modules: readonly PackModule[];
  readonly directory: Pick<Directory, "basisBytes">;
}

/** Bytes of a task file in front of its entry. */
const HEAD_BYTES = 64;

/** Ids of the tasks whose files are being read, by their pack. */
const coming = new WeakMap<TaskBasis, Set<string>>();

/**
 * A task file, checked by itself.
 * @throws FormatError when it is damaged, or another kind of file
 */
export async function readTask(source: ByteSource, options?: ReadOptions): Promise<TaskFile> {
  const { name } = source;
  const bytes = await readAll(source, { ...options, most: mostBytes });
  try {
    return await paced(parseInPieces(bytes, name), pacer(options?.signal));
  } catch (error) {
    // What was read says the kind: the rest may have no end.
    const read = async (_: number, length: number): Promise<Uint8Array> => bytes.subarray(0, length);
    throw await wrongKind(error, { name, byteLength: bytes.length, read }, "an EigenLoRA task file");
  }
}

/** Most bytes of a task file that begins so: as many as it says, and a signature. */
function mostBytes(first: Uint8Array): number {
  const f: Fields = new Fields(first, "", "");
  const isTask = first.length >= HEAD_BYTES && TASK_FILE_MAGIC.every((byte, i) => byte === first[i]);
  return isTask ? align64(align64(HEAD_BYTES + f.u32(12)) + f.u32(48)) + SIGNATURE_BYTES : HEAD_BYTES;
}

/**
 * Reads a task file for a pack. Its id is taken as soon as this begins.
 * @param id the task's in the pack
 * @param tasks of the pack, by id; not its snapshot of them, which is made again after every change
 * @param trust of the pack, where it has some
 * @param options of `Pack.addTask`
 * @param put adds the task: `integrity` is the SHA-256 of `stored`, the blob as the file has it, where the platform can
 *   tell
 * @throws FormatError when the file is damaged, TaskError when it belongs to another basis or the id is taken,
 *   TrustError when it is not what is trusted
 */
export async function addTaskFile(
  file: SourceInput,
  id: string,
  pack: TaskBasis,
  tasks: ReadonlyMap<string, unknown>,
  trust: Trust | undefined,
  options: AddTaskOptions,
  put: (entry: TaskEntry, integrity: string | undefined, stored: Uint8Array, blob: TaskBlob) => void,
): Promise<void> {
  checkOptions("addTask", options, ["integrity", "signal"]);
  if (typeof id !== "string" || !isTaskId(id)) {
    throw new TaskError(`${described(id)} cannot name a task`, { task: id });
  }
  const ids = coming.get(pack) ?? new Set();
  if (tasks.has(id) || ids.has(id))
    throw new TaskError(`a task "${id}" already exists; choose another id`, { task: id });
  // Taken from here on, though the file has yet to be read.
  coming.set(pack, ids.add(id));
  const { integrity, signal } = options;
  let source: ByteSource | undefined;
  try {
    source = await openSource(file, {}, "addTask");
    const { name } = source;
    const parsed = await readTask(source, { signal });
    const checks =
      trust ?? (integrity === undefined ? undefined : await (await import("./trust.ts")).Trust.create(name, {}));
    await checks?.checkTaskFile(parsed, name, integrity);
    const { blob, basisId: _, content: __, signature: ___, ...entry } = parsed;
    const read = await readBlob(parsed, id, name, pack, checks, signal);
    // Pages without https have no SHA-256; a caller cannot have asked for a hash there.
    const hash = globalThis.crypto?.subtle && (await integrityOf(blob));
    put({ ...entry, id }, hash, blob, read);
  } finally {
    ids.delete(id);
    await source?.close?.();
  }
}

/**
 * Holds the blob of a task file against its pack.
 * @param id the task's in the pack
 * @param trust refuses what a coded blob becomes where that is revoked
 * @throws TaskError when it belongs to another basis, FormatError when it breaks a rule, TrustError when it is revoked
 */
export async function readBlob(
  { blob, basisId, brings }: TaskFile,
  id: string,
  file: string,
  pack: TaskBasis,
  trust: Trust | undefined,
  signal?: AbortSignal,
): Promise<TaskBlob> {
  if (basisId !== pack.basisId) {
    const message = `${file} belongs to the basis ${basisId}, this pack has ${pack.basisId}; make it for this pack`;
    throw new TaskError(message, { task: id });
  }
  const part = `task "${id}"`;
  const plain = await plainTask(blob, { file, part, before: pack.directory.basisBytes, signal });
  if (plain !== blob) await trust?.checkDecoded(plain, part, file);
  return paced(parseTask(plain, pack.modules, file, { id, brings }), pacer(signal));
}

/**
 * Checks a task file and cuts it into entry and blob.
 * @throws FormatError saying which rule of SPEC.md, section 7, does not hold
 */
export function* parseInPieces(bytes: Uint8Array, file: string): Generator<void, TaskFile> {
  const f: Fields = new Fields(bytes, file, "task file");
  if (bytes.length < HEAD_BYTES) f.fail(`truncated: ${bytes.length} bytes, its head alone has ${HEAD_BYTES}`);
  f.magic(TASK_FILE_MAGIC, "an EigenLoRA task file");
  f.version();
  yield* f.crc(f.u32(60), 60);
  const entry = bytes.subarray(HEAD_BYTES, HEAD_BYTES + f.u32(12));
  const start = align64(HEAD_BYTES + f.u32(12));
  const end = start + f.u32(48);
  const signatureAt = align64(end);
  const signed = bytes.length === signatureAt + SIGNATURE_BYTES;
  if (end !== bytes.length && !signed) f.fail(`${bytes.length} bytes, expected ${end}; fetch it again`);
  f.zero(HEAD_BYTES + entry.length, start);
  const blob = bytes.subarray(start, end);
  yield* new Fields(entry, file, f.part).crc(f.u32(52));
  yield* new Fields(blob, file, f.part).crc(f.u32(56));
  if (!isCoded(blob) && (blob.length < 8 || f.u32(start) !== TASK_BLOB_MAGIC))
    f.fail(`the ${blob.length} bytes behind its entry are no task blob`);
  // The entry may nest as deep as in the list of a pack, no deeper.
  const parsed = yield* parseEntry(yield* decode(entry, file, f.part, "entry", 15), []);
  let signature: Signature | undefined;
  if (signed) {
    f.zero(end, signatureAt);
    const behind: Fields = new Fields(bytes.subarray(signatureAt), file, "signature");
    yield* behind.crc(behind.u32(SIGNATURE_BYTES - 4), SIGNATURE_BYTES - 4);
    signature = signatureOf(behind.bytes);
  }
  const { id, adapterBytes, metadata, brings } = parsed;
  const basisId = toHex(bytes.subarray(16, 48));
  return { id, adapterBytes, metadata, brings, basisId, blob, content: bytes.subarray(0, end), signature };
}

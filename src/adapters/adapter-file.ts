/**
 * The files of an adapter, whatever its format: tensors from a path, URL, Blob, buffer or ByteSource, and task.json. Portable: folders are
 * read in folder.ts.
 */

import { AdapterError } from "../errors.ts";
import { checkEntry } from "../format/encode.ts";
import type { TaskMetadata } from "../format/format.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import type { ByteSource, SourceInput } from "../source.ts";
import { openSafetensors as readHeader, type SafetensorsFile } from "../tensor/safetensors.ts";
import type { TensorFile } from "../tensor/tensor-file.ts";
import type { Adapter } from "./adapter.ts";

/**
 * Opens a file with one of the readers of src/tensor; closes its source if that fails.
 * @param expected kind of file, for messages
 */
export async function openFile<F>(
  input: SourceInput,
  read: (source: ByteSource) => Promise<F>,
  expected: string,
): Promise<F & Pick<Adapter, "close">> {
  const source = await openSource(input);
  const close = async (): Promise<void> => source.close?.();
  try {
    return { ...(await read(source)), close };
  } catch (error) {
    const refused = await wrongKind(error, source, expected);
    await close();
    throw refused;
  }
}

export const openSafetensors = (input: SourceInput): Promise<SafetensorsFile & Pick<Adapter, "close">> =>
  openFile(input, readHeader, "a safetensors file");

/** Parts of an adapter that a reader finds in an open file; the rest has defaults. */
type Found = Pick<Adapter, "modules" | "saved"> & Partial<Pick<Adapter, "baseModel" | "metadata" | "warnings">>;

/**
 * Reads an adapter from one file of tensors: the common frame of the readers of all formats. Closes the file if `read` fails.
 * @param open opens the file
 * @param read reads the adapter; `metadata` is that of task.json
 * @throws errors of `open` and `read`; AdapterError for an invalid task.json
 */
export async function readAdapterFile<F extends TensorFile & { close(): Promise<void> }>(
  {
    id,
    file,
    tensors,
    task,
  }: Pick<Adapter, "id" | "file"> & { readonly tensors: SourceInput; readonly task?: unknown },
  open: (input: SourceInput) => Promise<F>,
  read: (found: F, metadata: TaskMetadata) => Found | Promise<Found>,
): Promise<Adapter> {
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const found = await open(tensors);
  const { byteLength, close } = found;
  try {
    return {
      id,
      file,
      byteLength,
      baseModel: undefined,
      metadata,
      warnings: [],
      ...(await read(found, metadata)),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

// Reads `task.json`, the file next to an adapter with facts that tensors do not tell: class names, licence, origin. All its plain values
// become the task's metadata. It is not the adapter's own configuration.

/** Metadata is read with a pack's directory, before any task: it must stay small. */
const MAX_METADATA_BYTES = 64 * 1024;

/**
 * Checks the contents of a task.json.
 * @param task parsed JSON; undefined when there is no such file
 * @param file its path, for messages
 * @throws AdapterError naming the field that a pack does not hold
 */
export function readTaskMetadata(task: unknown, file: string): TaskMetadata {
  if (task === undefined) return {};
  if (typeof task !== "object" || task === null || Array.isArray(task))
    throw new AdapterError(`is not a JSON object; write {"labels": [...]} or remove it`, { file });
  const metadata: TaskMetadata = { ...task };
  try {
    checkEntry({ id: "task", adapterBytes: 0, metadata, brings: [] }, file);
  } catch (cause) {
    const message = (cause as Error).message.replace(/^.*?, task: (tasks\[0\]\.metadata\.?)?/s, "");
    throw new AdapterError(`${message}; correct or remove it`, { file, field: /^\w*/.exec(message)![0], cause });
  }
  const { length } = new TextEncoder().encode(JSON.stringify(task));
  if (length > MAX_METADATA_BYTES)
    throw new AdapterError(`has ${length} bytes, ${MAX_METADATA_BYTES} at most are kept; shorten it`, { file });
  return metadata;
}

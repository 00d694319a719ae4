/**
 * Reads task files for tools, without the open pack that they belong to.
 */
import { checkOptions } from "../errors.ts";
import type { TaskToWrite } from "../format/encode.ts";
import type { TaskFile } from "../format/format.ts";
import { openSource } from "../open-source.ts";
import { atOnce } from "../pace.ts";
import type { ReadOptions, SourceInput } from "../source.ts";
import { parseInPieces, readBlob, readTask, type TaskBasis } from "./task-file.ts";

/** Options of `readTaskFile`. */
export interface ReadTaskFileOptions extends ReadOptions {
  /**
   * The pack that the task belongs to: the blob is held against it too, as `pack.addTask` does. Default: the blob is
   * not looked into.
   */
  readonly pack?: TaskBasis;
}

/**
 * Reads a task file: what it says of the task, and which basis it belongs to. Terms, parameters and their numbers need
 * the pack of that basis.
 * @param input path, URL, Blob, ArrayBuffer or any ByteSource
 * @throws SourceError when it cannot be read, FormatError when it is damaged or another kind of file, TaskError when it
 *   belongs to another basis than that of `pack`
 * @example
 * const { basisId } = await readTaskFile("sst2.eigentask");
 * if (basisId === pack.basisId) await pack.addTask("mine", "sst2.eigentask");
 */
export async function readTaskFile(input: SourceInput, options: ReadTaskFileOptions = {}): Promise<TaskFile> {
  checkOptions("readTaskFile", options, ["pack", "onBytes", "signal"]);
  const source = await openSource(input, {}, "readTaskFile");
  try {
    const task = await readTask(source, options);
    if (options.pack) await readBlob(task, task.id, source.name, options.pack, undefined, options.signal);
    return task;
  } finally {
    await source.close?.();
  }
}

/** A task file in memory. @throws FormatError saying which rule of SPEC.md, section 7, does not hold */
export function parseTaskFile(bytes: Uint8Array, file: string): TaskFile {
  return atOnce(parseInPieces(bytes, file));
}

/**
 * The task of a task file, as it goes into a pack; its entry holds no bytes of the file.
 * @throws FormatError as `parseTaskFile`
 */
export function taskIn(bytes: Uint8Array, file: string): TaskToWrite {
  const { id, adapterBytes, metadata, brings, blob } = parseTaskFile(bytes, file);
  return { entry: { id, adapterBytes, metadata, brings }, blob };
}

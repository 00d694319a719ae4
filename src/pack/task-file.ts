/**
 * A task that comes as a file of its own, for an open pack. Loaded when one is added.
 */
import { described } from "../arguments.ts";
import { TaskError } from "../errors.ts";
import { isTaskId, type TaskBlob, type TaskEntry } from "../format/format.ts";
import { parseTask } from "../format/task.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { openSource, type SourceInput } from "../source.ts";
import type { Pack } from "./pack.ts";

/**
 * @param id the task's in the pack
 * @throws FormatError when the file is damaged, TaskError when it belongs to another basis or the id is taken
 */
export async function readTaskFile(
  file: SourceInput,
  id: string,
  { basisId, modules, tasks }: Pack,
): Promise<TaskEntry & { readonly blob: TaskBlob }> {
  const source = await openSource(file);
  try {
    const { name } = source;
    // Of a URL the size is known after a first read.
    if (source.byteLength === undefined) await source.read(0, 64);
    const { blob, basisId: found, ...entry } = parseTaskFile(await source.read(0, source.byteLength ?? 0), name);
    if (found !== basisId) {
      throw new TaskError(`${name} belongs to the basis ${found}, this pack has ${basisId}; make it for this pack`, {
        task: id,
      });
    }
    if (typeof id !== "string" || !isTaskId(id)) {
      throw new TaskError(`${described(id)} cannot name a task`, { task: id });
    }
    if (tasks.has(id)) throw new TaskError(`there is a task "${id}" already; choose another id`, { task: id });
    return { ...entry, blob: parseTask(blob, modules, name, id) };
  } finally {
    await source.close?.();
  }
}

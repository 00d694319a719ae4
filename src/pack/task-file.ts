/**
 * A task that comes as a file of its own, for an open pack. Loaded when one is added.
 */
import { checkOptions, described } from "../arguments.ts";
import { TaskError } from "../errors.ts";
import { plainTask } from "../format/coded.ts";
import { isTaskId } from "../format/directory.ts";
import type { Directory, PackModule, TaskBlob, TaskEntry, TaskFile } from "../format/format.ts";
import { wrongKind } from "../format/kind.ts";
import { parseTask } from "../format/task.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { openSource } from "../open-source.ts";
import { type ByteSource, readAll, type SourceInput } from "../source.ts";
import type { TaskTrust, Trust } from "./trust.ts";

/** The open pack. */
interface Target {
  readonly basisId: string;
  readonly modules: readonly PackModule[];
  readonly directory: Pick<Directory, "basisBytes">;
}

/**
 * A task file, checked by itself.
 * @throws FormatError when it is damaged, or another kind of file
 */
export async function readTask(source: ByteSource): Promise<TaskFile> {
  try {
    return parseTaskFile(await readAll(source), source.name);
  } catch (error) {
    throw await wrongKind(error, source, "an EigenLoRA task file");
  }
}

/**
 * @param id the task's in the pack
 * @param tasks of the pack, by id; not its snapshot of them, which is made again after every change
 * @param trust of the pack, where it has some
 * @param options of `Pack.addTask`
 * @throws FormatError when the file is damaged, TaskError when it belongs to another basis or the id is taken, TrustError when it is
 *   not what is trusted
 */
export async function readTaskFile(
  file: SourceInput,
  id: string,
  { basisId, modules, directory }: Target,
  tasks: ReadonlyMap<string, unknown>,
  trust: Trust | undefined,
  options: TaskTrust,
): Promise<TaskEntry & { readonly blob: TaskBlob }> {
  checkOptions("addTask", options, ["integrity"]);
  const { integrity } = options;
  const source = await openSource(file, {}, "addTask");
  try {
    const { name } = source;
    const parsed = await readTask(source);
    const checks =
      trust ?? (integrity === undefined ? undefined : await (await import("./trust.ts")).Trust.create(name, {}));
    await checks?.checkTaskFile(parsed, name, integrity);
    const { blob, basisId: found, content: _, signature: __, ...entry } = parsed;
    if (found !== basisId) {
      throw new TaskError(`${name} belongs to the basis ${found}, this pack has ${basisId}; make it for this pack`, {
        task: id,
      });
    }
    if (typeof id !== "string" || !isTaskId(id)) {
      throw new TaskError(`${described(id)} cannot name a task`, { task: id });
    }
    if (tasks.has(id)) throw new TaskError(`a task "${id}" already exists; choose another id`, { task: id });
    const plain = plainTask(blob, name, `task "${id}"`, directory.basisBytes);
    return { ...entry, blob: parseTask(plain, modules, name, { ...entry, id }) };
  } finally {
    await source.close?.();
  }
}

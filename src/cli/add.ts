/**
 * The command add: more tasks behind those of a pack, whose bytes stay. An adapter is projected onto the components, a task
 * file (SPEC.md, section 7) belongs to them already.
 */
import { open, readFile, stat } from "node:fs/promises";
import { resolve } from "node:path";
import { SourceError, TaskError } from "../errors.ts";
import { TASK_FILE_MAGIC } from "../format/format.ts";
import { layoutAppend, type TaskToWrite } from "../format/layout.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { projectAdapters } from "../pack/build.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { type Attach, command } from "./command.ts";
import { append } from "./files.ts";
import { openAdapters, storedDtypes, taskOf, warnings } from "./open.ts";
import { as } from "./options.ts";
import { bytes, counting, lossTable } from "./output.ts";

/** A task file that was named, and what its task is to be called. */
interface NamedTask {
  readonly path: string;
  readonly id: string;
}

export const add: Attach = command({
  usage: "add <PACK> <ADAPTER_OR_TASKFILE...>",
  does: "append tasks: adapters projected onto the components, or task files",
  details:
    "Adapters may come as a folder of them. Task files (.eigentask) are taken as they are. The bytes of other tasks stay.",
  options: { as },
  async run([file, ...paths]: [string, ...string[]], { as }, run) {
    const found = await Promise.all(paths.map(isTaskFile));
    const names = new Map(as);
    const files = await nameTasks(
      paths.filter((_, i) => found[i]),
      names,
    );
    const folders = paths.filter((_, i) => !found[i]);
    const adapters = await openAdapters(folders, names, run);
    const { before, residual, learned, ...done } = await append(file, async () => {
      const pack = run.closing(await openPack(file));
      refuseTaken(pack, [...adapters.map(({ id, file }) => ({ id, path: file })), ...files]);
      const projected = await projectAdapters(pack, adapters, await storedDtypes(pack), counting(run, "module"));
      const learned: TaskToWrite[] = [];
      for (const { path, id } of files) {
        await pack.addTask(id, path);
        learned.push(await taskOf(pack, id));
      }
      const { superblock } = pack.window;
      const plan = layoutAppend(pack.directory, superblock, [...projected, ...learned]);
      return { ...plan, residual: projected.map((task) => task.residual), learned, before: superblock.committed };
    });
    warnings(adapters, run);
    const bytesAfter = done.offset + done.body.reduce((sum, chunk) => sum + chunk.length, 0);
    const added = [...adapters, ...files].map(({ id }) => id);
    return {
      json: { file, added, bytesBefore: before, bytesAfter, residual },
      text: [
        `${file}: ${added.length} tasks added, ${bytes(before)} → ${bytes(bytesAfter)}`,
        ...(residual.length > 0 ? [lossTable(residual)] : []),
        ...learned.map(({ entry, blob }) => `${entry.id}: ${bytes(blob.length)}, as it came`),
      ],
    };
  },
});

/** By what it begins with, or what it is called: one that is damaged is to be refused as what it was. */
async function isTaskFile(path: string): Promise<boolean> {
  if (!(await stat(path).catch(() => undefined))?.isFile()) return false;
  if (path.endsWith(".eigentask")) return true;
  const file = await open(path).catch((cause: Error) => {
    throw new SourceError(`cannot be read: ${cause.message}`, { file: path, cause });
  });
  try {
    const { buffer, bytesRead } = await file.read(new Uint8Array(TASK_FILE_MAGIC.length));
    return bytesRead === buffer.length && TASK_FILE_MAGIC.every((byte, i) => byte === buffer[i]);
  } finally {
    await file.close();
  }
}

/** Takes the new names of task files, by id or path, out of `names`; the rest are of adapters. */
async function nameTasks(paths: readonly string[], names: Map<string, string>): Promise<NamedTask[]> {
  const used = new Set<string>();
  const tasks: NamedTask[] = [];
  for (const path of paths) {
    const { id } = parseTaskFile(new Uint8Array(await readFile(path)), path);
    const old = [...names.keys()].find((name) => name === id || resolve(name) === resolve(path));
    if (old !== undefined) used.add(old);
    tasks.push({ path, id: (old === undefined ? undefined : names.get(old)) ?? id });
  }
  for (const name of used) names.delete(name);
  return tasks;
}

/** @throws TaskError naming an id that two would have */
function refuseTaken(pack: Pack, added: readonly NamedTask[]): void {
  const owners = new Map([...pack.tasks.keys()].map((id) => [id, pack.name]));
  for (const { id, path } of added) {
    const owner = owners.get(id);
    if (owner === pack.name) {
      throw new TaskError(`${owner} has a task "${id}" already; rename the new one: --as ${id}=NEW`, { task: id });
    }
    if (owner !== undefined) {
      throw new TaskError(`${owner} and ${path} are both called ${id}; rename one with --as ${path}=NEW`, { task: id });
    }
    owners.set(id, path);
  }
}

/**
 * The command add: more tasks behind those of a pack, whose bytes stay. An adapter is projected onto the components, a task
 * file (SPEC.md, section 7) belongs to them already.
 */
import { open, readFile, stat } from "node:fs/promises";
import { resolve } from "node:path";
import { readAdapters } from "../adapters/folder.ts";
import { SourceError, TaskError } from "../errors.ts";
import { TASK_FILE_MAGIC } from "../format/format.ts";
import { layoutAppend, type TaskToWrite } from "../format/layout.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { projectAdapters } from "../pack/project.ts";
import { type Arguments, renames } from "./args.ts";
import { append } from "./files.ts";
import { bytes, type Output, percent, table } from "./output.ts";
import { closeAll, type Result, storedTypes } from "./packs.ts";

/** A task file that was named, and what its task is to be called. */
interface NamedTask {
  readonly path: string;
  readonly id: string;
}

/** `add FILE ADAPTER_OR_TASK...` */
export async function addCommand(args: Arguments, out: Output): Promise<Result> {
  const [file = "", ...paths] = args.positionals;
  const found = await Promise.all(paths.map(isTaskFile));
  const names = renames(args);
  const files = await nameTasks(
    paths.filter((_, i) => found[i]),
    names,
  );
  const adapters = await readAdapters(
    paths.filter((_, i) => !found[i]),
    { rename: names },
  );
  try {
    const done = await append(file, async () => {
      const pack = await openPack(file);
      try {
        refuseTaken(pack, [...adapters.map(({ id, file }) => ({ id, path: file })), ...files]);
        const types = await storedTypes(pack);
        const progress = (done: number, of: number): void => out.progress("module", done, of);
        const projected = await projectAdapters(pack, adapters, types, progress);
        const learned: TaskToWrite[] = [];
        for (const { path, id } of files) learned.push(await takeTask(pack, path, id));
        const { superblock } = pack.window;
        const plan = layoutAppend(pack.directory, superblock, [...projected, ...learned]);
        return { ...plan, residual: projected.map((t) => t.residual), learned, before: superblock.committed };
      } finally {
        await pack.close();
      }
    });
    for (const adapter of adapters) for (const warning of adapter.warnings) out.warn(`${adapter.id}: ${warning}`);
    const { before, residual, learned } = done;
    const bytesAfter = done.offset + done.body.reduce((sum, c) => sum + c.length, 0);
    const added = [...adapters, ...files].map(({ id }) => id);
    const text = [
      `${file}: ${added.length} tasks added, ${bytes(before)} → ${bytes(bytesAfter)}`,
      ...(residual.length > 0
        ? [table([["task", "ΔW error", "largest"], ...residual.map((r) => [r.id, percent(r.mean), percent(r.max)])])]
        : []),
      ...learned.map(({ entry, blob }) => `${entry.id}: ${bytes(blob.length)}, as it came`),
    ].join("\n");
    return { json: { file, added, bytesBefore: before, bytesAfter, residual }, text };
  } finally {
    await closeAll(adapters);
  }
}

/** By what it begins with, or what it is called: one that is damaged is to be refused as what it was. */
async function isTaskFile(path: string): Promise<boolean> {
  if (!(await stat(path).catch(() => undefined))?.isFile()) return false;
  if (/\.(eigentask|etask)$/.test(path)) return true;
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

async function takeTask(pack: Pack, path: string, id: string): Promise<TaskToWrite> {
  await pack.addTask(id, path);
  const { adapterBytes, metadata, brings } = pack.tasks.get(id)!;
  return { entry: { id, adapterBytes, metadata, brings }, blob: (await pack.load(id)).bytes };
}

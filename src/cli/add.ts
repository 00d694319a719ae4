/**
 * The command add: more tasks behind those of a pack, whose bytes stay. An adapter is projected onto the components, a task
 * file (SPEC.md, section 7) belongs to them already.
 */
import { stat } from "node:fs/promises";
import { resolve } from "node:path";
import { SourceError, TaskError } from "../errors.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { projectAdapters } from "../pack/add.ts";
import type { Pack } from "../pack/pack.ts";
import { MUCH, type TaskLoss } from "../pack/report.ts";
import { planAppend } from "../pack/write.ts";
import { type Attach, command } from "./command.ts";
import { append } from "./files.ts";
import { anyBase, as, key, number, readFor, revoked, SHARE } from "./options.ts";
import { bytes, count, counting, lossTable, percent, sum, warnOf } from "./output.ts";
import type { Run } from "./run.ts";
import { signerOf, warnUnsigned } from "./signer.ts";
import { refuseOtherBase, storedDtypes } from "./tasks.ts";

/** A task file that was named, and what its task is to be called. */
interface NamedTask {
  readonly path: string;
  readonly id: string;
}

export const add: Attach = command({
  usage: "add <PACK> <ADAPTER_OR_TASKFILE...>",
  does: "Add tasks to a pack, from adapters or task files.",
  details:
    "Adapters, or folders of them, are expressed in the pack's components; where its tasks have private terms, so do the new ones. " +
    "Task files (.eigentask) are copied. Other tasks are not changed.",
  options: {
    as,
    anyBase,
    maxLoss: number(
      "E",
      "Add nothing if a new task would lose more than this share of its ΔW. Default: no limit.",
      SHARE,
    ),
    base: readFor,
    key,
    revoked,
  },
  async run([file, ...paths]: [string, ...string[]], { as, anyBase, maxLoss, base, key }, run, out) {
    const sign = await signerOf(key);
    const found = await Promise.all(paths.map((path) => isTaskFile(path, run)));
    const names = new Map(as);
    const files = await nameTasks(
      paths.filter((_, i) => found[i]),
      names,
      run,
    );
    const folders = paths.filter((_, i) => !found[i]);
    const adapters = await run.adapters(folders, names, base);
    const named = [...adapters.map(({ id, file }) => ({ id, path: file })), ...files];
    const pack = await run.pack(file);
    refuseTaken(pack, named);
    refuseOtherBase(pack, adapters, anyBase);
    const projected = await projectAdapters(pack, adapters, await storedDtypes(pack), counting(out, "module"));
    const learned: TaskToWrite[] = [];
    for (const { path, id } of files) await pack.addTask(id, path);
    for (const { id } of files) learned.push({ entry: pack.tasks.get(id)!, blob: await pack.stored(id) });
    const residual = projected.map((task) => task.residual);
    if (maxLoss !== undefined) refuseLoss(residual, maxLoss, file);
    await run.lock(file);
    // Others may have written since.
    const now = await run.pack(file, { bases: "later" });
    refuseOther(pack, now);
    refuseTaken(now, named);
    const plan = await planAppend(now, [...projected, ...learned], sign);
    append(file, plan);
    warnOf(adapters, out);
    for (const warning of projected.flatMap(({ warnings }) => warnings)) out.warn(warning);
    for (const { id, total } of residual)
      if (total > MUCH)
        out.warn(
          `task "${id}" loses ${percent(total)} of its ΔW, which the pack's components lack: pack all adapters again, with this ` +
            "one; --max-loss refuses such adapters",
        );
    warnUnsigned(now, sign, out);
    const before = now.window.superblock.committed;
    const bytesAfter = plan.offset + sum(plan.body.map(({ length }) => length));
    const added = [...adapters, ...files].map(({ id }) => id);
    return {
      json: { file, added, bytesBefore: before, bytesAfter, residual },
      text: [
        `${file}: ${count(added.length, "task")} added, ${bytes(before)} → ${bytes(bytesAfter)}`,
        ...(residual.length > 0 ? lossTable(residual) : []),
        ...learned.map(({ entry, blob }) => `${entry.id}: ${bytes(blob.length)}, unchanged`),
      ],
    };
  },
});

/** @throws TaskError naming the task that loses most, when that is more than it may */
function refuseLoss(residual: readonly TaskLoss[], most: number, pack: string): void {
  const worst = residual.reduce<TaskLoss | undefined>((a, b) => (a && a.total >= b.total ? a : b), undefined);
  if (!worst || worst.total <= most) return;
  throw new TaskError(
    `task "${worst.id}" would lose ${percent(worst.total)} of its ΔW in ${pack}, more than --max-loss ${most}: nothing was added; ` +
      "pack all adapters again, with this one",
    { task: worst.id },
  );
}

/** By what it begins with, or what it is called: one that is damaged is to be refused as what it was. */
export async function isTaskFile(path: string, run: Run): Promise<boolean> {
  if (!(await stat(path).catch(() => undefined))?.isFile()) return false;
  if (path.endsWith(".eigentask")) return true;
  return (await run.kindOf(path)) === "an EigenLoRA task file";
}

/** Takes the new names of task files, by id or path, out of `names`; the rest are of adapters. */
async function nameTasks(paths: readonly string[], names: Map<string, string>, run: Run): Promise<NamedTask[]> {
  const tasks: NamedTask[] = [];
  const used: string[] = [];
  for (const path of paths) {
    const { id } = await run.taskFile(path);
    const [old, name = id] = [...names].find(([old]) => old === id || resolve(old) === resolve(path)) ?? [];
    if (old !== undefined) used.push(old);
    tasks.push({ path, id: name });
  }
  for (const name of used) names.delete(name);
  return tasks;
}

/** @throws SourceError when there is another pack by now */
function refuseOther({ basisId, name }: Pack, now: Pack): void {
  if (now.basisId === basisId) return;
  throw new SourceError(
    "has become a pack of another basis in the meantime; nothing was added, run the command again",
    {
      file: name,
    },
  );
}

/** @throws TaskError naming an id that two would have */
function refuseTaken(pack: Pack, added: readonly NamedTask[]): void {
  const owners = new Map<string, string>();
  for (const { id, path } of added) {
    const other = owners.get(id);
    const message = pack.tasks.has(id)
      ? `${pack.name} already has a task "${id}"; rename the new one: --as ${id}=NEW`
      : other && `${other} and ${path} are both called ${id}; rename one with --as ${path}=NEW`;
    if (message) throw new TaskError(message, { task: id });
    owners.set(id, path);
  }
}

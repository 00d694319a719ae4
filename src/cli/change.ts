/**
 * Commands that change a pack in place. Add puts tasks behind those of the pack, whose bytes stay: an adapter is projected onto the
 * components, a task file (SPEC.md, section 7) belongs to them already. Remove and compact write the pack again.
 */
import { stat } from "node:fs/promises";
import { resolve } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import { refuseBases } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { SourceError, TaskError } from "../errors.ts";
import type { Sign, TaskToWrite } from "../format/encode.ts";
import { hubName } from "../http/hub-name.ts";
import { MAX_LOSS, projectAdapters, storedDtypes } from "../pack/add.ts";
import { MUCH } from "../pack/report.ts";
import { createSigner, freshPack, planAppend } from "../pack/write.ts";
import { addedByAnswers, judged as judgedOptions, OUT_OF_TIME } from "./by-answers.ts";
import { type Attach, command } from "./command.ts";
import { append, readText, writeWhole } from "./files.ts";
import { anyBase, as, given, group, key, number, readFor, reading, revoked, text, UsageError } from "./options.ts";
import { bytes, count, lossTable, type Output, percent, sum, warnOf } from "./output.ts";
import type { Run } from "./run.ts";

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
  example: "add tasks.eigen new-adapter/",
  options: {
    as,
    anyBase,
    maxLoss: number(
      "P",
      `Add nothing if a new task would lose more than this share of its ΔW; 1 allows any loss. Default: ${MAX_LOSS}.`,
      { expected: "a share from 0 to 1, such as 0.5 or 50%", holds: (n) => n >= 0 && n <= 1 },
    ),
    base: readFor,
    key,
    revoked,
    ...group("Judged by answers", {
      ...judgedOptions,
      model: reading(
        "model",
        text(
          "MODEL.onnx",
          "Distil adapters onto what the pack's tasks share, until they answer as the adapters do. Needs onnxruntime-node.",
        ),
      ),
    }),
  },
  reads: ["own", "repository"],
  async run([file, ...paths]: [string, ...string[]], { as, anyBase, maxLoss, base, key, ...asked }, run, out) {
    const { model } = asked;
    checkJudged(asked, maxLoss);
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
    const isJudged = model !== undefined && adapters.length > 0;
    const projected = isJudged
      ? []
      : await projectAdapters(pack, adapters, await storedDtypes(pack), { maxLoss, onProgress: out.progress });
    const judged = isJudged ? await addedByAnswers(pack, adapters, { ...asked, model }, run, out) : [];
    const learned: TaskToWrite[] = [];
    for (const { path, id } of files) await pack.addTask(id, path);
    for (const { id } of files) learned.push({ entry: pack.tasks.get(id)!, blob: await pack.stored(id) });
    const residual = projected.map((task) => task.residual);
    await run.lock(file);
    // Others may have written since.
    const now = await run.pack(file, { bases: "later" });
    refuseOther(pack, now);
    refuseTaken(now, named);
    const plan = await planAppend(now, [...projected, ...judged, ...learned], sign);
    append(file, plan);
    warnOf(adapters, out);
    for (const warning of projected.flatMap(({ warnings }) => warnings)) out.warn(warning);
    for (const { id, total } of residual)
      if (total > MUCH)
        out.warn(
          `task "${id}" loses ${percent(total)} of its ΔW, which the pack's components lack: pack all adapters again, with this one`,
        );
    warnUnsigned(now, sign, out);
    const before = now.window.superblock.committed;
    const bytesAfter = plan.offset + sum(plan.body.map(({ length }) => length));
    const added = [...adapters, ...files].map(({ id }) => id);
    return {
      json: {
        ...{ file, added, bytesBefore: before, bytesAfter, residual },
        ...(isJudged && { answers: judged.map(({ entry: { id }, agreement }) => ({ id, agreement })) }),
      },
      text: [
        `${file}: ${count(added.length, "task")} added, ${bytes(before)} → ${bytes(bytesAfter)}`,
        ...(residual.length > 0 ? lossTable(residual) : []),
        ...judged.map(agreementText),
        ...learned.map(({ entry, blob }) => `${entry.id}: ${bytes(blob.length)}, unchanged`),
      ],
      ...(judged.some(({ agreement, reason }) => agreement === undefined && !reason) && { exitCode: OUT_OF_TIME }),
    };
  },
});

/** Options that a model is needed for. */
const JUDGED = ["minutes", "text", "agreement", "provider", "threads", "tokens", "tokenizer"] as const;

/** @throws UsageError for options that do not go together */
function checkJudged(asked: Partial<Record<(typeof JUDGED)[number] | "model", unknown>>, maxLoss?: number): void {
  const [needs] = given(asked, ...JUDGED);
  if (needs !== undefined && asked.model === undefined) throw new UsageError(`${needs} needs --model`);
  if (maxLoss !== undefined && asked.model !== undefined)
    throw new UsageError("--max-loss is about ΔW, with --model answers decide: take --agreement");
}

function agreementText({ entry, blob, agreement, reason }: Awaited<ReturnType<typeof addedByAnswers>>[number]): string {
  const unasked = `stored as without a model${reason === undefined ? ", since the command was stopped" : `: ${reason}`}`;
  const said = agreement === undefined ? unasked : `answers ${percent(agreement)} like the adapter`;
  return `${entry.id}: ${bytes(blob.length)}, ${said}`;
}

/** Goes by what a file begins with, or by its name: a damaged task file is to be refused as one. */
export async function isTaskFile(path: string, run: Run): Promise<boolean> {
  const onHub = hubName(path) !== undefined;
  if (!onHub && !(await stat(path).catch(() => undefined))?.isFile()) return false;
  if (path.endsWith(".eigentask")) return true;
  if (onHub) return false;
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

export const remove: Attach = command({
  usage: "remove <PACK> <TASK...>",
  does: "Remove tasks from a pack.",
  details: "Other tasks are not changed.",
  example: "remove tasks.eigen reviews",
  options: { key },
  reads: ["own", undefined],
  async run([file, ...ids]: [string, ...string[]], { key }, run, out) {
    const sign = await signerOf(key);
    await run.lock(file);
    const pack = await run.pack(file);
    for (const id of ids) pack.removeTask(id);
    if (pack.tasks.size === 0) throw new UsageError(`that would remove every task of ${file}; delete the file instead`);
    const bytesBefore = pack.window.superblock.committed;
    const bytesAfter = await writeWhole(file, (await freshPack(pack, undefined, sign)).chunks);
    warnUnsigned(pack, sign, out);
    return {
      json: { file, removed: ids, bytesBefore, bytesAfter },
      text: [`${file}: ${count(ids.length, "task")} removed, ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`],
    };
  },
});

export const compact: Attach = command({
  usage: "compact <PACK>",
  does: "Rewrite a pack in place, without the gaps that changes have left.",
  details: "Tasks and components are not changed. A pack from before version 1.0 gets its hashes.",
  example: "compact tasks.eigen",
  options: { key, revoked },
  reads: ["own"],
  async run([file]: [string], { key }, run, out) {
    const sign = await signerOf(key);
    await run.lock(file);
    const pack = await run.pack(file);
    const bytesBefore = pack.window.superblock.committed;
    const bytesAfter = await writeWhole(file, (await freshPack(pack, undefined, sign)).chunks);
    warnUnsigned(pack, sign, out);
    return {
      json: { file, bytesBefore, bytesAfter },
      text: [`${file}: ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`],
    };
  },
});

/** @throws AdapterError when adapters name another base model than the pack does */
export function refuseOtherBase({ name, directory }: Pack, adapters: readonly Adapter[], anyBase: boolean): void {
  const { baseModel } = directory.basis;
  refuseBases([{ id: "the pack", file: name, baseModel }, ...adapters], anyBase);
}

/** @param path of a key in PEM; undefined for none */
export async function signerOf(path: string | undefined): Promise<Sign | undefined> {
  if (path === undefined) return undefined;
  const pem = await readText(path);
  if (pem.includes("PUBLIC KEY"))
    throw new TypeError(`${path}: this is a public key; signing takes the private one, which keygen wrote beside it`);
  return createSigner(pem).catch((cause: Error) => {
    throw cause instanceof TypeError ? new TypeError(`${path}: ${cause.message}`, { cause }) : cause;
  });
}

/** Says that a pack which was signed no longer is. */
export function warnUnsigned(pack: Pack, sign: Sign | undefined, out: Output): void {
  if (!sign && pack.window.superblock.signature)
    out.warn(`${pack.name} was signed and no longer is: sign it again, or pass --key`);
}

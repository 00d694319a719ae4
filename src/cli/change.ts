/**
 * Commands that change a pack in place: add puts tasks behind those of the pack, whose bytes stay; remove and compact
 * write it again; sign vouches for it, with a key of keygen.
 */
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";
import { type Adapter, refuseBases } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile, readTaskFile } from "../core/read-task-file.ts";
import { keyName } from "../core/trust.ts";
import { TaskError } from "../errors.ts";
import type { Sign, TaskToWrite } from "../format/encode.ts";
import { integrityOf } from "../format/fields.ts";
import { MAX_LOSS, projectAdapters, storedDtypes } from "../pack/add.ts";
import { MUCH } from "../pack/report.ts";
import { createSigner, freshPack, planAppend, planSignature, signTaskFile } from "../pack/write.ts";
import { sum } from "../tensor/dtypes.ts";
import { toBase64 } from "../text.ts";
import { type Attach, command, OUT_OF_TIME, type Run } from "./command.ts";
import { append, checkTarget, readText, realTarget, writeTogether, writeWhole } from "./files.ts";
import * as option from "./options.ts";
import { bytes, count, lossTable, type Output, percent, warnOf } from "./output.ts";

export const add: Attach = command({
  usage: "add <PACK> <ADAPTER_OR_TASKFILE...>",
  details:
    "Adapters, or folders of them, are expressed in the pack's components; where its tasks have residual rows, so do the new ones. " +
    "Task files (.eigentask) are copied. Other tasks are not changed.",
  example: "add tasks.eigen new-adapter/",
  options: {
    as: option.as,
    anyBase: option.anyBase,
    maxLoss: {
      ...option.number(
        "P",
        `Add nothing if a new task would lose more than this share of its ΔW; 1 allows any loss. Default: ${MAX_LOSS}.`,
        { expected: "a share from 0 to 1, such as 0.5 or 50%", holds: (n) => n >= 0 && n <= 1 },
      ),
      excludes: { model: "with a model, answers decide: take --agreement" },
    },
    base: option.readFor,
    key: option.key,
    revoked: option.revoked,
    ...option.group("Judged by answers", {
      ...option.judged,
      model: option.text(
        "MODEL.onnx",
        "Distil adapters onto what the pack's tasks share, until they answer as the adapters do. Needs onnxruntime-node.",
        "model",
      ),
    }),
  },
  reads: ["own", "repository"],
  async run([file, ...paths]: [string, ...string[]], { as, anyBase, maxLoss, base, key, model, ...asked }, run, out) {
    const sign = await signerOf(key);
    await run.lock(file);
    const rename = new Map(as);
    const files: NamedTask[] = [];
    const folders: string[] = [];
    for (const path of paths)
      if (await run.isTaskFile(path)) files.push(await namedTask(path, rename));
      else folders.push(path);
    const adapters = await run.adapters(folders, rename, base);
    const added = [...adapters.map(({ id, file }) => ({ id, path: file })), ...files];
    const pack = await run.pack(file);
    refuseTaken(pack, added);
    refuseOtherBase(pack, adapters, anyBase);
    const isJudged = model !== undefined && adapters.length > 0;
    const projected = isJudged
      ? []
      : await projectAdapters(pack, adapters, await storedDtypes(pack), { maxLoss, onProgress: out.progress });
    const judged = isJudged
      ? await (await import("./by-answers.ts")).addedByAnswers(pack, adapters, { ...asked, model }, run, out)
      : [];
    for (const { path, id } of files) await pack.addTask(id, path);
    const copied: TaskToWrite[] = [];
    for (const { id } of files) copied.push({ entry: pack.tasks.get(id)!, blob: await pack.stored(id) });
    const plan = await planAppend(pack, [...projected, ...judged, ...copied], sign);
    append(file, plan);
    warnOf(adapters, out);
    const residual = projected.map((task) => task.residual);
    for (const warning of projected.flatMap(({ warnings }) => warnings)) out.warn(warning);
    for (const { id, total } of residual)
      if (total > MUCH)
        out.warn(
          `task "${id}" loses ${percent(total)} of its ΔW, which the pack's components lack: pack all adapters again, with this one`,
        );
    warnUnsigned(pack, sign, out);
    const bytesBefore = pack.window.superblock.committed;
    const bytesAfter = plan.offset + sum(plan.body.map(({ length }) => length));
    return {
      json: {
        ...{ file, added: added.map(({ id }) => id), bytesBefore, bytesAfter, residual },
        ...(isJudged && { answers: judged.map(({ entry: { id }, agreement }) => ({ id, agreement })) }),
      },
      text: [
        `${file}: ${count(added.length, "task")} added, ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`,
        ...(residual.length > 0 ? lossTable(residual) : []),
        ...judged.map(({ entry, blob, agreement, reason = "the command was stopped" }) => {
          const how =
            agreement === undefined ? `as without a model: ${reason}` : `${percent(agreement)} like the adapter`;
          return `${entry.id}: ${bytes(blob.length)}, ${agreement === undefined ? "stored" : "answers"} ${how}`;
        }),
        ...copied.map(({ entry, blob }) => `${entry.id}: ${bytes(blob.length)}, unchanged`),
      ],
      ...(judged.some(({ agreement, reason }) => agreement === undefined && !reason) && { exitCode: OUT_OF_TIME }),
    };
  },
});

/** A task file that was named, and the id that its task gets. */
interface NamedTask {
  readonly path: string;
  readonly id: string;
}

/** Takes the new name of a task file, by id or path, out of `rename`; the rest are of adapters. */
async function namedTask(path: string, rename: Map<string, string>): Promise<NamedTask> {
  const { id } = await readTaskFile(path);
  const [old, name = id] = [...rename].find(([old]) => old === id || resolve(old) === resolve(path)) ?? [];
  if (old !== undefined) rename.delete(old);
  return { path, id: name };
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

/** @throws AdapterError when adapters name another base model than the pack does */
export function refuseOtherBase({ name, directory }: Pack, adapters: readonly Adapter[], anyBase: boolean): void {
  const { baseModel } = directory.basis;
  refuseBases([{ id: "the pack", file: name, baseModel }, ...adapters], anyBase);
}

export const remove: Attach = command({
  usage: "remove <PACK> <TASK...>",
  details: "Other tasks are not changed.",
  example: "remove tasks.eigen reviews",
  options: { key: option.key },
  reads: ["own", undefined],
  async run([file, ...named]: [string, ...string[]], { key }, run, out) {
    const ids = [...new Set(named)];
    const sizes = await rewrite(file, key, run, out, (pack) => {
      for (const id of ids) pack.removeTask(id);
      if (pack.tasks.size === 0)
        throw new option.UsageError(`that would remove every task of ${file}; delete the file instead`);
    });
    return {
      json: { file, removed: ids, ...sizes },
      text: [`${file}: ${count(ids.length, "task")} removed, ${bytes(sizes.bytesBefore)} → ${bytes(sizes.bytesAfter)}`],
    };
  },
});

export const compact: Attach = command({
  usage: "compact <PACK>",
  details: "Tasks and components are not changed. A pack from before version 1.0 gets its hashes.",
  example: "compact tasks.eigen",
  options: { key: option.key, revoked: option.revoked },
  reads: ["own"],
  async run([file]: [string], { key }, run, out) {
    const sizes = await rewrite(file, key, run, out);
    return {
      json: { file, ...sizes },
      text: [`${file}: ${bytes(sizes.bytesBefore)} → ${bytes(sizes.bytesAfter)}`],
    };
  },
});

async function rewrite(
  file: string,
  key: string | undefined,
  run: Run,
  out: Output,
  change?: (pack: Pack) => void,
): Promise<{ bytesBefore: number; bytesAfter: number }> {
  const sign = await signerOf(key);
  await run.lock(file);
  const pack = await run.pack(file);
  change?.(pack);
  const bytesBefore = pack.window.superblock.committed;
  const bytesAfter = await writeWhole(file, (await freshPack(pack, undefined, sign)).chunks);
  warnUnsigned(pack, sign, out);
  return { bytesBefore, bytesAfter };
}

export const keygen: Attach = command({
  usage: "keygen",
  details: "Keep NAME.pem to yourself. Readers of your packs need NAME.pub.pem, or the line that is printed.",
  example: "keygen -o me",
  options: { output: option.output("NAME", "Write NAME.pem and NAME.pub.pem."), force: option.force },
  async run(_: [], { output: name, force }) {
    const secret = `${name}.pem`;
    const open = `${name}.pub.pem`;
    if (/(^|[/\\])$/.test(name)) throw new option.UsageError(`--output ${name}: ends like a folder; name a file in it`);
    for (const path of [secret, open]) checkTarget(path, { force, output: name });
    const pair = (await crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"])) as CryptoKeyPair;
    const raw = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
    await writeTogether(
      [
        [secret, [await pem("PRIVATE KEY", "pkcs8", pair.privateKey)], 0o600],
        [open, [await pem("PUBLIC KEY", "spki", pair.publicKey)]],
      ],
      force,
    );
    return {
      json: { secret, public: open, key: keyName(raw) },
      text: [`${secret}: keep it to yourself`, `${open}: ${keyName(raw)}`],
    };
  },
});

async function pem(kind: string, format: "pkcs8" | "spki", key: CryptoKey): Promise<Uint8Array> {
  const body = toBase64(new Uint8Array(await crypto.subtle.exportKey(format, key)));
  const lines = body.match(/.{1,64}/g)!.join("\n");
  return new TextEncoder().encode(`-----BEGIN ${kind}-----\n${lines}\n-----END ${kind}-----\n`);
}

export const sign: Attach = command({
  usage: "sign <FILE...>",
  details: "Readers that are given the public key then accept nothing else. The root of a pack does not change.",
  example: "sign tasks.eigen --key me.pem",
  options: { key: option.required(option.key) },
  reads: ["own"],
  async run(files: string[], { key }, run) {
    const signer = (await signerOf(key))!;
    const signed: { file: string; integrity: string }[] = [];
    const once = new Map(files.map((file) => [realTarget(file), file]));
    for (const file of once.values()) signed.push({ file, integrity: await signFile(file, signer, run) });
    return { json: { signed }, text: signed.map(({ file, integrity }) => `${file}: signed, ${integrity}`) };
  },
});

/** @returns the root of a pack, the hash of a task file */
async function signFile(file: string, signer: Sign, run: Run): Promise<string> {
  await run.lock(file);
  if (await run.isTaskFile(file)) {
    const bytes = await signTaskFile(new Uint8Array(await readFile(file)), signer);
    await writeWhole(file, [bytes]);
    return integrityOf(parseTaskFile(bytes, file).content);
  }
  const pack = await run.pack(file, { bases: "later" });
  append(file, await planSignature(pack, signer));
  return pack.integrity();
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

/** Warns that a pack which was signed no longer is. */
export function warnUnsigned(pack: Pack, sign: Sign | undefined, out: Output): void {
  if (!sign && pack.window.superblock.signature)
    out.warn(`${pack.name} was signed and no longer is: sign it again, or pass --key`);
}

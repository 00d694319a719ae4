/** The command verify: whether a pack is whole, and how far its tasks are from the adapters they were made of. */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { readTaskFile } from "../core/read-task-file.ts";
import { readBlob } from "../core/task-file.ts";
import { checkExpansion } from "../core/terms.ts";
import { isSigned, keyName, publicKeyBytes, Trust, type TrustOptions } from "../core/trust.ts";
import { AdapterError, FormatError, TaskError, TrustError } from "../errors.ts";
import { deltaError, pairOf, relative } from "../extract/factors.ts";
import { Fields, integrityOf, sha256, toIntegrity } from "../format/fields.ts";
import {
  SECTION_BASES,
  SECTION_FREE,
  SECTION_TASK,
  type Section,
  type Signature,
  type TaskBlob,
  WINDOW_BYTES,
} from "../format/format.ts";
import { openSource } from "../open-source.ts";
import { paced, pacer } from "../pace.ts";
import { expandTerm } from "../pack/expand.ts";
import { lossesOf, type ModuleError } from "../pack/report.ts";
import type { ByteSource } from "../source.ts";
import { toHex } from "../text.ts";
import { type Attach, command, type Result, type Run } from "./command.ts";
import { readText } from "./files.ts";
import { as, list, maxExpansion, readFor, revoked, text, UsageError } from "./options.ts";
import { lossTable, type Output, percent, table } from "./output.ts";

interface Check {
  readonly name: string;
  /** Null where there is nothing to check. */
  readonly ok: boolean | null;
  readonly detail: string;
}

class Checks {
  readonly all: Check[] = [];

  get ok(): boolean {
    return this.all.every(({ ok }) => ok !== false);
  }

  note(name: string, ok: Check["ok"], detail: string): void {
    this.all.push({ name, ok, detail });
  }

  /**
   * Notes a check that passes when `read` does; a damaged section is reported, and the others are checked all the same.
   */
  async passes<T>(name: string, read: () => Promise<T>): Promise<T | undefined> {
    try {
      const value = await read();
      this.note(name, true, "");
      return value;
    } catch (error) {
      if (!(error instanceof FormatError || error instanceof TrustError)) throw error;
      this.note(name, false, error.message);
      return undefined;
    }
  }

  async signature(
    of: "pack" | "task",
    hash: Uint8Array,
    signature: Signature | undefined,
    file: string,
  ): Promise<void> {
    if (!signature) this.note("signature", null, "not signed");
    else this.note("signature", await isSigned(of, hash, signature, file), keyName(signature.key));
  }

  table(): string[] {
    const verdict = ({ ok }: Check): string => (ok === null ? "–" : ok ? "ok" : "FAILED");
    return table([["check", "", ""], ...this.all.map((check) => [check.name, verdict(check), check.detail])]);
  }
}

export const verify: Attach = command({
  usage: "verify <PACK_OR_TASKFILE>",
  example: "verify tasks.eigen --against my-adapters/",
  options: {
    against: {
      ...list("ADAPTER_OR_FOLDER", "Adapters that the tasks were made of."),
      reads: "repository" as const,
    },
    as,
    base: readFor,
    pack: text(
      "PACK",
      "Pack of a task file, so that the terms, parameters and numbers of the task are checked too.",
      "file",
    ),
    key: list(
      "PUBLIC.pem",
      "Fail unless one of these public keys has signed the file: a file, or ed25519:… as keygen prints it.",
    ),
    integrity: text("sha256-…", "Fail unless this is the root of the pack, or the hash of the task file."),
    revoked,
    maxExpansion,
  },
  reads: ["file"],
  async run([path]: [string], { against, as, base, pack: home, key, integrity }, run, out) {
    const keys = await Promise.all(key.map(publicKey));
    if (await run.isTaskFile(path)) {
      if (against.length > 0)
        throw new UsageError(
          `--against needs a pack: ${path} is a task file, which holds no components; add it to its pack first`,
        );
      return verifyTaskFile(path, keys, integrity, home, run);
    }
    if (home !== undefined) throw new UsageError(`--pack is for task files: ${path} is a pack`);
    const trust = { ...(keys.length > 0 ? { keys } : {}), ...(integrity === undefined ? {} : { integrity }) };
    const pack = await openHashed(path, trust, run);
    const { checks, bases, blobs } = await checkSections(path, pack, run, out);
    const { ok } = checks;
    const errors: ModuleError[] = [];
    const adapters = against.length > 0 && bases && ok ? await run.adapters(against, as, base) : [];
    const [first] = adapters;
    if (first && !adapters.some(({ id }) => blobs.has(id))) {
      const { id, file } = first;
      throw new TaskError(`${file}: no task "${id}" in ${path}; say which with --as ${id}=TASK`, { task: id });
    }
    for (const [i, adapter] of adapters.entries()) {
      const { id } = adapter;
      const blob = blobs.get(id);
      if (blob) errors.push(...(await errorsOf(pack, bases!, blob, adapter)));
      else checks.note(`adapter ${id}`, null, `no such task in the pack; --as ${id}=TASK compares it with another`);
      out.progress({ stage: "comparing", done: i + 1, total: adapters.length, unit: "adapters" });
    }
    const losses = lossesOf(
      errors,
      adapters.flatMap(({ id }) => (blobs.has(id) ? id : [])),
    );
    for (const { id, total } of losses)
      if (total > 1)
        out.warn(
          `task "${id}" differs from its adapter by ${percent(total)} of the adapter's ΔW: it is that of another adapter, or was distilled`,
        );
    const byId = new Map(losses.map(({ id, ...error }) => [id, error]));
    return {
      json: { ok, checks: checks.all, tasks: [...pack.tasks.keys()].map((id) => ({ id, error: byId.get(id) })) },
      text: [...checks.table(), ...(losses.length > 0 ? ["", ...lossTable(losses)] : [])],
      exitCode: ok ? 0 : 1,
    };
  },
});

/** A file, or the line that keygen prints. @throws TypeError naming what holds no public key */
async function publicKey(given: string): Promise<string> {
  const key = given.startsWith("ed25519:") ? given : await readText(given);
  await publicKeyBytes(key, `--key ${given}`);
  return key;
}

/** @param home the pack that the task belongs to. Without it nothing but sums, entry and signature can be checked */
async function verifyTaskFile(
  path: string,
  keys: string[],
  integrity: string | undefined,
  home: string | undefined,
  run: Run,
): Promise<Result> {
  // Parsing checks the sums of head, entry and blob: a file that fails them is an error.
  const file = await readTaskFile(path);
  const trust = await Trust.create(path, { revoked: run.revoked, ...(keys.length > 0 ? { keys } : {}) });
  await trust.checkTaskFile(file, path, integrity);
  const { id, basisId, blob, content, signature } = file;
  const hash = await sha256(content);
  const checks = new Checks();
  checks.note("checksums", true, `task ${id}`);
  checks.note("hash", true, toIntegrity(hash));
  const task = await integrityOf(blob);
  checks.note("hash of the task", null, `${task}, which --revoked and \`revoked\` take`);
  await checks.signature("task", hash, signature, path);
  if (home === undefined)
    checks.note("terms and numbers", null, `give the pack of basis ${basisId.slice(0, 16)} with --pack`);
  else {
    await readBlob(file, id, path, await run.pack(home, { bases: "later" }), trust);
    checks.note("terms and numbers", true, `of basis ${basisId.slice(0, 16)}, as in ${home}`);
  }
  const { ok, all } = checks;
  return { json: { ok, checks: all, id, basisId, task }, text: checks.table(), exitCode: ok ? 0 : 1 };
}

/** The pack, whose sections are all held against their hashes, where it has some. */
async function openHashed(path: string, trust: TrustOptions, run: Run): Promise<Pack> {
  const pack = await run.pack(path, { bases: "later", ...trust });
  if (pack.directory.bases.integrity === undefined) return pack;
  return run.pack(path, { bases: "later", ...trust, integrity: await pack.integrity() });
}

async function checkSections(path: string, pack: Pack, run: Run, out: Output) {
  const { window, directory } = pack;
  const checks = new Checks();
  // Opening checked window, directory, tiling, limits and the bases' place: a pack that fails these is an error.
  checks.note("window, directory and sections", true, `version ${pack.version}`);
  const root = await sha256(window.head, directory.bytes);
  if (directory.bases.integrity !== undefined) checks.note("root", true, toIntegrity(root));
  else checks.note("root", null, "no hashes: of a version before 1.0, `compact` writes them");
  await checks.signature("pack", root, window.superblock.signature, pack.name);
  const bases = await checks.passes("bases", async () => (await pack.bases()).bytes);
  const blobs = new Map<string, TaskBlob>();
  const ids = [...pack.tasks.keys()];
  for (const [i, id] of ids.entries()) {
    const blob = await checks.passes(`task ${id}`, () => pack.load(id));
    if (blob) blobs.set(id, blob);
    out.progress({ stage: "checking", done: i + 1, total: ids.length, unit: "tasks" });
  }
  if (bases) {
    const found = toHex(await sha256(pack.directory.basisBytes, bases));
    checks.note("basis id", found === pack.basisId, found.slice(0, 16));
  }
  const source = run.closing(await openSource(path));
  for (const [i, section] of pack.directory.sections.entries()) {
    const known = [SECTION_BASES, SECTION_TASK, SECTION_FREE].includes(section.kind);
    if (!known) await checks.passes(`section ${i}, of kind ${section.kind}`, () => checkUnknown(source, section, i));
  }
  const gap = await unpadded(source, pack);
  checks.note("padding", gap === undefined, gap ?? "zero");
  const behind = (source.byteLength ?? 0) - pack.window.superblock.committed;
  checks.note("bytes behind the end", behind > 0 ? null : true, behind > 0 ? `${behind}, ignored` : "none");
  return { checks, bases, blobs };
}

/** A section that nothing reads. @throws FormatError when its checksum or hash is of other bytes */
async function checkUnknown(source: ByteSource, section: Section, index: number): Promise<void> {
  const bytes = await source.read(section.offset, section.length);
  const f: Fields = new Fields(bytes, source.name, `section ${index}`);
  await paced(f.crc(section.crc), pacer());
  const found = await integrityOf(bytes);
  if (section.integrity !== undefined && section.integrity !== found)
    f.fail(`has the hash ${found}, expected ${section.integrity}`);
}

/** Where bytes between sections are not zero, against SPEC.md, section 1. */
async function unpadded(source: ByteSource, { window, directory }: Pack): Promise<string | undefined> {
  const { directoryOffset, directoryLength } = window.superblock;
  const parts = [{ offset: directoryOffset, length: directoryLength }, ...directory.sections];
  let end = WINDOW_BYTES;
  // Empty bases may begin where another section, or the directory, does.
  for (const { offset, length } of parts.sort((a, b) => a.offset - b.offset || a.length - b.length)) {
    const gap = await source.read(end, offset - end);
    if (gap.some((byte) => byte !== 0)) return `not zero between ${end} and ${offset}`;
    end = offset + length;
  }
  return undefined;
}

async function errorsOf(
  pack: Pack,
  bases: Uint8Array,
  blob: TaskBlob,
  { id, file, modules }: Adapter,
): Promise<ModuleError[]> {
  checkExpansion(pack, id, blob, "factors");
  const terms = new Map(blob.terms.map((term) => [pack.modules[term.module]!.name, term]));
  const foreign = [...terms.keys()].find((name) => !modules.has(name));
  if (foreign !== undefined)
    throw new AdapterError(`it does not adapt "${foreign}", the task of the pack does`, { file, field: foreign });
  const errors: ModuleError[] = [];
  for (const [name, source] of modules) {
    const factors = pairOf(await source.read());
    const term = terms.get(name);
    // Too small a part of the task is worth no byte.
    const isStored = term && term.rank + term.privateRank > 0;
    const stored = isStored ? pairOf(expandTerm(blob, term, pack.modules[term.module]!, bases)) : factors;
    const { difference, norm } = deltaError(factors, stored);
    errors.push({ task: id, module: name, error: isStored ? relative(difference, norm) : norm > 0 ? 1 : 0, norm });
  }
  return errors;
}

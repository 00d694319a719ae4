/** The command verify: whether a pack is whole, and how far its tasks are from the adapters they were made of. */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { readBlob, readTaskFile } from "../core/task-file.ts";
import { checkExpansion } from "../core/terms.ts";
import { isSigned, keyName, publicKeyBytes, Trust, type TrustOptions } from "../core/trust.ts";
import { AdapterError, FormatError, TaskError, TrustError } from "../errors.ts";
import { deltaError, relative } from "../extract/error.ts";
import { type BoundedLoss, measureModule, openModule } from "../extract/project.ts";
import { Fields } from "../format/fields.ts";
import {
  encodedTensor,
  SECTION_BASES,
  SECTION_FREE,
  SECTION_TASK,
  type Section,
  sharedBases,
  type TaskBlob,
  WINDOW_BYTES,
} from "../format/format.ts";
import { integrityOf, sha256, toIntegrity } from "../format/hash.ts";
import { openSource } from "../open-source.ts";
import { paced, pacer } from "../pace.ts";
import { gaugeOf, storedModule } from "../pack/add.ts";
import { expandTerm } from "../pack/expand.ts";
import { type TaskLoss, totalOf } from "../pack/report.ts";
import type { ByteSource } from "../source.ts";
import { toHex } from "../text.ts";
import { isTaskFile } from "./change.ts";
import { type Attach, command, type Result, type Run } from "./command.ts";
import { readText } from "./files.ts";

import { as, list, maxExpansion, readFor, revoked, text, UsageError } from "./options.ts";

import { type Output, percent, sum, table } from "./output.ts";

interface Check {
  readonly name: string;
  readonly ok: boolean;
  /** False where there is nothing to check. */
  readonly checked: boolean;
  readonly detail: string;
}

export const verify: Attach = command({
  usage: "verify <PACK_OR_TASKFILE>",
  details:
    "Tasks in components have more columns with --against: δ, how far the factors of a task lie from the components, and bound, the largest " +
    "ΔW error of a module that is possible (docs/pack.md).",
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
    if (await isTaskFile(path, run)) {
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
    const ok = checks.every((check) => check.ok);
    const figures = new Map<string, Figures>();
    if (against.length > 0 && bases && ok) {
      const adapters = await run.adapters(against, as, base);
      for (const [i, adapter] of adapters.entries()) {
        const { id, file } = adapter;
        const blob = blobs.get(id);
        if (!blob)
          throw new TaskError(`${file}: no task "${id}" in ${path}; say which with --as ${id}=TASK`, { task: id });
        figures.set(id, await compare(pack, bases, blob, adapter));
        out.progress({ stage: "comparing", done: i + 1, total: adapters.length, unit: "adapters" });
      }
    }
    // Tasks of their own are no distance from components.
    const apart = [...figures.values()].some(({ delta }) => Math.max(delta.A, delta.B) > 0);
    const rows = [...figures].map(([id, { error, delta, bound }]) => [
      id,
      ...[error.total, error.max].map(percent),
      ...(apart ? [delta.A, delta.B, bound].map((n) => n.toFixed(3)) : []),
    ]);
    const columns = ["task", "ΔW error", "largest module", ...(apart ? ["δ of A", "δ of B", "bound"] : [])];
    return {
      json: { ok, checks, tasks: [...pack.tasks.keys()].map((id) => ({ id, ...figures.get(id) })) },
      text: [...checksTable(checks), ...(rows.length ? ["", ...table([columns, ...rows])] : [])],
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

function checksTable(checks: readonly Check[]): string[] {
  const words = ({ ok, checked }: Check): string => (checked ? (ok ? "ok" : "FAILED") : "–");
  return table([["check", "", ""], ...checks.map((check) => [check.name, words(check), check.detail])]);
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
  const checks: Check[] = [];
  const note = noting(checks);
  note("checksums", true, `task ${id}`);
  note("hash", true, toIntegrity(hash));
  const task = await integrityOf(blob);
  note("hash of the task", null, `${task}, which --revoked and \`revoked\` take`);
  if (!signature) note("signature", null, "not signed");
  else note("signature", await isSigned("task", hash, signature, path), keyName(signature.key));
  if (home === undefined) note("terms and numbers", null, `give the pack of basis ${basisId.slice(0, 16)} with --pack`);
  else {
    await readBlob(file, id, path, await run.pack(home, { bases: "later" }), trust);
    note("terms and numbers", true, `of basis ${basisId.slice(0, 16)}, as in ${home}`);
  }
  const ok = checks.every((check) => check.ok);
  return { json: { ok, checks, id, basisId, task }, text: checksTable(checks), exitCode: ok ? 0 : 1 };
}

/** The pack, whose sections are all held against their hashes, where it has some. */
async function openHashed(path: string, trust: TrustOptions, run: Run): Promise<Pack> {
  const pack = await run.pack(path, { bases: "later", ...trust });
  if (pack.directory.bases.integrity === undefined) return pack;
  return run.pack(path, { bases: "later", ...trust, integrity: await pack.integrity() });
}

/** What is said of the pack as a whole: its root, and whose it is. */
async function checkTrust({ name, window, directory }: Pack, note: Note): Promise<void> {
  const root = await sha256(window.head, directory.bytes);
  const { signature } = window.superblock;
  const hashed = directory.bases.integrity !== undefined;
  note(
    "root",
    hashed || null,
    hashed ? toIntegrity(root) : "no hashes: of a version before 1.0, `compact` writes them",
  );
  if (!signature) note("signature", null, "not signed");
  else note("signature", await isSigned("pack", root, signature, name), keyName(signature.key));
}

/** @param ok null where there is nothing to check */
type Note = (name: string, ok: boolean | null, detail: string) => void;

function noting(checks: Check[]): Note {
  return (name, ok, detail) => void checks.push({ name, ok: ok ?? true, checked: ok !== null, detail });
}

async function checkSections(path: string, pack: Pack, run: Run, out: Output) {
  const checks: Check[] = [];
  const note = noting(checks);
  /** What a section holds; a damaged one is reported, and the others are checked all the same. */
  const checked = async <T>(name: string, read: () => Promise<T>): Promise<T | undefined> => {
    try {
      const value = await read();
      note(name, true, "");
      return value;
    } catch (error) {
      if (!(error instanceof FormatError || error instanceof TrustError)) throw error;
      note(name, false, error.message);
      return undefined;
    }
  };
  // Opening checked window, directory, tiling, limits and the bases' place: a pack that fails these is an error.
  note("window, directory and sections", true, `version ${pack.version}`);
  await checkTrust(pack, note);
  const bases = await checked("bases", async () => (await pack.bases()).bytes);
  const blobs = new Map<string, TaskBlob>();
  const ids = [...pack.tasks.keys()];
  for (const [i, id] of ids.entries()) {
    const blob = await checked(`task ${id}`, () => pack.load(id));
    if (blob) blobs.set(id, blob);
    out.progress({ stage: "checking", done: i + 1, total: ids.length, unit: "tasks" });
  }
  if (bases) {
    const found = toHex(await sha256(pack.directory.basisBytes, bases));
    note("basis id", found === pack.basisId, found.slice(0, 16));
  }
  const source = run.closing(await openSource(path));
  for (const [i, section] of pack.directory.sections.entries()) {
    const known = [SECTION_BASES, SECTION_TASK, SECTION_FREE].includes(section.kind);
    if (!known) await checked(`section ${i}, of kind ${section.kind}`, () => checkUnknown(source, section, i));
  }
  const gap = await unpadded(source, pack);
  note("padding", gap === undefined, gap ?? "zero");
  const behind = (source.byteLength ?? 0) - pack.window.superblock.committed;
  note("bytes behind the end", behind > 0 ? null : true, behind > 0 ? `${behind}, ignored` : "none");
  return { checks, bases, blobs };
}

/** A section that nothing reads. @throws FormatError when its checksum or hash is of other bytes */
async function checkUnknown(source: ByteSource, section: Section, index: number): Promise<void> {
  const bytes = await source.read(section.offset, section.length);
  const f: Fields = new Fields(bytes, source.name, `section ${index}`);
  await paced(f.crc(section.crc), pacer());
  const found = await integrityOf(bytes);
  f.check(
    section.integrity === undefined || section.integrity === found,
    () => `has the hash ${found}, expected ${section.integrity}`,
  );
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

interface Figures {
  readonly error: Omit<TaskLoss, "id">;
  readonly delta: { readonly A: number; readonly B: number };
  readonly bound: number;
}

/** ΔW error, δ and bound of a task against the adapter it was made of. */
async function compare(pack: Pack, bases: Uint8Array, blob: TaskBlob, adapter: Adapter): Promise<Figures> {
  checkExpansion(pack, adapter.id, blob, "factors");
  const found: BoundedLoss[] = [];
  const terms = new Map(blob.terms.map((term) => [pack.modules[term.module]!.name, term]));
  const foreign = [...terms.keys()].find((name) => !adapter.modules.has(name));
  if (foreign !== undefined)
    throw new AdapterError(`it does not adapt "${foreign}", the task of the pack does`, {
      file: adapter.file,
      field: foreign,
    });
  for (const [name, source] of adapter.modules) {
    const { A, Bt } = await source.read();
    const member = { id: adapter.id, rank: source.rank, A, Bt };
    const term = terms.get(name);
    if (!term || term.rank + term.privateRank === 0) {
      // Too little of the task to be worth a byte.
      const { norm } = deltaError(exact(member), exact(member));
      found.push({ error: norm > 0 ? 1 : 0, norm, bound: norm > 0 ? 1 : 0, deltaA: 0, deltaB: 0 });
      continue;
    }
    const module = pack.modules[term.module]!;
    if (term.A && term.B && sharedBases(module) && !term.ownA && !term.ownBt && term.privateRank === 0) {
      const alphaA = encodedTensor(blob.bytes, term.A.tensor);
      const alphaB = encodedTensor(blob.bytes, term.B.tensor);
      const stored = { rank: term.rank, alphaA, alphaB };
      const space = openModule(storedModule(module, bases, adapter));
      found.push(measureModule(space, member, stored, { gauge: gaugeOf(pack), coefficientDtype: term.A.tensor.dtype }));
    } else {
      const { difference, bound, norm } = deltaError(exact(member), exact(expandTerm(blob, term, module, bases)));
      found.push({ error: relative(difference, norm), norm, bound: relative(bound, norm), deltaA: 0, deltaB: 0 });
    }
  }
  const most = (figure: keyof BoundedLoss): number => Math.max(0, ...found.map((one) => one[figure]));
  const mean = sum(found.map(({ error }) => error)) / Math.max(found.length, 1);
  return {
    error: { total: totalOf(found), mean, max: most("error") },
    delta: { A: most("deltaA"), B: most("deltaB") },
    bound: most("bound"),
  };
}

function exact({ rank, A, Bt }: { rank: number; A: ArrayLike<number>; Bt: ArrayLike<number> }) {
  return { rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
}

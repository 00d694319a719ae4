/** The command verify: whether a pack is whole, and how far its tasks are from the adapters they were made of. */
import type { Adapter } from "../adapters/adapter.ts";
import { AdapterError, FormatError, TaskError } from "../errors.ts";
import { deltaError, relative } from "../extract/error.ts";
import { measureModule, openModule } from "../extract/extract.ts";
import { basisIdOf } from "../format/encode.ts";
import { type TaskBlob, WINDOW_BYTES } from "../format/format.ts";
import { encodedTensor } from "../format/tensors.ts";
import { storedModule } from "../pack/build.ts";
import { expandTerm } from "../pack/expand.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { type ByteSource, openSource } from "../source.ts";
import { type Attach, command, type Run } from "./command.ts";
import { openAdapters } from "./open.ts";
import { as, list } from "./options.ts";
import { percent, table } from "./output.ts";

interface Check {
  readonly name: string;
  readonly ok: boolean;
  readonly detail: string;
}

interface Checked {
  readonly checks: readonly Check[];
  /** Undefined when they are damaged. */
  readonly bases: Uint8Array | undefined;
  /** Those that are whole. */
  readonly blobs: ReadonlyMap<string, TaskBlob>;
}

export const verify: Attach = command({
  usage: "verify <PACK>",
  does: "check sums and limits, and with adapters the ΔW error of each task",
  options: {
    against: list("ADAPTER_OR_FOLDER", "Adapters that the tasks were made of. May be given again."),
    as,
  },
  async run([path]: [string], { against, as }, run) {
    const pack = run.closing(await openPack(path, { bases: "later" }));
    const { checks, bases, blobs } = await checkSections(path, pack, run);
    const ok = checks.every((check) => check.ok);
    const figures = new Map<string, Figures>();
    if (against.length > 0 && bases && ok) {
      for (const adapter of await openAdapters(against, as, run)) {
        const { id, file } = adapter;
        const blob = blobs.get(id);
        if (!blob) throw new TaskError(`${file}: no task "${id}" in ${path}; say --as`, { task: id });
        figures.set(id, await compare(pack, bases, blob, adapter));
      }
    }
    const rows = [...figures].map(([id, { error, delta, bound }]) => [
      id,
      ...[error.mean, error.max].map(percent),
      ...[delta.A, delta.B, bound].map((n) => n.toFixed(3)),
    ]);
    return {
      json: { ok, checks, tasks: [...pack.tasks.keys()].map((id) => ({ id, ...figures.get(id) })) },
      text: [
        table([["check", "", ""], ...checks.map(({ name, ok, detail }) => [name, ok ? "ok" : "FAILED", detail])]),
        ...(rows.length ? ["", table([["task", "ΔW error", "largest", "δ of A", "δ of B", "bound"], ...rows])] : []),
      ],
      exitCode: ok ? 0 : 1,
    };
  },
});

async function checkSections(path: string, pack: Pack, run: Run): Promise<Checked> {
  // Opening checked window, directory, tiling, limits and the bases' place: a pack that fails these is an error.
  const checks: Check[] = [{ name: "window, directory and sections", ok: true, detail: `version ${pack.version}` }];
  /** What a section holds; a damaged one is reported, and the others are checked all the same. */
  const checked = async <T>(name: string, read: () => Promise<T>): Promise<T | undefined> => {
    try {
      const value = await read();
      checks.push({ name, ok: true, detail: "" });
      return value;
    } catch (error) {
      if (!(error instanceof FormatError)) throw error;
      checks.push({ name, ok: false, detail: error.message });
      return undefined;
    }
  };
  const bases = await checked("bases", async () => (await pack.bases()).bytes);
  const blobs = new Map<string, TaskBlob>();
  for (const [i, id] of [...pack.tasks.keys()].entries()) {
    const blob = await checked(`task ${id}`, () => pack.load(id));
    if (blob) blobs.set(id, blob);
    run.progress("task", i + 1, pack.tasks.size);
  }
  if (bases) {
    const found = await basisIdOf(pack.directory.basisBytes, bases);
    checks.push({ name: "basis id", ok: found === pack.basisId, detail: found.slice(0, 16) });
  }
  const source = run.closing(await openSource(path));
  checks.push(await paddingCheck(source, pack));
  const trailing = (source.byteLength ?? 0) - pack.window.superblock.committed;
  checks.push({ name: "bytes behind the end", ok: true, detail: `${trailing} (ignored)` });
  return { checks, bases, blobs };
}

/** SPEC.md, section 1: bytes between sections are zero. */
async function paddingCheck(source: ByteSource, { window, directory }: Pack): Promise<Check> {
  const { directoryOffset, directoryLength } = window.superblock;
  const parts = [{ offset: directoryOffset, length: directoryLength }, ...directory.sections];
  let end = WINDOW_BYTES;
  for (const { offset, length } of parts.sort((a, b) => a.offset - b.offset)) {
    const gap = await source.read(end, offset - end);
    if (gap.some((byte) => byte !== 0))
      return { name: "padding", ok: false, detail: `not zero between ${end} and ${offset}` };
    end = offset + length;
  }
  return { name: "padding", ok: true, detail: "zero" };
}

interface Figures {
  readonly error: { readonly mean: number; readonly max: number };
  readonly delta: { readonly A: number; readonly B: number };
  readonly bound: number;
}

/** ΔW error, δ and bound of a task against the adapter it was made of. */
async function compare(pack: Pack, bases: Uint8Array, blob: TaskBlob, adapter: Adapter): Promise<Figures> {
  const errors: number[] = [];
  const delta = { A: 0, B: 0 };
  let bound = 0;
  const gauge = pack.directory.basis.gauge === "balanced" ? "balanced" : "as-trained";
  for (const term of blob.terms) {
    const module = pack.modules[term.module]!;
    const { name } = module;
    const source = adapter.modules.get(name);
    if (!source) {
      const { file } = adapter;
      throw new AdapterError(`it does not adapt "${name}", the task of the pack does`, { file, field: name });
    }
    const { A, Bt } = await source.read();
    const member = { id: adapter.id, rank: source.rank, A, Bt };
    if (term.A && term.B && term.privateRank === 0) {
      const alphaA = encodedTensor(blob.bytes, term.A.tensor);
      const alphaB = encodedTensor(blob.bytes, term.B.tensor);
      const space = openModule(storedModule(module, bases, adapter));
      const stored = { rank: term.rank, alphaA, alphaB };
      const figures = measureModule(space, member, stored, { gauge, coefficientDtype: term.A.tensor.dtype });
      errors.push(figures.error);
      delta.A = Math.max(delta.A, figures.deltaA);
      delta.B = Math.max(delta.B, figures.deltaB);
      bound = Math.max(bound, figures.bound);
    } else {
      const stored = expandTerm(blob, term, module, bases);
      const found = deltaError(exact(member), exact(stored));
      errors.push(relative(found.difference, found.norm));
      bound = Math.max(bound, relative(found.bound, found.norm));
    }
  }
  const mean = errors.reduce((a, b) => a + b, 0) / Math.max(errors.length, 1);
  return { error: { mean, max: Math.max(0, ...errors) }, delta, bound };
}

function exact({ rank, A, Bt }: { rank: number; A: ArrayLike<number>; Bt: ArrayLike<number> }) {
  return { rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
}

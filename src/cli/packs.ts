/**
 * Commands on packs: pack, inspect, verify, remove (add: add.ts). Each takes parsed arguments and returns the object that `--json`
 * prints and the text that a person reads.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters, readJson } from "../adapters/folder.ts";
import { partByGain, readScores } from "../adapters/scores.ts";
import { openHost } from "../base/open.ts";
import { AdapterError, FormatError, TaskError } from "../errors.ts";
import { deltaError, relative } from "../extract/error.ts";
import { measureModule, openModule } from "../extract/project.ts";
import { basisIdOf } from "../format/encode.ts";
import { SECTION_FREE, type TaskBlob, WINDOW_BYTES } from "../format/format.ts";
import { layoutFresh } from "../format/layout.ts";
import { encodedTensor } from "../format/tensors.ts";
import { openSource } from "../open-source.ts";
import { expandTerm } from "../pack/expand.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { gaugeOf, storedModule } from "../pack/project.ts";
import { breakEven, completeDtypes } from "../pack/report.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { type Arguments, number, renames, required, storage, UsageError } from "./args.ts";
import { autoText, planOf } from "./auto.ts";
import { writeWhole } from "./files.ts";
import { bytes, type Output, percent, table } from "./output.ts";

/** What a command gives back. */
export interface Result {
  json: Record<string, unknown>;
  text: string;
  /** 1 when the command ran but its verdict is bad. */
  exitCode?: number;
}

function typeName({ basis, coefficients, head }: Dtypes): string {
  if (basis === coefficients && basis === head) return basis;
  return `basis=${basis},coefficients=${coefficients},head=${head}`;
}

export async function closeAll(adapters: readonly Adapter[]): Promise<void> {
  for (const adapter of adapters) await adapter.close();
}

/** `pack ADAPTER_OR_FOLDER... -o FILE` */
export async function packCommand(args: Arguments, out: Output): Promise<Result> {
  const started = performance.now();
  const file = required(args, "output");
  const plan = planOf(args);
  const dtype = storage(args.text("dtype"));
  const choose = await goodAdapters(args);
  const adapters = await readAdapters(args.positionals, { rename: renames(args) });
  const basePath = args.text("base");
  const base = basePath === undefined ? undefined : await openHost(basePath);
  try {
    const { kept, dropped } = choose(adapters);
    const { chunks, report } = await plan.run(
      kept,
      { dtype, normalize: args.flag("normalize"), ...(base ? { base } : {}) },
      out,
    );
    await writeWhole(file, chunks);
    for (const warning of report.warnings) out.warn(warning);
    const { dtype: stored, ...rest } = report;
    const seconds = (performance.now() - started) / 1000;
    const peakMemoryBytes = process.resourceUsage().maxRSS * 1024;
    const even = report.breakEvenTasks;
    return {
      json: { file, dtype: typeName(stored), ...rest, dropped, seconds, peakMemoryBytes },
      text: [
        ...dropped.map(({ id, gain }) => `left out ${id}: ${points(gain)} over its head`),
        `${file}: ${report.tasks} tasks, ${report.modules} modules, ${bytes(report.bytes)}`,
        table([
          ["", "adapters", "pack"],
          ["size", bytes(report.adapterBytes), `${bytes(report.bytes)} (${report.ratio.toFixed(1)}× smaller)`],
          ["ΔW error, mean / largest", "0", `${percent(report.error.mean)} / ${percent(report.error.max)}`],
          ["components per side", "", `${report.components.min} to ${report.components.max}`],
        ]),
        report.ratio < 1
          ? `The pack is larger than its adapters: sharing pays from ${even ?? "no number of"} tasks on.`
          : `Sharing pays from ${even ?? "no number of"} tasks on.`,
        ...("tried" in report ? [autoText(report)] : []),
        `${seconds.toFixed(2)} s`,
      ].join("\n"),
    };
  } finally {
    await base?.close?.();
    await closeAll(adapters);
  }
}

function points(gain: number): string {
  const tenths = Math.round(1000 * gain);
  return `${tenths > 0 ? "+" : ""}${((tenths || 0) / 10).toFixed(1)} points`;
}

/** --scores and --min-gain, read before any adapter is. */
async function goodAdapters(args: Arguments): Promise<(adapters: Adapter[]) => ReturnType<typeof partByGain>> {
  const path = args.text("scores");
  if (path === undefined) {
    if (args.text("min-gain") !== undefined) throw new UsageError("--min-gain needs --scores SCORES.json");
    return (adapters) => ({ kept: adapters, dropped: [] });
  }
  const minGain = number(args, "min-gain", 0.02, (n) => n >= -1 && n <= 1, "a difference of shares, from -1 to 1");
  const scores = readScores(await readJson(path), path);
  return (adapters) => partByGain(adapters, scores, minGain, path);
}

/** `inspect FILE` */
export async function inspectCommand(args: Arguments): Promise<Result> {
  const pack = await openPack(args.positionals[0]!, { bases: "later" });
  try {
    const { directory, window } = pack;
    const { superblock } = window;
    const sections = [
      { name: "window", offset: 0, bytes: WINDOW_BYTES },
      { name: "directory", offset: superblock.directoryOffset, bytes: superblock.directoryLength },
      { name: "bases", offset: superblock.basesOffset, bytes: superblock.basesLength },
      ...directory.tasks.map((t) => ({ name: `task ${t.id}`, offset: t.section.offset, bytes: t.section.length })),
      ...directory.sections
        .filter((s) => s.kind === SECTION_FREE)
        .map((s) => ({ name: "free", offset: s.offset, bytes: s.length })),
    ].sort((a, b) => a.offset - b.offset);
    const modules = pack.modules.map((m) => ({
      name: m.name,
      out: m.out,
      in: m.in,
      componentsA: m.A?.K ?? 0,
      componentsB: m.B?.K ?? 0,
      explainedA: m.A?.explained ?? 0,
      explainedB: m.B?.explained ?? 0,
    }));
    const tasks = directory.tasks.map((t) => ({ id: t.id, bytes: t.section.length, metadata: t.metadata }));
    const size = superblock.committed;
    const even = breakEven(
      size,
      tasks.map((t) => t.bytes),
      directory.tasks.map((t) => t.adapterBytes),
    );
    const { mode, gauge, centering, producer, baseModel } = directory.basis;
    const dtype = [...new Set(pack.modules.flatMap((m) => [m.A?.tensor.dtype, m.B?.tensor.dtype]))]
      .filter(Boolean)
      .join(",");
    const json = {
      version: pack.version,
      bytes: size,
      mode,
      gauge,
      centering,
      dtype,
      producer,
      baseModel: baseModel ?? null,
      basisId: pack.basisId,
      basisBytes: superblock.basesLength,
      tasks,
      modules,
      sections,
      breakEvenTasks: even,
    };
    const text = [
      `${pack.name}: version ${pack.version}, ${bytes(size)}, ${mode}, ${gauge}, centring ${centering}, ${dtype}`,
      table([["section", "offset", "bytes"], ...sections.map((s) => [s.name, s.offset, s.bytes])]),
      "",
      table([
        ["module", "out", "in", "K of A", "K of B", "explained A", "explained B"],
        ...modules.map((m) => [
          m.name,
          m.out,
          m.in,
          m.componentsA,
          m.componentsB,
          percent(m.explainedA),
          percent(m.explainedB),
        ]),
      ]),
      "",
      `${tasks.length} tasks; sharing pays from ${even ?? "an unknown number of"} tasks on`,
    ].join("\n");
    return { json, text };
  } finally {
    await pack.close();
  }
}

/** `verify FILE [--against ADAPTER]...` */
export async function verifyCommand(args: Arguments, out: Output): Promise<Result> {
  const path = args.positionals[0]!;
  const checks: { name: string; ok: boolean; detail: string }[] = [];
  // Opening checks window, directory, tiling, limits and the bases' place; a pack that fails these is an error, exit 1.
  const pack = await openPack(path, { bases: "later" });
  try {
    checks.push({ name: "window, directory and sections", ok: true, detail: `version ${pack.version}` });
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
      out.progress("task", i + 1, pack.tasks.size);
    }
    if (bases) checks.push(await basisIdCheck(pack, bases));
    checks.push(await paddingCheck(path, pack));
    const trailing = (await sizeOf(path)) - pack.window.superblock.committed;
    checks.push({ name: "bytes behind the end", ok: true, detail: `${trailing} (ignored)` });
    const tasks: Record<string, unknown>[] = [...pack.tasks.keys()].map((id) => ({ id }));
    const lines: (string | number)[][] = [];
    const against = args.list("against");
    if (against.length > 0 && bases && checks.every((c) => c.ok)) {
      const adapters = await readAdapters(against, { rename: renames(args) });
      for (const adapter of adapters) {
        const blob = blobs.get(adapter.id);
        if (!blob)
          throw new TaskError(`${adapter.file}: no task "${adapter.id}" in ${path}; say --as`, { task: adapter.id });
        const figures = await compare(pack, bases, blob, adapter);
        Object.assign(tasks.find((t) => t["id"] === adapter.id)!, figures);
        const { error, delta, bound } = figures;
        lines.push([
          adapter.id,
          percent(error.mean),
          percent(error.max),
          delta.A.toFixed(3),
          delta.B.toFixed(3),
          bound.toFixed(3),
        ]);
      }
      await closeAll(adapters);
    }
    const ok = checks.every((c) => c.ok);
    const text = [
      table([["check", "", ""], ...checks.map((c) => [c.name, c.ok ? "ok" : "FAILED", c.detail])]),
      ...(lines.length ? ["", table([["task", "ΔW error", "largest", "δ of A", "δ of B", "bound"], ...lines])] : []),
    ].join("\n");
    return { json: { ok, checks, tasks }, text, exitCode: ok ? 0 : 1 };
  } finally {
    await pack.close();
  }
}

async function sizeOf(path: string): Promise<number> {
  const source = await openSource(path);
  await source.close?.();
  return source.byteLength ?? 0;
}

async function basisIdCheck(pack: Pack, bases: Uint8Array): Promise<{ name: string; ok: boolean; detail: string }> {
  const found = await basisIdOf(pack.directory.basisBytes, bases);
  return { name: "basis id", ok: found === pack.basisId, detail: found.slice(0, 16) };
}

/** SPEC.md, section 1: bytes between sections are zero. */
async function paddingCheck(path: string, pack: Pack): Promise<{ name: string; ok: boolean; detail: string }> {
  const { superblock } = pack.window;
  const parts = [
    { offset: superblock.directoryOffset, length: superblock.directoryLength },
    ...pack.directory.sections,
  ].sort((a, b) => a.offset - b.offset);
  const source = await openSource(path);
  try {
    let end = WINDOW_BYTES;
    for (const { offset, length } of parts) {
      const gap = await source.read(end, offset - end);
      if (gap.some((b) => b !== 0))
        return { name: "padding", ok: false, detail: `not zero between ${end} and ${offset}` };
      end = offset + length;
    }
    return { name: "padding", ok: true, detail: "zero" };
  } finally {
    await source.close?.();
  }
}

/** ΔW error, δ and bound of a task against the adapter it was made of. */
async function compare(
  pack: Pack,
  bases: Uint8Array,
  blob: TaskBlob,
  adapter: Adapter,
): Promise<{ error: { mean: number; max: number }; delta: { A: number; B: number }; bound: number }> {
  const errors: number[] = [];
  const delta = { A: 0, B: 0 };
  let bound = 0;
  for (const term of blob.terms) {
    const module = pack.modules[term.module]!;
    const source = adapter.modules.get(module.name);
    if (!source) {
      throw new AdapterError(`it does not adapt "${module.name}", the task of the pack does`, {
        file: adapter.file,
        field: module.name,
      });
    }
    const { A, Bt } = await source.read();
    const member = { id: adapter.id, rank: source.rank, A, Bt };
    if (term.A && term.B && term.privateRank === 0) {
      const task = {
        rank: term.rank,
        alphaA: encodedTensor(blob.bytes, term.A.tensor),
        alphaB: encodedTensor(blob.bytes, term.B.tensor),
      };
      const space = openModule(storedModule(module, bases, adapter));
      const figures = measureModule(space, member, task, {
        gauge: gaugeOf(pack),
        coefficientDtype: term.A.tensor.dtype,
      });
      errors.push(figures.error);
      delta.A = Math.max(delta.A, figures.deltaA);
      delta.B = Math.max(delta.B, figures.deltaB);
      bound = Math.max(bound, figures.bound);
      continue;
    }
    const stored = expandTerm(blob, term, module, bases);
    const pair = (rank: number, a: Float32Array, b: Float32Array) => ({
      rank,
      A: Float64Array.from(a),
      Bt: Float64Array.from(b),
    });
    const found = deltaError(pair(member.rank, A, Bt), pair(stored.rank, stored.A, stored.Bt));
    errors.push(relative(found.difference, found.norm));
    bound = Math.max(bound, relative(found.bound, found.norm));
  }
  const mean = errors.reduce((a, b) => a + b, 0) / Math.max(errors.length, 1);
  return { error: { mean, max: Math.max(0, ...errors) }, delta, bound };
}

/** The types a pack's tasks are stored with, so that new ones are stored alike. */
export async function storedTypes(pack: Pack): Promise<Dtypes> {
  const first = pack.tasks.keys().next().value;
  if (first === undefined) return completeDtypes();
  const { terms, parameters } = await pack.load(first);
  const head = parameters.find((p) => p.shape.length > 1);
  const coefficients: Dtype | undefined = terms.find((t) => t.A)?.A?.tensor.dtype;
  return completeDtypes({ ...(coefficients ? { coefficients } : {}), ...(head ? { head: head.tensor.dtype } : {}) });
}

/** `remove FILE TASK...` */
export async function removeCommand(args: Arguments): Promise<Result> {
  const [file = "", ...ids] = args.positionals;
  const pack = await openPack(file);
  try {
    for (const id of ids) pack.removeTask(id);
    if (pack.tasks.size === 0) {
      throw new UsageError(`that would remove every task of ${file}; delete the file instead`);
    }
    const bytesBefore = pack.window.superblock.committed;
    const bases = (await pack.bases()).bytes;
    const tasks = [];
    for (const entry of pack.tasks.values()) tasks.push({ entry, blob: (await pack.load(entry.id)).bytes });
    const fresh = layoutFresh({ description: pack.directory.basisBytes, bases, basisId: pack.basisId, tasks });
    const bytesAfter = await writeWhole(file, fresh);
    return {
      json: { file, removed: ids, bytesBefore, bytesAfter },
      text: `${file}: ${ids.length} tasks removed, ${bytes(bytesBefore)} → ${bytes(bytesAfter)}`,
    };
  } finally {
    await pack.close();
  }
}

/**
 * Commands for packs too large for one machine: shard, merge, project, assemble (docs/hub.md). Each is run by whatever runs
 * batches: it reads files, writes one file beside its name and renames it, and gives the same bytes for the same input. A part
 * that is there already, whole and made of the same, is left alone.
 */
import { createHash } from "node:crypto";
import { createReadStream, existsSync } from "node:fs";
import { join } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters } from "../adapters/folder.ts";
import { openHost } from "../base/open.ts";
import { FormatError, SourceError } from "../errors.ts";
import { openPack } from "../pack/pack.ts";
import { completeDtypes } from "../pack/report.ts";
import { buildBasis } from "../pack/shard/basis.ts";
import { openPart, type PartKind } from "../pack/shard/part.ts";
import { adapterStatistics, mergeStatistics } from "../pack/shard/statistics.ts";
import { openStatistics, type StatisticsPart, writeStatistics } from "../pack/shard/statistics-part.ts";
import { assemblePack, openTasks, projectTasks, type TaskPart } from "../pack/shard/tasks.ts";
import { VERSION } from "../version.ts";
import {
  type Arguments,
  choice,
  refuseOverwriting,
  renames,
  required,
  selection,
  storage,
  UsageError,
  wholeNumber,
} from "./args.ts";
import { writeWhole } from "./files.ts";
import { bytes, type Output, percent, table } from "./output.ts";
import { closeAll, type Result } from "./packs.ts";

/** `shard ADAPTER_OR_FOLDER... -o PART` */
export async function shardCommand(args: Arguments, out: Output): Promise<Result> {
  const file = required(args, "output");
  columnOnly(args);
  const gauge = choice(args, "gauge", ["as-trained", "balanced"] as const, "as-trained");
  const normalize = args.flag("normalize");
  const rank = args.text("rank") === undefined ? undefined : wholeNumber(args, "rank", 1);
  const adapters = await readAdapters(args.positionals, { rename: renames(args) });
  try {
    const statistics = await adapterStatistics(adapters, { gauge, rank, normalize });
    const made = digest("shard", gauge, rank, normalize, await contents(adapters));
    const warnings = warned(adapters, out);
    const progress = (done: number, of: number): void => out.progress("side", done, of);
    const figures = await makePart(file, "statistics", made, async () => writeStatistics(statistics, made, progress));
    return result(file, { adapters: adapters.length, modules: statistics.modules.size, gauge, ...figures, warnings });
  } finally {
    await closeAll(adapters);
  }
}

/** `merge PART... -o BASIS`, or with --part -o PART */
export async function mergeCommand(args: Arguments, out: Output): Promise<Result> {
  const file = required(args, "output");
  columnOnly(args);
  for (const path of args.positionals) refuseOverwriting(file, path);
  const finding = ["k", "energy", "error", "centering", "dtype", "base"].filter(
    (name) => args.text(name) !== undefined,
  );
  if (args.flag("part") && finding.length > 0) {
    throw new UsageError(`--${finding[0]} is for a basis: leave it out with --part, and say it in the last merge`);
  }
  const select = selection(args);
  const centering = choice(args, "centering", ["keep", "none"] as const, "keep");
  const dtype = completeDtypes(storage(args.text("dtype"))).basis;
  const progress = (what: string) => (done: number, of: number) => out.progress(what, done, of);
  const parts: StatisticsPart[] = [];
  const basePath = args.text("base");
  const base = basePath === undefined ? undefined : await openHost(basePath);
  try {
    for (const path of args.positionals) parts.push(await openStatistics(path));
    const statistics = await mergeStatistics(parts, { anyBase: args.flag("any-base") });
    if (args.flag("part")) {
      const made = digest("merge", parts.map((part) => part.made).sort());
      const figures = await makePart(file, "statistics", made, async () =>
        writeStatistics(statistics, made, progress("side")),
      );
      return result(file, {
        adapters: statistics.adapters.length,
        modules: statistics.modules.size,
        gauge: statistics.gauge,
        ...figures,
        warnings: [],
      });
    }
    const { chunks, report } = await buildBasis(statistics, {
      select,
      centering,
      dtype,
      ...(base ? { base } : {}),
      onProgress: progress("module"),
    });
    await writeWhole(file, chunks);
    for (const warning of report.warnings) out.warn(warning);
    const { min, max } = report.components;
    return {
      json: { file, ...report, ...usage() },
      text: `${file}: a basis of ${report.adapters} adapters, ${report.modules} modules, ${min} to ${max} components per side, ${bytes(report.bytes)}`,
    };
  } finally {
    await base?.close?.();
    for (const part of parts) await part.close();
  }
}

/** `project BASIS ADAPTER_OR_FOLDER... -o PART` */
export async function projectCommand(args: Arguments, out: Output): Promise<Result> {
  const file = required(args, "output");
  const [basisPath = "", ...paths] = args.positionals;
  refuseOverwriting(file, basisPath);
  const types = completeDtypes(storage(args.text("dtype")));
  const adapters = await readAdapters(paths, { rename: renames(args) });
  const basis = await openPack(basisPath);
  try {
    const made = digest("project", basis.basisId, types.coefficients, types.head, await contents(adapters));
    const warnings = warned(adapters, out);
    const onProgress = (done: number, of: number): void => out.progress("module", done, of);
    const figures = await makePart(
      file,
      "tasks",
      made,
      async () => (await projectTasks(basis, adapters, made, { dtype: types, onProgress })).chunks,
    );
    const part = await openTasks(file);
    await part.close();
    const { json, text } = result(file, {
      adapters: adapters.length,
      modules: basis.modules.length,
      ...figures,
      warnings,
    });
    const rows = part.tasks.map(({ id, mean, max }) => [id, percent(mean), percent(max)]);
    return {
      json: { ...json, residual: part.tasks },
      text: `${text}\n${table([["task", "ΔW error", "largest"], ...rows])}`,
    };
  } finally {
    await basis.close();
    await closeAll(adapters);
  }
}

/** `assemble BASIS PART... -o PACK` */
export async function assembleCommand(args: Arguments): Promise<Result> {
  const file = required(args, "output");
  const [basisPath = "", ...paths] = args.positionals;
  for (const path of args.positionals) refuseOverwriting(file, path);
  const basis = await openPack(basisPath);
  const parts: TaskPart[] = [];
  try {
    for (const path of paths) parts.push(await openTasks(path));
    const { chunks, report } = await assemblePack(basis, parts);
    await writeWhole(file, chunks);
    const { dtype, ...rest } = report;
    const even = report.breakEvenTasks;
    return {
      json: { file, ...dtype, ...rest, ...usage() },
      text: [
        `${file}: ${report.tasks} tasks, ${report.modules} modules, ${bytes(report.bytes)} (${report.ratio.toFixed(1)}× smaller than the adapters)`,
        `ΔW error: mean ${percent(report.error.mean)}, largest ${percent(report.error.max)} (${report.error.worstTask})`,
        `Sharing pays from ${even ?? "no number of"} tasks on.`,
      ].join("\n"),
    };
  } finally {
    await basis.close();
    for (const part of parts) await part.close();
  }
}

/** Statistics of rows serve column mode; the other modes see all adapters at once. */
function columnOnly(args: Arguments): void {
  const mode = args.text("mode") ?? "column";
  if (mode === "column") return;
  throw new UsageError(
    `--mode ${mode}: only column mode is made of parts, the others need all adapters at once; use eigenlora pack`,
  );
}

function warned(adapters: readonly Adapter[], out: Output): string[] {
  const all = adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`));
  for (const warning of all) out.warn(warning);
  return all;
}

interface PartFigures {
  bytes: number;
  /** Whether the part was there already. */
  present: boolean;
}

/** Writes a part, unless it is there: whole, and made of the same. */
async function makePart(
  file: string,
  kind: PartKind,
  made: string,
  make: () => Promise<AsyncIterable<Uint8Array>>,
): Promise<PartFigures> {
  const found = existsSync(file) ? await wholePart(file, kind, made) : undefined;
  return found === undefined
    ? { bytes: await writeWhole(file, await make()), present: false }
    : { bytes: found, present: true };
}

/** Its size; undefined when it is damaged or another. */
async function wholePart(file: string, kind: PartKind, made: string): Promise<number | undefined> {
  try {
    const part = await openPart(file, kind);
    try {
      if (part.made !== made) return undefined;
      await part.verify();
      return part.byteLength;
    } finally {
      await part.close();
    }
  } catch (error) {
    if (error instanceof FormatError || error instanceof SourceError) return undefined;
    throw error;
  }
}

function digest(...parts: unknown[]): string {
  return createHash("sha256")
    .update(JSON.stringify([VERSION, ...parts]))
    .digest("hex");
}

/** What adapters hold, whatever their files are called or dated. */
async function contents(adapters: readonly Adapter[]): Promise<[id: string, digest: string][]> {
  const digests: [string, string][] = [];
  for (const { id, file } of adapters) {
    const hash = createHash("sha256");
    for (const name of ["adapter_config.json", "task.json", "adapter_model.safetensors"]) {
      const path = join(file, name);
      if (!existsSync(path)) continue;
      hash.update(`${name}\n`);
      for await (const chunk of createReadStream(path)) hash.update(chunk as Uint8Array);
    }
    digests.push([id, hash.digest("hex")]);
  }
  return digests;
}

/** What the process took: of the clock, of the cores, of memory. */
function usage(): { seconds: number; coreSeconds: number; peakMemoryBytes: number } {
  const { userCPUTime, systemCPUTime, maxRSS } = process.resourceUsage();
  return {
    seconds: performance.now() / 1000,
    coreSeconds: (userCPUTime + systemCPUTime) / 1e6,
    peakMemoryBytes: maxRSS * 1024,
  };
}

function result(
  file: string,
  figures: PartFigures & { adapters: number; modules: number; gauge?: string; warnings: string[] },
): Result {
  const { adapters, modules, present } = figures;
  return {
    json: { file, ...figures, ...usage() },
    text: `${file}: ${adapters} adapters, ${modules} modules, ${bytes(figures.bytes)}${present ? ", was there already" : ""}`,
  };
}

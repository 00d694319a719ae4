/**
 * The commands below `eigenlora hub`, for packs too large for one machine (docs/hub.md): shard and merge, from adapters
 * to a basis; project and assemble, from a basis to a pack. A batch engine runs each: it reads files, writes one under
 * a temporary name and renames it, and gives the same bytes for the same input.
 */

import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import type { Adapter, BaseFacts } from "../adapters/adapter.ts";
import { filesOf } from "../adapters/formats.ts";
import { describeBase } from "../adapters/tree.ts";
import type { Pack } from "../core/pack.ts";
import { FormatError, SourceError } from "../errors.ts";
import { VERSION } from "../format/format.ts";
import { completeDtypes } from "../pack/recipe.ts";
import { assemblePack, buildBasis, openTasks, projectTasks } from "../pack/shard/basis.ts";
import {
  adapterStatistics,
  mergeStatistics,
  openPart,
  openStatistics,
  type PartKind,
  type Statistics,
  writeStatistics,
} from "../pack/shard/statistics.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { refuseOtherBase } from "./change.ts";
import { type Attach, command, type Result, type Run } from "./command.ts";
import { checkTarget, writeWhole } from "./files.ts";
import { contents } from "./model.ts";
import * as option from "./options.ts";
import { bytes, count, lossTable, type Output, percent, range, resources, sharing, smaller, warnOf } from "./output.ts";

const part = option.output("PART", "The part to write; kept as it is if it exists, whole and made of the same input.");

const shard: Attach = command({
  usage: "shard <ADAPTER_OR_FOLDER...>",
  example: "hub shard some-adapters/ -o 1.part",
  options: {
    output: part,
    force: option.force,
    gauge: option.gauge,
    rank: option.rank,
    normalize: option.toggle("Give every task equal weight when components are found, however large its update."),
    as: option.as,
    anyBase: option.anyBase,
    base: option.readFor,
  },
  reads: ["repository"],
  async run(paths, { output: file, force, gauge = "as-trained", rank, normalize, as, anyBase, base }, run, out) {
    checkTarget(file, { force: true });
    const adapters = await run.adapters(paths, as, base);
    checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
    const statistics = await adapterStatistics(adapters, { gauge, rank, normalize, anyBase });
    const made = digest("shard", gauge, rank, normalize, await facts(base), await contents(adapters, out));
    return statisticsPart({ file, force }, made, statistics, warnOf(adapters, out), out);
  },
});

const OF_BASIS = "a basis is made by the last merge";

const merge: Attach = command({
  usage: "merge <PART...>",
  details: "The result is a basis, a pack without tasks.",
  example: "hub merge 1.part 2.part -o basis.eigen --k 32",
  options: {
    output: option.output("BASIS", "The basis to write, or with --part the part."),
    force: option.force,
    part: {
      ...option.toggle("Write a part instead of a basis, to be merged with others."),
      excludes: { k: OF_BASIS, energy: OF_BASIS, centering: OF_BASIS, dtype: OF_BASIS, base: OF_BASIS },
    },
    anyBase: option.anyBase,
    ...option.group("Of a basis", {
      ...option.oneOf({ k: option.k, energy: option.energy }),
      centering: option.byDefault("keep", option.choice(["keep", "none"], "Store the mean of the rows, or use none.")),
      dtype: option.dtype("basis"),
      base: option.base,
      names: { ...option.names, needs: ["base"] },
    }),
  },
  async run(paths, { output: file, force, part, anyBase, centering, ...options }, run, out) {
    const inputs = [...paths, options.base];
    if (part) checkTarget(file, { force: true, inputs });
    const target = part ? undefined : await run.target(file, { force, inputs });
    const base = await run.base(options.base, options.names);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openStatistics(path)));
    const statistics = await mergeStatistics(parts, { anyBase });
    option.refuseUnknown(options.names, statistics.modules.values(), paths.join(", "));
    if (!target) {
      const made = digest("merge", parts.map(({ made }) => made).sort());
      return statisticsPart({ file, force }, made, statistics, [], out);
    }
    const { basis: dtype } = completeDtypes(options.dtype);
    const how = { select: option.selection(options), centering, dtype, ...base, onProgress: out.progress };
    const { chunks, report } = await buildBasis(statistics, how);
    await target.write(chunks);
    for (const warning of report.warnings) out.warn(warning);
    const { adapters, modules, components } = report;
    const notes = report.notes.map((note) => option.inFlags(note, { base: option.base }));
    const size = `${range(components.min, components.max)} components per side, ${bytes(report.bytes)}`;
    return {
      json: { file, ...report, notes, ...resources() },
      text: [`${file}: a basis of ${count(adapters, "adapter")}, ${count(modules, "module")}, ${size}`, ...notes],
    };
  },
});

const project: Attach = command({
  usage: "project <BASIS> <ADAPTER_OR_FOLDER...>",
  details: "The result is a part with tasks; assemble makes a pack of all parts.",
  example: "hub project basis.eigen some-adapters/ -o 1.tasks",
  options: {
    output: part,
    force: option.force,
    dtype: option.dtype("coefficients", "head"),
    as: option.as,
    anyBase: option.anyBase,
    base: option.readFor,
  },
  reads: ["file", "repository"],
  async run([basisPath, ...paths]: [string, ...string[]], { output: file, force, dtype, as, anyBase, base }, run, out) {
    checkTarget(file, { force: true, inputs: [basisPath] });
    const types = completeDtypes(dtype);
    const adapters = await run.adapters(paths, as, base);
    checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
    const basis = await run.pack(basisPath);
    refuseOtherBase(basis, adapters, anyBase);
    return tasksPart("project", basis, adapters, { file, force, types, base }, run, out, async (made) =>
      projectTasks(basis, adapters, made, { dtype: types, onProgress: out.progress }),
    );
  },
});

const assemble: Attach = command({
  usage: "assemble <BASIS> <PART...>",
  example: "hub assemble basis.eigen 1.tasks 2.tasks -o tasks.eigen",
  options: { output: option.output("PACK", "The pack to write."), force: option.force },
  async run([basisPath, ...paths]: [string, ...string[]], { output: file, force }, run, out) {
    const target = await run.target(file, { force, inputs: [basisPath, ...paths] });
    const basis = await run.pack(basisPath);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openTasks(path)));
    const { chunks, report } = await assemblePack(basis, parts, out.progress);
    await target.write(chunks);
    const { dtype, ...rest } = report;
    const { tasks, modules, ratio, error, breakEvenTasks, adapterBytes } = rest;
    return {
      json: { file, ...dtype, ...rest, ...resources() },
      text: [
        `${file}: ${count(tasks, "task")}, ${count(modules, "module")}, ${bytes(rest.bytes)}; the adapters have ${bytes(adapterBytes)} (${smaller(ratio)})`,
        `ΔW error of a module: mean ${percent(error.mean)}, largest ${percent(error.max)} (${error.worstTask})`,
        sharing(breakEvenTasks),
      ],
    };
  },
});

/** The commands for many machines, under one name. */
export const hub: Attach = (program, does, out, done) => {
  const group = program
    .command("hub")
    .summary(does)
    .description(`${does.replace(/\.$/, "")} (docs/hub.md). Each reads files and writes one.`)
    .option("--json", "Print one JSON object.")
    .addHelpText("after", "\nExample:\n  eigenlora hub shard some-adapters/ -o 1.part")
    .helpCommand(false);
  shard(group, "Collect statistics of some adapters, to be merged with others.", out, done);
  merge(group, "Make components from the statistics of all adapters.", out, done);
  project(group, "Turn some adapters into tasks on a basis from merge.", out, done);
  assemble(group, "Make one pack of the tasks in all parts, sorted by id.", out, done);
};

// Parts: written once, and described. One that is there already, whole and made of the same, is left alone.

interface PartTarget {
  readonly file: string;
  readonly force: boolean;
}

/** A part with statistics. @param made digest of what it is made of */
function statisticsPart(
  target: PartTarget,
  made: string,
  statistics: Statistics,
  warnings: readonly string[],
  out: Output,
): Promise<Result> {
  const { adapters, modules, gauge } = statistics;
  const figures = { adapters: adapters.length, modules: modules.size, gauge, warnings };
  return makePart("statistics", target, made, figures, async () => writeStatistics(statistics, made, out.progress));
}

/**
 * A part with tasks of adapters on a basis.
 * @param command and `settings`: what it depends on, except for basis and adapters
 * @param make gets the digest of what the part is made of
 */
export async function tasksPart(
  command: "project" | "distill",
  basis: Pack,
  adapters: readonly Adapter[],
  {
    types: { coefficients, head },
    base,
    settings,
    ...target
  }: PartTarget & { readonly types: Dtypes; readonly base: string | undefined; readonly settings?: object },
  run: Run,
  out: Output,
  make: (made: string) => Promise<AsyncIterable<Uint8Array>>,
): Promise<Result> {
  const of = [basis.basisId, coefficients, head, await facts(base), await contents(adapters, out), settings];
  const made = digest(command, ...of);
  const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
  const { json, text } = await makePart("tasks", target, made, figures, () => make(made));
  const { tasks: residual } = run.closing(await openTasks(target.file));
  return { json: { ...json, residual }, text: [...text, ...lossTable(residual)] };
}

/**
 * Writes a part, unless a whole one made from the same is there. Parts need no lock: every writer writes the whole
 * part, and nothing changes it later. So a machine that is gone cannot keep another from making its part again.
 * @throws UsageError when something else is there, or a part that is damaged
 */
async function makePart(
  kind: PartKind,
  { file, force }: PartTarget,
  made: string,
  figures: { readonly adapters: number; readonly modules: number },
  make: () => Promise<AsyncIterable<Uint8Array>>,
): Promise<Result> {
  const found = existsSync(file) ? await wholePart(file, kind, made) : undefined;
  if (found === undefined) checkTarget(file, { force });
  const size = found ?? (await writeWhole(file, await make()));
  const present = found !== undefined;
  const { adapters, modules } = figures;
  const there = present ? ", already existed" : "";
  return {
    json: { file, ...figures, bytes: size, present, ...resources() },
    text: [`${file}: ${count(adapters, "adapter")}, ${count(modules, "module")}, ${bytes(size)}${there}`],
  };
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

function digest(...inputs: unknown[]): string {
  return createHash("sha256")
    .update(JSON.stringify([VERSION, ...inputs]))
    .digest("hex");
}

/** Facts about the base that adapters are read for: with another they mean another update. */
async function facts(base: string | undefined): Promise<BaseFacts | null> {
  return base === undefined ? null : describeBase(base);
}

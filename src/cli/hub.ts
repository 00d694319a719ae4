/**
 * The commands below `eigenlora hub`, for packs too large for one machine (docs/hub.md): shard and merge, from adapters to a basis;
 * project and assemble, from a basis to a pack. A batch engine runs each: it reads files, writes one file beside its name and renames it,
 * and gives the same bytes for the same input.
 */
import { completeDtypes } from "../pack/recipe.ts";
import { buildBasis } from "../pack/shard/basis.ts";
import {
  adapterStatistics,
  mergeStatistics,
  openStatistics,
  type Statistics,
  writeStatistics,
} from "../pack/shard/statistics.ts";
import { assemblePack, openTasks, projectTasks } from "../pack/shard/basis.ts";
import { refuseOtherBase } from "./change.ts";
import { type Attach, command, type Result } from "./command.ts";
import { contents, digest, facts, makePart, part } from "./hub-part.ts";
import { inFlags, names, refuseUnknown } from "./matching.ts";
import * as option from "./options.ts";
import { bytes, count, lossTable, type Output, percent, range, resources, sharing, smaller, warnOf } from "./output.ts";
import { checkTarget, filesOf } from "./target.ts";

const shard: Attach = command({
  usage: "shard <ADAPTER_OR_FOLDER...>",
  does: "Collect statistics of some adapters, to be merged with others.",
  example: "hub shard some-adapters/ -o 1.part",
  options: {
    output: part,
    force: option.force,
    gauge: option.gauge,
    rank: option.rank,
    normalize: option.normalize,
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
    return writePart({ file, force, made }, statistics, warnOf(adapters, out), out);
  },
});

const merge: Attach = command({
  usage: "merge <PART...>",
  does: "Make components from the statistics of all adapters.",
  details: "The result is a basis, a pack without tasks.",
  example: "hub merge 1.part 2.part -o basis.eigen --k 32",
  options: {
    output: option.output("BASIS", "The basis to write, or with --part the part."),
    force: option.force,
    part: option.toggle("Write a part instead of a basis, to be merged with others."),
    anyBase: option.anyBase,
    ...option.group("Of a basis", {
      k: option.amount.k,
      energy: option.amount.energy,
      centering: option.centering,
      dtype: option.dtype,
      base: option.base,
      names,
    }),
  },
  async run(paths, { output: file, force, part, anyBase, ...options }, run, out) {
    const [foreign] = option.given(options, "k", "energy", "centering", "dtype", "base");
    if (part && foreign !== undefined)
      throw new option.UsageError(`${foreign} is for a basis: leave it out with --part, and say it in the last merge`);
    const select = option.selection(options);
    const inputs = [...paths, options.base];
    if (part) checkTarget(file, { force: true, inputs });
    const target = part ? undefined : await run.target(file, { force, inputs });
    const opened = await run.base(options.base, options.names);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openStatistics(path)));
    const statistics = await mergeStatistics(parts, { anyBase });
    refuseUnknown(options.names, statistics.modules.values(), paths.join(", "));
    if (!target) {
      const made = digest("merge", parts.map(({ made }) => made).sort());
      return writePart({ file, force, made }, statistics, [], out);
    }
    const { centering = "keep" } = options;
    const dtype = completeDtypes(options.dtype).basis;
    const { chunks, report } = await buildBasis(statistics, {
      select,
      centering,
      dtype,
      ...opened,
      onProgress: out.progress,
    });
    await target.write(chunks);
    for (const warning of report.warnings) out.warn(warning);
    const { adapters, modules, components } = report;
    const notes = report.notes.map((note) => inFlags(note, { base: option.base }));
    const sides = `${range(components.min, components.max)} components per side`;
    const of = `${count(adapters, "adapter")}, ${count(modules, "module")}`;
    return {
      json: { file, ...report, notes, ...resources() },
      text: [`${file}: a basis of ${of}, ${sides}, ${bytes(report.bytes)}`, ...notes],
    };
  },
});

const project: Attach = command({
  usage: "project <BASIS> <ADAPTER_OR_FOLDER...>",
  does: "Turn some adapters into tasks on a basis from merge.",
  details: "The result is a part with tasks; assemble makes a pack of all parts.",
  example: "hub project basis.eigen some-adapters/ -o 1.tasks",
  options: {
    output: part,
    force: option.force,
    dtype: option.dtype,
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
    const made = digest(
      "project",
      basis.basisId,
      types.coefficients,
      types.head,
      await facts(base),
      await contents(adapters, out),
    );
    const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
    const { json, text } = await makePart({ file, force, kind: "tasks", made }, figures, () =>
      projectTasks(basis, adapters, made, { dtype: types, onProgress: out.progress }),
    );
    const { tasks } = run.closing(await openTasks(file));
    return { json: { ...json, residual: tasks }, text: [...text, ...lossTable(tasks)] };
  },
});

const assemble: Attach = command({
  usage: "assemble <BASIS> <PART...>",
  does: "Make one pack of the tasks in all parts, sorted by id.",
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
    const { mean, max, worstTask } = error;
    return {
      json: { file, ...dtype, ...rest, ...resources() },
      text: [
        `${file}: ${count(tasks, "task")}, ${count(modules, "module")}, ${bytes(rest.bytes)} ; the adapters have ${bytes(adapterBytes)} (${smaller(ratio)})`,
        `ΔW error: mean ${percent(mean)}, largest ${percent(max)} (${worstTask})`,
        sharing(breakEvenTasks),
      ],
    };
  },
});

function writePart(
  part: { file: string; force: boolean; made: string },
  statistics: Statistics,
  warnings: readonly string[],
  out: Output,
): Promise<Result> {
  const { adapters, modules, gauge } = statistics;
  const figures = { adapters: adapters.length, modules: modules.size, gauge, warnings };
  return makePart({ ...part, kind: "statistics" }, figures, async () =>
    writeStatistics(statistics, part.made, out.progress),
  );
}

/** The commands for many machines, under one name. */
export const hub: Attach = (program, out, done) => {
  const group = program
    .command("hub")
    .summary("Commands for packs too large for one machine.")
    .description("Commands for packs too large for one machine (docs/hub.md). Each reads files and writes one.")
    .option("--json", "Print one JSON object.")
    .addHelpText("after", "\nExample:\n  eigenlora hub shard some-adapters/ -o 1.part")
    .helpCommand(false);
  for (const attach of [shard, merge, project, assemble]) attach(group, out, done);
};

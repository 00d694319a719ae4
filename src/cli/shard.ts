/**
 * Commands for packs too large for one machine: shard and merge, from adapters to a basis (docs/hub.md). Each is run by whatever
 * runs batches: it reads files, writes one file beside its name and renames it, and gives the same bytes for the same input.
 */
import { completeDtypes } from "../pack/recipe.ts";
import { buildBasis } from "../pack/shard/basis.ts";
import { adapterStatistics, mergeStatistics, type Statistics } from "../pack/shard/statistics.ts";
import { openStatistics, writeStatistics } from "../pack/shard/statistics-part.ts";
import { type Attach, command, type Result } from "./command.ts";
import { inFlags, names, refuseUnknown } from "./matching.ts";
import {
  amount,
  anyBase,
  as,
  base,
  centering,
  dtype,
  force,
  gauge,
  given,
  group,
  normalize,
  type OptionSpec,
  output,
  rank,
  readFor,
  selection,
  toggle,
  UsageError,
} from "./options.ts";

import { bytes, count, counting, type Output, range, resources, warnOf } from "./output.ts";
import { contents, digest, facts, makePart, part } from "./parts.ts";

import { checkTarget, filesOf } from "./target.ts";

/** Statistics of rows serve column mode; the other modes see all adapters at once. */
const mode: OptionSpec<string> = {
  value: "column",
  help: "",
  hidden: true,
  parse(given, flag) {
    if (given === "column") return given;
    const why = "only column mode is made of parts, the others need all adapters at once; use eigenlora pack";
    throw new UsageError(`${flag} ${given}: ${why}`);
  },
};

export const shard: Attach = command({
  usage: "shard <ADAPTER_OR_FOLDER...>",
  does: "Collect statistics of some adapters, to be merged with others.",
  options: { output: part, force, gauge, rank, normalize, mode, as, anyBase, base: readFor },
  async run(paths, { output: file, force, gauge = "as-trained", rank, normalize, as, anyBase, base }, run, out) {
    checkTarget(file, { force: true });
    const adapters = await run.adapters(paths, as, base);
    checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
    const statistics = await adapterStatistics(adapters, { gauge, rank, normalize, anyBase });
    const made = digest("shard", gauge, rank, normalize, await facts(base), await contents(adapters, out));
    return writePart({ file, force, made }, statistics, warnOf(adapters, out), out);
  },
});

export const merge: Attach = command({
  usage: "merge <PART...>",
  does: "Make components from the statistics of all adapters.",
  details: "The result is a basis, a pack without tasks.",
  options: {
    output: output("BASIS", "The basis to write, or with --part the part."),
    force,
    part: toggle("Write a part instead of a basis, to be merged with others."),
    anyBase,
    ...group("Of a basis", {
      ...amount,
      error: { ...amount.error, hidden: true },
      centering,
      dtype,
      base,
      names,
      mode,
    }),
  },
  async run(paths, { output: file, force, part, anyBase, ...options }, run, out) {
    const [foreign] = given(options, "k", "energy", "error", "centering", "dtype", "base");
    if (part && foreign !== undefined)
      throw new UsageError(`${foreign} is for a basis: leave it out with --part, and say it in the last merge`);
    const select = selection(options);
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
    const onProgress = counting(out, "module");
    const { chunks, report } = await buildBasis(statistics, { select, centering, dtype, ...opened, onProgress });
    await target.write(chunks);
    for (const warning of report.warnings) out.warn(warning);
    const { adapters, modules, components } = report;
    const notes = report.notes.map((note) => inFlags(note, { base }));
    const sides = `${range(components.min, components.max)} components per side`;
    const of = `${count(adapters, "adapter")}, ${count(modules, "module")}`;
    return {
      json: { file, ...report, notes, ...resources() },
      text: [`${file}: a basis of ${of}, ${sides}, ${bytes(report.bytes)}`, ...notes],
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
    writeStatistics(statistics, part.made, counting(out, "side")),
  );
}

/**
 * Commands for packs too large for one machine: shard and merge, from adapters to a basis (docs/hub.md). Each is run by whatever
 * runs batches: it reads files, writes one file beside its name and renames it, and gives the same bytes for the same input.
 */
import { completeDtypes } from "../pack/build.ts";
import { buildBasis } from "../pack/shard/basis.ts";
import { adapterStatistics, mergeStatistics, openStatistics, writeStatistics } from "../pack/shard/statistics.ts";
import { type Attach, command } from "./command.ts";
import { refuseOverwriting, writeWhole } from "./files.ts";
import { openAdapters, openBase, warnings } from "./open.ts";
import {
  amount,
  as,
  base,
  centering,
  dtype,
  gauge,
  given,
  group,
  hidden,
  normalize,
  type OptionSpec,
  output,
  rank,
  selection,
  toggle,
  UsageError,
} from "./options.ts";
import { bytes, counting, resources } from "./output.ts";
import { contents, digest, makePart, part, partResult } from "./parts.ts";

/** Statistics of rows serve column mode; the other modes see all adapters at once. */
const mode: OptionSpec<string> = hidden({
  value: "column",
  help: "The only mode that is made of parts.",
  otherwise: "column",
  parse(given, flag) {
    if (given === "column") return given;
    throw new UsageError(
      `${flag} ${given}: only column mode is made of parts, the others need all adapters at once; use eigenlora pack`,
    );
  },
});

export const shard: Attach = command({
  usage: "shard <ADAPTER_OR_FOLDER...>",
  does: "count some of very many adapters, to be merged with others",
  options: { output: part, gauge, rank, normalize, mode, as },
  async run(paths, { output: file, gauge = "as-trained", rank, normalize, as }, run) {
    const adapters = await openAdapters(paths, as, run);
    const statistics = await adapterStatistics(adapters, { gauge, rank, normalize });
    const made = digest("shard", gauge, rank, normalize, await contents(adapters));
    const warned = warnings(adapters, run);
    const figures = await makePart(file, "statistics", made, async () =>
      writeStatistics(statistics, made, counting(run, "side")),
    );
    const modules = statistics.modules.size;
    return partResult(file, { adapters: adapters.length, modules, gauge, ...figures, warnings: warned });
  },
});

export const merge: Attach = command({
  usage: "merge <PART...>",
  does: "make components of the counts of all adapters: a pack without tasks",
  options: {
    output: output("BASIS", "The basis to write, or with --part the part."),
    part: toggle("Write a part again, to be merged with others."),
    anyBase: toggle("Take parts whose adapters name different base models."),
    ...group("Of a basis", { ...amount, error: hidden(amount.error), centering, dtype, base, mode }),
  },
  async run(paths, { output: file, part, anyBase, ...options }, run) {
    refuseOverwriting(file, ...paths);
    const { k, energy, error, centering = "keep", base } = options;
    const [foreign] = given({ k, energy, error, centering: options.centering, ...options.dtype, base });
    if (part && foreign !== undefined)
      throw new UsageError(`${foreign} is for a basis: leave it out with --part, and say it in the last merge`);
    const select = selection(options);
    const opened = await openBase(base, run);
    const parts = [];
    for (const path of paths) parts.push(run.closing(await openStatistics(path)));
    const statistics = await mergeStatistics(parts, { anyBase });
    if (part) {
      const made = digest("merge", parts.map(({ made }) => made).sort());
      const figures = await makePart(file, "statistics", made, async () =>
        writeStatistics(statistics, made, counting(run, "side")),
      );
      const { adapters, modules, gauge } = statistics;
      return partResult(file, { adapters: adapters.length, modules: modules.size, gauge, ...figures, warnings: [] });
    }
    const dtype = completeDtypes(options.dtype).basis;
    const onProgress = counting(run, "module");
    const { chunks, report } = await buildBasis(statistics, { select, centering, dtype, ...opened, onProgress });
    await writeWhole(file, chunks);
    for (const warning of report.warnings) run.warn(warning);
    const { adapters, modules, components } = report;
    const sides = `${components.min} to ${components.max} components per side`;
    return {
      json: { file, ...report, ...resources() },
      text: [`${file}: a basis of ${adapters} adapters, ${modules} modules, ${sides}, ${bytes(report.bytes)}`],
    };
  },
});

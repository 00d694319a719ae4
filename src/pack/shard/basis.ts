/**
 * From statistics to a basis: a pack without tasks, onto which adapters are projected wherever they are. Column mode only; what
 * needs all adapters at once is refused by name.
 */

import type { WeightHost } from "../../base/host.ts";
import {
  type ComponentSelection,
  checkSelection,
  decompose,
  type ExtractOptions,
  encodeBasis,
  type SideBasis,
  wanted,
} from "../../extract/extract.ts";
import { gramComponents, type Summary } from "../../extract/summary.ts";
import { basisIdOf, encodeBasis as encodeBases, type ModuleInput } from "../../format/encode.ts";
import { layoutFresh } from "../../format/layout.ts";
import type { Dtype } from "../../tensor/dtypes.ts";
import { VERSION } from "../../version.ts";
import { fastProducts, readFingerprints, sideInput } from "../build.ts";
import { baseModels, factorsOf, type Statistics } from "./statistics.ts";

export interface BasisOptions {
  /** How many components of each module and side: `k` or `energy`; 90 % of the squared singular values unless given. */
  select?: ComponentSelection;
  /** "keep" unless given. */
  centering?: "keep" | "none";
  /** Of components and means; f16 unless given. */
  dtype?: Dtype;
  /** The base model, for fingerprints and an early check of names and shapes. */
  base?: WeightHost;
  /** Called after each module. */
  onProgress?: (done: number, of: number) => void;
}

export interface BasisReport {
  /** That were counted. */
  adapters: number;
  modules: number;
  gauge: Statistics["gauge"];
  centering: "keep" | "none";
  dtype: Dtype;
  bytes: number;
  /** Components per module and side. */
  components: { min: number; mean: number; max: number };
  warnings: string[];
}

/**
 * The basis of all adapters that were counted: what `buildPack` finds in column mode with the same settings, to the bit where
 * a side's rows were kept, and else up to rounding.
 * @throws RangeError for a selection by error, and for the balanced gauge with the mean kept: both need all adapters at once
 * @throws BaseMismatchError when the base given does not have the modules
 * @returns a pack without tasks as consecutive chunks, and what was found
 */
export async function buildBasis(
  statistics: Statistics,
  options: BasisOptions = {},
): Promise<{ chunks: Uint8Array[]; report: BasisReport }> {
  const { select = { kind: "energy", share: 0.9 }, centering = "keep", dtype = "f16", base } = options;
  const { gauge, rank, normalize } = statistics;
  checkSelection(select);
  if (select.kind === "error") {
    throw new RangeError(
      "a largest error is judged on all adapters at once: say how many components (--k, --energy), or pack on one machine",
    );
  }
  if (gauge === "balanced" && centering === "keep") {
    throw new RangeError(
      "balanced pairs settle their signs by the mean of all adapters at once: do without the mean (--centering none), or shard with --gauge as-trained",
    );
  }
  const extraction: ExtractOptions = {
    gauge,
    centering,
    normalize,
    select,
    basisDtype: dtype,
    coefficientDtype: dtype,
    ...(await fastProducts()),
  };
  const names = [...statistics.modules.keys()];
  const fingerprints = base && (await readFingerprints(base, statistics.modules.values()));
  const modules: ModuleInput[] = [];
  for (const [index, { name, out, in: inputs, layout, kernel }] of [...statistics.modules.values()].entries()) {
    const ranks = await statistics.ranks(name);
    const side = async (which: "A" | "B") =>
      sideInput(sideBasis(await statistics.side(name, which), ranks, extraction));
    modules.push({
      name,
      out,
      in: inputs,
      layout,
      kernel,
      A: await side("A"),
      B: await side("B"),
      fingerprint: fingerprints?.get(name),
    });
    options.onProgress?.(index + 1, names.length);
  }
  const models = baseModels(statistics);
  const warnings = base ? [] : ["made without a base model: the runtime can check shapes only, not which model it is"];
  if (models.length > 1) warnings.push(`the adapters name different base models: ${models.join(", ")}`);
  const { description, bases } = encodeBases({
    producer: `eigenlora ${VERSION}`,
    mode: "column",
    gauge,
    centering,
    rank,
    baseModel: models[0],
    modules,
  });
  const chunks = layoutFresh({ description, bases, basisId: await basisIdOf(description, bases), tasks: [] });
  const counts = modules.flatMap((m) => [m.A!.K, m.B!.K]);
  const report: BasisReport = {
    adapters: statistics.adapters.length,
    modules: modules.length,
    gauge,
    centering,
    dtype,
    bytes: chunks.reduce((sum, chunk) => sum + chunk.length, 0),
    components: {
      min: Math.min(...counts),
      mean: counts.reduce((a, b) => a + b, 0) / counts.length,
      max: Math.max(...counts),
    },
    warnings,
  };
  return { chunks, report };
}

function sideBasis(summary: Summary, ranks: Uint32Array, options: ExtractOptions): SideBasis {
  const { width } = summary;
  if (summary.kind === "gram") {
    const found = gramComponents(summary, options.centering, wanted(options), options.products);
    return encodeBasis(
      { width, rank: undefined, ...found },
      found.components.count,
      options.basisDtype,
      options.products,
    );
  }
  const stacked = factorsOf(summary.values, ranks, width).filter(({ rank }) => rank > 0);
  const factors = stacked.map(({ factor }) => (options.gauge === "balanced" ? trimmed(factor, width) : factor));
  const side = decompose(factors, factors, width, undefined, options);
  return encodeBasis(side, side.components.count, options.basisDtype, options.products);
}

/** A balanced factor without the rows of zeros behind. */
function trimmed(factor: Float64Array, width: number): Float64Array {
  let end = factor.length;
  while (end > width && factor.subarray(end - width, end).every((value) => value === 0)) end -= width;
  return factor.subarray(0, end);
}

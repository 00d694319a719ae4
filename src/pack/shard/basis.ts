/**
 * Makes a basis of statistics: a pack without tasks, onto which adapters are projected wherever they are. Column mode only; what
 * needs all adapters at once is refused by name.
 */

import type { ModuleShape } from "../../adapters/adapter.ts";
import { commonBase } from "../../adapters/adapter.ts";
import { AdapterError } from "../../errors.ts";
import { checkSelection, type ExtractOptions, wanted } from "../../extract/options.ts";
import { decompose, encodeSide, type SideBasis } from "../../extract/side.ts";
import { fastProducts } from "../../extract/wasm-products.ts";
import type { ModuleInput, SideInput } from "../../format/encode.ts";
import type { Dtype } from "../../tensor/dtypes.ts";
import { storing, UnstorableError } from "../../tensor/encode.ts";
import type { Streamed } from "../build.ts";
import { peakOf, readFingerprints, refuseLarge, sideInput } from "../encode.ts";
import type { BuildOptions } from "../recipe.ts";
import { type BuildReport, baseNotes, baseWarnings, componentsOf, fewerWarnings } from "../report.ts";
import { newPack } from "../write.ts";
import { factorsOf, gramComponents, type Statistics, type Summary } from "./statistics.ts";

/** How a basis is made. */
export interface BasisOptions extends Pick<BuildOptions, "select" | "centering" | "base" | "onProgress"> {
  /** Number format of components and means. Default: f16. */
  readonly dtype?: Dtype;
}

/** What a basis is made of. */
export interface BasisReport
  extends Pick<
    BuildReport,
    "modules" | "mode" | "gauge" | "centering" | "bytes" | "components" | "warnings" | "notes"
  > {
  readonly dtype: Dtype;
  /** That were counted. */
  readonly adapters: number;
}

/**
 * The basis of all adapters that were counted: what `buildPack` finds in column mode with the same settings, to the bit where
 * a side's rows were kept, and else up to rounding.
 * @throws RangeError for the balanced gauge with the mean kept, which needs all adapters at once
 * @throws AdapterError for components that cannot be stored
 * @throws BaseMismatchError when the base given does not have the modules
 * @returns a pack without tasks, and what was found
 */
export async function buildBasis(statistics: Statistics, options: BasisOptions = {}): Promise<Streamed<BasisReport>> {
  const { select = { kind: "energy", share: 0.9 }, centering = "keep", dtype = "f16", base } = options;
  const { gauge, rank, normalize } = statistics;
  checkSelection(select);
  if (gauge === "balanced" && centering === "keep") {
    throw new RangeError(
      'balanced pairs settle their signs by the mean of all adapters at once: take centering "none", or statistics in gauge "as-trained"',
    );
  }
  const products = await fastProducts();
  const extraction = { gauge, centering, normalize, select, basisDtype: dtype, coefficientDtype: dtype, products };
  const fingerprints = base === undefined ? undefined : await readFingerprints(base, statistics.modules.values());
  const modules: ModuleInput[] = [];
  const adapted = statistics.adapters.map(() => new Set<string>());
  for (const { rows: _, ...shape } of statistics.modules.values()) {
    const { name } = shape;
    const ranks = await statistics.ranks(name);
    for (const [i, rank] of ranks.entries()) if (rank > 0) adapted[i]!.add(name);
    const side = async (which: "A" | "B") => {
      const summary = await statistics.side(name, which);
      try {
        return storedSide({ shape, which, summary, ranks }, extraction);
      } catch (cause) {
        if (!(cause instanceof UnstorableError)) throw cause;
        const largest = largestRows(summary, ranks);
        const whose =
          largest === undefined ? "" : `; the largest rows are those of "${statistics.adapters[largest]!.id}"`;
        throw new AdapterError(`${cause.message}${whose}`, { file: statistics.file, field: name, cause });
      }
    };
    modules.push({ ...shape, A: [await side("A")], B: [await side("B")], fingerprint: fingerprints?.get(name) });
    const total = statistics.modules.size;
    options.onProgress?.({ stage: "merging", done: modules.length, total, unit: "modules" });
  }
  const baseModel = commonBase(statistics.adapters);
  const { chunks, bytes } = await newPack({ mode: "column", gauge, centering, rank, baseModel, modules }, []);
  const components = componentsOf(modules);
  const report: BasisReport = {
    adapters: statistics.adapters.length,
    modules: modules.length,
    mode: "column",
    gauge,
    centering,
    dtype,
    bytes,
    components,
    warnings: [
      ...baseWarnings(statistics.adapters.map((adapter, i) => ({ ...adapter, modules: adapted[i]! }))),
      ...fewerWarnings(select, components),
    ],
    notes: baseNotes(base !== undefined),
  };
  return { chunks, report };
}

/** One side of a module, counted. */
interface Counted {
  readonly shape: ModuleShape;
  readonly which: "A" | "B";
  readonly summary: Summary;
  /** Rows of each adapter. */
  readonly ranks: Uint32Array;
}

/** @throws UnstorableError */
function storedSide({ shape, which, summary, ranks }: Counted, extraction: ExtractOptions): SideInput {
  const encode = (): SideInput => sideInput(sideBasis(summary, ranks, extraction));
  const side = storing(`basis ${which} of "${shape.name}"`, undefined, encode);
  refuseLarge({ ...shape, [which]: [side] });
  return side;
}

/** Which adapter's they are; undefined where rows were not kept. */
function largestRows(summary: Summary, ranks: Uint32Array): number | undefined {
  if (summary.kind === "gram") return undefined;
  const peaks = factorsOf(summary.values, ranks, summary.width).map(({ factor }) => peakOf(factor));
  return peaks.indexOf(Math.max(...peaks));
}

function sideBasis(summary: Summary, ranks: Uint32Array, options: ExtractOptions): SideBasis {
  const { width } = summary;
  if (summary.kind === "gram") {
    const found = gramComponents(summary, options.centering, wanted(options), options.products);
    return encodeSide(
      { width, rank: undefined, ...found },
      found.components.count,
      { type: options.basisDtype },
      options.products,
    );
  }
  const stacked = factorsOf(summary.values, ranks, width).filter(({ rank }) => rank > 0);
  const factors = stacked.map(({ factor }) => (options.gauge === "balanced" ? trimmed(factor, width) : factor));
  const side = decompose(factors, factors, width, undefined, options);
  return encodeSide(side, side.components.count, { type: options.basisDtype }, options.products);
}

/** A balanced factor without the rows of zeros behind. */
function trimmed(factor: Float64Array, width: number): Float64Array {
  let end = factor.length;
  while (end > width && factor.subarray(end - width, end).every((value) => value === 0)) end -= width;
  return factor.subarray(0, end);
}

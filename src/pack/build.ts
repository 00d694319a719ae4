/**
 * From adapters to a pack: module by module, read, extract, encode. Holds one module's stack and what goes into the pack,
 * never all adapters. No file system: adapters are read through their sources, the result is a list of chunks.
 */

import type { Adapter } from "../adapters/adapter.ts";
import {
  baseModels,
  checkAdapters,
  refuseBases,
  refuseBoth,
  type SharedModule,
  sharedModules,
} from "../adapters/modules.ts";
import { checkOptions } from "../arguments.ts";
import type { BaseInput } from "../core/base.ts";
import type { Allocation } from "../extract/allocation.ts";
import { createExtractor, type Extractor } from "../extract/extractor.ts";
import type { BasisMode, Centering, ComponentSelection, ExtractOptions, Gauge } from "../extract/options.ts";
import type { ModuleInput, TermInput } from "../format/encode.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { type Encoded, encodeModules, type Known } from "./encode-modules.ts";
import { readFingerprints } from "./fingerprints.ts";
import { allOf, newPack } from "./fresh.ts";
import {
  type BuildReport,
  baseNotes,
  baseWarnings,
  completeDtypes,
  componentsOf,
  fewerWarnings,
  idleWarnings,
  lossesOf,
  lossWarnings,
  sizes,
  summaryOf,
  type TaskLoss,
} from "./report.ts";
import { checkStep, narrowTerms } from "./steps.ts";
import { encodeAdapter, type HeadFormat } from "./tasks.ts";

/** How adapters are packed. */
export interface BuildOptions {
  // What is shared.
  /**
   * "column": every row of a factor has coefficients of its own. "flat": one vector of coefficients for each factor, so
   * that a task is much smaller and the components are larger; there are fewer components than tasks. "joint": as column, with
   * components that lose least of ΔW itself. Default: "column".
   */
  readonly mode?: BasisMode | undefined;
  /** Default: "as-trained". */
  readonly gauge?: Gauge | undefined;
  /** Default: "keep", in joint mode "none". */
  readonly centering?: Centering | undefined;
  /** How many components. Default: those with 90 % of the squared singular values, by module and side. */
  readonly select?: ComponentSelection | undefined;
  /** Every task counts alike when components are sought, however large its update is. Default: false. */
  readonly normalize?: boolean | undefined;
  /**
   * Second moments [in, in] of what enters each module, by name (`inputMoments` of `eigenlora/train`): errors are then those of the
   * modules' outputs, in choosing and in the report.
   */
  readonly moments?: ReadonlyMap<string, Float64Array> | undefined;

  // What each task has.
  /** The most rank that a task keeps of each module, with gauge "balanced": the weakest directions of an adapter are noise. Default: all. */
  readonly rank?: number | undefined;
  /**
   * Rank-1 terms that each task has to itself in every module, with gauge "balanced", beside the components or, with `select` k 0,
   * instead of them. With an error to keep, an upper limit; each task uses as few as it needs. Or how many of which number format by
   * task and module (`searchPack` finds that). Default: 0.
   */
  readonly privateTerms?: number | Allocation | undefined;

  // How it is written.
  /** Default: f16 for each. */
  readonly dtype?: Partial<Dtypes> | undefined;
  /**
   * Entropy-coded integers for coefficients, components and private terms: from one to the next, ΔW of a module changes by this share
   * of the norm that ΔW of the adapter's modules typically has. Integers have as many bits as they are worth: 0.1 takes about two,
   * half of it one more. In column or joint mode. Default: the number formats of `dtype`.
   */
  readonly step?: number | undefined;
  /**
   * The same for heads: the step between their integers, as a share of the root mean square of the head's values. Default: with a
   * step 0.5, unless `dtype.head` is given.
   */
  readonly headStep?: number | undefined;
  /** The base model, for fingerprints and an early check of names and shapes. Default: none, with a note in the report. */
  readonly base?: BaseInput | undefined;
  /** Take adapters that name different base models: other names for one, which they do not share the end of. Default: false. */
  readonly anyBase?: boolean | undefined;

  /**
   * Threads that extract modules beside each other, with the same result. Each holds one module's stack, and they take a tenth of a
   * second to start: for adapters of 100 MB and more. One where the platform starts none: they need Node, Deno or Bun. Default: 1.
   */
  readonly workers?: number | undefined;
  /** Called after each module. */
  readonly onProgress?: ((done: number, of: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

const OPTIONS = [
  "mode",
  "gauge",
  "centering",
  "select",
  "normalize",
  "moments",
  "rank",
  "privateTerms",
  "dtype",
  "step",
  "headStep",
  "base",
  "anyBase",
  "workers",
  "onProgress",
  "signal",
] as const;

/** A pack that was made. */
export interface Built<Report = BuildReport> {
  /** The pack as consecutive chunks. */
  readonly chunks: Uint8Array[];
  readonly report: Report;
}

/** A pack that was made, or is being made as its chunks are asked for, once. */
export interface Packed<Report = BuildReport> {
  readonly chunks: Uint8Array[] | AsyncIterable<Uint8Array>;
  readonly report: Report;
}

/** All of it. */
export async function gathered<Report>({ chunks, report }: Packed<Report>): Promise<Built<Report>> {
  return { chunks: Array.isArray(chunks) ? chunks : await allOf(chunks), report };
}

/**
 * Packs adapters.
 * @throws AdapterError when adapters do not agree about a module, name different base models, or have a tensor that cannot be stored
 * @throws BaseMismatchError when the base given does not have the adapted modules
 * @throws RangeError for options that do not go together, or an error that is out of reach; TypeError for an unknown option
 * @returns the pack, and what became of the adapters
 * @example
 * const { chunks, report } = await buildPack(adapters, { select: { kind: "k", k: 16 } });
 */
export async function buildPack(adapters: readonly Adapter[], options: BuildOptions = {}): Promise<Built> {
  checkBuild(adapters, options);
  return gathered(await buildWith((work) => withExtractor("buildPack", options.workers, work), adapters, options));
}

function checkBuild(adapters: readonly Adapter[], options: BuildOptions): void {
  checkOptions("buildPack", options, OPTIONS);
  checkAdapters("buildPack", adapters);
  if (adapters.length === 0) throw new RangeError("buildPack: no adapters");
  for (const adapter of adapters) refuseBoth(adapter);
  refuseBases(adapters, options.anyBase);
  checkStep("step", options.step);
  checkStep("headStep", options.headStep);
}

/** Does work that extracts, with so many workers. @throws RangeError for a number that is none */
export async function withExtractor<T>(
  who: string,
  workers: number = 1,
  work: (extractor: Extractor) => Promise<T>,
): Promise<T> {
  if (!(Number.isInteger(workers) && workers >= 1))
    throw new RangeError(`${who}: workers: expected a whole number from 1, got ${workers}`);
  const extractor = await createExtractor(workers);
  try {
    return await work(extractor);
  } finally {
    await extractor.close();
  }
}

/**
 * `buildPack` with an extractor of the caller's.
 * @param extracting lends it for the extraction alone: what is left to do needs memory, which threads would hold
 * @param held whether the pack is to be in memory, or is made as its chunks are asked for, once
 */
export async function buildWith(
  extracting: <T>(work: (extractor: Extractor) => Promise<T>) => Promise<T>,
  adapters: readonly Adapter[],
  options: BuildOptions,
  held: boolean = true,
): Promise<Packed> {
  const draft = await startBuild(adapters, options);
  await extracting((extractor) => draft.extract(extractor, options.privateTerms));
  return draft.finish(held);
}

/** `buildPack` for who writes the pack and is done with it: its tasks are in memory one at a time. */
export async function buildStreamed(adapters: readonly Adapter[], options: BuildOptions): Promise<Packed> {
  checkBuild(adapters, options);
  return buildWith((work) => withExtractor("buildPack", options.workers, work), adapters, options, false);
}

/** What a pack is made with. */
interface Prepared {
  readonly extraction: ExtractOptions;
  readonly dtype: Dtypes;
  readonly shared: readonly SharedModule<Adapter>[];
  /** Of the base, by module. */
  readonly fingerprints: ReadonlyMap<string, Float32Array> | undefined;
}

/** @throws as `buildPack` */
export async function prepare(adapters: readonly Adapter[], options: BuildOptions): Promise<Prepared> {
  checkBuild(adapters, options);
  const shared = [...sharedModules(adapters).values()];
  const { base } = options;
  const shapes = shared.map(({ shape }) => shape);
  return {
    extraction: extractionOf(options, adapters.length),
    dtype: dtypesOf(options),
    shared,
    fingerprints: base === undefined ? undefined : await readFingerprints(base, shapes),
  };
}

/** A pack in the making, of private terms and steps that may change. */
export interface Draft {
  /**
   * Extracts all modules, or what has changed since.
   * @param steps of ΔW, by adapter. Default: as the option says
   * @returns what each task loses
   */
  extract(
    extractor: Extractor,
    privateTerms: BuildOptions["privateTerms"],
    steps?: ReadonlyMap<Adapter, number>,
  ): Promise<readonly TaskLoss[]>;
  /** Once after each extraction. @param held as of `buildWith` */
  finish(held: boolean): Promise<Packed>;
}

/**
 * @param again whether it will be extracted more than once, which what was extracted is kept for
 * @param error that steps keep to, which the pack then says
 */
export async function startBuild(
  adapters: readonly Adapter[],
  options: BuildOptions,
  { again = false, error }: { readonly again?: boolean; readonly error?: number | undefined } = {},
): Promise<Draft> {
  const { extraction, dtype, shared, fingerprints } = await prepare(adapters, options);
  const known: Known | undefined = again ? new Map() : undefined;
  let encoded: Encoded | undefined;
  return {
    async extract(extractor, privateTerms, steps) {
      // What was made before is let go of first.
      encoded = undefined;
      encoded = await encodeModules(extractor, shared, extraction, dtype, { ...options, privateTerms, steps }, known);
      return lossesOf(encoded.errors);
    },
    finish(held) {
      const modules = encoded!.modules.map((module) => ({ ...module, fingerprint: fingerprints?.get(module.name) }));
      return finishBuild(adapters, { ...options, error }, extraction, { ...encoded!, modules }, held);
    },
  };
}

/** The pack of what was extracted. */
async function finishBuild(
  adapters: readonly Adapter[],
  options: BuildOptions & { readonly error: number | undefined },
  extraction: ExtractOptions,
  { modules, terms, errors }: Encoded,
  held: boolean,
): Promise<Packed> {
  const names = modules.map(({ name }) => name);
  const components = componentsOf(modules);
  const beside = describe(adapters, options, extraction, { names, components, terms, errors });
  const [widths, head] = [modules.slice(), headOf(options)];
  const tasks = adapters.map((adapter) => async () => {
    const own = terms.get(adapter) ?? [];
    return encodeAdapter(adapter, options.step ? narrowTerms(own, widths) : own, names, head);
  });
  // Handed over: the encoded components are in the chunks afterwards, and need not be held twice.
  const basis = basisOf(adapters, options, extraction, modules.splice(0));
  const { bytes, chunks, blobs } = await newPack(basis, tasks, { held });
  return { chunks, report: { ...sizesOf(bytes, blobs, adapters), ...beside } };
}

/** How the basis of a pack says that it was made. */
export function basisOf(
  adapters: readonly Adapter[],
  { step, error }: Pick<BuildOptions, "step"> & { readonly error: number | undefined },
  { mode = "column", gauge, centering, rank }: ExtractOptions,
  modules: readonly ModuleInput[],
): Parameters<typeof newPack>[0] {
  return { mode, gauge, centering, rank, step, error, baseModel: baseModels(adapters)[0], modules };
}

export function sizesOf(
  bytes: number,
  blobs: readonly number[],
  adapters: readonly Adapter[],
): ReturnType<typeof sizes> {
  return sizes(
    bytes,
    blobs.map((blob, i) => ({ blob, adapter: adapters[i]!.byteLength })),
  );
}

/** What was made of adapters. */
interface Made extends Pick<Encoded, "errors"> {
  readonly names: readonly string[];
  readonly components: BuildReport["components"];
  readonly terms: ReadonlyMap<Adapter, readonly MadeTerm[]>;
}

/** What of a term is said in a report. */
export type MadeTerm = Pick<TermInput, "magnitude"> & {
  readonly privateTerms?: Pick<NonNullable<TermInput["privateTerms"]>, "rank" | "dtype"> | undefined;
};

/** What a report says of it, but for sizes. */
export function describe(
  adapters: readonly Adapter[],
  options: BuildOptions,
  { mode = "column", gauge, centering }: ExtractOptions,
  { names, components, terms, errors }: Made,
): Omit<BuildReport, keyof ReturnType<typeof sizes>> {
  const adapted = new Set(errors.map(({ task }) => task));
  const losses = lossesOf(
    errors,
    adapters.flatMap(({ id }) => (adapted.has(id) ? id : [])),
  );
  return {
    modules: names.length,
    ...{ mode, gauge, centering, dtype: dtypesOf(options), step: options.step, components },
    privateTerms: countsOf([...terms.values()].flat()),
    error: summaryOf(errors),
    errors: losses,
    warnings: [
      ...lossWarnings(losses),
      ...adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`)),
      ...baseWarnings(adapters),
      ...idleWarnings(adapters, errors, (adapter) => terms.get(adapter) ?? []).values(),
      ...fewerWarnings(options.select, components),
    ],
    notes: baseNotes(options.base),
  };
}

function countsOf(terms: readonly MadeTerm[]): BuildReport["privateTerms"] {
  const counts: Partial<Record<Dtype, number>> = {};
  for (const { privateTerms: own } of terms) if (own) counts[own.dtype] = (counts[own.dtype] ?? 0) + own.rank;
  return counts;
}

/** Options of extraction, complete. @throws RangeError for those that do not go together */
function extractionOf(options: BuildOptions, tasks: number): ExtractOptions {
  const { mode = "column", gauge = "as-trained", select = { kind: "energy", share: 0.9 } } = options;
  const { centering = mode === "joint" ? "none" : "keep", rank, normalize } = options;
  if (mode === "joint" && centering === "keep")
    throw new RangeError('joint mode has no mean: leave centering out, or take mode "column"');
  if (mode === "flat") checkFlat(select, tasks, centering);
  const { basis: basisDtype, coefficients: coefficientDtype } = dtypesOf(options);
  return {
    mode,
    gauge,
    rank,
    centering,
    normalize,
    select,
    basisDtype,
    coefficientDtype,
  };
}

/** Of heads, in the unit of `headStep`: about three bits a number. */
const HEAD_STEP = 0.5;

/** Number formats; with a step coefficients are integers, made smaller later where they fit. */
function dtypesOf({ dtype, step }: BuildOptions): Dtypes {
  return step ? { head: "int4", ...dtype, basis: "int8", coefficients: "int8" } : completeDtypes(dtype);
}

/** How heads are stored. */
export function headOf(options: BuildOptions): HeadFormat {
  const { step, headStep = step === undefined || options.dtype?.head ? undefined : HEAD_STEP } = options;
  return { type: dtypesOf(options).head, step: headStep };
}

/** N tasks are N vectors in flat mode, and one dimension of them is the mean. */
function checkFlat(select: ComponentSelection, tasks: number, centering: "keep" | "none"): void {
  const most = tasks - (centering === "keep" ? 1 : 0);
  if (select.kind !== "k" || select.k <= most) return;
  const beside = centering === "keep" ? " beside the mean" : "";
  throw new RangeError(
    `${select.k} components: flat mode has at most ${most}${beside} for ${tasks} adapters; ask for fewer, or take mode "column"`,
  );
}

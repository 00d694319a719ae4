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
import type { WeightHost } from "../base/host.ts";
import { AdapterError } from "../errors.ts";
import type { Allocation } from "../extract/allocation.ts";
import { createExtractor, type Extractor, inOrder } from "../extract/extractor.ts";
import type { BasisMode, Centering, ComponentSelection, ExtractOptions, Gauge } from "../extract/options.ts";
import type { MixedExtraction } from "../extract/private.ts";
import type { SideBasis } from "../extract/side.ts";
import type { ModuleInput, SideInput, TermInput } from "../format/encode.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import { readFingerprints } from "./fingerprints.ts";
import { newPack } from "./fresh.ts";
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
  type ModuleError,
  sizes,
  summaryOf,
} from "./report.ts";
import { readStack } from "./stack.ts";
import { checkStep, narrowTerms, stepsOf } from "./steps.ts";
import { encodeAdapter, encodeTerm, type HeadFormat } from "./tasks.ts";

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
  readonly base?: WeightHost | undefined;
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
  return buildWith((work) => withExtractor("buildPack", options.workers, work), adapters, options);
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
 */
export async function buildWith(
  extracting: <T>(work: (extractor: Extractor) => Promise<T>) => Promise<T>,
  adapters: readonly Adapter[],
  options: BuildOptions,
): Promise<Built> {
  checkBuild(adapters, options);
  const { step } = options;
  const extraction = extractionOf(options, adapters.length);
  const { mode = "column", gauge, centering, rank } = extraction;
  const dtype = dtypesOf(options);
  const shared = sharedModules(adapters);
  const names = [...shared.keys()];
  const fingerprints =
    options.base &&
    (await readFingerprints(
      options.base,
      [...shared.values()].map(({ shape }) => shape),
    ));
  const {
    modules: encoded,
    terms,
    errors,
  } = await extracting((extractor) => encodeModules(extractor, [...shared.values()], extraction, dtype, options));
  const modules = encoded.map((module) => ({ ...module, fingerprint: fingerprints?.get(module.name) }));
  const components = componentsOf(modules);
  const head = headOf(options);
  const tasks = await Promise.all(
    adapters.map((adapter) => {
      const own = terms.get(adapter) ?? [];
      return encodeAdapter(adapter, step ? narrowTerms(own, modules) : own, names, head);
    }),
  );
  const baseModel = baseModels(adapters)[0];
  // Handed over: the encoded components are in the chunks afterwards, and need not be held twice.
  const basis = { mode, gauge, centering, rank, step, baseModel, modules: modules.splice(0) };
  const { chunks, blobs } = await newPack(basis, tasks);
  const adapterBytes = adapters.map(({ byteLength }) => byteLength);
  const losses = lossesOf(errors, [...new Set(errors.map(({ task }) => task))]);
  const bytes = chunks.reduce((sum, { length }) => sum + length, 0);
  const report: BuildReport = {
    ...sizes(
      bytes,
      blobs.map((blob, i) => ({ blob, adapter: adapterBytes[i]! })),
    ),
    modules: names.length,
    ...{ mode, gauge, centering, dtype, step, components },
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
  return { chunks, report };
}

function countsOf(terms: readonly TermInput[]): BuildReport["privateTerms"] {
  const counts: Partial<Record<Dtype, number>> = {};
  for (const { privateTerms: own } of terms) if (own) counts[own.dtype] = (counts[own.dtype] ?? 0) + own.rank;
  return counts;
}

/** Extracts and encodes module after module. */
async function encodeModules(
  extractor: Extractor,
  shared: readonly SharedModule<Adapter>[],
  extraction: ExtractOptions,
  dtype: Dtypes,
  { moments: all, privateTerms, step, onProgress, signal }: BuildOptions,
): Promise<{ modules: ModuleInput[]; terms: Map<Adapter, TermInput[]>; errors: ModuleError[] }> {
  const modules: ModuleInput[] = [];
  const terms = new Map<Adapter, TermInput[]>();
  const errors: ModuleError[] = [];
  const steps =
    step === undefined
      ? undefined
      : await stepsOf(
          shared.flatMap(({ owners }) => owners),
          step,
        );
  const extract = async (module: SharedModule<Adapter>): ReturnType<typeof extractFrom> => {
    signal?.throwIfAborted();
    const { name } = module.shape;
    const moments = all?.get(name);
    if (all && !moments)
      throw new RangeError(
        `there are no moments of "${name}"; collect them for all adapted modules, or leave them out`,
      );
    const own = steps && module.owners.map((owner) => steps.get(owner)!);
    return extractFrom(extractor, module, { ...extraction, moments, steps: own }, privateTerms);
  };
  let index = 0;
  // One more than are worked on: it is read meanwhile.
  for await (const { module, magnitudes } of inOrder(shared, extractor.size + 1, extract)) {
    signal?.throwIfAborted();
    const { shape, owners } = shared[index]!;
    const { name } = shape;
    for (const [i, task] of module.tasks.entries()) {
      const owner = owners[i]!;
      errors.push({ task: task.id, module: name, error: task.error, norm: task.norm });
      const term = encodeTerm({ index, name }, task, module, magnitudes[i], owner, dtype);
      if (term.A || term.privateTerms || term.magnitude) terms.set(owner, [...(terms.get(owner) ?? []), term]);
    }
    const bases = module.tasks.some(({ rank }) => rank > 0) ? { A: sideInput(module.A), B: sideInput(module.B) } : {};
    modules.push({ ...shape, ...bases });
    index++;
    onProgress?.(index, shared.length);
  }
  return { modules, terms, errors };
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
function headOf(options: BuildOptions): HeadFormat {
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

async function extractFrom(
  extractor: Extractor,
  module: SharedModule<Adapter>,
  options: ExtractOptions,
  privateTerms: BuildOptions["privateTerms"] = 0,
): Promise<{ module: MixedExtraction; magnitudes: (Float32Array | undefined)[] }> {
  const { name } = module.shape;
  const { stack, terms } = await readStack(module);
  const own =
    typeof privateTerms === "number" ? privateTerms : stack.members.map(({ id }) => privateTerms.get(id)?.get(name));
  try {
    const found = await extractor.ask("extract", stack, { ...options, privateTerms: own });
    return { module: found, magnitudes: terms.map(({ magnitude }) => magnitude) };
  } catch (cause) {
    if (!(cause instanceof UnstorableError)) throw cause;
    // A basis is of all adapters together; then the first one stands for them.
    const { file } = module.owners.find(({ id }) => id === cause.owner) ?? module.owners[0]!;
    throw new AdapterError(cause.message, { file, field: name, cause });
  }
}

/** One side as it is written. */
export function sideInput({ components: K, rank, mean, dtype, explained, encoded }: SideBasis): SideInput {
  const kind = rank === undefined ? { kind: "column" as const } : { kind: "flat" as const, rank };
  return { ...kind, K, mean, dtype, explained, encoded };
}

/**
 * From adapters to a pack: module by module, read, extract, encode. Holds one module's stack and what goes into the pack,
 * never all adapters. No file system: adapters are read through their sources, the result is a list of chunks.
 */

import type { Adapter, AdapterModule, SavedTensor } from "../adapters/adapter.ts";
import { fingerprint, weightAt } from "../base/fingerprint.ts";
import type { WeightHost } from "../base/host.ts";
import { Locator } from "../base/locate.ts";
import { AdapterError } from "../errors.ts";
import {
  type BasisMode,
  type ComponentSelection,
  type ExtractOptions,
  extractModule,
  type Gauge,
  type ModuleExtraction,
  type ModuleMember,
  type ModuleSpace,
  openModule,
  type ProjectedTask,
  projectModule,
  type TaskCoefficients,
} from "../extract/extract.ts";
import { extractMixed, type MixedExtraction, type MixedTask, type PrivateOptions } from "../extract/private.ts";
import { createWasmProducts } from "../extract/wasm-products.ts";
import {
  basisIdOf,
  encodeBasis,
  encodeTask,
  type ModuleInput,
  type ParameterInput,
  type TermInput,
} from "../format/encode.ts";
import type { PackModule, TaskEntry } from "../format/format.ts";
import { layoutFresh, type TaskToWrite } from "../format/layout.ts";
import { encodedTensor } from "../format/tensors.ts";
import { type Dtype, type Dtypes, isQuantized } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { VERSION } from "../version.ts";
import type { Pack } from "./pack.ts";

export type { Dtypes } from "../tensor/dtypes.ts";

export interface BuildOptions {
  /**
   * "column": every row of a factor has coefficients of its own. "flat": one vector of coefficients for each factor, so
   * that a task is much smaller and the components are larger; there are fewer components than tasks. "column" unless
   * given.
   */
  mode?: BasisMode;
  gauge?: Gauge;
  /** The most rank that a task keeps of each module, with gauge "balanced": the weakest directions of an adapter are noise. All unless given. */
  rank?: number | undefined;
  /**
   * Rank-1 terms that each task has to itself in every module, with gauge "balanced", beside the components or, with `select` k 0,
   * instead of them. With an error to keep, the most there may be: each task has as few as do. None unless given.
   */
  privateTerms?: number | undefined;
  /**
   * Share of ‖ΔW‖² that a private term must hold to be stored, where no error decides: tasks and modules then have as many of the
   * `private` terms as are worth their bytes. 0 unless given.
   */
  privateShare?: number | undefined;
  centering?: "keep" | "none";
  /** Every task counts alike when components are sought, however large its update is. */
  normalize?: boolean | undefined;
  /**
   * Second moments [in, in] of what enters each module, by name (`inputMoments` of `eigenlora/train`): errors are then those of the
   * modules' outputs, in choosing and in the report.
   */
  moments?: ReadonlyMap<string, Float64Array> | undefined;
  /** How many components. 90 % of the squared singular values per module and side unless given. */
  select?: ComponentSelection;
  dtype?: Partial<Dtypes>;
  /** The base model, for fingerprints and an early check of names and shapes. */
  base?: WeightHost;
  /** Called after each module. */
  onProgress?: (done: number, of: number) => void;
  signal?: AbortSignal;
}

/** What a pack is made of and what its tasks lost. */
export interface BuildReport {
  tasks: number;
  modules: number;
  mode: BasisMode;
  gauge: Gauge;
  centering: "keep" | "none";
  dtype: Dtypes;
  bytes: number;
  /** Components per module and side. */
  components: { min: number; mean: number; max: number };
  /** Size of the adapter files. */
  adapterBytes: number;
  /** adapterBytes / bytes. */
  ratio: number;
  /** From how many tasks of this kind on the pack is smaller than the adapters; null: never. */
  breakEvenTasks: number | null;
  /** ‖ΔW − ΔW'‖ / ‖ΔW‖ over tasks and modules. */
  error: { mean: number; max: number; worstTask: string; worstModule: string };
  /** The same over the modules of each task. */
  errors: { id: string; mean: number; max: number }[];
  warnings: string[];
}

/**
 * Packs adapters.
 * @throws AdapterError when adapters do not agree about a module or a tensor cannot be stored
 * @throws BaseMismatchError when the base given does not have the adapted modules
 * @returns the pack as consecutive chunks, and what became of the adapters
 */
export async function buildPack(
  adapters: readonly Adapter[],
  options: BuildOptions = {},
): Promise<{ chunks: Uint8Array[]; report: BuildReport }> {
  if (adapters.length === 0) throw new RangeError("buildPack: no adapters");
  const { mode = "column", gauge = "as-trained", rank, select = { kind: "energy", share: 0.9 } } = options;
  const { centering = mode === "joint" ? "none" : "keep" } = options;
  if (mode === "joint" && centering === "keep")
    throw new RangeError("joint mode has no mean: leave centring out, or take --mode column");
  if (mode === "flat") checkFlat(select, adapters.length, centering);
  const dtype = completeDtypes(options.dtype);
  const stored = { basisDtype: dtype.basis, coefficientDtype: dtype.coefficients };
  const extraction = {
    mode,
    gauge,
    rank,
    privateTerms: options.privateTerms ?? 0,
    privateShare: options.privateShare,
    centering,
    normalize: options.normalize,
    select,
    ...stored,
    ...(await fastProducts()),
  };
  const names = [...new Set(adapters.flatMap((a) => [...a.modules.keys()]))].sort();
  const fingerprints =
    options.base &&
    (await readFingerprints(
      options.base,
      names.map((name) => firstModule(adapters, name)),
    ));
  const modules: ModuleInput[] = [];
  const terms = adapters.map((): TermInput[] => []);
  const errors = new ErrorTally();
  for (const [index, name] of names.entries()) {
    options.signal?.throwIfAborted();
    const owners = adapters.filter((a) => a.modules.has(name));
    const first = owners[0]!.modules.get(name)!;
    for (const owner of owners) checkSame(first, owners[0]!.file, owner.modules.get(name)!, owner.file);
    const moments = options.moments?.get(name);
    if (options.moments && !moments)
      throw new RangeError(
        `there are no moments of "${name}"; collect them for all adapted modules, or leave them out`,
      );
    const { module, magnitudes } = await extractFrom(owners, name, { ...extraction, moments });
    const shares = module.tasks.some(({ rank }) => rank > 0);
    for (const [i, task] of module.tasks.entries()) {
      errors.add(task.id, name, task.error);
      const term = encodeTerm(index, task, module, magnitudes[i], owners[i]!, dtype);
      if (term.A || term.privateTerms || term.magnitude) terms[adapters.indexOf(owners[i]!)]!.push(term);
    }
    modules.push({
      name,
      out: first.out,
      in: first.in,
      layout: first.layout,
      kernel: first.kernel,
      A: shares ? sideInput(module.A) : undefined,
      B: shares ? sideInput(module.B) : undefined,
      fingerprint: fingerprints?.get(name),
    });
    options.onProgress?.(index + 1, names.length);
  }
  const warnings = adapters.flatMap((a) => a.warnings.map((w) => `${a.id}: ${w}`));
  if (!options.base)
    warnings.push("packed without a base model: the runtime can check shapes only, not which model it is");
  const baseModels = [...new Set(adapters.map((a) => a.baseModel).filter((b) => b !== undefined))];
  if (baseModels.length > 1) warnings.push(`the adapters name different base models: ${baseModels.join(", ")}`);
  const counts = modules.flatMap(({ A, B }) => [A?.K ?? 0, B?.K ?? 0]);
  const { description, bases } = encodeBasis({
    producer: `eigenlora ${VERSION}`,
    mode,
    gauge,
    centering,
    rank,
    baseModel: baseModels[0],
    // Handed over: the encoded components are in `bases` afterwards, and need not be held twice.
    modules: modules.splice(0),
  });
  const id = await basisIdOf(description, bases);
  const tasks = await Promise.all(
    adapters.map(async (adapter, i): Promise<TaskToWrite> => {
      const parameters = await encodeParameters(adapter, dtype.head);
      return { entry: entryOf(adapter, terms[i]!, names), blob: encodeTask(terms[i]!, parameters) };
    }),
  );
  const chunks = layoutFresh({ description, bases, basisId: id, tasks });
  const bytes = chunks.reduce((sum, c) => sum + c.length, 0);
  const adapterBytes = adapters.reduce((sum, a) => sum + a.byteLength, 0);
  const report: BuildReport = {
    tasks: adapters.length,
    modules: names.length,
    mode,
    gauge,
    centering,
    dtype,
    bytes,
    components: {
      min: Math.min(...counts),
      mean: counts.reduce((a, b) => a + b, 0) / counts.length,
      max: Math.max(...counts),
    },
    adapterBytes,
    ratio: adapterBytes / bytes,
    breakEvenTasks: breakEven(
      bytes,
      tasks.map((t) => t.blob.length),
      tasks.map((t) => t.entry.adapterBytes),
    ),
    error: errors.summary(),
    errors: errors.byTask(),
    warnings,
  };
  return { chunks, report };
}

/**
 * From how many tasks on a pack is smaller than the adapters it was made of, at their mean sizes.
 * @param bytes of the whole pack
 * @returns null when a blob is no smaller than an adapter, or the adapters' sizes are unknown
 */
export function breakEven(bytes: number, blobs: readonly number[], adapters: readonly number[]): number | null {
  const mean = (v: readonly number[]): number => v.reduce((a, b) => a + b, 0) / v.length;
  if (blobs.length === 0 || adapters.some((a) => a === 0)) return null;
  const shared = bytes - blobs.reduce((a, b) => a + b, 0);
  const saved = mean(adapters) - mean(blobs);
  return saved > 0 ? Math.ceil(shared / saved) : null;
}

/** A task made for an existing basis, and what it lost. */
export interface ProjectedAdapter extends TaskToWrite {
  residual: { id: string; mean: number; max: number };
}

/**
 * Projects adapters onto the basis of a pack (DESIGN 2.10a), in the pack's gauge and to its rank; module by module, so that each
 * basis is opened once.
 * @param onProgress called after each module
 * @throws AdapterError when one adapts a module that the pack does not have, or of another shape
 */
export async function projectAdapters(
  pack: Pack,
  adapters: readonly Adapter[],
  types: Dtypes,
  onProgress?: (done: number, of: number) => void,
): Promise<ProjectedAdapter[]> {
  const { basis } = pack.directory;
  const gauge: Gauge = basis.gauge === "balanced" ? "balanced" : "as-trained";
  for (const adapter of adapters) checkModules(pack, adapter);
  const { products } = await fastProducts();
  const errors = new ErrorTally();
  const terms = adapters.map((): TermInput[] => []);
  const bases = await pack.bases();
  for (const [index, stored] of pack.modules.entries()) {
    let space: ModuleSpace | undefined;
    for (const [i, adapter] of adapters.entries()) {
      const module = adapter.modules.get(stored.name);
      if (!module) continue;
      const opened = (space ??= openModule(storedModule(stored, bases.bytes, adapter), products));
      const { A, Bt, magnitude } = await module.read();
      const member = { id: adapter.id, rank: module.rank, A, Bt };
      const project = (): ProjectedTask =>
        projectModule(opened, member, { gauge, rank: basis.rank, coefficientDtype: types.coefficients });
      const task = storable(adapter, stored, project);
      errors.add(adapter.id, stored.name, task.error);
      terms[i]!.push(encodeTerm(index, task, opened, magnitude, adapter, types));
    }
    onProgress?.(index + 1, pack.modules.length);
  }
  bases.close();
  const residuals = new Map(errors.byTask().map((residual) => [residual.id, residual]));
  const names = pack.modules.map((m) => m.name);
  return await Promise.all(
    adapters.map(async (adapter, i): Promise<ProjectedAdapter> => {
      const blob = encodeTask(terms[i]!, await encodeParameters(adapter, types.head));
      const residual = residuals.get(adapter.id) ?? { id: adapter.id, mean: 0, max: 0 };
      return { entry: entryOf(adapter, terms[i]!, names), blob, residual };
    }),
  );
}

/** @throws AdapterError when the pack has no basis for a module of an adapter */
function checkModules(pack: Pack, adapter: Adapter): void {
  const known = new Map(pack.modules.map((m) => [m.name, m]));
  const missing = [...adapter.modules.keys()].filter((name) => !known.has(name));
  if (missing.length > 0) {
    throw new AdapterError(
      `it adapts ${missing.length} modules that ${pack.name} has no basis for (${missing.slice(0, 3).join(", ")}` +
        `${missing.length > 3 ? ", …" : ""}): pack all adapters again, with this one`,
      { file: adapter.file, field: missing[0]! },
    );
  }
  for (const [name, module] of adapter.modules) {
    const stored = known.get(name)!;
    if (stored.out === module.out && stored.in === module.in && stored.layout === module.layout) continue;
    throw new AdapterError(
      `"${name}" is [${module.out}, ${module.in}] ${module.layout}, the pack's is [${stored.out}, ${stored.in}] ` +
        `${stored.layout}: it was trained on another model`,
      { file: adapter.file, field: name },
    );
  }
}

/** Both sides of a module of a pack, as extraction takes them. */
export function storedModule(
  module: PackModule,
  bases: Uint8Array,
  adapter: Adapter,
): Parameters<typeof openModule>[0] {
  const side = (which: "A" | "B"): Parameters<typeof openModule>[0]["A"] => {
    const basis = module[which];
    if (!basis) {
      throw new AdapterError(`"${module.name}" has no basis in the pack: pack all adapters again`, {
        file: adapter.file,
        field: module.name,
      });
    }
    const { dtype, width } = basis.tensor;
    const encoded = encodedTensor(bases, basis.tensor);
    return { dtype, components: basis.K, width, rank: basis.rank, mean: basis.mean, encoded };
  };
  return { A: side("A"), B: side("B") };
}

/** The one loop that dominates extraction, in WebAssembly where the engine has it. */
export async function fastProducts(): Promise<{ products?: NonNullable<ExtractOptions["products"]> }> {
  if (typeof WebAssembly === "undefined") return {};
  return { products: await createWasmProducts() };
}

/** f16 where nothing else is asked for. */
export function completeDtypes(types: Partial<Dtypes> = {}): Dtypes {
  return { basis: types.basis ?? "f16", coefficients: types.coefficients ?? "f16", head: types.head ?? "f16" };
}

/** N tasks are N vectors in flat mode, and one dimension of them is the mean. */
function checkFlat(select: ComponentSelection, tasks: number, centering: "keep" | "none"): void {
  const most = tasks - (centering === "keep" ? 1 : 0);
  if (select.kind !== "k" || select.k <= most) return;
  const beside = centering === "keep" ? " beside the mean" : "";
  throw new RangeError(
    `${select.k} components: flat mode has at most ${most}${beside} for ${tasks} adapters; ask for fewer, or for --mode column`,
  );
}

async function extractFrom(
  owners: readonly Adapter[],
  name: string,
  options: PrivateOptions,
): Promise<{ module: MixedExtraction; magnitudes: (Float32Array | undefined)[] }> {
  const { out, in: inputs } = owners[0]!.modules.get(name)!;
  const factors = await Promise.all(owners.map((owner) => owner.modules.get(name)!.read()));
  const members: ModuleMember[] = factors.map(({ A, Bt }, i) => {
    const { id, modules } = owners[i]!;
    return { id, rank: modules.get(name)!.rank, A, Bt };
  });
  const magnitudes = factors.map((f) => f.magnitude);
  const stack = { name, out, in: inputs, members };
  return {
    module: options.privateTerms > 0 ? extractMixed(stack, options) : extractModule(stack, options),
    magnitudes,
  };
}

/** What of a module's bases is said in each of its terms. */
type Bases = Record<"A" | "B", { rank?: number | undefined; mean: unknown }>;

function encodeTerm(
  module: number,
  { rank, alphaA, alphaB, privateTerms: own }: TaskCoefficients & Pick<MixedTask, "privateTerms">,
  { A, B }: Bases,
  magnitude: Float32Array | undefined,
  adapter: Adapter,
  types: Dtypes,
): TermInput {
  const side = ({ rank: flat, mean }: Bases["A"], encoded: Uint8Array): NonNullable<TermInput["A"]> => {
    return { kind: flat === undefined ? "column" : "flat", dtype: types.coefficients, mean: Boolean(mean), encoded };
  };
  return {
    module,
    rank,
    A: rank > 0 ? side(A, alphaA) : undefined,
    B: rank > 0 ? side(B, alphaB) : undefined,
    privateTerms: own,
    magnitude: magnitude && vector(magnitude, types.coefficients, adapter, "a DoRA magnitude"),
  };
}

/** One side as it is written. */
export function sideInput(side: ModuleExtraction["A"]): NonNullable<ModuleInput["A"]> {
  const { components: K, rank, mean, dtype, explained, encoded } = side;
  return {
    kind: rank === undefined ? "column" : "flat",
    K,
    ...(rank === undefined ? {} : { rank }),
    mean,
    dtype,
    explained,
    encoded,
  };
}

/**
 * Whether two files mean the same module.
 * @throws AdapterError naming the second file
 */
export function checkSame(x: Shaped, file: string, y: Shaped, other: string): void {
  if (x.out === y.out && x.in === y.in && x.layout === y.layout && String(x.kernel) === String(y.kernel)) return;
  throw new AdapterError(
    `"${y.name}" is [${y.out}, ${y.in}] ${y.layout} here, but [${x.out}, ${x.in}] ${x.layout} in ${file}: adapters of ` +
      "different base models cannot share a pack",
    { file: other, field: y.name },
  );
}

/** What must be the same of a module in all adapters. */
type Shaped = Pick<AdapterModule, "name" | "out" | "in" | "layout" | "kernel">;

/** 64 weights of the base for each module (SPEC.md, section 4.4). @throws BaseMismatchError when it does not have one */
export async function readFingerprints(
  base: WeightHost,
  modules: Iterable<Shaped>,
): Promise<Map<string, Float32Array>> {
  const locator = new Locator(base);
  const prints = new Map<string, Float32Array>();
  for (const module of modules) {
    const located = locator.locate(module);
    const view = await base.read(located.name);
    const bytes = (view.data as Uint8Array).subarray(view.byteOffset);
    const values = weightAt(bytes, located.dtype, module.out, module.in, located.transposed);
    prints.set(module.name, fingerprint(module.name, module.out, module.in, values));
  }
  return prints;
}

function firstModule(adapters: readonly Adapter[], name: string): AdapterModule {
  return adapters.find((adapter) => adapter.modules.has(name))!.modules.get(name)!;
}

function entryOf(adapter: Adapter, terms: readonly TermInput[], names: readonly string[]): TaskEntry {
  const { id, byteLength, metadata, saved } = adapter;
  const brings = [
    ...saved.map(({ role, name }) => `${role} ${name}`),
    ...terms.filter((t) => t.magnitude).map((t) => `magnitude ${names[t.module]}`),
    ...terms.filter((t) => t.privateTerms).map((t) => `private ${names[t.module]}`),
  ];
  return { id, adapterBytes: byteLength, metadata, brings: brings.sort() };
}

async function encodeParameters(adapter: Adapter, type: Dtype): Promise<ParameterInput[]> {
  const parameters: ParameterInput[] = [];
  for (const saved of adapter.saved) {
    const { name, role, shape, indices } = saved;
    const values = await saved.read();
    if (shape.length === 1) {
      parameters.push({ name, role, shape, ...vector(values, type, adapter, `"${name}"`) });
      continue;
    }
    const rows = shape[0]!;
    const encoded = storable(adapter, saved, () => encodeTensor(type, values, rows, values.length / rows));
    parameters.push({ name, role, dtype: type, shape, indices, encoded });
  }
  return parameters;
}

/** A vector: f16 where matrices are packed integers, since one scale for all of it would be coarse and save nothing. */
function vector(
  values: Float32Array,
  type: Dtype,
  adapter: Adapter,
  name: string,
): Pick<ParameterInput, "dtype" | "encoded"> {
  const own = isQuantized(type) ? "f16" : type;
  return { dtype: own, encoded: storable(adapter, { name }, () => encodeTensor(own, values, 1, values.length)) };
}

function storable<T>(adapter: Adapter, { name }: Pick<SavedTensor, "name">, encode: () => T): T {
  try {
    return encode();
  } catch (cause) {
    throw new AdapterError(`${name} cannot be stored: ${(cause as Error).message}`, {
      file: adapter.file,
      field: name,
      cause,
    });
  }
}

/** Mean and worst of errors by task and module. */
class ErrorTally {
  readonly #errors: { task: string; module: string; error: number }[] = [];

  add(task: string, module: string, error: number): void {
    this.#errors.push({ task, module, error });
  }

  summary(): BuildReport["error"] {
    const worst = this.#errors.reduce((a, b) => (b.error > a.error ? b : a), { task: "", module: "", error: 0 });
    return { ...figures(this.#errors), worstTask: worst.task, worstModule: worst.module };
  }

  byTask(): BuildReport["errors"] {
    const ids = [...new Set(this.#errors.map((e) => e.task))];
    return ids.map((id) => ({ id, ...figures(this.#errors.filter((e) => e.task === id)) }));
  }
}

function figures(errors: readonly { error: number }[]): { mean: number; max: number } {
  const sum = errors.reduce((s, e) => s + e.error, 0);
  return { mean: errors.length ? sum / errors.length : 0, max: errors.reduce((m, e) => Math.max(m, e.error), 0) };
}

/**
 * Adapters onto the basis of a pack that exists (DESIGN.md 2.10a).
 */
import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters, refuseBoth } from "../adapters/modules.ts";
import { checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { AdapterError } from "../errors.ts";
import type { Allocation, Spectrum } from "../extract/allocation.ts";
import { singularValues } from "../extract/gauge.ts";
import type { Gauge } from "../extract/options.ts";
import { type Begun, beginMixed, finishMixed, type MixedTask, remainderOf } from "../extract/private.ts";
import { type ModuleSpace, openModule } from "../extract/project.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import type { TermInput } from "../format/encode.ts";
import { encodedTensor, type PackModule, parseBrought, sharedBases } from "../format/format.ts";
import type { TaskToWrite } from "../format/layout.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { SCALE_DOWN } from "../tensor/encode.ts";
import { DEFAULT_ERROR, type Survey, withinError } from "./allocate.ts";
import { Unreachable } from "./bisect.ts";
import { storedTask } from "./coding.ts";
import { type Steps, startSteps, stepsWithin } from "./refine.ts";
import { idleWarnings, lossesOf, type ModuleError, type TaskLoss } from "./report.ts";
import { errorOf, narrowTerms, stepOf, stepsOf, widthsOf } from "./steps.ts";
import { encodeAdapter, encodeTerm, storable } from "./tasks.ts";

/** A task made for an existing basis, and what it lost. */
export interface ProjectedAdapter extends TaskToWrite {
  readonly residual: TaskLoss;
  /** What a person should know before trusting the result. */
  readonly warnings: readonly string[];
}

/**
 * Brings adapters into a pack that exists, in its gauge and to its rank: coefficients on its components; and where its tasks have
 * private terms, as many of those, or with such steps, as keep the error of each adapter within that which the pack was made for, or
 * within `DEFAULT_ERROR`. A pack whose step was made for no error has its step. Module by module, so that each basis is opened once.
 * @param onProgress called after each module
 * @throws AdapterError when one adapts a module that the pack does not have, or of another shape
 */
export async function projectAdapters(
  pack: Pack,
  adapters: readonly Adapter[],
  formats: Dtypes,
  onProgress?: (done: number, of: number) => void,
): Promise<ProjectedAdapter[]> {
  checkPack("projectAdapters", pack);
  checkAdapters("projectAdapters", adapters);
  for (const adapter of adapters) checkModules(pack, adapter);
  const bases = await pack.bases();
  const step = stepOf(pack);
  const usual = step === undefined ? undefined : await stepsOf(adapters, step);
  const dtypesOf = (steps: RowSteps): Dtypes => (steps ? { ...formats, coefficients: "int8" } : formats);
  const each = (work: Work, steps: RowSteps): Promise<void> =>
    eachModule(pack, bases.bytes, adapters, { dtype: dtypesOf(steps).coefficients, steps }, work, onProgress);
  const project = async (own: Allocation | undefined, steps: RowSteps): Promise<ProjectedAdapter[]> => {
    const errors: ModuleError[] = [];
    const terms = adapters.map((): TermInput[] => []);
    const dtype = dtypesOf(steps);
    const work: Work = ({ index, stored, i, adapter, magnitude }, begun, space) => {
      const { name } = stored;
      const most = steps ? Infinity : 0;
      const choice = own?.get(adapter.id)?.get(name) ?? { rank: most, dtype: dtype.coefficients };
      const finish = (): MixedTask => finishMixed(begun, choice, steps?.get(adapter));
      const task = own ? storable(adapter, stored, finish, SCALE_DOWN) : begun.task;
      errors.push({ task: adapter.id, module: name, error: task.error, norm: task.norm });
      const term = encodeTerm({ index, name }, task, space ?? NO_BASES, magnitude, adapter, dtype);
      if (term.A || term.privateTerms || term.magnitude) terms[i]!.push(term);
    };
    await each(work, steps);
    const stored = steps ? terms.map((own) => narrowTerms(own, pack.modules.map(widthsOf))) : terms;
    return projectedOf(pack, adapters, { terms: stored, errors, head: dtype.head });
  };
  const surveyed = async (): Promise<Spectrum[]> => {
    const spectra: Spectrum[] = [];
    const work: Work = ({ stored, adapter }, begun) => {
      const { name, out, in: inputs } = stored;
      const square = singularValues(begun.given, out, inputs).reduce((sum, value) => sum + value ** 2, 0);
      const singular = remainderOf(begun, out, inputs);
      spectra.push({ task: adapter.id, module: name, out, in: inputs, singular, square });
    };
    await each(work, usual);
    return spectra;
  };
  const made = async (): Promise<ProjectedAdapter[]> => {
    if (!hasPrivateTerms(pack)) return project(undefined, usual);
    const error = errorOf(pack);
    // The step says which are worth it.
    if (usual && error === undefined) return project(new Map(), usual);
    const own = { adapters, spectra: await surveyed(), error: error ?? DEFAULT_ERROR };
    return usual ? refined(own, project) : allocated(own, project);
  };
  try {
    return (await made()).map((task) => ({ ...task, ...storedTask(pack, task) }));
  } finally {
    bases.close();
  }
}

/** What was made of adapters, of each its terms. */
interface Found {
  readonly terms: readonly TermInput[][];
  readonly errors: readonly ModuleError[];
  /** Number format of heads. */
  readonly head: Dtype;
}

function projectedOf(
  pack: Pack,
  adapters: readonly Adapter[],
  { terms, errors, head }: Found,
): Promise<ProjectedAdapter[]> {
  const names = pack.modules.map(({ name }) => name);
  const residuals = lossesOf(
    errors,
    adapters.map(({ id }) => id),
  );
  const idle = idleWarnings(adapters, errors, (_, i) => terms[i]!);
  return Promise.all(
    adapters.map(async (adapter, i) => ({
      ...(await encodeAdapter(adapter, terms[i]!, names, { type: head })),
      residual: residuals[i]!,
      warnings: idle.has(adapter.id) ? [idle.get(adapter.id)!] : [],
    })),
  );
}

/** Of ΔW, by adapter; undefined where number formats say how numbers are stored. */
type RowSteps = ReadonlyMap<Adapter, number> | undefined;
type Project = (own: Allocation, steps: RowSteps) => Promise<ProjectedAdapter[]>;

/** Adapters that are to have private terms within an error. */
interface Own extends Survey {
  readonly adapters: readonly Adapter[];
  readonly error: number;
}

function allocated({ spectra, error }: Own, project: Project): Promise<ProjectedAdapter[]> {
  const residuals = (made: ProjectedAdapter[]): TaskLoss[] => made.map(({ residual }) => residual);
  return withinError({ spectra }, error, (own) => project(own, undefined), residuals);
}

/** In integers of the steps that it takes; in the number formats that it takes where integers are too few. */
async function refined(own: Own, project: Project): Promise<ProjectedAdapter[]> {
  const { adapters, spectra, error } = own;
  const make = (steps: Steps): Promise<ProjectedAdapter[]> =>
    project(new Map(), new Map(adapters.map((adapter) => [adapter, steps.get(adapter.id) ?? 1])));
  const residuals = (made: ProjectedAdapter[]): TaskLoss[] => made.map(({ residual }) => residual);
  try {
    return await stepsWithin(startSteps(spectra, error), error, make, residuals);
  } catch (cause) {
    if (!(cause instanceof Unreachable)) throw cause;
    return allocated(own, project);
  }
}

/** What is made of a module of an adapter, of which the shared part is known. */
type Work = (at: Place, begun: Begun, space: ModuleSpace | undefined) => void;

/** How coefficients are stored. */
interface Coefficients {
  readonly dtype: Dtype;
  readonly steps: RowSteps;
}

/** Goes through the modules of a pack, and in each through the adapters that have it. */
async function eachModule(
  pack: Pack,
  bases: Uint8Array,
  adapters: readonly Adapter[],
  { dtype: coefficientDtype, steps }: Coefficients,
  work: Work,
  onProgress: ((done: number, of: number) => void) | undefined,
): Promise<void> {
  const products = await fastProducts();
  const options = { gauge: gaugeOf(pack), rank: pack.directory.basis.rank, coefficientDtype };
  for (const [index, stored] of pack.modules.entries()) {
    let space: ModuleSpace | undefined;
    for (const [i, adapter] of adapters.entries()) {
      const module = adapter.modules.get(stored.name);
      if (!module) continue;
      if (sharedBases(stored)) space ??= openModule(storedModule(stored, bases, adapter), products);
      const { magnitude, ...term } = await module.read();
      const begin = (): Begun =>
        beginMixed(space, { id: adapter.id, ...term }, { ...options, step: steps?.get(adapter) });
      const begun = storable(adapter, stored, begin, SCALE_DOWN);
      work({ index, stored, i, adapter, magnitude }, begun, space);
    }
    onProgress?.(index + 1, pack.modules.length);
  }
}

/** A module of an adapter, in both. */
interface Place {
  readonly index: number;
  readonly stored: PackModule;
  readonly i: number;
  readonly adapter: Adapter;
  readonly magnitude: Float32Array | undefined;
}

/** Of a module that shares nothing. */
const NO_BASES = { A: { mean: undefined }, B: { mean: undefined } };

/** Whether a pack's tasks keep to themselves what they do not share, or share nothing. */
function hasPrivateTerms({ tasks, modules }: Pack): boolean {
  if (!modules.every(sharedBases)) return true;
  const own = [...tasks.values()].map(({ brings }) => brings?.some((entry) => parseBrought(entry).role === "private"));
  return own.length > 0 && own.every(Boolean);
}

/** The gauge that a pack's tasks are in. */
export function gaugeOf({ directory }: Pack): Gauge {
  return directory.basis.gauge === "balanced" ? "balanced" : "as-trained";
}

function listed(names: readonly string[]): string {
  return `${names.slice(0, 3).join(", ")}${names.length > 3 ? ", …" : ""}`;
}

/** @throws AdapterError when the pack has no basis for a module of an adapter */
function checkModules(pack: Pack, adapter: Adapter): void {
  refuseBoth(adapter);
  const known = new Map(pack.modules.map((m) => [m.name, m]));
  const missing = [...adapter.modules.keys()].filter((name) => !known.has(name));
  if (missing.length > 0 && missing.length === adapter.modules.size) {
    throw new AdapterError(
      `it adapts none of the modules that the tasks of ${pack.name} adapt, but ${listed(missing)}: is it of another base model?`,
      { file: adapter.file, field: missing[0]! },
    );
  }
  if (missing.length > 0) {
    throw new AdapterError(
      `it adapts ${missing.length} modules that ${pack.name} has no basis for (${listed(missing)}): pack all adapters again, ` +
        "with this one",
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
    const basis = sharedBases(module)?.[which];
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

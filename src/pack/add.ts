/** New tasks for a pack that exists: adapters are brought onto its basis. */
import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters, refuseBoth } from "../adapters/adapter.ts";
import { checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { AdapterError, TaskError } from "../errors.ts";
import type { Allocation, Spectrum } from "../extract/allocation.ts";
import { balance, pairOf, singularValues } from "../extract/gauge.ts";
import type { Gauge } from "../extract/options.ts";
import { type Begun, beginMixed, finishMixed, type MixedTask, remainderOf } from "../extract/private.ts";
import { type ModuleSpace, openModule } from "../extract/project.ts";
import {
  type BySide,
  cheapest,
  openSides,
  type SideChoice,
  type SidesTask,
  sideCosts,
  takeSides,
} from "../extract/sides.ts";
import type { StoredBasis } from "../extract/subspace.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import type { TaskToWrite, TermInput } from "../format/encode.ts";
import { encodedTensor, type PackModule, parseBrought, type Side, sharedBases } from "../format/format.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { SCALE_DOWN } from "../tensor/encode.ts";
import { Meter, type OnWork, ROUND } from "../work.ts";
import { DEFAULT_ERROR, withinError } from "./allocate.ts";
import { completeDtypes } from "./recipe.ts";
import { idleWarnings, lossesOf, type ModuleError, type TaskLoss } from "./report.ts";
import { type Steps, startSteps, stepsWithin, Unreachable } from "./seek.ts";
import { changes, encodeAdapter, encodeTerm, narrowTerms, sidesTerm, stepsOf, storable } from "./tasks.ts";
import { storedTask } from "./write.ts";

/** A task made for an existing basis, and what it lost. */
export interface ProjectedAdapter extends TaskToWrite {
  readonly residual: TaskLoss;
  /** What a person should know before trusting the result. */
  readonly warnings: readonly string[];
}

/** Options of `projectAdapters`. */
export interface ProjectAdaptersOptions {
  /** Called as the work goes on, with the share that is done, in percent. */
  readonly onProgress?: OnWork | undefined;
  /**
   * The share of its ΔW that an adapter may lose: it has private terms for what the components lack, or for all of it where that takes
   * fewer bytes. Default: as the pack's tasks, which may have none.
   */
  readonly error?: number | undefined;
  /** The share of its ΔW from which on an adapter is refused; 1 refuses none. Default: 0.5, or `error` where that is more. */
  readonly maxLoss?: number | undefined;
}

/** A task that loses more of its ΔW does something else than its adapter. */
export const MAX_LOSS = 0.5;

/**
 * Brings adapters into a pack that exists, in its gauge and to its rank: coefficients on its components; and where its tasks have
 * private terms, as many of those, or with such steps, as keep the error of each adapter within that which the pack was made for, or
 * within `DEFAULT_ERROR`. Where tasks share each side by itself, an adapter takes of each what costs it least, and has beside it what
 * the others' components lack. A pack whose step was made for no error has its step. Module by module, so that each basis is opened once.
 * @throws AdapterError when one adapts a module that the pack does not have, or of another shape
 * @throws TaskError for one that would lose more than `maxLoss`, with the `loss`
 * @throws RangeError for a `maxLoss` that is no share
 */
export async function projectAdapters(
  pack: Pack,
  adapters: readonly Adapter[],
  formats: Dtypes,
  { onProgress, error, maxLoss = Math.max(MAX_LOSS, error ?? 0) }: ProjectAdaptersOptions = {},
): Promise<ProjectedAdapter[]> {
  checkPack("projectAdapters", pack);
  checkAdapters("projectAdapters", adapters);
  if (!(maxLoss >= 0 && maxLoss <= 1))
    throw new RangeError(`projectAdapters: maxLoss: expected a share from 0 to 1, got ${maxLoss}`);
  for (const adapter of adapters) checkModules(pack, adapter);
  const bases = await pack.bases();
  try {
    const meter = Meter.of("adding", onProgress);
    const twice = pack.directory.basis.step !== undefined && error !== undefined && !sharesBySide(pack);
    const first = meter.part(twice ? 0.5 : 1);
    const all: Newcomers = {
      pack,
      bases: bases.bytes,
      adapters,
      formats,
      meter: first,
      share: ROUND,
      error,
      apart: false,
    };
    const stored = async (how: Newcomers): Promise<ProjectedAdapter[]> => {
      const made = await onto(how);
      refuseLoss(made, maxLoss, pack.name);
      return made.map((task) => ({ ...task, ...storedTask(pack, task) }));
    };
    const beside = await stored(all);
    first.reach(1);
    if (!twice) return beside;
    // What components hold little of takes fewer bytes without them.
    const apart = await stored({ ...all, meter: meter.part(1), apart: true });
    meter.reach(1);
    return beside.map((task, i) => (apart[i]!.blob.length < task.blob.length ? apart[i]! : task));
  } finally {
    bases.close();
  }
}

/** @throws TaskError naming the task that loses most, when that is more than it may */
function refuseLoss(tasks: readonly ProjectedAdapter[], most: number, pack: string): void {
  const worst = { id: "", total: 0 };
  const { id, total } = tasks.reduce((a, { residual }) => (residual.total > a.total ? residual : a), worst);
  if (total <= most || most === 1) return;
  const percent = (share: number): string => `${Math.round(1000 * share) / 10} %`;
  const enough = Math.min(1, Math.ceil(100 * total) / 100);
  throw new TaskError(
    `task "${id}" would lose ${percent(total)} of its ΔW, which the components of ${pack} lack, and ${percent(most)} is the most: ` +
      `nothing was added. Pack all adapters again, with this one; or pass \`maxLoss: ${enough}\``,
    { task: id, loss: total },
  );
}

/** Tasks that tell the number formats of a pack. */
const MOST_ASKED = 16;

/** The number formats that a pack's tasks are stored in, so that new ones are stored alike. */
export async function storedDtypes(pack: Pack): Promise<Dtypes> {
  let [coefficients, head]: (Dtype | undefined)[] = [];
  for (const id of [...pack.tasks.keys()].slice(0, MOST_ASKED)) {
    const { terms, parameters } = await pack.load(id);
    coefficients ??= terms.find((term) => term.A)?.A?.tensor.dtype;
    head ??= parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
    if (coefficients && head) break;
  }
  return completeDtypes({ ...(coefficients ? { coefficients } : {}), ...(head ? { head } : {}) });
}

/** Adapters, and the pack whose basis they are brought onto. */
interface Newcomers {
  readonly pack: Pack;
  readonly bases: Uint8Array;
  readonly adapters: readonly Adapter[];
  readonly formats: Dtypes;
  readonly meter: Meter;
  /** The share of what is left that one pass through all modules takes. */
  readonly share: number;
  readonly error: number | undefined;
  /** Whether components are left alone, and all of a task are private terms. */
  readonly apart: boolean;
}

async function onto(all: Newcomers): Promise<ProjectedAdapter[]> {
  const { step } = all.pack.directory.basis;
  const error = all.error ?? all.pack.directory.basis.error;
  const usual = step === undefined ? undefined : await stepsOf(all.adapters, step);
  const choices = sharesBySide(all.pack) ? new Map<string, BySide<SideChoice>>() : undefined;
  if (!choices && error === undefined && !hasPrivateTerms(all.pack))
    return project({ ...all, share: 1 }, undefined, usual);
  const coded = (steps: Steps): Promise<ProjectedAdapter[]> =>
    choices ? placed(all, choices, steps) : project(all, new Map(), steps);
  // The step says which are worth it.
  if (usual && error === undefined) return coded(usual);
  const most = error ?? DEFAULT_ERROR;
  const spectra = await spectraOf(all, choices ? undefined : usual);
  const residuals = (made: ProjectedAdapter[]): TaskLoss[] => made.map(({ residual }) => residual);
  try {
    if (usual) return await stepsWithin(startSteps(spectra, most), most, coded, residuals);
  } catch (cause) {
    // Integers are too few: in the number formats that it takes.
    if (!(cause instanceof Unreachable)) throw cause;
  }
  return withinError({ spectra }, most, (own) => project(all, own, undefined), residuals);
}

/**
 * Adapters on what tasks share of each side.
 * @param choices how each takes the sides of a module; those that are not known yet are made, at what they cost with these steps
 */
async function placed(
  all: Newcomers,
  choices: Map<string, BySide<SideChoice>>,
  steps: Steps,
): Promise<ProjectedAdapter[]> {
  const { pack, bases, adapters } = all;
  const meter = all.meter.part(all.share);
  const products = await fastProducts();
  const errors: ModuleError[] = [];
  const terms = adapters.map((): TermInput[] => []);
  for (const [index, module] of pack.modules.entries()) {
    const { name, in: inputs, out } = module;
    const opened = openSides({ A: storedSides(module.A, bases), B: storedSides(module.B, bases) }, products);
    for (const [i, adapter] of adapters.entries()) {
      const { magnitude, ...term } = (await adapter.modules.get(name)?.read()) ?? { rank: 0 };
      if (!("A" in term)) continue;
      const key = JSON.stringify([adapter.id, name]);
      const step = stepFor(steps, adapter);
      const take = (): SidesTask => {
        if (!choices.has(key)) {
          const whole = balance(pairOf(term), out, inputs, products);
          choices.set(key, cheapest(sideCosts(opened, whole, module, step)));
        }
        return takeSides(opened, module, { id: adapter.id, ...term }, choices.get(key)!, step, products);
      };
      const task = storable(adapter, module, take, SCALE_DOWN);
      errors.push({ task: adapter.id, module: name, error: task.error, norm: task.norm });
      const made = sidesTerm(name, { ...task, magnitude }, adapter);
      if (changes(made)) terms[i]!.push({ module: index, ...made });
    }
    meter.reach((index + 1) / pack.modules.length);
  }
  return finished(all, terms, errors, true);
}

/** Bases of a side as they lie in a pack. */
function storedSides(sides: readonly Side[], bases: Uint8Array): StoredBasis[] {
  return sides.map(({ K, rank, mean, tensor }) => {
    const { dtype, width } = tensor;
    return { dtype, components: K, width, rank, mean, encoded: encodedTensor(bases, tensor) };
  });
}

/** What private terms are to hold of every adapter and module. */
async function spectraOf(all: Newcomers, steps: Steps | undefined): Promise<Spectrum[]> {
  const spectra: Spectrum[] = [];
  await eachModule(all, steps, ({ stored, adapter }, begun) => {
    const { name, out, in: inputs } = stored;
    const square = singularValues(begun.given, out, inputs).reduce((sum, value) => sum + value ** 2, 0);
    const singular = remainderOf(begun, out, inputs);
    spectra.push({ task: adapter.id, module: name, out, in: inputs, singular, square });
  });
  return spectra;
}

/** @param own private terms; undefined where tasks have none. @param steps of ΔW, where integers say how numbers are stored */
async function project(
  all: Newcomers,
  own: Allocation | undefined,
  steps: Steps | undefined,
): Promise<ProjectedAdapter[]> {
  const { adapters, formats } = all;
  const errors: ModuleError[] = [];
  const terms = adapters.map((): TermInput[] => []);
  const dtype = steps ? "int8" : formats.coefficients;
  await eachModule(all, steps, ({ index, stored, i, adapter, magnitude }, begun, space) => {
    const { name } = stored;
    const choice = own?.get(adapter.id)?.get(name) ?? { rank: steps ? Infinity : 0, dtype };
    const finish = (): MixedTask => finishMixed(begun, choice, steps && stepFor(steps, adapter));
    const task = own ? storable(adapter, stored, finish, SCALE_DOWN) : begun.task;
    errors.push({ task: adapter.id, module: name, error: task.error, norm: task.norm });
    const term = encodeTerm(name, { ...task, magnitude }, space ?? NO_BASES, adapter, dtype);
    if (changes(term)) terms[i]!.push({ module: index, ...term });
  });
  return finished(all, terms, errors, steps !== undefined);
}

/** @param narrow whether numbers are integers of any size */
async function finished(
  { pack, adapters, formats }: Newcomers,
  terms: readonly (readonly TermInput[])[],
  errors: readonly ModuleError[],
  narrow: boolean,
): Promise<ProjectedAdapter[]> {
  const names = pack.modules.map(({ name }) => name);
  const ids = adapters.map(({ id }) => id);
  const residuals = lossesOf(errors, ids);
  const idle = idleWarnings(adapters, errors, (_, i) => terms[i]!);
  return Promise.all(
    adapters.map(async (adapter, i) => {
      const made = terms[i]!;
      const stored = narrow ? narrowTerms(made, pack.modules) : made;
      const task = await encodeAdapter(adapter, stored, names, { type: formats.head });
      return { ...task, residual: residuals[i]!, warnings: idle.has(adapter.id) ? [idle.get(adapter.id)!] : [] };
    }),
  );
}

/** One that changes nothing has no step of its own. */
function stepFor(steps: Steps, { id }: Adapter): number {
  return steps.get(id) ?? 1;
}

/** A module of a pack, and of an adapter. */
interface Both {
  readonly index: number;
  readonly stored: PackModule;
  /** Number of the adapter. */
  readonly i: number;
  readonly adapter: Adapter;
  readonly magnitude: Float32Array | undefined;
}

/** Goes through the modules of a pack, and in each through the adapters that have it. */
async function eachModule(
  { pack, bases, adapters, formats, meter: whole, share, apart }: Newcomers,
  steps: Steps | undefined,
  work: (both: Both, begun: Begun, space: ModuleSpace | undefined) => void,
): Promise<void> {
  const meter = whole.part(share);
  const products = await fastProducts();
  const coefficientDtype = steps ? "int8" : formats.coefficients;
  const options = { gauge: gaugeOf(pack), rank: pack.directory.basis.rank, coefficientDtype };
  for (const [index, stored] of pack.modules.entries()) {
    let space: ModuleSpace | undefined;
    for (const [i, adapter] of adapters.entries()) {
      const module = adapter.modules.get(stored.name);
      if (!module) continue;
      if (!apart && sharedBases(stored)) space ??= openModule(storedModule(stored, bases, adapter), products);
      const { magnitude, ...term } = await module.read();
      const step = steps && stepFor(steps, adapter);
      const begin = (): Begun => beginMixed(space, { id: adapter.id, ...term }, { ...options, step });
      work({ index, stored, i, adapter, magnitude }, storable(adapter, stored, begin, SCALE_DOWN), space);
    }
    meter.reach((index + 1) / pack.modules.length);
  }
}

/** Whether tasks take each side of a module by itself: packs with a step and no components of all tasks. */
function sharesBySide({ directory, modules, tasks }: Pack): boolean {
  const { step, error } = directory.basis;
  if (step === undefined) return false;
  const ofAll = modules.every(sharedBases);
  const bringsRows = [...tasks.values()].some(({ brings }) => brings?.some((entry) => entry.startsWith("own-")));
  return error !== undefined || !ofAll || bringsRows;
}

/** A module that shares nothing. */
const NO_BASES = { A: { mean: undefined }, B: { mean: undefined } };

/** Whether most of a pack's tasks keep to themselves what they do not share, or share nothing. */
function hasPrivateTerms({ tasks, modules }: Pack): boolean {
  if (!modules.every(sharedBases)) return true;
  const own = [...tasks.values()].map(({ brings }) => brings?.some((entry) => parseBrought(entry).role === "private"));
  return own.filter(Boolean).length > own.length / 2;
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
export function storedModule(module: PackModule, bases: Uint8Array, adapter: Adapter): BySide<StoredBasis> {
  const side = (which: "A" | "B"): StoredBasis => {
    const [basis] = sharedBases(module) ? storedSides(module[which], bases) : [];
    if (basis) return basis;
    throw new AdapterError(`"${module.name}" has no basis in the pack: pack all adapters again`, {
      file: adapter.file,
      field: module.name,
    });
  };
  return { A: side("A"), B: side("B") };
}

/** New tasks for a pack that exists: adapters are brought onto its bases. */
import { type Adapter, checkAdapters, refuseBoth, refuseTwins } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { AdapterError, checkPack, listed, TaskError } from "../errors.ts";
import {
  type Basis,
  type BySide,
  type Gauge,
  type ModuleMember,
  openModule,
  type ProjectOptions,
  projectModule,
  type TaskUpdate,
} from "../extract/components.ts";
import { pairOf, type Spectrum, singularValues, spectrumOf } from "../extract/factors.ts";
import { balanced, cheapest, openSides, type SideChoice, sideCosts, takeSides } from "../extract/sides.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import type { TaskToWrite } from "../format/encode.ts";
import { encodedTensor, type PackModule, parseBrought, type Side, sharedBases } from "../format/format.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { SCALE_DOWN } from "../tensor/encode.ts";
import { Meter, type OnWork, ROUND } from "../work.ts";
import { completeDtypes } from "./recipe.ts";
import { idleWarnings, lossesOf, type TaskLoss } from "./report.ts";
import { type Steps, search, startSteps, Unreachable, withinError } from "./seek.ts";
import {
  add,
  DEFAULT_ERROR,
  type Encoded,
  encodeAdapter,
  encodedTask,
  narrowTerms,
  stepsOf,
  storable,
} from "./tasks.ts";
import { storedTask } from "./write.ts";

/** A task made for an existing basis, and what it lost. */
export interface ProjectedAdapter extends TaskToWrite {
  readonly residual: TaskLoss;
  /** Warnings about the result. */
  readonly warnings: readonly string[];
}

/** Options of `projectAdapters`. */
export interface ProjectAdaptersOptions {
  /** Called as the work goes on, with the share that is done, in percent. */
  readonly onProgress?: OnWork | undefined;
  /**
   * The share of its ΔW that an adapter may lose. Residual rows store what the components lack, or all of it if that
   * takes fewer bytes. Default: the pack's error, if it has one.
   */
  readonly error?: number | undefined;
  /** An adapter that loses a larger share of its ΔW is refused; 1 refuses none. Default: 0.5, or `error` if larger. */
  readonly maxLoss?: number | undefined;
}

/** A task that loses more of its ΔW does something else than its adapter. */
export const MAX_LOSS = 0.5;

/**
 * Encodes adapters as tasks of a pack that exists. In a pack whose tasks are coefficients alone, adapters become
 * coefficients too, with the pack's factorisation, rank and step. With an `error` they do so if the components can keep
 * it. Otherwise each factor takes the form that costs least: coefficients, residual rows, or both. Steps then keep the
 * adapter's error within `error`, the error of the pack, or `DEFAULT_ERROR`; a pack with a step and no error gives its
 * own step. The work goes module by module, so that each basis is opened once.
 * @throws AdapterError when one adapts a module that the pack does not have, or of another shape
 * @throws TaskError for one that would lose more than `maxLoss`, with the `loss`
 * @throws RangeError for a `maxLoss` that is no share, and an error that is out of reach
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
  refuseTwins(adapters);
  for (const adapter of adapters) checkModules(pack, adapter);
  const bases = await pack.bases();
  try {
    const meter = Meter.of("adding", onProgress);
    const all: Newcomers = { pack, bases: bases.bytes, adapters, formats, meter };
    const made = await (hasRows(pack)
      ? withRows(all, error)
      : error === undefined
        ? ontoComponents(all)
        : within(all, error));
    refuseLoss(made, maxLoss, pack.name);
    meter.reach(1);
    return made.map((task) => ({ ...task, ...storedTask(pack, task) }));
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
  let coefficients: Dtype | undefined;
  let head: Dtype | undefined;
  for (const id of [...pack.tasks.keys()].slice(0, MOST_ASKED)) {
    const { terms, parameters } = await pack.load(id);
    coefficients ??= terms.find((term) => term.A)?.A?.tensor.dtype;
    head ??= parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
    if (coefficients && head) break;
  }
  return completeDtypes({ ...(coefficients ? { coefficients } : {}), ...(head ? { head } : {}) });
}

interface Newcomers {
  readonly pack: Pack;
  readonly bases: Uint8Array;
  readonly adapters: readonly Adapter[];
  readonly formats: Dtypes;
  readonly meter: Meter;
}

/**
 * Adapters within an error: as the pack's tasks, coefficients alone, where components hold enough of them; otherwise
 * with residual rows.
 */
async function within(all: Newcomers, error: number): Promise<ProjectedAdapter[]> {
  const { step } = all.pack.directory.basis;
  const exact = { ...all, meter: all.meter.part(ROUND), formats: { ...all.formats, coefficients: "f32" } as const };
  const losses = (made: ProjectedAdapter[]): TaskLoss[] => made.map(({ residual }) => residual);
  if (losses(await ontoComponents(exact, null)).some(({ total }) => total > error)) return withRows(all, error);
  if (step === undefined) return ontoComponents(all);
  try {
    const make = (steps: Steps): Promise<ProjectedAdapter[]> =>
      ontoComponents({ ...all, meter: all.meter.part(ROUND) }, steps);
    return await search(startSteps(await spectraOf(all), error, true), make, withinError(error, losses));
  } catch (cause) {
    // Integers are too few for the error.
    if (!(cause instanceof Unreachable)) throw cause;
    return withRows(all, error);
  }
}

/**
 * Adapters as coefficients over components that all tasks share.
 * @param given steps of ΔW; null for numbers that are not integers. Default: the pack's step, if it has one
 */
async function ontoComponents(all: Newcomers, given?: Steps | null): Promise<ProjectedAdapter[]> {
  const { pack, bases, adapters, formats, meter } = all;
  const { step, rank } = pack.directory.basis;
  const steps = given === undefined && step !== undefined ? await stepsOf(adapters, step) : (given ?? undefined);
  const dtype: Dtype = steps ? "int8" : formats.coefficients;
  const products = await fastProducts();
  const options: ProjectOptions = { gauge: gaugeOf(pack), rank, coefficientDtype: dtype };
  return encoded(all, meter, steps !== undefined, (module) => {
    let space: ReturnType<typeof openModule> | undefined;
    return (adapter, member) => {
      space ??= openModule(storedModule(module, bases, adapter), products);
      return projectModule(space, member, { ...options, step: steps && stepFor(steps, adapter) });
    };
  });
}

/** Number formats of residual rows, from few bytes to many. Default: integers with a step. */
const ROWS: readonly (Dtype | undefined)[] = [undefined, "f16", "f32"];

async function withRows(all: Newcomers, asked: number | undefined): Promise<ProjectedAdapter[]> {
  const { pack, adapters } = all;
  const { step } = pack.directory.basis;
  const error = asked ?? pack.directory.basis.error;
  const choices: Choices = new Map();
  if (step !== undefined && error === undefined)
    return takingSides(all, all.meter, choices, await stepsOf(adapters, step), undefined);
  const most = error ?? DEFAULT_ERROR;
  const spectra = await spectraOf(all);
  let failure: Unreachable | undefined;
  for (const dtype of ROWS) {
    try {
      return await search(
        startSteps(spectra, most, dtype === undefined),
        (steps) => takingSides(all, all.meter.part(ROUND), choices, steps, dtype),
        withinError(most, (made: ProjectedAdapter[]) => made.map(({ residual }) => residual)),
      );
    } catch (cause) {
      // Integers are too few: in numbers that take more bytes.
      if (!(cause instanceof Unreachable)) throw cause;
      failure ??= cause;
    }
  }
  throw failure!;
}

/** Choices of each adapter for the factors of a module. The first steps settle them. */
type Choices = Map<string, BySide<SideChoice>>;

async function takingSides(
  all: Newcomers,
  meter: Meter,
  choices: Choices,
  steps: Steps,
  dtype: Dtype | undefined,
): Promise<ProjectedAdapter[]> {
  const { bases } = all;
  const products = await fastProducts();
  return encoded(all, meter, dtype === undefined, (module) => {
    const opened = openSides({ A: storedSides(module.A, bases), B: storedSides(module.B, bases) }, products);
    return (adapter, member) => {
      const key = JSON.stringify([adapter.id, module.name]);
      const step = stepFor(steps, adapter);
      if (!choices.has(key)) {
        const whole = balanced(pairOf(member), { A: opened.A[0], B: opened.B[0] }, module, products);
        choices.set(key, cheapest(sideCosts(opened, whole, module, step)));
      }
      return takeSides(opened, module, member, choices.get(key)!, { step, dtype }, products);
    };
  });
}

/**
 * Goes through the modules of the pack, and in each through the adapters that have it.
 * @param isCoded true for numbers that are integers of any size
 * @param open opens a module's bases, and returns what brings an adapter onto them
 */
async function encoded(
  { pack, adapters, formats }: Newcomers,
  meter: Meter,
  isCoded: boolean,
  open: (module: PackModule) => (adapter: Adapter, member: ModuleMember) => TaskUpdate,
): Promise<ProjectedAdapter[]> {
  const all: Encoded = { terms: new Map(), errors: [] };
  const rescaled = new Set<string>();
  for (const [index, stored] of pack.modules.entries()) {
    const { name } = stored;
    const take = open(stored);
    for (const adapter of adapters) {
      const module = adapter.modules.get(name);
      if (!module) continue;
      const { magnitude, ...term } = await module.read();
      const update = storable(adapter, module, () => take(adapter, { id: adapter.id, ...term }), SCALE_DOWN);
      if (magnitude) rescaled.add(adapter.id);
      add(all, index, adapter, encodedTask(name, update, magnitude, adapter));
    }
    meter.reach((index + 1) / pack.modules.length);
  }
  const names = pack.modules.map(({ name }) => name);
  const ids = adapters.map(({ id }) => id);
  const residuals: TaskLoss[] = lossesOf(all.errors, ids);
  const idle = idleWarnings(adapters, all.errors, rescaled);
  return Promise.all(
    adapters.map(async (adapter, i) => {
      const terms = all.terms.get(adapter) ?? [];
      const narrow = isCoded ? narrowTerms(terms, pack.modules) : terms;
      const task = await encodeAdapter(adapter, narrow, names, { type: formats.head });
      return { ...task, residual: residuals[i]!, warnings: idle.has(adapter.id) ? [idle.get(adapter.id)!] : [] };
    }),
  );
}

/** The step of an adapter: any for one that changes nothing. */
function stepFor(steps: Steps, { id }: Adapter): number {
  return steps.get(id) ?? 1;
}

function storedSides(sides: readonly Side[], bases: Uint8Array): Basis[] {
  return sides.map(({ K, mean, tensor }) => {
    const { dtype, width } = tensor;
    return { dtype, components: K, width, mean, encoded: encodedTensor(bases, tensor) };
  });
}

async function spectraOf({ pack, adapters }: Newcomers): Promise<Spectrum[]> {
  const spectra: Spectrum[] = [];
  const products = await fastProducts();
  for (const module of pack.modules) {
    for (const { id, modules } of adapters) {
      const term = await modules.get(module.name)?.read();
      if (!term) continue;
      const singular = singularValues(pairOf(term), module.out, module.in, products);
      spectra.push(spectrumOf(id, module.name, module, singular));
    }
  }
  return spectra;
}

/**
 * True if new tasks of a pack may have residual rows: the pack has an error, tasks with them, or modules without
 * components of all tasks.
 */
function hasRows({ directory, tasks, modules }: Pack): boolean {
  const { step, error } = directory.basis;
  if (error !== undefined || !modules.every(sharedBases)) return true;
  const roles = [...tasks.values()].map(({ brings = [] }) => brings.map((entry) => parseBrought(entry).role));
  if (step !== undefined && roles.some((own) => own.includes("own-A") || own.includes("own-B"))) return true;
  return roles.filter((own) => own.includes("private")).length > roles.length / 2;
}

/** The gauge that a pack's tasks are in. */
export function gaugeOf({ directory }: Pack): Gauge {
  return directory.basis.gauge === "balanced" ? "balanced" : "as-trained";
}

/** @throws AdapterError when the pack has no basis for a module of an adapter */
function checkModules(pack: Pack, adapter: Adapter): void {
  refuseBoth(adapter);
  if (pack.modules.some(({ A: [A], B: [B] }) => A?.kind === "flat" || B?.kind === "flat"))
    throw new AdapterError(
      `${pack.name} has components of whole factors (flat), which take no further tasks: pack all adapters again`,
      {
        file: adapter.file,
        field: "mode",
      },
    );
  const known = new Map(pack.modules.map((m) => [m.name, m]));
  const missing = [...adapter.modules.keys()].filter((name) => !known.has(name));
  if (missing.length > 0) {
    const message =
      missing.length === adapter.modules.size
        ? `it adapts none of the modules that the tasks of ${pack.name} adapt, but ${listed(missing)}: is it of another base model?`
        : `it adapts ${missing.length} modules that ${pack.name} has no basis for (${listed(missing)}): pack all adapters again, with this one`;
    throw new AdapterError(message, { file: adapter.file, field: missing[0]! });
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
export function storedModule(module: PackModule, bases: Uint8Array, adapter: Adapter): BySide<Basis> {
  const side = (which: "A" | "B"): Basis => {
    const [basis] = sharedBases(module) ? storedSides(module[which], bases) : [];
    if (basis) return basis;
    throw new AdapterError(`"${module.name}" has no basis in the pack: pack all adapters again`, {
      file: adapter.file,
      field: module.name,
    });
  };
  return { A: side("A"), B: side("B") };
}

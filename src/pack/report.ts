/**
 * What a pack says about itself when it has been made: one shape for every way to make one.
 */
import { baseModels } from "../adapters/modules.ts";
import type { BasisMode, Centering, ComponentSelection, Gauge } from "../extract/options.ts";
import type { ModuleInput } from "../format/encode.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";

/** f16 where nothing else is asked for. */
export function completeDtypes({ basis = "f16", coefficients = "f16", head = "f16" }: Partial<Dtypes> = {}): Dtypes {
  return { basis, coefficients, head };
}

/** What a task lost: ‖ΔW − ΔW'‖ / ‖ΔW‖. */
export interface TaskLoss {
  readonly id: string;
  /** Of all its modules together. */
  readonly total: number;
  /** Mean over its modules. */
  readonly mean: number;
  /** Largest of a module. */
  readonly max: number;
}

/** What any pack is made of. */
export interface PackReport {
  readonly modules: number;
  readonly mode: BasisMode;
  readonly gauge: Gauge;
  readonly centering: Centering;
  readonly bytes: number;
  /** Components per module and side. */
  readonly components: { readonly min: number; readonly mean: number; readonly max: number };
  /** What a person should know before trusting the result. */
  readonly warnings: readonly string[];
}

/** What a pack holds of its adapters and what they lost. */
export interface TasksReport {
  readonly tasks: number;
  readonly modules: number;
  readonly bytes: number;
  /** Size of the adapter files. */
  readonly adapterBytes: number;
  /** adapterBytes / bytes. */
  readonly ratio: number;
  /** From how many tasks of this kind on the pack is smaller than the adapters; null: never. */
  readonly breakEvenTasks: number | null;
  /** ‖ΔW − ΔW'‖ / ‖ΔW‖ over tasks and modules. */
  readonly error: { readonly mean: number; readonly max: number; readonly worstTask: string };
}

/** What a pack is made of and what its tasks lost. */
export interface BuildReport extends PackReport, TasksReport {
  readonly dtype: Dtypes;
  /** Private terms by number format, over tasks and modules. */
  readonly privateTerms: Readonly<Partial<Record<Dtype, number>>>;
  readonly error: TasksReport["error"] & { readonly worstModule: string };
  /** The same over the modules of each task. */
  readonly errors: readonly TaskLoss[];
}

/** Sizes of a pack beside its adapters', from the blobs and adapters of its tasks. */
export function sizes(
  bytes: number,
  tasks: readonly { readonly blob: number; readonly adapter: number }[],
): Pick<TasksReport, "tasks" | "bytes" | "adapterBytes" | "ratio" | "breakEvenTasks"> {
  const [blobs, adapters] = [tasks.map(({ blob }) => blob), tasks.map(({ adapter }) => adapter)];
  const adapterBytes = adapters.reduce((a, b) => a + b, 0);
  return {
    tasks: tasks.length,
    bytes,
    adapterBytes,
    ratio: adapterBytes / bytes,
    breakEvenTasks: breakEven(bytes, blobs, adapters),
  };
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

/** The fewest, the mean and the most components of a module's side. */
export function componentsOf(modules: readonly Pick<ModuleInput, "A" | "B">[]): PackReport["components"] {
  const counts = modules.flatMap(({ A, B }) => [A?.K ?? 0, B?.K ?? 0]);
  return {
    min: counts.reduce((least, count) => Math.min(least, count), Infinity),
    mean: counts.reduce((a, b) => a + b, 0) / counts.length,
    max: counts.reduce((most, count) => Math.max(most, count), -Infinity),
  };
}

/** What to say of a pack's base model. */
export function baseWarnings(base: unknown, adapters: Parameters<typeof baseModels>[0]): string[] {
  const named = baseModels(adapters);
  return [
    ...(base ? [] : ["packed without a base model: the runtime can check shapes only, not which model it is"]),
    ...(named.length > 1
      ? [`the adapters name their base model in several ways, taken for one: ${named.join(", ")}`]
      : []),
  ];
}

/** What to say where fewer components than asked for were to be had: a side has no more directions than rows. */
export function fewerWarnings(
  select: ComponentSelection | undefined,
  { min, max }: PackReport["components"],
): string[] {
  if (select?.kind !== "k" || max >= select.k) return [];
  const found = min === max ? `${max}` : `${min} to ${max}`;
  return [
    `${select.k} components were asked for, and the adapters have ${found} per module and side: these were taken`,
  ];
}

/** The share of its ΔW from which on it is worth a word that a task loses it. */
export const MUCH = 0.3;
/** So many times the median make a task worse than the rest. */
const WORSE = 1.5;

/** What to say of tasks that lose much more than the others. */
export function lossWarnings(losses: readonly TaskLoss[]): string[] {
  const totals = losses.map(({ total }) => total).sort((a, b) => a - b);
  const median = totals[(totals.length - 1) >> 1] ?? 0;
  const percent = (share: number): string => `${Math.round(100 * share)} %`;
  return losses
    .filter(({ total }) => total > MUCH && total > WORSE * median)
    .map(
      ({ id, total }) =>
        `task "${id}" loses ${percent(total)} of its ΔW, half of the tasks ${percent(median)} at most: allow an error instead of a ` +
        "size or a number of components, which holds for every task",
    );
}

/** An error of one task in one module. */
export interface ModuleError {
  readonly task: string;
  readonly module: string;
  readonly error: number;
  /** ‖ΔW‖. */
  readonly norm: number;
}

/** Mean and worst of errors. */
export function summaryOf(errors: readonly ModuleError[]): BuildReport["error"] {
  const worst = errors.reduce((a, b) => (b.error > a.error ? b : a), { task: "", module: "", error: 0, norm: 0 });
  return { ...figures(errors), worstTask: worst.task, worstModule: worst.module };
}

/** The errors of each of these tasks. */
export function lossesOf(errors: readonly ModuleError[], ids: readonly string[]): TaskLoss[] {
  const own = new Map<string, ModuleError[]>(ids.map((id) => [id, []]));
  for (const error of errors) own.get(error.task)?.push(error);
  return ids.map((id) => ({ id, total: totalOf(own.get(id)!), ...figures(own.get(id)!) }));
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of modules together. */
export function totalOf(errors: readonly Pick<ModuleError, "error" | "norm">[]): number {
  const whole = errors.reduce((sum, { norm }) => sum + norm ** 2, 0);
  return whole > 0 ? Math.sqrt(errors.reduce((sum, { error, norm }) => sum + (error * norm) ** 2, 0) / whole) : 0;
}

function figures(errors: readonly ModuleError[]): { mean: number; max: number } {
  const sum = errors.reduce((s, e) => s + e.error, 0);
  return { mean: errors.length ? sum / errors.length : 0, max: errors.reduce((m, e) => Math.max(m, e.error), 0) };
}

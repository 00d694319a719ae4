/** The report of a pack that was made: one shape for every strategy. */

import { type Adapter, baseModels, commonBase } from "../adapters/adapter.ts";
import { listed } from "../errors.ts";
import type { ComponentSelection } from "../extract/components.ts";
import type { SharedSides } from "../extract/sides.ts";
import type { ModuleInput } from "../format/encode.ts";
import { FINGERPRINT_SIZE } from "../format/format.ts";
import { type Dtypes, mean, sum } from "../tensor/dtypes.ts";
import type { BuildOptions, Recipe } from "./recipe.ts";

/** Loss of a task: ‖ΔW − ΔW'‖ / ‖ΔW‖. */
export interface TaskLoss {
  readonly id: string;
  /** All its modules together. */
  readonly total: number;
  /** Mean over its modules. */
  readonly mean: number;
  /** Largest of a module. */
  readonly max: number;
}

/** Size and contents of a pack, and the losses of its tasks. */
export interface BuildReport {
  readonly tasks: number;
  readonly modules: number;
  readonly gauge: NonNullable<BuildOptions["gauge"]>;
  readonly centering: NonNullable<BuildOptions["centering"]>;
  readonly dtype: Dtypes;
  /** The step of `buildPack`, where numbers are entropy-coded. */
  readonly step?: number | undefined;
  /** Components per module and side. */
  readonly components: { readonly min: number; readonly mean: number; readonly max: number };
  /**
   * Components that tasks share of each factor by itself; undefined where components are those of all tasks, or none
   * were sought.
   */
  readonly shared?: SharedReport | undefined;
  readonly bytes: number;
  /** Bytes of the base's fingerprints, by which apps refuse another model; 0 without a base. */
  readonly fingerprints: number;
  /** Size of the adapter files. */
  readonly adapterBytes: number;
  /** adapterBytes / bytes. */
  readonly ratio: number;
  /** The number of such tasks from which on the pack is smaller than the adapters; null: never. */
  readonly breakEvenTasks: number | null;
  /** ‖ΔW − ΔW'‖ / ‖ΔW‖ over tasks and modules. */
  readonly error: {
    readonly mean: number;
    readonly max: number;
    readonly worstTask: string;
    readonly worstModule: string;
  };
  /** The same over the modules of each task. */
  readonly errors: readonly TaskLoss[];
  /** Reasons to distrust the result. */
  readonly warnings: readonly string[];
  /** Ways to a better pack, which are no reason to distrust this one. */
  readonly notes: readonly string[];
}

/** Shared components of each factor. */
export interface SharedReport {
  /** Tasks that take components of A, the factor that reads, in one module at least; and modules that have some. */
  readonly A: { readonly tasks: number; readonly modules: number };
  /** The same of B, what layers write. */
  readonly B: { readonly tasks: number; readonly modules: number };
  /** Bytes of the components, about, and how many fewer the pack has because of them. */
  readonly bytes: number;
  readonly saved: number;
}

function sharedReport(sides: ReadonlyMap<string, SharedSides>): SharedReport {
  const all = [...sides.values()];
  const side = (which: "A" | "B"): SharedReport["A"] => {
    const tasks = new Set<string>();
    for (const { choices } of all)
      for (const [id, { [which]: choice }] of choices) if (choice.basis !== undefined) tasks.add(id);
    return { tasks: tasks.size, modules: all.filter(({ bases }) => bases[which].length > 0).length };
  };
  const total = (key: "bits" | "saved"): number => Math.round(sum(all, (one) => one[key]) / 8);
  return { A: side("A"), B: side("B"), bytes: total("bits"), saved: total("saved") };
}

/** A pack that was made, for its report. */
export interface Made extends Pick<BuildReport, "bytes" | "modules" | "components"> {
  readonly blobs: readonly number[];
  readonly errors: readonly ModuleError[];
  /** Ids of tasks that change magnitudes. */
  readonly rescaled: ReadonlySet<string>;
  /** Components that were sought for each side, by module. */
  readonly sides?: ReadonlyMap<string, SharedSides> | undefined;
  readonly based: boolean;
}

export function buildReport(
  adapters: readonly Adapter[],
  { extraction, head, step }: Recipe,
  { bytes, blobs, modules, components, errors, rescaled, sides, based }: Made,
): BuildReport {
  const { gauge, centering, select, basisDtype: basis, coefficientDtype: coefficients } = extraction;
  const adapted = new Set(errors.map(({ task }) => task));
  const losses = lossesOf(
    errors,
    adapters.flatMap(({ id }) => (adapted.has(id) ? id : [])),
  );
  const tasks = blobs.map((blob, i) => ({ blob, adapter: adapters[i]!.byteLength }));
  return {
    ...sizes(bytes, tasks),
    fingerprints: based ? 4 * FINGERPRINT_SIZE * modules : 0,
    modules,
    gauge,
    centering,
    dtype: { basis, coefficients, head: head.type },
    step,
    components,
    shared: sides && sharedReport(sides),
    error: summaryOf(errors),
    errors: losses,
    warnings: [
      ...lossWarnings(losses),
      ...adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`)),
      ...baseWarnings(adapters),
      ...idleWarnings(adapters, errors, rescaled).values(),
      ...fewerWarnings(select, components),
    ],
    notes: baseNotes(based),
  };
}

/** Sizes of a pack and of its adapters, from the blobs and adapters of its tasks. */
export function sizes(
  bytes: number,
  tasks: readonly { readonly blob: number; readonly adapter: number }[],
): Pick<BuildReport, "tasks" | "bytes" | "adapterBytes" | "ratio" | "breakEvenTasks"> {
  const blobs = tasks.map(({ blob }) => blob);
  const adapters = tasks.map(({ adapter }) => adapter);
  const adapterBytes = sum(adapters);
  return {
    tasks: tasks.length,
    bytes,
    adapterBytes,
    ratio: adapterBytes / bytes,
    breakEvenTasks: breakEven(bytes, blobs, adapters),
  };
}

/**
 * The number of tasks from which on a pack is smaller than the adapters it was made of, at their mean sizes.
 * @param bytes of the whole pack
 * @returns null when a blob is no smaller than an adapter, or the adapters' sizes are unknown
 */
export function breakEven(bytes: number, blobs: readonly number[], adapters: readonly number[]): number | null {
  if (blobs.length === 0 || adapters.some((a) => a === 0)) return null;
  const shared = bytes - sum(blobs);
  const saved = mean(adapters) - mean(blobs);
  return saved > 0 ? Math.ceil(shared / saved) : null;
}

/** The fewest, the mean and the most components of a module's side. */
export function componentsOf(modules: readonly Pick<ModuleInput, "A" | "B">[]): BuildReport["components"] {
  const countOf = (bases: ModuleInput["A"] = []): number => sum(bases, ({ K }) => K);
  const counts = modules.flatMap(({ A, B }) => [countOf(A), countOf(B)]);
  const max = counts.reduce((most, count) => Math.max(most, count), 0);
  const min = counts.reduce((least, count) => Math.min(least, count), max);
  return { min, mean: mean(counts), max };
}

/** Notes of a pack that was made without its base model. */
export function baseNotes(based: boolean): string[] {
  const note =
    "Apps can check the shapes of their model only, not whether it is the right one: pass `base` to store fingerprints.";
  return based ? [] : [note];
}

interface Owner {
  readonly id: string;
  readonly baseModel: string | undefined;
  readonly modules: ReadonlySet<string> | ReadonlyMap<string, unknown>;
}

/** Warnings about the base model of adapters that were packed together. */
export function baseWarnings(adapters: readonly Owner[]): string[] {
  const named = baseModels(adapters);
  const said =
    commonBase(adapters) === undefined
      ? "the adapters name different base models, so the pack names none"
      : "the adapters name their base model in several ways, taken for one";
  return [...(named.length > 1 ? [`${said}: ${named.join(", ")}`] : []), ...strangerWarnings(adapters)];
}

/**
 * Warnings of adapters that share no module with the others: an adapter need not name its base, and one of another
 * model is packed with them without a contradiction. Those that name the base of the others are left alone.
 */
function strangerWarnings(adapters: readonly Owner[]): string[] {
  let groups: { members: Owner[]; modules: Set<string> }[] = [];
  for (const adapter of adapters) {
    const names = [...adapter.modules.keys()];
    if (names.length === 0) continue;
    const meets = groups.filter(({ modules }) => names.some((name) => modules.has(name)));
    const members = [...meets.flatMap((group) => group.members), adapter];
    const modules = new Set([...meets.flatMap((group) => [...group.modules]), ...names]);
    groups = [...groups.filter((group) => !meets.includes(group)), { members, modules }];
  }
  const isNamed = ({ members }: (typeof groups)[number]): boolean =>
    members.some(({ baseModel }) => baseModel !== undefined);
  const [most, ...others] = groups.sort((a, b) => b.members.length - a.members.length);
  return others
    .filter((group) => !(isNamed(group) && isNamed(most!)))
    .map(({ members }) => {
      const ids = members.map(({ id }) => `"${id}"`);
      const [adapt, isOther] = members.length > 1 ? ["adapt", "are they"] : ["adapts", "is it"];
      return `${listed(ids, LISTED)} ${adapt} none of the modules that the others adapt: ${isOther} of another base model?`;
    });
}

const LISTED = 3;

/**
 * Warnings of adapters all of whose updates are 0, by id. DoRA's magnitudes change weights by themselves.
 * @param rescaled ids of tasks that change magnitudes
 */
export function idleWarnings(
  adapters: readonly Adapter[],
  errors: readonly ModuleError[],
  rescaled: ReadonlySet<string>,
): Map<string, string> {
  const busy = new Set(errors.filter(({ norm }) => norm > 0).map(({ task }) => task));
  const warnings = new Map<string, string>();
  for (const { id, modules, saved } of adapters) {
    if (modules.size === 0 || busy.has(id) || rescaled.has(id)) continue;
    const names = saved.slice(0, LISTED).map(({ name }) => name);
    const what = names.length > 0 ? `changes only what it overrides (${names.join(", ")})` : "changes nothing";
    warnings.set(id, `task "${id}" ${what}: all its updates are 0`);
  }
  return warnings;
}

/** Warnings of fewer components than were asked for: a factor has no more directions than rows. */
export function fewerWarnings(
  select: ComponentSelection | undefined,
  { min, max }: BuildReport["components"],
): string[] {
  if (select?.kind !== "k" || max >= select.k) return [];
  const found = min === max ? `${max}` : `${min} to ${max}`;
  return [
    `${select.k} components were asked for, and the adapters have ${found} per module and side: these were taken`,
  ];
}

/** Share of ΔW above which a task's loss may cause a warning. */
export const MUCH = 0.3;
/** A task that loses this many times the median is worse than the rest. */
const WORSE = 1.5;

function lossWarnings(losses: readonly TaskLoss[]): string[] {
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

function summaryOf(errors: readonly ModuleError[]): BuildReport["error"] {
  const worst = errors.reduce((a, b) => (b.error > a.error ? b : a), { task: "", module: "", error: 0, norm: 0 });
  return { ...figures(errors), worstTask: worst.task, worstModule: worst.module };
}

/** The errors of each task. @param ids Default: of all that have some */
export function lossesOf(
  errors: readonly ModuleError[],
  ids: readonly string[] = [...new Set(errors.map(({ task }) => task))],
): TaskLoss[] {
  const own = new Map<string, ModuleError[]>(ids.map((id) => [id, []]));
  for (const error of errors) own.get(error.task)?.push(error);
  return ids.map((id) => ({ id, total: totalOf(own.get(id)!), ...figures(own.get(id)!) }));
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of modules together. */
function totalOf(errors: readonly Pick<ModuleError, "error" | "norm">[]): number {
  const whole = sum(errors, ({ norm }) => norm ** 2);
  return whole > 0 ? Math.sqrt(sum(errors, ({ error, norm }) => (error * norm) ** 2) / whole) : 0;
}

function figures(errors: readonly ModuleError[]): { mean: number; max: number } {
  return { mean: mean(errors, ({ error }) => error), max: errors.reduce((m, { error }) => Math.max(m, error), 0) };
}

/**
 * Packing for a goal: adapters, strategies, and for each of them the step that fits. A goal is an error that no task
 * exceeds, a size, or the scores of a user's judge. It knows no model and no data.
 */

import type { Adapter, SharedModule } from "../adapters/adapter.ts";
import { openPack, type Pack } from "../core/pack.ts";
import { AdapterError, checkArgument, checkChoice, checkOptions } from "../errors.ts";
import type { SideBasis } from "../extract/components.ts";
import { byTask, expectedBits, roundingLoss, type Spectrum, spectrumOf } from "../extract/factors.ts";
import { costOf, encodeSpans, type SharedSides, type SideChoice, type SideCost, type Spans } from "../extract/sides.ts";
import { throwIfAborted } from "../pace.ts";
import { type Dtype, mean, sum } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import {
  type Adapters,
  type Built,
  eachModule,
  gathered,
  naming,
  openAdapters,
  packRows,
  partOf,
  piecesOf,
  type Rows,
  readStack,
  type Streamed,
  withExtractor,
} from "./build.ts";
import { type BuildOptions, MOST_STEP, type Recipe, recipeOf } from "./recipe.ts";
import { type BuildReport, lossesOf } from "./report.ts";
import { bisect, SLOPE, type Steps, search, startSteps, Unreachable, withinBytes, withinError } from "./seek.ts";
import { DEFAULT_ERROR, type Encoded } from "./tasks.ts";
import type { Scratch } from "./write.ts";

/** A figure of each task, by id. */
export type PerTask = ReadonlyMap<string, number> | Readonly<Record<string, number>>;

/** A goal that a pack must keep to. */
export type Goal =
  /** The best pack of at most so many bytes. */
  | { readonly kind: "bytes"; readonly max: number }
  /** The smallest pack with ‖ΔW − ΔW'‖ / ‖ΔW‖ of every task, over all its modules, at most `max`. */
  | { readonly kind: "error"; readonly max: number }
  /** The smallest pack that keeps the scores that `judge` gives. */
  | {
      readonly kind: "score";
      /** Loss that a score may have, in its own unit: 0.01 is a point of accuracy. */
      readonly tolerance: number;
      /** Applies the tolerance to the score of every task, or to their mean. Default: "every". */
      readonly keep?: "every" | "mean";
      /**
       * Scores to compare with, for instance of the adapters themselves. Default: those of a pack that loses nothing.
       */
      readonly reference?: PerTask;
    };

/**
 * The score of each task of an open pack, larger is better. Called for one pack at a time. The pack is closed
 * afterwards, so close sessions on it first. Ask the same rows in the same way each time: scores then differ by what
 * the packs do alone.
 */
export type Judge = (pack: Pack, ids: readonly string[]) => PerTask | Promise<PerTask>;

/** A pack that was made, or a strategy that does not reach the goal. */
export interface Tried {
  /** The strategy. */
  readonly name: string;
  /** Step of ΔW, as a share of its typical norm; the mean where each task has its own. */
  readonly step?: number | undefined;
  /** Undefined where the goal is out of reach. */
  readonly bytes?: number | undefined;
  /** Mean ΔW error. */
  readonly error?: number | undefined;
  readonly scores?: ReadonlyMap<string, number> | undefined;
  /** Reference − score: the largest of the tasks, or of the means. */
  readonly loss?: number | undefined;
  /** True where `loss` is within the tolerance. */
  readonly passes?: boolean | undefined;
  /** Why there is no pack. */
  readonly reason?: string | undefined;
  /** The bytes of the smallest pack that was made, where those allowed are too few. */
  readonly least?: number | undefined;
}

/** The pack that was chosen, what it was chosen by, and what else was tried. */
export interface SearchReport extends BuildReport, Pick<Tried, "name" | "scores" | "loss" | "passes"> {
  /** Scores that were compared with. */
  readonly reference?: ReadonlyMap<string, number> | undefined;
  /** All that was tried, in order; without the pack that gave the reference. */
  readonly tried: readonly Tried[];
}

/** Goal of a search, and its judge. */
export interface SearchOptions extends Pick<BuildOptions, "base" | "anyBase" | "workers" | "onProgress" | "signal"> {
  /** Default: an error of at most 0.15 (`DEFAULT_ERROR`). */
  readonly goal?: Goal | undefined;
  /**
   * Gives the scores that a goal of scores is about. Other goals take none: the mean ΔW error decides there, which is a
   * proxy.
   */
  readonly judge?: Judge | undefined;
  /**
   * Number format of heads. Default: one that loses far less than the goal allows; for a size, entropy-coded integers.
   */
  readonly head?: Dtype | undefined;
}

const OPTIONS = ["goal", "judge", "head", "base", "anyBase", "workers", "onProgress", "signal"] as const;

/**
 * Makes packs until one keeps to the goal and is no larger, or loses no more, than it needs to.
 *
 * The chosen pack was itself made and measured; nothing is interpolated. Scores are noisy: ask enough rows. A judge is
 * called up to twelve times, and once for the reference.
 *
 * @throws RangeError when no pack keeps to the goal, with the least that can be done
 * @throws TypeError when `judge` or `reference` leaves out a task or gives no finite number
 * @throws AdapterError, BaseMismatchError as `buildPack`
 * @example
 * const { chunks, report } = await searchPack(adapters, { goal: { kind: "bytes", max: 300_000 } });
 * @example
 * await searchPack(adapters, {
 *   goal: { kind: "score", tolerance: 0.01, keep: "mean" },
 *   async judge(pack, ids) {
 *     const session = await createEigenSession(ort, model, pack);
 *     const scores = new Map();
 *     for (const id of ids) scores.set(id, await accuracy(session, id)); // switchTask(id), run, count
 *     await session.close();
 *     return scores;
 *   },
 * });
 */
export async function searchPack(
  adapters: readonly Adapter[],
  options: SearchOptions = {},
): Promise<Built<SearchReport>> {
  return gathered(await searchStreamed(adapters, options));
}

/**
 * `searchPack` for callers that write the pack and are done with it.
 * @param scratch takes blobs where no judge and no size asks for whole packs. Default: memory
 */
export async function searchStreamed(
  adapters: readonly Adapter[],
  { goal = { kind: "error", max: DEFAULT_ERROR }, ...options }: SearchOptions,
  scratch?: Scratch,
): Promise<Streamed<SearchReport>> {
  checkSearch({ ...options, goal });
  return withExtractor("searchPack", options.workers, async (extractor) => {
    const opened = await openAdapters("searchPack", adapters, options, extractor);
    const spectra = await survey(partOf(opened, SURVEY));
    const best = await bestOf({ ...options, opened, spectra, goal, scratch });
    opened.meter.reach(1);
    return best;
  });
}

/** Shares of the work: reading spectra; of the rest, finding shared components, and making a whole pack. */
const SURVEY = 0.15;
const SHARING = 0.4;
const PACK = 0.3;

/** Mean ΔW error from which on integers fill any size. */
const FINE = 0.02;

interface Context extends Pick<SearchOptions, "judge" | "head" | "signal"> {
  readonly opened: Adapters;
  readonly spectra: readonly Spectrum[];
  readonly goal: Goal;
  readonly scratch?: Scratch | undefined;
}

/** A number format of rows, and whether tasks share any. */
interface Strategy {
  readonly name: string;
  /**
   * Default: entropy-coded integers; then what groups of tasks share of a side is stored once, where that saves bytes.
   */
  readonly rows?: Dtype;
}

/** Strategies from few bytes to many: the first that reaches the goal is used. */
const STRATEGIES: readonly Strategy[] = [
  { name: "entropy-coded, shared where that pays" },
  { name: "each task by itself, f16", rows: "f16" },
  { name: "each task by itself, f32", rows: "f32" },
];

interface Candidate {
  readonly made: Streamed;
  readonly tried: Tried & { readonly bytes: number; readonly error: number };
}

async function bestOf(context: Context): Promise<Streamed<SearchReport>> {
  const { goal, head = headFor(goal) } = context;
  const tried: Tried[] = [];
  const reference = goal.kind === "score" ? await referenceOf(context, goal) : undefined;
  let best: Candidate | undefined;
  let failure: Error | undefined;
  for (const strategy of STRATEGIES) {
    try {
      const candidate = await candidateOf({ ...context, head }, strategy, reference, tried);
      if (!best || candidate.tried.error < best.tried.error) best = candidate;
      // A size that integers cannot fill leaves room for finer numbers.
      if (goal.kind !== "bytes" || best.tried.error > FINE) break;
    } catch (error) {
      if (!(error instanceof Unreachable) && !isUnstorable(error)) throw error;
      failure ??= error;
      const least = error instanceof Unreachable ? error.least : undefined;
      tried.push({ name: strategy.name, reason: error.message, least });
      // Other numbers take more bytes.
      if (least !== undefined) break;
    }
  }
  if (!best) throw failure!;
  const { chunks, report } = best.made;
  const { bytes, error, step, ...chosen } = best.tried;
  return { chunks, report: { ...report, ...chosen, reference, tried } };
}

/**
 * Number format of heads that loses far less than an error allows; undefined for a size, where their bits count too.
 */
function headFor(goal: Goal): Dtype | undefined {
  if (goal.kind === "bytes") return undefined;
  return goal.kind === "score" || goal.max >= 0.01 ? "int8" : goal.max >= 1e-3 ? "f16" : "f32";
}

/** An adapter has a value that cannot be stored as it was tried; in other numbers it may be. */
function isUnstorable(error: unknown): error is AdapterError {
  return error instanceof AdapterError && error.cause instanceof UnstorableError;
}

/** The best pack of a strategy. @param tried receives it, and every pack that was judged @throws Unreachable */
async function candidateOf(
  context: Context,
  strategy: Strategy,
  reference: ReadonlyMap<string, number> | undefined,
  tried: Tried[],
): Promise<Candidate> {
  const { goal, opened, spectra } = context;
  const isRounded = strategy.rows === undefined;
  const candidate = (made: Streamed, scores?: Pick<Tried, "scores" | "loss" | "passes">): Candidate => {
    const { bytes, errors, step } = made.report;
    const error = mean(errors, ({ total }) => total);
    return { made, tried: { name: strategy.name, step, bytes, error, ...scores } };
  };
  const noted = (candidate: Candidate): Candidate => {
    tried.push(candidate.tried);
    return candidate;
  };
  if (goal.kind === "error") return noted(candidate(await packWithinError(context, strategy, goal.max)));
  // All tasks have one step, as a share of the typical norm of their ΔW.
  const tasks = [...byTask(spectra)].map(([id, { spectra, square }]) => {
    return { id, spectra, norm: Math.sqrt(square / spectra.length) || 1 };
  });
  const make = async (share: number): Promise<Streamed> => {
    const part = partOf(opened, PACK);
    const steps = new Map(tasks.map(({ id, norm }) => [id, share * norm]));
    const { sides } = await findSharing(strategy, part, spectra, steps, false);
    const rows: Rows = { sides, choose: (_, encode) => encode(steps) };
    return packRows(part, recipeFor(context, strategy, share), rows, undefined);
  };
  if (goal.kind === "bytes") {
    const expected = (share: number): number =>
      sum(tasks, ({ spectra, norm }) => expectedBits(spectra, share * norm, isRounded));
    const start = bisect(1e-9, MOST_STEP, (share) => expected(share) < 8 * goal.max);
    const fits = withinBytes(
      goal.max,
      ({ made }: Candidate) => made.report.bytes,
      ({ made }) => made.report.errors.some(({ total }) => total >= 1),
    );
    return noted(await search(new Map([["", start]]), async (steps) => candidate(await make(steps.get("")!)), fits));
  }
  let least = Infinity;
  const refusal = (): Unreachable => {
    const whose = goal.keep === "mean" ? "the mean" : "every task";
    return new Unreachable(
      `searchPack: no pack keeps the score of ${whose} within ${goal.tolerance}; the least loss is ${least.toPrecision(3)}: allow more, or ask more rows`,
    );
  };
  const judged = async (share: number): Promise<Candidate> => {
    const made = await gathered(await make(share));
    const scores = await ask(context, made);
    const losses = [...reference!].map(([id, score]) => score - scores.get(id)!);
    const loss = goal.keep === "mean" ? mean(losses) : Math.max(...losses);
    least = Math.min(least, loss);
    return noted(candidate(made, { scores, loss, passes: loss <= goal.tolerance }));
  };
  if (isRounded)
    return search(new Map([["", SCORED]]), (steps) => judged(steps.get("")!), {
      slope: 1,
      // The margin of a score says little about how much coarser a pack may be.
      figuresOf: ({ tried: { loss = 0, passes } }) => [
        { key: "", ratio: passes ? 0.5 : Math.max(2, loss / goal.tolerance) },
      ],
      refusal,
    });
  const exact = await judged(0);
  if (!exact.tried.passes) throw refusal();
  return exact;
}

/** The step from which on scores are asked, of the norm that ΔW typically has: tasks lose about a quarter of it. */
const SCORED = 0.03;

function recipeFor({ head }: Context, { rows }: Strategy, step: number, error?: number): Recipe {
  const dtype = { ...(rows && { basis: rows, coefficients: rows }), ...(head && { head }) };
  const options: BuildOptions = { select: { kind: "k", k: 0 }, dtype };
  return { ...recipeOf(rows ? options : { ...options, step: Math.min(MOST_STEP, step) }), error };
}

/** Most factor by which steps of earlier adapters move the first ones of later adapters. */
const MOST_MOVED = 1.25;

/** The pack with the coarsest steps that keep every task within an error. @throws Unreachable */
async function packWithinError(context: Context, strategy: Strategy, error: number): Promise<Streamed> {
  const { opened, spectra, scratch } = context;
  const expected = startSteps(spectra, error, strategy.rows === undefined);
  const { sides, steps: start } = await findSharing(strategy, opened, spectra, expected, true);
  // Later work takes less at a time, and the pack grows meanwhile.
  await opened.extractor.rest();
  const recipe = recipeFor(context, strategy, typicalStep(spectra, start), Math.min(1, error));
  // Adapters of one model are alike. Mean of the logarithm of found ÷ expected steps; later adapters begin at what they
  // expect times that.
  let moved = 0;
  let count = 0;
  const choose: Rows["choose"] = async (group, encode) => {
    let last: Steps = new Map();
    const from = (factor: number): Promise<Encoded> =>
      search(
        new Map(group.map(({ id }) => [id, factor * (start.get(id) ?? 1)])),
        (steps) => encode((last = steps)),
        withinError(error, ({ errors }: Encoded) => lossesOf(errors)),
      );
    const factor = Math.min(MOST_MOVED, Math.max(1 / MOST_MOVED, Math.exp(moved / (count || 1))));
    const found = await from(factor).catch((failure) => {
      if (factor === 1 || !(failure instanceof Unreachable)) throw failure;
      return from(1);
    });
    for (const [id, step] of last) {
      if (!start.has(id)) continue;
      moved += Math.log(step / start.get(id)!);
      count++;
    }
    return found;
  };
  return packRows(opened, recipe, { sides, choose }, scratch);
}

/** Geometric mean of steps, as shares of the typical norm of ΔW of an adapter's modules. */
function typicalStep(spectra: readonly Spectrum[], steps: Steps): number {
  const logs = [...byTask(spectra)].flatMap(([task, { spectra, square }]) =>
    square > 0 ? Math.log(steps.get(task)! / Math.sqrt(square / spectra.length)) : [],
  );
  return Math.exp(mean(logs));
}

async function survey(opened: Adapters): Promise<Spectrum[]> {
  const read = async (piece: SharedModule<Adapter>): Promise<Spectrum[]> => {
    const { stack } = await readStack(piece);
    const all = await opened.extractor.ask("spectra", stack, undefined);
    return all.map((singular, i) => spectrumOf(stack.members[i]!.id, stack.name, stack, singular));
  };
  const spectra: Spectrum[] = [];
  for await (const found of eachModule(opened, opened.shared.flatMap(piecesOf), read))
    for (const spectrum of found) spectra.push(spectrum);
  return spectra;
}

// Scores.

async function ask({ opened, judge, signal }: Context, { chunks }: Built): Promise<Map<string, number>> {
  throwIfAborted(signal);
  const ids = opened.adapters.map(({ id }) => id);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  try {
    return figuresOf(await judge!(pack, ids), ids, "judge");
  } finally {
    await pack.close();
  }
}

async function referenceOf(context: Context, { reference }: Goal & { kind: "score" }): Promise<Map<string, number>> {
  const { opened } = context;
  if (reference)
    return figuresOf(
      reference,
      opened.adapters.map(({ id }) => id),
      "reference",
    );
  const strategy = STRATEGIES.at(-1)!;
  const none: Steps = new Map();
  const recipe = recipeFor({ ...context, head: "f32" }, strategy, 0);
  const made = await packRows(partOf(opened, PACK), recipe, { choose: (_, encode) => encode(none) }, undefined);
  return ask(context, await gathered(made));
}

/** @throws RangeError for options that do not go together; TypeError for one that is not known */
function checkSearch(options: SearchOptions & { goal: Goal }): void {
  checkOptions("searchPack", options, OPTIONS);
  const { goal, judge } = options;
  checkArgument("searchPack: goal", goal, 'a goal, such as { kind: "bytes", max: 300_000 }', "kind");
  checkChoice("goal.kind", goal.kind, ["bytes", "error", "score"]);
  const refuse = (message: string): RangeError => new RangeError(`searchPack: ${message}`);
  if (goal.kind === "score" && !(goal.tolerance >= 0))
    throw refuse(`tolerance must be 0 or more, got ${goal.tolerance}`);
  if (goal.kind !== "score" && !(goal.max > 0))
    throw refuse(`${goal.kind}: expected a number above 0, got ${goal.max}`);
  if ((goal.kind === "score") !== (judge !== undefined))
    throw refuse(judge ? `a judge is for a goal of scores, not for ${goal.kind}` : "a score needs a judge");
}

/** @throws TypeError when a task is left out, or has no finite number */
function figuresOf(given: PerTask, ids: readonly string[], who: string): Map<string, number> {
  const figures = given instanceof Map ? given : new Map(Object.entries(given ?? {}));
  return new Map(
    ids.map((id) => {
      const figure: unknown = figures.get(id);
      if (typeof figure === "number" && Number.isFinite(figure)) return [id, figure];
      throw new TypeError(
        `searchPack: ${who} gives ${String(figure)} for task "${id}"; expected a finite number for each of ${ids.length} tasks`,
      );
    }),
  );
}

// Sharing: components of groups of tasks, found from their files alone.

/** Bases that groups of tasks share, and the steps that go with them. */
interface Sharing {
  /** Modules by name, without those that share nothing; undefined where the strategy shares nothing. */
  readonly sides?: ReadonlyMap<string, SharedSides>;
  /** Steps with which each sharing task is expected to lose as much as it would lose unshared with the input steps. */
  readonly steps: Steps;
}

/** Shared components of a module, and the squared loss of each of its tasks alone and with them. */
interface Found extends SharedSides {
  readonly losses: ReadonlyMap<string, { readonly unshared: number; readonly shared: number }>;
}

/** Most tasks that are compared with each other. The others are asked what the groups of these would save them. */
const MOST_COMPARED = 64;
/** The share of what all tasks are expected to take that sharing must save: a switch is simpler without. */
const LEAST_SAVED = 0.01;

/**
 * Finds components that groups of tasks share of a side, where these save more bits than they take, as the coder counts
 * them.
 * @param steps of each task's ΔW, by id
 * @param grows true: steps grow until tasks lose as much as they would lose alone
 */
async function findSharing(
  { rows }: Strategy,
  all: Adapters,
  spectra: readonly Spectrum[],
  steps: Steps,
  grows: boolean,
): Promise<Sharing> {
  if (rows !== undefined) return { steps };
  const opened = partOf(all, SHARING);
  const sides = new Map<string, SharedSides>();
  const unshared = new Map<string, number>();
  const gains = new Map<string, number>();
  const add = (to: Map<string, number>, task: string, value: number): unknown =>
    to.set(task, (to.get(task) ?? 0) + value);
  for (const spectrum of spectra) add(unshared, spectrum.task, roundingLoss([spectrum], steps.get(spectrum.task)!));
  const modules = opened.shared.filter(({ owners }) => owners.length > 1);
  const ask = (module: SharedModule<Adapter>): Promise<Found | undefined> =>
    sharingOf(opened, module, steps, grows ? growth : () => 1);
  let at = 0;
  for await (const found of eachModule(opened, modules, ask)) {
    const { name } = modules[at++]!.shape;
    if (!found) continue;
    sides.set(name, found);
    for (const [task, { unshared, shared }] of found.losses) add(gains, task, unshared - shared);
  }
  const saved = sum(sides.values(), ({ saved }) => saved);
  const bits = sum(spectra, (spectrum) => expectedBits([spectrum], steps.get(spectrum.task)!));
  if (saved < LEAST_SAVED * bits) return { sides: new Map(), steps };
  const expected = [...steps].map(([task, step]): [string, number] => {
    const before = unshared.get(task) ?? 0;
    const gain = gains.get(task) ?? 0;
    return [task, gain === 0 ? step : step * growth(before, before - gain)];
  });
  return { sides, steps: new Map(expected) };
}

/** The factor by which steps grow until a squared loss is what it was. */
function growth(before: number, after: number): number {
  return Math.min(2, (before / Math.max(after, before / 8)) ** (0.5 / SLOPE));
}

async function sharingOf(
  { extractor }: Adapters,
  module: SharedModule<Adapter>,
  steps: Steps,
  grown: typeof growth,
): Promise<Found | undefined> {
  const { shape, owners } = module;
  const stepsFor = ({ owners }: SharedModule<Adapter>): number[] => owners.map(({ id }) => steps.get(id)!);
  const compared = { shape, owners: spread(owners, MOST_COMPARED) };
  const { stack } = await readStack(compared);
  const found = await naming(compared, () => extractor.ask("spans", stack, { steps: stepsFor(compared) }));
  const { spans, bases, costs } = found;
  if (spans.A.length + spans.B.length === 0) return undefined;
  const others = { shape, owners: owners.filter((owner) => !compared.owners.includes(owner)) };
  for (const piece of piecesOf(others)) {
    const { stack } = await readStack(piece);
    const asked = extractor.ask("sideCosts", stack, { bases, steps: stepsFor(piece) });
    costs.push(...(await naming(piece, () => asked)));
  }
  const costsOf = (which: "A" | "B"): (readonly SideCost[])[] => costs.map((task) => task[which]);
  const chosen = { A: paying(costsOf("A"), bases.A), B: paying(costsOf("B"), bases.B) };
  const used = { A: usedOf(chosen.A), B: usedOf(chosen.B) };
  if (used.A.length + used.B.length === 0) return undefined;
  const losses = new Map<string, { unshared: number; shared: number }>();
  const stored = [...used.A.map((i) => bases.A[i]!), ...used.B.map((i) => bases.B[i]!)];
  const bits = sum(stored, (basis) => basis.bits);
  let saved = -bits;
  const total = { unshared: 0, shared: 0 };
  for (const [i, { id, left, A, B }] of costs.entries()) {
    const square = steps.get(id)! ** 2;
    const chosenA = chosen.A[i]!;
    const chosenB = chosen.B[i]!;
    const unshared = square * (left + A[0]!.lost + B[0]!.lost);
    const shared = square * (left + chosenA.lost + chosenB.lost);
    losses.set(id, { unshared, shared });
    total.unshared += unshared;
    total.shared += shared;
    saved += A[0]!.bits + B[0]!.bits - chosenA.bits - chosenB.bits;
  }
  const grownBases = encodeSpans(spans, grown(total.unshared, total.shared));
  // Steps so large that nothing would be left of some stay as they are.
  const made = (which: "A" | "B"): SideBasis[] =>
    used[which].map((i) => (grownBases[which][i]!.components > 0 ? grownBases : bases)[which][i]!);
  const choice = (which: "A" | "B", task: number): SideChoice => {
    const { basis, residual } = chosen[which][task]!;
    return basis === undefined ? { residual } : { basis: used[which].indexOf(basis), residual };
  };
  return {
    bases: { A: made("A"), B: made("B") },
    choices: new Map(costs.map(({ id }, i) => [id, { A: choice("A", i), B: choice("B", i) }])),
    bits,
    saved,
    losses,
  };
}

function usedOf(chosen: readonly SideChoice[]): number[] {
  return [...new Set(chosen.flatMap(({ basis }) => basis ?? []))].sort((a, b) => a - b);
}

/** Takes `most` items where there are more, spread evenly. */
export function spread<T>(all: readonly T[], most: number): readonly T[] {
  if (all.length <= most) return all;
  return Array.from({ length: most }, (_, i) => all[Math.floor((i * all.length) / most)]!);
}

/** The share of what a side costs its tasks that components must save. */
const WORTH = 0.05;

/** Choices of all tasks for one factor, among components that save more than they take. */
function paying(costs: readonly (readonly SideCost[])[], bases: Spans["bases"]["A"]): SideCost[] {
  const useful = new Set(bases.keys());
  for (;;) {
    const chosen = costs.map((all) =>
      all.reduce((best, cost) => (useful.has(cost.basis ?? -1) && costOf(cost) < costOf(best) ? cost : best)),
    );
    const idle = [...useful].filter((basis) => {
      let saved = 0;
      let unshared = 0;
      for (const [i, cost] of chosen.entries()) {
        if (cost.basis !== basis) continue;
        const alone = costOf(costs[i]![0]!);
        saved += alone - costOf(cost);
        unshared += alone;
      }
      const { components, bits } = bases[basis]!;
      return components === 0 || saved - bits <= WORTH * unshared;
    });
    if (idle.length === 0) return chosen;
    for (const basis of idle) useful.delete(basis);
  }
}

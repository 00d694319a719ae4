/**
 * The smallest pack for a goal, or the best of a size: packs are made in several ways, and shown to a judge where there is one.
 * It knows no model and no data.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { checkArgument, checkChoice, checkOptions } from "../arguments.ts";
import { openPack, type Pack } from "../core/pack.ts";
import type { AdapterError } from "../errors.ts";
import { type Allocation, byTask, type Spectrum } from "../extract/allocation.ts";
import type { ComponentSelection } from "../extract/options.ts";
import { throwIfAborted } from "../pace.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { ROUND } from "../work.ts";
import { DEFAULT_ERROR, type Survey, survey, withinBytes, withinError } from "./allocate.ts";
import {
  type Built,
  Draft,
  EXTRACTING,
  gathered,
  type Seek,
  type Streamed,
  withExtractor,
  write,
  writeApart,
} from "./build.ts";
import { type Adapters, encode, isUnstorable, openAdapters, partOf } from "./encode.ts";
import { type BuildOptions, MOST_STEP, type Recipe, recipeOf } from "./recipe.ts";
import type { BuildReport, TaskLoss } from "./report.ts";
import { grow, lowestPassing, partition, refine, type Steps, startSteps, stepsWithin, Unreachable } from "./seek.ts";
import { findSharing } from "./sharing.ts";
import { stepsOf } from "./tasks.ts";
import type { Scratch } from "./write.ts";

/** The pack that was chosen, what it was chosen by, and what else was tried. */
export interface SearchReport extends BuildReport, Omit<Tried, "bytes" | "error" | "reason" | "least"> {
  readonly judgedBy: "error" | "score";
  /** Scores that were compared with. */
  readonly reference?: ReadonlyMap<string, number> | undefined;
  /** All that was tried, in order; without the pack that gave the reference. */
  readonly tried: readonly Tried[];
  /** What was decided, a sentence each. */
  readonly decisions: readonly string[];
}

/** A pack that was judged. */
interface Candidate {
  readonly tried: Tried;
  /** Packs that were judged by scores are made again rather than kept, since they may be large and there is one of each asked. */
  built(): Promise<Streamed>;
}

/** The share of what is left that reading spectra takes. */
const SURVEY = 0.15;

/** What all steps of one search share. */
interface Search extends Lent, Pick<SearchOptions, "judge" | "ladder" | "signal"> {
  readonly goal: Goal;
  readonly ids: readonly string[];
  /** Scores to compare with. */
  readonly reference?: ReadonlyMap<string, number>;
  note(tried: Tried): void;
  /** What ways were left for. */
  readonly unstorable: AdapterError[];
}

/**
 * Makes packs until one keeps to the goal and none of the others is better: the smallest, or with a budget of bytes the one that
 * loses least.
 *
 * Scores are noisy and need not rise with the number of components. Three rules follow. What is chosen was itself asked and passed;
 * nothing is interpolated. It counts as passed only if the next larger number of components passes too, so that a lucky score alone
 * decides nothing. And a way whose largest pack fails is left: with `keep: "every"` and few rows a task that can be bad luck; ask more
 * rows, allow more, or keep the mean. The judge is called about log2(ladder) + 2 times for the first way, once for each way that
 * cannot do better, and once for the reference.
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
  const own = options.judge === undefined ? scratch : undefined;
  return withExtractor("searchPack", options.workers, async (extractor) =>
    searchWith(await openAdapters("searchPack", adapters, options, extractor), { ...options, goal }, own),
  );
}

/** The best pack of at most `max` bytes with these options: of as many components on every side as there is room for. @throws Unreachable */
export async function buildWithin(adapters: readonly Adapter[], options: BuildOptions, max: number): Promise<Streamed> {
  return withExtractor("buildPack", options.workers, async (extractor) => {
    const opened = await openAdapters("buildPack", adapters, options, extractor);
    const lent: Lent = { opened, survey: (from) => survey(partOf(from, SURVEY), undefined) };
    const built = await kindOf(options).within(lent, options, max);
    opened.meter.reach(1);
    return built;
  });
}

async function searchWith(
  opened: Adapters,
  { goal, ways, onTry, ...options }: SearchOptions & { readonly goal: Goal },
  scratch: Scratch | undefined,
): Promise<Streamed<SearchReport>> {
  const { adapters } = opened;
  const { dtype = {} } = options;
  const tried: Tried[] = [];
  const decisions: string[] = [];
  let best: Candidate | undefined;
  let found: Promise<Survey> | undefined;
  const start: Search = {
    ...options,
    opened,
    scratch,
    goal,
    ids: adapters.map(({ id }) => id),
    note(one) {
      tried.push(one);
      onTry?.(one);
    },
    unstorable: [],
    survey: (from) => (found ??= survey(partOf(from, SURVEY), dtype.coefficients && [dtype.coefficients])),
  };
  const search = goal.kind === "score" ? { ...start, reference: await referenceOf(start, goal) } : start;
  const all = ways ?? (goal.kind === "score" ? scoredWays(dtype) : defaultWays(search, goal, decisions));
  for (const [i, way] of all.entries()) {
    if (way.fallback && best) continue;
    const left = all.slice(i).reduce((sum, one) => sum + costOf(one), 0);
    const lent = { ...search, opened: partOf(opened, costOf(way) / left || 1) };
    const made = await attempt(lent, way, best?.tried.bytes);
    if (made && !(best && !better(made.tried, best.tried, goal))) best = made;
  }
  if (!best) throw search.unstorable[0] ?? outOfReach(goal, tried);
  const { chunks, report } = await best.built();
  opened.meter.reach(1);
  const { bytes, error, ...chosen } = best.tried;
  const judgedBy = goal.kind === "score" ? "score" : "error";
  return { chunks, report: { ...report, ...chosen, judgedBy, reference: search.reference, tried, decisions } };
}

/** Asks the judge, for a goal of scores. */
async function judged(search: Search, way: Way, built: Streamed, select?: Amount): Promise<Candidate> {
  const { goal, reference } = search;
  const { bytes, errors } = built.report;
  const tried: Tried = { name: nameOf(way), way, select, bytes, error: mean(errors.map(({ total }) => total)) };
  if (goal.kind !== "score") return { tried, built: async () => built };
  const scores = await ask(search, built);
  const losses = [...reference!].map(([id, score]) => score - scores.get(id)!);
  const loss = goal.keep === "mean" ? mean(losses) : Math.max(...losses);
  const passes = loss <= goal.tolerance;
  return { tried: { ...tried, scores, loss, passes }, built: () => kindOf(way).make(search, way, select!) };
}

async function ask({ ids, judge, signal }: Search, built: Streamed): Promise<Map<string, number>> {
  throwIfAborted(signal);
  const { chunks } = await gathered(built);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  try {
    return figuresOf(await judge!(pack, ids), ids, "judge");
  } finally {
    await pack.close();
  }
}

async function referenceOf(
  search: Search,
  { reference }: Goal & { kind: "score" },
): Promise<ReadonlyMap<string, number>> {
  if (reference) return figuresOf(reference, search.ids, "reference");
  const way = { dtype: allOf("f32") };
  return ask(search, await kindOf(way).make(search, way, { kind: "energy", share: 1 }));
}

/** One way at its best; undefined where it does not reach the goal, or cannot store an adapter, which is noted. */
async function attempt(search: Search, way: Way, smallest: number = Infinity): Promise<Candidate | undefined> {
  const { goal, note } = search;
  try {
    if (goal.kind === "score") return await seekScore(search, way, smallest);
    const kind = kindOf(way);
    const built = await (goal.kind === "error" ? kind.make(search, way, goal) : kind.within(search, way, goal.max));
    const made = await judged(search, way, built);
    note(made.tried);
    return made;
  } catch (error) {
    if (isUnstorable(error)) search.unstorable.push(error);
    else if (!(error instanceof Unreachable)) throw error;
    const least = error instanceof Unreachable ? error.least : undefined;
    note({ name: nameOf(way), way, reason: error.message, least });
    return undefined;
  }
}

/** The smallest pack of a way that passes together with the next larger one, and is smaller than `smallest` bytes. */
async function seekScore(search: Search, way: Way, smallest: number): Promise<Candidate | undefined> {
  const { adapters } = search.opened;
  const kind = kindOf(way);
  const make = (rung: number): Promise<Streamed> => kind.make(trying(search), way, ladder[rung]!);
  const ladder = kind.ladder(adapters, way, search.ladder);
  const asked = new Map<number, Candidate>();
  const passes = async (rung: number): Promise<boolean> => {
    const known = asked.get(rung) ?? (await judged(search, way, await make(rung), ladder[rung]!));
    if (!asked.has(rung)) search.note(known.tried);
    asked.set(rung, known);
    return known.tried.passes!;
  };
  // Packs are made to know their size, which costs little beside asking them.
  const large = async (rung: number): Promise<boolean> => (await make(rung)).report.bytes >= smallest;
  const smaller = smallest === Infinity ? ladder.length : await partition(ladder.length, large);
  const found = await lowestPassing(ladder.length, smaller, passes);
  return found === undefined ? undefined : asked.get(found);
}

function mean(figures: readonly number[]): number {
  return figures.reduce((a, b) => a + b, 0) / figures.length;
}

// What a search for packs is told, and how two packs compare.

/** A figure of each task, by id. */
export type PerTask = ReadonlyMap<string, number> | Readonly<Record<string, number>>;

/** How much is stored: components, or what an error takes of private terms. */
export type Amount = ComponentSelection | { readonly kind: "error"; readonly max: number };

/** What a pack must keep to. */
export type Goal =
  /** The best pack of at most so many bytes. */
  | { readonly kind: "bytes"; readonly max: number }
  /**
   * The smallest pack with ‖ΔW − ΔW'‖ / ‖ΔW‖ of every task, over all its modules, at most `max`. Ways whose components grow take none.
   */
  | { readonly kind: "error"; readonly max: number }
  /** The smallest pack that keeps the scores that `judge` gives. */
  | {
      readonly kind: "score";
      /** What a score may lose, in its own unit: 0.01 is a point of accuracy. */
      readonly tolerance: number;
      /** What may lose no more than that: the score of every task, or their mean. Default: "every". */
      readonly keep?: "every" | "mean";
      /** Scores to compare with, for instance of the adapters themselves. Default: those of a pack that loses nothing. */
      readonly reference?: PerTask;
    };

/**
 * The score of each task of an open pack, larger is better. Called for one pack at a time. The pack is closed afterwards, so close sessions
 * on it first. Ask the same rows in the same way each time: scores then differ by what the packs do alone.
 */
export type Judge = (pack: Pack, ids: readonly string[]) => PerTask | Promise<PerTask>;

/** A pack that was made, or a way that does not reach the goal. */
export interface Tried {
  readonly name: string;
  readonly way: Way;
  readonly select?: Amount | undefined;
  /** Undefined where the goal is out of reach. */
  readonly bytes?: number | undefined;
  /** Mean ΔW error. */
  readonly error?: number | undefined;
  readonly scores?: ReadonlyMap<string, number> | undefined;
  /** Reference − score: the largest of the tasks, or of the means. */
  readonly loss?: number | undefined;
  /** Whether `loss` is within the tolerance. */
  readonly passes?: boolean | undefined;
  /** Why there is no pack. */
  readonly reason?: string | undefined;
  /** The bytes of the smallest pack of this way, where those allowed are too few. */
  readonly least?: number | undefined;
}

/** What is sought, who judges, and where to look. */
export interface SearchOptions
  extends Pick<BuildOptions, "dtype" | "centering" | "normalize" | "base" | "anyBase" | "workers" | "onProgress"> {
  /** Default: an error of at most 0.15 (`DEFAULT_ERROR`). */
  readonly goal?: Goal | undefined;
  /** Gives the scores that a goal of scores is about. Other goals take none: the mean ΔW error decides there, which is a proxy. */
  readonly judge?: Judge | undefined;
  /**
   * Where to look. With a score the one that is likely best comes first: of the others only packs smaller than the best so far are
   * made. Default: for a score column mode in int4, int8 and f16; otherwise private terms alone, and beside shared components where
   * those save bytes.
   */
  readonly ways?: readonly Way[];
  /** Numbers of components to look among for a score, from few to many. Default: from 1 to all in steps of a fifth to a half. */
  readonly ladder?: readonly Amount[];
  /** Called when a way has been tried; with a score after each pack that was judged. */
  readonly onTry?: (tried: Tried) => void;
  readonly signal?: AbortSignal | undefined;
}

const OPTIONS = [
  "goal",
  "judge",
  "ways",
  "ladder",
  "onTry",
  "dtype",
  "centering",
  "normalize",
  "base",
  "anyBase",
  "workers",
  "onProgress",
  "signal",
] as const;

/** @throws RangeError for options that do not go together; TypeError for one that is not known */
function checkSearch(options: SearchOptions & { goal: Goal }): void {
  checkOptions("searchPack", options, OPTIONS);
  const { goal, judge, ways, ladder } = options;
  checkArgument("searchPack: goal", goal, 'a goal, such as { kind: "bytes", max: 300_000 }', "kind");
  checkChoice("goal.kind", goal.kind, ["bytes", "error", "score"]);
  const refuse = (message: string): RangeError => new RangeError(`searchPack: ${message}`);
  if (goal.kind === "score" && !(goal.tolerance >= 0))
    throw refuse(`tolerance must be 0 or more, got ${goal.tolerance}`);
  if (goal.kind !== "score" && !(goal.max > 0))
    throw refuse(`${goal.kind}: expected a number above 0, got ${goal.max}`);
  if ((goal.kind === "score") !== (judge !== undefined))
    throw refuse(judge ? `a judge is for a goal of scores, not for ${goal.kind}` : "a score needs a judge");
  if (ways?.length === 0 || ladder?.length === 0) throw refuse("ways and ladder must not be empty");
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

/** Whether the goal prefers one pack to another. */
function better(one: Tried, other: Tried, { kind }: Goal): boolean {
  const cost = ({ bytes = Infinity, error = Infinity, loss = error }: Tried): [number, number] =>
    kind === "bytes" ? [loss, bytes] : [bytes, loss];
  const [a, b] = [cost(one), cost(other)];
  return a[0] !== b[0] ? a[0] < b[0] : a[1] < b[1];
}

/** Why nothing was found, and the least that can be done. */
function outOfReach(goal: Goal, tried: readonly Tried[]): RangeError {
  const [first] = tried;
  if (first?.reason !== undefined && tried.length === 1) return new Unreachable(first.reason, first);
  const losses = tried.flatMap(({ loss }) => loss ?? []);
  if (goal.kind === "score" && losses.length > 0) {
    const whose = goal.keep === "mean" ? "the mean" : "every task";
    return new RangeError(
      `searchPack: no pack keeps the score of ${whose} within ${goal.tolerance} with the next larger one; the least loss of ` +
        `${losses.length} packs is ${Math.min(...losses).toPrecision(3)}: allow more, ask more rows, or give ways that lose less`,
    );
  }
  const least = tried
    .flatMap(({ name, least }) => (least ? [{ name, least }] : []))
    .sort((a, b) => a.least - b.least)[0];
  const closest = least ? `The least is ${least.least} bytes (${least.name})` : `${first?.name}: ${first?.reason}`;
  const asked = goal.kind === "score" ? goal.tolerance : goal.max;
  return new Unreachable(`${goal.kind} ${asked}: out of reach of every way of packing. ${closest}`, least);
}

// Ways of packing: everything that a search varies but how much is stored. Each is of a kind (`KINDS`), which makes its packs; a new kind
// is added here and nowhere else.

/** A way of packing. Its bytes grow with one number: of components, or of private terms. */
export interface Way extends Omit<BuildOptions, "select" | "base" | "anyBase" | "workers" | "onProgress" | "signal"> {
  /** Its name in reports. Default: what sets it apart. */
  readonly name?: string;
  /**
   * What grows with its bytes. "terms": private terms, as many and in as many bits as each task and module is worth. "steps": steps get
   * finer, every number has as many bits as it is worth, and what tasks share of a side is stored once where that saves bytes. Both in
   * gauge "balanced". Default: components.
   */
  readonly grows?: "terms" | "steps";
  /** It is tried only if none before it reached the goal. Default: false. */
  readonly fallback?: boolean;
}

/** What a search lends to ways of packing. */
interface Lent extends Pick<BuildOptions, "dtype" | "centering" | "normalize"> {
  readonly opened: Adapters;
  /** Takes blobs of the pack that is wanted. Default: memory. */
  readonly scratch?: Scratch | undefined;
  /** What private terms are to hold. @param opened the adapters of the search, with what is told of them by now */
  survey(opened: Adapters): Promise<Survey>;
}

/** Lends the next share of the work to one of the packs that are made to find the best. @param share of what is left to do */
function trying<L extends Lent>(lent: L, share: number = ROUND): L {
  return { ...lent, opened: partOf(lent.opened, share) };
}

/** How long a way takes, with private terms alone as 1, where a search has several; fallbacks are seldom needed. */
function costOf({ grows, fallback }: Way): number {
  return fallback ? 0 : grows === "steps" ? 8 : 1;
}

/** A kind of way: how packs of it are made, and what their bytes grow with. */
interface Kind {
  is(way: Way): boolean;
  nameOf(way: Way): string;
  /** Amounts to show to a judge of scores. @param given what the search says of it */
  ladder(adapters: readonly Adapter[], way: Way, given: readonly Amount[] | undefined): readonly Amount[];
  /** @throws Unreachable */
  make(lent: Lent, way: Way, amount: Amount): Promise<Streamed>;
  /** The best pack of at most `max` bytes. @throws Unreachable */
  within(lent: Lent, way: Way, max: number): Promise<Streamed>;
}

const sizeOf = ({ report: { bytes } }: Streamed): number => bytes;

/** A recipe's options of a way. */
function optionsOf({ name, fallback, grows, ...options }: Way): BuildOptions {
  return options;
}

/** Components grow. */
const COMPONENTS: Kind = {
  is: () => true,
  nameOf: ({ mode = "column", gauge = "as-trained", rank, step, dtype }) =>
    [mode, gauge, rank && `rank ${rank}`, step ? `step ${step}` : dtype?.basis].filter(Boolean).join(", "),
  ladder: (adapters, way, given) => given ?? ladderOf(mostComponents(adapters, way)),
  make(lent, way, select) {
    if (select.kind === "error") throw new Unreachable("components are sought for a size or a score, not for an error");
    return plainPack(lent, { ...lentOptions(lent), ...optionsOf(way), select });
  },
  within(lent, way, max) {
    const made = (k: number): Promise<Streamed> => this.make(trying(lent), way, { kind: "k", k });
    return grow(made, sizeOf, max, mostComponents(lent.opened.adapters, way));
  },
};

const MOST_COMPONENTS = 65_535;

function mostComponents(adapters: readonly Adapter[], { mode, centering, rank: kept = Infinity }: Way): number {
  const modules = adapters.flatMap((adapter) => [...adapter.modules.values()]);
  if (mode === "flat") return Math.max(1, adapters.length - (centering === "none" ? 0 : 1));
  const rows = new Map<string, number>();
  for (const { name, rank } of modules) rows.set(name, (rows.get(name) ?? 0) + Math.min(rank, kept));
  const least = modules.map((module) => Math.min(rows.get(module.name)!, Math.max(module.in, module.out)));
  return least.reduce((most, count) => Math.min(MOST_COMPONENTS, Math.max(most, count)), 0);
}

function lentOptions({ dtype, centering, normalize }: Lent): BuildOptions {
  return { dtype, centering, normalize };
}

/** The pack of a recipe, at once. @throws Unreachable for one that cannot be made */
async function plainPack({ opened }: Lent, options: BuildOptions): Promise<Streamed> {
  try {
    const recipe = recipeOf(opened.adapters, options);
    return await write(opened, recipe, await encode(partOf(opened, EXTRACTING), recipe));
  } catch (cause) {
    throw cause instanceof RangeError ? new Unreachable(cause.message, { cause }) : cause;
  }
}

/** Errors that are tried where scores decide how much private terms hold. */
const ERRORS: readonly Amount[] = Array.from({ length: 12 }, (_, i) => ({
  kind: "error",
  max: 0.6 * 0.75 ** i,
}));

/** Private terms grow, in the number formats that each task and module is worth. */
const ALLOCATED: Kind = {
  is: ({ grows }) => grows === "terms",
  nameOf: () => "private terms alone",
  ladder: () => ERRORS,
  async make(lent, way, amount) {
    if (amount.kind !== "error")
      throw new Unreachable(`private terms are allocated for an error or a size, not for ${amount.kind}`);
    const { found, draft } = await allocating(lent, way, Math.min(1, amount.max));
    const encoded = (privateTerms: Allocation): Promise<readonly TaskLoss[]> => draft.encode({ privateTerms });
    await withinError(found, amount.max, encoded, (losses) => losses);
    await lent.opened.extractor.rest();
    return draft.write(lent.scratch);
  },
  async within(lent, way, max) {
    const { found, draft } = await allocating(lent, way);
    return withinBytes(found, max, async (privateTerms) => {
      await draft.encode({ privateTerms });
      return draft.write();
    });
  },
};

/** @param error that the pack's tasks keep to, and those added later */
async function allocating(lent: Lent, way: Way, error?: number): Promise<{ found: Survey; draft: Draft }> {
  const found = await lent.survey(lent.opened);
  const options: BuildOptions = {
    ...optionsOf(way),
    dtype: { ...way.dtype, ...lent.dtype },
    select: { kind: "k", k: 0 },
  };
  return { found, draft: new Draft(lent.opened, { ...recipeOf(lent.opened.adapters, options), error }) };
}

/** Steps get finer: every number has as many bits as it is worth, and what is shared is stored once. */
const CODED: Kind = {
  is: ({ grows }) => grows === "steps",
  nameOf: () => "each side shared where that pays, coded",
  ladder: (_, __, given) => given ?? ladderOf(STEPS),
  async make(lent, way, amount) {
    if (amount.kind === "error") return codedWithin(lent, way, amount.max);
    if (amount.kind !== "k") throw new Unreachable(`steps are sought for an error or a size, not for ${amount.kind}`);
    const { opened } = lent;
    // Each step is a thirty-second of an octave finer than the one before.
    const step = 2 ** (-amount.k / 32);
    const recipe = recipeOf(opened.adapters, codedOptions({ ...lentOptions(lent), ...optionsOf(way) }, step));
    const { spectra } = await lent.survey(opened);
    const { sides } = await findSharing(partOf(opened, SHARING), spectra, await stepsOf(opened.adapters, step));
    const whole = { ...recipe, sides };
    return write(opened, whole, await encode(partOf(opened, EXTRACTING), whole));
  },
  async within(lent, way, max) {
    const made = (k: number): Promise<Streamed> => this.make(trying(lent, 0.15), way, { kind: "k", k });
    const finest = await refine(made, sizeOf, max, STEPS);
    // A step so coarse that nothing is left of a task.
    const idle = finest.report.errors.find(({ total }) => total >= 1);
    if (idle) throw new Unreachable(`${max} bytes are too few: "${idle.id}" would do nothing`);
    return finest;
  },
};

/** Steps that are tried, from coarse to fine. */
const STEPS = 384;
/** The share of what is left that finding out what is shared takes. */
const SHARING = 0.4;
/** Private terms that a step may find worth their bytes. */
const MOST_PRIVATE = 255;

/** Options of a coded pack without components of all tasks. */
export function codedOptions(options: BuildOptions, step: number): BuildOptions {
  return { ...options, normalize: undefined, step, privateTerms: MOST_PRIVATE, select: { kind: "k", k: 0 } };
}

/** How far steps of earlier adapters move the first ones of later adapters, at most. */
const MOST_MOVED = 1.25;

/** The coded pack with the coarsest steps that keep every task within an error. @throws Unreachable */
async function codedWithin({ opened, dtype, scratch, survey }: Lent, way: Way, error: number): Promise<Streamed> {
  const { spectra } = await survey(opened);
  const { sides, steps: start } = await findSharing(partOf(opened, SHARING), spectra, startSteps(spectra, error), true);
  // What follows takes less at a time, and the pack grows beside it.
  await opened.extractor.rest();
  const options = codedOptions({ dtype, ...optionsOf(way) }, typicalStep(spectra, start));
  const recipe: Recipe = { ...recipeOf(opened.adapters, options), sides, error: Math.min(1, error) };
  // Adapters of one model are alike. Mean of the logarithm of found ÷ expected steps; later adapters begin at what they expect times that.
  let [moved, count] = [0, 0];
  const seek: Seek = async (some, encode) => {
    let last: Steps = new Map();
    const from = (factor: number): Promise<unknown> =>
      stepsWithin(
        new Map(some.map(({ id }) => [id, factor * (start.get(id) ?? 1)])),
        error,
        (steps) => encode((last = steps)),
        (losses) => losses,
      );
    const factor = Math.min(MOST_MOVED, Math.max(1 / MOST_MOVED, Math.exp(moved / (count || 1))));
    await from(factor).catch((failure) => {
      if (factor === 1 || !(failure instanceof Unreachable)) throw failure;
      return from(1);
    });
    for (const [id, step] of last) {
      const expected = start.get(id);
      if (expected === undefined) continue;
      moved += Math.log(step / expected);
      count++;
    }
  };
  return writeApart(opened, recipe, seek, scratch);
}

/** What steps are, in geometric mean, of the norm that ΔW of an adapter's modules typically has. */
function typicalStep(spectra: readonly Spectrum[], steps: ReadonlyMap<string, number>): number {
  const logs = [...byTask(spectra)].flatMap(([task, { own, square }]) =>
    square > 0 ? Math.log(steps.get(task)! / Math.sqrt(square / own.length)) : [],
  );
  return Math.min(MOST_STEP, Math.exp(logs.reduce((a, b) => a + b, 0) / (logs.length || 1)));
}

/** Each way is of the first kind that it is of. */
const KINDS: readonly Kind[] = [ALLOCATED, CODED, COMPONENTS];

function kindOf(way: Way): Kind {
  return KINDS.find((kind) => kind.is(way))!;
}

/** What a way is called in reports. */
function nameOf(way: Way): string {
  return way.name ?? kindOf(way).nameOf(way);
}

/** 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … and the most that there can be. */
function ladderOf(most: number): Amount[] {
  const steps: number[] = [];
  for (let k = 1; k < most; k += Math.max(1, 2 ** (Math.floor(Math.log2(k)) - 2))) steps.push(k);
  return [...steps, most].map((k) => ({ kind: "k", k }));
}

/** One number format for everything. */
function allOf(dtype: Dtype): Dtypes {
  return { basis: dtype, coefficients: dtype, head: dtype };
}

/** Private terms in the number formats that each task and module is worth. */
function allocatedWay(head: Dtype): Way {
  return { gauge: "balanced", grows: "terms", dtype: { ...allOf("int4"), head } };
}

/** Everything entropy-coded. @param head its number format. Default: coded as well */
function codedWay(head?: Dtype): Way {
  return { gauge: "balanced", grows: "steps", ...(head ? { dtype: { head } } : {}) };
}

/** The ways where scores decide. @param fixed number formats that are not to be varied */
function scoredWays(fixed: Partial<Dtypes>): Way[] {
  return (["int4", "int8", "f16"] as const).map((dtype) => ({ dtype: { ...allOf(dtype), ...fixed } }));
}

/**
 * The ways where ΔW errors decide.
 * @param decisions takes what was decided, a sentence each
 */
function defaultWays(
  { opened: { adapters }, dtype = {} }: Pick<Lent, "opened" | "dtype">,
  goal: { readonly kind: "error" | "bytes"; readonly max: number },
  decisions: string[],
): Way[] {
  const exact = goal.kind === "error";
  const head = dtype.head ?? (exact ? headWithin(goal.max) : headFor(adapters, goal.max));
  const coded = dtype.coefficients === undefined;
  if (adapters.some(({ saved }) => saved.some(({ shape }) => shape.length > 1)))
    decisions.push(`heads are stored in ${head}${exact || dtype.head || !coded ? "" : ", where they are not coded"}`);
  const alone = allocatedWay(head);
  if (!coded) return [alone];
  // Within an error integers with a step take fewer bytes wherever they reach it.
  return exact ? [codedWay(head), { ...alone, fallback: true }] : [alone, codedWay(dtype.head)];
}

/** Number format of heads that loses far less than `error` of them. */
function headWithin(error: number): Dtype {
  return error >= 0.01 ? "int8" : error >= 1e-3 ? "f16" : "f32";
}

/** The share of a file's bytes that heads may take in int8. */
const HEADS_SHARE = 0.1;

/** Number format of heads for a file of `max` bytes: int8 where they hardly count. */
function headFor(adapters: readonly Adapter[], max: number): Dtype {
  const matrices = adapters.flatMap(({ saved }) => saved.filter(({ shape }) => shape.length > 1));
  const bytes = matrices.reduce(
    (sum, { shape: [rows = 1, ...rest] }) => sum + rows * rest.reduce((a, b) => a * b, 1),
    0,
  );
  return bytes <= HEADS_SHARE * max ? "int8" : "int4";
}

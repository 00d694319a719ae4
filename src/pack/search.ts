/**
 * The smallest pack for a goal, or the best of a size: packs are made in several ways, and shown to a judge where there is one.
 * It knows no model and no data.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { ComponentSelection } from "../extract/options.ts";
import { grow, lowestPassing, partition, sharpen, Unreachable } from "./bisect.ts";
import { type BuildOptions, type Built, buildPack } from "./build.ts";
import { openPack, type Pack } from "./pack.ts";
import type { BuildReport } from "./report.ts";
import { allOf, limitOf, nameOf, type Way, waysFor } from "./ways.ts";

/** A figure of each task, by id. */
export type PerTask = ReadonlyMap<string, number> | Readonly<Record<string, number>>;

/** What a pack must keep to. */
export type Goal =
  /** The best pack of at most so many bytes. */
  | { readonly kind: "bytes"; readonly max: number }
  /** The smallest pack with ‖ΔW − ΔW'‖ / ‖ΔW‖ of every task and module at most `max`. */
  | { readonly kind: "error"; readonly max: number }
  /** The smallest pack whose mean divergence, as `judge` says, is at most `max`. */
  | { readonly kind: "divergence"; readonly max: number }
  /** The smallest pack that keeps the scores that `judge` gives. */
  | ScoreGoal;

export interface ScoreGoal {
  readonly kind: "score";
  /** What a score may lose, in its own unit: 0.01 is a point of accuracy. */
  readonly tolerance: number;
  /** What may lose no more than that: the score of every task, or their mean. Default: "every". */
  readonly keep?: "every" | "mean";
  /** Scores to compare with, for instance of the adapters themselves. Default: those of a pack that loses nothing. */
  readonly reference?: PerTask;
}

/**
 * What is made of an open pack: for a score the score of each task, larger is better; otherwise how much behaviour differs from the
 * adapters', for each task or as a mean, 0 is alike. Called for one pack at a time. The pack is closed afterwards, so close sessions
 * on it first. Ask the same rows in the same way each time: figures then differ by what the packs do alone.
 */
export type Judge = (pack: Pack, ids: readonly string[]) => number | PerTask | Promise<number | PerTask>;

/** What is sought, who judges, and where to look. */
export interface SearchOptions extends Pick<BuildOptions, "dtype" | "centering" | "normalize" | "base"> {
  readonly goal: Goal;
  /**
   * Decides which of two packs is better. Goals of divergence and score need one; `createJudge` of `eigenlora/distill` makes one of
   * divergence. Default: the mean ΔW error decides, which is a proxy.
   */
  readonly judge?: Judge | undefined;
  /**
   * Where to look. With a score the one that is likely best comes first: of the others only packs smaller than the best so far are
   * made. Default: for a score column mode in int4, int8 and f16; otherwise column mode as trained and balanced with less and less
   * rank, joint and flat mode, private terms beside components and alone, in the number formats that `dtype` leaves open.
   */
  readonly ways?: readonly Way[];
  /** Second moments, as of `buildPack`: where a judge decides, one of the default ways is calibrated by them. */
  readonly moments?: BuildOptions["moments"];
  /** For a score: numbers of components to look among, from few to many. Default: from 1 to all in steps of a fifth to a half. */
  readonly ladder?: readonly ComponentSelection[];
  /** Called when a way has been tried, with a score after each pack that was judged; `done` of the `of` ways have been begun. */
  readonly onTry?: (tried: Tried, done: number, of: number) => void;
  readonly signal?: AbortSignal | undefined;
}

/** A pack that was made, or a way that does not reach the goal. */
export interface Tried {
  readonly name: string;
  readonly way: Way;
  readonly select?: ComponentSelection;
  /** Undefined where the goal is out of reach. */
  readonly bytes?: number;
  /** Mean ΔW error. */
  readonly error?: number;
  /** Mean over the tasks. */
  readonly divergence?: number;
  readonly scores?: ReadonlyMap<string, number>;
  /** Reference − score: the largest of the tasks, or of the means. */
  readonly loss?: number;
  /** Whether `loss` is within the tolerance. */
  readonly passes?: boolean;
  /** Why there is no pack. */
  readonly reason?: string;
  /** The bytes of the smallest pack of this way, where those allowed are too few. */
  readonly least?: number;
}

/** The pack that was chosen, what it was chosen by, and what else was tried. */
export interface SearchReport extends BuildReport, Omit<Tried, "bytes" | "error" | "reason" | "least"> {
  readonly judgedBy: "error" | "divergence" | "score";
  /** Scores that were compared with. */
  readonly reference?: ReadonlyMap<string, number>;
  /** In order; without the pack that gave the reference. */
  readonly tried: readonly Tried[];
}

/** A way at its best. */
interface Candidate {
  readonly tried: Tried;
  /** Packs that were judged by scores are made again rather than kept, since they may be large and there is one of each asked. */
  built(): Promise<Built>;
}

/** What all steps of one search share. */
interface Search extends SearchOptions {
  readonly adapters: readonly Adapter[];
  readonly ids: readonly string[];
  build(way: Way, select: ComponentSelection): Promise<Built>;
  note(tried: Tried): void;
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
export async function searchPack(adapters: readonly Adapter[], options: SearchOptions): Promise<Built<SearchReport>> {
  checkOptions(adapters, options);
  const { goal, judge, moments, dtype = {}, ways } = options;
  const groups =
    ways?.map((way) => [way]) ??
    (goal.kind === "score"
      ? (["int4", "int8", "f16"] as const).map((type): Way[] => [{ dtype: { ...allOf(type), ...dtype } }])
      : waysFor(adapters, dtype, moments, goal.kind === "error"));
  const of = groups.reduce((sum, group) => sum + group.length, 0);
  const tried: Tried[] = [];
  let [best, done]: [Candidate | undefined, number] = [undefined, 0];
  const search = searchOf(adapters, options, (one) => {
    tried.push(one);
    options.onTry?.(one, done, of);
  });
  const reference = goal.kind === "score" ? await referenceOf(search, goal) : undefined;
  for (const group of groups) {
    let before: Candidate | undefined;
    for (const [i, way] of group.entries()) {
      done++;
      const made = await attempt(search, way, () => seek(search, way, reference, best?.tried.bytes));
      if (!made) continue;
      if (!best || better(made.tried, best.tried, goal)) best = made;
      // Once more bits have made it worse, still more bits do too.
      if (before && better(before.tried, made.tried, goal)) {
        done += group.length - 1 - i;
        break;
      }
      before = made;
    }
  }
  if (!best) throw outOfReach(goal, tried);
  const { chunks, report } = await best.built();
  const { bytes: _, error: __, ...chosen } = best.tried;
  const judgedBy = goal.kind === "score" ? "score" : judge ? "divergence" : "error";
  return { chunks, report: { ...report, ...chosen, judgedBy, ...(reference ? { reference } : {}), tried } };
}

/** @throws RangeError for options that do not go together */
function checkOptions(adapters: readonly Adapter[], { goal, judge, moments, ways, ladder }: SearchOptions): void {
  const refuse = (message: string): RangeError => new RangeError(`searchPack: ${message}`);
  if (adapters.length === 0) throw refuse("no adapters");
  if (goal.kind === "score") {
    if (!(goal.tolerance >= 0)) throw refuse(`tolerance must be 0 or more, got ${goal.tolerance}`);
  } else if (!(goal.max > 0)) throw refuse(`${goal.kind}: expected a number above 0, got ${goal.max}`);
  if (!judge && (goal.kind === "divergence" || goal.kind === "score"))
    throw refuse(`a ${goal.kind} needs a judge, a model and text`);
  if (moments && !judge && !ways)
    throw refuse(
      "moments: errors with and without them do not compare; give a judge, or ways with moments of their own",
    );
  if (ways?.length === 0 || ladder?.length === 0) throw refuse("ways and ladder must not be empty");
}

function searchOf(adapters: readonly Adapter[], options: SearchOptions, note: Search["note"]): Search {
  const { dtype, centering, normalize, base, signal } = options;
  const common = { dtype, centering, normalize, base, signal };
  const given = Object.fromEntries(Object.entries(common).filter(([, value]) => value !== undefined));
  return {
    ...options,
    adapters,
    ids: adapters.map(({ id }) => id),
    note,
    async build({ name: _, privateOnly, ...way }, select) {
      const privately = privateOnly && { privateTerms: way.privateTerms ?? limitOf(adapters, { privateOnly }) };
      try {
        return await buildPack(adapters, { ...given, ...way, ...privately, select });
      } catch (cause) {
        throw cause instanceof RangeError ? new Unreachable(cause.message, { cause }) : cause;
      }
    },
  };
}

/** What a way comes to; undefined, and said why, where it does not reach the goal. */
async function attempt<T>({ note }: Search, way: Way, work: () => Promise<T>): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    note({ name: nameOf(way), way, reason: error.message, ...(error.least ? { least: error.least } : {}) });
    return undefined;
  }
}

/** One way at its best. */
async function seek(
  search: Search,
  way: Way,
  reference: ReadonlyMap<string, number> | undefined,
  most: number = Infinity,
): Promise<Candidate | undefined> {
  const { goal } = search;
  if (goal.kind === "score") return seekScore(search, goal, way, reference!, most);
  const made =
    goal.kind === "bytes"
      ? await judged(search, await within(search, way, goal.max))
      : goal.kind === "error"
        ? await judged(search, await search.build(way, goal))
        : await seekDivergence(search, way, goal.max);
  const { built, divergence } = made;
  const { bytes, error } = built.report;
  const tried: Tried = {
    name: nameOf(way),
    way,
    bytes,
    error: error.mean,
    ...(divergence === undefined ? {} : { divergence }),
  };
  search.note(tried);
  return { tried, built: async () => built };
}

/** A pack and what the judge, if any, says of it. */
interface Judged {
  readonly built: Built;
  readonly divergence: number | undefined;
}

async function judged(search: Search, built: Built): Promise<Judged> {
  if (!search.judge) return { built, divergence: undefined };
  const found = await ask(search, search.judge, built);
  if (typeof found === "number") return { built, divergence: found };
  const all = [...figuresOf(found, search.ids, "judge").values()];
  return { built, divergence: all.reduce((a, b) => a + b, 0) / all.length };
}

async function ask({ ids, signal }: Search, judge: Judge, { chunks }: Built): Promise<number | PerTask> {
  signal?.throwIfAborted();
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  try {
    return await judge(pack, ids);
  } finally {
    await pack.close();
  }
}

/** A pack of `n` components on every side, or of `n` private terms of each task where nothing is shared. */
function buildSized(search: Search, way: Way, n: number): Promise<Built> {
  return way.privateOnly
    ? search.build({ ...way, privateTerms: n }, { kind: "k", k: 0 })
    : search.build(way, { kind: "k", k: n });
}

/**
 * The largest pack of one way that is no larger than `max` bytes: of as many components on every side as there is room for, or of
 * those private terms that hold most of their ΔW.
 */
function within(search: Search, way: Way, max: number): Promise<Built> {
  const sizeOf = ({ report: { bytes } }: Built): number => bytes;
  if (way.privateOnly)
    return sharpen((privateShare) => search.build({ ...way, privateShare }, { kind: "k", k: 0 }), sizeOf, max);
  return grow((n) => buildSized(search, way, n), sizeOf, max, limitOf(search.adapters, way));
}

/** Behaviour gets better with more of it, but not with every one more: doubled until it is good, then halved. */
async function seekDivergence(search: Search, way: Way, max: number): Promise<Judged> {
  const most = limitOf(search.adapters, way);
  const build = async (n: number): Promise<Judged> => judged(search, await buildSized(search, way, n));
  let [low, high, found] = [0, 1, await build(1)];
  while (found.divergence! > max) {
    if (high >= most) throw new Unreachable(`a divergence of ${found.divergence!.toPrecision(3)} is the least`);
    [low, high] = [high, Math.min(2 * high, most)];
    found = await build(high);
  }
  while (high - low > Math.max(1, high >> 4)) {
    const middle = (low + high) >> 1;
    const next = await build(middle);
    if (next.divergence! <= max) [high, found] = [middle, next];
    else low = middle;
  }
  return found;
}

/** The smallest pack of a way that passes together with the next larger one, and is smaller than `most` bytes. */
async function seekScore(
  search: Search,
  { tolerance, keep = "every" }: ScoreGoal,
  way: Way,
  reference: ReadonlyMap<string, number>,
  most: number,
): Promise<Candidate | undefined> {
  const { ids, judge, note } = search;
  const ladder = search.ladder ?? ladderOf(limitOf(search.adapters, way));
  const build = (rung: number): Promise<Built> => {
    const select = ladder[rung]!;
    return select.kind === "k" ? buildSized(search, way, select.k) : search.build(way, select);
  };
  const asked = new Map<number, Tried>();
  const passes = async (rung: number): Promise<boolean> => {
    const known = asked.get(rung);
    if (known) return known.passes!;
    const built = await build(rung);
    const { bytes, error } = built.report;
    const scores = figuresOf(await ask(search, judge!, built), ids, "judge");
    const loss = lossOf(scores, reference, keep);
    const select = ladder[rung]!;
    const tried = { name: nameOf(way), way, select, bytes, error: error.mean, scores, loss, passes: loss <= tolerance };
    asked.set(rung, tried);
    note(tried);
    return tried.passes;
  };
  // Packs are made to know their size, which costs little beside asking them.
  const smaller =
    most === Infinity
      ? ladder.length
      : await partition(ladder.length, async (rung) => (await build(rung)).report.bytes >= most);
  const found = await lowestPassing(ladder.length, smaller, passes);
  return found === undefined ? undefined : { tried: asked.get(found)!, built: () => build(found) };
}

/** 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … and the most that there can be. */
function ladderOf(most: number): ComponentSelection[] {
  const steps: number[] = [];
  for (let k = 1; k < most; k += Math.max(1, 2 ** (Math.floor(Math.log2(k)) - 2))) steps.push(k);
  return [...steps, most].map((k) => ({ kind: "k", k }));
}

async function referenceOf(search: Search, { reference }: ScoreGoal): Promise<Map<string, number>> {
  if (reference) return figuresOf(reference, search.ids, "reference");
  const lossless = await search.build({ dtype: allOf("f32") }, { kind: "energy", share: 1 });
  return figuresOf(await ask(search, search.judge!, lossless), search.ids, "judge");
}

function lossOf(scores: ReadonlyMap<string, number>, reference: ReadonlyMap<string, number>, keep: string): number {
  const losses = [...reference].map(([id, score]) => score - scores.get(id)!);
  return keep === "every" ? Math.max(...losses) : losses.reduce((a, b) => a + b, 0) / losses.length;
}

/** @throws TypeError when a task is left out, or has no finite number */
function figuresOf(given: number | PerTask, ids: readonly string[], who: string): Map<string, number> {
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

function better(one: Tried, other: Tried, { kind }: Goal): boolean {
  const cost = ({ bytes = Infinity, loss, divergence, error = Infinity }: Tried): [number, number] => {
    const lost = loss ?? divergence ?? error;
    return kind === "bytes" ? [lost, bytes] : [bytes, lost];
  };
  const [a, b] = [cost(one), cost(other)];
  return a[0] !== b[0] ? a[0] < b[0] : a[1] < b[1];
}

function outOfReach(goal: Goal, tried: readonly Tried[]): RangeError {
  const [first] = tried;
  if (first?.reason !== undefined && tried.length === 1) return new RangeError(first.reason);
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
  return new RangeError(`${goal.kind} ${asked}: out of reach of every way of packing. ${closest}`);
}

/**
 * The smallest pack for a goal, or the best of a size: packs are made in several ways, and shown to a judge where there is one.
 * It knows no model and no data.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { openPack } from "../core/open-pack.ts";
import type { AdapterError } from "../errors.ts";
import type { ComponentSelection } from "../extract/options.ts";
import { throwIfAborted } from "../pace.ts";
import { DEFAULT_ERROR, type Survey, survey } from "./allocate.ts";
import { type Built, gathered, type Streamed, withExtractor } from "./build.ts";
import { type Adapters, isUnstorable, openAdapters, partOf } from "./encode.ts";
import { better, checkSearch, figuresOf, type Goal, outOfReach, type SearchOptions, type Tried } from "./goal.ts";
import type { BuildOptions } from "./recipe.ts";
import type { BuildReport } from "./report.ts";
import { lowestPassing, partition, Unreachable } from "./seek.ts";
import { allOf, costOf, defaultWays, kindOf, type Lent, nameOf, scoredWays, trying, type Way } from "./ways.ts";
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
async function judged(search: Search, way: Way, built: Streamed, select?: ComponentSelection): Promise<Candidate> {
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

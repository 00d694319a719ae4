/**
 * The smallest pack for a goal, or the best of a size: packs are made in several ways, and shown to a judge where there is one.
 * It knows no model and no data.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { openPack } from "../core/open-pack.ts";
import type { AdapterError } from "../errors.ts";
import { allocateBytes, allocateError } from "../extract/allocation.ts";
import type { Extractor } from "../extract/extractor.ts";
import type { ComponentSelection } from "../extract/options.ts";
import { DEFAULT_ERROR, type Shared, type Survey, sharingThatPays, survey, surveyBeside } from "./allocate.ts";
import { grow, lowestPassing, partition, refine, Unreachable } from "./bisect.ts";
import { type Built, buildWith, gathered, type Packed, withExtractor } from "./build.ts";
import type { Scratch } from "./fresh.ts";
import {
  better,
  figuresOf,
  type Goal,
  type Judge,
  outOfReach,
  type PerTask,
  type ScoreGoal,
  type Tried,
} from "./goal.ts";
import { allocatedPack, codedPack } from "./private-packs.ts";
import type { BuildReport } from "./report.ts";
import { checkSearch, type SearchOptions } from "./search-options.ts";
import { isUnstorable } from "./unstorable.ts";
import {
  allOf,
  allocatedWay,
  codedWay,
  headFor,
  headWithin,
  judgedWays,
  ladderOf,
  limitOf,
  nameOf,
  refined,
  type Way,
} from "./ways.ts";

/** The pack that was chosen, what it was chosen by, and what else was tried. */
export interface SearchReport extends BuildReport, Omit<Tried, "bytes" | "error" | "reason" | "least"> {
  readonly judgedBy: "error" | "divergence" | "score";
  /** Scores that were compared with. */
  readonly reference?: ReadonlyMap<string, number> | undefined;
  /** In order; without the pack that gave the reference. */
  readonly tried: readonly Tried[];
  /** What was decided, a sentence each. */
  readonly decisions: readonly string[];
}

/** A pack that was judged. */
interface Candidate {
  readonly tried: Tried;
  /** Packs that were judged by scores are made again rather than kept, since they may be large and there is one of each asked. */
  built(): Promise<Packed>;
}

/** Where packs are until they are written. */
interface Keeping {
  /** As of `buildWith`. */
  readonly held: boolean;
  readonly scratch?: Scratch | undefined;
}

/** What all steps of one search share. */
interface Search extends SearchOptions, Keeping {
  readonly extractor: Extractor;
  readonly goal: Goal;
  readonly adapters: readonly Adapter[];
  readonly ids: readonly string[];
  /** Scores to compare with. */
  readonly reference?: ReadonlyMap<string, number>;
  note(tried: Tried): void;
  /** What ways were left for. */
  readonly unstorable: AdapterError[];
  /** What private terms are to hold, beside shared components or alone. Made once each. */
  survey(shared?: Shared): Promise<Survey>;
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
  const { goal = { kind: "error", max: DEFAULT_ERROR } } = options;
  checkSearch(adapters, { ...options, goal });
  return gathered(await searchFor(adapters, { ...options, goal }, { held: true }));
}

/**
 * `searchPack` for who writes the pack and is done with it: as `buildStreamed` where no judge and no size asks for whole packs.
 * @param scratch for what is made before it can be written. Default: memory
 */
export async function searchStreamed(
  adapters: readonly Adapter[],
  options: SearchOptions,
  scratch?: Scratch,
): Promise<Packed<SearchReport>> {
  const { goal = { kind: "error", max: DEFAULT_ERROR } } = options;
  checkSearch(adapters, { ...options, goal });
  return searchFor(adapters, { ...options, goal }, { held: false, scratch });
}

function searchFor(
  adapters: readonly Adapter[],
  options: SearchOptions & { readonly goal: Goal },
  keeping: Keeping,
): Promise<Packed<SearchReport>> {
  return withExtractor("searchPack", options.workers, (extractor) => searchWith(extractor, adapters, options, keeping));
}

async function searchWith(
  extractor: Extractor,
  adapters: readonly Adapter[],
  { goal, ...options }: SearchOptions & { readonly goal: Goal },
  keeping: Keeping,
): Promise<Packed<SearchReport>> {
  const { judge, moments, dtype = {}, ways } = options;
  const tried: Tried[] = [];
  const decisions: string[] = [];
  let [best, done, of]: [Candidate | undefined, number, number] = [undefined, 0, 0];
  const note = (one: Tried): void => {
    tried.push(one);
    options.onTry?.(one, done, of);
  };
  const surveys = new Map<string, Promise<Survey>>();
  const start: Search = {
    ...options,
    ...keeping,
    extractor,
    goal,
    adapters,
    ids: adapters.map(({ id }) => id),
    note,
    unstorable: [],
    survey(shared) {
      const key = JSON.stringify(shared ?? null);
      if (!surveys.has(key)) surveys.set(key, surveyOf(start, shared));
      return surveys.get(key)!;
    },
  };
  const search = goal.kind === "score" ? { ...start, reference: await referenceOf(start, goal) } : start;
  const groups =
    ways?.map((way) => [way]) ??
    (judge && goal.kind !== "error"
      ? judgedWays(adapters, dtype, moments, goal.kind)
      : await allocatedWays(search, decisions));
  of = groups.flat().length;
  for (const group of groups) {
    let before: Candidate | undefined;
    for (const [i, way] of group.entries()) {
      done++;
      if (way.fallback && best) continue;
      const made = await attempt(search, way, best?.tried.bytes);
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
  if (!best) throw search.unstorable[0] ?? outOfReach(goal, tried);
  const { chunks, report } = await best.built();
  const { bytes: _, error: __, ...chosen } = best.tried;
  const judgedBy = goal.kind === "score" ? "score" : judge ? "divergence" : "error";
  return { chunks, report: { ...report, ...chosen, judgedBy, reference: search.reference, tried, decisions } };
}

async function surveyOf({ extractor, adapters, dtype, signal, survey: own }: Search, shared?: Shared): Promise<Survey> {
  const only = dtype?.coefficients && [dtype.coefficients];
  return shared
    ? surveyBeside(extractor, adapters, await own(), shared, signal)
    : survey(extractor, adapters, { only, signal });
}

/** Private terms alone, and beside shared components where that takes fewer bytes; says which. */
async function allocatedWays(search: Search, decisions: string[]): Promise<Way[][]> {
  const { adapters, goal, dtype = {} } = search;
  if (goal.kind !== "error" && goal.kind !== "bytes") throw new Error("a judge decides about other goals");
  const found = await search.survey();
  const { spectra, only } = found;
  const plan =
    goal.kind === "error" ? allocateError(spectra, () => goal.max, only) : allocateBytes(spectra, goal.max, only);
  const shared = adapters.length > 1 ? await sharingThatPays(search.extractor, adapters, found, plan) : undefined;
  // What follows takes less at a time, and the pack grows beside it.
  await search.extractor.rest();
  const head = dtype.head ?? (goal.kind === "error" ? headWithin(goal.max) : headFor(adapters, goal.max));
  if (shared)
    decisions.push(`${shared.k} components in ${shared.dtype} are shared: of a few modules, that saves bytes`);
  else if (adapters.length > 1)
    decisions.push("nothing is shared: adapters have too little in common for components to pay");
  const matrices = adapters.some(({ saved }) => saved.some(({ shape }) => shape.length > 1));
  const [alone, beside] = [allocatedWay(head), shared ? [[allocatedWay(head, shared)]] : []];
  if (only) {
    if (matrices) decisions.push(`heads are stored in ${head}`);
    return [[alone], ...beside];
  }
  const exact = goal.kind === "error";
  if (matrices) decisions.push(`heads are stored in ${head}${exact || dtype.head ? "" : ", where they are not coded"}`);
  const coded = [0, ...(shared ? [shared.k] : [])].map((k) => [codedWay(exact ? head : dtype.head, k)]);
  // Within an error integers with a step take fewer bytes wherever they reach it.
  return exact ? [...coded, [{ ...alone, fallback: true }], ...beside] : [[alone], ...beside, ...coded];
}

/** Of one way: with so many components, of so fine a step, or private terms for an error. @throws Unreachable */
async function build(search: Search, way: Way, select: ComponentSelection): Promise<Packed> {
  const { name: _, fallback: __, allocateBeside: k, refineBeside: shared, ...options } = way;
  const { extractor, adapters, dtype, centering, normalize, base, anyBase, signal } = search;
  if (k !== undefined) return allocatedPack(search, way, select);
  if (shared !== undefined && select.kind === "error") return codedPack(search, way, select.max);
  const all = { dtype, centering, normalize, base, anyBase, signal, ...options };
  const one = shared !== undefined && select.kind === "k" ? refined(all, shared, select.k) : { ...all, select };
  try {
    return await buildWith((work) => work(extractor), adapters, one);
  } catch (cause) {
    throw cause instanceof RangeError ? new Unreachable(cause.message, { cause }) : cause;
  }
}

/** Asks the judge, if there is one. */
async function judged(search: Search, way: Way, built: Packed, select?: ComponentSelection): Promise<Candidate> {
  const { goal, judge, ids, reference } = search;
  const { bytes, errors } = built.report;
  const tried: Tried = { name: nameOf(way), way, select, bytes, error: mean(errors.map(({ total }) => total)) };
  if (!judge) return { tried, built: async () => built };
  const found = await ask(search, judge, built);
  if (goal.kind !== "score") {
    const divergence = typeof found === "number" ? found : mean([...figuresOf(found, ids, "judge").values()]);
    return { tried: { ...tried, divergence }, built: async () => built };
  }
  const scores = figuresOf(found, ids, "judge");
  const losses = [...reference!].map(([id, score]) => score - scores.get(id)!);
  const loss = goal.keep === "mean" ? mean(losses) : Math.max(...losses);
  const passes = loss <= goal.tolerance;
  return { tried: { ...tried, scores, loss, passes }, built: () => build(search, way, select!) };
}

async function ask({ ids, signal }: Search, judge: Judge, built: Packed): Promise<number | PerTask> {
  signal?.throwIfAborted();
  const { chunks } = await gathered(built);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  try {
    return await judge(pack, ids);
  } finally {
    await pack.close();
  }
}

async function referenceOf(search: Search, { reference }: ScoreGoal): Promise<ReadonlyMap<string, number>> {
  if (reference) return figuresOf(reference, search.ids, "reference");
  const lossless = await build(search, { dtype: allOf("f32") }, { kind: "energy", share: 1 });
  return figuresOf(await ask(search, search.judge!, lossless), search.ids, "judge");
}

/** One way at its best; undefined where it does not reach the goal, or cannot store an adapter, which is noted. */
async function attempt(search: Search, way: Way, smallest: number = Infinity): Promise<Candidate | undefined> {
  const { goal, note } = search;
  try {
    if (goal.kind === "score") return await seekScore(search, way, smallest);
    const made =
      goal.kind === "divergence"
        ? await seekDivergence(search, way, goal.max)
        : await judged(
            search,
            way,
            await (goal.kind === "error" ? build(search, way, goal) : within(search, way, goal.max)),
          );
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

/** The largest pack of one way that is no larger than `max` bytes: of as many components on every side as there is room for. */
async function within(search: Search, way: Way, max: number): Promise<Packed> {
  const sizeOf = ({ report: { bytes } }: Packed): number => bytes;
  if (way.allocateBeside !== undefined) return allocatedPack(search, way, { kind: "bytes", max });
  const made = (k: number): Promise<Packed> => build(search, way, { kind: "k", k });
  const most = limitOf(search.adapters, way);
  if (way.refineBeside === undefined) return grow(made, sizeOf, max, most);
  const finest = await refine(made, sizeOf, max, most);
  // A step so coarse that nothing is left of a task.
  const idle = finest.report.errors.find(({ total }) => total >= 1);
  if (idle) throw new Unreachable(`${max} bytes are too few: "${idle.id}" would do nothing`);
  return finest;
}

/** Errors that are tried where behaviour decides how much private terms hold. */
const ERRORS: readonly ComponentSelection[] = Array.from({ length: 12 }, (_, i) => ({
  kind: "error",
  max: 0.6 * 0.75 ** i,
}));

/** Behaviour gets better with more of it, but not with every one more: doubled until it is good, then halved. */
async function seekDivergence(search: Search, way: Way, max: number): Promise<Candidate> {
  const own = way.allocateBeside !== undefined;
  const most = own ? ERRORS.length : limitOf(search.adapters, way);
  const show = async (k: number): Promise<Candidate> =>
    judged(search, way, await build(search, way, own ? ERRORS[k - 1]! : { kind: "k", k }));
  let [low, high, found] = [0, 1, await show(1)];
  while (found.tried.divergence! > max) {
    if (high >= most) throw new Unreachable(`a divergence of ${found.tried.divergence!.toPrecision(3)} is the least`);
    [low, high] = [high, Math.min(2 * high, most)];
    found = await show(high);
  }
  while (high - low > Math.max(1, high >> 4)) {
    const middle = (low + high) >> 1;
    const next = await show(middle);
    if (next.tried.divergence! <= max) [high, found] = [middle, next];
    else low = middle;
  }
  return found;
}

/** The smallest pack of a way that passes together with the next larger one, and is smaller than `smallest` bytes. */
async function seekScore(search: Search, way: Way, smallest: number): Promise<Candidate | undefined> {
  const own = way.allocateBeside === undefined ? search.ladder : ERRORS;
  const ladder = own ?? ladderOf(limitOf(search.adapters, way));
  const asked = new Map<number, Candidate>();
  const passes = async (rung: number): Promise<boolean> => {
    const select = ladder[rung]!;
    const known = asked.get(rung) ?? (await judged(search, way, await build(search, way, select), select));
    if (!asked.has(rung)) search.note(known.tried);
    asked.set(rung, known);
    return known.tried.passes!;
  };
  // Packs are made to know their size, which costs little beside asking them.
  const large = async (rung: number): Promise<boolean> =>
    (await build(search, way, ladder[rung]!)).report.bytes >= smallest;
  const smaller = smallest === Infinity ? ladder.length : await partition(ladder.length, large);
  const found = await lowestPassing(ladder.length, smaller, passes);
  return found === undefined ? undefined : asked.get(found);
}

function mean(figures: readonly number[]): number {
  return figures.reduce((a, b) => a + b, 0) / figures.length;
}

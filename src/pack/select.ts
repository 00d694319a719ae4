/**
 * The smallest pack whose tasks still behave, as the caller's own scores say: packs are made and shown to a function of the
 * caller's until one is found. It knows no model and no data; ΔW errors play no part in it.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { ComponentSelection } from "../extract/extract.ts";
import type { Dtype } from "../tensor/dtypes.ts";
import { limitOf } from "./auto.ts";
import { type BuildOptions, type BuildReport, buildPack, type Dtypes } from "./build.ts";
import { openPack, type Pack } from "./pack.ts";

/** What a pack is made with, but for the number of components. */
export type Family = Omit<BuildOptions, "select" | "onProgress" | "signal">;

export interface SelectOptions {
  readonly adapters: readonly Adapter[];
  /**
   * Scores of all tasks with this pack, by id; larger is better. Called for one pack at a time. The pack is closed afterwards, so
   * release sessions on it first. Ask the same rows in the same way each time: scores then differ by what the packs do alone.
   */
  readonly validate: (
    pack: Pack,
    ids: readonly string[],
  ) => Promise<ReadonlyMap<string, number> | Readonly<Record<string, number>>>;
  /** What a score may lose, in its own unit: 0.01 is a point of accuracy. */
  readonly tolerance: number;
  /** What may lose no more than that: the score of every task, or their mean. "every" unless given. */
  readonly keep?: "every" | "mean";
  /** Scores by id to compare with, for instance of the adapters themselves. Unless given, those of a pack that loses nothing. */
  readonly reference?: ReadonlyMap<string, number> | Readonly<Record<string, number>>;
  /**
   * Kinds of packs to look among; int4, int8 and f16 throughout unless given. The one that is likely best comes first: of the others
   * only packs smaller than the best so far are made.
   */
  readonly families?: readonly Family[];
  /** Numbers of components to look among, from few to many. From 1 to all in steps of a fifth to a half unless given. */
  readonly ladder?: readonly ComponentSelection[];
  /** Called after each pack that was shown to `validate`. */
  readonly onEvaluation?: (evaluation: Evaluation) => void;
  readonly signal?: AbortSignal;
}

/** One pack and how its tasks did. */
export interface Evaluation {
  readonly family: Family;
  readonly select: ComponentSelection;
  readonly bytes: number;
  readonly scores: ReadonlyMap<string, number>;
  /** Reference − score: the largest of the tasks, or of the means. */
  readonly loss: number;
  /** Whether `loss` is within the tolerance. */
  readonly passes: boolean;
}

/** The pack that was chosen. */
export interface Selected extends Evaluation {
  readonly chunks: Uint8Array[];
  readonly report: BuildReport;
  readonly reference: ReadonlyMap<string, number>;
  /** Every pack that was shown to `validate`, in order; without the one that gave the reference. */
  readonly evaluations: readonly Evaluation[];
}

const typesOf = (type: Dtype): Dtypes => ({ basis: type, coefficients: type, head: type });
const F32: Dtypes = typesOf("f32");
const FAMILIES: readonly Family[] = (["int4", "int8", "f16"] as const).map((type) => ({ dtype: typesOf(type) }));

/**
 * Finds the smallest pack that keeps the scores within a tolerance of their reference, by few calls of `validate`: about
 * log2(ladder) + 2 for the first family, one for each family that cannot do better, and one for the reference.
 *
 * Scores are noisy and need not rise with the number of components. Three rules follow. What is chosen was itself asked and passed;
 * nothing is interpolated. It counts as passed only if the next larger number of components passes too, so that a lucky score alone
 * decides nothing. And a family whose largest pack fails is left: with `keep: "every"` and few rows a task that can be bad luck;
 * ask more rows, allow more, or keep the mean.
 *
 * @throws RangeError when no pack keeps the tolerance, saying what it would have to be
 * @throws TypeError when `validate` or `reference` leaves out a task or gives no finite number
 * @throws AdapterError, RangeError as `buildPack`
 * @example
 * const { chunks, report } = await selectComponents({
 *   adapters,
 *   tolerance: 0.01,
 *   keep: "mean",
 *   async validate(pack, ids) {
 *     const session = await createEigenSession(ort, model, pack);
 *     const scores = new Map();
 *     for (const id of ids) scores.set(id, await accuracy(session, id)); // switchTask(id), run, count
 *     await session.release();
 *     return scores;
 *   },
 * });
 */
export async function selectComponents(options: SelectOptions): Promise<Selected> {
  const { adapters, tolerance, keep = "every", families = FAMILIES, signal } = options;
  if (adapters.length === 0) throw new RangeError("selectComponents: no adapters");
  if (!(tolerance >= 0)) throw new RangeError(`selectComponents: tolerance must be 0 or more, got ${tolerance}`);
  if (families.length === 0 || options.ladder?.length === 0)
    throw new RangeError("selectComponents: families and ladder must not be empty");
  const ids = adapters.map(({ id }) => id);
  const ask = async (chunks: Uint8Array[]): Promise<Map<string, number>> => {
    signal?.throwIfAborted();
    const pack = await openPack(new Blob(chunks as BlobPart[]));
    try {
      return scoresOf(await options.validate(pack, ids), ids, "validate");
    } finally {
      await pack.close();
    }
  };
  const build = (family: Family, select: ComponentSelection): ReturnType<typeof buildPack> =>
    buildPack(adapters, { ...family, select, ...(signal ? { signal } : {}) });
  const reference = options.reference
    ? scoresOf(options.reference, ids, "reference")
    : await ask((await build({ dtype: F32 }, { kind: "energy", share: 1 })).chunks);
  const evaluations: Evaluation[] = [];
  let best: Evaluation | undefined;
  for (const family of families) {
    const ladder = options.ladder ?? ladderOf(adapters, family);
    const asked = new Map<number, Evaluation>();
    const passes = async (rung: number): Promise<boolean> => {
      const known = asked.get(rung);
      if (known) return known.passes;
      const { chunks, report } = await build(family, ladder[rung]!);
      const scores = await ask(chunks);
      const loss = lossOf(scores, reference, keep);
      const evaluation: Evaluation = {
        family,
        select: ladder[rung]!,
        bytes: report.bytes,
        scores,
        loss,
        passes: loss <= tolerance,
      };
      evaluations.push(evaluation);
      asked.set(rung, evaluation);
      options.onEvaluation?.(evaluation);
      return evaluation.passes;
    };
    // Packs are made to know their size, which costs little beside asking them.
    const most: number = best?.bytes ?? Infinity;
    const smaller =
      most === Infinity
        ? ladder.length
        : await partition(ladder.length, async (rung) => (await build(family, ladder[rung]!)).report.bytes >= most);
    const found = await lowestPassing(ladder.length, smaller, passes);
    if (found !== undefined) best = asked.get(found)!;
  }
  if (!best) {
    const least = Math.min(...evaluations.map(({ loss }) => loss));
    const whose = keep === "mean" ? "the mean" : "every task";
    throw new RangeError(
      `selectComponents: no pack keeps the score of ${whose} within ${tolerance} with the next larger one; the least loss of ` +
        `${evaluations.length} packs is ${least.toPrecision(3)}: allow more, ask more rows, or give families that lose less`,
    );
  }
  // Made again rather than kept, since packs may be large and there is one of each asked.
  return { ...best, ...(await build(best.family, best.select)), reference, evaluations };
}

/**
 * The lowest rung below `limit` that passes together with the one above it, if any; there is none above the last of `count`. Takes
 * it that what is above a passing rung mostly passes; where the one right above fails, goes on above both.
 */
export async function lowestPassing(
  count: number,
  limit: number,
  passes: (rung: number) => Promise<boolean>,
): Promise<number | undefined> {
  if (limit === 0 || !(await passes(limit - 1))) return undefined;
  for (let from = 0; from < limit; ) {
    const rung = from + (await partition(limit - 1 - from, (i) => passes(from + i)));
    if (rung + 1 >= count || (await passes(rung + 1))) return rung;
    from = rung + 2;
  }
  return undefined;
}

/** How many of `count` come before the first of which `holds` is true, if it holds for all behind that one too. */
async function partition(count: number, holds: (i: number) => Promise<boolean>): Promise<number> {
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … and the most components that a module can have. */
function ladderOf(adapters: readonly Adapter[], family: Family): ComponentSelection[] {
  const most = limitOf(adapters, family);
  const steps: number[] = [];
  for (let k = 1; k < most; k += Math.max(1, 2 ** (Math.floor(Math.log2(k)) - 2))) steps.push(k);
  return [...steps, most].map((k) => ({ kind: "k", k }));
}

function lossOf(
  scores: ReadonlyMap<string, number>,
  reference: ReadonlyMap<string, number>,
  keep: "every" | "mean",
): number {
  const losses = [...reference].map(([id, score]) => score - scores.get(id)!);
  return keep === "every" ? Math.max(...losses) : losses.reduce((a, b) => a + b, 0) / losses.length;
}

function scoresOf(
  given: ReadonlyMap<string, number> | Readonly<Record<string, number>>,
  ids: readonly string[],
  who: string,
): Map<string, number> {
  const scores = given instanceof Map ? given : new Map(Object.entries(given ?? {}));
  return new Map(
    ids.map((id) => {
      const score: unknown = scores.get(id);
      if (typeof score === "number" && Number.isFinite(score)) return [id, score];
      throw new TypeError(
        `selectComponents: ${who} gives ${String(score)} for task "${id}"; expected a finite number for each of ${ids.length} tasks`,
      );
    }),
  );
}

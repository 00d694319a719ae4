/**
 * What a search for packs is told, and how two packs compare.
 */

import { checkArgument, checkChoice, checkOptions } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import type { ComponentSelection } from "../extract/options.ts";
import type { BuildOptions } from "./recipe.ts";
import { Unreachable } from "./seek.ts";
import type { Way } from "./ways.ts";

/** A figure of each task, by id. */
export type PerTask = ReadonlyMap<string, number> | Readonly<Record<string, number>>;

/** What a pack must keep to. */
export type Goal =
  /** The best pack of at most so many bytes. */
  | { readonly kind: "bytes"; readonly max: number }
  /**
   * The smallest pack with ‖ΔW − ΔW'‖ / ‖ΔW‖ at most `max`: of every task over all its modules; in ways whose components grow, of every
   * module of every task.
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
  readonly select?: ComponentSelection | undefined;
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
  readonly ladder?: readonly ComponentSelection[];
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
export function checkSearch(options: SearchOptions & { goal: Goal }): void {
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
export function figuresOf(given: PerTask, ids: readonly string[], who: string): Map<string, number> {
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
export function better(one: Tried, other: Tried, { kind }: Goal): boolean {
  const cost = ({ bytes = Infinity, error = Infinity, loss = error }: Tried): [number, number] =>
    kind === "bytes" ? [loss, bytes] : [bytes, loss];
  const [a, b] = [cost(one), cost(other)];
  return a[0] !== b[0] ? a[0] < b[0] : a[1] < b[1];
}

/** Why nothing was found, and the least that can be done. */
export function outOfReach(goal: Goal, tried: readonly Tried[]): RangeError {
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

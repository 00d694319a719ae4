/**
 * What a search for packs is told.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapters, refuseBases } from "../adapters/modules.ts";
import { checkArgument, checkChoice, checkOptions } from "../arguments.ts";
import type { ComponentSelection } from "../extract/options.ts";
import type { BuildOptions } from "./build.ts";
import type { Goal, Judge, Tried } from "./goal.ts";
import type { Way } from "./ways.ts";

/** What is sought, who judges, and where to look. */
export interface SearchOptions
  extends Pick<BuildOptions, "dtype" | "centering" | "normalize" | "base" | "anyBase" | "workers"> {
  /** Default: an error of at most 0.15 (`DEFAULT_ERROR`). */
  readonly goal?: Goal | undefined;
  /**
   * Decides which of two packs is better. Goals of divergence and score need one; `createJudge` of `eigenlora/train` makes one of
   * divergence. Default: the mean ΔW error decides, which is a proxy.
   */
  readonly judge?: Judge | undefined;
  /**
   * Where to look. With a score the one that is likely best comes first: of the others only packs smaller than the best so far are
   * made. Default: without a judge private terms alone, and beside shared components where those save bytes; for a score column mode
   * in int4, int8 and f16; otherwise private terms, column mode as trained and balanced with less and less rank, joint and flat mode,
   * in the number formats that `dtype` leaves open.
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

const OPTIONS = [
  "goal",
  "judge",
  "ways",
  "moments",
  "ladder",
  "onTry",
  "dtype",
  "centering",
  "normalize",
  "base",
  "anyBase",
  "workers",
  "signal",
] as const;

/** @throws RangeError for options that do not go together; TypeError for one that is not known */
export function checkSearch(adapters: readonly Adapter[], options: SearchOptions & { goal: Goal }): void {
  checkOptions("searchPack", options, OPTIONS);
  checkAdapters("searchPack", adapters);
  const { goal, judge, moments, ways, ladder } = options;
  checkArgument("searchPack: goal", goal, 'a goal, such as { kind: "bytes", max: 300_000 }', "kind");
  checkChoice("goal.kind", goal.kind, ["bytes", "error", "divergence", "score"]);
  const refuse = (message: string): RangeError => new RangeError(`searchPack: ${message}`);
  if (adapters.length === 0) throw refuse("no adapters");
  refuseBases(adapters, options.anyBase);
  if (goal.kind === "score" && !(goal.tolerance >= 0))
    throw refuse(`tolerance must be 0 or more, got ${goal.tolerance}`);
  if (goal.kind !== "score" && !(goal.max > 0))
    throw refuse(`${goal.kind}: expected a number above 0, got ${goal.max}`);
  if (!judge && (goal.kind === "divergence" || goal.kind === "score"))
    throw refuse(`a ${goal.kind} needs a judge, a model and text`);
  if (moments && !judge && !ways)
    throw refuse(
      "moments: errors with and without them do not compare; give a judge, or ways with moments of their own",
    );
  if (ways?.length === 0 || ladder?.length === 0) throw refuse("ways and ladder must not be empty");
}

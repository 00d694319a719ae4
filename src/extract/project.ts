/**
 * Adapters on bases that are stored already: their coefficients and what they lose. Extraction ends here for its own tasks, and
 * adapters that come later begin here.
 */
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import type { Term } from "../tensor/term.ts";
import { ROUNDING } from "./components.ts";
import { deltaError, pairError, relative, type SideError } from "./error.ts";
import { alignTo, balance, fewBits, leadingRows, mirror, type Pair, turnTo } from "./gauge.ts";
import { lengthened, type Products } from "./linalg.ts";
import type { ProjectOptions } from "./options.ts";
import { type RowSteps, rowSteps } from "./row-steps.ts";
import {
  expand,
  largestSine,
  lossOf,
  openSubspace,
  rounded,
  type StoredBasis,
  type Subspace,
  solve,
  type Target,
  targetsOf,
} from "./subspace.ts";

/** What one adapter does to one module, its magnitude aside. */
export interface ModuleMember extends Pick<Term, "rank" | "A" | "Bt"> {
  /** Task id. */
  readonly id: string;
}

/** What a task loses in one module. */
export interface ModuleLoss {
  /**
   * ‖ΔW − ΔW'‖ / ‖ΔW‖ with ΔW' as stored; 0 where ΔW is zero. Extraction measures a balanced pair against itself,
   * without the directions that are zero within rounding: below 1e-6 of ‖ΔW‖.
   */
  error: number;
  /** ‖ΔW‖. */
  norm: number;
}

/** The same, and what bounds it. */
export interface BoundedLoss extends ModuleLoss {
  /** (‖B − B'‖·‖A‖ + ‖B'‖·‖A − A'‖) / ‖ΔW‖, an upper bound of `error`. */
  bound: number;
  /** Theorem 1's δ of the task's rows of A: the largest sine between a centred row and the stored span. */
  deltaA: number;
  /** The same of B. */
  deltaB: number;
}

/** A task's coefficients of one module. */
export interface TaskCoefficients {
  /** Rank of the factors: the adapter's, or less where `rank` or the balanced gauge trimmed it; in flat mode the basis's. */
  rank: number;
  /** Encoded [rank, K_A]; in flat mode [1, K_A]. */
  alphaA: Uint8Array;
  /** Encoded [rank, K_B]; in flat mode [1, K_B]. */
  alphaB: Uint8Array;
}

/** One adapter on a basis. */
export interface ProjectedTask extends TaskCoefficients, ModuleLoss {
  id: string;
}

/** Both sides' bases of a module, opened once and used for many adapters. */
export interface ModuleSpace {
  A: Subspace;
  B: Subspace;
}

/** Opens both bases of a module for `projectModule` and `measureModule`. */
export function openModule(basis: { A: StoredBasis; B: StoredBasis }, products?: Products): ModuleSpace {
  return { A: openSubspace(basis.A, products), B: openSubspace(basis.B, products) };
}

/**
 * Brings one more adapter onto a stored basis: its coefficients, and what it loses.
 * @throws RangeError for factors that are not of the basis' widths, of a higher rank than a flat basis has, NaN,
 *   infinity, or too large for the type
 */
export function projectModule(space: ModuleSpace, member: ModuleMember, options: ProjectOptions): ProjectedTask {
  const pair = gauged(toPair(member, rowWidth(space.B), rowWidth(space.A)), space, options);
  const a = targetOf(space.A, pair.A, options.rank);
  const b = targetOf(space.B, pair.Bt, options.rank);
  const steps = options.step === undefined ? undefined : rowSteps(leadingRows(pair, a.kept), options.step);
  return { id: member.id, ...projectTargets(space, a, b, options.coefficientDtype, steps) };
}

/**
 * What a stored task loses against the adapter it was made from.
 * @param task its coefficients, as they lie in the pack
 * @throws RangeError as `projectModule`
 */
export function measureModule(
  space: ModuleSpace,
  member: ModuleMember,
  task: TaskCoefficients,
  options: ProjectOptions,
): BoundedLoss {
  const given = toPair(member, rowWidth(space.B), rowWidth(space.A));
  const pair = gauged(given, space, options);
  const stored = storedPair(space, task, options.coefficientDtype);
  const { difference, norm } = deltaError(given, stored);
  return {
    error: relative(difference, norm),
    norm,
    bound: relative(deltaError(pair, stored).bound, norm),
    deltaA: largestSine(space.A, targetOf(space.A, pair.A, task.rank)),
    deltaB: largestSine(space.B, targetOf(space.B, pair.Bt, task.rank)),
  };
}

/** The shared factors of a task, as stored. */
export function storedPair({ A, B }: ModuleSpace, { rank, alphaA, alphaB }: TaskCoefficients, type: Dtype): Pair {
  const rows = (encoded: Uint8Array, side: Subspace): Float64Array => {
    const count = side.rank === undefined ? rank : 1;
    return expand(side, Float64Array.from(decodeTensor(type, encoded, count, side.components)), count);
  };
  return { rank, A: rows(alphaA, A), Bt: rows(alphaB, B) };
}

/** One adapter on a basis, given its rows. @param steps of the rows' coefficients, if they are integers of such */
export function projectTargets(
  space: ModuleSpace,
  a: Target,
  b: Target,
  type: Dtype,
  steps?: RowSteps,
): TaskCoefficients & ModuleLoss {
  const A = projectSide(space.A, a, type, steps?.A);
  const B = projectSide(space.B, b, type, steps?.Bt);
  const { difference, norm } = pairError(A.loss, B.loss);
  return {
    rank: space.A.rank ?? a.kept,
    alphaA: A.encoded,
    alphaB: B.encoded,
    error: relative(difference, norm),
    norm,
  };
}

function projectSide(
  space: Subspace,
  target: Target,
  type: Dtype,
  steps: Float64Array | undefined,
): { encoded: Uint8Array; loss: SideError } {
  const { components } = space;
  const { encoded, values } = rounded(
    type,
    solve(space, target),
    target.kept,
    components,
    steps,
    space.products.findScale,
  );
  return { encoded, loss: lossOf(space, target, values) };
}

/** Whether rows of unlike length would be rounded to few bits. */
export function mirrors({ gauge, coefficientDtype }: ProjectOptions): boolean {
  return gauge === "balanced" && fewBits(coefficientDtype);
}

/** Largest sine at which a row counts as within the components: far above the rounding of f32, far below any row that was made elsewhere. */
const WITHIN = 1e-4;

/** How far a pair is from components, coefficients and mean as it is: the largest sine; Infinity where its rank is not that of the pack. */
function distanceFrom({ A, B }: ModuleSpace, pair: Pair, most = Infinity): number {
  if (pair.rank > most || (A.rank ?? pair.rank) !== pair.rank) return Infinity;
  return Math.max(largestSine(A, targetOf(A, pair.A)), largestSine(B, targetOf(B, pair.Bt)));
}

/**
 * The pair in the gauge of a pack, along the stored mean where there is one. About a mean, a pair that was trained within the components
 * lies in them in its own gauge alone, and keeps it.
 */
export function gauged(given: Pair, space: ModuleSpace, options: ProjectOptions): Pair {
  const pair = inGauge(given, space, options);
  if (options.gauge !== "balanced" || !(space.A.mean || space.B.mean)) return pair;
  const own = distanceFrom(space, given, options.rank);
  // A task that was packed may lie nearly within as it was, too: about a short mean, or in all the width.
  return own < WITHIN && distanceFrom(space, pair) > Math.max(own, 8 * ROUNDING) ? given : pair;
}

function inGauge(given: Pair, { A, B }: ModuleSpace, options: ProjectOptions): Pair {
  const { gauge, rank } = options;
  const pair = gauge === "balanced" ? balance(given, rowWidth(B), rowWidth(A), A.products) : given;
  const mean = gauge === "balanced" && A.mean && B.mean && { A: A.mean, Bt: B.mean };
  if (A.rank === undefined) {
    if (mean) alignTo(pair, mean);
    if (options.step === undefined && mirrors(options)) {
      mirror(pair.A, [pair.rank], rowWidth(A), rank);
      mirror(pair.Bt, [pair.rank], rowWidth(B), rank);
    }
    return pair;
  }
  const whole = padded(pair, A.rank);
  if (mean) turnTo(whole, mean, rowWidth(B), rowWidth(A));
  return whole;
}

/** Width of a row of a factor. */
function rowWidth({ width, rank = 1 }: Subspace): number {
  return width / rank;
}

/** All rows of one factor, on a basis. */
function targetOf(space: Subspace, factor: Float64Array, most?: number): Target {
  return targetsOf(space, factor, [factor.length / space.width], most)[0]!;
}

/** Appends zero rows, which leave ΔW the same. */
export function padded({ rank, A, Bt }: Pair, to: number): Pair {
  if (rank > to) throw new RangeError(`rank ${rank}, but the flat basis holds whole factors of rank ${to}`);
  return { rank: to, A: lengthened(A, (A.length / rank) * to), Bt: lengthened(Bt, (Bt.length / rank) * to) };
}

/** Pairs of a module's members, one behind the other in memory, so that a stack of them needs no copy. */
export function toPairs(members: readonly ModuleMember[], outputs: number, inputs: number): Pair[] {
  const lengthOf = (side: "A" | "Bt"): number => members.reduce((sum, member) => sum + member[side].length, 0);
  const [A, Bt] = [new Float64Array(lengthOf("A")), new Float64Array(lengthOf("Bt"))];
  let [a, b] = [0, 0];
  return members.map((member) =>
    toPair(member, outputs, inputs, {
      A: A.subarray(a, (a += member.A.length)),
      Bt: Bt.subarray(b, (b += member.Bt.length)),
    }),
  );
}

/** @param to where its values go. Default: new arrays */
export function toPair(member: ModuleMember, outputs: number, inputs: number, to?: Omit<Pair, "rank">): Pair {
  const { id, rank } = member;
  const side = (name: "A" | "Bt", values: Float32Array, width: number): Float64Array => {
    if (!Number.isInteger(rank) || rank < 1 || values.length !== rank * width) {
      throw new RangeError(
        `adapter ${id}: ${name} holds ${values.length} values, expected rank ${rank} times ${width}`,
      );
    }
    const out = to?.[name] ?? new Float64Array(values.length);
    out.set(values);
    // Twenty times the speed of a search, and only NaN and infinity are not 0 when they are taken from themselves.
    let rest = 0;
    for (let i = 0; i < out.length; i++) rest += out[i]! - out[i]!;
    if (rest !== 0) {
      const bad = values.findIndex((value) => !Number.isFinite(value));
      throw new RangeError(`adapter ${id}: value ${bad} of ${name} is ${values[bad]}`);
    }
    return out;
  };
  return { rank, A: side("A", member.A, inputs), Bt: side("Bt", member.Bt, outputs) };
}

/**
 * Adapters on bases as they are stored: coefficients, and what they lose. Extraction ends here for its own tasks, and adapters that come
 * later begin here. Components that were rounded are no longer orthonormal, so coefficients are always solved for, never read off by
 * products.
 *
 * The Cholesky factor L of the components' Gram matrix turns coefficients α into coordinates α·L on an orthonormal
 * basis of the same span, in which the length of a projection is a sum of squares.
 */
import { type Dtype, decodeTensor, encodeTensor, type FindScale, isQuantized } from "../tensor/dtypes.ts";
import type { Term } from "../tensor/term.ts";
import {
  alignTo,
  balance,
  deltaError,
  fewBits,
  leadingRows,
  mirror,
  type Pair,
  pairError,
  type RowSteps,
  relative,
  rowSteps,
  type SideError,
  sideError,
} from "./factors.ts";
import {
  backwardSolve,
  centred,
  cholesky,
  dot,
  forwardSolve,
  lengthened,
  PLAIN,
  type Products,
  ROUNDING,
  rowSquares,
} from "./linalg.ts";

/** One side's basis as it lies in a pack. */
export interface StoredBasis {
  dtype: Dtype;
  /** K. */
  components: number;
  width: number;
  /** Whether a mean follows the components as the last row. */
  mean: boolean;
  /** Encoded tensor [K + (mean ? 1 : 0), width]. */
  encoded: Uint8Array;
}

/** A stored basis, decoded and factored. */
export interface Subspace {
  components: number;
  width: number;
  /** M [width]; undefined where the basis has none. */
  mean: Float64Array | undefined;
  /** E [components, width]. */
  vectors: Float64Array;
  /** L, E·Eᵀ = L·Lᵀ (`cholesky` of linalg.ts: components that depend on earlier ones are left out). */
  factor: Float64Array;
  /** What multiplies the large matrices. */
  products: Products;
}

/** Rows that are to be approximated on a subspace, x = rows − M. */
export interface Target {
  rank: number;
  /** So many rows, the first ones, have coefficients; the rest is left out of what is stored and counts as lost. */
  kept: number;
  /** [rank, width]. */
  values: Float64Array;
  /** ‖x‖² of each row. */
  squares: Float64Array;
  /** x in the orthonormal coordinates [rank, components]. */
  at: Float64Array;
}

/** Decodes and factors a basis. */
export function openSubspace(stored: StoredBasis, products: Products = PLAIN): Subspace {
  const { components, width } = stored;
  const rows = components + (stored.mean ? 1 : 0);
  const values = new Float64Array(decodeTensor(stored.dtype, stored.encoded, rows, width));
  const vectors = values.subarray(0, components * width);
  const mean = stored.mean ? values.subarray(components * width) : undefined;
  const factor = cholesky(products.gram(vectors, components, width), components);
  return { components, width, mean, vectors, factor, products };
}

/**
 * Takes the stacked rows [Σ ranks, width] of tasks as targets, one for each rank. All at once, because one large
 * product costs less than many small ones.
 * @param most rows of a task that have coefficients
 */
export function targetsOf(
  space: Subspace,
  rows: Float64Array,
  ranks: readonly number[],
  most: number = Infinity,
): Target[] {
  const { components, width, mean } = space;
  const total = ranks.reduce((sum, rank) => sum + rank, 0);
  const x = centred(rows, total, width, mean);
  const at = space.products.multiplyTransposed(x, space.vectors, total, components, width);
  forwardSolve(space.factor, components, at, total);
  const squares = rowSquares(x, total, width);
  let from = 0;
  return ranks.map((rank) => {
    const to = from + rank;
    const target = {
      rank,
      kept: Math.min(rank, most),
      values: rows.subarray(from * width, to * width),
      squares: squares.subarray(from, to),
      at: at.subarray(from * components, to * components),
    };
    from = to;
    return target;
  });
}

/** Least squares coefficients [kept, components] of a target on the components as stored, about the mean as stored. */
export function solve({ components, factor }: Subspace, { at, kept }: Pick<Target, "at" | "kept">): Float64Array {
  const out = at.slice(0, kept * components);
  backwardSolve(factor, components, components, out, kept);
  return out;
}

/** Theorem 1's δ: the largest sine of the angle between a row of x and the span; 0 for rows that are the mean. */
export function largestSine({ components, width }: Subspace, { kept, values, squares, at }: Target): number {
  const rows = rowSquares(values, kept, width);
  let largest = 0;
  for (let i = 0; i < kept; i++) {
    if (squares[i]! <= ROUNDING ** 2 * rows[i]!) continue;
    largest = Math.max(largest, 1 - dot(at, i * components, at, i * components, components) / squares[i]!);
  }
  return Math.sqrt(largest);
}

/** Loss of coefficients α [kept, components] of a target. Rows without coefficients lose themselves, mean and all. */
export function lossOf(space: Subspace, { rank, kept, values }: Target, coefficients: Float64Array): SideError {
  const stored = lengthened(expand(space, coefficients, kept), values.length);
  return sideError(values, stored, rank, space.width, space.products);
}

/** α·E + M: the rows [rank, width] that coefficients [rank, components] stand for. */
export function expand(space: Subspace, coefficients: Float64Array, rank: number): Float64Array {
  const { components, width, mean } = space;
  const rows = space.products.multiply(coefficients, space.vectors, rank, width, components);
  if (mean) for (let i = 0; i < rows.length; i++) rows[i]! += mean[i % width]!;
  return rows;
}

/** Encodes values [rows, width] as a tensor of `type`, and decodes them again. @param steps as of `encodeTensor`, as `find` */
export function rounded(
  type: Dtype,
  values: Float64Array,
  rows: number,
  width: number,
  steps?: ArrayLike<number>,
  find?: FindScale,
): { encoded: Uint8Array<ArrayBuffer>; values: Float64Array } {
  if (!isQuantized(type)) {
    const encoded = encodeTensor(type, values, rows, width);
    return { encoded, values: new Float64Array(decodeTensor(type, encoded, rows, width)) };
  }
  const seen = new Float64Array(rows * width);
  return { encoded: encodeTensor(type, values, rows, width, steps, find, seen), values: seen };
}

/** Whether factors are taken as they come or rewritten as B = U·√S, A = √S·Vᵀ first. */
export type Gauge = "as-trained" | "balanced";

/** How an adapter is brought onto a basis. */
export interface ProjectOptions {
  readonly gauge: Gauge;
  /** The most rows that a task keeps of each module, its strongest directions: balanced gauge only. Default: all. */
  readonly rank?: number | undefined;
  readonly coefficientDtype: Dtype;
  /** Quantisation step: the change of ΔW from one integer of a coefficient to the next. Default: as `coefficientDtype` says. */
  readonly step?: number | undefined;
}

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
  /** Rank of the factors: the adapter's, or less where `rank` or the balanced gauge trimmed it. */
  rank: number;
  /** Encoded [rank, K_A]. */
  alphaA: Uint8Array;
  /** Encoded [rank, K_B]. */
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
 * @throws RangeError for factors that are not of the basis' widths, NaN, infinity, or too large for the type
 */
export function projectModule(space: ModuleSpace, member: ModuleMember, options: ProjectOptions): ProjectedTask {
  const pair = gauged(toPair(member, space.B.width, space.A.width), space, options);
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
  const given = toPair(member, space.B.width, space.A.width);
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
  const rows = (encoded: Uint8Array, side: Subspace): Float64Array =>
    expand(side, Float64Array.from(decodeTensor(type, encoded, rank, side.components)), rank);
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
    rank: a.kept,
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
  if (pair.rank > most) return Infinity;
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
  if (gauge !== "balanced") return given;
  const pair = balance(given, B.width, A.width, A.products);
  if (A.mean && B.mean) alignTo(pair, { A: A.mean, Bt: B.mean });
  if (options.step === undefined && mirrors(options)) {
    mirror(pair.A, [pair.rank], A.width, rank);
    mirror(pair.Bt, [pair.rank], B.width, rank);
  }
  return pair;
}

/** All rows of one factor, on a basis. */
function targetOf(space: Subspace, factor: Float64Array, most?: number): Target {
  return targetsOf(space, factor, [factor.length / space.width], most)[0]!;
}

/** The factors of a member in f64. @throws RangeError for factors of other widths, NaN and infinity */
export function toPair({ id, rank, A, Bt }: ModuleMember, outputs: number, inputs: number): Pair {
  const side = (name: "A" | "Bt", values: Float32Array, width: number): Float64Array => {
    if (!Number.isInteger(rank) || rank < 1 || values.length !== rank * width)
      throw new RangeError(
        `adapter ${id}: ${name} holds ${values.length} values, expected rank ${rank} times ${width}`,
      );
    const out = Float64Array.from(values);
    // Twenty times the speed of a search, and only NaN and infinity are not 0 when they are taken from themselves.
    let rest = 0;
    for (let i = 0; i < out.length; i++) rest += out[i]! - out[i]!;
    if (rest !== 0) {
      const bad = values.findIndex((value) => !Number.isFinite(value));
      throw new RangeError(`adapter ${id}: value ${bad} of ${name} is ${values[bad]}`);
    }
    return out;
  };
  return { rank, A: side("A", A, inputs), Bt: side("Bt", Bt, outputs) };
}

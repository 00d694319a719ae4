/**
 * Tasks on bases of each side: a side of a module is made of coefficients over one of its bases, of rows of the task's own, or of both:
 * own rows are then what the basis lacks. Bits and loss together decide which it is: bits as the coder counts them, loss at the price
 * that rounding pays for a bit.
 */
import { codedBits } from "../format/encode-coded.ts";
import { storing } from "../tensor/encode.ts";
import { FACTORS } from "../tensor/term.ts";
import { deltaError, relative } from "./error.ts";
import type { ModuleStack } from "./extract.ts";
import { balance, leadingRows, type Pair, pairOf } from "./gauge.ts";
import { addScaled, dot, type Products, rowSquares } from "./linalg.ts";
import type { ModuleMember, TaskCoefficients } from "./project.ts";
import { roundedBits, roundedSquare, rowSteps, worthRows } from "./row-steps.ts";
import type { SideBasis } from "./side.ts";
import { expand, openSubspace, rounded, type StoredBasis, type Subspace, solve, targetsOf } from "./subspace.ts";

/** Something of each side of a module. */
export type BySide<T> = Readonly<Record<"A" | "B", T>>;

/** How a task takes one side: over which of its bases, if any, and whether with rows of its own. */
export interface SideChoice {
  readonly basis?: number | undefined;
  readonly own: boolean;
}

/** The choice of a task that shares neither side. */
export const APART: BySide<SideChoice> = { A: { own: true }, B: { own: true } };

/** The components of a module, and how each task takes them, by id. */
export interface SharedSides {
  readonly bases: BySide<readonly SideBasis[]>;
  readonly choices: ReadonlyMap<string, BySide<SideChoice>>;
  /** What the components take, in bits, and how many more the tasks would take without them. */
  readonly bits: number;
  readonly saved: number;
}

/** A task on the bases that it takes. All numbers are int8. */
export interface SidesTask extends TaskCoefficients {
  readonly id: string;
  readonly choice: BySide<SideChoice>;
  /** Rows of its own, [rank, in] and [rank, out]. */
  readonly ownA?: Uint8Array | undefined;
  readonly ownBt?: Uint8Array | undefined;
  /** ‖ΔW − ΔW'‖ / ‖ΔW‖, and ‖ΔW‖, as of `ModuleLoss`. */
  readonly error: number;
  readonly norm: number;
}

/** A way to take one side, and what it costs. */
export interface SideCost extends SideChoice {
  readonly bits: number;
  /** What is lost of ΔW, squared, in units of its step. */
  readonly lost: number;
}

/** What a task costs on the bases of a module: for each side first without any, then the best with each. */
export interface SideCosts extends BySide<readonly SideCost[]> {
  /** Task id. */
  readonly id: string;
  /** What is lost with terms that are not worth their bits, squared, in units of the step. */
  readonly left: number;
}

/** Bits that a loss of one step, squared, is worth: what rounding to steps pays where values are large, 12 / (2 ln 2). */
const PRICE = 8.66;

/** Bits and loss together. */
export function costOf({ bits, lost }: Pick<SideCost, "bits" | "lost">): number {
  return bits + PRICE * lost;
}

/** What a number with this mean square, in steps, costs about: left out, or rounded. */
export function usualCost(square: number): number {
  const size = Math.sqrt(square);
  return Math.min(PRICE * square, roundedBits(size) + PRICE * roundedSquare(size));
}

/** Opens the bases of a module. */
export function openSides({ A, B }: BySide<readonly StoredBasis[]>, products: Products): BySide<readonly Subspace[]> {
  const open = (basis: StoredBasis): Subspace => openSubspace(basis, products);
  return { A: A.map(open), B: B.map(open) };
}

/**
 * A task as it is stored.
 * @param step by how much ΔW changes from one integer to the next
 * @throws UnstorableError
 */
export function takeSides(
  bases: BySide<readonly Subspace[]>,
  { name, out, in: inputs }: Omit<ModuleStack, "members">,
  member: ModuleMember,
  choice: BySide<SideChoice>,
  step: number,
  products: Products,
): SidesTask {
  const given = pairOf(member);
  const { A, B } = choice;
  const [basisA, basisB] = [bases.A[A.basis ?? -1], bases.B[B.basis ?? -1]];
  // What is not stored of a side is left out first, so that the other side makes the best of it.
  const whole = balance(
    {
      rank: given.rank,
      A: A.own ? given.A : within(basisA!, given.A, given.rank),
      Bt: B.own ? given.Bt : within(basisB!, given.Bt, given.rank),
    },
    out,
    inputs,
    products,
  );
  const pair = leadingRows(whole, worthRows(whole, step, widthOf(A.own ? inputs : 0, B.own ? out : 0, basisA, basisB)));
  const { rank } = pair;
  const steps = rowSteps(pair, step);
  return storing(`a row of "${name}"`, member.id, () => {
    const a = storeSide(pair.A, steps.A, basisA, A.own);
    const b = storeSide(pair.Bt, steps.Bt, basisB, B.own);
    const stored = rank > 0 ? { rank, A: a.values, Bt: b.values } : zeros(inputs, out);
    const { difference, norm } = deltaError(given, stored, products);
    const loss = { error: relative(difference, norm), norm };
    return { id: member.id, rank, choice, alphaA: a.alpha, alphaB: b.alpha, ownA: a.own, ownBt: b.own, ...loss };
  });
}

/** What a task costs on the bases of a module, with a step. @param whole balanced */
export function sideCosts(
  bases: BySide<readonly Subspace[]>,
  whole: Pair,
  { out, in: inputs }: Pick<ModuleStack, "out" | "in">,
  step: number,
): Omit<SideCosts, "id"> {
  const pair = leadingRows(whole, worthRows(whole, step, (out + inputs) / 2));
  const steps = rowSteps(pair, step);
  // A row of a balanced pair is the root of a singular value long.
  const left = rowSquares(whole.A, whole.rank, inputs)
    .slice(pair.rank)
    .reduce((sum, singular) => sum + singular ** 2, 0);
  const side = (which: "A" | "B"): SideCost[] => {
    const [rows, own] = [pair[FACTORS[which]], steps[FACTORS[which]]];
    const asked = pair.rank > 0 && bases[which].length > 0;
    const apart = { own: true, ...sideCost(rows, own, storeSide(rows, own, undefined, true), asked) };
    if (!asked) return [apart];
    const over = bases[which].map((basis, index): SideCost => {
      const shared = onBasis(rows, own, basis);
      if (!shared) return { basis: index, own: false, bits: Infinity, lost: 0 };
      const without = { basis: index, own: false, ...sideCost(rows, own, shared) };
      // What is left is worth no bits at all, or so much that it needs some.
      const mean = without.lost / rows.length;
      if (usualCost(mean) >= PRICE * mean) return without;
      const beside = { basis: index, own: true, ...sideCost(rows, own, withOwn(rows, own, shared)) };
      return costOf(without) <= costOf(beside) ? without : beside;
    });
    return [apart, ...over];
  };
  return { left: left / step ** 2, A: side("A"), B: side("B") };
}

/** The ways to take both sides that cost a task least. */
export function cheapest({ A, B }: BySide<readonly SideCost[]>): BySide<SideChoice> {
  const least = (all: readonly SideCost[]): SideChoice => {
    const { basis, own } = all.reduce((best, one) => (costOf(one) < costOf(best) ? one : best));
    return { basis, own };
  };
  return { A: least(A), B: least(B) };
}

function zeros(inputs: number, out: number): Pair {
  return { rank: 1, A: new Float64Array(inputs), Bt: new Float64Array(out) };
}

/** Numbers of a row: of its own on both sides, in the mean, or on one; coefficients where it has none. */
function widthOf(a: number, b: number, basisA: Subspace | undefined, basisB: Subspace | undefined): number {
  if (a > 0 && b > 0) return (a + b) / 2;
  return a + b > 0 ? a + b : (basisA!.components + basisB!.components) / 2;
}

/** The rows of a factor as far as a basis reaches them. */
function within(basis: Subspace, rows: Float64Array, rank: number): Float64Array {
  const [target] = targetsOf(basis, rows, [rank]);
  return expand(basis, solve(basis, target!), rank);
}

/** One side of a task as stored. */
interface StoredSide {
  /** Coefficients [rank, K]; none where K is 0. */
  readonly alpha: Uint8Array;
  readonly K: number;
  readonly own?: Uint8Array;
  /** What a reader makes of both. */
  readonly values: Float64Array;
}

const NOTHING = { alpha: new Uint8Array(0), K: 0 };

function storeSide(rows: Float64Array, steps: Float64Array, basis: Subspace | undefined, own: boolean): StoredSide {
  if (steps.length === 0) return { ...NOTHING, values: rows };
  const shared = basis && onBasis(rows, steps, basis, 0);
  return own ? withOwn(rows, steps, shared) : shared!;
}

/** The least share of rows' squares that coefficients must hold to be asked what they cost. */
const LEAST_SHARE = 0.1;

/** Rows as coefficients over a basis; undefined where these hold less than a share of their squares. */
function onBasis(
  rows: Float64Array,
  steps: Float64Array,
  basis: Subspace,
  least: number = LEAST_SHARE,
): StoredSide | undefined {
  const [count, K] = [steps.length, basis.components];
  const target = targetsOf(basis, rows, [count])[0]!;
  const { at, squares } = target;
  let total = 0;
  for (let i = 0; i < count; i++) total += squares[i * count + i]!;
  if (dot(at, 0, at, 0, at.length) < least * total) return undefined;
  const { encoded: alpha, values } = rounded("int8", solve(basis, target), count, K, steps);
  return { alpha, K, values: expand(basis, values, count) };
}

/** The same with rows of the task's own for what the basis lacks; or these alone. */
function withOwn(rows: Float64Array, steps: Float64Array, shared?: StoredSide): StoredSide {
  const count = steps.length;
  const rest = rows.slice();
  if (shared) addScaled(-1, shared.values, 0, rest, 0, rest.length);
  const { encoded: own, values } = rounded("int8", rest, count, rows.length / count, steps);
  if (shared) addScaled(1, shared.values, 0, values, 0, values.length);
  return { ...(shared ?? NOTHING), own, values };
}

/** What one side costs. Loss counts a row's length on the other side, which steps have. @param counted whether bits are asked for */
function sideCost(
  rows: Float64Array,
  steps: Float64Array,
  { alpha, K, own, values }: StoredSide,
  counted: boolean = true,
): Pick<SideCost, "bits" | "lost"> {
  const count = steps.length;
  if (count === 0) return { bits: 0, lost: 0 };
  const width = rows.length / count;
  let lost = 0;
  for (let row = 0; row < count; row++) {
    const step = steps[row]!;
    for (let i = row * width; i < (row + 1) * width; i++) lost += ((rows[i]! - values[i]!) / step) ** 2;
  }
  if (!counted) return { bits: 0, lost };
  const integers = (encoded: Uint8Array, width: number) => ({ dtype: "int8" as const, encoded, rows: count, width });
  const tensors = [...(K > 0 ? [integers(alpha, K)] : []), ...(own ? [integers(own, width)] : [])];
  return { bits: codedBits(tensors), lost };
}

/**
 * Tasks that share each factor of a module by itself: a factor is made of coefficients over one of the bases of its
 * side, of residual rows, which hold what the basis lacks, or of both. Bits and loss together decide: bits as the coder
 * counts them, loss at the price that rounding pays for a bit. Bases come from groups of tasks whose row spaces
 * overlap.
 */

import { codedBits } from "../format/encode-coded.ts";
import { type Dtype, mean, sum } from "../tensor/dtypes.ts";
import { storing } from "../tensor/encode.ts";
import { FACTORS } from "../tensor/term.ts";
import type * as components from "./components.ts";
import { coordinates, encodeSide, expand, openSubspace, rounded, solve, stacked, targetsOf } from "./components.ts";
import {
  alignTo,
  balance,
  componentSteps,
  deltaError,
  leadingRows,
  type Pair,
  pairOf,
  relative,
  roundedBits,
  roundedSquare,
  rowSteps,
  worthRows,
} from "./factors.ts";
import { addScaled, dot, type Products, rowSquares } from "./linalg.ts";

/** A task's choice for one factor: one of the bases of its side, if any, and residual rows or none. */
export interface SideChoice {
  readonly basis?: number | undefined;
  readonly residual: boolean;
}

/** The choice of a task that shares neither factor. */
export const UNSHARED: components.BySide<SideChoice> = { A: { residual: true }, B: { residual: true } };

/** The bases of a module, and the choices of its tasks, by id. */
export interface SharedSides {
  readonly bases: components.BySide<readonly components.SideBasis[]>;
  readonly choices: ReadonlyMap<string, components.BySide<SideChoice>>;
  /** Bits of the components, and of all that the tasks would take more without them. */
  readonly bits: number;
  readonly saved: number;
}

/** The number format of a task's coefficients and residual rows. */
export interface RowFormat {
  /**
   * Quantisation step: the change of ΔW from one integer to the next. Rank-1 terms that are not worth their bits with
   * such a step are left out, in other number formats too; 0 leaves out none.
   */
  readonly step: number;
  /** Default: integers with the step, which are entropy-coded. */
  readonly dtype?: Dtype | undefined;
}

export interface SideCost extends SideChoice {
  readonly bits: number;
  /** Squared loss of ΔW, in units of its step. */
  readonly lost: number;
}

/** Costs of a task on the bases of a module: for each factor first without any, then the best with each. */
export interface SideCosts extends components.BySide<readonly SideCost[]> {
  readonly id: string;
  /** Squared loss of terms that are not worth their bits, in units of the step. */
  readonly left: number;
}

/**
 * Bits that a loss of one step, squared, is worth: what rounding to steps pays where values are large, 12 / (2 ln 2).
 */
const PRICE = 8.66;

export function costOf({ bits, lost }: Pick<SideCost, "bits" | "lost">): number {
  return bits + PRICE * lost;
}

/** Expected cost of a number with this mean square, in steps: left out, or rounded. */
function usualCost(square: number): number {
  const size = Math.sqrt(square);
  return Math.min(PRICE * square, roundedBits(size) + PRICE * roundedSquare(size));
}

export function openSides(
  { A, B }: components.BySide<readonly components.Basis[]>,
  products: Products,
): components.BySide<readonly components.Subspace[]> {
  const open = (basis: components.Basis): components.Subspace => openSubspace(basis, products);
  return { A: A.map(open), B: B.map(open) };
}

/**
 * A task as it is stored.
 * @param most rank that it keeps. Default: all
 * @throws UnstorableError
 */
export function takeSides(
  bases: components.BySide<readonly components.Subspace[]>,
  { name, out, in: inputs }: Omit<components.ModuleStack, "members">,
  member: components.ModuleMember,
  choice: components.BySide<SideChoice>,
  { step, dtype }: RowFormat,
  products: Products,
  most: number = Infinity,
): components.TaskUpdate {
  const exact = pairOf(member);
  const { id } = member;
  const basis = { A: bases.A[choice.A.basis ?? -1], B: bases.B[choice.B.basis ?? -1] };
  // The part of a factor that is not stored is left out first, so that the other factor makes the best of it.
  const within = (which: "A" | "B", rows: Float64Array): Float64Array =>
    choice[which].residual ? rows : rowsWithin(basis[which]!, rows, exact.rank);
  const reached = { rank: exact.rank, A: within("A", exact.A), Bt: within("B", exact.Bt) };
  const whole = balanced(reached, basis, { out, in: inputs }, products);
  const widths = [choice.A.residual ? inputs : 0, choice.B.residual ? out : 0].filter((width) => width > 0);
  // Rows have numbers on the sides with residual rows; coefficients where no side has.
  const numbers = widths.length > 0 ? widths : [basis.A!.components, basis.B!.components];
  const worth = worthRows(whole, step, mean(numbers));
  const pair = leadingRows(whole, Math.min(worth, most));
  const { rank } = pair;
  const type = dtype ?? "int8";
  const steps = dtype === undefined ? rowSteps(pair, step) : undefined;
  return storing(`a row of "${name}"`, id, () => {
    const take = (which: "A" | "B"): { factor: components.Factor; values: Float64Array } => {
      const key = FACTORS[which];
      const format = { rank, type, steps: steps?.[key] };
      const { K: _, values, ...stored } = storeRows(pair[key], format, basis[which], choice[which].residual);
      return { factor: { basis: choice[which].basis, mean: basis[which]?.mean !== undefined, ...stored }, values };
    };
    const A = take("A");
    const B = take("B");
    const none = { rank: 1, A: new Float64Array(inputs), Bt: new Float64Array(out) };
    const { difference, norm } = deltaError(exact, rank > 0 ? { rank, A: A.values, Bt: B.values } : none, products);
    return { id, rank, dtype: type, A: A.factor, B: B.factor, error: relative(difference, norm), norm };
  });
}

/** The balanced pair, along the means of the bases of both sides where they have some. */
export function balanced(
  pair: Pair,
  { A, B }: components.BySide<components.Subspace | undefined>,
  { out, in: inputs }: Pick<components.ModuleStack, "out" | "in">,
  products: Products,
): Pair {
  const whole = balance(pair, out, inputs, products);
  if (A?.mean && B?.mean) alignTo(whole, { A: A.mean, Bt: B.mean });
  return whole;
}

/** Costs of a task on the bases of a module, with a step. @param whole balanced */
export function sideCosts(
  bases: components.BySide<readonly components.Subspace[]>,
  whole: Pair,
  { out, in: inputs }: Pick<components.ModuleStack, "out" | "in">,
  step: number,
): Omit<SideCosts, "id"> {
  const pair = leadingRows(whole, worthRows(whole, step, (out + inputs) / 2));
  const steps = rowSteps(pair, step);
  // A row of a balanced pair is the root of a singular value long.
  const left = sum(rowSquares(whole.A, whole.rank, inputs).slice(pair.rank), (singular) => singular ** 2);
  const side = (which: "A" | "B"): SideCost[] => {
    const rows = pair[FACTORS[which]];
    const format = { rank: pair.rank, type: "int8" as const, steps: steps[FACTORS[which]] };
    const cost = (stored: StoredRows, isCounted?: boolean) => sideCost(rows, format.steps, stored, isCounted);
    const isAsked = pair.rank > 0 && bases[which].length > 0;
    const unshared = { residual: true, ...cost(storeRows(rows, format, undefined, true), isAsked) };
    if (!isAsked) return [unshared];
    const over = bases[which].map((space, basis): SideCost => {
      const shared = onBasis(rows, format, space);
      if (!shared) return { basis, residual: false, bits: Infinity, lost: 0 };
      const alone = { basis, residual: false, ...cost(shared) };
      // The rest is worth no bits at all, or so much that it needs some.
      const mean = alone.lost / rows.length;
      if (!space.mean && usualCost(mean) >= PRICE * mean) return alone;
      const both = { basis, residual: true, ...cost(withResidual(rows, format, shared)) };
      // About a mean, rows in another factorisation than that of the basis lie elsewhere: they need residual rows.
      return !space.mean && costOf(alone) <= costOf(both) ? alone : both;
    });
    return [unshared, ...over];
  };
  return { left: left / step ** 2, A: side("A"), B: side("B") };
}

/** The choices for both factors that cost a task least. */
export function cheapest({ A, B }: components.BySide<readonly SideCost[]>): components.BySide<SideChoice> {
  const least = (costs: readonly SideCost[]): SideChoice => {
    const { basis, residual } = costs.reduce((best, cost) => (costOf(cost) < costOf(best) ? cost : best));
    return { basis, residual };
  };
  return { A: least(A), B: least(B) };
}

/** The rows of a factor as far as a basis reaches them. */
function rowsWithin(basis: components.Subspace, rows: Float64Array, rank: number): Float64Array {
  const [target] = targetsOf(basis, rows, [rank]);
  return expand(basis, solve(basis, target!), rank);
}

interface StoredRows extends Pick<components.Factor, "coefficients" | "residual"> {
  /** Components of the basis; 0 without coefficients. */
  readonly K: number;
  /** Rows as their reader decodes them. */
  readonly values: Float64Array;
}

interface RowsFormat {
  readonly rank: number;
  readonly type: Dtype;
  readonly steps?: Float64Array | undefined;
}

function storeRows(
  rows: Float64Array,
  format: RowsFormat,
  basis: components.Subspace | undefined,
  residual: boolean,
): StoredRows {
  if (format.rank === 0) return { K: 0, values: rows };
  const shared = basis && onBasis(rows, format, basis, 0);
  return residual ? withResidual(rows, format, shared) : shared!;
}

/** The least share of rows' squares that coefficients must hold for their cost to be counted. */
const LEAST_SHARE = 0.1;

/** Rows as coefficients over a basis; undefined where these hold less than a share of their squares. */
function onBasis(
  rows: Float64Array,
  { rank, type, steps }: RowsFormat,
  basis: components.Subspace,
  least: number = LEAST_SHARE,
): StoredRows | undefined {
  const K = basis.components;
  const target = targetsOf(basis, rows, [rank])[0]!;
  const { at, squares } = target;
  let total = 0;
  for (const square of squares) total += square;
  if (dot(at, 0, at, 0, at.length) < least * total) return undefined;
  const { encoded: coefficients, values } = rounded(type, solve(basis, target), rank, K, steps);
  return { coefficients, K, values: expand(basis, values, rank) };
}

/** The same with residual rows for what the basis lacks; or these alone. */
function withResidual(rows: Float64Array, { rank, type, steps }: RowsFormat, shared?: StoredRows): StoredRows {
  const rest = rows.slice();
  if (shared) addScaled(-1, shared.values, 0, rest, 0, rest.length);
  const { encoded: residual, values } = rounded(type, rest, rank, rows.length / rank, steps);
  if (shared) addScaled(1, shared.values, 0, values, 0, values.length);
  return { coefficients: shared?.coefficients, K: shared?.K ?? 0, residual, values };
}

/**
 * Cost of one factor. Loss counts a row's length on the other side, which steps have.
 * @param isCounted false: bits are 0
 */
function sideCost(
  rows: Float64Array,
  steps: Float64Array,
  { coefficients, K, residual, values }: StoredRows,
  isCounted: boolean = true,
): Pick<SideCost, "bits" | "lost"> {
  const count = steps.length;
  if (count === 0) return { bits: 0, lost: 0 };
  const width = rows.length / count;
  let lost = 0;
  for (let row = 0; row < count; row++) {
    const step = steps[row]!;
    for (let i = row * width; i < (row + 1) * width; i++) lost += ((rows[i]! - values[i]!) / step) ** 2;
  }
  if (!isCounted) return { bits: 0, lost };
  const integers = (encoded: Uint8Array, width: number) => ({ dtype: "int8" as const, encoded, rows: count, width });
  const tensors = [
    ...(coefficients && K > 0 ? [integers(coefficients, K)] : []),
    ...(residual ? [integers(residual, width)] : []),
  ];
  return { bits: codedBits(tensors), lost };
}

// Groups: tasks fall into groups by overlaps of their row spaces, and each group's components are as many as would pay
// for themselves. `sideCosts` of every task then says if they do.

/** The components of a group, before they are rounded. */
interface Span extends Omit<components.Side, "rows"> {
  /** Steps of their integers [K]. */
  readonly steps: Float64Array;
}

/**
 * Overlaps from which on tasks are taken for a group, from close relations to all together: candidates, which must pay.
 */
const LEVELS = [0.8, 0.5, 0.25, 0];

/** Candidates for sharing of each side of a module. */
export interface Spans {
  readonly spans: components.BySide<readonly Span[]>;
  /** The same as stored with their steps, and what that takes. */
  readonly bases: components.BySide<readonly (components.SideBasis & { readonly bits: number })[]>;
  readonly costs: SideCosts[];
}

/**
 * Finds candidates for sharing of each side, and the costs of each task on them.
 * @param steps of the members: by how much ΔW changes from one integer to the next
 */
export function spansOf(
  { members, ...shape }: components.ModuleStack,
  steps: readonly number[],
  products: Products,
): Spans {
  const { out, in: inputs } = shape;
  const whole = members.map((member) => balance(pairOf(member), out, inputs, products));
  const worth = whole.map((pair, i) => leadingRows(pair, worthRows(pair, steps[i]!, (out + inputs) / 2)));
  const side = (which: "A" | "B"): Span[] => {
    const key = FACTORS[which];
    // Rows in units of their steps: the length of each is its singular value over the step.
    const rows = worth.map((pair, i) => divided(pair[key], rowSteps(pair, steps[i]!)[key], Infinity));
    const spaces = whole.map(({ rank, [key]: rows }) =>
      divided(rows, rowSquares(rows, rank, rows.length / rank).map(Math.sqrt), 1),
    );
    return groupsOf(rows, spaces, which === "A" ? inputs : out, products);
  };
  const spans = { A: side("A"), B: side("B") };
  if (spans.A.length + spans.B.length === 0) return { spans, bases: { A: [], B: [] }, costs: [] };
  const encoded = encodeSpans(spans, 1, products);
  const counted = (basis: components.SideBasis): components.SideBasis & { bits: number } => {
    return { ...basis, bits: codedBits([{ ...basis, rows: basis.components }]) };
  };
  const opened = openSides(encoded, products);
  const costs = members.map(({ id }, i) => ({ id, ...sideCosts(opened, whole[i]!, shape, steps[i]!) }));
  return { spans, bases: { A: encoded.A.map(counted), B: encoded.B.map(counted) }, costs };
}

/** Components of both sides as they are stored. @param scale of the steps that they were made for */
export function encodeSpans(
  { A, B }: components.BySide<readonly Span[]>,
  scale: number,
  products?: Products,
): components.BySide<components.SideBasis[]> {
  const encode = ({ steps, ...side }: Span): components.SideBasis => {
    const scaled = steps.map((step) => scale * step);
    return encodeSide(side, side.components.count, scaled, products);
  };
  return { A: A.map(encode), B: B.map(encode) };
}

/** Each row divided by a number. @param otherwise in the place of numbers that are 0 */
function divided(rows: Float64Array, by: Float64Array, otherwise: number): Float64Array {
  const width = rows.length / by.length;
  return rows.map((value, i) => value / (by[Math.floor(i / width)]! || otherwise));
}

/** Members, the components that they share, and the expected cost of both. */
interface Group {
  readonly members: readonly number[];
  readonly span?: Span | undefined;
  readonly cost: number;
}

/** Spans of groups that are expected to pay: of each level the whole, or the best of its parts. */
function groupsOf(
  rows: readonly Float64Array[],
  spaces: readonly Float64Array[],
  width: number,
  products: Products,
): Span[] {
  let best = rows.map((own, i): Group => {
    return { members: [i], cost: costOfRows(rowSquares(own, own.length / width, width), width) };
  });
  for (const level of levelsOf(spaces, width, products)) {
    best = level.flatMap((members) => {
      const parts = best.filter((group) => members.includes(group.members[0]!));
      if (parts.length === 1) return parts;
      const { span, cost } = bestSpan(stacked(members.map((i) => rows[i]!)), width, products);
      return span && cost < sum(parts, (part) => part.cost) ? [{ members, span, cost }] : parts;
    });
  }
  return best.flatMap(({ span }) => span ?? []);
}

/**
 * Groups at each level, by the mean overlap of their members' spaces, ‖Q₁·Q₂ᵀ‖² / rank: from many small ones to all
 * together.
 */
function levelsOf(spaces: readonly Float64Array[], width: number, products: Products): number[][][] {
  const count = spaces.length;
  const overlap = overlapsOf(spaces, width, products);
  const near = (first: readonly number[], second: readonly number[]): number => {
    let sum = 0;
    for (const i of first) for (const j of second) sum += overlap[i * count + j]!;
    return sum / (first.length * second.length);
  };
  let groups = spaces.map((_, i) => [i]);
  return LEVELS.map((level) => {
    for (;;) {
      let a = -1;
      let b = -1;
      let nearest = level;
      for (let i = 0; i < groups.length; i++)
        for (let j = 0; j < i; j++) {
          const found = near(groups[i]!, groups[j]!);
          if (found <= nearest) continue;
          a = j;
          b = i;
          nearest = found;
        }
      if (a < 0) return groups;
      const joined = [...groups[a]!, ...groups[b]!].sort((x, y) => x - y);
      groups = groups.map((group, i) => (i === a ? joined : group)).filter((_, i) => i !== b);
    }
  });
}

function overlapsOf(spaces: readonly Float64Array[], width: number, products: Products): Float64Array {
  const count = spaces.length;
  const starts = [0];
  for (const space of spaces) starts.push(starts.at(-1)! + space.length / width);
  const total = starts[count]!;
  const along = products.gram(stacked(spaces), total, width);
  const overlap = new Float64Array(count * count);
  for (let i = 0; i < count; i++)
    for (let j = 0; j < i; j++) {
      let sum = 0;
      for (let a = starts[i]!; a < starts[i + 1]!; a++)
        for (let b = starts[j]!; b < starts[j + 1]!; b++) sum += along[a * total + b]! ** 2;
      const rank = Math.min(starts[i + 1]! - starts[i]!, starts[j + 1]! - starts[j]!);
      overlap[i * count + j] = overlap[j * count + i] = sum / (rank || 1);
    }
  return overlap;
}

function costOfRows(squares: ArrayLike<number>, width: number): number {
  let cost = 0;
  for (let i = 0; i < squares.length; i++) cost += width * usualCost(squares[i]! / width);
  return cost;
}

/** The components of rows in steps that cost least, with coefficients and the rest of each row; and that cost. */
function bestSpan(rows: Float64Array, width: number, products: Products): Omit<Group, "members"> {
  if (rows.length === 0) return { cost: 0 };
  const count = rows.length / width;
  const { singular, along, count: most, strongest } = coordinates(rows, count, width, products);
  const left = rowSquares(rows, count, width);
  let K = 0;
  let least = costOfRows(left, width);
  let shared = 0;
  for (let k = 0; k < most; k++) {
    const square = singular[k]! ** 2;
    shared += width * usualCost(square / width) + count * usualCost(square / count);
    for (let i = 0; i < count; i++) left[i] = Math.max(0, left[i]! - along[i * most + k]! ** 2);
    const cost = shared + costOfRows(left, width);
    if (cost >= least) continue;
    K = k + 1;
    least = cost;
  }
  if (K === 0) return { cost: least };
  const components = strongest(K);
  const side = { width, mean: undefined, components };
  const own = new Float64Array(count).fill(1);
  return {
    span: { ...side, steps: componentSteps({ ...side, rows }, components.vectors, own, products) },
    cost: least,
  };
}

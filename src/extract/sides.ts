/**
 * Tasks that share each side of a module by itself: a factor is made of coefficients over one of its side's bases, of residual rows, which are
 * what the basis lacks, or of both. Bits and loss together decide which it is: bits as the coder counts them, loss at the price
 * that rounding pays for a bit. Bases come from groups of tasks whose row spaces overlap.
 */
import { codedBits } from "../format/encode-coded.ts";
import type { Dtype } from "../tensor/dtypes.ts";
import { storing } from "../tensor/dtypes.ts";
import { FACTORS } from "../tensor/term.ts";
import { coordinates, encodeSide, type ModuleStack, type Side, type SideBasis, stacked } from "./components.ts";
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
import {
  expand,
  type ModuleLoss,
  type ModuleMember,
  openSubspace,
  rounded,
  type StoredBasis,
  type Subspace,
  solve,
  targetsOf,
} from "./subspace.ts";

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
  /** Bits of the components, and how many more the tasks would take without them. */
  readonly bits: number;
  readonly saved: number;
}

/** The number format of a task's coefficients and residual rows. */
export interface RowFormat {
  /**
   * Quantisation step: the change of ΔW from one integer to the next. Rank-1 terms that are not worth their bits with such a step are left out, in other
   * number formats too; 0 leaves out none.
   */
  readonly step: number;
  /** Default: integers with the step, which are entropy-coded. */
  readonly dtype?: Dtype | undefined;
}

/** A factor as it is stored: coefficients over a basis, residual rows for what that lacks, or both. */
export interface StoredFactor {
  /** Number of the basis of its side, and whether its mean is added; undefined without coefficients. */
  readonly basis?: number | undefined;
  readonly mean?: boolean | undefined;
  /** Encoded [rank, K]. */
  readonly coefficients?: Uint8Array | undefined;
  /** Encoded [rank, width]. */
  readonly residual?: Uint8Array | undefined;
}

/** ΔW of one task in one module as it is stored, and what that loses. */
export interface TaskUpdate extends BySide<StoredFactor>, ModuleLoss {
  /** Task id. */
  readonly id: string;
  readonly rank: number;
  readonly dtype: Dtype;
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
 * @param most rank that it keeps. Default: all
 * @throws UnstorableError
 */
export function takeSides(
  bases: BySide<readonly Subspace[]>,
  { name, out, in: inputs }: Omit<ModuleStack, "members">,
  member: ModuleMember,
  { A, B }: BySide<SideChoice>,
  { step, dtype }: RowFormat,
  products: Products,
  most: number = Infinity,
): TaskUpdate {
  const given = pairOf(member);
  const basisA = bases.A[A.basis ?? -1];
  const basisB = bases.B[B.basis ?? -1];
  // What is not stored of a side is left out first, so that the other side makes the best of it.
  const whole = balanced(
    {
      rank: given.rank,
      A: A.own ? given.A : within(basisA!, given.A, given.rank),
      Bt: B.own ? given.Bt : within(basisB!, given.Bt, given.rank),
    },
    { A: basisA, B: basisB },
    { out, in: inputs },
    products,
  );
  const worth = worthRows(whole, step, widthOf(A.own ? inputs : 0, B.own ? out : 0, basisA, basisB));
  const pair = leadingRows(whole, Math.min(worth, most));
  const { rank } = pair;
  const steps = dtype === undefined ? rowSteps(pair, step) : undefined;
  return storing(`a row of "${name}"`, member.id, () => {
    const type = dtype ?? "int8";
    const a = storeSide(pair.A, { rank, type, steps: steps?.A }, basisA, A.own);
    const b = storeSide(pair.Bt, { rank, type, steps: steps?.Bt }, basisB, B.own);
    const stored = rank > 0 ? { rank, A: a.values, Bt: b.values } : zeros(inputs, out);
    const { difference, norm } = deltaError(given, stored, products);
    const factor = (
      { coefficients, residual }: StoredSide,
      { basis }: SideChoice,
      { mean }: { mean?: unknown } = {},
    ) => {
      return { basis, mean: mean !== undefined, coefficients, residual };
    };
    const factors = { A: factor(a, A, basisA), B: factor(b, B, basisB) };
    return { id: member.id, rank, dtype: type, ...factors, error: relative(difference, norm), norm };
  });
}

/** The balanced pair, along the means of the bases of both sides where they have some. */
export function balanced(
  pair: Pair,
  { A, B }: BySide<Subspace | undefined>,
  { out, in: inputs }: Pick<ModuleStack, "out" | "in">,
  products: Products,
): Pair {
  const whole = balance(pair, out, inputs, products);
  if (A?.mean && B?.mean) alignTo(whole, { A: A.mean, Bt: B.mean });
  return whole;
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
    const rows = pair[FACTORS[which]];
    const own = steps[FACTORS[which]];
    const stored: StoredRows = { rank: pair.rank, type: "int8", steps: own };
    const isAsked = pair.rank > 0 && bases[which].length > 0;
    const apart = { own: true, ...sideCost(rows, own, storeSide(rows, stored, undefined, true), isAsked) };
    if (!isAsked) return [apart];
    const over = bases[which].map((basis, index): SideCost => {
      const shared = onBasis(rows, stored, basis);
      if (!shared) return { basis: index, own: false, bits: Infinity, lost: 0 };
      const without = { basis: index, own: false, ...sideCost(rows, own, shared) };
      // What is left is worth no bits at all, or so much that it needs some.
      const mean = without.lost / rows.length;
      if (!basis.mean && usualCost(mean) >= PRICE * mean) return without;
      const both = { basis: index, own: true, ...sideCost(rows, own, withOwn(rows, stored, shared)) };
      // About a mean, rows in another gauge than the basis was made in lie elsewhere: they need rows of their own.
      return !basis.mean && costOf(without) <= costOf(both) ? without : both;
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
interface StoredSide extends Pick<StoredFactor, "coefficients" | "residual"> {
  /** Components of the basis; 0 without coefficients. */
  readonly K: number;
  /** What a reader makes of both. */
  readonly values: Float64Array;
}

/** How rows are stored. */
interface StoredRows {
  readonly rank: number;
  readonly type: Dtype;
  readonly steps?: Float64Array | undefined;
}

function storeSide(rows: Float64Array, stored: StoredRows, basis: Subspace | undefined, own: boolean): StoredSide {
  if (stored.rank === 0) return { K: 0, values: rows };
  const shared = basis && onBasis(rows, stored, basis, 0);
  return own ? withOwn(rows, stored, shared) : shared!;
}

/** The least share of rows' squares that coefficients must hold to be asked what they cost. */
const LEAST_SHARE = 0.1;

/** Rows as coefficients over a basis; undefined where these hold less than a share of their squares. */
function onBasis(
  rows: Float64Array,
  { rank, type, steps }: StoredRows,
  basis: Subspace,
  least: number = LEAST_SHARE,
): StoredSide | undefined {
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
function withOwn(rows: Float64Array, { rank, type, steps }: StoredRows, shared?: StoredSide): StoredSide {
  const rest = rows.slice();
  if (shared) addScaled(-1, shared.values, 0, rest, 0, rest.length);
  const { encoded: residual, values } = rounded(type, rest, rank, rows.length / rank, steps);
  if (shared) addScaled(1, shared.values, 0, values, 0, values.length);
  return { coefficients: shared?.coefficients, K: shared?.K ?? 0, residual, values };
}

/** What one side costs. Loss counts a row's length on the other side, which steps have. @param isCounted whether bits are asked for */
function sideCost(
  rows: Float64Array,
  steps: Float64Array,
  { coefficients, K, residual, values }: StoredSide,
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

// Groups: tasks fall into groups by overlaps of their row spaces, and each group's components are as many as would pay for themselves. Whether
// they do is asked of every task afterwards (`sideCosts`).

/** The components of a group, before they are rounded. */
export interface Span extends Omit<Side, "rows"> {
  /** Steps of their integers [K]. */
  readonly steps: Float64Array;
}

/** Overlaps from which on tasks are taken for a group, from close relations to all together: candidates, which must pay. */
const LEVELS = [0.8, 0.5, 0.25, 0];

/** What groups of tasks may share of each side of a module. */
export interface Spans {
  readonly spans: BySide<readonly Span[]>;
  /** The same as stored with their steps, and what that takes. */
  readonly bases: BySide<readonly (SideBasis & { readonly bits: number })[]>;
  /** What each task costs on them. */
  readonly costs: SideCosts[];
}

/**
 * What groups of tasks may share of each side, and what each task costs then.
 * @param steps of the members: by how much ΔW changes from one integer to the next
 */
export function spansOf({ members, ...shape }: ModuleStack, steps: readonly number[], products: Products): Spans {
  const { out, in: inputs } = shape;
  const whole = members.map((member) => balance(pairOf(member), out, inputs, products));
  const worth = whole.map((pair, i) => leadingRows(pair, worthRows(pair, steps[i]!, (out + inputs) / 2)));
  const side = (which: "A" | "B"): Span[] => {
    const key = FACTORS[which];
    const rows = worth.map((pair, i) => inSteps(pair, key, steps[i]!));
    const spaces = whole.map((pair) => unitRows(pair[key], pair.rank));
    return groupsOf(rows, spaces, which === "A" ? inputs : out, products);
  };
  const spans = { A: side("A"), B: side("B") };
  if (spans.A.length + spans.B.length === 0) return { spans, bases: { A: [], B: [] }, costs: [] };
  const encoded = encodeSpans(spans, 1, products);
  const counted = (basis: SideBasis): SideBasis & { bits: number } => {
    return { ...basis, bits: codedBits([{ ...basis, rows: basis.components }]) };
  };
  const opened = openSides(encoded, products);
  const costs = members.map(({ id }, i) => ({ id, ...sideCosts(opened, whole[i]!, shape, steps[i]!) }));
  return { spans, bases: { A: encoded.A.map(counted), B: encoded.B.map(counted) }, costs };
}

/** Components of both sides as they are stored. @param scale of the steps that they were made for */
export function encodeSpans(
  { A, B }: BySide<readonly Span[]>,
  scale: number,
  products?: Products,
): BySide<SideBasis[]> {
  const encode = ({ steps, ...side }: Span): SideBasis => {
    const scaled = steps.map((step) => scale * step);
    return encodeSide(side, side.components.count, { type: "int8", steps: scaled }, products);
  };
  return { A: A.map(encode), B: B.map(encode) };
}

/** Rows in units of their steps: the singular value over the step is the length of each. */
function inSteps(pair: Pair, key: "A" | "Bt", step: number): Float64Array {
  return divided(
    pair[key],
    rowSteps(pair, step)[key].map((own) => own || Infinity),
  );
}

function unitRows(rows: Float64Array, rank: number): Float64Array {
  return divided(
    rows,
    rowSquares(rows, rank, rows.length / rank).map((square) => Math.sqrt(square) || 1),
  );
}

/** Rows, each by a divisor of its own. */
function divided(rows: Float64Array, by: Float64Array): Float64Array {
  const width = rows.length / by.length;
  const found = new Float64Array(rows.length);
  for (let row = 0; row < by.length; row++)
    for (let i = row * width; i < (row + 1) * width; i++) found[i] = rows[i]! / by[row]!;
  return found;
}

/** Members, what they share, and what all of it is expected to cost. */
interface Group {
  readonly members: readonly number[];
  readonly span?: Span | undefined;
  readonly cost: number;
}

/** What groups share that are expected to pay: of each level the whole, or the best of its parts. */
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
      return span && cost < parts.reduce((sum, part) => sum + part.cost, 0) ? [{ members, span, cost }] : parts;
    });
  }
  return best.flatMap(({ span }) => span ?? []);
}

/** Groups at each level, by the mean overlap of their members' spaces, ‖Q₁·Q₂ᵀ‖² / rank: from many small ones to all together. */
function levelsOf(spaces: readonly Float64Array[], width: number, products: Products): number[][][] {
  const count = spaces.length;
  const overlap = overlapsOf(spaces, width, products);
  const near = (one: readonly number[], other: readonly number[]): number => {
    let sum = 0;
    for (const i of one) for (const j of other) sum += overlap[i * count + j]!;
    return sum / (one.length * other.length);
  };
  let groups = spaces.map((_, i) => [i]);
  return LEVELS.map((level) => {
    for (;;) {
      let [a, b, nearest] = [-1, -1, level];
      for (let i = 0; i < groups.length; i++)
        for (let j = 0; j < i; j++) {
          const found = near(groups[i]!, groups[j]!);
          if (found > nearest) [a, b, nearest] = [j, i, found];
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

/** What rows cost that have these squares in steps. */
function costOfRows(squares: ArrayLike<number>, width: number): number {
  let cost = 0;
  for (let i = 0; i < squares.length; i++) cost += width * usualCost(squares[i]! / width);
  return cost;
}

/** The components of rows in steps that cost least, with coefficients and what is left of each row, and what that is. */
function bestSpan(rows: Float64Array, width: number, products: Products): Omit<Group, "members"> {
  if (rows.length === 0) return { cost: 0 };
  const count = rows.length / width;
  const { singular, along, count: most, strongest } = coordinates(rows, count, width, products);
  const left = rowSquares(rows, count, width);
  let [K, least, shared] = [0, costOfRows(left, width), 0];
  for (let k = 0; k < most; k++) {
    const square = singular[k]! ** 2;
    shared += width * usualCost(square / width) + count * usualCost(square / count);
    for (let i = 0; i < count; i++) left[i] = Math.max(0, left[i]! - along[i * most + k]! ** 2);
    const cost = shared + costOfRows(left, width);
    if (cost < least) [K, least] = [k + 1, cost];
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

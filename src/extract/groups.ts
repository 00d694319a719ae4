/**
 * What the tasks of a module may share, side by side: tasks fall into groups by overlaps of their row spaces, and each group's
 * components are as many as would pay for themselves. Whether they do is asked of every task afterwards (`sideCosts`).
 */
import { codedBits } from "../format/encode-coded.ts";
import { FACTORS } from "../tensor/term.ts";
import { coordinates } from "./components.ts";
import type { ModuleStack } from "./extract.ts";
import { balance, leadingRows, type Pair, pairOf } from "./gauge.ts";
import { type Products, rowSquares } from "./linalg.ts";
import { componentSteps, rowSteps, worthRows } from "./row-steps.ts";
import { encodeSide, type Side, type SideBasis, stacked } from "./side.ts";
import { type BySide, openSides, type SideCosts, sideCosts, usualCost } from "./sides.ts";

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
  const side = { width, rank: undefined, mean: undefined, components };
  const own = new Float64Array(count).fill(1);
  return {
    span: { ...side, steps: componentSteps({ ...side, rows }, components.vectors, own, products) },
    cost: least,
  };
}

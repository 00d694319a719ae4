/**
 * Components of one module (Algorithm 1 of the paper): the adapters of a module become two bases, stored once, and coefficients per task, a
 * row of a factor each. Principal components of a stack of rows are computed in f64, from whichever Gram matrix is smaller, as many as
 * asked but never a direction that is only rounding error. Works on one module at a time, on arrays only: no files, no pack.
 */
import type { Dtype } from "../tensor/dtypes.ts";
import { encodeSteps, encodeTensor, storing, toInteger } from "../tensor/dtypes.ts";
import { FACTORS } from "../tensor/term.ts";
import {
  alignSigns,
  balance,
  componentSteps,
  fewBits,
  leadingRows,
  mirror,
  mix,
  type Pair,
  rowSteps,
} from "./factors.ts";
import {
  addScaled,
  centred,
  dominant,
  dot,
  type Eigen,
  lengthened,
  norm,
  PLAIN,
  type Products,
  ROUNDING,
  rowSquares,
  scale,
  symmetricEigen,
  transpose,
} from "./linalg.ts";
import {
  type Gauge,
  type ModuleMember,
  mirrors,
  openModule,
  type ProjectedTask,
  projectTargets,
  type StoredBasis,
  targetsOf,
  toPair,
} from "./subspace.ts";

/** Whether the mean of the rows is subtracted and stored, or not used at all. */
export type Centering = "keep" | "none";

/** How many components a side keeps, never more than its numerical rank: `k` that many; `energy` the fewest with that share of the squared singular values, 1 for all of them. */
export type ComponentSelection =
  | { readonly kind: "k"; readonly k: number }
  | { readonly kind: "energy"; readonly share: number };

/** How the components of one module are found. */
export interface ExtractOptions {
  readonly gauge: Gauge;
  /** The most rows that a task keeps of each module, its strongest directions: balanced gauge only. Default: all. */
  readonly rank?: number | undefined;
  readonly centering: Centering;
  /**
   * Whether every task counts alike when components are sought, however large its update is: one a thousand times larger than the
   * others would have them to itself. Default: false.
   */
  readonly normalize?: boolean | undefined;
  readonly select: ComponentSelection;
  readonly basisDtype: Dtype;
  readonly coefficientDtype: Dtype;
  /**
   * Steps, one for each member of a stack: how much ΔW changes from one integer of a coefficient or a component to the next. All are then integers with steps that make them equally coarse for ΔW, whatever the types say: coefficients int8, components
   * as many bits as they need.
   */
  readonly steps?: readonly number[] | undefined;
  /** What multiplies large matrices: half the time of an extraction is spent there. Default: the plain loops. */
  readonly products?: Products | undefined;
}

/** How many components a selection asks for, or what says so, given the singular values. */
export function wanted({
  select,
}: Pick<ExtractOptions, "select">): number | ((singular: Float64Array, total: number) => number) {
  if (select.kind === "k") return select.k;
  if (select.share === 1) return (singular) => singular.length;
  return (singular, total) => {
    let held = 0;
    let k = 0;
    while (k < singular.length && held < select.share * total) held += singular[k++]! ** 2;
    return k;
  };
}

/** @throws RangeError for a rank that cannot be kept */
export function checkRank({ rank, gauge }: Pick<ExtractOptions, "rank" | "gauge">): void {
  if (rank === undefined) return;
  if (!(Number.isInteger(rank) && rank >= 1 && rank <= 65_535))
    throw new RangeError(`rank must be a whole number from 1 to 65535, got ${rank}`);
  if (gauge !== "balanced")
    throw new RangeError("rank: only a balanced pair has its strongest directions first; take gauge balanced");
}

/** @throws RangeError for a number out of range */
export function checkSelection(select: ComponentSelection): void {
  const { kind }: { readonly kind: string } = select;
  if (kind !== "k" && kind !== "energy")
    throw new RangeError(`select.kind must be "k" or "energy", got "${kind}"; for an error or a size take searchPack`);
  if (select.kind === "k" && !(Number.isInteger(select.k) && select.k >= 1)) {
    throw new RangeError(`select.k must be a whole number from 1, got ${select.k}`);
  }
  if (select.kind === "energy" && !(select.share > 0 && select.share <= 1)) {
    throw new RangeError(`select.share must be above 0 and at most 1, got ${select.share}`);
  }
}

/** The singular value decomposition of a stack as far as it was asked for. */
export interface Components {
  /** How many components there are: at most as many as were asked for. */
  count: number;
  /** [count, width], orthonormal within 1e-8, strongest first, the largest entry of each positive. */
  vectors: Float64Array;
  /**
   * All min(rows, width) singular values, descending. Those below 1e-7 of the largest are rounding errors unless the components asked for
   * go down to them.
   */
  singular: Float64Array;
  /** ‖X‖², the sum of the squared singular values; 0 where no row is above its floor. */
  total: number;
}

/**
 * Squared singular values below this share of the largest are not taken from a Gram matrix: squaring leaves of them
 * fewer than six digits. They are found in a second Gram matrix, of the stack without its strong directions.
 */
const RESOLVED = 2 ** -33;

/** Components weaker than this share of the strongest are orthogonalised again; stronger ones come out to 1e-8. */
const WEAK = 1e-3;

/**
 * Column means of rows [rows, width], rounded to f32, so that a pack in f32 stores exactly the mean that was subtracted
 * and identical rows become exactly zero.
 */
export function columnMeans(x: Float64Array, rows: number, width: number, weights?: readonly number[]): Float64Array {
  const mean = new Float64Array(width);
  for (let i = 0; i < rows; i++) addScaled(weights?.[i] ?? 1, x, i * width, mean, 0, width);
  const total = weights?.reduce((a, b) => a + b, 0) || rows;
  return mean.map((sum) => Math.fround(sum / total));
}

/**
 * The strongest components of X [rows, width].
 *
 * Numerical rank: the fewest components with which every row is represented (`ROUNDING`). It is judged row by row
 * and not by the largest singular value, so that an adapter a thousand times smaller than its neighbours still counts.
 *
 * @param floors per row, the length below which what is left of it is rounding error: `ROUNDING` times its own size
 * @param choose how many components are wanted, or what says so, given all singular values and their sum of squares; clipped
 *   to the numerical rank
 */
export function principalComponents(
  x: Float64Array,
  rows: number,
  width: number,
  floors: Float64Array,
  choose: number | ((singular: Float64Array, total: number) => number),
  products: Products = PLAIN,
): Components {
  const limit = Math.min(rows, width);
  const singular = new Float64Array(limit);
  const vectors = new Float64Array(limit * width);
  let rest = x;
  let count = 0;
  let total = 0;
  let wanted = 0;
  for (let level = 0; ; level++) {
    const squares = rowSquares(rest, rows, width);
    if (level === 0) total = squares.reduce((sum, square) => sum + square, 0);
    if (squares.every((square, i) => Math.sqrt(square) <= floors[i]!)) {
      if (level === 0) total = 0;
      break;
    }
    const eigen = gramEigen(rest, rows, width, products);
    const strongest = eigen.values[0]!;
    let resolved = 0;
    for (let i = 0; count + i < singular.length; i++) {
      const value = Math.max(0, eigen.values[i]!);
      singular[count + i] = Math.sqrt(value);
      if (value > RESOLVED * strongest) resolved++;
    }
    if (level === 0) wanted = Math.min(limit, typeof choose === "number" ? choose : choose(singular, total));
    const take = Math.min(wanted - count, resolved);
    if (take <= 0) break;
    vectors.set(eigen.vectors(take), count * width);
    orthonormalize(vectors, count, take, width, singular);
    if (level === 0 && take === wanted) {
      // What a first Gram matrix resolves is far above rounding: no need to look at what is left.
      count = wanted;
      break;
    }
    const added = vectors.subarray(count * width, (count + take) * width);
    const along = products.multiplyTransposed(rest, added, rows, take, width);
    rest = without(rest, products.multiply(along, added, rows, width, take));
    if (level === 0) count += take;
    else {
      const kept = needed(rowSquares(rest, rows, width), along, take, floors);
      count += kept;
      if (kept < take) break;
    }
    if (count === wanted) break;
  }
  fixSigns(vectors, count, width);
  return { count, vectors: vectors.slice(0, count * width), singular: singular.sort().reverse(), total };
}

/** A stack on its components: how far each row lies along each of them says how many are worth it, before any is made. */
export interface Coordinates extends Pick<Components, "singular" | "total"> {
  /** How many components there are; those below 2⁻¹⁶ of the strongest are not among them. */
  readonly count: number;
  /** [rows, count]. */
  readonly along: Float64Array;
  /** The strongest `count` components. */
  strongest(count: number): Components;
}

/** X [rows, width] on its components. */
export function coordinates(x: Float64Array, rows: number, width: number, products: Products = PLAIN): Coordinates {
  const n = Math.min(rows, width);
  const eigen = symmetricEigen(smallerGram(x, rows, width, products), n, products.tridiagonalize);
  const singular = eigen.values.map((value) => Math.sqrt(Math.max(0, value)));
  const total = rowSquares(x, rows, width).reduce((sum, square) => sum + square, 0);
  const count = eigen.values.filter((value) => value > RESOLVED * eigen.values[0]!).length;
  const found = eigen.vectors(count);
  const across = rows <= width;
  // The smaller Gram matrix of X = U·S·Vᵀ has U or V.
  const along = across
    ? transpose(
        found.map((value, at) => value * singular[Math.floor(at / rows)]!),
        count,
        rows,
      )
    : products.multiplyTransposed(x, found, rows, count, width);
  const strongest = (count: number): Components => {
    const own = found.slice(0, count * n);
    const vectors = across ? products.multiply(own, x, count, width, rows) : own;
    for (let k = 0; across && k < count; k++) scale(1 / singular[k]!, vectors, k * width, width);
    orthonormalize(vectors, 0, count, width, singular);
    fixSigns(vectors, count, width);
    return { count, vectors, singular, total };
  };
  return { count, singular, total, along, strongest };
}

/** Eigenvalues of the smaller Gram matrix of X, with vectors in the row space either way. */
function gramEigen(x: Float64Array, rows: number, width: number, products: Products): Eigen {
  const eigen = symmetricEigen(smallerGram(x, rows, width, products), Math.min(rows, width), products.tridiagonalize);
  if (rows > width) return eigen;
  return {
    values: eigen.values,
    vectors(count) {
      const out = products.multiply(eigen.vectors(count), x, count, width, rows);
      for (let k = 0; k < count; k++) scale(1 / Math.sqrt(eigen.values[k]!), out, k * width, width);
      return out;
    },
  };
}

function smallerGram(x: Float64Array, rows: number, width: number, products: Products): Float64Array {
  return rows > width ? products.gram(transpose(x, rows, width), width, rows) : products.gram(x, rows, width);
}

/**
 * Makes vectors `from` to `from + count` unit vectors, the weak ones orthogonal to all before them (twice is enough).
 */
export function orthonormalize(
  v: Float64Array,
  from: number,
  count: number,
  width: number,
  singular: Float64Array,
): void {
  for (let k = from; k < from + count; k++) {
    const isWeak = singular[k]! < WEAK * singular[0]!;
    for (let pass = 0; pass < (isWeak ? 2 : 0); pass++)
      for (let j = 0; j < k; j++) addScaled(-dot(v, j * width, v, k * width, width), v, j * width, v, k * width, width);
    scale(1 / norm(v, k * width, width), v, k * width, width);
  }
}

/** X − Y in a new array. */
function without(x: Float64Array, y: Float64Array): Float64Array {
  return x.map((value, i) => value - y[i]!);
}

/** How many of the last `count` components every row needs, given the squares left of the rows with all. */
function needed(rest: Float64Array, along: Float64Array, count: number, floors: Float64Array): number {
  for (let k = count; k > 0; k--) {
    for (let i = 0; i < rest.length; i++) {
      rest[i]! += along[i * count + k - 1]! ** 2;
      if (Math.sqrt(rest[i]!) > floors[i]!) return k;
    }
  }
  return 0;
}

/** Signs of singular vectors are arbitrary. The largest entry (the first of equals) is made positive. */
export function fixSigns(vectors: Float64Array, count: number, width: number): void {
  for (let k = 0; k < count; k++) {
    if (dominant(vectors, k * width, width) < 0) scale(-1, vectors, k * width, width);
  }
}

/** One side's basis, ready to be written, and what is known of the stack it came from. */
export interface SideBasis extends StoredBasis {
  /** Singular values of the (centred) stack, descending, min(rows, width) of them; the smallest may be rounding. */
  singular: Float64Array;
  /** Share of the squared singular values that the components hold; 1 where there are none to hold. */
  explained: number;
}

/** One side of a stack, decomposed. */
export interface Side {
  width: number;
  /** All tasks' rows, stacked [Σ ranks, width], those without coefficients too. */
  rows: Float64Array;
  mean: Float64Array | undefined;
  components: Components;
}

/**
 * Mean and components of one side.
 * @param all factors whole
 * @param factors what is kept of them
 */
export function decompose(
  all: readonly Float64Array[],
  factors: readonly Float64Array[],
  width: number,
  options: ExtractOptions,
): Side {
  const rows = stacked(factors);
  const count = rows.length / width;
  const own = rowSquares(rows, count, width).map(Math.sqrt);
  if (options.gauge === "balanced") {
    // Row i counts in ΔW by its square, s_i, and carries the rounding errors of all of ΔW, s_1, magnified by √s_i.
    let at = 0;
    for (const factor of factors) {
      const first = own[at]!;
      for (const end = at + factor.length / width; at < end; at++) own[at] = own[at]! > 0 ? first ** 2 / own[at]! : 0;
    }
  }
  const weights = options.normalize ? ofRows(factors.map(reciprocal), factors, width) : undefined;
  const apart = meanWeights(factors, width, options.normalize);
  const counted = apart && ofRows(apart, factors, width);
  const mean = options.centering === "keep" ? columnMeans(rows, count, width, counted) : undefined;
  const x = centred(rows, count, width, mean);
  // A row is as large as what is stored of it: coefficients for the centred row, the mean for the rest.
  const left = rowSquares(x, count, width);
  const floors = own.map((size, i) => ROUNDING * Math.max(size, Math.sqrt(left[i]!)));
  weights?.forEach((weight, i) => {
    scale(weight, x, i * width, width);
    floors[i]! *= weight;
  });
  const components = principalComponents(x, count, width, floors, wanted(options), options.products);
  return { width, rows: options.rank === undefined ? rows : stacked(all), mean, components };
}

/** Tasks whose rows are so many times as long as those of others: a mean of both would take digits from the shorter ones. */
const FAR_APART = 8;

/**
 * What the rows of each factor count in their mean. All rows count alike, as in the paper, unless tasks are to count alike, or a mean would
 * be much longer than the rows of some: coefficients cancel it to the digits of f32 of the longer one.
 * @returns undefined where all count alike
 */
export function meanWeights(
  factors: readonly Float64Array[],
  width: number,
  normalize: boolean | undefined,
): number[] | undefined {
  let [shortest, longest] = [Infinity, 0];
  for (const factor of factors) {
    const length = norm(factor) / Math.sqrt(factor.length / width);
    if (length > 0) [shortest, longest] = [Math.min(shortest, length), Math.max(longest, length)];
  }
  if (!normalize && longest <= FAR_APART * shortest) return undefined;
  // Least squares of factors that are scaled to one length.
  return factors.map((factor) => reciprocal(factor) ** 2);
}

/** A number of each factor, for each of its rows. */
function ofRows(numbers: readonly number[], factors: readonly Float64Array[], width: number): number[] {
  return factors.flatMap((factor, i) => Array<number>(factor.length / width).fill(numbers[i]!));
}

/** Reciprocal of a factor's length; 0 where the length is 0. */
export function reciprocal(factor: Float64Array): number {
  return 1 / (norm(factor) || Infinity);
}

/** The rows of factors, one below the other. */
export function stacked(factors: readonly Float64Array[]): Float64Array {
  const rows = new Float64Array(factors.reduce((sum, factor) => sum + factor.length, 0));
  let at = 0;
  for (const factor of factors) {
    rows.set(factor, at);
    at += factor.length;
  }
  return rows;
}

/** How components are stored. */
export interface StoredAs {
  readonly type: Dtype;
  /** Steps of their integers and of the mean's; those that would be all zeros are left out. `type` then means nothing. */
  readonly steps?: Float64Array | undefined;
}

/** The first `count` components and the mean as they are stored. */
export function encodeSide(side: Omit<Side, "rows">, most: number, stored: StoredAs, products?: Products): SideBasis {
  const { type, steps } = stored;
  const mixed = !steps && fewBits(type);
  const { width, mean } = side;
  const { vectors, singular, total } = side.components;
  const first = vectors.subarray(0, most * width);
  const all = new Float64Array((most + (mean ? 1 : 0)) * width);
  all.set(mixed ? mix(first, most, width, products) : first);
  if (mean) all.set(mean, most * width);
  const count = steps ? alive(all, most, width, steps) : most;
  if (count === 0 && !mean) {
    // No reader takes a side with neither components nor a mean.
    const zeros = { ...side, mean: new Float64Array(width) };
    return encodeSide(zeros, 0, { type, steps: steps && Float64Array.of(1) }, products);
  }
  // The mean lies behind the components that are left.
  const values = all.copyWithin(count * width, most * width).subarray(0, all.length - (most - count) * width);
  const rows = values.length / width;
  let held = 0;
  for (let k = 0; k < count; k++) held += singular[k]! ** 2;
  const own = steps && [...steps.subarray(0, count), ...(mean ? [steps.at(-1)!] : [])];
  const encoded = own
    ? encodeSteps(values, rows, width, own)
    : { dtype: type, encoded: encodeTensor(type, values, rows, width, undefined, products?.findScale) };
  return {
    ...encoded,
    components: count,
    width,
    mean: mean !== undefined,
    singular,
    explained: total > 0 ? Math.min(1, held / total) : 1,
  };
}

/** How many components there are up to the last that does not become all zeros. */
function alive(values: Float64Array, count: number, width: number, steps: Float64Array): number {
  for (let k = count; k > 0; k--) {
    const row = values.subarray((k - 1) * width, k * width);
    const step = steps[k - 1]!;
    if (step > 0 && row.some((value) => toInteger(value / step, 1) !== 0)) return k;
  }
  return 0;
}

/** All adapters that adapt one module. Ranks may differ. */
export interface ModuleStack {
  name: string;
  out: number;
  in: number;
  members: readonly ModuleMember[];
}

/** Everything a pack stores of one module, and its errors. */
export interface ModuleExtraction {
  A: SideBasis;
  B: SideBasis;
  /** Projected tasks, in the order of the stack. */
  tasks: ProjectedTask[];
}

/**
 * Extracts one module.
 * @throws RangeError for wrong shapes, NaN or infinity, options out of range, and values that do not fit the stored types
 */
export function extractModule(stack: ModuleStack, options: ExtractOptions): ModuleExtraction {
  checkSelection(options.select);
  checkRank(options);
  if (stack.members.length === 0) throw new RangeError(`${stack.name}: no adapter adapts this module`);
  const { basisDtype: type, coefficientDtype, products, rank } = options;
  const { pairs, kept } = gaugedPairs(stack, options);
  const ranks = pairs.map((pair) => pair.rank);
  const steps = options.steps && kept.map((pair, i) => rowSteps(pair, options.steps![i]!));
  const extractSide = (which: "A" | "B"): { side: Side; basis: SideBasis } => {
    const key = FACTORS[which];
    const width = which === "A" ? stack.in : stack.out;
    const factors = (of: readonly Pair[]): Float64Array[] => of.map((pair) => pair[key]);
    const side = decompose(factors(pairs), factors(kept), width, options);
    if (!steps && mirrors(options)) mirror(side.rows, ranks, width, rank);
    const { count, vectors } = side.components;
    // Steps of rows that are not kept stay 0.
    const own = steps && stacked(steps.map((task, i) => lengthened(task[key], ranks[i]!)));
    const basis = storing(
      `basis ${which} of "${stack.name}"`,
      () => largestOf(stack, ranks, side),
      () => encodeSide(side, count, { type, steps: own && componentSteps(side, vectors, own, products) }, products),
    );
    return { side, basis };
  };
  const A = extractSide("A");
  const B = extractSide("B");
  const space = openModule({ A: A.basis, B: B.basis }, products);
  const a = targetsOf(space.A, A.side.rows, ranks, rank);
  const b = targetsOf(space.B, B.side.rows, ranks, rank);
  const tasks = stack.members.map(({ id }, i) => ({
    id,
    ...storing(`coefficients of "${stack.name}"`, id, () =>
      projectTargets(space, a[i]!, b[i]!, coefficientDtype, steps?.[i]),
    ),
  }));
  return { A: A.basis, B: B.basis, tasks };
}

/** The pairs of a stack in the gauge asked for, and what is kept of them as views. */
function gaugedPairs(
  stack: ModuleStack,
  { gauge, centering, normalize, rank = Infinity, products }: ExtractOptions,
): { pairs: Pair[]; kept: Pair[] } {
  const given = stack.members.map((member) => toPair(member, stack.out, stack.in));
  const pairs = gauge === "balanced" ? given.map((pair) => balance(pair, stack.out, stack.in, products)) : given;
  const kept = pairs.map((pair) => leadingRows(pair, rank));
  // A sign cancels between component and coefficient unless a mean is kept, which depends on it.
  if (gauge === "balanced" && centering === "keep") {
    const factors = kept.map(({ A }) => A);
    const weights = meanWeights(factors, stack.in, normalize);
    // Turned towards the mean that is stored, in which rows count by weights.
    for (const [i, pair] of kept.entries()) scalePair(pair, weights?.[i] || 1);
    alignSigns(kept, stack.out, stack.in);
    for (const [i, pair] of kept.entries()) scalePair(pair, 1 / (weights?.[i] || 1));
  }
  return { pairs, kept };
}

function scalePair({ A, Bt }: Pair, factor: number): void {
  for (const side of factor === 1 ? [] : [A, Bt]) scale(factor, side, 0, side.length);
}

/** Whose rows are the largest. */
function largestOf({ members }: ModuleStack, ranks: readonly number[], { rows, width }: Side): string {
  let at = 0;
  const peaks = ranks.map((rank) => {
    const own = rows.subarray(at * width, (at += rank) * width);
    return own.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  });
  return members[peaks.indexOf(Math.max(...peaks))]!.id;
}

/**
 * Components of one module (Algorithm 1 of the paper): the adapters of a module become two bases, stored once, and
 * coefficients per task, a row of a factor each. Adapters that come later are projected onto a stored basis. Principal
 * components of a stack of rows are computed in f64, from the smaller Gram matrix, as many as asked but never a
 * direction that is only rounding error. Works on one module at a time, on arrays only: no files, no pack.
 */
import { refuseLarge } from "../format/encode.ts";
import { type Dtype, decodeTensor, isQuantized, sum } from "../tensor/dtypes.ts";
import { encodeSteps, encodeTensor, type FindScale, storing, toInteger } from "../tensor/encode.ts";
import { FACTORS, type Term } from "../tensor/term.ts";
import {
  alignSigns,
  alignTo,
  balance,
  componentSteps,
  deltaError,
  fewBits,
  leadingRows,
  mirror,
  mix,
  type Pair,
  pairOf,
  type RowSteps,
  relative,
  rowSteps,
} from "./factors.ts";
import * as linalg from "./linalg.ts";

/** A value for each factor of a module: A, which reads the layer's input, and B, which writes its output. */
export type BySide<T> = Readonly<Record<"A" | "B", T>>;

/** A factor of a task as it is stored: coefficients over a basis, residual rows for what that lacks, or both. */
export interface Factor {
  /** Number of the basis among those of its side, and whether its mean is added; undefined without coefficients. */
  readonly basis?: number | undefined;
  readonly mean?: boolean | undefined;
  /** Encoded [rank, K]. */
  readonly coefficients?: Uint8Array | undefined;
  /** Encoded [rank, width]. */
  readonly residual?: Uint8Array | undefined;
}

/** ΔW of one task in one module as it is stored, and what that loses. */
export interface TaskUpdate extends BySide<Factor> {
  readonly id: string;
  /** Rows of both factors: the adapter's rank, or less where it was trimmed. */
  readonly rank: number;
  readonly dtype: Dtype;
  /**
   * ‖ΔW − ΔW'‖ / ‖ΔW‖ with ΔW' as stored; 0 where ΔW is zero. Components measure a balanced pair against itself,
   * without the directions that are zero within rounding: below 1e-6 of ‖ΔW‖.
   */
  readonly error: number;
  /** ‖ΔW‖. */
  readonly norm: number;
}

/** The update of one module by one adapter, without its magnitude. */
export interface ModuleMember extends Pick<Term, "rank" | "A" | "Bt"> {
  readonly id: string;
}

/** All adapters that adapt one module. Ranks may differ. */
export interface ModuleStack {
  name: string;
  out: number;
  in: number;
  members: readonly ModuleMember[];
}

/** Factorisation: factors are taken as they come, or rewritten as B = U·√S, A = √S·Vᵀ first. */
export type Gauge = "as-trained" | "balanced";

/**
 * Number of components of a factor, never more than its numerical rank: `k` that many; `energy` the fewest with that
 * share of the squared singular values, 1 for all of them.
 */
export type ComponentSelection =
  | { readonly kind: "k"; readonly k: number }
  | { readonly kind: "energy"; readonly share: number };

/** Options of projection. */
export interface ProjectOptions {
  readonly gauge: Gauge;
  /**
   * The most rows that a task keeps of each module, its strongest directions: balanced factorisation only. Default:
   * all.
   */
  readonly rank?: number | undefined;
  readonly coefficientDtype: Dtype;
  /**
   * Quantisation step: the change of ΔW from one integer of a coefficient to the next. Default: as `coefficientDtype`
   * says.
   */
  readonly step?: number | undefined;
}

/** Options of extraction. */
export interface ExtractOptions extends Omit<ProjectOptions, "step"> {
  /** "keep" subtracts the mean of the rows and stores it, "none" uses none. */
  readonly centering: "keep" | "none";
  /**
   * Every task counts alike when components are sought, however large its update is: one a thousand times larger than
   * the others would have them to itself. Default: false.
   */
  readonly normalize?: boolean | undefined;
  /** Default: no components of all tasks. */
  readonly select?: ComponentSelection | undefined;
  readonly basisDtype: Dtype;
  /**
   * Quantisation steps of the members of a stack: the change of ΔW from one integer to the next. Coefficients are then
   * int8, and components integers of as many bits as they need, whatever the types say, with steps that make all
   * equally coarse for ΔW.
   */
  readonly steps?: readonly number[] | undefined;
  /** Products of large matrices: half the time of an extraction is spent there. Default: the plain loops. */
  readonly products?: linalg.Products | undefined;
}

/** Number of components that a selection asks for, or a function of the singular values that returns it. */
export function wanted(select: ComponentSelection): number | ((singular: Float64Array, total: number) => number) {
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
  /** Number of components: at most as many as were asked for. */
  count: number;
  /** [count, width], orthonormal within 1e-8, strongest first, the largest entry of each positive. */
  vectors: Float64Array;
  /**
   * All min(rows, width) singular values, descending. Those below 1e-7 of the largest are rounding errors unless the
   * components asked for go down to them.
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
  for (let i = 0; i < rows; i++) linalg.addScaled(weights?.[i] ?? 1, x, i * width, mean, 0, width);
  const total = sum(weights ?? []) || rows;
  return mean.map((sum) => Math.fround(sum / total));
}

/**
 * The strongest components of X [rows, width].
 *
 * Numerical rank: the fewest components with which every row is represented (`ROUNDING`). It is judged row by row
 * and not by the largest singular value, so that an adapter a thousand times smaller than its neighbours still counts.
 *
 * @param floors per row, the length below which what is left of it is rounding error: `ROUNDING` times its own size
 * @param choose the number of components, or a function of all singular values and their sum of squares that returns
 *   it; clipped to the numerical rank
 */
export function principalComponents(
  x: Float64Array,
  rows: number,
  width: number,
  floors: Float64Array,
  choose: number | ((singular: Float64Array, total: number) => number),
  products: linalg.Products = linalg.PLAIN,
): Components {
  const limit = Math.min(rows, width);
  const singular = new Float64Array(limit);
  const vectors = new Float64Array(limit * width);
  let rest = x;
  let count = 0;
  let total = 0;
  let wanted = 0;
  for (let level = 0; ; level++) {
    const squares = linalg.rowSquares(rest, rows, width);
    if (level === 0) total = sum(squares);
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
      // Components of a first Gram matrix are far above rounding: the rest need not be looked at.
      count = wanted;
      break;
    }
    const added = vectors.subarray(count * width, (count + take) * width);
    const along = products.multiplyTransposed(rest, added, rows, take, width);
    const explained = products.multiply(along, added, rows, width, take);
    rest = rest.map((value, i) => value - explained[i]!);
    if (level === 0) count += take;
    else {
      const kept = needed(linalg.rowSquares(rest, rows, width), along, take, floors);
      count += kept;
      if (kept < take) break;
    }
    if (count === wanted) break;
  }
  fixSigns(vectors, count, width);
  return { count, vectors: vectors.slice(0, count * width), singular: singular.sort().reverse(), total };
}

/** A stack on its components: coordinates of the rows say how many components are worth it, before any is made. */
interface Coordinates extends Pick<Components, "singular" | "total"> {
  /** Number of components; those below 2⁻¹⁶ of the strongest are not among them. */
  readonly count: number;
  /** [rows, count]. */
  readonly along: Float64Array;
  strongest(count: number): Components;
}

export function coordinates(
  x: Float64Array,
  rows: number,
  width: number,
  products: linalg.Products = linalg.PLAIN,
): Coordinates {
  const n = Math.min(rows, width);
  const eigen = linalg.symmetricEigen(smallerGram(x, rows, width, products), n, products.tridiagonalize);
  const singular = eigen.values.map((value) => Math.sqrt(Math.max(0, value)));
  const total = sum(linalg.rowSquares(x, rows, width));
  const count = eigen.values.filter((value) => value > RESOLVED * eigen.values[0]!).length;
  const found = eigen.vectors(count);
  const across = rows <= width;
  // The smaller Gram matrix of X = U·S·Vᵀ has U or V.
  const along = across
    ? linalg.transpose(
        found.map((value, at) => value * singular[Math.floor(at / rows)]!),
        count,
        rows,
      )
    : products.multiplyTransposed(x, found, rows, count, width);
  const strongest = (count: number): Components => {
    const own = found.slice(0, count * n);
    const vectors = across ? products.multiply(own, x, count, width, rows) : own;
    for (let k = 0; across && k < count; k++) linalg.scale(1 / singular[k]!, vectors, k * width, width);
    orthonormalize(vectors, 0, count, width, singular);
    fixSigns(vectors, count, width);
    return { count, vectors, singular, total };
  };
  return { count, singular, total, along, strongest };
}

/** Eigenvalues of the smaller Gram matrix of X, with vectors in the row space. */
function gramEigen(x: Float64Array, rows: number, width: number, products: linalg.Products): linalg.Eigen {
  const eigen = linalg.symmetricEigen(
    smallerGram(x, rows, width, products),
    Math.min(rows, width),
    products.tridiagonalize,
  );
  if (rows > width) return eigen;
  return {
    values: eigen.values,
    vectors(count) {
      const out = products.multiply(eigen.vectors(count), x, count, width, rows);
      for (let k = 0; k < count; k++) linalg.scale(1 / Math.sqrt(eigen.values[k]!), out, k * width, width);
      return out;
    },
  };
}

function smallerGram(x: Float64Array, rows: number, width: number, products: linalg.Products): Float64Array {
  return rows > width ? products.gram(linalg.transpose(x, rows, width), width, rows) : products.gram(x, rows, width);
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
      for (let j = 0; j < k; j++)
        linalg.addScaled(-linalg.dot(v, j * width, v, k * width, width), v, j * width, v, k * width, width);
    linalg.scale(1 / linalg.norm(v, k * width, width), v, k * width, width);
  }
}

/** Number of the last `count` components that every row needs, given the squares left of the rows with all. */
function needed(rest: Float64Array, along: Float64Array, count: number, floors: Float64Array): number {
  for (let k = count; k > 0; k--) {
    for (let i = 0; i < rest.length; i++) {
      rest[i]! += along[i * count + k - 1]! ** 2;
      if (Math.sqrt(rest[i]!) > floors[i]!) return k;
    }
  }
  return 0;
}

/**
 * Makes the largest entry (the first of equals) of each vector positive, since signs of singular vectors are arbitrary.
 */
export function fixSigns(vectors: Float64Array, count: number, width: number): void {
  for (let k = 0; k < count; k++) {
    if (linalg.dominant(vectors, k * width, width) < 0) linalg.scale(-1, vectors, k * width, width);
  }
}

/** The basis of one factor, ready to be written, with facts of the stack it came from. */
export interface SideBasis extends Basis {
  /** Singular values of the (centred) stack, descending, min(rows, width) of them; the smallest may be rounding. */
  singular: Float64Array;
  /** Share of the squared singular values that the components hold; 1 where there are none to hold. */
  explained: number;
}

/** One factor of a stack, decomposed. */
export interface Side {
  width: number;
  /** Rows of all tasks, stacked [Σ ranks, width], those without coefficients too. */
  rows: Float64Array;
  mean: Float64Array | undefined;
  components: Components;
}

/**
 * Mean and components of one factor of all tasks.
 * @param all rows of each task
 * @param factors those of them that are kept
 */
export function decompose(
  all: readonly Float64Array[],
  factors: readonly Float64Array[],
  width: number,
  options: ExtractOptions,
): Side {
  const rows = stacked(factors);
  const count = rows.length / width;
  const own = linalg.rowSquares(rows, count, width).map(Math.sqrt);
  if (options.gauge === "balanced") {
    // Row i counts in ΔW by its square, s_i, and carries the rounding errors of all of ΔW, s_1, magnified by √s_i.
    let at = 0;
    for (const factor of factors) {
      const first = own[at]!;
      for (const end = at + factor.length / width; at < end; at++) own[at] = own[at]! > 0 ? first ** 2 / own[at]! : 0;
    }
  }
  const weights = options.normalize ? ofRows(factors.map(reciprocal), factors, width) : undefined;
  const shares = meanWeights(factors, width, options.normalize);
  const counted = shares && ofRows(shares, factors, width);
  const mean = options.centering === "keep" ? columnMeans(rows, count, width, counted) : undefined;
  const x = linalg.centred(rows, count, width, mean);
  // A row is as large as what is stored of it: coefficients for the centred row, the mean for the rest.
  const left = linalg.rowSquares(x, count, width);
  const floors = own.map((size, i) => linalg.ROUNDING * Math.max(size, Math.sqrt(left[i]!)));
  weights?.forEach((weight, i) => {
    linalg.scale(weight, x, i * width, width);
    floors[i]! *= weight;
  });
  const components = principalComponents(x, count, width, floors, wanted(options.select!), options.products);
  return { width, rows: options.rank === undefined ? rows : stacked(all), mean, components };
}

/**
 * Tasks whose rows are so many times as long as those of others: a mean of both would take digits from the shorter
 * ones.
 */
const FAR_APART = 8;

/**
 * Weights of each factor's rows in their mean. All rows count alike, as in the paper, unless tasks are to count alike,
 * or a mean would be much longer than the rows of some: coefficients cancel it to the digits of f32 of the longer one.
 * @returns undefined where all count alike
 */
function meanWeights(
  factors: readonly Float64Array[],
  width: number,
  normalize: boolean | undefined,
): number[] | undefined {
  let shortest = Infinity;
  let longest = 0;
  for (const factor of factors) {
    const length = linalg.norm(factor) / Math.sqrt(factor.length / width);
    if (length === 0) continue;
    shortest = Math.min(shortest, length);
    longest = Math.max(longest, length);
  }
  if (!normalize && longest <= FAR_APART * shortest) return undefined;
  // Least squares of factors that are scaled to one length.
  return factors.map((factor) => reciprocal(factor) ** 2);
}

function ofRows(numbers: readonly number[], factors: readonly Float64Array[], width: number): number[] {
  return factors.flatMap((factor, i) => Array<number>(factor.length / width).fill(numbers[i]!));
}

/** Reciprocal of a factor's length; 0 where the length is 0. */
export function reciprocal(factor: Float64Array): number {
  return 1 / (linalg.norm(factor) || Infinity);
}

export function stacked(factors: readonly Float64Array[]): Float64Array {
  const rows = new Float64Array(sum(factors, (factor) => factor.length));
  let at = 0;
  for (const factor of factors) {
    rows.set(factor, at);
    at += factor.length;
  }
  return rows;
}

/**
 * The first `most` components and the mean as they are stored.
 * @param stored the number format; or steps of the integers of the components and, last, of the mean. Components that
 *   would be all zeros are left out
 */
export function encodeSide(
  side: Omit<Side, "rows">,
  most: number,
  stored: Dtype | Float64Array,
  products?: linalg.Products,
): SideBasis {
  const { width, mean } = side;
  const { vectors, singular, total } = side.components;
  const first = vectors.subarray(0, most * width);
  const all = new Float64Array((most + (mean ? 1 : 0)) * width);
  const isType = typeof stored === "string";
  all.set(isType && fewBits(stored) ? mix(first, most, width, products) : first);
  if (mean) all.set(mean, most * width);
  const count = isType ? most : alive(all, most, width, stored);
  // No reader takes a basis with neither components nor a mean.
  if (count === 0 && !mean)
    return encodeSide({ ...side, mean: new Float64Array(width) }, 0, isType ? stored : Float64Array.of(1), products);
  // The mean follows the components that are left.
  const values = all.copyWithin(count * width, most * width).subarray(0, all.length - (most - count) * width);
  const rows = values.length / width;
  let held = 0;
  for (let k = 0; k < count; k++) held += singular[k]! ** 2;
  const encoded = isType
    ? { dtype: stored, encoded: encodeTensor(stored, values, rows, width, undefined, products?.findScale) }
    : encodeSteps(values, rows, width, [...stored.subarray(0, count), ...(mean ? [stored.at(-1)!] : [])]);
  return {
    ...encoded,
    components: count,
    width,
    mean: mean !== undefined,
    singular,
    explained: total > 0 ? Math.min(1, held / total) : 1,
  };
}

/** Number of components up to the last that does not become all zeros. */
function alive(values: Float64Array, count: number, width: number, steps: Float64Array): number {
  for (let k = count; k > 0; k--) {
    const row = values.subarray((k - 1) * width, k * width);
    const step = steps[k - 1]!;
    if (step > 0 && row.some((value) => toInteger(value / step, 1) !== 0)) return k;
  }
  return 0;
}

/** The basis of one factor as it lies in a pack. */
export interface Basis {
  dtype: Dtype;
  /** K. */
  components: number;
  width: number;
  /** A mean follows the components as the last row. */
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
  /** Products of the large matrices. */
  products: linalg.Products;
}

/** Rows that are to be approximated on a subspace, x = rows − M. */
export interface Target {
  rank: number;
  /** Number of leading rows that have coefficients. The others are not stored, and count as lost. */
  kept: number;
  /** [rank, width]. */
  values: Float64Array;
  /** ‖x‖² of each row. */
  squares: Float64Array;
  /** x in the orthonormal coordinates [rank, components]. */
  at: Float64Array;
}

// Adapters on bases as they are stored: coefficients, and what they lose. Extraction ends here for its own tasks, and
// adapters that come later begin here. Components that were rounded are no longer orthonormal, so coefficients are
// always solved for, never read off by products. The Cholesky factor L of the components' Gram matrix turns
// coefficients α into coordinates α·L on an orthonormal basis of the same span, in which the length of a projection is
// a sum of squares.

export function openSubspace(stored: Basis, products: linalg.Products = linalg.PLAIN): Subspace {
  const { components, width } = stored;
  const rows = components + (stored.mean ? 1 : 0);
  const values = new Float64Array(decodeTensor(stored.dtype, stored.encoded, rows, width));
  const vectors = values.subarray(0, components * width);
  const mean = stored.mean ? values.subarray(components * width) : undefined;
  const factor = linalg.cholesky(products.gram(vectors, components, width), components);
  return { components, width, mean, vectors, factor, products };
}

/**
 * Takes the stacked rows [Σ ranks, width] of tasks as targets: all at once, because one large product costs less than
 * many small ones.
 * @param most rows of a task that have coefficients
 */
export function targetsOf(
  space: Subspace,
  rows: Float64Array,
  ranks: readonly number[],
  most: number = Infinity,
): Target[] {
  const { components, width, mean } = space;
  const total = sum(ranks);
  const x = linalg.centred(rows, total, width, mean);
  const at = space.products.multiplyTransposed(x, space.vectors, total, components, width);
  linalg.forwardSolve(space.factor, components, at, total);
  const squares = linalg.rowSquares(x, total, width);
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
  linalg.backwardSolve(factor, components, components, out, kept);
  return out;
}

/** The largest sine of the angle between a row, less the mean, and the span; 0 for rows that are the mean. */
function largestSine(space: Subspace, rows: Float64Array, rank: number): number {
  const { components, width } = space;
  const [{ squares, at }] = targetsOf(space, rows, [rank]) as [Target];
  const whole = linalg.rowSquares(rows, rank, width);
  let largest = 0;
  for (let i = 0; i < rank; i++) {
    if (squares[i]! <= linalg.ROUNDING ** 2 * whole[i]!) continue;
    largest = Math.max(largest, 1 - linalg.dot(at, i * components, at, i * components, components) / squares[i]!);
  }
  return Math.sqrt(largest);
}

/** α·E + M: the rows [rank, width] that coefficients [rank, components] stand for. */
export function expand(space: Subspace, coefficients: Float64Array, rank: number): Float64Array {
  const { components, width, mean } = space;
  const rows = space.products.multiply(coefficients, space.vectors, rank, width, components);
  if (mean) for (let i = 0; i < rows.length; i++) rows[i]! += mean[i % width]!;
  return rows;
}

/**
 * Encodes values [rows, width] as a tensor of `type`, and decodes them again.
 * @param steps as of `encodeTensor`, as `find`
 */
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

type ModuleSpace = BySide<Subspace>;

export function openModule({ A, B }: BySide<Basis>, products?: linalg.Products): ModuleSpace {
  return { A: openSubspace(A, products), B: openSubspace(B, products) };
}

/**
 * Brings one more adapter onto a stored basis: its coefficients, and what it loses.
 * @throws RangeError for factors of other widths, NaN and infinity; UnstorableError for values too large for the type
 */
export function projectModule(space: ModuleSpace, member: ModuleMember, options: ProjectOptions): TaskUpdate {
  const { rank: most, coefficientDtype, step } = options;
  const pair = gauged(memberPair(member, space.B.width, space.A.width), space, options);
  const a = targetsOf(space.A, pair.A, [pair.rank], most)[0]!;
  const b = targetsOf(space.B, pair.Bt, [pair.rank], most)[0]!;
  const steps = step === undefined ? undefined : rowSteps(leadingRows(pair, a.kept), step);
  return projected(space, member.id, a, b, coefficientDtype, steps);
}

/** One adapter on a basis, given its rows. @param steps of the rows' coefficients, if they are integers of such */
function projected(
  space: ModuleSpace,
  id: string,
  a: Target,
  b: Target,
  dtype: Dtype,
  steps: RowSteps | undefined,
): TaskUpdate {
  const { products } = space.A;
  const take = (basis: Subspace, target: Target, own?: Float64Array): { factor: Factor; rows: Float64Array } => {
    const { kept } = target;
    const alpha = solve(basis, target);
    const { encoded, values } = rounded(dtype, alpha, kept, basis.components, own, products.findScale);
    const factor = { basis: 0, mean: basis.mean !== undefined, coefficients: encoded };
    return { factor, rows: expand(basis, values, kept) };
  };
  const A = take(space.A, a, steps?.A);
  const B = take(space.B, b, steps?.Bt);
  const exact = { rank: a.rank, A: a.values, Bt: b.values };
  const { difference, norm } = deltaError(exact, { rank: a.kept, A: A.rows, Bt: B.rows }, products);
  return { id, rank: a.kept, dtype, A: A.factor, B: B.factor, error: relative(difference, norm), norm };
}

/** True where rows of unlike length would be rounded to few bits. */
function mirrors({ gauge, coefficientDtype }: ProjectOptions): boolean {
  return gauge === "balanced" && fewBits(coefficientDtype);
}

/**
 * Largest sine at which a row counts as within the components: far above the rounding of f32, far below any row that
 * was made elsewhere.
 */
const WITHIN = 1e-4;

/**
 * The pair in the factorisation of a pack, along the stored mean where there is one. About a mean, a pair that was
 * trained within the components lies in them in its own factorisation alone, and keeps it.
 */
export function gauged(trained: Pair, { A, B }: ModuleSpace, options: ProjectOptions): Pair {
  const { gauge, rank = Infinity, step } = options;
  if (gauge !== "balanced") return trained;
  const pair = balance(trained, B.width, A.width, A.products);
  if (A.mean && B.mean) alignTo(pair, { A: A.mean, Bt: B.mean });
  if (step === undefined && mirrors(options)) {
    mirror(pair.A, [pair.rank], A.width, rank);
    mirror(pair.Bt, [pair.rank], B.width, rank);
  }
  if (!(A.mean || B.mean) || trained.rank > rank) return pair;
  const distance = (pair: Pair): number =>
    Math.max(largestSine(A, pair.A, pair.rank), largestSine(B, pair.Bt, pair.rank));
  const before = distance(trained);
  // A task that was packed may lie nearly within as it was, too: about a short mean, or in all the width.
  return before < WITHIN && distance(pair) > Math.max(before, 8 * linalg.ROUNDING) ? trained : pair;
}

/** Components and coefficients of one module. */
export interface ModuleExtraction extends BySide<SideBasis> {
  /** Tasks in the order of the stack. */
  readonly tasks: readonly TaskUpdate[];
}

/** Extracts one module. @throws UnstorableError for values that are not finite, or do not fit the stored types */
export function extractModule(stack: ModuleStack, options: ExtractOptions): ModuleExtraction {
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
    const own = steps && stacked(steps.map((task, i) => linalg.lengthened(task[key], ranks[i]!)));
    const stored = own ? componentSteps(side, vectors, own, products) : type;
    const what = `basis ${which} of "${stack.name}"`;
    const owner = (): string => largestOf(stack, ranks, side);
    const basis = storing(what, owner, () => encodeSide(side, count, stored, products));
    refuseLarge(what, basis, basis.components + Number(basis.mean), owner);
    return { side, basis };
  };
  const A = extractSide("A");
  const B = extractSide("B");
  const space = openModule({ A: A.basis, B: B.basis }, products);
  const a = targetsOf(space.A, A.side.rows, ranks, rank);
  const b = targetsOf(space.B, B.side.rows, ranks, rank);
  const tasks = stack.members.map(({ id }, i) =>
    storing(`coefficients of "${stack.name}"`, id, () =>
      projected(space, id, a[i]!, b[i]!, coefficientDtype, steps?.[i]),
    ),
  );
  return { A: A.basis, B: B.basis, tasks };
}

/**
 * The factors of a member, [rank, in] and [rank, out].
 * @throws RangeError for factors of other widths, NaN and infinity
 */
export function memberPair(member: ModuleMember, out: number, inputs: number): Pair {
  for (const [name, values, width] of [
    ["A", member.A, inputs],
    ["Bt", member.Bt, out],
  ] as const) {
    const found = `adapter ${member.id}: ${name} holds ${values.length} values, expected rank ${member.rank} times ${width}`;
    if (!(member.rank >= 1) || values.length !== member.rank * width) throw new RangeError(found);
    const bad = values.findIndex((value) => !Number.isFinite(value));
    if (bad >= 0) throw new RangeError(`adapter ${member.id}: value ${bad} of ${name} is ${values[bad]}`);
  }
  return pairOf(member);
}

/** The pairs of a stack in the factorisation asked for, and their rows that are kept, as views. */
function gaugedPairs(
  stack: ModuleStack,
  { gauge, centering, normalize, rank = Infinity, products }: ExtractOptions,
): { pairs: Pair[]; kept: Pair[] } {
  const trained = stack.members.map((member) => memberPair(member, stack.out, stack.in));
  const pairs = gauge === "balanced" ? trained.map((pair) => balance(pair, stack.out, stack.in, products)) : trained;
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
  for (const side of factor === 1 ? [] : [A, Bt]) linalg.scale(factor, side, 0, side.length);
}

function largestOf({ members }: ModuleStack, ranks: readonly number[], { rows, width }: Side): string {
  let at = 0;
  const peaks = ranks.map((rank) => {
    at += rank * width;
    return Math.abs(linalg.dominant(rows, at - rank * width, rank * width));
  });
  return members[peaks.indexOf(Math.max(...peaks))]!.id;
}

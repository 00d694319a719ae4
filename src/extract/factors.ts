/**
 * A pair of factors (Bᵀ, A), and its ΔW = B·A: the balanced pair, signs and turns of rows, the error of an
 * approximation, and steps of integers. (B·R, R⁻¹·A) is the same ΔW for every invertible R, but Algorithm 1 of the
 * paper stacks A and B separately, so its result depends on R, the factorisation ("gauge").
 */

import { type Dtype, sum } from "../tensor/dtypes.ts";
import type { Term } from "../tensor/term.ts";
import * as linalg from "./linalg.ts";

/**
 * The factors of a term in f64, to compute with: rows are turned, mirrored and replaced here, which nothing that comes
 * from a reader may be. ΔW [out, in] = Btᵀ·A: A [rank, in], Bt [rank, out].
 */
export interface Pair {
  rank: number;
  A: Float64Array;
  Bt: Float64Array;
}

export function pairOf({ rank, A, Bt }: Pick<Term, "rank" | "A" | "Bt">): Pair {
  return { rank, A: new Float64Array(A), Bt: new Float64Array(Bt) };
}

/** X = L·Q, whose Q is known by its products alone. */
interface Factored {
  /** Lower trapezoidal [rows, size]. */
  L: Float64Array;
  size: number;
  /** U·Q [count, width] of U [count, size]. */
  across(u: Float64Array, count: number): Float64Array;
}

/**
 * Share of a row's square that must be independent of earlier rows, so that a Gram matrix has the digits that L needs.
 */
const INDEPENDENT = 2 ** -16;

/**
 * Factors X [rows, width], which stays as it is: by its Gram matrix, a fifth of the time of reflectors, where no row
 * leans on others.
 * @param whole false: without `across`
 */
function factored(
  x: Float64Array,
  rows: number,
  width: number,
  products: linalg.Products,
  whole: boolean = true,
): Factored {
  if (rows > 0 && rows <= width) {
    const g = products.gram(x, rows, width);
    const L = linalg.cholesky(g, rows);
    const across: Factored["across"] = (u, count) => {
      const own = u.slice(0, count * rows);
      linalg.backwardSolve(L, rows, rows, own, count);
      return products.multiply(own, x, count, width, rows);
    };
    let isIndependent = true;
    for (let i = 0; i < rows * rows; i += rows + 1) if (!(L[i]! ** 2 > INDEPENDENT * g[i]!)) isIndependent = false;
    if (isIndependent) return { L, size: rows, across };
  }
  const { L, Q, size } = linalg.lq(x.slice(), rows, width, whole);
  return { L, size, across: (u, count) => products.multiply(u, Q, count, width, size) };
}

/**
 * The balanced pair of the same ΔW = U·S·Vᵀ: B = U·√S, A = √S·Vᵀ, strongest first. Singular values below one f32 step
 * of the largest are dropped: a rank trim that loses nothing. At least one is kept, so that a zero adapter is a pair
 * of rank 1 full of zeros. The largest entry of each row of A is positive; `alignSigns` may turn rows afterwards.
 */
export function balance(pair: Pair, outputs: number, inputs: number, products: linalg.Products = linalg.PLAIN): Pair {
  const a = factored(pair.A, pair.rank, inputs, products);
  const b = factored(pair.Bt, pair.rank, outputs, products);
  const { U, S, V, rank } = core(pair.rank, a, b);
  const A = a.across(V, rank);
  const Bt = b.across(U, rank);
  for (let i = 0; i < rank; i++) {
    const factor = Math.sqrt(S[i]!) * (linalg.dominant(A, i * inputs, inputs) < 0 ? -1 : 1);
    linalg.scale(factor, A, i * inputs, inputs);
    linalg.scale(factor, Bt, i * outputs, outputs);
  }
  return { rank, A, Bt };
}

/** The singular values of ΔW that `balance` keeps, without the pair. */
export function singularValues(
  pair: Pair,
  outputs: number,
  inputs: number,
  products: linalg.Products = linalg.PLAIN,
): number[] {
  const a = factored(pair.A, pair.rank, inputs, products, false);
  const b = factored(pair.Bt, pair.rank, outputs, products, false);
  const { S, rank } = core(pair.rank, a, b);
  return [...S.subarray(0, rank)];
}

/**
 * ΔW = QBᵀ·(LBᵀ·LA)·QA: the SVD in brackets [n, m], which has the singular values of ΔW, and how many of them are kept.
 */
function core(
  inner: number,
  { L: LA, size: m }: Factored,
  { L: LB, size: n }: Factored,
): linalg.SVD & { rank: number } {
  const found = linalg.svd(linalg.multiply(linalg.transpose(LB, inner, n), LA, n, m, inner), n, m);
  let rank = 1;
  while (rank < Math.min(n, m) && found.S[rank]! > linalg.ROUNDING * found.S[0]!) rank++;
  return { ...found, rank };
}

/** The first rows, as views: of a balanced pair the best pair of that rank. */
export function leadingRows({ rank, A, Bt }: Pair, most: number): Pair {
  if (rank <= most) return { rank, A, Bt };
  return { rank: most, A: A.subarray(0, (A.length / rank) * most), Bt: Bt.subarray(0, (Bt.length / rank) * most) };
}

/** A direction of both sides at once: a sum of row pairs, such as the mean. */
type Direction = Pick<Pair, "A" | "Bt">;

/**
 * Settles the signs of all balanced pairs of a stack: every row pair (a, b) is turned to point along the stack's mean,
 * a·M_A + b·M_B ≥ 0. With signs left to chance the rows would cancel and the mean would be noise: on the 20 own-seed
 * adapters it holds 3.4 % of the stack's squares this way, 0.9 % with the largest entry of each row made positive.
 *
 * Rows are turned until none changes. Each round lengthens their sum S (Σ σ'·x·S ≥ Σ σ·x·S = ‖S‖²), so it ends. It
 * starts from the direction that most rows share, found by power iteration from the longest row, which does not depend
 * on the order of the adapters or on the signs they came in.
 */
export function alignSigns(pairs: readonly Pair[], outputs: number, inputs: number): void {
  let direction = longest(pairs, outputs, inputs);
  for (let round = 0; round < 8; round++) {
    direction = combine(pairs, direction, (along) => along);
    const length = Math.sqrt(squareOf(direction)) || 1;
    linalg.scale(1 / length, direction.A, 0, inputs);
    linalg.scale(1 / length, direction.Bt, 0, outputs);
  }
  // The cap only guards against rounding errors taking turns; a handful of rounds is usual.
  for (let round = 0; round < 50; round++) {
    const turned = pairs.map((pair) => alignTo(pair, direction)).some(Boolean);
    if (!turned && round > 0) return;
    direction = combine(pairs, direction, () => 1);
  }
}

/**
 * Turns the rows of a balanced pair to point along a mean M_A [in], M_B [out]; says whether any was turned. The same
 * rule as `alignSigns`, for an adapter that comes later. Rows at right angles to the mean, as rows of one adapter are
 * to each other, stay as they are: there the sign would be that of a rounding error.
 */
export function alignTo(pair: Pair, mean: Direction): boolean {
  const length = Math.sqrt(squareOf(mean));
  let turned = false;
  for (let i = 0; i < pair.rank; i++) {
    const row = rowOf(pair, i, mean);
    if (alongOf(row, mean) >= -1e-9 * length * Math.sqrt(squareOf(row))) continue;
    turned = true;
    linalg.scale(-1, row.A, 0, row.A.length);
    linalg.scale(-1, row.Bt, 0, row.Bt.length);
  }
  return turned;
}

/** Row pair i, as views, of the widths of `like`. */
function rowOf(pair: Pair, i: number, like: Direction): Direction {
  const inputs = like.A.length;
  const outputs = like.Bt.length;
  return {
    A: pair.A.subarray(i * inputs, (i + 1) * inputs),
    Bt: pair.Bt.subarray(i * outputs, (i + 1) * outputs),
  };
}

function alongOf(x: Direction, y: Direction): number {
  return linalg.dot(x.A, 0, y.A, 0, x.A.length) + linalg.dot(x.Bt, 0, y.Bt, 0, x.Bt.length);
}

function squareOf(x: Direction): number {
  return alongOf(x, x);
}

/** Σ weight(x·direction)·x over all row pairs x. */
function combine(pairs: readonly Pair[], direction: Direction, weight: (along: number) => number): Direction {
  const sum = { A: new Float64Array(direction.A.length), Bt: new Float64Array(direction.Bt.length) };
  for (const pair of pairs) {
    for (let i = 0; i < pair.rank; i++) {
      const row = rowOf(pair, i, direction);
      const factor = weight(alongOf(row, direction));
      linalg.addScaled(factor, row.A, 0, sum.A, 0, sum.A.length);
      linalg.addScaled(factor, row.Bt, 0, sum.Bt, 0, sum.Bt.length);
    }
  }
  return sum;
}

function longest(pairs: readonly Pair[], outputs: number, inputs: number): Direction {
  let found: Direction = { A: new Float64Array(inputs), Bt: new Float64Array(outputs) };
  for (const pair of pairs) {
    // The first row pair is a balanced pair's longest.
    const row = rowOf(pair, 0, found);
    if (squareOf(row) > squareOf(found)) found = { A: row.A.slice(), Bt: row.Bt.slice() };
  }
  return found;
}

/** Formats whose rounding loses enough for turns to pay. */
export function fewBits(type: Dtype): boolean {
  return type === "int4" || type === "int3";
}

/** Rows [rows, width] mixed evenly, each with each. Twice is as before. */
export function mix(
  values: Float64Array,
  rows: number,
  width: number,
  products: linalg.Products = linalg.PLAIN,
): Float64Array {
  return products.multiply(hartley(rows), values, rows, width, rows);
}

/**
 * Replaces the first `kept` rows of each rank by 2·mean − row, in place: a reflection that preserves the mean of a
 * stack and what is stored of it. Rows of a balanced pair, long and short, become nearly alike; of four exactly so.
 */
export function mirror(values: Float64Array, ranks: readonly number[], width: number, kept: number = Infinity): void {
  let from = 0;
  for (const rank of ranks) {
    const count = Math.min(rank, kept);
    for (let i = from; i < from + width; i++) {
      let sum = 0;
      for (let row = 0; row < count; row++) sum += values[i + row * width]!;
      for (let row = 0; row < count; row++) values[i + row * width] = (2 / count) * sum - values[i + row * width]!;
    }
    from += rank * width;
  }
}

/** Hartley's matrix, (cos + sin)(2πij / n) / √n: symmetric, orthogonal, no entry above √(2 / n). */
function hartley(n: number): Float64Array {
  return Float64Array.from({ length: n * n }, (_, at) => {
    const angle = (2 * Math.PI * ((Math.floor(at / n) * (at % n)) % n)) / n;
    return (Math.cos(angle) + Math.sin(angle)) / Math.sqrt(n);
  });
}

// Errors, ‖ΔW − ΔW'‖ and ‖ΔW‖ in the Frobenius norm, from the factors alone: ΔW is never formed. With D_A = A − A' and
// D_B = B − B',
//
//     ΔW − ΔW' = D_B·A + B'·D_A,
//
// whose squared norm is a sum of products of r×r Gram matrices. In one factorisation they are of the same size as the
// result, where the textbook form ‖ΔW‖² + ‖ΔW'‖² − 2⟨ΔW, ΔW'⟩ would cancel.

/** Share of ‖ΔW‖; 0 by definition for an adapter that is zero, which has no share to speak of. */
export function relative(value: number, norm: number): number {
  return norm > 0 ? value / norm : 0;
}

/**
 * Below this share of its bound a difference has too few digits, since squares of the bound have cancelled in its
 * square.
 */
const CANCELLED = 1e-6;

/**
 * ‖ΔW − ΔW'‖ and ‖ΔW‖ of two pairs of factors for the same module; ranks and factorisations may differ. Exact to a few
 * 1e-15 of ‖D_B‖·‖A‖ + ‖B'‖·‖D_A‖, which bounds the difference.
 * @throws RangeError when the pairs are of different shapes
 */
export function deltaError(
  exact: Pair,
  approximation: Pair,
  { gram, multiplyTransposed }: linalg.Products = linalg.PLAIN,
): { difference: number; norm: number } {
  const rank = Math.max(exact.rank, approximation.rank);
  const side = (given: Float64Array, other: Float64Array) => {
    const width = given.length / exact.rank;
    if (other.length / approximation.rank !== width)
      throw new RangeError(`deltaError: factors of width ${width} and ${other.length / approximation.rank}`);
    const rows = linalg.lengthened(given, rank * width);
    // A loop, since packing spends much of its time here, and a callback for each number is slow.
    const lost = rows.slice();
    for (let i = 0; i < other.length; i++) lost[i]! -= other[i]!;
    return {
      rows: gram(rows, rank, width),
      lost: gram(lost, rank, width),
      cross: multiplyTransposed(rows, lost, rank, rank, width),
    };
  };
  const a = side(exact.A, approximation.A);
  const b = side(exact.Bt, approximation.Bt);
  let squared = 0;
  let norm = 0;
  let rowsA = 0;
  let lostA = 0;
  let storedB = 0;
  let lostB = 0;
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < rank; j++) {
      const ij = i * rank + j;
      const ji = j * rank + i;
      // B'·B'ᵀ and D_B·B'ᵀ, from B' = B − D_B.
      const stored = b.rows[ij]! - b.cross[ij]! - b.cross[ji]! + b.lost[ij]!;
      const mixed = b.cross[ji]! - b.lost[ij]!;
      squared += b.lost[ij]! * a.rows[ij]! + stored * a.lost[ij]! + 2 * mixed * a.cross[ij]!;
      norm += b.rows[ij]! * a.rows[ij]!;
      if (i !== j) continue;
      rowsA += a.rows[ij]!;
      lostA += a.lost[ij]!;
      storedB += stored;
      lostB += b.lost[ij]!;
    }
  }
  const root = (x: number): number => Math.sqrt(Math.max(0, x));
  const bound = root(lostB) * root(rowsA) + root(storedB) * root(lostA);
  const difference = root(squared);
  const isExact = difference >= CANCELLED * bound;
  return { difference: isExact ? difference : pairNorm(subtracted(exact, approximation)), norm: root(norm) };
}

/** ‖ΔW‖, without squares that could cancel. */
export function pairNorm({ rank, A, Bt }: Pair): number {
  const { L: a, size: m } = linalg.lq(A.slice(), rank, A.length / rank, false);
  const { L: b, size: n } = linalg.lq(Bt.slice(), rank, Bt.length / rank, false);
  return linalg.norm(linalg.multiply(linalg.transpose(b, rank, n), a, n, m, rank));
}

function subtracted(one: Pair, other: Pair): Pair {
  const join = (a: Float64Array, b: Float64Array, factor: number): Float64Array => {
    const all = linalg.lengthened(a, a.length + b.length);
    for (let i = 0; i < b.length; i++) all[a.length + i] = factor * b[i]!;
    return all;
  };
  return { rank: one.rank + other.rank, A: join(one.A, other.A, 1), Bt: join(one.Bt, other.Bt, -1) };
}

// Steps of integers that are equally coarse for ΔW. An integer of a coefficient of row i of A changes ΔW by its step
// times the length of row i of Bᵀ, one of a component by its step times all that its coefficients weigh. Where every
// integer changes ΔW alike, the fewest bits lose the least: reverse water-filling (T. Cover, J. Thomas, "Elements of
// Information Theory", 10.3.3), which entropy coding does by itself, since what is below the step becomes zeros.

export interface Spectrum {
  readonly task: string;
  readonly module: string;
  readonly out: number;
  readonly in: number;
  /** Descending. */
  readonly singular: readonly number[];
  /** ‖ΔW‖². */
  readonly square: number;
}

export function spectrumOf(
  task: string,
  module: string,
  { out, in: inputs }: Pick<Spectrum, "out" | "in">,
  singular: readonly number[],
): Spectrum {
  return { task, module, out, in: inputs, singular, square: sum(singular, (value) => value ** 2) };
}

export function byTask(spectra: readonly Spectrum[]): Map<string, { spectra: Spectrum[]; square: number }> {
  const tasks = new Map<string, { spectra: Spectrum[]; square: number }>();
  for (const spectrum of spectra) {
    const task = tasks.get(spectrum.task) ?? { spectra: [], square: 0 };
    task.spectra.push(spectrum);
    task.square += spectrum.square;
    tasks.set(spectrum.task, task);
  }
  return tasks;
}

/** Steps of a pair's rows, or of their coefficients: of each row of A, and of Bᵀ. */
export interface RowSteps {
  readonly A: Float64Array;
  readonly Bt: Float64Array;
}

/** @param step by how much ΔW is to change */
export function rowSteps({ rank, A, Bt }: Pair, step: number): RowSteps {
  const stepsFrom = (rows: Float64Array): Float64Array =>
    linalg.rowSquares(rows, rank, rows.length / rank).map((square) => (square > 0 ? step / Math.sqrt(square) : 0));
  return { A: stepsFrom(Bt), Bt: stepsFrom(A) };
}

/**
 * Steps of the components [count] and, last, of the mean, so that they weigh as coefficients do.
 * @param rows [Σ ranks, width] whose coefficients are stored
 * @param own steps of their coefficients; 0 where there are none
 */
export function componentSteps(
  {
    rows,
    mean,
    width,
  }: { readonly rows: Float64Array; readonly mean: Float64Array | undefined; readonly width: number },
  components: Float64Array,
  own: Float64Array,
  products: linalg.Products = linalg.PLAIN,
): Float64Array {
  const total = rows.length / width;
  const count = components.length / width;
  const x = linalg.centred(rows, total, width, mean);
  const at = count > 0 ? products.multiplyTransposed(x, components, total, count, width) : new Float64Array(0);
  const weights = new Float64Array(count + 1);
  for (let i = 0; i < total; i++) {
    if (!(own[i]! > 0)) continue;
    for (let k = 0; k < count; k++) weights[k]! += (at[i * count + k]! / own[i]!) ** 2;
    weights[count]! += own[i]! ** -2;
  }
  return weights.map((weight) => (weight > 0 ? 1 / Math.sqrt(weight) : 0));
}

/**
 * The ‖ΔW − ΔW'‖² that is expected of a step: all of a rank-1 term that is not worth its bits, and of the others what
 * rounding leaves. Values of a row are taken for normally distributed.
 * @param isRounded true for numbers that are rounded to the step
 */
export function roundingLoss(spectra: readonly Spectrum[], step: number, isRounded: boolean = true): number {
  let lost = 0;
  for (const { singular, in: inputs, out } of spectra) {
    for (const value of singular) {
      if (!isWorth(value, (inputs + out) / 2, step)) lost += value ** 2;
      else if (isRounded)
        lost +=
          step ** 2 *
          (inputs * roundedSquare(value / step / Math.sqrt(inputs)) +
            out * roundedSquare(value / step / Math.sqrt(out)));
    }
  }
  return lost;
}

/**
 * Bits that terms are expected to take with a step.
 * @param isRounded as of `roundingLoss`; else numbers take 16 bits
 */
export function expectedBits(spectra: readonly Spectrum[], step: number, isRounded: boolean = true): number {
  let sum = 0;
  for (const { singular, in: inputs, out } of spectra)
    for (const value of singular) {
      const bits = (width: number): number => width * (isRounded ? roundedBits(value / step / Math.sqrt(width)) : 16);
      if (isWorth(value, (inputs + out) / 2, step)) sum += bits(inputs) + bits(out);
    }
  return sum;
}

/** Bits of an integer that a value of this root mean square is rounded to. */
export function roundedBits(size: number): number {
  return 0.5 * Math.log2(1 + 17 * size ** 2);
}

/**
 * Mean squared error of values of this root mean square that are rounded to integers: all of tiny ones, an eleventh of
 * a step² of large ones.
 */
export function roundedSquare(size: number): number {
  return size ** 2 / (1 + 11 * size ** 2);
}

/**
 * Root mean square, in steps, from which on a rank-1 term is worth its bits: below, a finer step for all others gains
 * more.
 */
const WORTH = 0.7;

/** @param width the mean of both factors' */
function isWorth(singular: number, width: number, step: number): boolean {
  // Row i of A is √s long, and its step is that of ΔW over √s.
  return singular / Math.sqrt(width) >= WORTH * step;
}

/** Number of rank-1 terms of a balanced pair that are worth their bits. @param width as of `isWorth` */
export function worthRows({ rank, A }: Pair, step: number, width: number): number {
  // A row of A is √s long.
  const singular = linalg.rowSquares(A, rank, A.length / rank);
  let count = rank;
  while (count > 0 && !isWorth(singular[count - 1]!, width, step)) count--;
  return count;
}

/**
 * The gauge of an adapter: (B·R, R⁻¹·A) is the same ΔW for every invertible R, but Algorithm 1 stacks A and B separately, so its result
 * depends on R. This file makes the balanced pair, settles its signs, and turns pairs: towards each other for flat mode, which compares
 * whole factors (generalised Procrustes analysis), and evenly for few bits. A row of integers has one scale, so rounding loses the same
 * share of every row: least in all when rows are of one length and no value stands out.
 */
import type { Dtype } from "../tensor/dtypes.ts";
import type { Term } from "../tensor/term.ts";
import { dominant, ROUNDING } from "./components.ts";
import {
  addScaled,
  backwardSolve,
  cholesky,
  dot,
  lq,
  multiply,
  multiplyTransposed,
  PLAIN,
  type Products,
  type SVD,
  scale,
  straighten,
  svd,
  transpose,
} from "./linalg.ts";

/**
 * The factors of a term in f64, to compute with: rows are turned, mirrored and replaced here, which nothing that comes from a
 * reader may be. ΔW [out, in] = Btᵀ·A: A [rank, in], Bt [rank, out].
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

/** Rows that are this much of their squares away from the rows before them leave a Gram matrix the digits that L needs. */
const APART = 2 ** -16;

/**
 * Factors X [rows, width], which stays as it is: by its Gram matrix, a fifth of the time of reflectors, where no row leans on others.
 * @param whole false: without `across`
 */
function factored(x: Float64Array, rows: number, width: number, products: Products, whole: boolean = true): Factored {
  if (rows > 0 && rows <= width) {
    const g = products.gram(x, rows, width);
    const L = cholesky(g, rows);
    const across: Factored["across"] = (u, count) => {
      const own = u.slice(0, count * rows);
      backwardSolve(L, rows, rows, own, count);
      return products.multiply(own, x, count, width, rows);
    };
    let isApart = true;
    for (let i = 0; i < rows * rows; i += rows + 1) if (!(L[i]! ** 2 > APART * g[i]!)) isApart = false;
    if (isApart) return { L, size: rows, across };
  }
  const { L, Q, size } = lq(x.slice(), rows, width, whole);
  return { L, size, across: (u, count) => products.multiply(u, Q, count, width, size) };
}

/**
 * The balanced pair of the same ΔW = U·S·Vᵀ: B = U·√S, A = √S·Vᵀ, strongest first. Singular values below one f32 step
 * of the largest are dropped: a rank trim that loses nothing. At least one is kept, so that a zero adapter is a pair
 * of rank 1 full of zeros. The largest entry of each row of A is positive; `alignSigns` may turn rows afterwards.
 */
export function balance(pair: Pair, outputs: number, inputs: number, products: Products = PLAIN): Pair {
  const a = factored(pair.A, pair.rank, inputs, products);
  const b = factored(pair.Bt, pair.rank, outputs, products);
  const { U, S, V, rank } = core(pair.rank, a, b);
  const [A, Bt] = [a.across(V, rank), b.across(U, rank)];
  for (let i = 0; i < rank; i++) {
    const factor = Math.sqrt(S[i]!) * (dominant(A, i * inputs, inputs) < 0 ? -1 : 1);
    scale(factor, A, i * inputs, inputs);
    scale(factor, Bt, i * outputs, outputs);
  }
  return { rank, A, Bt };
}

/** The singular values of ΔW that `balance` keeps, without the pair. */
export function singularValues(pair: Pair, outputs: number, inputs: number, products: Products = PLAIN): number[] {
  const a = factored(pair.A, pair.rank, inputs, products, false);
  const b = factored(pair.Bt, pair.rank, outputs, products, false);
  const { S, rank } = core(pair.rank, a, b);
  return [...S.subarray(0, rank)];
}

/** ΔW = QBᵀ·(LBᵀ·LA)·QA: the SVD in brackets [n, m], which has the singular values of ΔW, and how many of them are kept. */
function core(inner: number, { L: LA, size: m }: Factored, { L: LB, size: n }: Factored): SVD & { rank: number } {
  const found = svd(multiply(transpose(LB, inner, n), LA, n, m, inner), n, m);
  let rank = 1;
  while (rank < Math.min(n, m) && found.S[rank]! > ROUNDING * found.S[0]!) rank++;
  return { ...found, rank };
}

/** Its strongest rows, as views: of a balanced pair the best of that rank. */
export function leadingRows({ rank, A, Bt }: Pair, most: number): Pair {
  if (rank <= most) return { rank, A, Bt };
  return { rank: most, A: A.subarray(0, (A.length / rank) * most), Bt: Bt.subarray(0, (Bt.length / rank) * most) };
}

/** A direction of both sides at once: a sum of row pairs, such as the mean. */
export type Direction = Pick<Pair, "A" | "Bt">;

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
    scale(1 / length, direction.A, 0, inputs);
    scale(1 / length, direction.Bt, 0, outputs);
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
    scale(-1, row.A, 0, row.A.length);
    scale(-1, row.Bt, 0, row.Bt.length);
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
  return dot(x.A, 0, y.A, 0, x.A.length) + dot(x.Bt, 0, y.Bt, 0, x.Bt.length);
}

export function squareOf(x: Direction): number {
  return alongOf(x, x);
}

/** Σ weight(x·direction)·x over all row pairs x. */
function combine(pairs: readonly Pair[], direction: Direction, weight: (along: number) => number): Direction {
  const sum = { A: new Float64Array(direction.A.length), Bt: new Float64Array(direction.Bt.length) };
  for (const pair of pairs) {
    for (let i = 0; i < pair.rank; i++) {
      const row = rowOf(pair, i, direction);
      const factor = weight(alongOf(row, direction));
      addScaled(factor, row.A, 0, sum.A, 0, sum.A.length);
      addScaled(factor, row.Bt, 0, sum.Bt, 0, sum.Bt.length);
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

/** Settled when the mean moves by less than this share of its length: a tenth of that changes no error by 1e-3. */
const SETTLED = 1e-2;
/** Slow cases gain nothing that counts any more. */
const MOST_ROUNDS = 100;

/**
 * Turns all pairs, of one rank, to lie nearest to their common mean: rotations left to chance spread adapters apart. Balanced pairs stay
 * balanced, since A·Aᵀ = Bᵀ·B holds after any turn. It starts from the longest, so that the order of the adapters does not matter; no
 * round lengthens the distances to the mean.
 */
export function turnTogether(pairs: readonly Pair[], outputs: number, inputs: number): void {
  const longest = pairs.reduce((a, b) => (squareOf(b) > squareOf(a) ? b : a));
  let mean: Direction = { A: longest.A.slice(), Bt: longest.Bt.slice() };
  for (let round = 0; round < MOST_ROUNDS; round++) {
    for (const pair of pairs) turnTo(pair, mean, outputs, inputs);
    const next = { A: meanOf(pairs, "A"), Bt: meanOf(pairs, "Bt") };
    const moved = distance(next.A, mean.A) + distance(next.Bt, mean.Bt);
    mean = next;
    if (moved <= SETTLED ** 2 * squareOf(next)) return;
  }
}

/** Turns a pair to lie nearest to factors of its shape. */
export function turnTo(pair: Pair, { A, Bt }: Direction, outputs: number, inputs: number): void {
  const { rank } = pair;
  const cross = multiplyTransposed(A, pair.A, rank, rank, inputs);
  addScaled(1, multiplyTransposed(Bt, pair.Bt, rank, rank, outputs), 0, cross, 0, rank * rank);
  const { U, V } = svd(cross, rank, rank);
  orthonormalize(V, rank);
  const turn = multiply(transpose(U, rank, rank), V, rank, rank, rank);
  pair.A = multiply(turn, pair.A, rank, inputs, rank);
  pair.Bt = multiply(turn, pair.Bt, rank, outputs, rank);
}

/**
 * Makes the rows of a matrix orthonormal, one behind the other: of weak singular vectors rounding leaves little, and a zero
 * row or one that leans on others would change ΔW. Where nothing is left of a row, an axis takes its place.
 */
function orthonormalize(rows: Float64Array, n: number): void {
  for (let i = 0; i < n; i++) {
    let left = cleared(rows, i, n);
    // One of n axes at least is that far from fewer than n others.
    for (let axis = 0; left * n * 2 < 1; axis++) {
      rows.fill(0, i * n, (i + 1) * n);
      rows[i * n + axis] = 1;
      left = cleared(rows, i, n);
    }
    scale(1 / Math.sqrt(left), rows, i * n, n);
  }
}

/** Takes out of row i what lies along the rows before it (twice is enough). Returns the square of what is left. */
function cleared(rows: Float64Array, i: number, n: number): number {
  for (let pass = 0; pass < 2; pass++) straighten(rows, i, n);
  return dot(rows, i * n, rows, i * n, n);
}

function meanOf(pairs: readonly Pair[], side: "A" | "Bt"): Float64Array {
  const mean = new Float64Array(pairs[0]![side].length);
  for (const pair of pairs) addScaled(1 / pairs.length, pair[side], 0, mean, 0, mean.length);
  return mean;
}

function distance(x: Float64Array, y: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += (x[i]! - y[i]!) ** 2;
  return sum;
}

/** Formats whose rounding loses enough for turns to pay. */
export function fewBits(type: Dtype): boolean {
  return type === "int4" || type === "int3";
}

/** Rows [rows, width] mixed evenly, each with each. Twice is as before. */
export function mix(values: Float64Array, rows: number, width: number, products: Products = PLAIN): Float64Array {
  return products.multiply(hartley(rows), values, rows, width, rows);
}

/**
 * The first `kept` rows of each rank, in place: twice their mean less what they were, the reflection that leaves the mean of a stack, and
 * what is stored of it, where it is. Rows of a balanced pair, long and short, become nearly alike; of four exactly so.
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

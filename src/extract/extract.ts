/**
 * Extraction: the adapters of one module become two bases, stored once, and coefficients per task (paper, Algorithm 1;
 * DESIGN.md section 2). In column mode every row of a factor is a vector with coefficients of its own, in flat mode the
 * whole factor is one. Also the way of one more adapter onto an existing basis. Works on one module at a time, on arrays
 * only: no files, no pack.
 */
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { type Components, centred, columnMeans, principalComponents, ROUNDING } from "./components.ts";
import { deltaError, pairError, relative, type SideError } from "./error.ts";
import { alignSigns, alignTo, balance, leadingRows, type Pair } from "./gauge.ts";
import { jointComponents } from "./joint.ts";
import {
  backwardSolve,
  cholesky,
  dot,
  type Products,
  rowSquares,
  scale,
  timesTransposed,
  transpose,
} from "./linalg.ts";
import { fewBits, mirror, mix } from "./mixing.ts";
import { turnTo, turnTogether } from "./procrustes.ts";
import { pairsWithin } from "./search.ts";
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

/** One adapter's factors of one module: ΔW [out, in] = Btᵀ·A. */
export interface ModuleMember {
  /** Task id. */
  id: string;
  rank: number;
  /** [rank, in], row-major. */
  A: Float32Array;
  /** B transposed [rank, out], the adapter's scale folded in. */
  Bt: Float32Array;
}

/** All adapters that adapt one module. Ranks may differ. */
export interface ModuleStack {
  name: string;
  out: number;
  in: number;
  members: readonly ModuleMember[];
}

/**
 * What has coefficients of its own: a row of a factor, or a whole factor (DESIGN.md 2.4). Joint mode is column mode with bases that
 * lose least of ΔW instead of least of each factor.
 */
export type BasisMode = "column" | "flat" | "joint";

/**
 * Whether factors are taken as they come or rewritten as B = U·√S, A = √S·Vᵀ first (DESIGN.md 2.2). Flat mode also turns
 * balanced pairs towards their mean, where it is kept.
 */
export type Gauge = "as-trained" | "balanced";

/**
 * How many components a side keeps, never more than its numerical rank:
 * `k` that many; `energy` the fewest with that share of the squared singular values, 1 for all of them; `error` per
 * module the numbers of fewest stored bytes for which no task's ΔW error, after rounding, is above `max`.
 */
export type ComponentSelection =
  | { kind: "k"; k: number }
  | { kind: "energy"; share: number }
  | { kind: "error"; max: number };

export interface ExtractOptions {
  /** "column" unless given. */
  mode?: BasisMode;
  gauge: Gauge;
  /** The most rows that a task keeps of each module, its strongest directions: balanced gauge only, not in flat mode. All unless given. */
  rank?: number | undefined;
  /** Whether the mean of the rows is subtracted and stored, or not used at all. */
  centering: "keep" | "none";
  /**
   * Whether every task counts alike when components are sought, however large its update is: one a thousand times larger than the
   * others would have them to itself. False unless given.
   */
  normalize?: boolean | undefined;
  /**
   * Second moments E[x·xᵀ] [in, in] of what enters the module. Errors are then those of its outputs, ‖(ΔW − ΔW')·x‖, and components
   * are the best for them. Not in flat mode, nor with private terms.
   */
  moments?: Float64Array | undefined;
  select: ComponentSelection;
  basisDtype: Dtype;
  coefficientDtype: Dtype;
  /** What multiplies large matrices, in place of the plain loop: half the time of an extraction is spent there. */
  products?: Products;
}

/** One side's basis, ready to be written, and what is known of the stack it came from. */
export interface SideBasis extends StoredBasis {
  /** Singular values of the (centred) stack, descending, min(rows, width) of them; the smallest may be rounding. */
  singular: Float64Array;
  /** Share of the squared singular values that the components hold; 1 where there are none to hold. */
  explained: number;
}

/** What a task loses in one module. */
export interface ModuleLoss {
  /**
   * ‖ΔW − ΔW'‖ / ‖ΔW‖ with ΔW' as stored; 0 where ΔW is zero. Extraction measures a balanced pair against itself,
   * without the directions that are zero within rounding: below 1e-6 of ‖ΔW‖.
   */
  error: number;
  /** (‖B − B'‖·‖A‖ + ‖B'‖·‖A − A'‖) / ‖ΔW‖, an upper bound of `error`. */
  bound: number;
  /** Theorem 1's δ of the task's rows of A: the largest sine between a centred row and the stored span. */
  deltaA: number;
  /** The same of B. */
  deltaB: number;
}

/** A task's coefficients of one module. */
export interface TaskCoefficients {
  /** Of the factors: the adapter's rank, or less where `rank` or the balanced gauge trimmed it; in flat mode that of the basis. */
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

/** Everything a pack stores of one module, and its errors. */
export interface ModuleExtraction {
  name: string;
  out: number;
  in: number;
  A: SideBasis;
  B: SideBasis;
  /** In the order of the stack. */
  tasks: ProjectedTask[];
  /** Theorem 1's δ per side: the largest of the tasks'. */
  delta: { A: number; B: number };
}

/** Both sides' bases of a module, opened once and used for many adapters. */
export interface ModuleSpace {
  A: Subspace;
  B: Subspace;
}

/** How an adapter is brought onto a basis. */
export type ProjectOptions = Pick<ExtractOptions, "gauge" | "coefficientDtype" | "rank">;

/**
 * Extracts one module.
 * @throws RangeError for wrong shapes, NaN or infinity, options out of range, values that do not fit the stored types,
 *   and an `error` selection that the stored types cannot reach
 */
export function extractModule(stack: ModuleStack, options: ExtractOptions): ModuleExtraction {
  const { select, mode = "column", gauge, centering } = options;
  checkSelection(select);
  checkRank(options);
  if (stack.members.length === 0) throw new RangeError(`${stack.name}: no adapter adapts this module`);
  const metric = options.moments && metricOf(options.moments, stack.in);
  const given = stack.members.map((member) => {
    const pair = toPair(member, stack.out, stack.in);
    return metric
      ? { ...pair, A: timesTransposed(pair.A, transpose(metric, stack.in, stack.in), pair.rank, stack.in, stack.in) }
      : pair;
  });
  const own = gauge === "balanced" ? given.map((pair) => balance(pair, stack.out, stack.in)) : given;
  const rank = mode === "flat" ? Math.max(...own.map((pair) => pair.rank)) : undefined;
  const pairs = rank === undefined ? own : own.map((pair) => padded(pair, rank));
  // Without a mean a sign cancels between component and coefficient; with one it decides what the mean is.
  const kept = pairs.map((pair) => leadingRows(pair, options.rank ?? Infinity));
  if (gauge === "balanced" && centering === "keep")
    (rank === undefined ? alignSigns : turnTogether)(kept, stack.out, stack.in);
  const found: Found = {
    stack,
    options,
    ranks: pairs.map((pair) => (rank === undefined ? pair.rank : 1)),
    A: {
      ...decompose(
        pairs.map((pair) => pair.A),
        kept.map((pair) => pair.A),
        stack.in,
        rank,
        options,
      ),
      metric,
    },
    B: decompose(
      pairs.map((pair) => pair.Bt),
      kept.map((pair) => pair.Bt),
      stack.out,
      rank,
      options,
    ),
  };
  const { A, B, ranks } = found;
  if (rank === undefined && mirrors(options)) {
    mirror(A.rows, ranks, stack.in, options.rank);
    mirror(B.rows, ranks, stack.out, options.rank);
  }
  if (mode === "joint") return storeJoint(found, kept);
  if (select.kind !== "error") return store(found, A.components.count, B.components.count);

  const all = encodeModule(found, A.components.count, B.components.count, false);
  const space = openModule(all, options.products, metric);
  const sideA = { space: space.A, targets: targetsOf(space.A, A.rows, ranks, options.rank) };
  const sideB = { space: space.B, targets: targetsOf(space.B, B.rows, ranks, options.rank) };
  try {
    for (const [kA, kB] of pairsWithin(select.max, sideA, sideB, options)) {
      const result = store(found, kA, kB);
      // The last digits differ between a basis cut short and one computed short.
      if (result.tasks.every((task) => task.error <= select.max)) return result;
    }
  } catch (cause) {
    throw cause instanceof RangeError ? new RangeError(`${stack.name}: ${cause.message}`, { cause }) : cause;
  }
  throw new RangeError(`${stack.name}: an error of ${select.max} is just out of reach of the stored types; allow more`);
}

/** As many components on both sides as the selection asks for: of ΔW itself, so the numbers are judged together. */
function storeJoint(found: Found, pairs: readonly Pair[]): ModuleExtraction {
  const {
    stack: { name, out, in: inputs },
    options: { select, products, normalize },
    A,
    B,
  } = found;
  const most = Math.max(A.components.count, B.components.count);
  const alike = normalize
    ? pairs.map(({ rank, A, Bt }) => ({
        rank,
        A: A.map((v) => v * reciprocal(A)),
        Bt: Bt.map((v) => v * reciprocal(Bt)),
      }))
    : pairs;
  const solve = (k: number): ModuleExtraction => {
    const [kA, kB] = [Math.min(k, A.components.count), Math.min(k, B.components.count)];
    const made =
      kA * kB > 0 ? jointComponents(alike, kA, kB, out, inputs, products) : { A: A.components, B: B.components };
    return store(
      { ...found, A: { ...A, components: made.A }, B: { ...B, components: made.B } },
      made.A.count,
      made.B.count,
    );
  };
  if (select.kind === "k" || (select.kind === "energy" && select.share === 1)) return solve(most);
  const enough = ({ A: { explained }, tasks }: ModuleExtraction): boolean =>
    select.kind === "energy" ? explained >= select.share : tasks.every(({ error }) => error <= select.max);
  let [low, high, best] = [1, most, solve(most)];
  if (!enough(best)) {
    if (select.kind === "energy") return best;
    throw new RangeError(`${name}: an error of ${select.max} is out of reach of the stored types; allow more`);
  }
  while (low < high) {
    const middle = (low + high) >> 1;
    const tried = solve(middle);
    if (enough(tried)) [high, best] = [middle, tried];
    else low = middle + 1;
  }
  return best;
}

/** Opens both bases of a module for `projectModule` and `measureModule`. */
export function openModule(
  basis: { A: StoredBasis; B: StoredBasis },
  products?: Products,
  metric?: Float64Array,
): ModuleSpace {
  return { A: openSubspace(basis.A, products, metric), B: openSubspace(basis.B, products) };
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
  return { id: member.id, ...project(space, a, b, options.coefficientDtype) };
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
): ModuleLoss {
  const given = toPair(member, rowWidth(space.B), rowWidth(space.A));
  const pair = gauged(given, space, options);
  const rows = (encoded: Uint8Array, side: Subspace): Float64Array => {
    const count = side.rank === undefined ? task.rank : 1;
    const alpha = decodeTensor(options.coefficientDtype, encoded, count, side.components);
    return expand(side, Float64Array.from(alpha), count);
  };
  const stored = { rank: task.rank, A: rows(task.alphaA, space.A), Bt: rows(task.alphaB, space.B) };
  const { difference, norm } = deltaError(given, stored);
  return {
    error: relative(difference, norm),
    bound: relative(deltaError(pair, stored).bound, norm),
    deltaA: largestSine(space.A, targetOf(space.A, pair.A, task.rank)),
    deltaB: largestSine(space.B, targetOf(space.B, pair.Bt, task.rank)),
  };
}

/** One side of a stack, decomposed. */
export interface Side {
  /** Of a vector: of a row, times the rank in flat mode. */
  width: number;
  rank: number | undefined;
  /** All tasks' rows, stacked [Σ ranks, width], those without coefficients too. */
  rows: Float64Array;
  mean: Float64Array | undefined;
  components: Components;
  /** L: everything here is of rows·L, what is stored is not. */
  metric?: Float64Array | undefined;
}

/** A module on its way to being stored. */
interface Found {
  stack: ModuleStack;
  options: ExtractOptions;
  /** Vectors of each task: its rank in the gauge asked for, or 1 in flat mode. */
  ranks: readonly number[];
  A: Side;
  B: Side;
}

/**
 * Mean and components of one side.
 * @param all factors whole
 * @param factors what is kept of them
 * @param rank in flat mode, of all factors [rank, inner]
 */
export function decompose(
  all: readonly Float64Array[],
  factors: readonly Float64Array[],
  inner: number,
  rank: number | undefined,
  options: ExtractOptions,
): Side {
  const width = inner * (rank ?? 1);
  const rows = stacked(factors);
  const count = rows.length / width;
  const own = rowSquares(rows, count, width).map(Math.sqrt);
  if (options.gauge === "balanced" && rank === undefined) {
    // Row i counts in ΔW by its square, s_i, and carries the rounding errors of all of ΔW, s_1, magnified by √s_i.
    let at = 0;
    for (const factor of factors) {
      const first = own[at]!;
      for (const end = at + factor.length / width; at < end; at++) own[at] = own[at]! > 0 ? first ** 2 / own[at]! : 0;
    }
  }
  const weights = options.normalize
    ? factors.flatMap((factor) => Array<number>(factor.length / width).fill(reciprocal(factor)))
    : undefined;
  const mean = options.centering === "keep" ? columnMeans(rows, count, width, weights) : undefined;
  const x = centred(rows, count, width, mean);
  // A row is as large as what is stored of it: coefficients for the centred row, the mean for the rest.
  const left = rowSquares(x, count, width);
  const floors = own.map((size, i) => ROUNDING * Math.max(size, Math.sqrt(left[i]!)));
  weights?.forEach((weight, i) => {
    scale(weight, x, i * width, width);
    floors[i]! *= weight;
  });
  const components = principalComponents(x, count, width, floors, wanted(options), options.products);
  return { width, rank, rows: options.rank === undefined ? rows : stacked(all), mean, components };
}

/** Of a factor's length; 0 where it has none. */
export function reciprocal(factor: Float64Array): number {
  const length = Math.sqrt(dot(factor, 0, factor, 0, factor.length));
  return length > 0 ? 1 / length : 0;
}

function stacked(factors: readonly Float64Array[]): Float64Array {
  const rows = new Float64Array(factors.reduce((sum, factor) => sum + factor.length, 0));
  let at = 0;
  for (const factor of factors) {
    rows.set(factor, at);
    at += factor.length;
  }
  return rows;
}

/** How many components a selection asks for, or what says so, given the singular values; an error is judged on all of them later. */
export function wanted({
  select,
  mode,
}: Pick<ExtractOptions, "select" | "mode">): number | ((singular: Float64Array, total: number) => number) {
  if (select.kind === "k") return select.k;
  if (select.kind === "error" || mode === "joint" || select.share === 1) return (singular) => singular.length;
  return (singular, total) => {
    let held = 0;
    let k = 0;
    while (k < singular.length && held < select.share * total) held += singular[k++]! ** 2;
    return k;
  };
}

/** The first `count` components, of few bits those mixed, and the mean as they are stored. @param mixed false: in their order */
export function encodeBasis(
  side: Omit<Side, "rows">,
  count: number,
  type: Dtype,
  products?: Products,
  mixed: boolean = fewBits(type),
): SideBasis {
  const { width, rank, mean, metric } = side;
  const { vectors, singular, total } = side.components;
  const rows = count + (mean ? 1 : 0);
  const values = new Float64Array(rows * width);
  const first = vectors.subarray(0, count * width);
  values.set(mixed ? mix(first, count, width, products) : first);
  if (mean) values.set(mean, count * width);
  if (metric) backwardSolve(metric, width, width, values, rows);
  let held = 0;
  for (let k = 0; k < count; k++) held += singular[k]! ** 2;
  return {
    dtype: type,
    components: count,
    width,
    rank,
    mean: mean !== undefined,
    encoded: encodeTensor(type, values, rows, width),
    singular,
    explained: total > 0 ? Math.min(1, held / total) : 1,
  };
}

function encodeModule(
  { A, B, options: { basisDtype, products } }: Found,
  kA: number,
  kB: number,
  mixed?: boolean,
): { A: SideBasis; B: SideBasis } {
  return { A: encodeBasis(A, kA, basisDtype, products, mixed), B: encodeBasis(B, kB, basisDtype, products, mixed) };
}

function store(found: Found, kA: number, kB: number): ModuleExtraction {
  const { stack, options, ranks } = found;
  const basis = encodeModule(found, kA, kB);
  const space = openModule(basis, options.products, found.A.metric);
  const a = targetsOf(space.A, found.A.rows, ranks, options.rank);
  const b = targetsOf(space.B, found.B.rows, ranks, options.rank);
  const tasks = stack.members.map(({ id }, i) => ({ id, ...project(space, a[i]!, b[i]!, options.coefficientDtype) }));
  const delta = {
    A: Math.max(...tasks.map((task) => task.deltaA)),
    B: Math.max(...tasks.map((task) => task.deltaB)),
  };
  return { name: stack.name, out: stack.out, in: stack.in, ...basis, tasks, delta };
}

function project(space: ModuleSpace, a: Target, b: Target, type: Dtype): TaskCoefficients & ModuleLoss {
  const A = projectSide(space.A, a, type);
  const B = projectSide(space.B, b, type);
  const { difference, norm, bound } = pairError(A.loss, B.loss);
  return {
    rank: space.A.rank ?? a.kept,
    alphaA: A.encoded,
    alphaB: B.encoded,
    error: relative(difference, norm),
    bound: relative(bound, norm),
    deltaA: largestSine(space.A, a),
    deltaB: largestSine(space.B, b),
  };
}

function projectSide(space: Subspace, target: Target, type: Dtype): { encoded: Uint8Array; loss: SideError } {
  const { components } = space;
  const { encoded, values } = rounded(type, solve(space, target, components), target.kept, components);
  return { encoded, loss: lossOf(space, target, values, components) };
}

/** Whether rows of unlike length would be rounded to few bits. */
function mirrors({ gauge, coefficientDtype }: ProjectOptions): boolean {
  return gauge === "balanced" && fewBits(coefficientDtype);
}

/** The pair in the gauge of a pack, along the stored mean where there is one. */
function gauged(given: Pair, { A, B }: ModuleSpace, options: ProjectOptions): Pair {
  const { gauge, rank } = options;
  const pair = gauge === "balanced" ? balance(given, rowWidth(B), rowWidth(A)) : given;
  if (A.rank === undefined) {
    if (gauge === "balanced" && A.mean && B.mean) alignTo(pair, A.mean, B.mean);
    if (mirrors(options)) {
      mirror(pair.A, [pair.rank], rowWidth(A), rank);
      mirror(pair.Bt, [pair.rank], rowWidth(B), rank);
    }
    return pair;
  }
  const whole = padded(pair, A.rank);
  if (gauge === "balanced" && A.mean && B.mean) turnTo(whole, A.mean, B.mean, rowWidth(B), rowWidth(A));
  return whole;
}

/** Of a row of a factor. */
function rowWidth({ width, rank = 1 }: Subspace): number {
  return width / rank;
}

/** All rows of one factor, on a basis. */
function targetOf(space: Subspace, factor: Float64Array, most?: number): Target {
  return targetsOf(space, factor, [factor.length / space.width], most)[0]!;
}

/** With zero rows behind: the same ΔW. */
function padded({ rank, A, Bt }: Pair, to: number): Pair {
  if (rank > to) throw new RangeError(`rank ${rank}, but the flat basis holds whole factors of rank ${to}`);
  const side = (rows: Float64Array): Float64Array => {
    const out = new Float64Array((rows.length / rank) * to);
    out.set(rows);
    return out;
  };
  return { rank: to, A: side(A), Bt: side(Bt) };
}

function toPair(member: ModuleMember, outputs: number, inputs: number): Pair {
  const { id, rank } = member;
  const side = (name: string, values: Float32Array, width: number): Float64Array => {
    if (!Number.isInteger(rank) || rank < 1 || values.length !== rank * width) {
      throw new RangeError(
        `adapter ${id}: ${name} holds ${values.length} values, expected rank ${rank} times ${width}`,
      );
    }
    const out = new Float64Array(values);
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

/** Inputs that never occurred count a little all the same, since text is never all that a model will see. */
const UNSEEN = 1e-3;

/** L with E[x·xᵀ] = L·Lᵀ. */
function metricOf(moments: Float64Array, width: number): Float64Array {
  if (moments.length !== width * width)
    throw new RangeError(`moments: expected [${width}, ${width}], got ${moments.length} values`);
  const square = moments.slice();
  let trace = 0;
  for (let i = 0; i < width; i++) trace += square[i * width + i]!;
  if (!(trace > 0 && trace < Infinity))
    throw new RangeError("moments: no second moments of any input, they are zero or no numbers");
  for (let i = 0; i < width; i++) square[i * width + i]! += (UNSEEN * trace) / width;
  return cholesky(square, width);
}

/** @throws RangeError for a rank that cannot be kept, or moments where they mean nothing */
export function checkRank({
  rank,
  gauge,
  mode,
  moments,
}: Pick<ExtractOptions, "rank" | "gauge" | "mode" | "moments">): void {
  if (moments && mode === "flat")
    throw new RangeError("moments: flat mode keeps whole factors; take column or joint mode");
  if (rank === undefined) return;
  if (!(Number.isInteger(rank) && rank >= 1)) throw new RangeError(`rank must be a whole number from 1, got ${rank}`);
  if (gauge !== "balanced")
    throw new RangeError("rank: only a balanced pair has its strongest directions first; take gauge balanced");
  if (mode === "flat") throw new RangeError("rank: flat mode keeps whole factors; take column or joint mode");
}

/** @throws RangeError for a number out of range */
export function checkSelection(select: ComponentSelection): void {
  if (select.kind === "k" && !(Number.isInteger(select.k) && select.k >= 1)) {
    throw new RangeError(`select.k must be a whole number from 1, got ${select.k}`);
  }
  if (select.kind === "energy" && !(select.share > 0 && select.share <= 1)) {
    throw new RangeError(`select.share must be above 0 and at most 1, got ${select.share}`);
  }
  if (select.kind === "error" && !(select.max > 0)) {
    throw new RangeError(`select.max must be above 0, got ${select.max}`);
  }
}

/**
 * What a stack of rows leaves behind for its principal components, small enough to travel: the rows themselves while they are
 * few, else their Gram matrix and sum. Summaries of stacks that never meet in one memory add up to that of the whole stack,
 * exactly for rows and up to rounding for Gram matrices, in any order and any grouping. In f64. The mean is taken off at the
 * end, since it is known only there. For column mode: every other way of extraction needs all adapters at once.
 */
import { type Components, fixSigns, orthonormalize } from "./components.ts";
import { type Eigen, symmetricEigen } from "./eigen.ts";
import { largestEigen } from "./lanczos.ts";
import { addScaled, dot, PLAIN, type Products, transpose } from "./linalg.ts";

/** The summary of a stack [count, width]. */
export type Summary = { readonly width: number; readonly count: number } & (
  | { readonly kind: "rows"; readonly values: Float64Array }
  | {
      readonly kind: "gram";
      /** The lower triangle of YᵀY, row by row: entry (i, j) at i·(i + 1)/2 + j. Rows of Y are those of X times their weights w. */
      readonly gram: Float64Array;
      /** Sums for the mean and its subtraction [width + 1]: Σ w·y, Σ w². */
      readonly sums: Float64Array;
    }
);

/** Values of a Gram matrix's triangle. */
export function triangle(width: number): number {
  return (width * (width + 1)) / 2;
}

/** Which of the two is smaller for a stack [count, width]. */
export function summaryKind(count: number, width: number): Summary["kind"] {
  return count * width <= triangle(width) ? "rows" : "gram";
}

/** Rows that are multiplied at once, in values of one side; a Gram matrix is updated by so much. */
const BLOCK_VALUES = 2 ** 22;
/** Rows and columns of a Gram matrix that are computed at once: what a product takes and gives stays small. */
const PANEL = 512;

/** Collects a summary. */
export interface SummaryCollector {
  /**
   * Adds rows [rows, width]; `values` may end early, the rest is zero.
   * @param weight what the rows count, where they are not kept; who takes components of kept rows weighs them then. Default: 1
   * @throws RangeError for more rows than were announced
   */
  add(values: Float64Array, rows: number, weight?: number): void;
  /** Adds a Gram matrix. @throws RangeError as `add` */
  merge(other: Summary & { kind: "gram" }): void;
  /** @throws RangeError for fewer rows than were announced */
  finish(): Summary;
}

/** Collects the summary of a stack [count, width]. How many rows will come is said first, because it decides what is kept. */
export function collectSummary(count: number, width: number, products: Products = PLAIN): SummaryCollector {
  const kind = summaryKind(count, width);
  const held = kind === "rows" ? count : Math.min(count, Math.max(1, Math.floor(BLOCK_VALUES / width)));
  /** All rows, or those that wait for the next product. */
  const values = new Float64Array(held * width);
  const gram = new Float64Array(kind === "gram" ? triangle(width) : 0);
  const sums = new Float64Array(kind === "gram" ? width + 1 : 0);
  let [waiting, placed] = [0, 0];
  const place = (rows: number, allowed: boolean = placed + rows <= count): void => {
    placed += rows;
    if (!allowed) throw new RangeError(`${placed} rows came of ${count}`);
  };
  const multiplyWaiting = (): void => {
    if (waiting > 0) addGram(gram, values.subarray(0, waiting * width), waiting, width, products);
    waiting = 0;
  };
  return {
    add(given, rows, weight = 1) {
      place(rows);
      if (kind === "rows") {
        values.set(given, (placed - rows) * width);
        return;
      }
      for (let at = 0; at < rows * width; at += width) {
        sums[width]! += weight ** 2;
        // A row of zeros counts in the mean and changes nothing else.
        if (at >= given.length) continue;
        const row = waiting * width;
        for (let j = 0; j < width; j++) values[row + j] = weight * given[at + j]!;
        addScaled(weight, values, row, sums, 0, width);
        if (++waiting === held) multiplyWaiting();
      }
    },
    merge(other) {
      place(other.count);
      addScaled(1, other.gram, 0, gram, 0, other.gram.length);
      addScaled(1, other.sums, 0, sums, 0, other.sums.length);
    },
    finish() {
      place(0, placed === count);
      multiplyWaiting();
      return kind === "rows" ? { width, count, kind, values } : { width, count, kind, gram, sums };
    },
  };
}

/** Brings rows [count, width] into the triangle of a Gram matrix. */
function addGram(gram: Float64Array, rows: Float64Array, count: number, width: number, products: Products): void {
  const columns = transpose(rows, count, width);
  for (let i = 0; i < width; i += PANEL) {
    const m = Math.min(PANEL, width - i);
    const left = columns.subarray(i * count, (i + m) * count);
    for (let j = 0; j <= i; j += PANEL) {
      const n = Math.min(PANEL, width - j);
      const right = columns.subarray(j * count, (j + n) * count);
      const block = j === i ? products.gram(left, m, count) : products.multiplyTransposed(left, right, m, n, count);
      for (let row = 0; row < m; row++)
        addScaled(1, block, row * n, gram, triangle(i + row) + j, j === i ? row + 1 : n);
    }
  }
}

/**
 * A component is taken from a Gram matrix where its squared singular value is above this share of the largest, as in
 * `components.ts`; here there are no rows left to find weaker ones in.
 */
const RESOLVED = 2 ** -33;

/**
 * Finds mean and components of a stack from its Gram matrix.
 * @param choose see `principalComponents`
 * @returns components weaker than 1e-5 of the strongest, or of the mean, cannot be told from rounding and are left out
 */
export function gramComponents(
  { gram, sums, count: rows, width }: Summary & { kind: "gram" },
  centering: "keep" | "none",
  choose: number | ((singular: Float64Array, total: number) => number),
  products: Products = PLAIN,
): { mean: Float64Array | undefined; components: Components } {
  // Rounded as `columnMeans` does: a pack in f32 stores exactly the mean that was taken off.
  const [turned, squares] = [sums.subarray(0, width), sums[width]!];
  const mean = centering === "keep" ? turned.map((value) => Math.fround(value / (squares || 1))) : undefined;
  const square = new Float64Array(width * width);
  let total = 0;
  for (let i = 0; i < width; i++) {
    for (let j = 0; j <= i; j++) {
      let value = gram[triangle(i) + j]!;
      if (mean) value += squares * mean[i]! * mean[j]! - mean[i]! * turned[j]! - turned[i]! * mean[j]!;
      square[i * width + j] = square[j * width + i] = value;
    }
    total += square[i * width + i]!;
  }
  const limit = Math.min(rows, width);
  const least = RESOLVED * (mean ? squares * dot(mean, 0, mean, 0, width) : 0);
  const few =
    typeof choose === "number" ? strongestOf(square, width, Math.min(choose, limit), least, products) : undefined;
  const eigen = few ?? symmetricEigen(square, width, products.tridiagonalize);
  const singular = eigen.values.slice(0, limit).map((value) => Math.sqrt(Math.max(0, value)));
  let resolved = 0;
  while (resolved < singular.length && eigen.values[resolved]! > Math.max(least, RESOLVED * eigen.values[0]!))
    resolved++;
  if (resolved === 0) return { mean, components: { count: 0, vectors: new Float64Array(0), singular, total: 0 } };
  const count = Math.min(typeof choose === "number" ? choose : choose(singular, total), resolved);
  const vectors = eigen.vectors(count);
  orthonormalize(vectors, 0, count, width, singular);
  fixSigns(vectors, count, width);
  return { mean, components: { count, vectors, singular, total } };
}

/** The largest eigenpairs of G [n, n] alone, where that costs less and none is rounding. */
function strongestOf(g: Float64Array, n: number, count: number, least: number, products: Products): Eigen | undefined {
  const release = products.hold?.(g);
  try {
    const apply = (v: Float64Array, k: number): Float64Array => products.multiplyTransposed(v, g, k, n, n);
    const start = (k: number, random: () => number): Float64Array =>
      Float64Array.from({ length: k * n }, () => random() - 0.5);
    const found = largestEigen({ n, apply, start }, count, products);
    if (!found || found.values[count - 1]! <= Math.max(least, RESOLVED * found.values[0]!)) return undefined;
    return { values: found.values, vectors: () => found.vectors };
  } finally {
    release?.();
  }
}

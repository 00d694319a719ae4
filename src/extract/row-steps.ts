/**
 * Steps of integers that are equally coarse for ΔW. An integer of a coefficient of row i of A changes ΔW by its step times the length of
 * row i of Bᵀ, one of a component by its step times all that its coefficients weigh. Where every integer changes ΔW alike, the fewest
 * bits lose the least: reverse water-filling (T. Cover, J. Thomas, "Elements of Information Theory", 10.3.3), which entropy coding
 * does by itself, since what is below the step becomes zeros.
 */
import type { Spectrum } from "./allocation.ts";
import { centred } from "./components.ts";
import type { Pair } from "./gauge.ts";
import { PLAIN, type Products, rowSquares } from "./linalg.ts";

/** Steps of a pair's rows, or of their coefficients: of each row of A, and of Bᵀ. */
export interface RowSteps {
  readonly A: Float64Array;
  readonly Bt: Float64Array;
}

/** @param step by how much ΔW is to change */
export function rowSteps({ rank, A, Bt }: Pair, step: number): RowSteps {
  const beside = (rows: Float64Array): Float64Array =>
    rowSquares(rows, rank, rows.length / rank).map((square) => (square > 0 ? step / Math.sqrt(square) : 0));
  return { A: beside(Bt), Bt: beside(A) };
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
  products: Products = PLAIN,
): Float64Array {
  const [total, count] = [rows.length / width, components.length / width];
  const x = centred(rows, total, width, mean);
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
 * What rounding to a step is expected to leave of ‖ΔW − ΔW'‖²: of each rank-1 term that is worth its bits, or all of a term that is not.
 * Values of a row are taken for normally distributed.
 */
export function roundingLoss(spectra: readonly Spectrum[], step: number): number {
  let lost = 0;
  for (const { singular, in: inputs, out } of spectra) {
    for (const value of singular) {
      if (!isWorth(value, (inputs + out) / 2, step)) lost += value ** 2;
      else
        lost +=
          step ** 2 *
          (inputs * roundedSquare(value / step / Math.sqrt(inputs)) +
            out * roundedSquare(value / step / Math.sqrt(out)));
    }
  }
  return lost;
}

/** Bits that the terms of a spectrum are expected to take with a step. */
export function usualBits({ singular, in: inputs, out }: Spectrum, step: number): number {
  const bits = (width: number, value: number): number => width * roundedBits(value / step / Math.sqrt(width));
  return singular.reduce((sum, value) => {
    return isWorth(value, (inputs + out) / 2, step) ? sum + bits(inputs, value) + bits(out, value) : sum;
  }, 0);
}

/** Bits of an integer that a value of this root mean square is rounded to. */
export function roundedBits(size: number): number {
  return 0.5 * Math.log2(1 + 17 * size ** 2);
}

/** Mean squared error of values of this root mean square that are rounded to integers: all of tiny ones, an eleventh of a step² of large ones. */
export function roundedSquare(size: number): number {
  return size ** 2 / (1 + 11 * size ** 2);
}

/**
 * A rank-1 term is worth its bits when its numbers have at least this root mean square in steps: below, a finer step for all others
 * gains more with as many bits.
 */
const WORTH = 0.7;

/** Whether a rank-1 term of a singular value is worth its bits. @param width the mean of both sides' */
export function isWorth(singular: number, width: number, step: number): boolean {
  // Row i of A is √s long, and its step is that of ΔW over √s.
  return singular / Math.sqrt(width) >= WORTH * step;
}

/** How many rank-1 terms of a balanced pair are worth their bits. @param width as of `isWorth` */
export function worthRows({ rank, A }: Pair, step: number, width: number): number {
  // A row of A is √s long.
  const singular = rowSquares(A, rank, A.length / rank);
  let count = rank;
  while (count > 0 && !isWorth(singular[count - 1]!, width, step)) count--;
  return count;
}

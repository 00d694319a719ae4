/**
 * Turns that change no ΔW, only what few bits cost it. A row of integers has one scale, so rounding loses the same share of every
 * row: least in all when rows are of one length and no value stands out. (Bᵀ, A) and (R·Bᵀ, R·A) are the same ΔW for every rotation R,
 * and so are α·V and (α·Hᵀ)·(H·V).
 */
import type { Dtype } from "../tensor/dtypes.ts";
import { multiplyTransposed, PLAIN, type Products } from "./linalg.ts";

/** Formats whose rounding loses enough for turns to pay. */
export function fewBits(type: Dtype): boolean {
  return type === "int4" || type === "int3";
}

/** Rows [rows, width] mixed evenly, each with each. Twice is as before. */
export function mix(values: Float64Array, rows: number, width: number, products: Products = PLAIN): Float64Array {
  return products.multiply(hartley(rows), values, rows, width, rows);
}

/** Coefficients [rows, k] of k components after `mix`, from those before, or the other way. */
export function mixColumns(values: Float64Array, rows: number, k: number): Float64Array {
  return multiplyTransposed(values, hartley(k), rows, k, k);
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

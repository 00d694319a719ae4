/**
 * The low-rank term: what one task does to one module, in one orientation from adapter files to graphs and kernels.
 */

/** The arrays of a term by side. */
export const FACTORS = { A: "A", B: "Bt" } as const;

/** ΔW [out, in] = Btᵀ·A, the adapter's scale inside Bt. Arrays are row-major. */
export interface Term {
  /** Rows of A and Bt. */
  readonly rank: number;
  /** [rank, in]. */
  readonly A: Float32Array;
  /** B transposed: [rank, out]. */
  readonly Bt: Float32Array;
  /** [K_A, K_B], means counted: ΔW += E_Bᵀ·coreᵀ·E_A between the pack's components (docs/runtime.md, "Unfolded"). */
  readonly core?: Float32Array | undefined;
  /** DoRA's magnitude [out]. */
  readonly magnitude?: Float32Array | undefined;
  /** Factor of each row of W + ΔW, [out]: the magnitude over the norms of a given W. */
  readonly rowScale?: Float32Array | undefined;
}

/** [rows, columns] → [columns, rows]. */
export function transpose<T extends Float32Array | Int8Array>(values: T, rows: number, columns: number): T {
  const turned = values.slice() as T;
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = values[r * columns + c]!;
  return turned;
}

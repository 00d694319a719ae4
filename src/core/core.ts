/**
 * The core that lies between the components on either side: all that a task in mode "core" usually is. Everything else that a task may
 * be there comes from `unfold.ts`.
 */
import type { ModulePlan } from "./stage.ts";

/** Whether a module's term is handed out as a core. */
export function hasCore({ A, core }: ModulePlan, mode: "core" | "factors"): boolean {
  return mode === "core" && core && A.shared.length > 0;
}

/** `old` when it has the right length, else a new array: a warm switch allocates nothing. */
export function reuse(old: Float32Array | undefined, length: number): Float32Array {
  return old?.length === length ? old : new Float32Array(length);
}

/**
 * Writes the core of a plan that has one: core[a, b] = Σ_r α_A[r, a] · α_B[r, b] over all its tasks.
 * @param staged coefficients, as `stage` has left them
 * @param at where in `out` the core begins, its rows `stride` apart
 */
export function writeCore(plan: ModulePlan, staged: Float32Array, out: Float32Array, at: number, stride: number): void {
  plan.A.shared.forEach(({ at: a0, rows, basis }, i) => {
    const B = plan.Bt.shared[i]!;
    const sizes: Sizes = [a0, basis.tensor.rows, B.at, B.basis.tensor.rows, rows];
    for (let r = 0; r < rows; r += 4) addRows(staged, sizes, r, out, at, stride, i + r === 0);
  });
}

/** Where the coefficients of A begin and how many a row has, the same of B, and how many rows there are. */
type Sizes = readonly [a0: number, rowsA: number, b0: number, rowsB: number, rows: number];

/**
 * Four r at a time: one pass over the core for each, two rows of it side by side, so that what is read of α_B serves both. Each sum is
 * made in the same order as if there were one. What `out` held does not count the first time.
 */
function addRows(
  staged: Float32Array,
  [a0, rowsA, b0, rowsB, rows]: Sizes,
  r: number,
  out: Float32Array,
  at: number,
  stride: number,
  first: boolean,
): void {
  // Past the last r the last one stands in, times 0.
  const x = (k: number, a: number): number => (r + k < rows ? staged[a0 + (r + k) * rowsA + a]! : 0);
  const y = (k: number): number => b0 + Math.min(r + k, rows - 1) * rowsB;
  const y0 = y(0);
  const y1 = y(1);
  const y2 = y(2);
  const y3 = y(3);
  for (let a = 0; a < rowsA; a += 2) {
    // An odd row at the end is its own neighbour.
    const next = Math.min(a + 1, rowsA - 1);
    const x0 = x(0, a);
    const x1 = x(1, a);
    const x2 = x(2, a);
    const x3 = x(3, a);
    const z0 = x(0, next);
    const z1 = x(1, next);
    const z2 = x(2, next);
    const z3 = x(3, next);
    for (let b = 0; b < rowsB; b++) {
      const o = at + a * stride + b;
      const p = at + next * stride + b;
      const s0 = staged[y0 + b]!;
      const s1 = staged[y1 + b]!;
      const s2 = staged[y2 + b]!;
      const s3 = staged[y3 + b]!;
      const one = first ? 0 : out[o]!;
      const two = first ? 0 : out[p]!;
      out[o] = one + (x0 * s0 + x1 * s1 + x2 * s2 + x3 * s3);
      out[p] = two + (z0 * s0 + z1 * s1 + z2 * s2 + z3 * s3);
    }
  }
}

/**
 * The unfolded forms of a task, for models that add the low-rank term themselves: expanded factors, or the core between the
 * components on either side (docs/runtime.md, "Unfolded").
 */
import type { Slice } from "../backends/backend.ts";
import type { CpuView } from "../base/host.ts";
import type { Term } from "../tensor/term.ts";
import { pacer } from "./pace.ts";
import type { ModulePlan } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

/** A [rank, in] and Bt [rank, out] of a plan. */
export type Factors = Pick<Term, "A" | "Bt">;

/** The pristine weight of a module, [in, out] where it is `transposed`. */
export type PristineWeight = CpuView & { readonly transposed?: boolean };

/** Reads from a device. */
interface Device {
  /** Factors of the prepared plans that are not in a core, by module. */
  fetchFactors(bench: Workbench, mode: "core" | "factors"): Promise<ReadonlyMap<number, Factors>>;
  /** `count` f32 values. */
  fetchFloats(bench: Workbench, slice: Slice, count: number): Promise<Float32Array>;
}

interface UnfoldOptions {
  /** Terms that nobody reads any more, whose arrays are used again where they fit. */
  readonly old?: ReadonlyMap<number, Term> | undefined;
  readonly signal?: AbortSignal | undefined;
  /** `unfold-device.ts`, where the backend computes on one. */
  readonly device?: Device | undefined;
}

/**
 * Terms of the plans, by module. A term has `core` in mode "core" where all of its shared pieces lie between column bases,
 * `rowScale` where the plan has magnitudes, and one row of zeros where it has no factors. Long work lets others have a turn.
 * @param weightOf a module of a plan with magnitudes
 * @throws the reason of `signal`, once it is aborted
 */
export async function unfold(
  plans: readonly ModulePlan[],
  bench: Workbench,
  mode: "core" | "factors",
  weightOf: (module: number) => PristineWeight,
  { old, signal, device }: UnfoldOptions = {},
): Promise<Map<number, Term>> {
  bench.prepare(plans);
  const fetched = await device?.fetchFactors(bench, mode);
  const terms = new Map<number, Term>();
  const pause = pacer(signal);
  for (const plan of plans) {
    const expanded = (): Factors => {
      if (fetched) return fetched.get(plan.module)!;
      const { A, Bt } = bench.expand(plan);
      const { in: inputs, out } = bench.modules[plan.module]!;
      return { A: bench.floats(A, plan.rank * inputs), Bt: bench.floats(Bt, plan.rank * out) };
    };
    terms.set(plan.module, assemble(plan, bench, mode, old?.get(plan.module), expanded));
    const turn = pause();
    if (turn) await turn;
  }
  for (const [module, scale, out] of scales(plans, bench, weightOf)) {
    const rowScale = (await device?.fetchFloats(bench, scale, out)) ?? bench.floats(scale, out).slice();
    terms.set(module, { ...terms.get(module)!, rowScale });
    const turn = pause();
    if (turn) await turn;
  }
  return terms;
}

/** DoRA's scale [out] of each plan that has magnitudes, in scratch memory until the next is asked for. */
function* scales(
  plans: readonly ModulePlan[],
  bench: Workbench,
  weightOf: (module: number) => PristineWeight,
): Iterable<[module: number, scale: Slice, out: number]> {
  for (const plan of plans) {
    if (plan.magnitude === undefined) continue;
    const { data, dtype, transposed = false } = weightOf(plan.module);
    const base = bench.reserve("weight", data.length);
    bench.backend.upload(base, data);
    yield [plan.module, bench.rowScale(plan, { dtype, transposed }, base), bench.modules[plan.module]!.out];
  }
}

/** @param expanded the plan's factors; asked for where it has some that are not in the core */
function assemble(
  plan: ModulePlan,
  bench: Workbench,
  mode: "core" | "factors",
  old: Term | undefined,
  expanded: () => Factors,
): Term {
  const { in: inputs, out } = bench.modules[plan.module]!;
  const inCore = hasCore(plan, mode);
  const rank = Math.max(inCore ? plan.A.private.reduce((sum, piece) => sum + piece.rank, 0) : plan.rank, 1);
  const [A, Bt] = [reuse(old?.A, rank * inputs), reuse(old?.Bt, rank * out)];
  if (!inCore && plan.rank > 0) {
    const factors = expanded();
    A.set(factors.A);
    Bt.set(factors.Bt);
    return { rank, A, Bt };
  }
  A.fill(0);
  Bt.fill(0);
  if (!inCore) return { rank, A, Bt };
  const staged = bench.staging.values;
  const [KA, KB] = [plan.A.shared[0]!.basis.tensor.rows, plan.Bt.shared[0]!.basis.tensor.rows];
  const core = reuse(old?.core, KA * KB);
  writeCore(plan, staged, core, 0, KB);
  // The private factors of every task of the plan, one below the other.
  let row = 0;
  for (const [i, { at, rank: rows }] of plan.A.private.entries()) {
    const atB = plan.Bt.private[i]!.at;
    A.set(staged.subarray(at, at + rows * inputs), row * inputs);
    Bt.set(staged.subarray(atB, atB + rows * out), row * out);
    row += rows;
  }
  return { rank, A, Bt, core };
}

/** Whether a module's term is handed out as a core. */
export function hasCore({ A, Bt }: ModulePlan, mode: "core" | "factors"): boolean {
  return mode === "core" && A.shared.length > 0 && [...A.shared, ...Bt.shared].every((p) => p.basis.kind === "column");
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
    const { at: b0, basis: basisB } = plan.Bt.shared[i]!;
    const [rowsA, rowsB] = [basis.tensor.rows, basisB.tensor.rows];
    // Rows are short: a call of `fill` for each takes longer.
    for (let a = 0; i === 0 && a < rowsA; a++) for (let b = 0; b < rowsB; b++) out[at + a * stride + b] = 0;
    for (let r = 0; r < rows; r += 4) addRows(staged, { a0, rowsA, b0, rowsB, rows, r }, out, at, stride);
  });
}

/**
 * Four r at a time: one pass over the core for each, two rows of it side by side, so that what is read of α_B serves both. Each sum is
 * made in the same order as if there were one.
 */
function addRows(
  staged: Float32Array,
  { a0, rowsA, b0, rowsB, rows, r }: Readonly<Record<"a0" | "rowsA" | "b0" | "rowsB" | "rows" | "r", number>>,
  out: Float32Array,
  at: number,
  stride: number,
): void {
  // Past the last r the last one stands in, times 0.
  const [r1, r2, r3] = [Math.min(r + 1, rows - 1), Math.min(r + 2, rows - 1), Math.min(r + 3, rows - 1)];
  const [y0, y1, y2, y3] = [b0 + r * rowsB, b0 + r1 * rowsB, b0 + r2 * rowsB, b0 + r3 * rowsB];
  const [k1, k2, k3] = [Number(r + 1 < rows), Number(r + 2 < rows), Number(r + 3 < rows)];
  for (let a = 0; a < rowsA; a += 2) {
    const [u0, u1, u2, u3] = [a0 + r * rowsA + a, a0 + r1 * rowsA + a, a0 + r2 * rowsA + a, a0 + r3 * rowsA + a];
    const x0 = staged[u0]!;
    const x1 = k1 * staged[u1]!;
    const x2 = k2 * staged[u2]!;
    const x3 = k3 * staged[u3]!;
    const o = at + a * stride;
    if (a + 1 === rowsA) {
      for (let b = 0; b < rowsB; b++)
        out[o + b]! += x0 * staged[y0 + b]! + x1 * staged[y1 + b]! + x2 * staged[y2 + b]! + x3 * staged[y3 + b]!;
      return;
    }
    const z0 = staged[u0 + 1]!;
    const z1 = k1 * staged[u1 + 1]!;
    const z2 = k2 * staged[u2 + 1]!;
    const z3 = k3 * staged[u3 + 1]!;
    const p = o + stride;
    for (let b = 0; b < rowsB; b++) {
      const [s0, s1, s2, s3] = [staged[y0 + b]!, staged[y1 + b]!, staged[y2 + b]!, staged[y3 + b]!];
      out[o + b]! += x0 * s0 + x1 * s1 + x2 * s2 + x3 * s3;
      out[p + b]! += z0 * s0 + z1 * s1 + z2 * s2 + z3 * s3;
    }
  }
}

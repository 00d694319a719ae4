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
    for (let r = 0; r < rows; r += 4)
      addRows(staged, { a0, rowsA, b0, rowsB, rows, r }, out, at, stride, i === 0 && r === 0);
  });
}

/**
 * Four r at a time: one pass over the core for each, two rows of it side by side, so that what is read of α_B serves both. Each sum is
 * made in the same order as if there were one. What `out` held does not count the first time. No arrays taken apart here: engines would make them, and box what is in them.
 */
function addRows(
  staged: Float32Array,
  { a0, rowsA, b0, rowsB, rows, r }: Readonly<Record<"a0" | "rowsA" | "b0" | "rowsB" | "rows" | "r", number>>,
  out: Float32Array,
  at: number,
  stride: number,
  first: boolean,
): void {
  // Past the last r the last one stands in, times 0.
  const last = rows - 1;
  const r1 = Math.min(r + 1, last);
  const r2 = Math.min(r + 2, last);
  const r3 = Math.min(r + 3, last);
  const y0 = b0 + r * rowsB;
  const y1 = b0 + r1 * rowsB;
  const y2 = b0 + r2 * rowsB;
  const y3 = b0 + r3 * rowsB;
  for (let a = 0; a < rowsA; a += 2) {
    // An odd row at the end is its own neighbour, and is written once.
    const next = a + 1 < rowsA ? 1 : 0;
    const x = a0 + a;
    const x0 = staged[x + r * rowsA]!;
    const x1 = r + 1 < rows ? staged[x + r1 * rowsA]! : 0;
    const x2 = r + 2 < rows ? staged[x + r2 * rowsA]! : 0;
    const x3 = r + 3 < rows ? staged[x + r3 * rowsA]! : 0;
    const z0 = staged[x + r * rowsA + next]!;
    const z1 = r + 1 < rows ? staged[x + r1 * rowsA + next]! : 0;
    const z2 = r + 2 < rows ? staged[x + r2 * rowsA + next]! : 0;
    const z3 = r + 3 < rows ? staged[x + r3 * rowsA + next]! : 0;
    const o = at + a * stride;
    const p = o + next * stride;
    for (let b = 0; b < rowsB; b++) {
      const s0 = staged[y0 + b]!;
      const s1 = staged[y1 + b]!;
      const s2 = staged[y2 + b]!;
      const s3 = staged[y3 + b]!;
      // The neighbour first: where it is the row itself, both are the same.
      const second = (first ? 0 : out[p + b]!) + (z0 * s0 + z1 * s1 + z2 * s2 + z3 * s3);
      out[o + b] = (first ? 0 : out[o + b]!) + (x0 * s0 + x1 * s1 + x2 * s2 + x3 * s3);
      out[p + b] = second;
    }
  }
}

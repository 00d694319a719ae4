/**
 * The unfolded forms of a task, for models that add the low-rank term themselves: expanded factors, or the core between the
 * components on either side (docs/runtime.md, "Unfolded").
 */
import type { Slice } from "../backends/backend.ts";
import { pacer } from "../pace.ts";
import type { Term } from "../tensor/term.ts";
import { hasCore, reuse, writeCore } from "./core.ts";
import type { CpuView } from "./host.ts";
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
  readonly old?: ReadonlyMap<number, Pick<Term, "A" | "Bt" | "core">> | undefined;
  /** Whether A is wanted as [in, rank], as models take it. Default: false. */
  readonly turned?: boolean | undefined;
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
  { old, turned = false, signal, device }: UnfoldOptions = {},
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
    terms.set(plan.module, assemble(plan, bench, mode, { old: old?.get(plan.module), turned }, expanded));
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
  { old, turned }: { readonly old: Pick<Term, "A" | "Bt" | "core"> | undefined; readonly turned: boolean },
  expanded: () => Factors,
): Term {
  const { in: inputs, out } = bench.modules[plan.module]!;
  const inCore = hasCore(plan, mode);
  const rank = Math.max(inCore ? plan.A.private.reduce((sum, piece) => sum + piece.rank, 0) : plan.rank, 1);
  const [A, Bt] = [reuse(old?.A, rank * inputs), reuse(old?.Bt, rank * out)];
  if (!inCore && plan.rank > 0) {
    const factors = expanded();
    put(factors.A, A, 0, rank, inputs, turned);
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
    put(staged.subarray(at, at + rows * inputs), A, row, rank, inputs, turned);
    Bt.set(staged.subarray(atB, atB + rows * out), row * out);
    row += rows;
  }
  return { rank, A, Bt, core };
}

/** Writes rows [rows, width] to others [rank, width], from one of these on; or, turned, to [width, rank]. */
function put(values: Float32Array, out: Float32Array, row: number, rank: number, width: number, turned: boolean): void {
  if (!turned) return out.set(values, row * width);
  for (let at = 0, to = row; at < values.length; at += width, to++)
    for (let i = 0; i < width; i++) out[i * rank + to] = values[at + i]!;
}

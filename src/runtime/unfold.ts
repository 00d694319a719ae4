/**
 * The unfolded forms of a task, for models that add the low-rank term themselves: expanded factors, or the core between the
 * components on either side (docs/runtime.md, "Unfolded").
 */
import type { Slice } from "../backends/backend.ts";
import type { Located } from "../base/locate.ts";
import type { PackModule } from "../format/format.ts";
import type { ModulePlan } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

/** What the active task does to one module, as f32 arrays. */
export interface Unfolded {
  /** Rows of A, ≥ 1. */
  rank: number;
  /** [rows of A's basis, rows of B's basis] */
  core: Float32Array | undefined;
  /** [rank, in] */
  A: Float32Array;
  /** [out, rank] */
  B: Float32Array;
  /** [out] */
  rowScale: Float32Array | undefined;
}

/** A [rank, in] and Bᵀ [rank, out] of a plan. */
interface Factors {
  A: Float32Array;
  B: Float32Array;
}

/** The pristine weight of a module. */
export interface BaseWeight {
  weight: Located;
  bytes: Uint8Array;
}

/**
 * Terms of the plans, by module, on a backend of the CPU.
 * @param old the terms before, whose arrays are used again where they fit
 * @param weightOf a module of a plan with magnitudes
 */
export function unfold(
  plans: readonly ModulePlan[],
  bench: Workbench,
  modules: readonly PackModule[],
  mode: "core" | "factors",
  old: ReadonlyMap<number, Unfolded>,
  weightOf: (module: number) => BaseWeight,
): Map<number, Unfolded> {
  bench.prepare(plans);
  const terms = assemble(plans, bench, modules, mode, old);
  for (const [plan, scale] of scales(plans, bench, weightOf)) {
    terms.get(plan.module)!.rowScale = bench.floats(scale, modules[plan.module]!.out).slice();
  }
  return terms;
}

/** The same on a device, from which factors and scales are read. */
export async function unfoldOnDevice(
  ...[plans, bench, modules, mode, old, weightOf]: Parameters<typeof unfold>
): Promise<Map<number, Unfolded>> {
  bench.prepare(plans);
  const terms = assemble(plans, bench, modules, mode, old, await fetchFactors(bench, modules, mode));
  for (const [plan, scale] of scales(plans, bench, weightOf)) {
    terms.get(plan.module)!.rowScale = await fetchFloats(bench, scale, modules[plan.module]!.out);
  }
  return terms;
}

/** DoRA's scale of each plan that has magnitudes, in scratch memory until the next is asked for. */
function* scales(
  plans: readonly ModulePlan[],
  bench: Workbench,
  weightOf: (module: number) => BaseWeight,
): Iterable<[plan: ModulePlan, scale: Slice]> {
  for (const plan of plans) {
    if (plan.magnitude === undefined) continue;
    const { weight, bytes } = weightOf(plan.module);
    const base = bench.reserve("weight", bytes.length);
    bench.backend.upload(base, bytes);
    yield [plan, bench.rowScale(plan, weight, base)];
  }
}

/** @param fetched the factors, where the backend is a device */
function assemble(
  plans: readonly ModulePlan[],
  bench: Workbench,
  modules: readonly PackModule[],
  mode: "core" | "factors",
  old: ReadonlyMap<number, Unfolded>,
  fetched?: ReadonlyMap<number, Factors>,
): Map<number, Unfolded> {
  const terms = new Map<number, Unfolded>();
  for (const plan of plans) {
    const module = modules[plan.module]!;
    const { shared } = plan.A;
    const core = hasCore(plan, mode);
    const own = plan.A.private.reduce((q, p) => q + p.q, 0);
    const rank = Math.max(core ? own : plan.rank, 1);
    const before = old.get(plan.module);
    const term: Unfolded = {
      rank,
      core: core ? reuse(before?.core, shared[0]!.basis.tensor.rows * plan.B.shared[0]!.basis.tensor.rows) : undefined,
      A: reuse(before?.A, rank * module.in),
      B: reuse(before?.B, module.out * rank),
      rowScale: undefined,
    };
    // Elsewhere every value is written.
    if (core || plan.rank === 0) for (const values of [term.core, term.A, term.B]) values?.fill(0);
    if (term.core) {
      addCore(term.core, plan, bench.staging.values);
      addPrivate(term, plan, module, bench.staging.values);
    } else {
      const { A, B } = fetched?.get(plan.module) ?? viewFactors(plan, bench, module);
      term.A.set(A);
      transpose(B, term.B, plan.rank, module.out, rank, 0);
    }
    terms.set(plan.module, term);
  }
  return terms;
}

/** Whether a module's term is handed out as a core. */
function hasCore({ A, B }: ModulePlan, mode: "core" | "factors"): boolean {
  return mode === "core" && A.shared.length > 0 && [...A.shared, ...B.shared].every((p) => p.basis.kind === "column");
}

function viewFactors(plan: ModulePlan, bench: Workbench, module: PackModule): Factors {
  const { A, B } = bench.expand(plan);
  return { A: bench.floats(A, plan.rank * module.in), B: bench.floats(B, plan.rank * module.out) };
}

/** The factors that `unfold` needs of what is prepared, by module, from a device: one read a round. */
async function fetchFactors(
  bench: Workbench,
  modules: readonly PackModule[],
  mode: "core" | "factors",
): Promise<Map<number, Factors>> {
  const factors = new Map<number, Factors>();
  for (const round of bench.rounds) {
    const wanted = round.filter((plan) => !hasCore(plan, mode));
    if (wanted.length === 0) continue;
    const places = wanted.map((plan) => bench.expand(plan));
    const { block } = places[0]!.A;
    const all = await fetchFloats(bench, { block, byteOffset: 0 }, Math.floor(block.byteLength / 4));
    for (const [i, { module, rank }] of wanted.entries()) {
      const { A, B } = places[i]!;
      const part = ({ byteOffset }: Slice, width: number): Float32Array =>
        all.subarray(byteOffset / 4, byteOffset / 4 + rank * width);
      factors.set(module, { A: part(A, modules[module]!.in), B: part(B, modules[module]!.out) });
    }
  }
  return factors;
}

/** `count` f32 values from a device, once everything recorded before has taken effect. */
async function fetchFloats({ backend }: Workbench, slice: Slice, count: number): Promise<Float32Array> {
  const { buffer, byteOffset } = await backend.read!(slice, 4 * count);
  return new Float32Array(buffer, byteOffset, count);
}

/** `old` when it has the right length, else a new array: a warm switch allocates nothing. */
function reuse(old: Float32Array | undefined, length: number): Float32Array {
  return old?.length === length ? old : new Float32Array(length);
}

/** core[a, b] += Σ_r α_A[r, a] · α_B[r, b] for every task of the plan, four r at a time: one pass over the core for each. */
function addCore(core: Float32Array, plan: ModulePlan, staged: Float32Array): void {
  plan.A.shared.forEach(({ at: a0, rows, basis }, i) => {
    const { at: b0, basis: basisB } = plan.B.shared[i]!;
    const [rowsA, rowsB] = [basis.tensor.rows, basisB.tensor.rows];
    for (let r = 0; r < rows; r += 4) {
      // Past the last r the last one stands in, times 0.
      const [r1, r2, r3] = [Math.min(r + 1, rows - 1), Math.min(r + 2, rows - 1), Math.min(r + 3, rows - 1)];
      const [y0, y1, y2, y3] = [b0 + r * rowsB, b0 + r1 * rowsB, b0 + r2 * rowsB, b0 + r3 * rowsB];
      for (let a = 0; a < rowsA; a++) {
        const x0 = staged[a0 + r * rowsA + a]!;
        const x1 = r + 1 < rows ? staged[a0 + r1 * rowsA + a]! : 0;
        const x2 = r + 2 < rows ? staged[a0 + r2 * rowsA + a]! : 0;
        const x3 = r + 3 < rows ? staged[a0 + r3 * rowsA + a]! : 0;
        const out = a * rowsB;
        for (let b = 0; b < rowsB; b++) {
          core[out + b]! += x0 * staged[y0 + b]! + x1 * staged[y1 + b]! + x2 * staged[y2 + b]! + x3 * staged[y3 + b]!;
        }
      }
    }
  });
}

/** The private factors of every task of the plan, one below the other. */
function addPrivate(term: Unfolded, plan: ModulePlan, { in: inputs, out }: PackModule, staged: Float32Array): void {
  let row = 0;
  plan.A.private.forEach(({ at: a0, q }, i) => {
    const b0 = plan.B.private[i]!.at;
    term.A.set(staged.subarray(a0, a0 + q * inputs), row * inputs);
    transpose(staged.subarray(b0, b0 + q * out), term.B, q, out, term.rank, row);
    row += q;
  });
}

/** from [rows, out] into columns `column`, `column` + 1, … of to [out, rank]. */
function transpose(
  from: Float32Array,
  to: Float32Array,
  rows: number,
  out: number,
  rank: number,
  column: number,
): void {
  for (let k = 0; k < rows; k++) for (let o = 0; o < out; o++) to[o * rank + column + k] = from[k * out + o]!;
}

/**
 * A backend as one runtime uses it: the bases, scratch memory that is kept from switch to switch, and the operations on
 * whole modules: expand, fold, DoRA's scale. It knows plans and weights, but neither tasks nor hosts.
 */
import type { Backend, Block, FoldJob, Owner, Slice } from "../backends/backend.ts";
import type { PackModule } from "../pack/format.ts";
import type { Located } from "./locate.ts";
import { Staging, type ModulePlan } from "./stage.ts";

/** The beginning of a block, or a place in it. */
export function at(block: Block, byteOffset = 0): Slice {
  return { block, byteOffset };
}

export class Workbench {
  readonly backend: Backend;
  /** Coefficients of the switch under way; `prepare` uploads them. */
  readonly staging: Staging = new Staging();
  /** Bytes allocated and operations since `begin`. */
  allocated = 0;
  dispatches = 0;
  readonly #modules: readonly PackModule[];
  readonly #basis: Block;
  readonly #scratch = new Map<string, Block>();

  /** Uploads the bases. */
  constructor(backend: Backend, modules: readonly PackModule[], bases: Uint8Array) {
    this.backend = backend;
    this.#modules = modules;
    this.#basis = backend.allocate(Math.max(bases.length, 16), "basis");
    backend.upload(at(this.#basis), bases);
  }

  allocate(bytes: number, owner: Owner): Block {
    this.allocated += bytes;
    return this.backend.allocate(bytes, owner);
  }

  /** Memory of at least `bytes` that lasts until the next call with this name asks for more. */
  reserve(name: "coefficients" | "A" | "B" | "scale" | "weight", bytes: number): Slice {
    const held = this.#scratch.get(name);
    if (held && held.byteLength >= bytes) return at(held);
    if (held) this.backend.free(held);
    this.#scratch.delete(name);
    const block = this.allocate(Math.max(bytes, 16), "scratch");
    this.#scratch.set(name, block);
    return at(block);
  }

  /** Everything that can fail before a switch changes anything: memory for its factors, and the upload of what is staged. */
  prepare(plans: readonly ModulePlan[]): void {
    const most = (size: (plan: ModulePlan, module: PackModule) => number): number =>
      Math.max(0, ...plans.map((plan) => size(plan, this.#modules[plan.module]!)));
    const { values, used } = this.staging;
    const staged = this.reserve("coefficients", 4 * used);
    this.reserve("A", 4 * most((plan, module) => plan.rank * module.in));
    this.reserve("B", 4 * most((plan, module) => plan.rank * module.out));
    this.reserve("scale", 4 * most((plan, module) => (plan.magnitude === undefined ? 0 : module.out)));
    this.backend.upload(staged, new Uint8Array(values.buffer, 0, 4 * used));
  }

  /** A [rank, in] and Bᵀ [rank, out] of a plan, in scratch memory. */
  expand(plan: ModulePlan): { A: Slice; B: Slice } {
    const module = this.#modules[plan.module]!;
    return { A: this.#expandSide(plan, "A", module.in), B: this.#expandSide(plan, "B", module.out) };
  }

  #expandSide(plan: ModulePlan, side: "A" | "B", width: number): Slice {
    const { block } = this.reserve(side, 0);
    const staged = this.reserve("coefficients", 0).block;
    for (const { at: first, rows, basis, row } of plan[side].shared) {
      const { type, rows: basisRows, width: basisWidth, byteOffset } = basis.tensor;
      this.backend.expand({
        out: at(block, 4 * row * width),
        coefficients: at(staged, 4 * first),
        basis: at(this.#basis, byteOffset),
        type,
        rank: rows,
        rows: basisRows,
        width: basisWidth,
      });
      this.dispatches++;
    }
    for (const { at: first, row, q } of plan[side].private) this.copy(at(staged, 4 * first), at(block, 4 * row * width), 4 * q * width);
    return at(block);
  }

  /** out = base + ΔW of the plan, rows scaled where the task has magnitudes; out may be base. */
  fold(plan: ModulePlan, weight: Located, base: Slice, out: Slice): void {
    const job = this.#job(plan, weight, base);
    const scale = plan.magnitude === undefined ? undefined : this.#scale(plan, weight, job);
    this.backend.fold({ ...job, out, ...(weight.transposed ? { columnScale: scale } : { rowScale: scale }) });
    this.dispatches++;
  }

  /** DoRA's scale [out] of a plan with magnitudes, f32. */
  rowScale(plan: ModulePlan, weight: Located, base: Slice): Slice {
    return this.#scale(plan, weight, this.#job(plan, weight, base));
  }

  #job(plan: ModulePlan, { transposed, dtype: type }: Located, base: Slice): Omit<FoldJob, "out"> {
    const { in: inputs, out } = this.#modules[plan.module]!;
    const { A, B } = this.expand(plan);
    const [rows, columns, left, right] = transposed ? [inputs, out, A, B] : [out, inputs, B, A];
    return { base, type, rows, columns, stride: columns, left, right, rank: plan.rank };
  }

  #scale(plan: ModulePlan, { transposed }: Located, job: Omit<FoldJob, "out">): Slice {
    const out = this.reserve("scale", 0);
    const magnitude = at(this.reserve("coefficients", 0).block, 4 * plan.magnitude!);
    this.backend.scale({ ...job, out, magnitude, axis: transposed ? "columns" : "rows" });
    this.dispatches++;
    return out;
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    this.backend.copy(from, to, byteLength);
    this.dispatches++;
  }

  /** f32 values as they lie in the CPU's memory; valid until memory is allocated. */
  floats(slice: Slice, count: number): Float32Array {
    const bytes = this.backend.view!(slice, 4 * count);
    return new Float32Array(bytes.buffer, bytes.byteOffset, count);
  }
}

/**
 * The arithmetic of a switch. `planTasks` decodes the coefficients of its tasks into one f32 array, with strengths
 * applied, and lists of what rows every module's factors are made: no backend, no host. A `KernelSession` uploads that
 * array and does the plans on a backend: expand, fold, DoRA's scale. It keeps the bases, and scratch memory from switch
 * to switch.
 *
 * Factors live in one scratch block, for a round of modules at a time. A CPU expands one module after the other, so
 * that its factors stay in a cache; a device expands as many as fit at once.
 */

import {
  after,
  at,
  type Backend,
  type Block,
  type DeviceBackend,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ScaleJob,
  type Slice,
  type WeightJob,
} from "../backends/backend.ts";
import { described } from "../errors.ts";
import {
  encodedTensor,
  type PackModule,
  type SharedBases,
  type Side,
  sharedBases,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import { placeTensor } from "../tensor/dtypes.ts";
import type { Located } from "./base.ts";

/** A task of a switch and its strength. */
export interface ActiveTask {
  readonly id: string;
  readonly strength: number;
  readonly blob: TaskBlob;
}

/** Rows of a factor that expand from a basis. */
interface Expansion {
  /** First f32 of the coefficients [rows, basis rows] in the upload buffer. */
  readonly at: number;
  /** Rows of coefficients: the rank (column) or 1 (flat). */
  readonly rows: number;
  readonly basis: Side;
  /** First row of the factor that is made. */
  readonly row: number;
  /** Added to residual rows, instead of in their place. */
  readonly add: boolean;
}

/** Rows of a factor that the task stores itself. */
export interface ResidualRows {
  /** First f32 of the rows in the upload buffer; below 0 where they are `stored` alone. */
  readonly at: number;
  readonly row: number;
  readonly rank: number;
  /** Set where nothing but the rows themselves is wanted: they are read straight to their place. */
  readonly stored?: StoredRows | undefined;
}

/** Rows as their task stores them, and their factor. */
interface StoredRows {
  readonly blob: TaskBlob;
  readonly tensor: TensorRef;
  readonly strength: number;
}

/** A factor, row by row. Where a plan has a core, residual rows go by pairs of both factors. */
interface FactorPlan {
  readonly expansions: Expansion[];
  readonly residual: ResidualRows[];
}

/** Change of one module by a switch: factors A [rank, in] and Bt [rank, out]. */
export interface ModulePlan {
  readonly module: number;
  rank: number;
  readonly A: FactorPlan;
  readonly Bt: FactorPlan;
  /** True where all but residual pairs lies between column bases that the module's tasks share. */
  core: boolean;
  /** First f32 of DoRA's magnitudes [out] in the upload buffer. */
  magnitude: number | undefined;
  /** Once it is prepared: bytes at which the factors lie in the scratch block, and the round that makes them. */
  place?: { readonly A: number; readonly Bt: number; readonly round: readonly ModulePlan[] };
}

/** A growing f32 array that is used again by each switch. */
class UploadBuffer {
  values: Float32Array<ArrayBuffer> = new Float32Array(0);
  used = 0;

  /**
   * Appends a tensor, times `strength`.
   * @param last one number more behind each row
   * @returns where it begins
   */
  add(blob: TaskBlob, tensor: TensorRef, strength: number, last?: number): number {
    const { rows, width } = tensor;
    const stride = last === undefined ? width : width + 1;
    const at = this.used;
    this.used += rows * stride;
    if (this.used > this.values.length) {
      // It grows by half at least: a copy for each of many modules would take quadratic time.
      const grown = new Float32Array(Math.max(this.used, Math.ceil(1.5 * this.values.length)));
      grown.set(this.values);
      this.values = grown;
    }
    const bytes = encodedTensor(blob.bytes, tensor);
    placeTensor(tensor.dtype, bytes, rows, width, this.values, { at, down: stride, along: 1 }, strength);
    if (last !== undefined) for (let to = at + width; to < this.used; to += stride) this.values[to] = last;
    return at;
  }
}

/**
 * Makes a plan for each module of the tasks of one switch. Strengths multiply B, whose factors carry the adapter's
 * scale already.
 * @param leave whether rows of factors without components, which nothing is added to, are left as they are stored.
 *   Default: false
 */
export function planTasks(
  tasks: readonly ActiveTask[],
  modules: readonly PackModule[],
  buffer: UploadBuffer,
  leave = false,
): ModulePlan[] {
  const plans = new Map<number, ModulePlan>();
  const planOf = (module: number): ModulePlan => {
    const none = (): FactorPlan => ({ expansions: [], residual: [] });
    const plan = plans.get(module) ?? { module, rank: 0, A: none(), Bt: none(), core: true, magnitude: undefined };
    plans.set(module, plan);
    return plan;
  };
  const terms = tasks.flatMap(({ blob }) => blob.terms);
  const scaled = new Set(terms.filter(({ magnitude }) => magnitude).map(({ module }) => module));
  for (const { blob, strength } of tasks) {
    for (const term of blob.terms) {
      const module = modules[term.module]!;
      const plan = planOf(term.module);
      /** Adds what the task has for a factor behind the rows that there are, multiplied by `times`. */
      const add = (
        { expansions, residual }: FactorPlan,
        bases: readonly Side[],
        times: number,
        coefficients: TaskTerm["A"],
        rows: TensorRef | undefined,
      ): void => {
        const row = plan.rank;
        if (coefficients) {
          const basis = bases[coefficients.basis]!;
          // The mean is the basis' last row: one more coefficient per row, 1 (times the strength) where the task uses
          // it.
          const mean = basis.mean ? (coefficients.mean ? times : 0) : undefined;
          const at = buffer.add(blob, coefficients.tensor, times, mean);
          expansions.push({ at, rows: coefficients.tensor.rows, basis, row, add: rows !== undefined });
        }
        if (!rows) return;
        // Norms of DoRA's rows are computed from whole factors.
        if (leave && !scaled.has(term.module) && bases.length === 0)
          residual.push({ at: -1, row, rank: rows.rows, stored: { blob, tensor: rows, strength: times } });
        else residual.push({ at: buffer.add(blob, rows, times), row, rank: rows.rows });
      };
      add(plan.A, module.A, 1, term.A, term.ownA);
      add(plan.Bt, module.B, strength, term.B, term.ownBt);
      if (term.rank > 0) plan.core &&= coreBases(term, module) !== undefined;
      plan.rank += term.rank;
      add(plan.A, module.A, 1, undefined, term.privateA);
      add(plan.Bt, module.B, strength, undefined, term.privateBt);
      plan.rank += term.privateRank;
      if (term.magnitude) plan.magnitude = buffer.add(blob, term.magnitude, 1);
    }
  }
  return [...plans.values()];
}

/** The column bases between which a term has a core; undefined where it has none. */
export function coreBases({ rank, ownA, ownBt }: TaskTerm, module: PackModule): SharedBases | undefined {
  const bases = rank > 0 && !ownA && !ownBt ? sharedBases(module) : undefined;
  return bases?.A.kind === "column" && bases.B.kind === "column" ? bases : undefined;
}

/** Bytes of the factors of a round on a device. */
const ROUND_BYTES = 32 * 2 ** 20;

/** Expansions come last: they may be added to residual rows, and a device then has all of them in a row. */
const ORDER: readonly (keyof FactorPlan)[] = ["residual", "expansions"];

/** Names of scratch memory. */
type Scratch = "coefficients" | "factors" | "scale" | "weight" | "x" | "y" | "inner";

/** Storage of a weight. */
type Stored = Pick<Located, "dtype" | "transposed">;

export class KernelSession {
  readonly backend: Backend;
  /** Coefficients of the switch under way; `prepare` uploads them. */
  readonly buffer: UploadBuffer = new UploadBuffer();
  readonly modules: readonly PackModule[];
  /** Bytes allocated and operations, counted until the caller sets them to 0. */
  allocated = 0;
  dispatches = 0;
  readonly #basis: Block;
  readonly #scratch = new Map<string, Block>();
  /** The round whose factors are there. */
  #expanded: readonly ModulePlan[] | undefined;

  /** Uploads the bases. */
  constructor(backend: Backend, modules: readonly PackModule[], bases: Uint8Array) {
    this.backend = backend;
    this.modules = modules;
    this.#basis = backend.allocate(Math.max(bases.length, 16), "basis");
    backend.upload(at(this.#basis), bases);
  }

  allocate(bytes: number, owner: Owner): Block {
    this.allocated += bytes;
    return this.backend.allocate(bytes, owner);
  }

  /** Memory of at least `bytes` that lasts until the next call with this name asks for more. */
  reserve(name: Scratch, bytes: number): Slice {
    const held = this.#scratch.get(name);
    if (held && held.byteLength >= bytes && !held.refused) return at(held);
    if (held) this.backend.free(held);
    this.#scratch.delete(name);
    const block = this.allocate(Math.max(bytes, 16), "scratch");
    this.#scratch.set(name, block);
    return at(block);
  }

  /** Last result of `reserve` for this name. */
  reserved(name: Scratch): Slice {
    return at(this.#scratch.get(name)!);
  }

  /** Bytes of the backend: as they lie in the CPU's memory until more is allocated, or a copy from a device. */
  bytesAt(from: Slice, byteLength: number): Uint8Array | Promise<Uint8Array> {
    const { backend } = this;
    return backend.view ? backend.view(from, byteLength) : backend.read!(from, byteLength);
  }

  /** Does all that can fail before a switch changes anything: takes memory for its factors, and uploads the buffer. */
  prepare(plans: readonly ModulePlan[]): void {
    const { values, used } = this.buffer;
    const uploaded = this.reserve("coefficients", 4 * used);
    this.reserve("factors", this.#layOut(plans));
    this.reserve("scale", plans.some(isScaled) ? 4 * used : 0);
    this.backend.upload(uploaded, new Uint8Array(values.buffer, 0, 4 * used));
  }

  /** Divides plans into rounds. Returns the bytes of the largest. */
  #layOut(plans: readonly ModulePlan[]): number {
    const most = this.backend.view ? 0 : ROUND_BYTES;
    this.#expanded = undefined;
    let round: ModulePlan[] | undefined;
    let largest = 0;
    let used = 0;
    for (const plan of plans) {
      const { in: inputs, out } = this.modules[plan.module]!;
      const bytesA = align16(4 * plan.rank * inputs);
      const bytes = bytesA + align16(4 * plan.rank * out);
      if (!round || used + bytes > most) {
        round = [];
        used = 0;
      }
      round.push(plan);
      plan.place = { A: used, Bt: used + bytesA, round };
      used += bytes;
      largest = Math.max(largest, used);
    }
    return largest;
  }

  /**
   * Makes the factors of the round of a plan that was prepared, where they are not there. Yields between pieces of
   * work.
   */
  *expand(plan: ModulePlan): Generator<void> {
    const { round } = plan.place!;
    if (this.#expanded === round) return;
    const uploaded = this.reserved("coefficients");
    for (const kind of ORDER) {
      for (const each of round) {
        const { in: inputs, out } = this.modules[each.module]!;
        const { A, Bt } = this.factors(each);
        yield* this.fill(each.A, uploaded, A, inputs, [kind]);
        yield* this.fill(each.Bt, uploaded, Bt, out, [kind]);
      }
    }
    this.#expanded = round;
  }

  /** A [rank, in] and Bt [rank, out] of a plan once they are made, in scratch memory until another round's are. */
  factors({ place }: ModulePlan): { A: Slice; Bt: Slice } {
    const { block } = this.reserved("factors");
    return { A: at(block, place!.A), Bt: at(block, place!.Bt) };
  }

  /** Makes one factor [rank, width]. @param uploaded where the upload buffer begins */
  *fill(factor: FactorPlan, uploaded: Slice, to: Slice, width: number, kinds: typeof ORDER = ORDER): Generator<void> {
    const { backend } = this;
    for (const kind of kinds) {
      for (const rows of factor[kind]) {
        const from = after(uploaded, 4 * rows.at);
        const out = after(to, 4 * rows.row * width);
        if ("basis" in rows) {
          const { basis, rows: rank, add } = rows;
          const { dtype, rows: components, width, byteOffset } = basis.tensor;
          const of = { basis: at(this.#basis, byteOffset), dtype, rows: components, width };
          const job: ExpandJob = { out, coefficients: from, ...of, rank, add };
          this.dispatches++;
          if (backend.expanding) yield* backend.expanding(job);
          else backend.expand(job);
        } else if (!rows.stored) this.copy(from, out, 4 * rows.rank * width);
      }
    }
  }

  /**
   * out = base + ΔW of the plan, rows scaled where the task has magnitudes; out may be base. Yields between pieces of
   * work.
   */
  *fold(plan: ModulePlan, weight: Stored, base: Slice, out: Slice): Generator<void> {
    const { backend } = this;
    yield* this.expand(plan);
    const scale = isScaled(plan) ? yield* this.rowScale(plan, weight, base) : undefined;
    const scaled = weight.transposed ? { columnScale: scale } : { rowScale: scale };
    const job: FoldJob = { ...this.#job(plan, weight, base), out, ...scaled };
    if (backend.folding) yield* backend.folding(job);
    else backend.fold(job);
    this.dispatches++;
  }

  /** DoRA's scale [out] of a plan with magnitudes, f32. Yields between pieces of work. */
  *rowScale(plan: ModulePlan, weight: Stored, base: Slice): Generator<void, Slice> {
    const { backend } = this;
    yield* this.expand(plan);
    const out = after(this.reserved("scale"), 4 * plan.magnitude!);
    const magnitude = after(this.reserved("coefficients"), 4 * plan.magnitude!);
    const axis = weight.transposed ? "columns" : "rows";
    const job: ScaleJob = { ...this.#job(plan, weight, base), out, magnitude, axis };
    if (backend.scaling) yield* backend.scaling(job);
    else backend.scale(job);
    this.dispatches++;
    return out;
  }

  #job(plan: ModulePlan, { transposed, dtype }: Stored, base: Slice): WeightJob {
    const { in: inputs, out } = this.modules[plan.module]!;
    const { A, Bt } = this.factors(plan);
    const [rows, columns, left, right] = transposed ? [inputs, out, A, Bt] : [out, inputs, Bt, A];
    return { base, dtype, rows, columns, stride: columns, left, right, rank: plan.rank };
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    this.backend.copy(from, to, byteLength);
    this.dispatches++;
  }
}

export function isScaled(plan: ModulePlan): plan is ModulePlan & { magnitude: number } {
  return plan.magnitude !== undefined;
}

function align16(bytes: number): number {
  return Math.ceil(bytes / 16) * 16;
}

// Cores: products of coefficients, which a model that has the components built in takes in place of factors.

/** Writes rows [rows, width] into [rank, width] from `row` on; or, turned, into [width, rank]. */
export function put(
  values: Float32Array,
  out: Float32Array,
  row: number,
  rank: number,
  width: number,
  turned = false,
): void {
  if (!turned) return out.set(values, row * width);
  for (let at = 0, to = row; at < values.length; at += width, to++)
    for (let i = 0; i < width; i++) out[i * rank + to] = values[at + i]!;
}

/** True if a module's term is handed out as a core. */
export function hasCore({ A, core }: ModulePlan, mode: "core" | "factors"): boolean {
  return mode === "core" && core && A.expansions.length > 0;
}

/**
 * An array of this length: `old`, or in its memory where that is large enough, and at most twice as large. Switches
 * between tasks of like ranks allocate nothing once they are warm.
 */
export function reuse(old: Float32Array | undefined, length: number): Float32Array {
  if (old?.length === length) return old;
  const room = old?.byteOffset === 0 ? old.buffer.byteLength / 4 : 0;
  return old && room >= length && room <= 2 * length
    ? new Float32Array(old.buffer, 0, length)
    : new Float32Array(length);
}

/**
 * Writes the core of a plan that has one: core[a, b] = Σ_r α_A[r, a] · α_B[r, b] over all its tasks. Yields between
 * pieces of work.
 * @param uploaded coefficients, as `planTasks` has left them
 * @param at where in `out` the core begins, its rows `stride` apart
 */
export function* writeCore(
  plan: ModulePlan,
  uploaded: Float32Array,
  out: Float32Array,
  at: number,
  stride: number,
): Generator<void> {
  for (const [i, { at: a0, rows, basis }] of plan.A.expansions.entries()) {
    const B = plan.Bt.expansions[i]!;
    const [KA, KB] = [basis.tensor.rows, B.basis.tensor.rows];
    const high = 2 * Math.ceil(PIECE / Math.max(1, rows) / KB / 2);
    for (let a = 0; a < KA; a += high) {
      if (a + i > 0) yield;
      addProduct(uploaded, [a0, KA, B.at, KB, rows], [a, Math.min(a + high, KA)], out, at, stride, i === 0);
    }
  }
}

/** Products of a piece of work: a millisecond. */
const PIECE = 2 ** 20;

/** First coefficient of A and how many a row has, the same for B, and the number of rows. */
type Sizes = readonly [a0: number, rowsA: number, b0: number, rowsB: number, rows: number];

/**
 * Adds the product of a task's coefficients to rows of a core, in tiles of 2 × 4 whose sums stay in registers. Rows and
 * columns at an edge stand in for those beyond it. @param first whether `out` is overwritten
 */
function addProduct(
  uploaded: Float32Array,
  [a0, rowsA, b0, rowsB, rows]: Sizes,
  [from, to]: readonly [from: number, to: number],
  out: Float32Array,
  at: number,
  stride: number,
  first: boolean,
): void {
  for (let a = from; a < to; a += 2) {
    const below = Math.min(1, rowsA - 1 - a);
    for (let b = 0; b < rowsB; b += 4) {
      const left = rowsB - 1 - b;
      const c1 = Math.min(1, left);
      const c2 = Math.min(2, left);
      const c3 = Math.min(3, left);
      const o = at + a * stride + b;
      const p = o + below * stride;
      let s0 = first ? 0 : out[o]!;
      let s1 = first ? 0 : out[o + c1]!;
      let s2 = first ? 0 : out[o + c2]!;
      let s3 = first ? 0 : out[o + c3]!;
      let t0 = first ? 0 : out[p]!;
      let t1 = first ? 0 : out[p + c1]!;
      let t2 = first ? 0 : out[p + c2]!;
      let t3 = first ? 0 : out[p + c3]!;
      for (let r = 0, i = a0 + a, j = b0 + b; r < rows; r++, i += rowsA, j += rowsB) {
        const x = uploaded[i]!;
        const y = uploaded[i + below]!;
        const z0 = uploaded[j]!;
        const z1 = uploaded[j + c1]!;
        const z2 = uploaded[j + c2]!;
        const z3 = uploaded[j + c3]!;
        s0 += x * z0;
        s1 += x * z1;
        s2 += x * z2;
        s3 += x * z3;
        t0 += y * z0;
        t1 += y * z1;
        t2 += y * z2;
        t3 += y * z3;
      }
      out[p + c3] = t3;
      out[p + c2] = t2;
      out[p + c1] = t1;
      out[p] = t0;
      out[o + c3] = s3;
      out[o + c2] = s2;
      out[o + c1] = s1;
      out[o] = s0;
    }
  }
}

// The backend that computes. Those of the CPU arrive by dynamic import, so that an app loads the one it runs.

/** A backend by its name, or one on a device. */
export type BackendChoice = "wasm" | "js" | DeviceBackend;

/** Which backend computes. */
export interface BackendOptions {
  /**
   * The backend, or several in the order in which they are tried: `[webgpu(), "wasm"]`. Default: `["wasm", "js"]`.
   * Folded weights of a backend on a device are buffers there.
   */
  readonly backend?: BackendChoice | readonly BackendChoice[] | undefined;
  wasm?:
    | {
        /** Instead of the best build that this engine validates. */
        readonly variant?: "scalar" | "simd" | "relaxed-simd";
        /** A precompiled build, for engines that do not compile at run time (`eigenlora/wasm/simd.wasm`). */
        readonly module?: WebAssembly.Module;
      }
    | undefined;
}

/**
 * Starts the first backend that can.
 * @returns the backend, and why those before it in the order were passed over
 * @throws BackendError when the last one cannot start either; RangeError for what is no backend
 */
export async function createBackend(options: BackendOptions = {}): Promise<{ backend: Backend; passedOver: string[] }> {
  const choices = [options.backend ?? (["wasm", "js"] as const)].flat();
  for (const choice of choices) {
    if (choice === "wasm" || choice === "js" || typeof choice?.start === "function") continue;
    throw new RangeError(`backend: expected "wasm", "js" or webgpu() of "eigenlora/webgpu", got ${described(choice)}`);
  }
  const passedOver: string[] = [];
  for (const [i, choice] of choices.entries()) {
    try {
      return { backend: await startBackend(choice, options), passedOver };
    } catch (error) {
      if (i === choices.length - 1) throw error;
      passedOver.push((error as Error).message);
    }
  }
  throw new RangeError("backend: expected at least one, got an empty list");
}

async function startBackend(choice: BackendChoice, { wasm }: BackendOptions): Promise<Backend> {
  if (choice === "wasm") return (await import("../backends/wasm.ts")).createWasmBackend(wasm);
  return choice === "js" ? (await import("../backends/js.ts")).createJsBackend() : choice.start();
}

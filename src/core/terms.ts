/**
 * Modes "core" and "factors": the terms of the active task, for models that add the low-rank term themselves (docs/runtime.md, "Unfolded").
 * Loaded where a runtime does not fold.
 */
import { nearest } from "../arguments.ts";
import type { Slice } from "../backends/backend.ts";
import { TaskError } from "../errors.ts";
import { wasmFloats } from "../format/coded-wasm.ts";
import type { PackModule, TaskBlob } from "../format/format.ts";
import { paced, pacer } from "../pace.ts";
import { isQuantized, placeTensor } from "../tensor/dtypes.ts";
import { FACTORS, type Term } from "../tensor/term.ts";
import type { CpuView, WeightHost } from "./base.ts";
import type { KernelSession } from "./kernel-session.ts";
import {
  type ActiveTask,
  coreBases,
  hasCore,
  type ModulePlan,
  put,
  type ResidualRows,
  reuse,
  writeCore,
} from "./kernel-session.ts";
import { refuseMagnitudes } from "./merge.ts";
import type { PackView } from "./part.ts";
import { type FoldContext, readWeight, type Slot, type TaskWriter, type WeightChange } from "./weights.ts";

/** Numbers that are copied at a time. */
const PIECE = 2 ** 18;

/** What the active task does to one module, for a model that adds it itself (docs/runtime.md, "Unfolded"). */
export interface ModuleTerm extends Term {
  /** [out], the layer's whole bias, where the task changes it. */
  readonly bias?: Float32Array | undefined;
}

/** Bytes that the terms of any task may become. */
const ALWAYS = 2 ** 24;

/**
 * Refuses a task whose terms would become many times the bytes that are stored for it, before memory is taken for them (SPEC.md, section 10).
 * @param mode "core" where products of coefficients are wanted instead of the factors that have them
 * @throws TaskError naming what is allowed
 */
export function checkExpansion(
  { name, modules }: Pick<PackView, "name" | "modules">,
  id: string,
  { terms, limit }: TaskBlob,
  mode: "core" | "factors",
): void {
  if (!limit) return;
  const { stored, times } = limit;
  let bytes = 0;
  for (const term of terms) {
    const module = modules[term.module]!;
    const bases = mode === "core" ? coreBases(term, module) : undefined;
    const rank = term.privateRank + (bases ? 0 : term.rank);
    bytes += 4 * rank * (module.in + module.out) + (bases ? 4 * bases.A.tensor.rows * bases.B.tensor.rows : 0);
  }
  if (bytes <= Math.max(ALWAYS, times * stored)) return;
  throw new TaskError(
    `${name}: task "${id}" expands from ${stored} bytes to ${bytes}; expected at most ${times} times as many, or ${ALWAYS}. ` +
      `If you trust it, open the pack with maxExpansion: ${Math.ceil(bytes / stored)}`,
    { task: id },
  );
}

/** The terms of the active task. */
export class ActiveTerms implements TaskWriter {
  readonly #mode: "core" | "factors";
  readonly #modules: readonly PackModule[];
  readonly #slots: readonly Slot[];
  #active: ReadonlyMap<number, Term> = new Map();
  /** Terms of the previous task. The next task's are written there, so that the active ones stay whole until all are made. */
  #spare: ReadonlyMap<number, Term> = new Map();

  constructor(mode: "core" | "factors", modules: readonly PackModule[], slots: readonly Slot[]) {
    this.#mode = mode;
    this.#modules = modules;
    this.#slots = slots;
  }

  /**
   * Refuses what only a base bounds, the shapes of terms, or what needs its weights, where there is none.
   * @param scaled whether scales of DoRA are wanted
   * @throws TaskError as `checkExpansion`, and for DoRA
   */
  checkUnbased(pack: PackView, tasks: Iterable<ActiveTask>, scaled = true): void {
    for (const { id, blob } of tasks) checkExpansion(pack, id, blob, this.#mode);
    if (scaled) refuseMagnitudes([...tasks], pack, () => true, "pass `base`");
  }

  /** Modules whose terms change, with the pristine weights that DoRA's scales need. */
  async prepare(
    plans: readonly ModulePlan[],
    { parameters }: Pick<WeightChange, "parameters">,
    host: WeightHost,
    signal: AbortSignal | undefined,
  ): Promise<WeightChange> {
    const weights = new Map<number, Uint8Array | undefined>(
      [...this.#active.keys()].map((module) => [module, undefined]),
    );
    for (const { module, magnitude } of plans) {
      const scaled = magnitude !== undefined;
      weights.set(module, scaled ? await readWeight(host, this.#slots[module]!, undefined, { signal }) : undefined);
    }
    const modules = new Set(plans.map(({ module }) => module));
    return { plans, modules, weights, parameters, tables: new Set() };
  }

  async write(
    { plans, weights }: WeightChange,
    { kernels }: FoldContext,
    _former: unknown,
    signal: AbortSignal | undefined,
  ): Promise<() => void> {
    const weightOf = (module: number): PristineWeight => {
      return { ...this.#slots[module]!.weight, data: weights.get(module)!, byteOffset: 0 };
    };
    const made = await unfold(plans, kernels, this.#mode, weightOf, { old: this.#spare, signal });
    await kernels.backend.finish();
    return () => {
      this.#spare = this.#active;
      this.#active = made;
    };
  }

  /** @throws RangeError for a module the pack does not have */
  indexOf(name: string): number {
    const names = this.#modules.map((module) => module.name);
    const index = names.indexOf(name);
    if (index >= 0) return index;
    throw new RangeError(`no module "${name}"; nearest: ${nearest(name, names).join(", ") || "none"}`);
  }

  /** @param bias the layer's, where the task changes it */
  term(name: string, bias: Float32Array | undefined): ModuleTerm | undefined {
    const index = this.indexOf(name);
    const term = this.#active.get(index);
    if (!bias) return term;
    const { in: inputs, out } = this.#modules[index]!;
    const none = { rank: 1, A: new Float32Array(inputs), Bt: new Float32Array(out) };
    return { ...(term ?? none), bias };
  }

  get byteLength(): number {
    let bytes = 0;
    for (const { core, A, Bt, rowScale } of [...this.#active.values(), ...this.#spare.values()]) {
      for (const array of [core, A, Bt, rowScale]) bytes += array?.buffer.byteLength ?? 0;
    }
    return bytes;
  }
}

/** The pristine weight of a module, [in, out] where it is `transposed`. */
export type PristineWeight = CpuView & { readonly transposed?: boolean };

/** The arrays of a term that are used again where they fit. */
type OldArrays = Partial<Pick<Term, "A" | "Bt" | "core">>;

interface UnfoldOptions {
  /** Terms that are no longer read: their arrays are used again where they fit. */
  readonly old?: ReadonlyMap<number, OldArrays> | undefined;
  /** Factors of a module that are wanted as coefficients over all its components. Default: none. */
  readonly over?: ((module: number) => ReadonlySet<"A" | "B"> | undefined) | undefined;
  /** Whether A is wanted as [in, rank], as models take it. Default: false. */
  readonly turned?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Terms of the plans, by module. A term has `core` in mode "core" where all of its shared pieces lie between column bases,
 * `rowScale` where the plan has magnitudes, and one row of zeros where it has no factors. Long work lets others have a turn.
 * @param weightOf a module of a plan with magnitudes
 * @throws the reason of `signal`, once it is aborted
 */
export async function unfold(
  plans: readonly ModulePlan[],
  kernels: KernelSession,
  mode: "core" | "factors",
  weightOf: (module: number) => PristineWeight,
  { old, over, turned = false, signal }: UnfoldOptions = {},
): Promise<Map<number, Term>> {
  const pause = pacer(signal);
  /** The factors of a plan that expand. */
  const expandedOf = (plan: ModulePlan): ("A" | "B")[] =>
    (["A", "B"] as const).filter(
      (side) => !hasCore(plan, mode) && !over?.(plan.module)?.has(side) && plan[FACTORS[side]].expansions.length > 0,
    );
  const jobs = plans.map((plan) => ({ plan, sides: expandedOf(plan) }));
  const computed = jobs.filter(({ plan, sides }) => plan.magnitude !== undefined || sides.length > 0);
  if (computed.length > 0) kernels.prepare(computed.map(({ plan }) => plan));
  const terms = new Map<number, Term>();
  for (const { plan, sides } of jobs) {
    const expanded: { A?: Float32Array; B?: Float32Array } = {};
    const made = sides.length > 0 && paced(kernels.expand(plan), pause);
    if (made) await made;
    const module = kernels.modules[plan.module]!;
    for (const side of sides) {
      const values = floatsAt(kernels, kernels.factors(plan)[FACTORS[side]], plan.rank * widthOf(module, side));
      expanded[side] = values instanceof Promise ? await values : values;
    }
    const arrays = { old: old?.get(plan.module), over: over?.(plan.module), turned, expanded };
    const term = paced(termOf(plan, hasCore(plan, mode), module, kernels.buffer.values, arrays), pause);
    terms.set(plan.module, term instanceof Promise ? await term : term);
    const turn = pause();
    if (turn) await turn;
  }
  for (const plan of plans) {
    if (plan.magnitude === undefined) continue;
    const { data, dtype, transposed = false } = weightOf(plan.module);
    const base = kernels.reserve("weight", data.length);
    kernels.backend.upload(base, data);
    // DoRA's scale [out], in scratch memory until the next is made.
    const turn = paced(kernels.rowScale(plan, { dtype, transposed }, base), pause);
    if (turn) await turn;
    const { out } = kernels.modules[plan.module]!;
    const rowScale = (await floatsAt(kernels, kernels.reserved("scale"), out)).slice();
    terms.set(plan.module, { ...terms.get(plan.module)!, rowScale });
  }
  return terms;
}

const widthOf = (module: PackModule, side: "A" | "B"): number => (side === "A" ? module.in : module.out);

/**
 * The term of a plan. Each factor is taken by itself: coefficients over all its components, residual rows, or expanded rows.
 * @param isCore whether the residual pairs of all tasks lie beside a core
 */
function* termOf(
  plan: ModulePlan,
  isCore: boolean,
  module: PackModule,
  uploaded: Float32Array,
  {
    old,
    over,
    turned,
    expanded,
  }: {
    readonly old: OldArrays | undefined;
    readonly over: ReadonlySet<"A" | "B"> | undefined;
    readonly turned: boolean;
    readonly expanded: { readonly A?: Float32Array; readonly B?: Float32Array };
  },
): Generator<void, Term> {
  let core: Float32Array | undefined;
  let stored = plan.rank;
  if (isCore) {
    const [KA, KB] = [plan.A.expansions[0]!.basis.tensor.rows, plan.Bt.expansions[0]!.basis.tensor.rows];
    core = reuse(old?.core, KA * KB);
    yield* writeCore(plan, uploaded, core, 0, KB);
    stored = plan.A.residual.reduce((sum, rows) => sum + rows.rank, 0);
  }
  const rank = Math.max(stored, 1);
  const arrays: { A?: Float32Array; Bt?: Float32Array } = {};
  for (const side of ["A", "B"] as const) {
    const key = FACTORS[side];
    const turn = turned && side === "A";
    const width = widthOf(module, side);
    const { expansions, residual } = plan[key];
    const bases = module[side];
    const K = bases.reduce((sum, { tensor }) => sum + tensor.rows, 0);
    const wanted = !isCore && over?.has(side);
    const out = reuse(old?.[key], rank * (wanted ? K : width));
    arrays[key] = out;
    // Residual and expanded rows fill all of it.
    if (wanted || stored === 0) out.fill(0);
    const rows = expanded[side];
    if (wanted) {
      const coefficients = { rank, width: K, turned: turn };
      for (const { at, rows, basis, row } of expansions) {
        let start = 0;
        for (const other of bases.slice(0, bases.indexOf(basis))) start += other.tensor.rows;
        putAt(uploaded, at, rows, basis.tensor.rows, out, row, start, coefficients);
      }
    } else if (rows) {
      const step = Math.max(1, Math.floor(PIECE / width));
      for (let row = 0; row < rank; row += step) {
        if (row > 0) yield;
        put(rows.subarray(row * width, (row + step) * width), out, row, rank, width, turn);
      }
    } else {
      let row = 0;
      for (const piece of residual) {
        readRows(isCore ? { ...piece, row } : piece, uploaded, out, rank, width, turn);
        row += piece.rank;
      }
    }
  }
  return { rank, A: arrays.A!, Bt: arrays.Bt!, ...(core && { core }) };
}

/** Writes rows [rows, count] of `values` from `at` on into [rank, width] from `row` and `column` on; or, turned, into [width, rank]. */
function putAt(
  values: Float32Array,
  at: number,
  rows: number,
  count: number,
  out: Float32Array,
  row: number,
  column: number,
  { rank, width, turned }: { readonly rank: number; readonly width: number; readonly turned: boolean },
): void {
  for (let r = 0; r < rows; r++)
    for (let k = 0; k < count; k++)
      out[turned ? (column + k) * rank + row + r : (row + r) * width + column + k] = values[at + r * count + k]!;
}

/** Writes rows of width `width` into [rank, width] from their row on; or, turned, into [width, rank]. */
function readRows(
  { at, row, rank: rows, stored }: ResidualRows,
  uploaded: Float32Array,
  out: Float32Array,
  rank: number,
  width: number,
  turned: boolean,
): void {
  if (stored) {
    const { blob, tensor, strength } = stored;
    const { dtype, byteOffset, byteLength } = tensor;
    const bytes = blob.bytes.subarray(byteOffset, byteOffset + byteLength);
    const whole = strength === 1 && (!turned || rows === rank);
    const fast = whole && isQuantized(dtype) && wasmFloats(dtype, bytes, rows, width, turned);
    if (fast) return out.set(fast, turned ? 0 : row * width);
    const places = turned ? { at: row, down: 1, along: rank } : { at: row * width, down: width, along: 1 };
    placeTensor(dtype, bytes, rows, width, out, places, strength);
  } else put(uploaded.subarray(at, at + rows * width), out, row, rank, width, turned);
}

/** f32 values: as they lie in the CPU's memory until more is allocated, or a copy from a device. */
function floatsAt({ backend }: KernelSession, slice: Slice, count: number): Float32Array | Promise<Float32Array> {
  if (!backend.view)
    return backend.read!(slice, 4 * count).then(
      ({ buffer, byteOffset }) => new Float32Array(buffer, byteOffset, count),
    );
  const { buffer, byteOffset } = backend.view(slice, 4 * count);
  return new Float32Array(buffer, byteOffset, count);
}

/**
 * Modes "core" and "factors": the terms of the active task, for models that add the low-rank term themselves
 * (docs/runtime.md, "Unfolded"), and `apply`, which adds it for a batch. Loaded where a runtime does not fold.
 */
import { after, at, type Slice } from "../backends/backend.ts";
import { checkArgument, nearest, TaskError } from "../errors.ts";
import { wasmFloats } from "../format/coded-wasm.ts";
import { encodedTensor, type PackModule, type TaskBlob } from "../format/format.ts";
import { atOnce, paced, pacer } from "../pace.ts";
import { elementsOf, isQuantized, placeTensor, sum } from "../tensor/dtypes.ts";
import type { Term } from "../tensor/term.ts";
import { type CpuView, onDevice, type View } from "./base.ts";
import type * as kernel from "./kernel-session.ts";
import { coreBases, hasCore, isScaled, planTasks, put, reuse, writeCore } from "./kernel-session.ts";
import { refuseMagnitudes } from "./merge.ts";
import { scalesOf } from "./mismatch.ts";
import type { PackView } from "./part.ts";
import { loadParts } from "./selection.ts";
import { type RuntimeContext, readWeight, type TaskChange } from "./weights.ts";

/** Numbers that are copied at a time. */
const PIECE = 2 ** 18;

/** Term of the active task for one module, for a model that adds it itself (docs/runtime.md, "Unfolded"). */
export interface ModuleTerm extends Term {
  /** [out], the layer's whole bias, where the task changes it. */
  readonly bias?: Float32Array | undefined;
}

/** Bytes that the terms of any task may become. */
const ALWAYS = 2 ** 24;

/**
 * Refuses a task whose terms would become many times the bytes that are stored for it, before memory is taken for them
 * (SPEC.md, section 10).
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

/** The terms of the active task, written by the methods of `FoldedWeights`. */
export class ActiveTerms {
  readonly #context: RuntimeContext;
  readonly #mode: "core" | "factors";
  #active: ReadonlyMap<number, Term> = new Map();
  /**
   * Terms of the previous task. The next task's are written there, so that the active ones stay whole until all are
   * made.
   */
  #spare: ReadonlyMap<number, Term> = new Map();

  constructor(context: RuntimeContext, mode: "core" | "factors") {
    this.#context = context;
    this.#mode = mode;
  }

  /**
   * Refuses what only a base bounds, the shapes of terms, or what needs its weights, where there is none.
   * @param scaled whether scales of DoRA are wanted
   * @throws TaskError as `checkExpansion`, and for DoRA
   */
  checkUnbased(tasks: readonly kernel.ActiveTask[], scaled = true): void {
    const { view } = this.#context;
    for (const { id, blob } of tasks) checkExpansion(view, id, blob, this.#mode);
    if (scaled) refuseMagnitudes(tasks, view, () => true, "pass `base`");
  }

  /** Modules whose terms change, with the pristine weights that DoRA's scales need. */
  async read(
    plans: readonly kernel.ModulePlan[],
    _resolved: unknown,
    signal: AbortSignal | undefined,
  ): Promise<TaskChange["weights"]> {
    const { host, bindings } = this.#context;
    const weights = new Map<number, Uint8Array | undefined>();
    for (const module of this.#active.keys()) weights.set(module, undefined);
    for (const { module, magnitude } of plans) {
      const scaled = magnitude !== undefined;
      weights.set(module, scaled ? await readWeight(host!, bindings[module]!, undefined, { signal }) : undefined);
    }
    return weights;
  }

  async write({ plans, weights }: TaskChange, _former: unknown, signal: AbortSignal | undefined): Promise<() => void> {
    const { kernels, bindings } = this.#context;
    const weightOf = (module: number): PristineWeight => {
      return { ...bindings[module]!.weight, data: weights.get(module)!, byteOffset: 0 };
    };
    const made = await unfold(plans, kernels, this.#mode, weightOf, {
      old: (module) => this.#spare.get(module),
      signal,
    });
    await kernels.backend.finish();
    return () => {
      this.#spare = this.#active;
      this.#active = made;
    };
  }

  /** @throws RangeError for a module the pack does not have */
  #indexOf(name: string): number {
    const names = this.#context.view.modules.map((module) => module.name);
    const index = names.indexOf(name);
    if (index >= 0) return index;
    throw new RangeError(`no module "${name}"; nearest: ${nearest(name, names).join(", ") || "none"}`);
  }

  /** @param bias the layer's, where the task changes it */
  term(name: string, bias: Float32Array | undefined): ModuleTerm | undefined {
    const index = this.#indexOf(name);
    const term = this.#active.get(index);
    if (!bias) return term;
    const { in: inputs, out } = this.#context.view.modules[index]!;
    const none = { rank: 1, A: new Float32Array(inputs), Bt: new Float32Array(out) };
    return { ...(term ?? none), bias };
  }

  /**
   * Adds the term of a module for a batch.
   * @param active tasks of all rows, where `ids` does not say them by row
   * @param x f32 [rows, …, in]
   * @param y f32 [rows, …, out], added to
   * @throws TaskError for an unknown task, or one with DoRA on the module, which is no addition
   * @throws TypeError, RangeError when shapes or types do not fit
   */
  async apply(
    active: readonly kernel.ActiveTask[],
    name: string,
    x: View,
    y: View,
    ids: ApplyOptions["tasks"],
  ): Promise<void> {
    const { view, ignored, kernels, host } = this.#context;
    const index = this.#indexOf(name);
    if (ids) checkArgument("apply: tasks", ids, "a list of one task per row", "map");
    const tasks = new Map<string | null | undefined, readonly kernel.ActiveTask[]>();
    for (const id of ids ?? [undefined])
      if (!tasks.has(id)) tasks.set(id, ids ? await loadParts(view, id as string | null, {}, ignored) : active);
    const all = [...tasks.values()].flat();
    refuseMagnitudes(all, view, (module) => module === index, 'it is no addition to x·Wᵀ; use mode "folded"');
    if (!host) this.checkUnbased(all, false);
    const module = view.modules[index]!;
    const rows = ids ?? [undefined];
    const count = checkShapes(module, rows.length, x, y);
    const { backend, buffer } = kernels;
    buffer.used = 0;
    const plans = new Map<string | null | undefined, kernel.ModulePlan>();
    /** First bytes of the factors. */
    const starts = new Map<kernel.ModulePlan, number>();
    let bytes = 0;
    for (const [id, parts] of tasks) {
      const ofModule = parts.map(({ blob, ...part }) => {
        return { ...part, blob: { ...blob, terms: blob.terms.filter((term) => term.module === index) } };
      });
      for (const plan of planTasks(ofModule, view.modules, buffer)) {
        plans.set(id, plan);
        starts.set(plan, bytes);
        bytes += 4 * plan.rank * (module.in + module.out);
      }
    }
    const uploaded = kernels.reserve("coefficients", 4 * buffer.used);
    backend.upload(uploaded, new Uint8Array(buffer.values.buffer, 0, 4 * buffer.used));
    const input = placeOf(kernels, "x", x, count * module.in);
    const output = placeOf(kernels, "y", y, count * module.out);
    const { block } = kernels.reserve("factors", bytes);
    const secondOf = (plan: kernel.ModulePlan): Slice => at(block, starts.get(plan)! + 4 * plan.rank * module.in);
    for (const [plan, start] of starts) {
      atOnce(kernels.fill(plan.A, uploaded, at(block, start), module.in));
      atOnce(kernels.fill(plan.Bt, uploaded, secondOf(plan), module.out));
    }
    const vectors = count / rows.length;
    const inner = kernels.reserve("inner", 4 * vectors * sum(rows, (id) => plans.get(id)?.rank ?? 0));
    const runs: Run[] = [];
    let used = 0;
    for (const [i, id] of rows.entries()) {
      const plan = plans.get(id);
      if (plan) runs.push({ plan, row: i * vectors, inner: after(inner, 4 * used) });
      used += vectors * (plan?.rank ?? 0);
    }
    // y += (x·Aᵀ)·Bt, step by step, so that a device does each for all rows at once.
    for (const { plan, row, inner: out } of runs) {
      const basis = at(block, starts.get(plan)!);
      const x = after(input, 4 * row * module.in);
      backend.project({ out, x, basis, rows: plan.rank, width: module.in, count: vectors });
    }
    for (const { plan, row, inner: coefficients } of runs) {
      const of = { basis: secondOf(plan), dtype: "f32", rows: plan.rank, width: module.out, rank: vectors } as const;
      backend.expand({ out: after(output, 4 * row * module.out), coefficients, ...of, add: true });
    }
    if (onDevice(y.data)) backend.submit!();
    else y.data.set(await kernels.bytesAt(output, 4 * count * module.out), y.byteOffset);
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

/** Names of the factors, and of their bases. */
const FACTORS = ["A", "Bt"] as const;
const SIDES = { A: "A", Bt: "B" } as const;

interface UnfoldOptions {
  /** Terms that are no longer read: their arrays are used again where they fit. */
  readonly old?: ((module: number) => OldArrays | undefined) | undefined;
  /** Factors of a module that are wanted as coefficients over all its components. Default: none. */
  readonly over?: ((module: number) => ReadonlySet<"A" | "B"> | undefined) | undefined;
  /** True if A is wanted as [in, rank], as models take it. Default: false. */
  readonly turned?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Terms of the plans, by module. A term has `core` in mode "core" where all of its shared pieces lie between column
 * bases, `rowScale` where the plan has magnitudes, and one row of zeros where it has no factors. Long work lets others
 * have a turn.
 * @param weightOf a module of a plan with magnitudes
 * @throws the reason of `signal`, once it is aborted
 */
export async function unfold(
  plans: readonly kernel.ModulePlan[],
  kernels: kernel.KernelSession,
  mode: "core" | "factors",
  weightOf: (module: number) => PristineWeight,
  options: UnfoldOptions = {},
): Promise<Map<number, Term>> {
  const pause = pacer(options.signal);
  /** The factors of a plan that expand. */
  const expandedOf = (plan: kernel.ModulePlan): ("A" | "Bt")[] => {
    if (hasCore(plan, mode)) return [];
    const wanted = options.over?.(plan.module);
    return FACTORS.filter((key) => plan[key].expansions.length > 0 && !wanted?.has(SIDES[key]));
  };
  const computed = plans.filter((plan) => isScaled(plan) || expandedOf(plan).length > 0);
  if (computed.length > 0) kernels.prepare(computed);
  const terms = new Map<number, Term>();
  for (const plan of plans) {
    const keys = expandedOf(plan);
    const module = kernels.modules[plan.module]!;
    const { values } = kernels.buffer;
    const term = termOf(plan, module, values, mode, keys, options);
    terms.set(plan.module, term);
    if (term.core) {
      const written = paced(writeCore(plan, values, term.core, 0, plan.Bt.expansions[0]!.basis.tensor.rows), pause);
      if (written) await written;
    }
    if (keys.length > 0) await paced(kernels.expand(plan), pause);
    for (const key of keys) {
      const width = key === "A" ? module.in : module.out;
      const { buffer, byteOffset } = await kernels.bytesAt(kernels.factors(plan)[key], 4 * plan.rank * width);
      const across = key === "A" && options.turned;
      for (let row = 0, step = Math.ceil(PIECE / width); row < plan.rank; row += step) {
        const rows = new Float32Array(buffer, byteOffset + 4 * row * width, Math.min(step, plan.rank - row) * width);
        put(rows, term[key], row, plan.rank, width, across);
        const turn = pause();
        if (turn) await turn;
      }
    }
    const turn = pause();
    if (turn) await turn;
  }
  const scaled = plans.filter(isScaled);
  for (const plan of scaled) {
    const { data, dtype, transposed = false } = weightOf(plan.module);
    const base = kernels.reserve("weight", data.length);
    kernels.backend.upload(base, data);
    await paced(kernels.rowScale(plan, { dtype, transposed }, base), pause);
  }
  const scales = await scalesOf(scaled, kernels);
  for (const { module, magnitude } of scaled) {
    const rowScale = scales.slice(magnitude, magnitude + kernels.modules[module]!.out);
    terms.set(module, { ...terms.get(module)!, rowScale });
  }
  return terms;
}

/**
 * The term of a plan. Each factor is taken by itself: coefficients over all its components, residual rows, or expanded
 * rows.
 * @param mode "core" where the term is a core if it has one, with the residual pairs of all tasks
 * @param keys of factors that expand; these and the core are still to be written
 */
function termOf(
  plan: kernel.ModulePlan,
  module: PackModule,
  uploaded: Float32Array,
  mode: "core" | "factors",
  keys: readonly ("A" | "Bt")[],
  { old: oldOf, over, turned = false }: UnfoldOptions,
): Term {
  const isCore = hasCore(plan, mode);
  const wanted = isCore ? undefined : over?.(plan.module);
  const old = oldOf?.(plan.module);
  const stored = isCore ? sum(plan.A.residual, ({ rank }) => rank) : plan.rank;
  const rank = Math.max(stored, 1);
  const factor = (key: "A" | "Bt"): Float32Array => {
    const { expansions, residual } = plan[key];
    const across = turned && key === "A";
    const overComponents = wanted?.has(SIDES[key]) ?? false;
    const bases = module[SIDES[key]];
    const factorWidth = key === "A" ? module.in : module.out;
    const width = overComponents ? sum(bases, ({ tensor }) => tensor.rows) : factorWidth;
    const out = reuse(old?.[key], rank * width);
    // Residual and expanded rows fill all of it.
    if (overComponents || stored === 0) out.fill(0);
    if (overComponents) {
      for (const { at, rows, basis, row } of expansions) {
        const count = basis.tensor.rows;
        let column = 0;
        for (const other of bases.slice(0, bases.indexOf(basis))) column += other.tensor.rows;
        for (let r = 0; r < rows; r++)
          for (let k = 0; k < count; k++)
            out[across ? (column + k) * rank + row + r : (row + r) * width + column + k] =
              uploaded[at + r * count + k]!;
      }
    } else if (!keys.includes(key)) {
      let row = 0;
      for (const piece of residual) {
        readRows(isCore ? { ...piece, row } : piece, uploaded, out, rank, width, across);
        row += piece.rank;
      }
    }
    return out;
  };
  const A = factor("A");
  const Bt = factor("Bt");
  if (!isCore) return { rank, A, Bt };
  const [KA, KB] = [plan.A.expansions[0]!.basis.tensor.rows, plan.Bt.expansions[0]!.basis.tensor.rows];
  return { rank, A, Bt, core: reuse(old?.core, KA * KB) };
}

/** Writes rows of width `width` into [rank, width] from their row on; or, turned, into [width, rank]. */
function readRows(
  { at, row, rank: rows, stored }: kernel.ResidualRows,
  uploaded: Float32Array,
  out: Float32Array,
  rank: number,
  width: number,
  turned: boolean,
): void {
  if (stored) {
    const { blob, tensor, strength } = stored;
    const { dtype } = tensor;
    const bytes = encodedTensor(blob.bytes, tensor);
    const whole = strength === 1 && (!turned || rows === rank);
    const fast = whole && isQuantized(dtype) && wasmFloats(dtype, bytes, rows, width, turned);
    if (fast) return out.set(fast, turned ? 0 : row * width);
    const places = turned ? { at: row, down: 1, along: rank } : { at: row * width, down: width, along: 1 };
    placeTensor(dtype, bytes, rows, width, out, places, strength);
  } else put(uploaded.subarray(at, at + rows * width), out, row, rank, width, turned);
}

/** Options of `apply`. */
export interface ApplyOptions {
  /** Tasks by row; null leaves a row as it is. Default: the active task for all rows. */
  readonly tasks?: readonly (string | null)[];
}

/** Rows of the batch that a task changes. */
interface Run {
  readonly plan: kernel.ModulePlan;
  /** First row of vectors. */
  readonly row: number;
  /** x·Aᵀ. */
  readonly inner: Slice;
}

/** Vectors in the batch. */
function checkShapes(module: PackModule, rows: number, x: View, y: View): number {
  if (module.layout === "conv" || module.layout === "embedding") {
    throw new TypeError(`apply: "${module.name}" is no linear layer (${module.layout}); use mode "folded"`);
  }
  for (const [name, view, width] of [
    ["x", x, module.in],
    ["y", y, module.out],
  ] as const) {
    checkArgument(`apply: ${name}`, view, "a view { dtype, shape, data, byteOffset }", "dtype");
    if (view.dtype !== "f32") throw new TypeError(`apply: ${name} is ${view.dtype}, expected f32`);
    if (view.shape.length >= 2 && view.shape[view.shape.length - 1] === width) continue;
    throw new RangeError(
      `apply: ${name} is [${view.shape.join(", ")}], expected [rows, …, ${width}] for "${module.name}"`,
    );
  }
  const [ofX, ofY] = [x, y].map(({ shape }) => shape.slice(0, -1));
  if (ofX!.join() !== ofY!.join())
    throw new RangeError(`apply: x has rows [${ofX!.join(", ")}], y [${ofY!.join(", ")}]`);
  if (rows !== 1 && rows !== x.shape[0])
    throw new RangeError(`apply: ${rows} tasks for ${x.shape[0]} rows; give one per row`);
  return elementsOf(ofX!);
}

/** The vectors where the backend reads and writes them. */
function placeOf(kernels: kernel.KernelSession, name: "x" | "y", { data, byteOffset }: View, length: number): Slice {
  if (onDevice(data)) {
    if (kernels.backend.adopt) return { block: kernels.backend.adopt(data), byteOffset };
    throw new TypeError(
      `apply: ${name} lies on a device, and the backend is ${kernels.backend.name}: pass backend: webgpu({ device })`,
    );
  }
  if (!(data instanceof Uint8Array) || byteOffset + 4 * length > data.byteLength)
    throw new TypeError(`apply: ${name}.data: expected a Uint8Array of ${4 * length} bytes from ${byteOffset} on`);
  const place = kernels.reserve(name, 4 * length);
  kernels.backend.upload(place, data.subarray(byteOffset, byteOffset + 4 * length));
  return place;
}

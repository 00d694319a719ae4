/**
 * Modes "core" and "factors": the terms of the active task, for models that add the low-rank term themselves (docs/runtime.md, "Unfolded"),
 * and `apply`, which adds it for a batch. Loaded where a runtime does not fold.
 */
import { checkArgument, nearest } from "../arguments.ts";
import { after, at, type ExpandJob, type Slice } from "../backends/backend.ts";
import { TaskError } from "../errors.ts";
import { wasmFloats } from "../format/coded-wasm.ts";
import { type PackModule, sharedBases, type TaskBlob } from "../format/format.ts";
import { atOnce, paced, pacer } from "../pace.ts";
import { isQuantized, placeTensor } from "../tensor/dtypes.ts";
import { FACTORS, type Term } from "../tensor/term.ts";
import { type CpuView, onDevice, type View, type WeightHost } from "./base.ts";
import {
  type ActiveTask,
  coreBases,
  type Expansion,
  hasCore,
  type KernelSession,
  type ModulePlan,
  planTasks,
  put,
  type ResidualRows,
  reuse,
  UploadBuffer,
  writeCore,
} from "./kernel-session.ts";
import { refuseMagnitudes } from "./merge.ts";
import type { PackView } from "./part.ts";
import { loadParts } from "./selection.ts";
import { type FoldContext, readWeight, type TaskWriter, type WeightBinding, type WeightChange } from "./weights.ts";

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
  readonly #bindings: readonly WeightBinding[];
  #active: ReadonlyMap<number, Term> = new Map();
  /** Coefficients of the last batch, kept for the next layer, which usually asks for the same. */
  #applied: (Applied & { readonly kernels: KernelSession }) | undefined;
  /** Terms of the previous task. The next task's are written there, so that the active ones stay whole until all are made. */
  #spare: ReadonlyMap<number, Term> = new Map();

  constructor(mode: "core" | "factors", modules: readonly PackModule[], bindings: readonly WeightBinding[]) {
    this.#mode = mode;
    this.#modules = modules;
    this.#bindings = bindings;
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
      weights.set(module, scaled ? await readWeight(host, this.#bindings[module]!, undefined, { signal }) : undefined);
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
      return { ...this.#bindings[module]!.weight, data: weights.get(module)!, byteOffset: 0 };
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

  /**
   * Adds the term of a module for a batch.
   * @param host of the base, where there is one
   * @param active tasks of all rows, where `tasks` does not say them by row
   * @param x f32 [rows, …, in]
   * @param y f32 [rows, …, out], added to
   * @throws TaskError for an unknown task, or one with DoRA on the module, which is no addition
   * @throws TypeError, RangeError when shapes or types do not fit
   */
  async apply(
    { view, ignored }: { readonly view: PackView; readonly ignored: ReadonlySet<string> },
    kernels: KernelSession,
    host: WeightHost | undefined,
    active: readonly ActiveTask[],
    name: string,
    x: View,
    y: View,
    tasks: ApplyOptions["tasks"],
  ): Promise<void> {
    const index = this.indexOf(name);
    let rows: (readonly ActiveTask[])[] = [active];
    if (tasks) {
      checkArgument("apply: tasks", tasks, "a list of one task per row", "map");
      const known = new Map<string | null, ActiveTask[]>();
      for (const task of tasks) if (!known.has(task)) known.set(task, await loadParts(view, task, {}, ignored));
      rows = tasks.map((task) => known.get(task)!);
    }
    refuseMagnitudes(rows.flat(), view, (module) => module === index, 'it is no addition to x·Wᵀ; use mode "folded"');
    if (!host) this.checkUnbased(view, new Set(rows.flat()), false);
    const { modules } = view;
    const module = modules[index]!;
    const count = checkShapes(module, rows.length, x, y);
    const known = this.#applied?.kernels === kernels ? this.#applied : undefined;
    // Forgotten until it succeeds: it may fail after other coefficients have taken the place of these.
    this.#applied = undefined;
    const { parts, plans, starts } = known && same(known, rows) ? known : uploadCoefficients(kernels, modules, rows);
    const { backend } = kernels;
    const input = placeOf(kernels, "x", x, count * module.in);
    const output = placeOf(kernels, "y", y, count * module.out);
    const vectors = count / rows.length;
    const runs = rows.map((row, i): Run => {
      const task = parts.findIndex((one) => one === row || sameParts(one, row));
      return { plan: plans[task]!.get(index), start: starts[task]!, row: i * vectors, count: vectors };
    });
    applyColumns(kernels, module, runs, input, output, count);
    for (const run of runs) if (run.plan) applyFactors(kernels, module, run, input, output);
    if (onDevice(y.data)) backend.submit!();
    else
      y.data.set(
        backend.view
          ? backend.view(output, 4 * count * module.out)
          : await backend.read!(output, 4 * count * module.out),
        y.byteOffset,
      );
    this.#applied = { kernels, parts, plans, starts };
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
  /** True if A is wanted as [in, rank], as models take it. Default: false. */
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
 * @param isCore true if the term is a core, with the residual pairs of all tasks
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

/** Options of `apply`. */
export interface ApplyOptions {
  /** Tasks by row; null leaves a row as it is. Default: the active task for all rows. */
  readonly tasks?: readonly (string | null)[];
}

/** Rows of the batch that one task works on. */
interface Run {
  /** Term of the task for the module; undefined where it leaves it alone. */
  readonly plan: ModulePlan | undefined;
  /** First value of its coefficients in the uploaded ones. */
  readonly start: number;
  /** First row of vectors, and how many. */
  readonly row: number;
  readonly count: number;
}

/** Coefficients of the tasks of a batch, as the backend has them. */
interface Applied {
  readonly parts: readonly (readonly ActiveTask[])[];
  readonly plans: readonly ReadonlyMap<number, ModulePlan>[];
  readonly starts: readonly number[];
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
  return ofX!.reduce((a, b) => a * b, 1);
}

function same({ parts }: Applied, rows: readonly (readonly ActiveTask[])[]): boolean {
  return rows.every((row) => parts.some((one) => sameParts(one, row)));
}

function sameParts(a: readonly ActiveTask[], b: readonly ActiveTask[]): boolean {
  return (
    a.length === b.length &&
    a.every(({ blob, strength }, i) => blob.terms === b[i]!.blob.terms && strength === b[i]!.strength)
  );
}

function uploadCoefficients(
  kernels: KernelSession,
  modules: readonly PackModule[],
  rows: readonly (readonly ActiveTask[])[],
): Applied {
  const parts: (readonly ActiveTask[])[] = [];
  for (const row of rows) if (!parts.some((one) => sameParts(one, row))) parts.push(row);
  const buffers = parts.map(() => new UploadBuffer());
  const plans = parts.map(
    (tasks, i) => new Map(planTasks(tasks, modules, buffers[i]!).map((plan) => [plan.module, plan])),
  );
  const starts: number[] = [];
  let used = 0;
  for (const buffer of buffers) {
    starts.push(used);
    used += buffer.used;
  }
  const all = new Float32Array(used);
  for (const [i, { values, used: count }] of buffers.entries()) all.set(values.subarray(0, count), starts[i]);
  kernels.backend.upload(kernels.reserve("applied", all.byteLength), new Uint8Array(all.buffer));
  return { parts, plans, starts };
}

/** The vectors where the backend reads and writes them. */
function placeOf(kernels: KernelSession, name: "x" | "y", { data, byteOffset }: View, length: number): Slice {
  if (onDevice(data)) {
    if (kernels.backend.adopt) return { block: kernels.backend.adopt(data), byteOffset };
    throw new TypeError(
      `apply: ${name} lies on a device, and the backend is ${kernels.backend.name}: pass webgpu: { device }`,
    );
  }
  const place = kernels.reserve(name, 4 * length);
  kernels.backend.upload(place, data.subarray(byteOffset, byteOffset + 4 * length));
  return place;
}

/** f32 arrays in the backend, with what is to be multiplied by them. */
type Factor = Pick<ExpandJob, "basis" | "dtype" | "rows" | "width">;

/** Terms between components: y += ((x·E_Aᵀ)·α_Aᵀ·α_B)·E_B, the products with components once for all tasks. */
function applyColumns(
  kernels: KernelSession,
  module: PackModule,
  runs: readonly Run[],
  x: Slice,
  y: Slice,
  count: number,
): void {
  const pieces = runs.map(({ plan }) =>
    (plan?.core ? plan.A.expansions : []).map((a, i): [Expansion, Expansion] => [a, plan!.Bt.expansions[i]!]),
  );
  const most = Math.max(...pieces.map(({ length }) => length));
  if (most === 0) return;
  const { backend } = kernels;
  const { A, B } = sharedBases(module)!;
  const [KA, KB] = [A.tensor.rows, B.tensor.rows];
  const ranks = Math.max(...pieces.flat().map(([{ rows }]) => rows));
  const onA = kernels.reserve("onA", 4 * count * KA);
  const inner = kernels.reserve("inner", 4 * count * ranks);
  const onB = kernels.reserve("onB", 4 * count * KB);
  const { block } = kernels.reserved("applied");
  const factor = (run: Run, piece: Expansion | undefined, width: number): Factor => {
    // No rows make zeros, for rows of the batch without a task.
    return { basis: at(block, piece && 4 * (run.start + piece.at)), dtype: "f32", rows: piece?.rows ?? 0, width };
  };
  backend.project({ out: onA, x, ...kernels.components(A), count });
  // Piece by piece, so that a device does each step for all rows at once.
  for (let piece = 0; piece < most; piece++) {
    for (const [i, run] of runs.entries()) {
      const a = pieces[i]![piece]?.[0];
      const out = after(inner, 4 * run.row * ranks);
      if (a) backend.project({ out, x: after(onA, 4 * run.row * KA), ...factor(run, a, KA), count: run.count });
    }
    for (const [i, run] of runs.entries()) {
      const b = pieces[i]![piece]?.[1];
      if (!b && piece > 0) continue;
      const [out, coefficients] = [after(onB, 4 * run.row * KB), after(inner, 4 * run.row * ranks)];
      backend.expand({ out, coefficients, ...factor(run, b, KB), rank: run.count, add: piece > 0 });
    }
  }
  backend.expand({ out: y, coefficients: onB, ...kernels.components(B), rank: count, add: true });
}

/** Terms of factors: residual pairs, and where no core lies between components all rows, expanded: y += (x·Aᵀ)·Bt. */
function applyFactors(kernels: KernelSession, { in: inputs, out }: PackModule, run: Run, x: Slice, y: Slice): void {
  const { backend } = kernels;
  const { block } = kernels.reserved("applied");
  const uploaded = (first: number): Slice => at(block, 4 * (run.start + first));
  const add = (A: Slice, Bt: Slice, rank: number): void => {
    const between = kernels.reserve("inner", 4 * run.count * rank);
    const of = { dtype: "f32", rows: rank } as const;
    const [rowsOfX, rowsOfY] = [after(x, 4 * run.row * inputs), after(y, 4 * run.row * out)];
    backend.project({ out: between, x: rowsOfX, basis: A, ...of, count: run.count, width: inputs });
    backend.expand({ out: rowsOfY, coefficients: between, basis: Bt, ...of, rank: run.count, width: out, add: true });
  };
  const { A, Bt, core, rank } = run.plan!;
  if (core) {
    for (const [i, { at: a, rank }] of A.residual.entries()) add(uploaded(a), uploaded(Bt.residual[i]!.at), rank);
    return;
  }
  const factors = kernels.reserve("factors", 4 * rank * (inputs + out));
  const second = after(factors, 4 * rank * inputs);
  atOnce(kernels.fill(A, uploaded(0), factors, inputs));
  atOnce(kernels.fill(Bt, uploaded(0), second, out));
  add(factors, second, rank);
}

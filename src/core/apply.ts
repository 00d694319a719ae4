/**
 * The unfolded term where a model runs its layers by hand: y += x·ΔWᵀ for a batch, of one task or of one per row. Nothing is
 * made that is larger than the batch: x goes through the components, the task's coefficients and the other side's components.
 * Loaded when it is used.
 */
import { checkArgument } from "../arguments.ts";
import { after, at, type ExpandJob, type Slice } from "../backends/backend.ts";
import { type PackModule, sharedBases } from "../format/format.ts";
import { atOnce } from "../pace.ts";
import { onDevice, type View, type WeightHost } from "./base.ts";
import {
  type ActiveTask,
  type Expansion,
  type KernelSession,
  type ModulePlan,
  planTasks,
  UploadBuffer,
} from "./kernel-session.ts";
import { refuseMagnitudes } from "./merge.ts";
import type { PackView } from "./part.ts";
import { loadParts } from "./selection.ts";
import type { ActiveTerms } from "./terms.ts";

/** Options of `apply`. */
export interface ApplyOptions {
  /** Tasks by row; null leaves a row as it is. Default: the active task for all rows. */
  readonly tasks?: readonly (string | null)[];
}

/** Rows of the batch that one task works on. */
interface Run {
  /** What the task does to the module; undefined where it leaves it alone. */
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

/** Kept for the next layer, which usually asks for the same. */
const applied = new WeakMap<KernelSession, Applied>();

/**
 * Adds the term of a module for a batch.
 * @param host of the base, where there is one
 * @param active tasks of all rows, where `tasks` does not say them by row
 * @param x f32 [rows, …, in]
 * @param y f32 [rows, …, out], added to
 * @throws TaskError for an unknown task, or one with DoRA on the module, which is no addition
 * @throws TypeError, RangeError when shapes or types do not fit
 */
export async function apply(
  {
    view,
    ignored,
    terms,
  }: { readonly view: PackView; readonly ignored: ReadonlySet<string>; readonly terms: ActiveTerms },
  kernels: KernelSession,
  host: WeightHost | undefined,
  active: readonly ActiveTask[],
  name: string,
  x: View,
  y: View,
  tasks: ApplyOptions["tasks"],
): Promise<void> {
  const index = terms.indexOf(name);
  let rows: (readonly ActiveTask[])[] = [active];
  if (tasks) {
    checkArgument("apply: tasks", tasks, "a list of one task per row", "map");
    const known = new Map<string | null, ActiveTask[]>();
    for (const task of tasks) if (!known.has(task)) known.set(task, await loadParts(view, task, {}, ignored));
    rows = tasks.map((task) => known.get(task)!);
  }
  refuseMagnitudes(rows.flat(), view, (module) => module === index, 'it is no addition to x·Wᵀ; use mode "folded"');
  if (!host) terms.checkUnbased(view, new Set(rows.flat()), false);
  const { modules } = view;
  const module = modules[index]!;
  const count = checkShapes(module, rows.length, x, y);
  const known = applied.get(kernels);
  // Forgotten until it succeeds: it may fail after other coefficients have taken the place of these.
  applied.delete(kernels);
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
      backend.view ? backend.view(output, 4 * count * module.out) : await backend.read!(output, 4 * count * module.out),
      y.byteOffset,
    );
  applied.set(kernels, { parts, plans, starts });
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

/**
 * The unfolded term where a model runs its layers by hand: y += x·ΔWᵀ for a batch, of one task or of one per row. Nothing is
 * made that is larger than the batch: x goes through the components, the task's coefficients and the other side's components.
 * Loaded when it is used.
 */
import { checkArgument } from "../arguments.ts";
import { after, at, type ExpandJob, type Slice } from "../backends/backend.ts";
import { type PackModule, sharedBases } from "../format/format.ts";
import { atOnce } from "../pace.ts";
import { onDevice, type View } from "./base.ts";
import type { PackView } from "./part.ts";
import { loadParts, refuseMagnitudes } from "./selection.ts";
import { type ActiveTask, type Expansion, type ModulePlan, Staging, stage } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

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

/** Coefficients of the tasks of a batch, as the backend has them. Kept for the next layer, which usually asks for the same. */
export interface Applied {
  readonly parts: readonly (readonly ActiveTask[])[];
  readonly plans: readonly ReadonlyMap<number, ModulePlan>[];
  readonly starts: readonly number[];
}

/**
 * @param tasks by row. Default: those of the active selection for all
 * @throws TaskError for an unknown task, or one with DoRA on the module, which is no addition
 */
export async function partsOfRows(
  { view, ignored }: { readonly view: PackView; readonly ignored: ReadonlySet<string> },
  tasks: ApplyOptions["tasks"],
  active: readonly ActiveTask[],
  index: number,
): Promise<(readonly ActiveTask[])[]> {
  let parts: (readonly ActiveTask[])[] = [active];
  if (tasks) {
    checkArgument("apply: tasks", tasks, "a list of one task per row", "map");
    const known = new Map<string | null, ActiveTask[]>();
    for (const task of tasks) if (!known.has(task)) known.set(task, await loadParts(view, task, {}, ignored));
    parts = tasks.map((task) => known.get(task)!);
  }
  refuseMagnitudes(parts.flat(), view, (module) => module === index, 'it is no addition to x·Wᵀ; use mode "folded"');
  return parts;
}

/**
 * @param rows the parts of each row's task; one for all rows, or one for each
 * @param x f32 [rows, …, in]
 * @param y f32 [rows, …, out], added to
 * @param known what the call before returned
 * @throws TypeError, RangeError when shapes or types do not fit
 */
export async function apply(
  bench: Workbench,
  modules: readonly PackModule[],
  index: number,
  rows: readonly (readonly ActiveTask[])[],
  x: View,
  y: View,
  known: Applied | undefined,
): Promise<Applied> {
  const module = modules[index]!;
  const count = checkShapes(module, rows.length, x, y);
  const applied = known && same(known, rows) ? known : uploadCoefficients(bench, modules, rows);
  const { backend } = bench;
  const input = placeOf(bench, "x", x, count * module.in);
  const output = placeOf(bench, "y", y, count * module.out);
  const vectors = count / rows.length;
  const runs = rows.map((parts, i): Run => {
    const task = applied.parts.findIndex((one) => one === parts || sameParts(one, parts));
    return { plan: applied.plans[task]!.get(index), start: applied.starts[task]!, row: i * vectors, count: vectors };
  });
  applyColumns(bench, module, runs, input, output, count);
  for (const run of runs) if (run.plan) applyFactors(bench, module, run, input, output);
  if (onDevice(y.data)) backend.submit!();
  else
    y.data.set(
      backend.view ? backend.view(output, 4 * count * module.out) : await backend.read!(output, 4 * count * module.out),
      y.byteOffset,
    );
  return applied;
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
  bench: Workbench,
  modules: readonly PackModule[],
  rows: readonly (readonly ActiveTask[])[],
): Applied {
  const parts: (readonly ActiveTask[])[] = [];
  for (const row of rows) if (!parts.some((one) => sameParts(one, row))) parts.push(row);
  const stagings = parts.map(() => new Staging());
  const plans = parts.map((one, i) => new Map(stage(one, modules, stagings[i]!).map((plan) => [plan.module, plan])));
  const starts: number[] = [];
  let used = 0;
  for (const staging of stagings) {
    starts.push(used);
    used += staging.used;
  }
  const all = new Float32Array(used);
  for (const [i, { values, used: count }] of stagings.entries()) all.set(values.subarray(0, count), starts[i]);
  bench.backend.upload(bench.reserve("applied", all.byteLength), new Uint8Array(all.buffer));
  return { parts, plans, starts };
}

/** The vectors where the backend reads and writes them. */
function placeOf(bench: Workbench, name: "x" | "y", { data, byteOffset }: View, length: number): Slice {
  if (onDevice(data)) {
    if (bench.backend.adopt) return { block: bench.backend.adopt(data), byteOffset };
    throw new TypeError(
      `apply: ${name} lies on a device, and the backend is ${bench.backend.name}: pass webgpu: { device }`,
    );
  }
  const place = bench.reserve(name, 4 * length);
  bench.backend.upload(place, data.subarray(byteOffset, byteOffset + 4 * length));
  return place;
}

/** f32 arrays in the backend, with what is to be multiplied by them. */
type Factor = Pick<ExpandJob, "basis" | "dtype" | "rows" | "width">;

/** Terms between components: y += ((x·E_Aᵀ)·α_Aᵀ·α_B)·E_B, the products with components once for all tasks. */
function applyColumns(
  bench: Workbench,
  module: PackModule,
  runs: readonly Run[],
  x: Slice,
  y: Slice,
  count: number,
): void {
  const pieces = runs.map(({ plan }) =>
    (plan?.core ? plan.A.shared : []).map((a, i): [Expansion, Expansion] => [a, plan!.Bt.shared[i]!]),
  );
  const most = Math.max(...pieces.map(({ length }) => length));
  if (most === 0) return;
  const { backend } = bench;
  const { A, B } = sharedBases(module)!;
  const [KA, KB] = [A.tensor.rows, B.tensor.rows];
  const ranks = Math.max(...pieces.flat().map(([{ rows }]) => rows));
  const onA = bench.reserve("onA", 4 * count * KA);
  const inner = bench.reserve("inner", 4 * count * ranks);
  const onB = bench.reserve("onB", 4 * count * KB);
  const { block } = bench.reserved("applied");
  const factor = (run: Run, piece: Expansion | undefined, width: number): Factor => {
    // No rows make zeros, for rows of the batch without a task.
    return { basis: at(block, piece && 4 * (run.start + piece.at)), dtype: "f32", rows: piece?.rows ?? 0, width };
  };
  backend.project({ out: onA, x, ...bench.components(A), count });
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
  backend.expand({ out: y, coefficients: onB, ...bench.components(B), rank: count, add: true });
}

/** Terms of factors: private ones, and where no core lies between components all rows, expanded: y += (x·Aᵀ)·Bt. */
function applyFactors(bench: Workbench, { in: inputs, out }: PackModule, run: Run, x: Slice, y: Slice): void {
  const { backend } = bench;
  const { block } = bench.reserved("applied");
  const staged = (first: number): Slice => at(block, 4 * (run.start + first));
  const add = (A: Slice, Bt: Slice, rank: number): void => {
    const between = bench.reserve("inner", 4 * run.count * rank);
    const of = { dtype: "f32", rows: rank } as const;
    const [rowsOfX, rowsOfY] = [after(x, 4 * run.row * inputs), after(y, 4 * run.row * out)];
    backend.project({ out: between, x: rowsOfX, basis: A, ...of, count: run.count, width: inputs });
    backend.expand({ out: rowsOfY, coefficients: between, basis: Bt, ...of, rank: run.count, width: out, add: true });
  };
  const { A, Bt, core, rank } = run.plan!;
  if (core) {
    for (const [i, { at: a, rank }] of A.private.entries()) add(staged(a), staged(Bt.private[i]!.at), rank);
    return;
  }
  const factors = bench.reserve("factors", 4 * rank * (inputs + out));
  const second = after(factors, 4 * rank * inputs);
  atOnce(bench.fill(A, staged(0), factors, inputs));
  atOnce(bench.fill(Bt, staged(0), second, out));
  add(factors, second, rank);
}

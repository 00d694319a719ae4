/**
 * The unfolded term where a model runs its layers by hand: y += x·ΔWᵀ for a batch, of one task or of one per row. Nothing is
 * made that is larger than the batch: x goes through the components, the task's coefficients and the other side's components.
 * Loaded when it is used.
 */
import { checkArgument } from "../arguments.ts";
import type { Slice } from "../backends/backend.ts";
import { onDevice, type View } from "../base/host.ts";
import type { PackModule } from "../format/format.ts";
import type { Pack } from "../pack/pack.ts";
import { loadParts, refuseMagnitudes, type Selection } from "./selection.ts";
import { type ActiveTask, type Expansion, type ModulePlan, Staging, stage } from "./stage.ts";
import { at, type Workbench } from "./workbench.ts";

/** Rows of the batch that one task works on. */
interface Run {
  /** What the task does to the module; undefined where it leaves it alone. */
  plan: ModulePlan | undefined;
  /** First value of its coefficients in the uploaded ones. */
  start: number;
  /** First row of vectors, and how many. */
  row: number;
  count: number;
}

/** Coefficients of the tasks of a batch, as the backend has them. Kept for the next layer, which usually asks for the same. */
export interface Applied {
  parts: readonly (readonly ActiveTask[])[];
  plans: readonly ReadonlyMap<number, ModulePlan>[];
  starts: readonly number[];
}

/** @throws TaskError for an unknown task, or one with DoRA on the module, which is no addition */
export async function partsOfRows(pack: Pack, rows: readonly Selection[], index: number): Promise<ActiveTask[][]> {
  checkArgument("apply: tasks", rows, "a list of one task per row", "map");
  const known = new Map<Selection, ActiveTask[]>();
  for (const row of rows)
    if (!known.has(row)) known.set(row, await loadParts(pack, row, undefined, undefined, new Set()));
  const parts = rows.map((row) => known.get(row)!);
  refuseMagnitudes(parts.flat(), pack, (module) => module === index, 'it is no addition to x·Wᵀ; use mode "folded"');
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
    if (view.shape.length >= 2 && view.shape.at(-1) === width) continue;
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
    a.every(({ blob, strength }, i) => blob.bytes === b[i]!.blob.bytes && strength === b[i]!.strength)
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

/** Terms between components: y += ((x·E_Aᵀ)·α_Aᵀ·α_B)·E_B, the products with components once for all tasks. */
function applyColumns(
  bench: Workbench,
  { A, B, in: inputs, out }: PackModule,
  runs: readonly Run[],
  x: Slice,
  y: Slice,
  count: number,
): void {
  const pieces = runs.map(({ plan }) => {
    const all = (plan?.A.shared ?? []).map((a, i): [Expansion, Expansion] => [a, plan!.B.shared[i]!]);
    return all.filter(([a]) => a.basis.kind === "column");
  });
  const most = Math.max(...pieces.map(({ length }) => length));
  if (most === 0 || !A || !B) return;
  const { backend } = bench;
  const [KA, KB] = [A.tensor.rows, B.tensor.rows];
  const ranks = Math.max(...pieces.flat().map(([{ rows }]) => rows));
  const onA = bench.reserve("onA", 4 * count * KA);
  const inner = bench.reserve("inner", 4 * count * ranks);
  const onB = bench.reserve("onB", 4 * count * KB);
  const applied = bench.reserve("applied", 0).block;
  const coefficients = (run: Run, { at: first }: Expansion): Slice => at(applied, 4 * (run.start + first));
  backend.project({ out: onA, x, basis: bench.basis(A), dtype: A.tensor.dtype, count, rows: KA, width: inputs });
  // Piece by piece, so that a device does each step for all rows at once.
  for (let piece = 0; piece < most; piece++) {
    for (const [i, run] of runs.entries()) {
      const [a] = pieces[i]![piece] ?? [];
      if (!a) continue;
      const of = { count: run.count, rows: a.rows, width: KA };
      backend.project({
        out: after(inner, 4 * run.row * ranks),
        x: after(onA, 4 * run.row * KA),
        basis: coefficients(run, a),
        dtype: "f32",
        ...of,
      });
    }
    for (const [i, run] of runs.entries()) {
      const [a, b] = pieces[i]![piece] ?? [];
      if (!a && piece > 0) continue;
      // No rows make zeros, for rows of the batch without a task.
      const of = { rank: run.count, rows: a?.rows ?? 0, width: KB, add: piece > 0 };
      const basis = b ? coefficients(run, b) : at(applied);
      backend.expand({
        out: after(onB, 4 * run.row * KB),
        coefficients: after(inner, 4 * run.row * ranks),
        basis,
        dtype: "f32",
        ...of,
      });
    }
  }
  backend.expand({
    out: y,
    add: true,
    coefficients: onB,
    basis: bench.basis(B),
    dtype: B.tensor.dtype,
    rank: count,
    rows: KB,
    width: out,
  });
}

/** Terms of factors, the task's own and flat ones: y += (x·Aᵀ)·B. */
function applyFactors(bench: Workbench, { in: inputs, out }: PackModule, run: Run, x: Slice, y: Slice): void {
  const { backend } = bench;
  const applied = bench.reserve("applied", 0).block;
  const [rowsOfX, rowsOfY] = [after(x, 4 * run.row * inputs), after(y, 4 * run.row * out)];
  const add = (A: Slice, B: Slice, rank: number, between: Slice): void => {
    backend.project({ out: between, x: rowsOfX, basis: A, dtype: "f32", count: run.count, rows: rank, width: inputs });
    backend.expand({
      out: rowsOfY,
      add: true,
      coefficients: between,
      basis: B,
      dtype: "f32",
      rank: run.count,
      rows: rank,
      width: out,
    });
  };
  run.plan!.A.private.forEach(({ at: a, q }, i) => {
    const b = run.plan!.B.private[i]!.at;
    add(
      at(applied, 4 * (run.start + a)),
      at(applied, 4 * (run.start + b)),
      q,
      bench.reserve("inner", 4 * run.count * q),
    );
  });
  run.plan!.A.shared.forEach((a, i) => {
    if (a.basis.kind === "column") return;
    const b = run.plan!.B.shared[i]!;
    const rank = a.basis.rank!;
    const factors = bench.reserve("factors", 4 * rank * (inputs + out)).block;
    for (const [piece, start] of [
      [a, 0],
      [b, 4 * rank * inputs],
    ] as const) {
      const { dtype, rows, width } = piece.basis.tensor;
      const coefficients = at(applied, 4 * (run.start + piece.at));
      backend.expand({
        out: at(factors, start),
        coefficients,
        basis: bench.basis(piece.basis),
        dtype,
        rank: 1,
        rows,
        width,
      });
    }
    add(at(factors), at(factors, 4 * rank * inputs), rank, bench.reserve("inner", 4 * run.count * rank));
  });
}

function after({ block, byteOffset }: Slice, bytes: number): Slice {
  return { block, byteOffset: byteOffset + bytes };
}

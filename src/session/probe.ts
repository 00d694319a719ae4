/**
 * The parity probe: a tiny run of a made-up task right after a session is made. The term that the first adapted layer got
 * is held against plain arithmetic on what entered that layer; where it is out of reach, the outputs against the base's.
 * Some providers take our inputs and ignore them without a word; better to know before the first answer.
 */
import { BackendError } from "../errors.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { GraftModule, ProbeOutputs, TaskInput } from "../onnx/graft.ts";
import type { InputValue } from "./values.ts";

/** What the probe found out. */
export interface ProbeReport {
  /** "passed", or why nothing could be compared. */
  readonly result: string;
  /** Module whose term was compared, and the largest difference relative to the largest value. */
  readonly module?: string;
  readonly difference?: number;
}

/** Runs the model on one task, or on one per row; gives the values of `fetches` as f32. */
export type ProbeRun = (
  feeds: ReadonlyMap<string, Feed>,
  tasks: readonly ReadonlyMap<string, InputValue>[],
  fetches: readonly string[],
) => Promise<readonly (readonly number[] | Float32Array)[]>;

/** How far a provider that computes in f16 may be off. */
const TOLERANCE = 2e-2;

/**
 * @param base values of the inputs without a task
 * @param outputs of the model itself
 * @throws BackendError when the provider ignores the inputs or computes something else
 */
export async function probeParity(
  run: ProbeRun,
  feeds: Map<string, Feed> | undefined,
  base: ReadonlyMap<string, InputValue>,
  inputs: readonly TaskInput[],
  modules: readonly GraftModule[],
  probe: ProbeOutputs | undefined,
  outputs: readonly string[],
  provider: string,
): Promise<ProbeReport> {
  if (!feeds) return { result: "skipped: the model's inputs are of kinds that cannot be made up; pass `probe: feeds`" };
  if (!probe && modules.length === 0) return { result: "skipped: no layer is adapted in the graph" };
  const task = madeUp(base, inputs);
  const fail = (what: string): never => {
    throw new BackendError(`the provider ${provider} ${what}: results would be silently wrong. Use another provider`, {
      backend: provider,
    });
  };
  const fetches = probe ? [probe.x, probe.term] : [outputs[0]!];
  let after: Awaited<ReturnType<ProbeRun>>;
  try {
    after = await run(feeds, [task], fetches);
  } catch (cause) {
    return {
      result: `skipped: the model does not run on the inputs of the probe (${(cause as Error).message.trim()}); pass \`probe: feeds\``,
    };
  }
  if (!probe) {
    const before = await run(feeds, [base], fetches);
    if (same(before[0]!, after[0]!)) fail(`gives the same "${outputs[0]}" with and without a task`);
    return { result: "passed" };
  }
  const module = modules.find(({ name }) => name === probe.module)!;
  const expected = termOf(module, after[0]!, inputs, task);
  const largest = expected.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  if (!(largest > 0))
    return { result: `skipped: nothing enters "${probe.module}" on made-up inputs; pass \`probe: feeds\`` };
  const difference = expected.reduce((m, v, i) => Math.max(m, Math.abs(v - after[1]![i]!)), 0) / largest;
  // Not ≤: NaN must fail.
  if (!(difference < TOLERANCE)) {
    fail(
      `is off by ${difference.toPrecision(2)} of the largest value in the term of "${probe.module}" (it may ignore inputs)`,
    );
  }
  return { result: "passed", module: probe.module, difference };
}

/**
 * Whether a task per row reaches the rows it is meant for: of two equal rows one gets a made-up task and one none, and each
 * must give what it gives alone. Where another dimension than the batch comes first, tasks would be mixed without a word.
 * @param output of the model, batch first
 * @throws BackendError when they are mixed
 */
export async function probeRows(
  run: ProbeRun,
  feeds: ReadonlyMap<string, Feed>,
  base: ReadonlyMap<string, InputValue>,
  inputs: readonly TaskInput[],
  output: string,
): Promise<void> {
  const task = madeUp(base, inputs);
  const found: ArrayLike<number>[] = [];
  try {
    for (const tasks of [[task], [base], [task, base]]) found.push((await run(feeds, tasks, [output]))[0]!);
  } catch {
    // Feeds that were made up prove nothing: the caller's own run will say what is wrong with it.
    return;
  }
  const [alone, without, both] = found as [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>];
  let [effect, off] = [0, 0];
  for (let i = 0; i < both.length; i++) {
    effect = Math.max(effect, Math.abs(alone[i]! - without[i]!));
    off = Math.max(off, Math.abs(both[i]! - (2 * i < both.length ? alone : without)[i]!));
  }
  // Rows of quantised models influence each other a little, whatever their tasks.
  if (effect === 0 || off < effect / 4) return;
  const message = `one task per row: tasks get into each other's rows of "${output}", so the batch is not the first dimension of some adapted layer; run them one by one`;
  throw new BackendError(message, { backend: "onnxruntime" });
}

/** Small values that differ everywhere, where the base has zeros. */
function madeUp(base: ReadonlyMap<string, InputValue>, inputs: readonly TaskInput[]): Map<string, InputValue> {
  const values = new Map(base);
  for (const { name, kind } of inputs) {
    if (kind !== "core" && kind !== "A" && kind !== "B") continue;
    const { dims, data } = base.get(name)!;
    values.set(name, { dims, data: Float32Array.from({ length: data.length }, (_, i) => 0.1 * Math.sin(1 + 1.7 * i)) });
  }
  return values;
}

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x. */
function termOf(
  { name, in: width, out, components, factors }: GraftModule,
  x: ArrayLike<number>,
  inputs: readonly TaskInput[],
  values: ReadonlyMap<string, InputValue>,
): Float64Array {
  const rows = x.length / width;
  const value = (kind: string): { data: ArrayLike<number>; columns: number } => {
    const { data, dims } = values.get(inputs.find((input) => input.of === name && input.kind === kind)!.name)!;
    return { data: data as Float32Array, columns: dims[1]! };
  };
  const term = new Float64Array(rows * out);
  if (factors) {
    const [A, B] = [value("A"), value("B")];
    multiply(multiply(x, A.data, rows, width, A.columns), B.data, rows, A.columns, out).forEach(
      (v, i) => (term[i] = v),
    );
  }
  if (!components) return term;
  const { At, B: E, KA, KB } = components;
  const mixed = multiply(multiply(x, At, rows, width, KA), value("core").data, rows, KA, KB);
  multiply(mixed, E, rows, KB, out).forEach((v, i) => (term[i]! += v));
  return term;
}

function multiply(
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  rows: number,
  inner: number,
  columns: number,
): Float64Array {
  const out = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    for (let k = 0; k < inner; k++) {
      for (let c = 0; c < columns; c++) out[r * columns + c]! += a[r * inner + k]! * b[k * columns + c]!;
    }
  }
  return out;
}

function same(a: ArrayLike<number>, b: ArrayLike<number>): boolean {
  return a.length === b.length && Array.prototype.every.call(a, (v: number, i: number) => v === b[i]);
}

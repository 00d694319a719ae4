/**
 * The parity probe: a tiny run of a made-up task right after a model is loaded. The term of the first adapted linear layer is compared with
 * plain arithmetic on what enters that layer. The first layer of each other kind must change the outputs, and so must a task where no
 * term is within reach. Some providers ignore our inputs without a word; better to know before the first answer.
 */
import { BackendError } from "../errors.ts";
import type { TaskInput } from "../onnx/inject.ts";
import type { AdaptedLayer } from "../onnx/linear.ts";
import type { DetachedModel } from "../onnx/write.ts";
import { transpose } from "../tensor/tensor-file.ts";
import { dataOf, type Engine, type LoadedModel, type LoadOptions, type Tensors, toTensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { CoreSpace, type InputValue, type InputValues, toFeeds } from "./values.ts";

export interface SessionParts {
  readonly engine: Engine;
  readonly prepared: PreparedModel;
  readonly detached: DetachedModel;
  readonly load: LoadOptions;
  /** Feeds of the caller's own for the probe, or whether there is to be one. Default: true. */
  readonly probe: boolean | object | undefined;
  /** Inputs that are the same in every run that does not learn. */
  readonly idle: Tensors;
}

/** The result of the probe. */
export interface ProbeReport {
  /** "passed", or why nothing could be compared. */
  readonly result: string;
  /** Module whose term was compared, and the largest difference relative to the largest value. */
  readonly module?: string;
  readonly difference?: number;
}

/** Runs the model on one task, and on more feeds; gives the values of `fetches`, f32. */
type ProbeRun = (task: InputValues, fetches: readonly string[], more?: Tensors) => Promise<readonly Float32Array[]>;

/** Largest difference of a provider that computes in f16, or rounds inputs to 8 bits: where these are uneven, by some hundredths. */
const TOLERANCE = 0.1;

/**
 * @param base values of the task inputs without a task
 * @throws BackendError when the provider ignores the inputs or computes something else
 */
export async function probeParity(parts: SessionParts, model: LoadedModel, base: InputValues): Promise<ProbeReport> {
  const { prepared } = parts;
  const { modules, inputs, forms, probe } = prepared;
  if (parts.probe !== false && modules.length + forms.size === 0)
    return { result: "skipped: no layer is adapted in the graph" };
  return withFeeds(parts, model, async (run) => {
    const linear = probe && (await compareTerm(parts, base, run));
    const others = new Map([...forms].reverse().map(([module, form]) => [form, module]));
    for (const module of others.values()) {
      const its = inputs.filter(({ of, cores }) => of === module || cores?.some((block) => block.module === module));
      await compareOutputs(parts, `whether a task changes "${module}" or not`, [
        (fetches) => run(madeUpTask(base, its), fetches),
        (fetches) => run(base, fetches),
      ]);
    }
    if (linear || others.size > 0) return linear ?? { result: "passed" };
    return compareOutputs(parts, "with and without a task", [
      (fetches) => run(madeUpTask(base, inputs), fetches),
      (fetches) => run(base, fetches),
    ]);
  });
}

/** Compares the term of the first adapted linear layer with plain arithmetic. */
async function compareTerm({ engine, prepared }: SessionParts, base: InputValues, run: ProbeRun): Promise<ProbeReport> {
  const { modules, inputs, probe } = prepared;
  const { module } = probe!;
  const task = madeUpTask(base, inputs);
  const [x, term] = (await run(task, [probe!.x, probe!.term])) as [Float32Array, Float32Array];
  const expected = termOf(modules.find(({ name }) => name === module)!, x, inputs, task);
  const largest = expected.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
  if (!(largest > 0)) return { result: `skipped: nothing enters "${module}" on made-up inputs; pass \`probe: feeds\`` };
  const difference = expected.reduce((most, v, i) => Math.max(most, Math.abs(v - term[i]!)), 0) / largest;
  // Not ≤: NaN must fail.
  if (difference < TOLERANCE) return { result: "passed", module, difference };
  const off = `is off by ${difference.toPrecision(2)} of the largest value in the term of "${module}"`;
  throw wrong(engine, `${off} (it may ignore inputs)`);
}

/**
 * Runs a probe on feeds of the caller's own or made-up ones.
 * @param look compares results of the model
 */
export async function withFeeds(
  { engine, prepared, probe, idle }: SessionParts,
  model: LoadedModel,
  look: (run: ProbeRun) => Promise<ProbeReport>,
): Promise<ProbeReport> {
  if (probe === false) return { result: "skipped: asked not to" };
  const own = typeof probe === "object" ? probe : prepared.feeds && toTensors(engine, prepared.feeds);
  if (!own) return { result: "skipped: the model's inputs are of kinds that cannot be made up; pass `probe: feeds`" };
  let failure: unknown;
  const run: ProbeRun = async (task, fetches, more) => {
    const { feeds } = toFeeds(engine, prepared.inputs, [task]);
    try {
      const results = await engine.run(model, { ...idle, ...own, ...more, ...feeds }, fetches);
      return await Promise.all(fetches.map(async (name) => (await dataOf(results[name]!)) as Float32Array));
    } catch (cause) {
      failure = cause;
      throw cause;
    }
  };
  try {
    return await look(run);
  } catch (cause) {
    if (cause !== failure) throw cause;
    const why = (cause as Error).message.trim();
    return { result: `skipped: the model does not run on the inputs of the probe (${why}); pass \`probe: feeds\`` };
  }
}

/**
 * Compares the first output of two runs that must not be the same.
 * @param when the output would be the same, for the message
 * @throws BackendError when it is
 */
export async function compareOutputs(
  { engine, prepared }: SessionParts,
  when: string,
  runs: readonly ((fetches: readonly string[]) => Promise<readonly Float32Array[]>)[],
): Promise<ProbeReport> {
  const [output] = prepared.outputNames as [string];
  const [first, second] = (await Promise.all(runs.map(async (run) => (await run([output]))[0]))) as [
    Float32Array,
    Float32Array,
  ];
  if (first.length !== second.length || first.some((value, i) => value !== second[i])) return { result: "passed" };
  throw wrong(engine, `gives the same "${output}" ${when}`);
}

function wrong({ provider }: Engine, what: string): BackendError {
  const advice = 'Use another provider; on WebGPU the module "onnxruntime-web/webgpu", or mode "core"';
  return new BackendError(`the provider ${provider} ${what}: results would be silently wrong. ${advice}`, {
    backend: provider,
  });
}

/** Small values that differ everywhere, where the base has zeros. */
function madeUpTask(base: InputValues, inputs: readonly TaskInput[]): Map<string, InputValue> {
  const values = new Map(base);
  for (const input of inputs) {
    const { name, kind } = input;
    if (kind === "core") values.set(name, madeUpCores(input));
    if (kind !== "A" && kind !== "B" && kind !== "bias") continue;
    const { dims, data } = base.get(name)!;
    values.set(name, { dims, data: waves(data.length) });
  }
  return values;
}

/** The value of an input for cores of a made-up task. */
export function madeUpCores(input: TaskInput, size?: number): InputValue {
  const space = new CoreSpace(input);
  for (const [i, { KA, KB }] of (input.cores ?? []).entries()) {
    const core = waves(KA * KB, size);
    const { out, at, stride } = space.targets[i]![1];
    for (let a = 0; a < KA; a++) out.set(core.subarray(a * KB, (a + 1) * KB), at + a * stride);
  }
  return space.value(() => true);
}

function waves(length: number, size = 0.1): Float32Array {
  return Float32Array.from({ length }, (_, i) => size * Math.sin(1 + 1.7 * i));
}

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x: the term of an adapted layer by plain arithmetic. */
function termOf(
  { name, in: width, out, components, factors, over = {} }: AdaptedLayer,
  x: ArrayLike<number>,
  inputs: readonly TaskInput[],
  values: InputValues,
): Float64Array {
  const rows = x.length / width;
  const value = (kind: "A" | "B"): { data: ArrayLike<number>; columns: number } => {
    const input = inputs.find((one) => one.of === name && one.kind === kind)!;
    const { data, dims } = values.get(input.name)!;
    const columns = dims[1]!;
    // The graph's components are without scales where these are in the input.
    const scales = input.over?.scales;
    const scaleAt = (i: number): number => scales?.[kind === "A" ? Math.floor(i / columns) : i % columns] ?? 1;
    return { data: Float64Array.from(data as Float32Array, (number, i) => number / scaleAt(i)), columns };
  };
  let term = new Float64Array(rows * out);
  if (factors) {
    const [A, B] = [value("A"), value("B")];
    const [KA, KB] = [over.A?.rows ?? width, over.B?.rows ?? out];
    const read = over.A ? multiply(x, transpose(over.A.floats(), KA, width), rows, width, KA) : x;
    const product = multiply(multiply(read, A.data, rows, KA, A.columns), B.data, rows, A.columns, KB);
    term = over.B ? multiply(product, over.B.floats(), rows, KB, out) : product;
  }
  if (!components) return term;
  const [KA, KB] = [components.A.rows, components.B.rows];
  const projected = multiply(x, transpose(components.A.floats(), KA, width), rows, width, KA);
  const mixed = multiply(projected, waves(KA * KB), rows, KA, KB);
  multiply(mixed, components.B.floats(), rows, KB, out).forEach((v, i) => (term[i]! += v));
  return term;
}

function multiply(
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  rows: number,
  inner: number,
  columns: number,
): Float64Array<ArrayBuffer> {
  const out = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++)
    for (let k = 0; k < inner; k++)
      for (let c = 0; c < columns; c++) out[r * columns + c]! += a[r * inner + k]! * b[k * columns + c]!;
  return out;
}

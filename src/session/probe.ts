/**
 * The parity probe: a tiny run of a made-up task right after a model is loaded. The term that the first adapted layer got
 * is held against plain arithmetic on what entered that layer; where it is out of reach, the outputs against the base's.
 * Some providers take our inputs and ignore them without a word; better to know before the first answer.
 */
import { BackendError } from "../errors.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { CoreBlock, ProbeOutputs, TaskInput } from "../onnx/graft.ts";
import { transpose } from "../tensor/transpose.ts";
import { type CarrierParts, type ProbeReport, toFeeds } from "./carrier.ts";
import { dataOf, type Engine, type LoadedModel, type Tensors } from "./engine.ts";
import type { AdaptedLayer } from "./prepare.ts";
import { coreOf, type InputValue } from "./values.ts";

type Inputs = ReadonlyMap<string, InputValue>;

/** Runs the model on one task, or on one per row, and on more feeds; gives the values of `fetches` as f32. */
export type ProbeRun = (
  tasks: readonly Inputs[],
  fetches: readonly string[],
  more?: Tensors,
) => Promise<readonly Float32Array[]>;

/** How far a provider that computes in f16 may be off. */
const TOLERANCE = 2e-2;

/** @param feeds of the model's own inputs, as tensors */
export function probeRun(engine: Engine, inputs: readonly TaskInput[], model: LoadedModel, feeds: object): ProbeRun {
  return async (tasks, fetches, more) => {
    const task = toFeeds(
      engine,
      inputs,
      tasks.map((values) => ({ inputs: values })),
    ).feeds;
    const results = await engine.run(model, { ...feeds, ...more, ...task }, fetches);
    return Promise.all(fetches.map(async (name) => (await dataOf(results[name]!)) as Float32Array));
  };
}

/** Made-up feeds as tensors. */
export function toTensors(engine: Engine, feeds: ReadonlyMap<string, Feed>): Tensors {
  return Object.fromEntries([...feeds].map(([name, { data, dims }]) => [name, engine.tensor(data, dims)]));
}

/**
 * Does what a probe does on feeds of the caller's own or made-up ones.
 * @param look compares what the model gives; undefined where it is not to be compared
 */
export async function withFeeds(
  { engine, prepared, probe, idle }: CarrierParts,
  model: LoadedModel,
  look: (run: ProbeRun) => Promise<ProbeReport>,
): Promise<ProbeReport> {
  if (probe === false) return { result: "skipped: asked not to" };
  const made = typeof probe === "object" ? probe : prepared.feeds && toTensors(engine, prepared.feeds);
  if (!made) {
    return { result: "skipped: the model's inputs are of kinds that cannot be made up; pass `probe: feeds`" };
  }
  let failure: unknown;
  const run = probeRun(engine, prepared.inputs, model, { ...idle, ...made });
  const noting: ProbeRun = (...of) => run(...of).catch((cause) => Promise.reject((failure = cause)));
  try {
    return await look(noting);
  } catch (cause) {
    if (cause !== failure) throw cause;
    const why = (cause as Error).message.trim();
    return { result: `skipped: the model does not run on the inputs of the probe (${why}); pass \`probe: feeds\`` };
  }
}

/**
 * @param base values of the task inputs without a task
 * @throws BackendError when the provider ignores the inputs or computes something else
 */
export async function probeParity(parts: CarrierParts, model: LoadedModel, base: Inputs): Promise<ProbeReport> {
  const { engine, prepared } = parts;
  const { modules, inputs, probe, outputNames } = prepared;
  if (parts.probe !== false && !probe && modules.length === 0) {
    return { result: "skipped: no layer is adapted in the graph" };
  }
  return withFeeds(parts, model, async (run) => {
    const task = madeUp(base, inputs);
    if (probe) return compareTerm(probe, prepared, task, await run([task], [probe.x, probe.term]), engine);
    const [output] = outputNames as [string];
    const [[after], [before]] = [await run([task], [output]), await run([base], [output])];
    if (same(before!, after!)) throw wrong(engine, `gives the same "${output}" with and without a task`);
    return { result: "passed" };
  });
}

function compareTerm(
  probe: ProbeOutputs,
  { modules, inputs }: CarrierParts["prepared"],
  task: Inputs,
  [x, term]: readonly Float32Array[],
  engine: Engine,
): ProbeReport {
  const module = modules.find(({ name }) => name === probe.module)!;
  const expected = termOf(module, x!, inputs, task);
  const largest = expected.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  if (!(largest > 0)) {
    return { result: `skipped: nothing enters "${probe.module}" on made-up inputs; pass \`probe: feeds\`` };
  }
  const difference = expected.reduce((m, v, i) => Math.max(m, Math.abs(v - term![i]!)), 0) / largest;
  // Not ≤: NaN must fail.
  if (difference < TOLERANCE) return { result: "passed", module: probe.module, difference };
  const off = `is off by ${difference.toPrecision(2)} of the largest value in the term of "${probe.module}"`;
  throw wrong(engine, `${off} (it may ignore inputs)`);
}

function wrong({ provider }: Engine, what: string): BackendError {
  const message = `the provider ${provider} ${what}: results would be silently wrong. Use another provider`;
  return new BackendError(message, { backend: provider });
}

/** Small values that differ everywhere, where the base has zeros. */
function madeUp(base: Inputs, inputs: readonly TaskInput[]): Map<string, InputValue> {
  const values = new Map(base);
  for (const input of inputs) {
    const { name, kind } = input;
    if (kind === "core") values.set(name, coreOf(input, madeUpCore));
    if (kind !== "A" && kind !== "B") continue;
    const { dims, data } = base.get(name)!;
    values.set(name, { dims, data: waves(data.length) });
  }
  return values;
}

/** A core of a task that there is not. */
export function madeUpCore({ KA, KB }: CoreBlock): Float32Array {
  return waves(KA * KB);
}

function waves(length: number): Float32Array {
  return Float32Array.from({ length }, (_, i) => 0.1 * Math.sin(1 + 1.7 * i));
}

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x. */
function termOf(
  { name, in: width, out, components, factors }: AdaptedLayer,
  x: Float32Array,
  inputs: readonly TaskInput[],
  values: Inputs,
): Float64Array {
  const rows = x.length / width;
  const value = (kind: string): { data: ArrayLike<number>; columns: number } => {
    const { data, dims } = values.get(inputs.find((input) => input.of === name && input.kind === kind)!.name)!;
    return { data: data as Float32Array, columns: dims[1]! };
  };
  let term = new Float64Array(rows * out);
  if (factors) {
    const [A, B] = [value("A"), value("B")];
    term = multiply(multiply(x, A.data, rows, width, A.columns), B.data, rows, A.columns, out);
  }
  if (!components) return term;
  const [KA, KB] = [components.A.rows, components.B.rows];
  const core = inputs.flatMap(({ cores = [] }) => cores.filter(({ module }) => module === name)).map(madeUpCore)[0]!;
  const projected = multiply(x, transpose(components.A.floats(), KA, width), rows, width, KA);
  const mixed = multiply(projected, core, rows, KA, KB);
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
  for (let r = 0; r < rows; r++) {
    for (let k = 0; k < inner; k++) {
      for (let c = 0; c < columns; c++) out[r * columns + c]! += a[r * inner + k]! * b[k * columns + c]!;
    }
  }
  return out;
}

function same(a: Float32Array, b: Float32Array): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}

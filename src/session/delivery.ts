/**
 * Delivery of tasks to a loaded model: for each selection the model and the feeds that make it that task's. Here by
 * extra inputs of one model, in modes "core" and "factors"; mode "folded" and inputs on a device are in device.ts,
 * which is loaded when it is needed.
 *
 * Some providers ignore our inputs without a word. So each model is probed once, by a tiny run of a synthetic task.
 */

import type { DeviceHandle } from "../backends/backend.ts";
import type { LoadedTasks, Selection } from "../core/selection.ts";
import { BackendError } from "../errors.ts";
import type { TaskInput } from "../onnx/inject.ts";
import type { AdaptedLayer, ComponentRows } from "../onnx/linear.ts";
import type { DetachedModel } from "../onnx/write.ts";
import { sum } from "../tensor/dtypes.ts";
import { transpose } from "../tensor/term.ts";
import type { CacheState } from "./caches.ts";
import { dataOf, type Engine, type LoadedModel, type LoadOptions, type Tensors, toTensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import {
  CoreSpace,
  type InputValue,
  type InputValues,
  isTerm,
  type TaskEvaluator,
  toFeeds,
  unfoldingEvaluator,
} from "./values.ts";

/** A prepared model and the engine that is to run it. */
export interface SessionParts {
  readonly engine: Engine;
  readonly prepared: PreparedModel;
  readonly detached: DetachedModel;
  readonly load: LoadOptions;
  /** The option of `SessionOptions`. */
  readonly probe: boolean | object | undefined;
  /** Inputs that are the same in every run that does not learn. */
  readonly idle: Tensors;
}

/** The model and feeds of runs while a selection is active. */
export interface Active {
  readonly task: Selection;
  readonly model: LoadedModel;
  readonly feeds: Tensors;
  /** Bytes of the feeds that a run carries from the CPU's memory. */
  readonly bytes: number;
  /** Bytes that the switch wrote to a device. Default: 0. */
  readonly written?: number | undefined;
  /** The state that caches of its runs belong to, where the model has caches. */
  readonly state?: CacheState | undefined;
  /** Called once nothing runs on it any more: another selection may use its memory. */
  readonly retire?: (() => void) | undefined;
}

export interface Delivery {
  readonly evaluator: TaskEvaluator;
  /** The base. */
  readonly first: Active;
  readonly probe: ProbeReport;
  readonly note?: string;
  /** Bytes of weights that each switch writes. */
  readonly bytesWritten: number;
  /** When it fails, the previous selection stays usable. */
  make(tasks: LoadedTasks, signal?: AbortSignal): Promise<Active>;
  /** Called before each run. @throws BackendError where a failed switch left weights that are no task's */
  check?(): void;
  /** Resident bytes: of the kernels, of pristine weights, and of weights that the model reads. */
  memory(): { readonly scratch: number; readonly pristine: number; readonly active: number };
  /** Frees all but the loaded model. */
  close(): Promise<void>;
}

/**
 * Puts the values of task inputs on the device that the engine computes on: written once a switch, they cost a run
 * nothing.
 */
export interface Placer {
  place(values: InputValues): Omit<Active, "task" | "model">;
  readonly byteLength: number;
  close(): void;
}

/**
 * Modes "core" and "factors": one loaded model with inputs for the active task.
 * @param placerOn makes a placer; undefined where the engine computes on no device
 * @throws BackendError when the engine refuses the model, or the probe finds that it computes something else
 */
export async function inputDelivery(
  parts: SessionParts,
  bases: Uint8Array,
  placerOn: ((engine: Engine, device: DeviceHandle, inputs: readonly TaskInput[]) => Placer) | undefined,
): Promise<Delivery> {
  const { engine, prepared } = parts;
  const { inputs } = prepared;
  const evaluator = await unfoldingEvaluator(prepared, bases);
  let model: LoadedModel | undefined;
  try {
    model = await engine.load(parts.detached, parts.load);
    // Not every engine tells which device it has. Where one does, runs fail once it is lost.
    const device = (await engine.gpu?.device().catch(() => undefined))?.device;
    const withoutTask = (await evaluator.read(null)).inputs;
    const probe = await probeParity(parts, model, withoutTask);
    const placer = device && placerOn?.(engine, device, inputs);
    return { ...deliver(engine, inputs, model, evaluator, withoutTask, placer), probe };
  } catch (error) {
    if (model) await engine.release(model);
    await evaluator.close();
    throw error;
  }
}

// Objects that stay are made by functions that know the little they need: a closure above would keep the prepared
// model, and its components.

function deliver(
  engine: Engine,
  inputs: PreparedModel["inputs"],
  model: LoadedModel,
  evaluator: TaskEvaluator,
  base: InputValues,
  placer: Placer | undefined,
): Omit<Delivery, "probe"> {
  const terms = inputs.filter(isTerm).map(({ name }) => name);
  const bytesOf = (values: InputValues): number => sum(terms, (name) => values.get(name)!.data.buffer.byteLength);
  // Cores and factors of a past selection, which the next one is written over: a switch makes no garbage.
  let spare: InputValues | undefined;
  // Their largest size so far: tasks differ in rank.
  let room = bytesOf(base);
  const active = (task: Selection, values: InputValues): Active => {
    const reuse = (): void => {
      spare = new Map(terms.map((name) => [name, values.get(name)!]));
      room = Math.max(room, bytesOf(spare));
    };
    if (!placer) return { model, task, ...toFeeds(engine, inputs, [values]), retire: reuse };
    const placed = placer.place(values);
    // They are on the device: the next selection may write over them at once.
    reuse();
    return { model, task, ...placed };
  };
  return {
    evaluator,
    first: active(null, base),
    bytesWritten: 0,
    async make(tasks, signal) {
      const old = spare;
      spare = undefined;
      return active(tasks.selection, (await evaluator.evaluate(tasks, signal, old)).inputs);
    },
    memory() {
      const { scratch, pristine } = evaluator.memory();
      return { scratch: scratch + room, pristine, active: placer?.byteLength ?? 0 };
    },
    async close() {
      placer?.close();
      await evaluator.close();
    },
  };
}

/** The result of the probe. */
export interface ProbeReport {
  /** "passed", or why nothing could be compared. */
  readonly result: string;
  /** Module whose term was compared, and the largest difference relative to the largest value. */
  readonly module?: string;
  readonly difference?: number;
}

/** Runs the model on one task, and on more feeds. @returns values of `fetches`, f32 */
type ProbeRun = (fetches: readonly string[], task: InputValues, more?: Tensors) => Promise<readonly Float32Array[]>;

/**
 * Largest difference of a provider that computes in f16, or rounds inputs to 8 bits: where these are uneven, by some
 * hundredths.
 */
const TOLERANCE = 0.1;

/**
 * Compares the term of the first adapted linear layer with plain arithmetic on what enters it. The first layer of each
 * other kind must change the outputs, and so must a task where no term is within reach.
 */
async function probeParity(parts: SessionParts, model: LoadedModel, base: InputValues): Promise<ProbeReport> {
  const { modules, inputs, forms, probe } = parts.prepared;
  if (parts.probe !== false && modules.length + forms.size === 0)
    return { result: "skipped: no layer is adapted in the graph" };
  return withFeeds(parts, model, async (run) => {
    const compare = (when: string, changed: readonly TaskInput[]): Promise<ProbeReport> =>
      compareOutputs(parts, run, when, [syntheticTask(base, changed)], [base]);
    const linear = probe && (await compareTerm(parts, base, run));
    const others = new Map([...forms].reverse().map(([module, form]) => [form, module]));
    for (const module of others.values())
      await compare(
        `whether a task changes "${module}" or not`,
        inputs.filter(({ of, cores }) => of === module || cores?.some((block) => block.module === module)),
      );
    if (linear || others.size > 0) return linear ?? { result: "passed" };
    // Another head would change the outputs whatever becomes of terms.
    const terms = inputs.filter(({ kind }) => !/^head/.test(kind));
    return compare("with and without a task", terms);
  });
}

async function compareTerm({ engine, prepared }: SessionParts, base: InputValues, run: ProbeRun): Promise<ProbeReport> {
  const { modules, inputs, probe } = prepared;
  const { module } = probe!;
  const task = syntheticTask(base, inputs);
  const [x, term] = (await run([probe!.x, probe!.term], task)) as [Float32Array, Float32Array];
  const expected = termOf(modules.find(({ name }) => name === module)!, x, inputs, task);
  const largest = expected.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
  if (!(largest > 0))
    return { result: `skipped: nothing enters "${module}" on synthetic inputs; pass \`probe: feeds\`` };
  const difference = expected.reduce((most, v, i) => Math.max(most, Math.abs(v - term[i]!)), 0) / largest;
  // Not ≤: NaN must fail.
  if (difference < TOLERANCE) return { result: "passed", module, difference };
  const off = `is off by ${difference.toPrecision(2)} of the largest value in the term of "${module}"`;
  throw wrong(engine, `${off} (it may ignore inputs)`);
}

/** Runs a probe on the caller's feeds or synthetic ones. */
export async function withFeeds(
  { engine, prepared, probe, idle }: SessionParts,
  model: LoadedModel,
  look: (run: ProbeRun) => Promise<ProbeReport>,
): Promise<ProbeReport> {
  if (probe === false) return { result: "skipped: asked not to" };
  const given = typeof probe === "object" ? probe : prepared.feeds && toTensors(engine, prepared.feeds);
  if (!given) return { result: "skipped: there are no synthetic values for the model's inputs; pass `probe: feeds`" };
  let failure: unknown;
  const run: ProbeRun = async (fetches, task, more) => {
    const { feeds } = toFeeds(engine, prepared.inputs, [task]);
    try {
      const results = await engine.run(model, { ...idle, ...given, ...more, ...feeds }, fetches);
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

/** A task, and more feeds. */
type Trial = readonly [task: InputValues, more?: Tensors];

/** @param when two runs would have the same first output, for the message @throws BackendError when they have */
export async function compareOutputs(
  { engine, prepared }: SessionParts,
  run: ProbeRun,
  when: string,
  ...trials: readonly [Trial, Trial]
): Promise<ProbeReport> {
  const [output] = prepared.outputNames as [string];
  const results = await Promise.all(trials.map(([task, more]) => run([output], task, more)));
  const [[first], [second]] = results as [[Float32Array], [Float32Array]];
  if (first.length !== second.length || first.some((value, i) => value !== second[i])) return { result: "passed" };
  throw wrong(engine, `gives the same "${output}" ${when}`);
}

function wrong({ provider }: Engine, what: string): BackendError {
  const advice = 'Use another provider; on WebGPU the module "onnxruntime-web/webgpu", or mode "core"';
  return new BackendError(`the provider ${provider} ${what}: results would be silently wrong. ${advice}`, {
    backend: provider,
  });
}

/**
 * Adds small values that differ everywhere to a task, in these inputs, except for rows of tables, which meet the
 * model's own input.
 */
export function syntheticTask(base: InputValues, inputs: readonly TaskInput[], size = 0.1): InputValues {
  const values = new Map(base);
  for (const input of inputs) {
    const { name, kind } = input;
    const { dims, data } = base.get(name)!;
    if (kind === "core") values.set(name, syntheticCores(input, size));
    else if (kind !== "rows" && data instanceof Float32Array)
      values.set(name, { dims, data: data.map((value, i) => value + wave(i, size)) });
  }
  return values;
}

function syntheticCores(input: TaskInput, size: number): InputValue {
  const space = new CoreSpace(input);
  for (const [i, { KA, KB }] of input.cores!.entries()) {
    const { out, at, stride } = space.targets[i]![1];
    for (let a = 0; a < KA; a++) for (let b = 0; b < KB; b++) out[at + a * stride + b] = wave(a * KB + b, size);
  }
  return space.value(() => true);
}

const wave = (i: number, size = 0.1): number => size * Math.sin(1 + 1.7 * i);

/** A matrix of a known number of columns, row-major. */
interface Matrix {
  readonly data: ArrayLike<number>;
  readonly columns: number;
}

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x: the term of an adapted layer by plain arithmetic. */
function termOf(
  { name, in: width, out, components, factors, over = {} }: AdaptedLayer,
  x: ArrayLike<number>,
  inputs: readonly TaskInput[],
  values: InputValues,
): Float64Array {
  const down = ({ rows, floats }: ComponentRows): Matrix => ({ data: transpose(floats(), rows, width), columns: rows });
  const up = ({ floats }: ComponentRows): Matrix => ({ data: floats(), columns: out });
  const factor = (kind: "A" | "B"): Matrix => {
    const input = inputs.find((candidate) => candidate.of === name && candidate.kind === kind)!;
    const { data, dims } = values.get(input.name)!;
    const columns = dims[1]!;
    // The graph's components are without scales where these are in the input.
    const scales = input.over?.scales;
    const scaleAt = (i: number): number => scales?.[kind === "A" ? Math.floor(i / columns) : i % columns] ?? 1;
    return { data: Float64Array.from(data as Float32Array, (number, i) => number / scaleAt(i)), columns };
  };
  const product = (...matrices: readonly (Matrix | undefined)[]): ArrayLike<number> =>
    matrices.reduce<Matrix>((left, right) => (right ? multiply(left, right) : left), { data: x, columns: width }).data;
  const terms: ArrayLike<number>[] = [];
  if (factors) terms.push(product(over.A && down(over.A), factor("A"), factor("B"), over.B && up(over.B)));
  if (components) {
    const { A, B } = components;
    const core = { data: Float64Array.from({ length: A.rows * B.rows }, (_, i) => wave(i)), columns: B.rows };
    terms.push(product(down(A), core, up(B)));
  }
  return Float64Array.from(terms[0]!, (value, i) => value + (terms[1]?.[i] ?? 0));
}

function multiply(left: Matrix, { data, columns }: Matrix): Matrix {
  const inner = left.columns;
  const rows = left.data.length / inner;
  const product = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++)
    for (let k = 0; k < inner; k++)
      for (let c = 0; c < columns; c++) product[r * columns + c]! += left.data[r * inner + k]! * data[k * columns + c]!;
  return { data: product, columns };
}

/**
 * `eigenlora/onnxruntime`: a pack on a model that onnxruntime-web or onnxruntime-node runs. The module that runs it is the
 * caller's own import; types are structural, so that neither package is needed to compile against this one.
 */

import type { TrainingGraph } from "../src/autodiff/graph.ts";
import { BackendError, TaskError } from "../src/errors.ts";
import { tinyFeeds } from "../src/onnx/feeds.ts";
import { graft, type TaskInput } from "../src/onnx/graft.ts";
import { type ModelOptions, readModel } from "../src/onnx/read.ts";
import { detachWeights } from "../src/onnx/write.ts";
import type { Pack, TaskInfo } from "../src/pack/pack.ts";
import type { Selection } from "../src/runtime/selection.ts";
import { FOLDED_FILE, feedFolded, layoutFolded } from "../src/session/fold.ts";
import { type BaseValues, type Mode, type PlanOptions, planSession } from "../src/session/plan.ts";
import type { ProbeReport } from "../src/session/probe.ts";
import { Timeline } from "../src/session/timeline.ts";
import type { TaskValues } from "../src/session/values.ts";
import type { SourceInput } from "../src/source.ts";
import {
  call,
  type Feeds,
  type Fetches,
  inTurn,
  type Ort,
  type OrtTensor,
  onWebgpu,
  type Session,
  type SessionOptions,
} from "./ort.ts";
import { type Carrier, type Parts, type State, toFeeds } from "./ort-carrier.ts";
import { foldedCarrier } from "./ort-folded.ts";
import type { Trainable } from "./ort-training.ts";
import { unfoldedCarrier } from "./ort-unfolded.ts";

export type { Mode } from "../src/session/plan.ts";
export type { ProbeReport } from "../src/session/probe.ts";
export type { Ort, OrtSession, OrtTensor } from "./ort.ts";

export interface EigenSessionOptions<O extends Ort = Ort> extends ModelOptions, PlanOptions {
  /** Passed to `InferenceSession.create`: `executionProviders`, `graphOptimizationLevel`, … */
  session?: SessionOptions<O> | undefined;
  /**
   * A tiny run that shows whether the provider takes a task into account. `false` leaves them out; feeds of your own where
   * the model does not run on made-up ones.
   */
  probe?: boolean | Feeds<O> | undefined;
  /**
   * Whether `eigenlora/train` can train new tasks on it; in mode "factors" only. Loss and gradients lie in the same graph, which
   * takes longer to create, and costs a run a little.
   */
  trainable?: boolean | undefined;
  /** For `trainable`: the model's output that holds the logits; "logits", or the only one, unless given. */
  logits?: string | undefined;
}

export interface SessionSwitchOptions {
  signal?: AbortSignal | undefined;
  /** Whose saved modules (classifier) to use in a blend of tasks with different ones. */
  head?: string | undefined;
}

/** What a switch did and what it cost. */
export interface SessionSwitchReport {
  readonly task: Selection;
  /** Read from the pack for this switch. */
  readonly bytesRead: number;
  readonly requests: number;
  /** Bytes of the inputs that carry the task; mode "folded": of the weights that were written. */
  readonly bytesFed: number;
  readonly milliseconds: number;
}

export interface EigenRunOptions {
  /** One task id per row of the batch, or null for the base; instead of the active task. */
  tasks?: readonly (string | null)[] | undefined;
  /** Everything else goes to onnxruntime. */
  [option: string]: unknown;
}

/** Outputs by name. */
export type RunResult<O extends Ort> = Awaited<ReturnType<Session<O>["run"]>> & {
  /**
   * After a run with `tasks`: how many columns of each row of a head's result are the task's own, by module name of the
   * head. The columns behind them hold the lowest number, or 0 where the head has no bias. Not enumerable.
   */
  readonly validColumns?: ReadonlyMap<string, readonly number[]>;
};

/** Resident bytes beyond the runtime's own copy of the model, by owner. */
export interface SessionMemory {
  /** Components inside the runtime's model. */
  readonly components: number;
  /** Resident task blobs. */
  readonly coefficients: number;
  /** Inputs of the active task, and the base's heads and biases. */
  readonly active: number;
  /** Bases and scratch memory that expand coefficients; modes "factors" and "folded". */
  readonly expansion: number;
  /** What is folded from: the model's file, on WebGPU the weights on the device; mode "folded". */
  readonly pristine: number;
  /** The weights that the model reads; mode "folded" on WebGPU. */
  readonly folded: number;
  readonly total: number;
}

/**
 * Prepares a model for all tasks of a pack and loads it once.
 *
 * @param ort the module that is to run the model
 * @param model bytes, path, URL or Blob of the ONNX file; files beside it are found by path or URL, or given by `external`
 * @throws BaseMismatchError when modules are missing, ambiguous, of another shape or of another model; or when the mode
 *   asked for cannot do what the tasks bring: the message names one that can
 * @throws FormatError when the model is truncated, no ONNX model or of an opset before 11
 * @throws BackendError when onnxruntime refuses the model or the provider, or the probe finds the provider wrong
 * @example
 * const session = await createEigenSession(ort, "model.onnx", await openPack("tasks.eigen"));
 * await session.switchTask("debtags-role");
 * const { logits } = await session.run(feeds);
 */
export async function createEigenSession<O extends Ort>(
  ort: O,
  model: SourceInput,
  pack: Pack,
  options: EigenSessionOptions<O> = {},
): Promise<EigenSession<O>> {
  if (typeof ort?.InferenceSession?.create !== "function" || typeof ort.Tensor !== "function") {
    throw new TypeError(
      "createEigenSession: the first argument must be the module onnxruntime-web or onnxruntime-node",
    );
  }
  const { mode = "auto" } = options;
  if (!["auto", "core", "factors", "folded"].includes(mode)) throw new RangeError(`mode: got ${JSON.stringify(mode)}`);
  if (options.trainable && mode !== "auto" && mode !== "factors")
    throw new RangeError(`mode: tasks are learned in mode "factors", got ${JSON.stringify(mode)}`);
  const file = await readModel(model, options);
  const bases = await pack.bases(options);
  try {
    const plan = await planSession(
      file,
      pack,
      bases.bytes,
      options.trainable ? { ...options, mode: "factors" } : options,
    );
    const own = file.model.graph.proto.input.filter(({ name }) => !file.model.graph.initializers.has(name));
    const outputs = file.model.graph.proto.output.map(({ name }) => name);
    const folded = plan.mode === "folded";
    const fed = folded && onWebgpu(options.session) ? feedFolded(file.model, plan.folded) : undefined;
    const layout = folded && !fed ? layoutFolded(file.model, plan.folded) : undefined;
    const grafted = graft(file.model, plan.graft);
    const training = options.trainable
      ? await (await import("./ort-training.ts")).addTraining({ ort, options }, file, grafted)
      : undefined;
    const detached = await detachWeights(file, grafted.initializers, {
      ...options,
      supplied: layout ? [FOLDED_FILE] : [],
    });
    const inputs = own.map(({ name }) => name);
    const feeds = options.probe === false ? undefined : tinyFeeds(own);
    const given = training ? { ...options, session: training.session } : options;
    const parts: Parts<O> = {
      ort,
      pack,
      plan,
      grafted,
      detached,
      options: given,
      outputs,
      inputs,
      feeds,
      idle: training?.idle ?? {},
    };
    if (layout) return new EigenSession(parts, await foldedCarrier(parts, file, layout));
    if (fed) {
      const { gpuCarrier } = await import("./ort-gpu.ts");
      return new EigenSession(parts, await gpuCarrier(parts, file, fed));
    }
    await file.close();
    return new EigenSession(parts, await unfoldedCarrier(parts, bases.bytes), training?.graph);
  } catch (error) {
    await file.close();
    throw error;
  } finally {
    bases.close();
  }
}

/** A session of onnxruntime that switches tasks. Made by `createEigenSession`; has the shape of `InferenceSession`. */
export class EigenSession<O extends Ort = Ort> {
  readonly pack: Pack;
  /** How tasks reach the model, and why so. */
  readonly mode: Mode;
  readonly reason: string;
  /** The model's own inputs and outputs. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** What the parity probe found. */
  readonly probe: ProbeReport;
  /** For `createTrainer`; undefined unless the session was made with `trainable`. */
  readonly trainable: Trainable<O> | undefined;

  readonly #ort: O;
  readonly #base: BaseValues;
  readonly #inputs: readonly TaskInput[];
  /** Inputs that a run which does not learn has no use for. */
  readonly #idle: Parts<O>["idle"];
  readonly #carrier: Carrier<O>;
  readonly #timeline: Timeline<State<O>>;
  readonly #components: number;
  #state: State<O>;
  #released: Promise<void> | undefined;
  #rowsChecked: Promise<void> | undefined;

  /** Use `createEigenSession`. */
  constructor(parts: Parts<O>, carrier: Carrier<O>, graph?: TrainingGraph) {
    this.pack = parts.pack;
    this.mode = parts.plan.mode;
    this.reason = [parts.plan.reason, ...(carrier.note === undefined ? [] : [carrier.note])].join("; ");
    this.inputNames = parts.inputs;
    this.outputNames = parts.outputs;
    this.probe = carrier.probe;
    this.#ort = parts.ort;
    // Not the plan: its graph holds views of the whole model file.
    this.#base = parts.plan.base;
    this.#inputs = parts.grafted.inputs;
    this.#idle = parts.idle;
    this.#carrier = carrier;
    this.#state = carrier.first;
    this.#timeline = new Timeline(carrier.first);
    this.#components = parts.grafted.initializers.reduce((sum, { data }) => sum + data.byteLength, 0);
    this.trainable = graph && {
      ort: parts.ort,
      graph,
      inputs: parts.grafted.inputs,
      base: async () => (await carrier.evaluator.evaluate(null, {})).inputs,
      run: async (feeds, fetches) => {
        this.#live();
        return this.#timeline.run(
          (state) => this.#submit(state, feeds, {}, fetches, {}) as Promise<Record<string, OrtTensor>>,
        );
      },
    };
  }

  /** What runs now belong to. */
  get task(): Selection {
    return this.#state.task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.pack.tasks;
  }

  /**
   * Makes a task, a blend or the pristine base active. Runs asked for before finish on the task they had; runs asked for
   * after wait. When it fails or is aborted, the previous task stays whole.
   * @param selection a task id; null for the base; or strengths by id
   * @throws TaskError, SourceError, FormatError as `Runtime.switchTask`
   */
  async switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    this.#live();
    const started = performance.now();
    const before = { ...this.pack.reads };
    const change = this.#timeline.change(
      async () => {
        options.signal?.throwIfAborted();
        const made = await this.#carrier.make(selection, options);
        this.#state = made;
        return made;
      },
      async (old) => {
        if (old.session !== this.#state.session) await inTurn(this.#ort, () => old.session.release());
      },
    );
    const { task, bytes } = await change;
    return {
      task,
      bytesRead: this.pack.reads.bytes - before.bytes,
      requests: this.pack.reads.requests - before.requests,
      bytesFed: bytes + this.#carrier.bytesWritten,
      milliseconds: performance.now() - started,
    };
  }

  /**
   * Runs the model on the active task, or on one task per row of the batch.
   * @param fetches names of outputs, as in onnxruntime; may be left out
   * @throws TypeError when feeds use names of ours, or `tasks` does not have the batch's length
   * @throws BackendError when the session has been released
   */
  run(feeds: Feeds<O>, options?: EigenRunOptions): Promise<RunResult<O>>;
  run(feeds: Feeds<O>, fetches: Fetches<O>, options?: EigenRunOptions): Promise<RunResult<O>>;
  async run(feeds: Feeds<O>, second?: Fetches<O> | EigenRunOptions, third?: EigenRunOptions): Promise<RunResult<O>> {
    this.#live();
    const fetched = isFetches(second, this.outputNames);
    const { tasks, ...options } = (fetched ? third : (second as EigenRunOptions | undefined)) ?? {};
    const fetches = fetched ? second : this.outputNames;
    const own = feeds as Readonly<Record<string, OrtTensor>>;
    for (const { name } of this.#inputs) {
      if (name in own) throw new TypeError(`feeds: "${name}" is the session's own input; switchTask feeds it`);
    }
    return this.#timeline.run(async (state) => {
      if (!tasks) return (await this.#submit(state, own, state.feeds, fetches, options)) as RunResult<O>;
      const values = await this.#rows(tasks, own);
      const result = await this.#submit(state, own, toFeeds(this.#ort, this.#inputs, values).feeds, fetches, options);
      const valid = new Map(
        [...this.#base.heads.keys()].map((head) => [head, values.map(({ labels }) => labels.get(head)!)]),
      );
      Object.defineProperty(result, "validColumns", { value: valid, enumerable: false });
      return result as RunResult<O>;
    });
  }

  /** Values for each row of a batch. */
  async #rows(tasks: readonly (string | null)[], feeds: Readonly<Record<string, OrtTensor>>): Promise<TaskValues[]> {
    if (this.mode === "folded") {
      throw new TypeError('run: one task per row needs mode "core" or "factors"; this session is "folded"');
    }
    const batch = Object.values(feeds).find(({ dims }) => dims.length > 0)?.dims[0];
    if (tasks.length === 0 || tasks.length !== batch) {
      throw new TypeError(`run: ${tasks.length} tasks for a batch of ${batch}; give one per row`);
    }
    if (tasks.length > 1) await (this.#rowsChecked ??= this.#carrier.checkRows?.());
    const known = new Map<string | null, TaskValues>();
    for (const task of tasks) if (!known.has(task)) known.set(task, await this.#carrier.evaluator.evaluate(task, {}));
    return tasks.map((task) => known.get(task)!);
  }

  #submit(
    { session }: State<O>,
    feeds: Readonly<Record<string, OrtTensor>>,
    task: Readonly<Record<string, OrtTensor>>,
    fetches: unknown,
    options: object,
  ): Promise<object> {
    const run = (): Promise<object> => call(session, { ...this.#idle, ...feeds, ...task }, fetches, options);
    return inTurn(this.#ort, () => this.#carrier.alive?.(run) ?? run());
  }

  /**
   * Adds a task that came as a file of its own, for this pack in memory.
   * @throws as `Pack.addTask`; `switchTask` throws BaseMismatchError when it changes what no task did before
   */
  async addTask(id: string, file: SourceInput): Promise<void> {
    this.#live();
    await this.pack.addTask(id, file);
  }

  /** @throws TaskError when there is no such task or it is active */
  removeTask(id: string): void {
    const { task } = this.#state;
    const active = typeof task === "string" ? task === id : task !== null && Object.hasOwn(task, id);
    if (active) throw new TaskError(`task "${id}" is active; switch to another first`, { task: id });
    this.pack.removeTask(id);
  }

  /** Resident bytes that come on top of what a plain session holds. */
  memory(): SessionMemory {
    const { biases, heads, weights } = this.#base;
    let active = this.#state.bytes;
    for (const values of [...biases.values(), ...weights.values()]) active += values.byteLength;
    for (const { weight, bias } of heads.values()) active += weight.byteLength + (bias?.byteLength ?? 0);
    const { coefficients } = this.pack.residentBytes;
    const report = { components: this.#components, coefficients, active, ...this.#carrier.memory() };
    return { ...report, total: sum(report) };
  }

  /** Waits for runs and switches under way, then frees everything. The pack stays open. */
  release(): Promise<void> {
    this.#released ??= this.#release();
    return this.#released;
  }

  async #release(): Promise<void> {
    const { session } = await this.#timeline.end();
    await inTurn(this.#ort, () => session.release());
    await this.#carrier.dispose();
  }

  /** The same as `release`. */
  dispose(): Promise<void> {
    return this.release();
  }

  #live(): void {
    if (this.#released) throw new BackendError("this session is released; make a new one", { backend: "onnxruntime" });
  }
}

function isFetches(value: unknown, outputs: readonly string[]): boolean {
  if (Array.isArray(value)) return true;
  return typeof value === "object" && value !== null && Object.keys(value).some((key) => outputs.includes(key));
}

function sum(memory: object): number {
  return Object.values(memory).reduce((a: number, b: number) => a + b, 0);
}

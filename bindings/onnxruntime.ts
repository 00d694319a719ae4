/**
 * `eigenlora/onnxruntime`: a pack on a model that onnxruntime-web or onnxruntime-node runs. The module that runs it is the
 * caller's own import; types are structural, so that neither package is needed to compile against this one.
 */
import { createBackend } from "../src/backends/select.ts";
import { BackendError, TaskError } from "../src/errors.ts";
import { tinyFeeds, type Feed } from "../src/onnx/feeds.ts";
import { graft, type Grafted, type TaskInput } from "../src/onnx/graft.ts";
import { readModel, type ModelFile, type ModelOptions } from "../src/onnx/read.ts";
import { detachWeights, type DetachedModel } from "../src/onnx/write.ts";
import type { Pack, TaskInfo } from "../src/pack/pack.ts";
import type { View } from "../src/runtime/host.ts";
import { createRuntime } from "../src/runtime/runtime.ts";
import { copySelection, type Selection } from "../src/runtime/selection.ts";
import { Workbench } from "../src/runtime/workbench.ts";
import { onnxHost } from "../src/onnx/host.ts";
import { fillFolded, FOLDED_FILE, layoutFolded, type FoldedLayout } from "../src/session/fold.ts";
import { planSession, type BaseValues, type Mode, type Plan, type PlanOptions } from "../src/session/plan.ts";
import { probeParity, probeRows, type ProbeReport, type ProbeRun } from "../src/session/probe.ts";
import { Timeline } from "../src/session/timeline.ts";
import { stackValues, TaskEvaluator, type InputValue, type TaskValues } from "../src/session/values.ts";
import type { SourceInput } from "../src/source.ts";
import {
  call,
  inTurn,
  makeTensor,
  type Feeds,
  type Fetches,
  type Ort,
  type OrtTensor,
  type Session,
  type SessionOptions,
} from "./ort.ts";

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
  /** The model's file, kept to fold from; mode "folded". */
  readonly pristine: number;
  readonly total: number;
}

interface State<O extends Ort> {
  readonly session: Session<O>;
  readonly task: Selection;
  readonly feeds: Readonly<Record<string, OrtTensor>>;
  /** Of `feeds`. */
  readonly bytes: number;
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
    throw new TypeError("createEigenSession: the first argument must be the module onnxruntime-web or onnxruntime-node");
  }
  const { mode = "auto" } = options;
  if (!["auto", "core", "factors", "folded"].includes(mode)) throw new RangeError(`mode: got ${JSON.stringify(mode)}`);
  const file = await readModel(model, options);
  try {
    const bases = await pack.takeBases(options);
    const plan = await planSession(file, pack, bases, options);
    const own = file.model.graph.proto.input.filter(({ name }) => !file.model.graph.initializers.has(name));
    const outputs = file.model.graph.proto.output.map(({ name }) => name);
    const layout = plan.mode === "folded" ? layoutFolded(file.model, plan.folded) : undefined;
    const grafted = graft(file.model, plan.graft);
    const supplied = layout ? [FOLDED_FILE] : [];
    const detached = await detachWeights(file, grafted.initializers, { ...options, supplied });
    const parts = { ort, pack, plan, grafted, detached, options, outputs, inputs: own.map(({ name }) => name) };
    if (layout) {
      pack.keepBases(bases);
      return await EigenSession.folded({ ...parts, layout, file });
    }
    await file.close();
    // The core is made of coefficients alone; everything else expands from the bases.
    const expands = plan.mode === "factors" || plan.base.weights.size > 0 || plan.graft.modules.some((m) => !m.components);
    const { backend } = await createBackend(expands ? {} : { backend: "js" });
    const bench = new Workbench(backend, pack.modules, expands ? bases : new Uint8Array(0));
    const feeds = options.probe === false ? undefined : tinyFeeds(own);
    return await EigenSession.unfolded({ ...parts, bench, feeds });
  } catch (error) {
    await file.close();
    throw error;
  }
}

interface Parts<O extends Ort> {
  ort: O;
  pack: Pack;
  plan: Plan;
  grafted: Grafted;
  detached: DetachedModel;
  options: EigenSessionOptions<O>;
  inputs: readonly string[];
  outputs: readonly string[];
}

/** Makes the state of a selection. */
interface Maker<O extends Ort> {
  make(selection: Selection, options: SessionSwitchOptions): Promise<State<O>>;
  /** Of weights, at each switch. */
  readonly bytesWritten: number;
  /** Refuses a model that would mix the tasks of a batch. */
  checkRows?(): Promise<void>;
  memory(): Pick<SessionMemory, "expansion" | "pristine">;
  dispose(): Promise<void>;
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

  readonly #ort: O;
  readonly #base: BaseValues;
  readonly #inputs: readonly TaskInput[];
  readonly #evaluator: TaskEvaluator;
  readonly #maker: Maker<O>;
  readonly #timeline: Timeline<State<O>>;
  readonly #components: number;
  #state: State<O>;
  #released: Promise<void> | undefined;
  #rowsChecked: Promise<void> | undefined;

  private constructor(parts: Parts<O>, evaluator: TaskEvaluator, maker: Maker<O>, first: State<O>, probe: ProbeReport) {
    this.pack = parts.pack;
    this.mode = parts.plan.mode;
    this.reason = parts.plan.reason;
    this.inputNames = parts.inputs;
    this.outputNames = parts.outputs;
    this.probe = probe;
    this.#ort = parts.ort;
    // Not the plan: its graph holds views of the whole model file.
    this.#base = parts.plan.base;
    this.#inputs = parts.grafted.inputs;
    this.#evaluator = evaluator;
    this.#maker = maker;
    this.#state = first;
    this.#timeline = new Timeline(first);
    this.#components = parts.grafted.initializers.reduce((sum, { data }) => sum + data.byteLength, 0);
  }

  /** @internal */
  static async unfolded<O extends Ort>(
    parts: Parts<O> & { bench: Workbench; feeds: Map<string, Feed> | undefined },
  ): Promise<EigenSession<O>> {
    const { ort, pack, plan, bench, options } = parts;
    const { inputs } = parts.grafted;
    const evaluator = new TaskEvaluator(pack, plan.base, inputs, bench);
    const session = await createSession(ort, parts.detached, options).catch((error: unknown) => {
      bench.backend.dispose();
      throw error;
    });
    try {
      const make: Maker<O>["make"] = async (selection, how) => {
        const values = await evaluator.evaluate(selection, how);
        return { session, task: copySelection(selection), ...toFeeds(ort, inputs, [values]) };
      };
      const maker: Maker<O> = {
        make,
        bytesWritten: 0,
        memory: () => ({ expansion: sum(bench.backend.memory()) + bench.staging.values.byteLength, pristine: 0 }),
        dispose: async () => bench.backend.dispose(),
      };
      const none = await evaluator.evaluate(null, {});
      const first = { session, task: null, ...toFeeds(ort, inputs, [none]) };
      const base = none.inputs;
      const probe = await runProbe(parts, session, base);
      const { feeds, outputs } = parts;
      const made = typeof options.probe === "object" ? undefined : feeds;
      const checkRows = async (): Promise<void> => made && probeRows(probeRun(ort, session, inputs), made, base, inputs, outputs[0]!);
      return new EigenSession(parts, evaluator, { ...maker, checkRows }, first, probe);
    } catch (error) {
      bench.backend.dispose();
      await inTurn(ort, () => session.release());
      throw error;
    }
  }

  /** @internal */
  static async folded<O extends Ort>(parts: Parts<O> & { layout: FoldedLayout; file: ModelFile }): Promise<EigenSession<O>> {
    const { ort, pack, plan, options, layout, file, detached } = parts;
    const { inputs } = parts.grafted;
    const { base } = plan;
    const { backend } = await createBackend({ backend: "js" });
    const evaluator = new TaskEvaluator(pack, base, inputs, new Workbench(backend, pack.modules, new Uint8Array(0)));
    const host = onnxHost(file);
    // Heads come as inputs.
    const ignore = [...base.ignored, ...[...base.heads.keys()].flatMap((head) => [`${head}.weight`, `${head}.bias`])];
    // The file is in memory anyway: no second copy of its weights.
    const runtime = await createRuntime(pack, { base: host, policy: "reload", anyBase: true, names: plan.names, ignore });
    const make: Maker<O>["make"] = async (selection, how) => {
      const values = await evaluator.evaluate(selection, how);
      await runtime.switchTask(selection, { ...(how.signal && { signal: how.signal }), ...(how.head !== undefined && { head: how.head }) });
      const changed = runtime.changes();
      const folded = await fillFolded(layout, (name): View | Promise<View> => changed.get(name) ?? host.read(name));
      const session = await createSession(ort, { ...detached, files: [...detached.files, folded] }, options);
      return { session, task: copySelection(selection), ...toFeeds(ort, inputs, [values]) };
    };
    const files = detached.files.reduce((sum, { data }) => sum + data.byteLength, detached.bytes.length);
    const maker: Maker<O> = {
      make,
      bytesWritten: layout.byteLength,
      memory: () => {
        const { total, coefficients } = runtime.memory();
        return { expansion: total - coefficients, pristine: files };
      },
      dispose: async () => {
        await runtime.dispose();
        await file.close();
      },
    };
    const first = await make(null, {}).catch(async (error: unknown) => {
      await maker.dispose();
      throw error;
    });
    return new EigenSession(parts, evaluator, maker, first, { result: "not needed: the weights themselves change" });
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
        const made = await this.#maker.make(selection, options);
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
      bytesFed: bytes + this.#maker.bytesWritten,
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
      const valid = new Map([...this.#base.heads.keys()].map((head) => [head, values.map(({ labels }) => labels.get(head)!)]));
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
    if (tasks.length > 1) await (this.#rowsChecked ??= this.#maker.checkRows?.());
    const known = new Map<string | null, TaskValues>();
    for (const task of tasks) if (!known.has(task)) known.set(task, await this.#evaluator.evaluate(task, {}));
    return tasks.map((task) => known.get(task)!);
  }

  #submit(
    { session }: State<O>,
    feeds: Readonly<Record<string, OrtTensor>>,
    task: Readonly<Record<string, OrtTensor>>,
    fetches: unknown,
    options: object,
  ): Promise<object> {
    return inTurn(this.#ort, () => call(session, { ...feeds, ...task }, fetches, options));
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
    const report = { components: this.#components, coefficients, active, ...this.#maker.memory() };
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
    await this.#maker.dispose();
  }

  /** The same as `release`. */
  dispose(): Promise<void> {
    return this.release();
  }

  #live(): void {
    if (this.#released) throw new BackendError("this session is released; make a new one", { backend: "onnxruntime" });
  }
}

async function createSession<O extends Ort>(
  ort: O,
  { bytes, files }: DetachedModel,
  { session }: EigenSessionOptions<O>,
): Promise<Session<O>> {
  const asked: { executionProviders?: unknown } = session ?? {};
  const all = { ...asked, externalData: [...files] };
  try {
    return (await inTurn(ort, () => ort.InferenceSession.create(bytes, all as never))) as Session<O>;
  } catch (cause) {
    const providers = JSON.stringify(asked.executionProviders ?? "default");
    throw new BackendError(`onnxruntime cannot load the model (providers: ${providers}): ${(cause as Error).message}`, {
      backend: "onnxruntime",
      cause,
    });
  }
}

/** Tensors of the task inputs, for one task or one per row. */
function toFeeds<O extends Ort>(
  ort: O,
  inputs: readonly TaskInput[],
  rows: readonly TaskValues[],
): { feeds: Record<string, OrtTensor>; bytes: number } {
  const feeds: Record<string, OrtTensor> = {};
  let bytes = 0;
  for (const input of inputs) {
    const { dims, data } = stackValues(input, rows.map((row) => row.inputs.get(input.name)!));
    feeds[input.name] = makeTensor(ort, data, dims);
    bytes += data.byteLength;
  }
  return { feeds, bytes };
}

/** Runs a session for the probes; `given` are feeds of the caller's own. */
function probeRun<O extends Ort>(ort: O, session: Session<O>, inputs: readonly TaskInput[], given?: object): ProbeRun {
  return async (feeds, tasks, fetches) => {
    const tensors: Record<string, OrtTensor> = {};
    for (const [name, { data, dims }] of feeds) tensors[name] = makeTensor(ort, data, dims);
    const task = toFeeds(ort, inputs, tasks.map((values) => ({ inputs: values, labels: new Map() }))).feeds;
    const results = (await inTurn(ort, () => call(session, { ...tensors, ...given, ...task }, fetches, {}))) as Record<string, OrtTensor>;
    return Promise.all(fetches.map(async (name) => ((await results[name]!.getData?.()) ?? results[name]!.data) as Float32Array));
  };
}

async function runProbe<O extends Ort>(
  { ort, plan, grafted, options, outputs, feeds: tiny }: Parts<O> & { feeds: Map<string, Feed> | undefined },
  session: Session<O>,
  base: ReadonlyMap<string, InputValue>,
): Promise<ProbeReport> {
  if (options.probe === false) return { result: "skipped: asked not to" };
  const given = typeof options.probe === "object" ? options.probe : undefined;
  const run = probeRun(ort, session, grafted.inputs, given);
  const providers = (options.session as { executionProviders?: unknown } | undefined)?.executionProviders;
  const made = given ? new Map<string, Feed>() : tiny;
  const { modules } = plan.graft;
  return probeParity(run, made, base, grafted.inputs, modules, grafted.probe, outputs, JSON.stringify(providers ?? "default"));
}

function isFetches(value: unknown, outputs: readonly string[]): boolean {
  if (Array.isArray(value)) return true;
  return typeof value === "object" && value !== null && Object.keys(value).some((key) => outputs.includes(key));
}

function sum(memory: object): number {
  return Object.values(memory).reduce((a: number, b: number) => a + b, 0);
}

/**
 * A loaded model that switches tasks: the model is read, planned, changed and loaded once. The session owns the order
 * of runs and switches; its delivery brings tasks to the model, the engine runs it.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import {
  copySelection,
  type MemoryReport,
  memoryReport,
  type Selection,
  Switching,
  type SwitchReport,
} from "../core/selection.ts";
import type { AddTaskOptions } from "../core/trust.ts";
import { BackendError, checkArgument, checkChoice, checkOptions, checkPack, described, TaskError } from "../errors.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { detachWeights } from "../onnx/write.ts";
import { now, throwIfAborted } from "../pace.ts";
import { type SourceInput, unlessAborted } from "../source.ts";
import { sum } from "../tensor/dtypes.ts";
import type { CacheWatch } from "./caches.ts";
import { type Active, type Delivery, inputDelivery, type ProbeReport, type SessionParts } from "./delivery.ts";
import { type Engine, Queue, type Tensors } from "./engine.ts";
import { type Mode, SESSION_OPTIONS, type SessionOptions, type SessionSwitchOptions } from "./options.ts";
import { type PreparedModel, prepareModel } from "./prepare.ts";
import type { RowModel, RowTasks } from "./rows.ts";
import type { EncodeOptions, Tokenizer } from "./tokens.ts";
import type { Trainable } from "./training.ts";

/**
 * Prepares a model for all tasks of a pack and loads it once.
 * @param engine runs the model
 * @param source bytes, path, URL or Blob of the ONNX file; files next to it are found by path or URL, or given by
 *   `external`
 * @throws BaseMismatchError when modules are missing, ambiguous, of another shape or of another model; or when the mode
 *   asked for cannot do what the tasks bring: the message names one that can
 * @throws FormatError when the model is truncated, no ONNX model or of an opset before 11
 * @throws BackendError when the engine refuses the model or has no room for it, or the probe finds that it computes
 *   something else
 */
export async function createSession<T extends SessionTypes>(
  engine: Engine,
  source: SourceInput,
  pack: Pack,
  options: SessionOptions = {},
): Promise<Session<T>> {
  checkArgument("createSession", engine, "an engine (createEngine(ort))", "load");
  checkPack("createSession", pack);
  checkOptions("createSession", options, SESSION_OPTIONS);
  const { trainable = false, mode = "auto" } = options;
  checkModes(options);
  if (trainable && mode !== "auto" && mode !== "factors") {
    throw new RangeError(`mode: tasks are learned in mode "factors", got ${JSON.stringify(mode)}`);
  }
  const file = await readModel(source, { ...options, weightsApart: engine.readsFiles });
  const session = await sessionOn<T>(engine, file, pack, options);
  await tellReady(file.model.name, options.onProgress);
  return session;
}

/** Reports that a session is made of a model. */
export async function tellReady(model: string, onProgress: SessionOptions["onProgress"]): Promise<void> {
  if (!onProgress) return;
  const place = (await import("../progress.ts")).placeOf(model);
  onProgress({ status: "ready", stage: "session", ...place, loaded: 0, total: 0, progress: 100, task: "", model });
}

/** @throws RangeError for another mode or form of components than there are */
export function checkModes({ mode = "auto", components = "stored" }: SessionOptions): void {
  checkChoice("mode", mode, ["auto", "core", "factors", "folded"]);
  checkChoice("components", components, ["stored", "f32"]);
}

/** @throws BackendError when weights are more than the engine has room for, before they are read: that takes minutes */
function refuseLarger({ model, bytes }: ModelFile, { room = Infinity, name, provider }: Engine): void {
  const apart = sum(externalFiles(model).values());
  const size = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;
  if (bytes.length + apart < room) return;
  throw new BackendError(
    `the model's weights take ${size(bytes.length + apart)}, and WebAssembly has room for ${size(room)} (providers: ${provider}): take an export ` +
      "of fewer bits, or the provider webgpu, which keeps weights on the device",
    { backend: name },
  );
}

/** Makes a session on a model that has been read, and closes that. @param options checked already */
export async function sessionOn<T extends SessionTypes>(
  engine: Engine,
  file: ModelFile,
  pack: Pack,
  options: SessionOptions,
): Promise<Session<T>> {
  const { trainable = false } = options;
  let bases: Awaited<ReturnType<Pack["bases"]>> | undefined;
  try {
    refuseLarger(file, engine);
    bases = await pack.bases(options);
    const how = {
      ...options,
      foldedInputs: engine.gpu !== undefined,
      joinCores: engine.gpu === undefined,
      integers: options.components === "f32" ? undefined : engine.integers,
      ...(trainable && { mode: "factors" as const }),
    };
    const learning = trainable ? await import("./training.ts") : undefined;
    learning?.refuseParts(file, pack, options.modules);
    const prepared = await prepareModel(file, pack, bases.bytes, how);
    const training = await learning?.addTraining(engine, file, prepared, trainable);
    const { folded } = prepared;
    const supplied = folded && "places" in folded ? [folded.path] : [];
    const detached = await detachWeights(file, { ...options, supplied });
    const { load, idle, graph } = training ?? { load: {}, idle: {} };
    const parts: SessionParts = { engine, prepared, detached, load, idle, probe: options.probe };
    const delivery = await deliveryOf(parts, file, bases.bytes);
    return new Session<T>(parts, delivery, graph, await cachesOf(prepared));
  } catch (error) {
    await file.close();
    throw error;
  } finally {
    bases?.close();
  }
}

async function cachesOf({ pack, inputNames, outputNames }: PreparedModel): Promise<CacheWatch | undefined> {
  if (![...inputNames, ...outputNames].some((name) => /^(past|present)/.test(name))) return undefined;
  return new (await import("./caches.ts")).CacheWatch(pack, inputNames, outputNames);
}

async function deliveryOf(parts: SessionParts, file: ModelFile, bases: Uint8Array): Promise<Delivery> {
  const { engine, prepared } = parts;
  const { folded } = prepared;
  if (!folded) {
    await file.close();
    const { devicePlacer } = engine.gpu ? await import("./device.ts") : {};
    return inputDelivery(parts, bases, devicePlacer);
  }
  const { deviceDelivery, foldedDelivery } = await import("./device.ts");
  return "places" in folded ? foldedDelivery(parts, file, folded) : deviceDelivery(parts, file, folded, engine.gpu!);
}

/** Effect and cost of a switch. */
export interface SessionSwitchReport extends SwitchReport {
  /** Bytes of the inputs that carry the task; mode "folded": of the weights that were written. */
  readonly bytesFed: number;
}

/** Options of a session's `run`. */
export interface SessionRunOptions {
  /** One task id per row of the batch, or null for the base; instead of the active task. */
  readonly tasks?: readonly (string | null)[] | undefined;
  /**
   * True if this run takes caches that were made under other tasks. Default: as `switchTask` was told; false with
   * `tasks`.
   */
  readonly keepCache?: boolean | undefined;
  /** Aborted, a run that waits does not begin; one that is under way goes on, and nobody waits for its answer. */
  readonly signal?: AbortSignal | undefined;
  /** Everything else goes to the engine. */
  readonly [option: string]: unknown;
}

/** Addition to the outputs of a run with `tasks`. */
export interface ValidColumns {
  /**
   * Number of columns of each row of a head's result that are the task's own, by module name of the head. The columns
   * behind them hold the lowest number, or 0 where the head has no bias. Not enumerable.
   */
  readonly validColumns?: ReadonlyMap<string, readonly number[]>;
}

/** Arguments and results of an engine's own runs. */
export interface SessionTypes {
  readonly feeds: unknown;
  readonly fetches: unknown;
  readonly results: unknown;
}

/** A model that switches tasks. Made by `createSession`, or the function of a binding. */
export class Session<T extends SessionTypes = SessionTypes> extends Switching<SessionSwitchReport> {
  readonly pack: Pack;
  /** The form in which tasks reach the model, and its reason. */
  readonly mode: Mode;
  readonly reason: string;
  /** The model's own inputs and outputs. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** The result of the parity probe. */
  readonly probe: ProbeReport;
  /**
   * Modules whose weights were found by their names alone: the pack has no fingerprint of them, or none was asked for
   * (`anyBase`).
   */
  readonly unconfirmed: readonly string[];
  /** Modules of the pack that the option `modules` has left out. */
  readonly leftOut: readonly string[];
  /** @internal For `createTrainer`; undefined unless the session was made `trainable`. */
  readonly trainable: Trainable | undefined;
  /** @internal Where it is one of several: they may have to go back to the task that they had. */
  group?: { readonly task: Selection };

  readonly #engine: Engine;
  readonly #base: PreparedModel["base"];
  readonly #inputs: PreparedModel["inputs"];
  readonly #idle: Tensors;
  readonly #delivery: Omit<Delivery, "first">;
  /** Runs and switches. A run under way keeps the model and feeds that it began with. */
  readonly #queue = new Queue();
  readonly #components: number;
  /** The model's inputs that take int32. */
  readonly #short: ReadonlySet<string>;
  readonly #caches: CacheWatch | undefined;
  readonly #rowModel: Omit<RowModel, "model">;
  /** Made by the first run with one task per row. */
  #rows: RowTasks | undefined;
  #active: Active;
  /** The selection that a switch under way leads to. */
  #coming: Selection = null;
  #closed: Promise<void> | undefined;

  /** @internal Use `createSession`, or the function of a binding. */
  constructor(
    { engine, prepared, idle, probe }: SessionParts,
    delivery: Delivery,
    graph: Trainable["graph"] | undefined,
    caches: CacheWatch | undefined,
  ) {
    super();
    // Not the prepared model itself: it holds the components, which the engine has now.
    const { pack, reason, inputs, outputNames, forms, sharesRanges, feeds = [] } = prepared;
    this.pack = pack;
    this.mode = prepared.mode;
    this.inputNames = prepared.inputNames;
    this.outputNames = outputNames;
    this.unconfirmed = prepared.unconfirmed;
    const here = new Set(prepared.view.modules.map(({ name }) => name));
    this.leftOut = pack.modules.flatMap(({ name }) => (here.has(name) ? [] : [name]));
    this.reason = delivery.note === undefined ? reason : `${reason}; ${delivery.note}`;
    this.probe = delivery.probe;
    this.#engine = engine;
    this.#base = prepared.base;
    this.#inputs = inputs;
    this.#idle = idle;
    this.#caches = caches;
    // The first task's feeds go with it.
    const { first, ...others } = delivery;
    this.#delivery = others;
    this.#active = first;
    // Feeds of the caller's own mean that the model does not run on synthetic ones.
    const feedsOfRows = typeof probe === "object" ? () => undefined : prepared.feedsOfRows;
    this.#rowModel = { engine, inputs, outputNames, idle, forms, sharesRanges, feedsOfRows };
    this.#short = new Set([...feeds].flatMap(([name, { data }]) => (data instanceof Int32Array ? name : [])));
    this.#components = prepared.componentBytes;
    this.trainable = graph && this.#lend(graph, prepared.feeds);
  }

  #lend(graph: Trainable["graph"], example: Trainable["example"]): Trainable {
    return {
      engine: this.#engine,
      graph,
      example,
      inputs: this.#inputs,
      base: async () => (await this.#delivery.evaluator.read(null)).inputs,
      run: async (feeds, fetches) => {
        this.#live();
        return this.#queue.call(() => this.#engine.run(this.#active.model, { ...this.#idle, ...feeds }, fetches));
      },
    };
  }

  /** @internal */
  override heard(type: string): void {
    if (type !== "devicelost") return;
    const { gpu } = this.#engine;
    const watch = async (): Promise<void> => {
      const { device } = await gpu!.device();
      const { message } = await (device as unknown as { readonly lost: Promise<{ readonly message: string }> }).lost;
      this.tell("devicelost", { message });
    };
    // A runtime that does not tell its device tells of no loss.
    if (gpu) watch().catch(() => undefined);
  }

  /** The selection that runs now belong to. */
  get task(): Selection {
    return this.#active.task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.pack.tasks;
  }

  /**
   * Makes a task, a blend or the pristine base active. Runs asked for before finish on the task they had; runs asked
   * for after wait. When it fails or is aborted, the previous task stays whole.
   * @param selection a task id; null for the base; or strengths by id
   * @throws TaskError, SourceError, FormatError as `Runtime.switchTask`
   */
  async switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    checkOptions("switchTask", options, ["signal", "head", "keepCache"]);
    const { keepCache: _, ...how } = options;
    const asked = copySelection(selection);
    this.#live();
    let [old, next]: Active[] = [];
    const change = async (): Promise<SessionSwitchReport> => {
      throwIfAborted(options.signal);
      const started = now();
      const before = { ...this.pack.reads };
      let read = started;
      this.#coming = asked;
      try {
        const state = this.#caches?.stateOf(asked, options);
        const tasks = await this.#delivery.evaluator.load(asked, how);
        read = now();
        next = await this.#delivery.make(tasks, how.signal);
        old = this.#active;
        this.#active = { ...next, state };
      } finally {
        this.#coming = null;
      }
      const done = now();
      return {
        task: next.task,
        bytesRead: this.pack.reads.bytes - before.bytes,
        requests: this.pack.reads.requests - before.requests,
        bytesFed: next.bytes + (next.written ?? 0) + this.#delivery.bytesWritten,
        milliseconds: { read: read - started, compute: done - read, total: done - started },
      };
    };
    return this.#queue.change(
      () => this.switching(asked, change),
      async () => {
        if (old!.model !== next!.model) await this.#engine.release(old!.model);
        old!.retire?.();
      },
    );
  }

  /**
   * Makes feeds of texts, one row each, padded to the longest: ids, masks and token types, as far as the model takes
   * them. Inputs of other kinds stay the caller's to add.
   * @param tokenizer of transformers.js or @huggingface/tokenizers, as it is; or a function
   * @throws TypeError for texts that are none, something else than a tokenizer, or one that gives nothing that the
   *   model takes
   * @example
   * const { logits } = await session.run(await session.encode("a fast mail reader", tokenizer));
   */
  async encode(
    texts: string | readonly string[],
    tokenizer: Tokenizer,
    options: EncodeOptions = {},
  ): Promise<T["feeds"]> {
    const { feedsOfTexts } = await import("./tokens.ts");
    return feedsOfTexts(texts, tokenizer, options, this.inputNames, this.#engine, this.#short);
  }

  /**
   * Runs the model on the active task, or on one task per row of the batch.
   * `fetches` are names of outputs, or what else the engine takes.
   * @throws TypeError when feeds use names of ours, or `tasks` does not have the batch's length
   * @throws BackendError when the session has been closed; or, with a task per row, when a run on rows that differ
   *   shows that the model would mix them, or none of its outputs can tell
   * @throws TaskError when a cache among the feeds was made under another task, unless `keepCache` was asked for
   */
  run(feeds: T["feeds"], options?: SessionRunOptions): Promise<T["results"] & ValidColumns>;
  run(feeds: T["feeds"], fetches: T["fetches"], options?: SessionRunOptions): Promise<T["results"] & ValidColumns>;
  async run(
    feeds: T["feeds"],
    second?: T["fetches"] | SessionRunOptions,
    third?: SessionRunOptions,
  ): Promise<T["results"] & ValidColumns> {
    this.#live();
    const fetched = isFetches(second, this.outputNames);
    const { tasks, keepCache, signal, ...options } =
      (fetched ? third : (second as SessionRunOptions | undefined)) ?? {};
    const fetches = fetched ? second : this.outputNames;
    const own = feeds as Tensors;
    if (typeof own !== "object" || !own || "then" in own)
      throw new TypeError(`run: expected feeds, tensors by name, got ${described(own)}`);
    for (const { name } of this.#inputs) {
      if (name in own) throw new TypeError(`feeds: "${name}" is the session's own input; switchTask feeds it`);
    }
    const run = this.#queue.call(async () => {
      throwIfAborted(signal);
      const active = this.#active;
      this.#delivery.check?.();
      const rowTasks = tasks && (await this.#rowTasks());
      // Together with reading the tasks: another task may come under an id.
      const made = this.#caches?.check(own, active.state, tasks, keepCache);
      const rows = await rowTasks?.feeds(tasks!, own);
      const { feeds } = rows ?? active;
      const result = await this.#engine.run(active.model, { ...this.#idle, ...own, ...feeds }, fetches, options);
      made?.(result, fetches);
      return rows ? Object.defineProperty(result, "validColumns", { value: rows.valid, enumerable: false }) : result;
    });
    return unlessAborted(run, signal);
  }

  async #rowTasks(): Promise<RowTasks> {
    if (this.mode === "folded")
      throw new TypeError('run: one task per row needs mode "core" or "factors"; this session is "folded"');
    const { RowTasks } = await import("./rows.ts");
    const { model } = this.#active;
    this.#rows ??= new RowTasks(this.pack, this.#delivery.evaluator, { ...this.#rowModel, model });
    return this.#rows;
  }

  /**
   * Adds a task that came as a file of its own, for this pack in memory.
   * @throws as `Pack.addTask`; `switchTask` throws BaseMismatchError when it changes what no task did before
   */
  async addTask(id: string, file: SourceInput, options?: AddTaskOptions): Promise<void> {
    this.#live();
    await this.pack.addTask(id, file, options);
  }

  /** @throws TaskError when there is no such task, or it is active or being switched to */
  removeTask(id: string): void {
    this.#live();
    for (const task of [this.#active.task, this.#coming, this.group?.task])
      if (task === id || (typeof task === "object" && Object.keys(task ?? {}).includes(id)))
        throw new TaskError(`task "${id}" is in use; switch to another first`, { task: id });
    this.pack.removeTask(id);
  }

  /**
   * Resident bytes beyond the engine's own copy of the model: `basis` are the components inside that model, `active`
   * the inputs of the active task and, in mode "folded" on WebGPU, the weights that the model reads.
   */
  memory(): MemoryReport {
    const { biases, heads, weights } = this.#base;
    const { scratch, pristine, active } = this.#delivery.memory();
    const own = [...heads.values()].flatMap(({ weight, bias }) => [weight, bias]);
    // Heads of the base are values of rows too.
    const arrays = new Set([...biases.values(), ...weights.values(), ...own, ...(this.#rows?.arrays ?? [])]);
    const held = [...arrays].reduce((sum, array) => sum + (array?.byteLength ?? 0), this.#active.bytes + active);
    const { coefficients } = this.pack.residentBytes;
    return memoryReport({ basis: this.#components, coefficients, pristine, active: held, scratch, reserved: 0 });
  }

  /** Waits for runs and switches under way, then frees everything. The pack stays open. */
  close(): Promise<void> {
    this.#closed ??= this.#end();
    return this.#closed;
  }

  async #end(): Promise<void> {
    await this.#queue.end();
    await this.#engine.release(this.#active.model);
    await this.#delivery.close();
  }

  #live(): void {
    if (this.#closed) throw new BackendError("this session is closed; make a new one", { backend: this.#engine.name });
  }
}

function isFetches(value: unknown, outputs: readonly string[]): boolean {
  if (Array.isArray(value)) return true;
  return typeof value === "object" && value !== null && Object.keys(value).some((key) => outputs.includes(key));
}

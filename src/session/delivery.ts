/**
 * Delivery of tasks to a loaded model: for each selection the model and the feeds that make it that task's. Here by extra inputs of one
 * model, in modes "core" and "factors"; mode "folded" and inputs on a device are in device.ts, which is loaded when it is needed.
 */
import type { DeviceHandle } from "../backends/backend.ts";
import type { LoadedTasks, Selection } from "../core/selection.ts";
import { createUnfolding, type SessionRuntime } from "../core/session-runtime.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { TaskInput } from "../onnx/inject.ts";
import type { CacheState } from "./caches.ts";
import type { Engine, LoadedModel, Tensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { type ProbeReport, probeParity, type SessionParts } from "./probe.ts";
import { type InputValues, isTerm, TaskEvaluator, toFeeds } from "./values.ts";

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
  /** When it fails, what was active before stays usable. */
  make(tasks: LoadedTasks, signal?: AbortSignal): Promise<Active>;
  /** Called before each run. @throws BackendError where a switch failed and left weights that are no task's */
  check?(): void;
  /** Needed for one task per row; undefined in mode "folded", which has no such runs. */
  readonly rows?: RowModel | undefined;
  /** Resident bytes: of what expands or folds, of pristine weights, and of weights that the model reads. */
  memory(): { readonly scratch: number; readonly pristine: number; readonly active: number };
  /** Frees all but the loaded model. */
  close(): Promise<void>;
}

/** A loaded model on which rows of a batch may have a task each. */
export interface RowModel {
  readonly engine: Engine;
  readonly model: LoadedModel;
  readonly inputs: readonly TaskInput[];
  readonly outputNames: readonly string[];
  /** Values of inputs that are neither the model's own nor a task's. */
  readonly idle: Tensors;
  /** Kinds of modules and vectors that are no linear layer, by name. */
  readonly forms: ReadonlyMap<string, string>;
  /** True if what enters a layer is quantised by a range that all rows share. */
  readonly sharesRanges: boolean;
  /** Feeds with rows that differ; undefined where they cannot be made up. */
  readonly made: () => ReadonlyMap<string, Feed> | undefined;
}

/** Puts the values of task inputs on the device that the engine computes on: written once a switch, they cost a run nothing. */
export interface Placer {
  place(values: InputValues): Omit<Active, "task" | "model">;
  readonly byteLength: number;
  close(): void;
}

/**
 * Modes "core" and "factors": one loaded model, whose extra inputs carry the active task.
 * @param bases of the pack
 * @param placerOn makes a placer; undefined where the engine computes on no device
 * @throws BackendError when the engine refuses the model, or the probe finds that it computes something else
 */
export async function inputDelivery(
  parts: SessionParts,
  bases: Uint8Array,
  placerOn: ((device: DeviceHandle) => Placer) | undefined,
): Promise<Delivery> {
  const { engine, prepared } = parts;
  const { view, mode, base, modules, inputs } = prepared;
  const expands = base.weights.size > 0 || modules.some((module) => module.expands);
  const runtime = await createUnfolding(view, mode as "core" | "factors", expands ? bases : undefined, base);
  let model: LoadedModel | undefined;
  try {
    const evaluator = new TaskEvaluator(prepared, runtime);
    model = await engine.load(parts.detached, parts.load);
    // Not every engine tells which device it has. Where one does, runs fail once it is lost.
    const device = (await engine.gpu?.device().catch(() => undefined))?.device;
    const none = (await evaluator.read(null)).inputs;
    const probe = await probeParity(parts, model, none);
    const placer = device && placerOn?.(device);
    return { ...deliver(engine, inputs, model, runtime, evaluator, none, placer), probe, rows: rowsOf(parts, model) };
  } catch (error) {
    if (model) await engine.release(model);
    await runtime.close();
    throw error;
  }
}

// Objects that stay are made by functions that know the little they need: a closure above would keep the prepared model, and its components.

function deliver(
  engine: Engine,
  inputs: PreparedModel["inputs"],
  model: LoadedModel,
  runtime: SessionRuntime,
  evaluator: TaskEvaluator,
  none: InputValues,
  placer: Placer | undefined,
): Omit<Delivery, "probe"> {
  const terms = inputs.filter(isTerm).map(({ name }) => name);
  const bytesOf = (values: InputValues): number =>
    terms.reduce((sum, name) => sum + values.get(name)!.data.buffer.byteLength, 0);
  // Cores and factors of a past selection, which the next one is written over: garbage of switches would have to be collected.
  let spare: InputValues | undefined;
  // The most that these have been: tasks differ in rank.
  let room = bytesOf(none);
  const active = (task: Selection, values: InputValues): Active => {
    const keep = (): void => {
      spare = new Map(terms.map((name) => [name, values.get(name)!]));
      room = Math.max(room, bytesOf(spare));
    };
    if (!placer) return { model, task, ...toFeeds(engine, inputs, [values]), retire: keep };
    const placed = placer.place(values);
    // They are on the device: the next selection may write over them at once.
    keep();
    return { model, task, ...placed };
  };
  return {
    evaluator,
    first: active(null, none),
    bytesWritten: 0,
    async make(tasks, signal) {
      const old = spare;
      spare = undefined;
      return active(tasks.selection, (await evaluator.evaluate(tasks, signal, old)).inputs);
    },
    memory() {
      const { scratch, pristine } = runtime.memory();
      return { scratch: scratch + room, pristine, active: placer?.byteLength ?? 0 };
    },
    async close() {
      placer?.close();
      await runtime.close();
    },
  };
}

function rowsOf({ engine, idle, probe, prepared }: SessionParts, model: LoadedModel): RowModel {
  const { inputs, feedsOfRows, outputNames, sharesRanges, forms } = prepared;
  return {
    ...{ engine, model, inputs, outputNames, idle, sharesRanges, forms },
    // Feeds of the caller's own mean that the model does not run on made-up ones.
    made: typeof probe === "object" ? () => undefined : feedsOfRows,
  };
}

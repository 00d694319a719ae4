/**
 * The interface of what carries tasks to a loaded model: for each selection the model and the feeds that make it that task's. There are
 * three kinds: inputs.ts (extra inputs), folded.ts (a model per task), device.ts (weights as buffers of a device).
 */

import type { LoadedTasks, Selection } from "../core/selection.ts";
import type { TaskInput } from "../onnx/adapted.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { DetachedModel } from "../onnx/write.ts";
import type { CacheState } from "./caches.ts";
import type { Engine, LoadedModel, LoadOptions, Tensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import type { ProbeReport } from "./probe-term.ts";
import type { TaskEvaluator } from "./values.ts";

/** What runs are made of while a selection is active. */
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

export interface Carrier {
  readonly evaluator: TaskEvaluator;
  /** The base. */
  readonly first: Active;
  readonly probe: ProbeReport;
  /** A remark for people on how tasks reach the model. */
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
  /** Kinds of modules that are no linear layer, by name. */
  readonly forms: ReadonlyMap<string, string>;
  /** Whether what enters a layer is quantised by a range that all rows share. */
  readonly sharesRanges: boolean;
  /** Feeds with rows that differ; undefined where they cannot be made up. */
  readonly made: () => ReadonlyMap<string, Feed> | undefined;
}

/** What a carrier is made of. */
export interface CarrierParts {
  readonly engine: Engine;
  readonly prepared: PreparedModel;
  readonly detached: DetachedModel;
  readonly load: LoadOptions;
  /** Feeds of the caller's own for the probe, or whether there is to be one. Default: true. */
  readonly probe: boolean | object | undefined;
  /** Inputs that are the same in every run that does not learn. */
  readonly idle: Tensors;
}

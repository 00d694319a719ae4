/**
 * What carries tasks to a loaded model: for each selection the model and the feeds that make it that task's. There are three
 * kinds: unfolded.ts (extra inputs), folded.ts (a model per task), device.ts (weights as buffers of a device).
 */

import type { Selection, SwitchOptions } from "../core/selection.ts";
import type { ActiveTask } from "../core/stage.ts";
import type { TaskInput } from "../onnx/adapted.ts";
import type { DetachedModel } from "../onnx/write.ts";
import type { CacheState } from "./caches.ts";
import type { Engine, LoadedModel, LoadOptions, Tensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { stackValues, type TaskEvaluator, type TaskValues } from "./values.ts";

/** What runs are made of while a selection is active. */
export interface Active {
  readonly task: Selection;
  readonly model: LoadedModel;
  readonly feeds: Tensors;
  /** Of the feeds that a run carries from the CPU's memory. */
  readonly bytes: number;
  /** Which caches belong to it, where the model has caches. */
  readonly state?: CacheState | undefined;
  /** Called once nothing runs on it any more: another selection may use its memory. */
  readonly retire?: (() => void) | undefined;
}

/** What the probe found out. */
export interface ProbeReport {
  /** "passed", or why nothing could be compared. */
  readonly result: string;
  /** Module whose term was compared, and the largest difference relative to the largest value. */
  readonly module?: string;
  readonly difference?: number;
}

export interface Carrier {
  readonly evaluator: TaskEvaluator;
  /** The base. */
  readonly first: Active;
  readonly probe: ProbeReport;
  /** What else is to be known of how tasks reach the model, for people. */
  readonly note?: string;
  /** Of weights, at each switch. */
  readonly bytesWritten: number;
  /**
   * When it fails, what was active before stays usable.
   * @param tasks those of the selection, as `evaluator.load` gives them
   */
  make(selection: Selection, tasks: readonly ActiveTask[], options: SwitchOptions): Promise<Active>;
  /** Before each run. @throws BackendError where a switch failed and left weights that are no task's */
  check?(): void;
  /**
   * Refuses a model that would mix the tasks of a batch.
   * @param feeds of the batch
   * @returns whether it is sure: of some batches only they themselves can be told
   * @throws BackendError
   */
  checkRows?(feeds: Tensors, rows: number): Promise<boolean>;
  /** Resident bytes: what expands or folds, pristine weights, and weights that the model reads. */
  memory(): { readonly scratch: number; readonly pristine: number; readonly active: number };
  /** Frees all but the loaded model. */
  close(): Promise<void>;
}

/** What a carrier is made of. */
export interface CarrierParts {
  readonly engine: Engine;
  readonly prepared: PreparedModel;
  readonly detached: DetachedModel;
  readonly load: LoadOptions;
  /** For the probe: feeds of the caller's own, or whether there is to be one. Default: true. */
  readonly probe: boolean | object | undefined;
  /** Inputs that are the same in every run that does not learn. */
  readonly idle: Tensors;
}

/** Tensors of the inputs that carry tasks, for one task or one per row. */
export function toFeeds(
  engine: Engine,
  inputs: readonly TaskInput[],
  rows: readonly Pick<TaskValues, "inputs">[],
): { feeds: Tensors; bytes: number } {
  const feeds: Record<string, Tensors[string]> = {};
  let bytes = 0;
  for (const input of inputs) {
    const { dims, data } = stackValues(
      input,
      rows.map((row) => row.inputs.get(input.name)!),
    );
    feeds[input.name] = engine.tensor(data, dims);
    bytes += data.byteLength;
  }
  return { feeds, bytes };
}

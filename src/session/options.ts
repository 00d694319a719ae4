/** Options of sessions: one type for matching, planning and preparing a model, and for loading it. */

import type { ModuleFilter } from "../core/part.ts";
import type { SwitchOptions } from "../core/selection.ts";
import type { ModelOptions } from "../onnx/read.ts";

/** The form in which a task reaches the model. */
export type Mode = "core" | "factors" | "folded";

/** Options of `createSession`. */
export interface SessionOptions extends ModelOptions {
  /**
   * "core": the task is a small matrix between the pack's components, which the model gets once. "factors": it is
   * expanded to A and B. "folded": the weights themselves change. A pack without components in column mode has no
   * "core". Default: "auto", what fits the pack and the model best.
   */
  readonly mode?: Mode | "auto" | undefined;
  /** Names of weights or of their initializers in the model, by module name of the pack, where they are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /**
   * Accept a model whose weights differ from the fingerprints, for instance one that was trained further. Default:
   * false.
   */
  readonly anyBase?: boolean | undefined;
  /** Parameters of the tasks, or modules with all of theirs, to leave out: `["classifier"]` on a model without one. */
  readonly ignore?: readonly string[] | undefined;
  /**
   * Which modules of the pack and of its tasks' parameters are used, by the pack's names: those that the model has,
   * where it lacks some or is one of several files. `session.leftOut` names the others. Default: all.
   */
  readonly modules?: ModuleFilter | undefined;
  /**
   * Room for what no task of the pack brings yet, but one that is added or learned later may. It costs every run a
   * little.
   */
  readonly reserve?:
    | {
        /** Private terms next to the core. Default: where a task of the pack has some. */
        readonly privateTerms?: boolean | undefined;
        /** Names of layers that tasks may bring whole: those of a head. Default: those that tasks of the pack bring. */
        readonly head?: string | readonly string[] | undefined;
      }
    | undefined;
  /**
   * A tiny run that shows whether the provider takes a task into account: `false` leaves it out; or feeds of your own,
   * where the model does not run on synthetic ones. Default: true.
   */
  readonly probe?: boolean | object | undefined;
  /**
   * Mode "core": "stored" keeps components that the pack stores as integers that small inside the model, as far as the
   * runtime multiplies by them. "f32" makes floats of them, for runtimes that lack the operators. Default: "stored".
   */
  readonly components?: "stored" | "f32" | undefined;
  /**
   * Prepares the session for `eigenlora/train`, which then can train new tasks on it, in mode "factors" only; `logits`
   * names the output that holds the logits, "logits" or the only one by default. Loss and gradients lie in the same
   * graph, which takes longer to create, and costs a run a little. Default: false.
   */
  readonly trainable?: boolean | { readonly logits?: string | undefined } | undefined;
}

/** Options of a session's `switchTask`. */
export interface SessionSwitchOptions extends SwitchOptions {
  /**
   * Lets runs under this task take caches of keys and values that were made under another one, such as that of a prompt
   * that the base has read. The cache keeps its values; only what comes after it is of this task. Default: false, such
   * a run is refused.
   */
  readonly keepCache?: boolean | undefined;
}

/** All options of `createSession`. */
export const SESSION_OPTIONS = [
  "mode",
  "names",
  "anyBase",
  "ignore",
  "modules",
  "reserve",
  "probe",
  "components",
  "trainable",
  "external",
  "fetch",
  "headers",
  "timeout",
  "minRate",
  "retries",
  "maxWholeBytes",
  "signal",
  "onProgress",
] as const;

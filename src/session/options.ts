/** What a session can be made with. */

import type { SwitchOptions } from "../core/selection.ts";
import type { ModelOptions } from "../onnx/read.ts";
import type { PlanOptions } from "./plan.ts";

/** Options of `createSession`. */
export interface SessionOptions extends ModelOptions, PlanOptions {
  /**
   * A tiny run that shows whether the provider takes a task into account: `false` leaves it out; or feeds of your own, where the
   * model does not run on made-up ones. Default: true.
   */
  readonly probe?: boolean | object | undefined;
  /**
   * Mode "core": "stored" keeps components that the pack stores as integers that small inside the model, as far as the runtime
   * multiplies by them. "f32" makes floats of them, for runtimes that lack the operators. Default: "stored".
   */
  readonly components?: "stored" | "f32" | undefined;
  /**
   * Whether `eigenlora/train` can train new tasks on it, in mode "factors" only; `logits` names the output that holds the logits,
   * "logits" or the only one by default. Loss and gradients lie in the same graph, which takes longer to create, and costs a run a
   * little. Default: false.
   */
  readonly trainable?: boolean | { readonly logits?: string | undefined } | undefined;
}

/** Options of a session's `switchTask`. */
export interface SessionSwitchOptions extends SwitchOptions {
  /**
   * Whether runs under this task take caches of keys and values that were made under another one, such as that of a prompt that the
   * base has read. What the cache holds stays as it was made; only what comes after it is of this task. Default: false, such
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
] as const;

/**
 * `eigenlora`: open a pack, put it on a base model, switch tasks. The run-time half; packing is `eigenlora/build`.
 */

import type { Pack } from "./core/pack.ts";
import { type Runtime, type RuntimeOptions, startRuntime } from "./core/runtime.ts";
import { checkOptions, checkPack } from "./errors.ts";
import { FETCH_OPTIONS } from "./source.ts";

export type { DeviceBackend, DeviceBuffer, DeviceHandle, Owner } from "./backends/backend.ts";
export type {
  BaseInput,
  CpuView,
  DeviceTensor,
  Parameter,
  Tensor,
  Transaction,
  View,
  WeightHost,
} from "./core/base.ts";
export type { BackendChoice, BackendOptions } from "./core/kernel-session.ts";
export type { TaskInfo } from "./core/pack.ts";
export { type Bases, type BasesOptions, type OpenOptions, openPack, Pack, type PackEvents } from "./core/pack.ts";
export type { ModuleFilter } from "./core/part.ts";
export { Runtime, type RuntimeOptions } from "./core/runtime.ts";
export type {
  MemoryReport,
  RuntimeSwitchReport,
  Selection,
  SwitchEvents,
  Switching,
  SwitchOptions,
  SwitchReport,
} from "./core/selection.ts";
export type { ApplyOptions, ModuleTerm } from "./core/terms.ts";
export type { AddTaskOptions, PublicKey, TrustOptions } from "./core/trust.ts";
export {
  AdapterError,
  BackendError,
  BaseMismatchError,
  EigenLoraError,
  FormatError,
  SourceError,
  TaskError,
  TrustError,
} from "./errors.ts";
export type { DetailedEvent, Listen, Listener, ListenOptions, Observable } from "./events.ts";
export {
  type BasisDescription,
  type Coefficients,
  type Directory,
  type Layout,
  type PackModule,
  readTensor,
  type Section,
  type Side,
  type Signature,
  type Superblock,
  type TaskBlob,
  type TaskMetadata,
  type TaskParameter,
  type TaskTerm,
  type TensorRef,
  VERSION,
  type Window,
} from "./format/format.ts";
export type { FileProgress, OnProgress, Progress, ReadyProgress } from "./progress.ts";
export type {
  AbortOptions,
  ByteSource,
  FetchOptions,
  ReadAllOptions,
  ReadOptions,
  Reads,
  SourceInput,
} from "./source.ts";
export type { Dtype, FloatDtype, QuantizedDtype } from "./tensor/dtypes.ts";
export type { Term } from "./tensor/term.ts";

/**
 * Loads the bases, finds the adapted weights in the base model and checks that it is the right one.
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model
 * @throws BackendError when the backend asked for cannot start or there is not enough memory
 * @example
 * const runtime = await createRuntime(pack, { base: "model.safetensors" });
 * await runtime.switchTask("sst2");
 * const { data } = runtime.weight("bert.encoder.layer.0.attention.self.query");
 */
export async function createRuntime(pack: Pack, options: RuntimeOptions = {}): Promise<Runtime> {
  checkPack("createRuntime", pack);
  checkOptions("createRuntime", options, [
    ...(["base", "mode", "policy", "names", "anyBase", "ignore", "modules", "signal"] as const),
    ...(["backend", "wasm"] as const),
    ...FETCH_OPTIONS,
  ]);
  return startRuntime(pack, options, async (base) => (await import("./core/open-base.ts")).openHost(base, options));
}

/**
 * `eigenlora`: open a pack, put it on a base model, switch tasks. The run-time half; packing is `eigenlora/build`.
 */

export type { DeviceBuffer, DeviceHandle } from "./backends/backend.ts";
export type { BaseInput, DeviceTensor, Parameter, Tensor, Transaction, View, WeightHost } from "./base/host.ts";
export {
  AdapterError,
  BackendError,
  BaseMismatchError,
  EigenLoraError,
  FormatError,
  SourceError,
  TaskError,
} from "./errors.ts";
export type { Layout, PackModule, TaskMetadata } from "./format/format.ts";
export { type OpenOptions, openPack, Pack, type TaskInfo } from "./pack/pack.ts";
export { createRuntime, type RuntimeOptions } from "./runtime/create.ts";
export {
  type ApplyOptions,
  type MemoryReport,
  Runtime,
  type SwitchOptions,
  type SwitchReport,
  type Term,
} from "./runtime/runtime.ts";
export type { Selection } from "./runtime/selection.ts";
export type { ByteSource, FetchOptions, ReadOptions, SourceInput } from "./source.ts";
export type { Dtype, FloatDtype } from "./tensor/dtypes.ts";
export { VERSION } from "./version.ts";

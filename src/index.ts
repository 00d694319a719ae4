/**
 * `eigenlora`: open a pack, put it on a base model, switch tasks. The run-time half; packing is `eigenlora/build`.
 */
export { openPack, Pack, type OpenOptions, type TaskInfo } from "./pack/pack.ts";
export type { PackModule } from "./format/format.ts";
export { createRuntime, type RuntimeOptions } from "./runtime/create.ts";
export {
  Runtime,
  type MemoryReport,
  type SwitchOptions,
  type SwitchReport,
  type Term,
} from "./runtime/runtime.ts";
export type { Selection } from "./runtime/selection.ts";
export type { DeviceBuffer, DeviceHandle } from "./backends/backend.ts";
export type { BaseInput, DeviceTensor, Parameter, Tensor, Transaction, View, WeightHost } from "./base/host.ts";
export type { ByteSource, FetchOptions, ReadOptions, SourceInput } from "./source.ts";
export type { Layout, TaskMetadata } from "./format/format.ts";
export type { FloatType, TensorType } from "./tensor/dtypes.ts";
export {
  AdapterError,
  BackendError,
  BaseMismatchError,
  EigenLoraError,
  FormatError,
  SourceError,
  TaskError,
} from "./errors.ts";
export { VERSION } from "./version.ts";

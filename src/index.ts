/**
 * `eigenlora`: open a pack, put it on a base model, switch tasks. The run-time half; packing is `eigenlora/build`.
 */

export type { DeviceBuffer, DeviceHandle } from "./backends/backend.ts";
export type {
  BaseInput,
  CpuView,
  DeviceTensor,
  Parameter,
  Tensor,
  Transaction,
  View,
  WeightHost,
} from "./base/host.ts";
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
export type { MemoryReport, SwitchReport } from "./runtime/report.ts";
export { type ApplyOptions, type ModuleTerm, Runtime, type RuntimeSwitchReport } from "./runtime/runtime.ts";
export type { Selection, SwitchOptions } from "./runtime/selection.ts";
export type { ByteSource, FetchOptions, ReadOptions, SourceInput } from "./source.ts";
export type { Dtype, FloatDtype } from "./tensor/dtypes.ts";
export type { Term } from "./tensor/term.ts";
export { VERSION } from "./version.ts";

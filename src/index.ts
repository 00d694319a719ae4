/**
 * `eigenlora`: open a pack, put it on a base model, switch tasks. The run-time half; packing is `eigenlora/build`.
 */

export type { DeviceBuffer, DeviceHandle, Owner } from "./backends/backend.ts";
export type { BackendOptions } from "./backends/select.ts";
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
  TrustError,
} from "./errors.ts";
export type {
  BasisDescription,
  Coefficients,
  Directory,
  Layout,
  PackModule,
  Section,
  Side,
  Signature,
  Superblock,
  TaskBlob,
  TaskMetadata,
  TaskParameter,
  TaskTerm,
  TensorRef,
  Window,
} from "./format/format.ts";
export type { PublicKey } from "./pack/keys.ts";
export { type Bases, type OpenOptions, openPack, Pack } from "./pack/pack.ts";
export type { ModuleFilter } from "./pack/part.ts";
export type { TaskInfo } from "./pack/task-info.ts";
export type { TaskTrust, TrustOptions } from "./pack/trust.ts";
export { createRuntime, type RuntimeOptions } from "./runtime/create.ts";
export type { MemoryReport, RuntimeSwitchReport, SwitchReport } from "./runtime/report.ts";
export { type ApplyOptions, Runtime } from "./runtime/runtime.ts";
export type { Selection, SwitchOptions } from "./runtime/selection.ts";
export type { ModuleTerm } from "./runtime/terms.ts";
export type { ByteSource, FetchOptions, ReadOptions, Reads, SourceInput } from "./source.ts";
export type { Dtype, FloatDtype, QuantizedDtype } from "./tensor/dtypes.ts";
export type { Term } from "./tensor/term.ts";
export { VERSION } from "./version.ts";

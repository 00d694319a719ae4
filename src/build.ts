/**
 * `eigenlora/build`: from adapters to packs and back, in any JavaScript runtime. Not for run-time bundles. Adapters in
 * folders are read by `eigenlora/node`.
 */
export type {
  Adapter,
  AdapterFile,
  AdapterModule,
  BasedAdapterFile,
  BaseFacts,
  Exportable,
  ModuleShape,
  SavedTensor,
} from "./adapters/adapter.ts";
export { diffusersFile, readDiffusers } from "./adapters/diffusers.ts";
export { ggufFile, readGguf } from "./adapters/gguf.ts";
export { kohyaFile, readKohya } from "./adapters/kohya.ts";
export { readMlx } from "./adapters/named-lora.ts";
export { onnxAdapterFile, readOnnxAdapter } from "./adapters/onnx-adapter.ts";
export { type PeftFiles, peftFiles, readPeft } from "./adapters/peft.ts";
export { type ReadTaskFileOptions, readTaskFile } from "./core/read-task-file.ts";
export type { TaskBasis } from "./core/task-file.ts";
export type { ComponentSelection } from "./extract/components.ts";
export { type Append, encodeTaskFile, type Sign, type TaskToWrite } from "./format/encode.ts";
export type { ParameterRole, TaskEntry, TaskFile } from "./format/format.ts";
export { type ProjectAdaptersOptions, type ProjectedAdapter, projectAdapters } from "./pack/add.ts";
export { type Built, buildPack } from "./pack/build.ts";
export { taskAdapter } from "./pack/expand.ts";
export type { BuildOptions } from "./pack/recipe.ts";
export type { BuildReport, SharedReport, TaskLoss } from "./pack/report.ts";
export type { Goal, Judge, PerTask, SearchOptions, Tried } from "./pack/search.ts";
export { type SearchReport, searchPack } from "./pack/search.ts";
export { createSigner, planAppend, planSignature, type SigningKey, signTaskFile } from "./pack/write.ts";
export type { Dtypes } from "./tensor/dtypes.ts";
export type { SafetensorsEntry } from "./tensor/safetensors.ts";
export type { OnWork, WorkProgress } from "./work.ts";

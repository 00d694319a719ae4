/**
 * `eigenlora/build`: from adapters to packs and back, in any JavaScript runtime. Not for run-time bundles. Adapters in folders are
 * read by `eigenlora/node`.
 */
export type { Adapter, AdapterModule, ModuleShape, SavedTensor } from "./adapters/adapter.ts";
export { type BaseFacts, factsOfConfig } from "./adapters/base-facts.ts";
export { type DiffusersFiles, readDiffusers } from "./adapters/diffusers.ts";
export { peftFiles } from "./adapters/export.ts";
export { ggufFile } from "./adapters/export-gguf.ts";
export { onnxAdapterFile } from "./adapters/export-onnx-adapter.ts";
export { diffusersFile, kohyaFile } from "./adapters/export-pipeline.ts";
export type { Exportable } from "./adapters/factors.ts";
export { type GgufFiles, readGguf } from "./adapters/gguf.ts";
export { type KohyaFiles, readKohya } from "./adapters/kohya.ts";
export { type MlxFiles, readMlx } from "./adapters/mlx.ts";
export { type OnnxAdapterFiles, readOnnxAdapter } from "./adapters/onnx-adapter.ts";
export { type PeftFiles, readPeft } from "./adapters/peft.ts";
export { type OpenSafetensors, openSafetensors } from "./adapters/safetensors.ts";
export { partByGain, readScores, type Score, type Scores } from "./adapters/scores.ts";
export type { Allocation, PrivateChoice } from "./extract/allocation.ts";
export { extractModule, type ModuleExtraction, type ModuleStack } from "./extract/extract.ts";
export type { Products, Tridiagonal } from "./extract/linalg.ts";
export type {
  BasisMode,
  Centering,
  ComponentSelection,
  ExtractOptions,
  Gauge,
  ProjectOptions,
} from "./extract/options.ts";
export {
  type ModuleLoss,
  type ModuleMember,
  type ModuleSpace,
  measureModule,
  openModule,
  type ProjectedTask,
  projectModule,
  type TaskCoefficients,
} from "./extract/project.ts";
export type { SideBasis } from "./extract/side.ts";
export type { StoredBasis, Subspace } from "./extract/subspace.ts";
export type { Summary } from "./extract/summary.ts";
export { encodeTaskFile } from "./format/encode.ts";
export type { ParameterRole, Signature, TaskEntry } from "./format/format.ts";
export { type Append, placeOf, type Sign, type TaskPlace, type TaskToWrite } from "./format/layout.ts";
export { type ProjectedAdapter, projectAdapters } from "./pack/add.ts";
export { type Built, buildPack } from "./pack/build.ts";
export { taskAdapter } from "./pack/expand.ts";
export type { Goal, Judge, PerTask, ScoreGoal, SearchOptions, Tried } from "./pack/goal.ts";
export { createSigner, type SigningKey } from "./pack/keys.ts";
export type { BuildOptions } from "./pack/recipe.ts";
export {
  type BuildReport,
  breakEven,
  type TaskLoss,
} from "./pack/report.ts";
export { type SearchReport, searchPack } from "./pack/search.ts";
export { type BasisOptions, type BasisReport, buildBasis } from "./pack/shard/basis.ts";
export {
  adapterStatistics,
  type CountedAdapter,
  mergeStatistics,
  type Statistics,
  type StatisticsModule,
} from "./pack/shard/statistics.ts";
export { openStatistics, type StatisticsPart, writeStatistics } from "./pack/shard/statistics-part.ts";
export {
  type AssembledPack,
  assemblePack,
  openTasks,
  projectTasks,
  type TaskDtypes,
  type TaskPart,
} from "./pack/shard/tasks.ts";
export type { Way } from "./pack/ways.ts";
export { freshPack, planAppend, planSignature, signTaskFile, tasksOf } from "./pack/write.ts";
export type { Dtypes } from "./tensor/dtypes.ts";
export type { SafetensorsFile, SafetensorsTensor } from "./tensor/safetensors.ts";
export { type SafetensorsEntry, writeSafetensors } from "./tensor/safetensors-writer.ts";
export type { TensorFile, TensorInfo } from "./tensor/tensor-file.ts";
export type { Term } from "./tensor/term.ts";

/**
 * `eigenlora/build`: from adapters to packs and back. Not for run-time bundles.
 */
export type { Adapter, AdapterModule, Factors, SavedTensor } from "./adapters/adapter.ts";
export { findAdapters, readAdapters, type AdapterLocation } from "./adapters/folder.ts";
export { peftFiles, type Exportable } from "./adapters/export.ts";
export { readPeft } from "./adapters/peft.ts";
export { partByGain, readScores, type Score, type Scores } from "./adapters/scores.ts";
export { extractModule, measureModule, openModule, projectModule } from "./extract/extract.ts";
export type {
  ExtractOptions,
  Gauge,
  Mode,
  ModuleExtraction,
  ModuleMember,
  ModuleStack,
  Selection,
} from "./extract/extract.ts";
export {
  breakEven,
  buildPack,
  projectAdapter,
  projectAdapters,
  type BuildOptions,
  type BuildReport,
  type ProjectedAdapter,
  type StorageTypes,
} from "./pack/build.ts";
export { buildAuto, packWithin, type AutoOptions, type AutoReport, type Built, type Criterion, type Judge, type Tried } from "./pack/auto.ts";
export { encodeTaskFile } from "./format/encode.ts";
export { expandTerm, taskAdapter } from "./pack/expand.ts";
export { layoutAppend, layoutFresh, type Append, type TaskToWrite } from "./format/layout.ts";
export { selectComponents, type Evaluation, type Family, type Selected, type SelectOptions } from "./pack/select.ts";
export { buildBasis, type BasisOptions, type BasisReport } from "./pack/shard/basis.ts";
export { adapterStatistics, mergeStatistics, openStatistics, writeStatistics, type Statistics, type StatisticsPart } from "./pack/shard/statistics.ts";
export { assemblePack, openTasks, projectTasks, type AssembledPack, type TaskLoss, type TaskPart } from "./pack/shard/tasks.ts";
export { writeSafetensors, type SafetensorsEntry } from "./tensor/safetensors-writer.ts";
export { openSafetensors, type SafetensorsFile } from "./tensor/safetensors.ts";

/**
 * `eigenlora/build`: from adapters to packs and back. Not for run-time bundles.
 */
export type { Adapter, AdapterModule, Factors, SavedTensor } from "./adapters/adapter.ts";
export { type Exportable, peftFiles } from "./adapters/export.ts";
export { type AdapterLocation, findAdapters, readAdapters } from "./adapters/folder.ts";
export { readPeft } from "./adapters/peft.ts";
export { partByGain, readScores, type Score, type Scores } from "./adapters/scores.ts";
export type {
  BasisMode,
  ComponentSelection,
  ExtractOptions,
  Gauge,
  ModuleExtraction,
  ModuleMember,
  ModuleStack,
} from "./extract/extract.ts";
export { extractModule, measureModule, openModule, projectModule } from "./extract/extract.ts";
export { encodeTaskFile } from "./format/encode.ts";
export { type Append, layoutAppend, layoutFresh, type TaskToWrite } from "./format/layout.ts";
export {
  type AutoOptions,
  type AutoReport,
  type Built,
  buildAuto,
  type Criterion,
  type Judge,
  packWithin,
  type Tried,
} from "./pack/auto.ts";
export {
  type BuildOptions,
  type BuildReport,
  breakEven,
  buildPack,
  type Dtypes,
  type ProjectedAdapter,
  projectAdapters,
} from "./pack/build.ts";
export { expandTerm, taskAdapter } from "./pack/expand.ts";
export { type Evaluation, type Family, type Selected, type SelectOptions, selectComponents } from "./pack/select.ts";
export { type BasisOptions, type BasisReport, buildBasis } from "./pack/shard/basis.ts";
export {
  adapterStatistics,
  mergeStatistics,
  openStatistics,
  type Statistics,
  type StatisticsPart,
  writeStatistics,
} from "./pack/shard/statistics.ts";
export {
  type AssembledPack,
  assemblePack,
  openTasks,
  projectTasks,
  type TaskLoss,
  type TaskPart,
} from "./pack/shard/tasks.ts";
export { openSafetensors, type SafetensorsFile } from "./tensor/safetensors.ts";
export { type SafetensorsEntry, writeSafetensors } from "./tensor/safetensors-writer.ts";

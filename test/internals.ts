/**
 * What tests reach inside the built package. Everything else in test/ speaks to its public entries and its command, which
 * structure.test.ts checks: when a file moves, this list changes and no test does. Each group says why the public way is not enough.
 */

// Tools of the tests: what makes and reads material. Each is tested itself, against numpy, PEFT or SPEC.md.

export { openHost } from "../dist/src/core/open-base.js";
export { openSource } from "../dist/src/open-source.js";
export { atOnce } from "../dist/src/pace.js";
export { isCodedPack } from "../dist/src/pack/write.js";
export * as dtypes from "../dist/src/tensor/dtypes.js";
export {
  DTYPES,
  decodeIntegers,
  decodeScales,
  decodeTensor,
  encodeTensor,
  f16ToF32,
  f32ToBf16,
  f32ToF16,
} from "../dist/src/tensor/dtypes.js";
export { normal, shuffle, uniform } from "../dist/src/tensor/random.js";
export { openSafetensors, type SafetensorsEntry, writeSafetensors } from "../dist/src/tensor/safetensors.js";
export { transpose } from "../dist/src/tensor/tensor-file.js";
export { toHex } from "../dist/src/text.js";

// Bytes of SPEC.md, written wrongly on purpose or against the specification's own words.

export { parseTaskFile } from "../dist/src/core/task-file.js";
export { Trust } from "../dist/src/core/trust.js";
export {
  type Coder,
  code,
  DISTANCE,
  isCoded,
  LENGTH,
  LITERALS,
  MORE,
  mostDecoded,
  SHAPE,
} from "../dist/src/format/coded.js";
export { wasmFloats, wasmWork } from "../dist/src/format/coded-wasm.js";
export { decodeSection } from "../dist/src/format/decode-coded.js";
export { parseTask } from "../dist/src/format/directory.js";
export {
  encodeBasis,
  encodeSignedTaskFile,
  encodeSuperblock,
  encodeTask,
  layoutAppend,
  layoutSigned,
  placeOf,
  type Sign,
  streamFresh,
  type TaskToWrite,
} from "../dist/src/format/encode.js";
export { Encoder, encodeSection } from "../dist/src/format/encode-coded.js";
export { crc32c, integrityOf, sha256 } from "../dist/src/format/fields.js";
export { encodedTensor, readTensor, sharedBases } from "../dist/src/format/format.js";

// Files of other projects that packs are never made from in one call, or whose readers see through a folder only.

export { unflatten } from "../dist/src/adapters/kohya.js";
export { openOnnxAdapter } from "../dist/src/adapters/onnx-adapter.js";
export { openGguf } from "../dist/src/tensor/gguf.js";

// Names that no server would be asked by.

export { type HubName, hubName } from "../dist/src/http/hub-name.js";

// Every backend on the same numbers, and kernels that the chosen backend would hide.

export type { Backend, Block, FoldJob, Slice } from "../dist/src/backends/backend.js";
export { createJsBackend } from "../dist/src/backends/js.js";
export { createBackend } from "../dist/src/backends/select.js";
export { createHeap, createWasmBackend, WASM_VARIANTS, type WasmVariant } from "../dist/src/backends/wasm.js";
export { createWebgpuBackend } from "../dist/src/backends/webgpu.js";
export { Faults } from "../dist/src/backends/webgpu-recorder.js";

// Where a weight is: cases that no model of the tests has.

export { NamePatterns } from "../dist/src/adapters/peft-config.js";
export { NameMatcher, viewValues, WeightResolver } from "../dist/src/core/base.js";
export { AliasMatcher, findWeight, locate } from "../dist/src/core/mismatch.js";
export { memoryHost } from "../dist/src/core/open-base.js";

// Linear algebra against its definitions. A pack shows only what all of it comes to.

export {
  type Components,
  columnMeans,
  coordinates,
  type ExtractOptions,
  extractModule,
  type ModuleExtraction,
  type ModuleStack,
  principalComponents,
  type SideBasis,
} from "../dist/src/extract/components.js";
export { balance, deltaError, type Pair, relative } from "../dist/src/extract/factors.js";
export {
  backwardSolve,
  centred,
  cholesky,
  forwardSolve,
  gram,
  lq,
  multiplyTransposed,
  PLAIN,
  type Products,
  ROUNDING,
  rowSquares,
  svd,
  symmetricEigen,
  transpose as transposeMatrix,
} from "../dist/src/extract/linalg.js";
export {
  type Gauge,
  type ModuleMember,
  measureModule,
  openModule,
  projectModule,
} from "../dist/src/extract/subspace.js";
export { summaryKind } from "../dist/src/pack/shard/statistics.js";

// Packing with its parts exchanged: threads, products, scratch files, memory and searches that must not change a byte.

export { openThread } from "../dist/src/extract/threads-node.js";
export { createWasmProducts } from "../dist/src/extract/wasm-products.js";
export { expandTerm } from "../dist/src/pack/expand.js";
export { completeDtypes } from "../dist/src/pack/recipe.js";
export { lossesOf } from "../dist/src/pack/report.js";
export { type Steps, search, Unreachable, withinError } from "../dist/src/pack/seek.js";
export { DEFAULT_ERROR } from "../dist/src/pack/tasks.js";
export { allOf, freshPack } from "../dist/src/pack/write.js";

// What the command line makes packs of: parts of machines.

export { assemblePack, type BasisOptions, buildBasis, openTasks, projectTasks } from "../dist/src/pack/shard/basis.js";
export {
  adapterStatistics,
  mergeStatistics,
  openStatistics,
  type Statistics,
  type StatisticsPart,
  toBytes,
  writePart,
  writeStatistics,
} from "../dist/src/pack/shard/statistics.js";

// ONNX graphs, made and changed node by node.

export { readVector } from "../dist/src/onnx/dequantize.js";
export { inject, type TaskInput } from "../dist/src/onnx/inject.js";
export { type AdaptedHead, type AdaptedLayer, endOf, linearsOf } from "../dist/src/onnx/linear.js";
export { indexGraph, type OnnxModel, parseModel } from "../dist/src/onnx/model.js";
export { findParameters, matrixShape, type OnnxParameter } from "../dist/src/onnx/modules.js";
export { type Attributes, checkInjectable, makeFloats, makeInts, makeNode, makeValue } from "../dist/src/onnx/nodes.js";
export { takeApart } from "../dist/src/onnx/packed.js";
export {
  AttributeProtoSchema,
  create,
  DimensionSchema,
  fromBinary,
  type GraphProto,
  GraphProtoSchema,
  type ModelProto,
  ModelProtoSchema,
  type NodeProto,
  NodeProtoSchema,
  type TensorProto,
  TensorProtoSchema,
  toBinary,
  ValueInfoProtoSchema,
} from "../dist/src/onnx/protobuf.js";
export { type ModelFile, readModel } from "../dist/src/onnx/read.js";
export { replaceByFile, type WeightInput } from "../dist/src/onnx/replaceable.js";
export { skeletonOf } from "../dist/src/onnx/skeleton.js";
export { readTensor as readOnnxTensor } from "../dist/src/onnx/tensors.js";
export { readLinearWeight } from "../dist/src/onnx/weights.js";
export { detachWeights, embedWeights } from "../dist/src/onnx/write.js";

// A session's decisions, without a runtime that would have to meet each case.

export { optionsFor, whileAlive } from "../dist/bindings/ort-engine.js";
export { CacheWatch } from "../dist/src/session/caches.js";
export { planSession, prepareModel } from "../dist/src/session/prepare.js";
export { type Survey, surveyModel } from "../dist/src/session/survey.js";
export type { Trainable } from "../dist/src/session/training.js";

// Gradients rule by rule, and training step by step, against PyTorch.

export { flattenScales, unpackProducts } from "../dist/src/autodiff/block-weights.js";
export { DEFINITIONS, shadowOf } from "../dist/src/autodiff/definitions.js";
export { Emitter } from "../dist/src/autodiff/emit.js";
export {
  buildTrainingGraph,
  differentiate,
  type TrainingGraph,
  type TrainingGraphOptions,
} from "../dist/src/autodiff/graph.js";
export { type ProbedPath, probePath } from "../dist/src/autodiff/path.js";
export { RULES } from "../dist/src/autodiff/rules.js";
export type { ShapeProbe } from "../dist/src/autodiff/shapes.js";
export { Problems } from "../dist/src/autodiff/shapes.js";
export { fixInnerHeads } from "../dist/src/session/training.js";
export { modelBase } from "../dist/src/train/pack-by-answers.js";
export { Adam } from "../dist/src/train/state.js";
export { createBatcher, MeanDivergence, toBatches } from "../dist/src/train/supervision.js";
export { type SharedBasis, sharedRows, type TrainedModule, TrainedTerms } from "../dist/src/train/trained-terms.js";
export { readDonor, startState } from "../dist/src/train/trainer.js";

// Small things with many cases.

export { checkChoice, nearest } from "../dist/src/arguments.js";
export { Queue } from "../dist/src/queue.js";
export { fromBase64, fromUtf8, toBase64, toUtf8 } from "../dist/src/text.js";

// The command line in this process, with its disk, clock or output replaced.

export { downloading, Run } from "../dist/src/cli/command.js";
export { openScratch, takeLock, writeTogether, writeWhole } from "../dist/src/cli/files.js";
export { openModel, readExamples, readQuestions } from "../dist/src/cli/model.js";
export { createOutput, leftOf, lossTable, paragraph, printable, smaller, timeLeft } from "../dist/src/cli/output.js";
export { runProgram } from "../dist/src/cli/program.js";

/** Where commands lie as modules, for processes that run one of them alone, and files that a test replaces the disk of. */
export const COMMAND_LINE: URL = new URL("../dist/src/cli/", import.meta.url);
export const FILES = "../dist/src/cli/files.js";
export type Files = typeof import("../dist/src/cli/files.js");

/** Files whose text is checked in the installed package: a library's licence, and types that every entry brings along. */
export const MSGPACKR = "dist/src/format/msgpackr.js";
export const GLOBALS = "dist/src/globals.d.ts";

/** A file that a bundle is made of, to weigh it alone. */
export const WEBGPU = "dist/src/backends/webgpu.js";

/** The decoder as a module of its own that has compiled nothing yet: what engines refuse to compile is tried on it. */
export const freshDecoder = async (): Promise<typeof import("../dist/src/format/coded-wasm.js")> =>
  import(`../dist/src/format/coded-wasm.js?${Math.random()}`);

/** Reaches inside the built package for tests: oNNX graphs made and changed node by node, and a session's decisions. */

export { optionsFor, whileAlive } from "../../../dist/bindings/ort-engine.js";
export { type Survey, surveyModel } from "../../../dist/src/cli/check.js";
export { readVector } from "../../../dist/src/onnx/dequantize.js";
export { inject, type TaskInput } from "../../../dist/src/onnx/inject.js";
export { type AdaptedHead, type AdaptedLayer, endOf, linearsOf } from "../../../dist/src/onnx/linear.js";
export { indexGraph, type OnnxModel, parseModel } from "../../../dist/src/onnx/model.js";
export { findParameters, matrixShape, type OnnxParameter } from "../../../dist/src/onnx/modules.js";
export * from "../../../dist/src/onnx/nodes.js";
export * from "../../../dist/src/onnx/protobuf.js";
export { type ModelFile, readModel, skeletonOf } from "../../../dist/src/onnx/read.js";
export type { WeightInput } from "../../../dist/src/onnx/replaceable.js";
export { externalFiles, readTensor as readOnnxTensor } from "../../../dist/src/onnx/tensors.js";
export { readLinearWeight } from "../../../dist/src/onnx/weights.js";
export { detachWeights } from "../../../dist/src/onnx/write.js";
export { CacheWatch } from "../../../dist/src/session/caches.js";
export { planSession, prepareModel } from "../../../dist/src/session/prepare.js";
export type { Trainable } from "../../../dist/src/session/training.js";
export { fixInnerHeads } from "../../../dist/src/session/training.js";

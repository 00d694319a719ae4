/**
 * Reaches inside the built package for tests: readers of adapters, linear algebra, and packing with its parts
 * exchanged.
 */

export { FORMATS } from "../../../dist/src/adapters/formats.js";
export { unflatten } from "../../../dist/src/adapters/kohya.js";
export { openOnnxAdapter } from "../../../dist/src/adapters/onnx-adapter.js";
export { NamePatterns } from "../../../dist/src/adapters/peft-config.js";
export * from "../../../dist/src/extract/components.js";
export { balance, deltaError, type Pair, relative } from "../../../dist/src/extract/factors.js";
export * from "../../../dist/src/extract/linalg.js";
export { transpose as transposeMatrix } from "../../../dist/src/extract/linalg.js";
export { openThread } from "../../../dist/src/extract/threads-node.js";
export { createWasmProducts } from "../../../dist/src/extract/wasm-products.js";
export { renamedHost } from "../../../dist/src/pack/build.js";
export { expandTerm } from "../../../dist/src/pack/expand.js";
export { completeDtypes } from "../../../dist/src/pack/recipe.js";
export { lossesOf } from "../../../dist/src/pack/report.js";
export { search } from "../../../dist/src/pack/seek.js";
export * from "../../../dist/src/pack/shard/basis.js";
export * from "../../../dist/src/pack/shard/statistics.js";
export { DEFAULT_ERROR } from "../../../dist/src/pack/tasks.js";
export { allOf, freshPack, isCodedPack } from "../../../dist/src/pack/write.js";

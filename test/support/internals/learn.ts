/** Reaches inside the built package for tests: gradients rule by rule, and training step by step. */

export { flattenScales, unpackProducts } from "../../../dist/src/autodiff/block-weights.js";
export { DEFINITIONS, shadowOf } from "../../../dist/src/autodiff/definitions.js";
export { Emitter } from "../../../dist/src/autodiff/emit.js";
export * from "../../../dist/src/autodiff/graph.js";
export { type ProbedPath, probePath } from "../../../dist/src/autodiff/path.js";
export { RULES } from "../../../dist/src/autodiff/rules.js";
export type { ShapeProbe } from "../../../dist/src/autodiff/shapes.js";
export { Problems } from "../../../dist/src/autodiff/shapes.js";
export { modelBase } from "../../../dist/src/train/pack-by-answers.js";
export { Adam } from "../../../dist/src/train/state.js";
export { labelSupervision, MeanDivergence, toBatches } from "../../../dist/src/train/supervision.js";
export * from "../../../dist/src/train/trained-terms.js";
export { readDonor, startState } from "../../../dist/src/train/trainer.js";

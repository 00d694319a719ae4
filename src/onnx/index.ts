/**
 * `eigenlora/onnx`: ONNX models as base models. Reading only; running them is the bindings' part.
 */

export type { Parameter, View, WeightHost } from "../core/base.ts";
export type { ModelOptions } from "./read.ts";
export { openOnnxHost } from "./weights.ts";

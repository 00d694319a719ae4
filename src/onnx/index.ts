/**
 * `eigenlora/onnx`: ONNX models as base models. Reading only; running them is the bindings' part.
 */

export type { Parameter, View, WeightHost } from "../core/base.ts";
export { openOnnxHost } from "./host.ts";
export type { ModelOptions } from "./read.ts";

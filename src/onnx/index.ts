/**
 * `eigenlora/onnx`: ONNX models as base models. Reading only; running them is the bindings' part.
 */
export { openOnnxHost, type OnnxHostOptions } from "./host.ts";
export type { Parameter, View, WeightHost } from "../runtime/host.ts";

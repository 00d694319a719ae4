/**
 * Biases that tasks bring and the model lacks. torch's optimiser drops a bias of zeros, as a fresh classifier has: a Gemm without C
 * is left, or a MatMul without Add. Loaded where there is one.
 */
import type { GraftBias } from "../onnx/adapted.ts";
import { type Linear, linearsOf, NotLinear, producer } from "../onnx/linear.ts";
import { attribute, type OnnxModel } from "../onnx/model.ts";
import { matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import type { GraphProto } from "../onnx/onnx_pb.ts";

/**
 * The places where tasks add such a bias, and the base adds nothing.
 * @param name of the bias
 * @param weight of the same layer
 * @returns undefined where the weight is no linear layer's, or something is added to its result that may be the bias
 */
export function droppedBias(model: OnnxModel, name: string, weight: OnnxParameter): GraftBias | undefined {
  const linears = linearsOf(model, weight);
  const [size] = matrixShape(weight) ?? [];
  if (size === undefined || linears instanceof NotLinear) return undefined;
  if (linears.some((linear) => addsVector(model, linear, size))) return undefined;
  return { name, size, type: linears[0]!.type, places: linears.map(({ graph, node }) => ({ graph, node })) };
}

/** Operators that give the numbers of their first input on, in another shape or type. */
const RESHAPES = new Set(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]);

/** Operators that add a vector, as onnxruntime fuses them: by their names, or behind so many inputs. */
const FUSED_SUMS = /^(Bias|FastGelu$)/;
const FUSED_NORMS: Readonly<Record<string, number>> = {
  SkipLayerNormalization: 4,
  SkipSimplifiedLayerNormalization: 3,
};

/**
 * Whether a constant that may be a bias is added to a layer's result, by its own node or one behind it, whatever has become of
 * the shape in between.
 * @param size of the bias
 */
function addsVector(model: OnnxModel, { node, addsBias }: Linear, size: number): boolean {
  if (addsBias) return true;
  const seen = new Set(node.output.slice(0, 1));
  // Grows while it is walked through.
  for (const value of seen) {
    for (const { node: next, graph } of model.graph.consumers.get(value) ?? []) {
      const { opType, input, output } = next;
      if (RESHAPES.has(opType) && input[0] === value && output[0]) seen.add(output[0]);
      const first = opType === "Add" || opType === "Sub" || FUSED_SUMS.test(opType) ? 0 : FUSED_NORMS[opType];
      const others = first === undefined ? [] : input.slice(first).filter((other) => other !== value);
      if (others.some((other) => constantSize(model, graph, other) === size)) return true;
    }
  }
  return false;
}

/** How many numbers a constant has; undefined where a value is none. */
function constantSize(model: OnnxModel, graph: GraphProto, value: string): number | undefined {
  const seen = new Set<string>();
  for (let at = value; !seen.has(at); ) {
    seen.add(at);
    const made = producer(model, graph, at);
    const tensor =
      model.graph.initializers.get(at) ??
      model.graph.scopes.get(graph)?.initializers.get(at) ??
      (made?.opType === "Constant" ? attribute(made, "value")?.t : undefined);
    if (tensor) return tensor.dims.reduce((a, b) => a * Number(b), 1);
    if (made?.opType !== "DequantizeLinear" && !RESHAPES.has(made?.opType ?? "")) return undefined;
    at = made!.input[0] ?? "";
  }
  return undefined;
}

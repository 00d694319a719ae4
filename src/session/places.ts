/**
 * Where in a model what tasks bring beside their terms takes effect: biases, those included that the exporter has dropped, and rows
 * of tables.
 */
import type { GraftBias, GraftRows } from "../onnx/graft.ts";
import { addsVector, FLOAT, FLOAT16, linearsOf, NotLinear } from "../onnx/linear.ts";
import type { OnnxModel, Use } from "../onnx/model.ts";
import { matrixShape, type OnnxParameter } from "../onnx/modules.ts";

/** A bias that the model has; undefined where it cannot be added to. */
export function biasOf(name: string, parameter: OnnxParameter): GraftBias | undefined {
  const [size] = parameter.shape;
  if (parameter.shape.length !== 1 || size === undefined) return undefined;
  const places = parameter.uses.filter(addsLastDimension);
  if (places.length === 0 || places.length < parameter.uses.length) return undefined;
  return { name, size, type: typeWhereUsed(parameter), places };
}

/** A table of an embedding; undefined where it is used as something else. */
export function tableOf(name: string, parameter: OnnxParameter): GraftRows | undefined {
  const places = parameter.uses.filter(({ node, input }) => node.opType === "Gather" && input === 0);
  if (parameter.layout !== "embedding" || places.length === 0 || places.length < parameter.uses.length)
    return undefined;
  return { name, width: parameter.shape[1]!, type: typeWhereUsed(parameter), places };
}

/**
 * A bias that the exporter has dropped. torch's optimiser does that to a bias of zeros, as a fresh classifier has: a Gemm without C
 * is left, or a MatMul without Add. Tasks add their own behind it.
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

/** Whether a vector is added to the last dimension of what the node makes. */
function addsLastDimension({ node, input }: Use): boolean {
  if (node.opType === "Add") return true;
  const at: Record<string, number> = { Gemm: 2, LayerNormalization: 2, MatMulNBits: 5 };
  return at[node.opType] === input;
}

/** Of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}

/** Where in a model what tasks bring beside their terms takes effect: biases, and rows of tables. */
import type { GraftBias, GraftRows } from "../onnx/graft.ts";
import { FLOAT, FLOAT16 } from "../onnx/linear.ts";
import type { Use } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";

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

/** Whether a vector is added to the last dimension of what the node makes. */
function addsLastDimension({ node, input }: Use): boolean {
  if (node.opType === "Add") return true;
  const at: Record<string, number> = { Gemm: 2, LayerNormalization: 2, SkipLayerNormalization: 3, MatMulNBits: 5 };
  return at[node.opType] === input;
}

/** Of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}

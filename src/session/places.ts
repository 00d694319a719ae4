/** Where in a model what tasks bring beside their terms takes effect: biases, and rows of tables. */

import type { GraftBias, GraftRows } from "../onnx/adapted.ts";
import { SUMS } from "../onnx/claims.ts";
import { FLOAT, FLOAT16, origin } from "../onnx/linear.ts";
import type { OnnxModel, Use } from "../onnx/model.ts";
import { type OnnxParameter, partSize } from "../onnx/modules.ts";

/** A bias that the model has; undefined where it cannot be added to. */
export function biasOf(model: OnnxModel, name: string, parameter: OnnxParameter): GraftBias | undefined {
  const { slice, shape, uses } = parameter;
  if (shape.length !== 1) return undefined;
  const size = partSize(parameter);
  const places = uses.flatMap((use) => placeOfBias(model, use) ?? []);
  if (places.length === 0 || places.length < uses.length) return undefined;
  return { name, size, type: typeWhereUsed(parameter), places, ...(slice && { slice }) };
}

/** A table of an embedding; undefined where it is used as something else. */
export function tableOf(name: string, parameter: OnnxParameter): GraftRows | undefined {
  const places = parameter.uses.filter(({ node, input }) => node.opType === "Gather" && input === 0);
  if (parameter.layout !== "embedding" || places.length === 0 || places.length < parameter.uses.length)
    return undefined;
  return { name, width: parameter.shape[1]!, type: typeWhereUsed(parameter), places };
}

/** Inputs that are added to the last dimension of what the node makes. */
const LAST: Readonly<Record<string, number>> = {
  EmbedLayerNormalization: 6,
  Gemm: 2,
  LayerNormalization: 2,
  MatMulNBits: 5,
  SkipLayerNormalization: 3,
};

/** The node to whose result a change of the bias is added. */
function placeOfBias(model: OnnxModel, { node, input, graph }: Use): Pick<Use, "node" | "graph"> | undefined {
  if (node.opType === "Add" || LAST[node.opType] === input) return { node, graph };
  // Operators of onnxruntime's optimiser add it to their first input, and go on from there.
  const [before = ""] = node.input;
  const isAlone = SUMS[node.opType] === input && model.graph.consumers.get(before)?.length === 1;
  const made = isAlone ? origin(model, graph, before) : undefined;
  return made?.node.output[0] === before ? made : undefined;
}

/** Of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}

/**
 * Layers that tasks bring whole are trained with any number of outputs, one for each label. In a head of several layers that holds for
 * the last one only; the layers in front of it keep the model's number of outputs. Uses graphs and names only.
 */
import type { TaskInput } from "../onnx/adapted.ts";
import { nestedGraphs } from "../onnx/model.ts";
import type { GraphProto, NodeProto } from "../onnx/onnx_pb.ts";

/**
 * Fixes the number of outputs of inner layers of heads (those with another product behind them) in the inputs' dimensions, in place.
 * @param main the grafted graph
 * @param outputsOf number of outputs of the model's own layer, by module name
 */
export function fixInnerHeads(
  main: GraphProto,
  inputs: readonly TaskInput[],
  outputsOf: (module: string) => number | undefined,
): void {
  for (const { name, of, kind } of inputs) {
    const out = outputsOf(of);
    if (kind !== "headWeight" || out === undefined || !isMultiplied(main, name)) continue;
    for (const input of inputs)
      if (input.of === of && /^head/.test(input.kind)) (input.dims as (number | string)[])[2] = out;
  }
}

/** Whether another product follows the one with `weight`. */
function isMultiplied(main: GraphProto, weight: string): boolean {
  const reached = new Set<string>();
  const passes = (node: NodeProto): boolean => {
    const inside = nestedGraphs(node).flatMap((graph) => graph.node);
    const found = inside.some(passes);
    const own = node.input.includes(weight);
    const entering = [...node.input, ...inside.flatMap(({ output }) => output)];
    // Shape reads only how many outputs the weight has.
    if (node.opType === "Shape" || !(own || entering.some((value) => reached.has(value)))) return found;
    for (const value of node.output) reached.add(value);
    return found || (!own && /MatMul|Gemm|Conv/.test(node.opType));
  };
  return main.node.some(passes);
}

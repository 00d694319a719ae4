/**
 * Recognises GELU as exporters before opset 20 write it: x · (1 + erf(x/√2)) · ½ in five nodes. The derivative of the single operator
 * takes fewer passes over the elements than that of the five, and keeps only x.
 */
import type { Graph } from "../onnx/model.ts";
import { makeNode } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { Shapes } from "./shapes.ts";

/**
 * @param nodes in order
 * @returns the nodes with a Gelu in place of the last of each five, and without the other four; the graph stays as it is
 */
export function asGelu(
  nodes: readonly NodeProto[],
  { producers, consumers }: Graph,
  shapes: Shapes,
): readonly NodeProto[] {
  const outputs = new Map<NodeProto, NodeProto>();
  const inner = new Set<NodeProto>();
  const only = (value: string, opType: string): NodeProto | undefined => {
    const [use, ...more] = consumers.get(value) ?? [];
    return more.length === 0 && use?.node.opType === opType ? use.node : undefined;
  };
  /** The other operand where one equals this number. */
  const beside = (node: NodeProto | undefined, opType: string, number: number): string | undefined => {
    if (node?.opType !== opType) return undefined;
    const at = node.input.findIndex((value) => {
      const known = shapes.has(value) ? shapes.constant(value) : undefined;
      return known?.length === 1 && Math.abs(known[0]! / number - 1) < 1e-6;
    });
    return at < 0 || (opType === "Div" && at === 0) ? undefined : node.input[1 - at];
  };
  for (const erf of nodes.filter(({ opType }) => opType === "Erf")) {
    const scaled = producers.get(erf.input[0]!);
    const x = beside(scaled, "Div", Math.SQRT2) ?? beside(scaled, "Mul", Math.SQRT1_2);
    const add = only(erf.output[0]!, "Add");
    const product = beside(add, "Add", 1) === erf.output[0] ? only(add!.output[0]!, "Mul") : undefined;
    if (x === undefined || !product || only(scaled!.output[0]!, "Erf") === undefined) continue;
    const factor = product.input[product.input[0] === add!.output[0] ? 1 : 0]!;
    // The factor ½ stands in front or behind.
    const half = factor === x ? only(product.output[0]!, "Mul") : producers.get(factor);
    const last = factor === x ? half : product;
    const right =
      factor === x
        ? beside(half, "Mul", 0.5) === product.output[0]
        : beside(half, "Mul", 0.5) === x && only(factor, "Mul") === product;
    if (!right || !last) continue;
    outputs.set(last, makeNode("Gelu", last.name, [x], last.output[0]!));
    for (const node of [scaled!, erf, add!, product, half!]) if (node !== last) inner.add(node);
  }
  return nodes.filter((node) => !inner.has(node)).map((node) => outputs.get(node) ?? node);
}

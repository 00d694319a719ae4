/**
 * Values that the backward nodes need are kept from the forward run on, by a model that only answers too, and cannot be fused away.
 * So what is made of a kept value by a few cheap operators is made again where it is needed. Operators and names only.
 */
import type { Graph } from "../onnx/model.ts";
import { makeNode, PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";

/** One element in, one element out, next to nothing to do for it: the parts of GELU, SiLU and the like. */
const CHEAP = /^(Add|Sub|Mul|Div|Neg|Erf|Tanh|Sigmoid|Sqrt|Reciprocal|Exp|Pow)$/;

/** Operators between a kept value and what is made of it again. */
const LONGEST = 6;

/**
 * @param graph of the forward nodes
 * @param nodes the backward ones, in order; inputs are changed
 * @returns the nodes with those in front of them that make values again
 */
export function recompute(graph: Graph, nodes: readonly NodeProto[]): NodeProto[] {
  const place = new Map(graph.proto.node.map((node, at) => [node, at]));
  const own = new Set(nodes.flatMap(({ output }) => output));
  const captured = new Set(nodes.flatMap(({ input }) => input).filter((value) => !own.has(value)));
  const isConstant = (value: string): boolean =>
    graph.initializers.has(value) || graph.producers.get(value)?.opType === "Constant";
  /** The nodes that make a value of one kept before it, undefined where there are none. */
  const chain = (value: string, kept: ReadonlySet<string>): NodeProto[] | undefined => {
    const made: NodeProto[] = [];
    for (let at = value; made.length < LONGEST; ) {
      const node = graph.producers.get(at);
      const changing = node?.input.filter((input) => !isConstant(input)) ?? [];
      if (!node || !CHEAP.test(node.opType) || node.output.length > 1 || changing.length !== 1) return undefined;
      made.unshift(node);
      if (kept.has(changing[0]!)) return made;
      at = changing[0]!;
    }
    return undefined;
  };
  const order = (value: string): number => place.get(graph.producers.get(value)!) ?? -1;
  const kept = new Set<string>();
  const chains = new Map<string, NodeProto[]>();
  for (const value of [...captured].sort((a, b) => order(a) - order(b))) {
    const made = chain(value, kept);
    if (made) chains.set(value, made);
    else kept.add(value);
  }
  const again = (value: string): string => `${PREFIX}/again/${value}`;
  const done = new Set<string>();
  return nodes.flatMap((node) => {
    const first: NodeProto[] = [];
    for (const [i, input] of node.input.entries()) {
      for (const one of chains.get(input) ?? []) {
        const output = one.output[0]!;
        if (done.has(output)) continue;
        done.add(output);
        const inputs = one.input.map((value) => (done.has(value) ? again(value) : value));
        const copy = makeNode(one.opType, again(output), inputs, again(output));
        copy.attribute = one.attribute;
        first.push(copy);
      }
      if (chains.has(input)) node.input[i] = again(input);
    }
    return [...first, node];
  });
}

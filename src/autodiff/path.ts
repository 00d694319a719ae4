/**
 * Which nodes and values gradients flow through: those between a trained value and the loss, by the inputs
 * that an operator can be differentiated by. Operators and names only; no shapes.
 */
import { attribute, type Graph, nestedGraphs } from "../onnx/model.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import { operatorOf } from "./definitions/index.ts";
import type { Problems } from "./problems.ts";
import { RULES, STOPS } from "./rules/index.ts";

/** `TensorProto.DataType` of float, float16, double, bfloat16. */
const FLOATS: ReadonlySet<number> = new Set([1, 10, 11, 16]);

const QUANTISED = /^(Quantize|Dequantize|DynamicQuantize|QLinear|MatMulInteger|ConvInteger)/;

export interface Path {
  /** In the order of the graph. */
  readonly nodes: readonly NodeProto[];
  /** Values that have a gradient. */
  readonly active: ReadonlySet<string>;
}

/**
 * @param graph indexed as it is now
 * @param sources trained values
 * @param end the value whose gradient is known
 * @param problems gets the operators that gradients cannot pass, and the sources that do not reach the end
 * @param refused why nodes that are fused have not been taken apart
 */
export function findPath(
  graph: Graph,
  sources: readonly string[],
  end: string,
  problems: Problems,
  refused: ReadonlyMap<NodeProto, string>,
): Path {
  const nodes = graph.proto.node;
  const reached = new Set(sources);
  for (const node of nodes) {
    if ([...flowing(node), ...captured(node)].some((value) => reached.has(value))) {
      for (const output of node.output) reached.add(output);
    }
  }
  const needed = new Set([end]);
  for (const node of nodes.toReversed()) {
    if (!node.output.some((value) => needed.has(value))) continue;
    for (const value of [...flowing(node), ...captured(node)]) needed.add(value);
  }
  const active = new Set([...reached].filter((value) => value !== "" && needed.has(value)));
  for (const source of sources)
    if (!active.has(source)) problems.add("what is trained does not reach the loss", source);

  const path = nodes.filter((node) => {
    const enters = [...flowing(node), ...captured(node)].some((value) => active.has(value));
    return enters && node.output.some((value) => active.has(value));
  });
  for (const node of path) {
    const why = refused.get(node) ?? obstacle(node);
    if (why) problems.node(node, why);
  }
  return { nodes: path.filter((node) => obstacle(node) === undefined), active };
}

/** The inputs that a gradient can flow to. */
function flowing(node: NodeProto): readonly string[] {
  if (STOPS.has(node.opType) && isStandard(node)) return [];
  if (node.opType === "Cast" && !FLOATS.has(Number(attribute(node, "to")?.i ?? 1))) return [];
  const inputs = RULES.get(operatorOf(node))?.inputs;
  return inputs ? inputs.map((i) => node.input[i] ?? "") : node.input;
}

/** What the graphs inside a node read from outside. */
function captured(node: NodeProto): readonly string[] {
  return nestedGraphs(node).flatMap((graph) => [
    ...graph.node.flatMap((inner) => [...inner.input, ...captured(inner)]),
    ...graph.output.map(({ name }) => name),
  ]);
}

function isStandard({ domain }: NodeProto): boolean {
  return domain === "" || domain === "ai.onnx";
}

/** Why a gradient cannot pass a node. */
function obstacle(node: NodeProto): string | undefined {
  if (nestedGraphs(node).length > 0) {
    return "is control flow, which gradients do not pass (export the model without it)";
  }
  if (QUANTISED.test(node.opType)) return "is quantised, which gradients do not pass (pass a float export)";
  if (RULES.has(operatorOf(node))) return undefined;
  if (!isStandard(node)) return `is an operator of ${node.domain}, fused already (pass the unoptimised export)`;
  return "has no rule for gradients";
}

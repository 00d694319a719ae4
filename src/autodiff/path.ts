/**
 * The nodes and values that gradients flow through, between trained values and the loss, and the shapes of all that they take and make.
 */

import type { Feed } from "../onnx/feeds.ts";
import { attribute, type Graph, nestedGraphs } from "../onnx/model.ts";
import type { Added } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { ModelFile } from "../onnx/read.ts";
import { operatorOf, shadowOf } from "./definitions/index.ts";
import { asGelu } from "./gelu.ts";
import { lift } from "./lift.ts";
import type { Problems } from "./problems.ts";
import { RULES, STOPS } from "./rules/index.ts";
import { probeShapes, type ShapeProbe, type Shapes } from "./shapes.ts";

/** `TensorProto.DataType` of float, float16, double, bfloat16. */
const FLOATS: ReadonlySet<number> = new Set([1, 10, 11, 16]);

const QUANTISED = /^(Quantize|Dequantize|DynamicQuantize|QLinear|MatMulInteger|ConvInteger)/;

export interface Path {
  /** Nodes in the order of the graph. */
  readonly nodes: readonly NodeProto[];
  /** Values that have a gradient. */
  readonly active: ReadonlySet<string>;
}

/**
 * Finds the path by the inputs through which each operator can be differentiated. Looks at operators and names, not at shapes.
 * @param graph indexed in its current state
 * @param sources trained values
 * @param end the value whose gradient is known
 * @param problems receives operators that gradients cannot pass, and sources that do not reach the end
 * @param refused why fused nodes have no definition
 */
function findPath(
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

/** Inputs that a gradient can flow to. */
function flowing(node: NodeProto): readonly string[] {
  if (STOPS.has(node.opType) && isStandard(node)) return [];
  if (node.opType === "Cast" && !FLOATS.has(Number(attribute(node, "to")?.i ?? 1))) return [];
  const inputs = RULES.get(operatorOf(node))?.inputs;
  return inputs ? inputs.map((i) => node.input[i] ?? "") : node.input;
}

/** Values from outside that the graphs inside a node read. */
function captured(node: NodeProto): readonly string[] {
  return nestedGraphs(node).flatMap((graph) => [
    ...graph.node.flatMap((inner) => [...inner.input, ...captured(inner)]),
    ...graph.output.map(({ name }) => name),
  ]);
}

function isStandard({ domain }: NodeProto): boolean {
  return domain === "" || domain === "ai.onnx";
}

/** Reason why a gradient cannot pass a node. */
function obstacle(node: NodeProto): string | undefined {
  if (nestedGraphs(node).length > 0) {
    return "is control flow, which gradients do not pass (export the model without it)";
  }
  if (QUANTISED.test(node.opType)) return "is quantised, which gradients do not pass (pass a float export)";
  if (RULES.has(operatorOf(node))) return undefined;
  if (!isStandard(node)) return `is an operator of ${node.domain}, fused already (pass the unoptimised export)`;
  return "has no rule for gradients";
}

export interface ProbedPath extends Path {
  /** The graph with definitions in place of fused nodes. */
  readonly graph: Graph;
  /** Shapes of all values of the nodes. */
  readonly shapes: Shapes;
}

/** Inputs of the runs that find shapes. */
export interface Probing {
  readonly probe: ShapeProbe;
  /** Two feeds with every input; undefined when there are none, which `problems` reports. */
  readonly feeds: readonly ReadonlyMap<string, Feed>[] | undefined;
  /** Tensors that were added to the graph. */
  readonly initializers: readonly Added[];
}

/**
 * Finds path and shapes, and takes positions early in the graph (lift.ts), in place.
 * @param file its graph indexed in its current state
 * @param sources the values whose gradients are wanted
 * @param end the value whose gradient will be known
 * @param problems found so far; receives what gradients do not pass
 * @throws FormatError with all problems, where they prevent the runs that find shapes
 */
export async function probePath(
  file: ModelFile,
  sources: readonly string[],
  end: string,
  problems: Problems,
  { probe, feeds, initializers }: Probing,
): Promise<ProbedPath> {
  const { model, refused, ranks } = shadowOf(file.model);
  const path = findPath(model.graph, sources, end, problems, refused);
  const values = path.nodes.flatMap(({ input, output }) => [...input, ...output]).filter((value) => value !== "");
  let shapes: Shapes | undefined;
  try {
    shapes = feeds && (await probeShapes({ ...file, model }, initializers, values, feeds, probe, problems));
  } catch (error) {
    // Known problems explain more than the error of a run.
    if (!problems.any) throw error;
  }
  if (!shapes) {
    problems.throwIfAny(model.name);
    throw new Error("neither shapes nor problems");
  }
  for (const [value, rank] of ranks) {
    if (!shapes.has(value) || shapes.dims(value).length === rank) continue;
    problems.add(`a fused operator takes a value of another rank than ${rank}, which gradients do not pass`, value);
  }
  // Positions are taken in the model itself, so only where no definition stands in its place.
  const graph = problems.any || model !== file.model ? undefined : lift(model, shapes);
  const { nodes, active } = graph ? findPath(graph, sources, end, problems, refused) : path;
  const found = graph ?? model.graph;
  return { graph: found, shapes, active, nodes: asGelu(nodes, found, shapes) };
}

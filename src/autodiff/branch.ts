/**
 * The nodes that only learning runs: a branch of the graph, in parts that are graphs of their own. onnxruntime takes a time to plan a graph's
 * memory that grows with the square of its nodes, and a language model has thousands of them here.
 */
import { BOOL, FLOAT, INT64 } from "../onnx/linear.ts";
import { attribute } from "../onnx/model.ts";
import { makeNode, makeValue, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/onnx_pb.ts";
import { create, GraphProtoSchema, TensorProtoSchema } from "../onnx/protobuf.ts";
import { AGAIN } from "./recompute.ts";

/** Nodes of a part, give or take half of them: about those of one layer. */
const PART = 300;

/** A result of the branch: f32 of some rank, or an element of no dimensions. */
export interface BranchResult {
  readonly value: string;
  /** Its name outside of the branch. */
  readonly as: string;
  readonly rank: number;
}

/** A value that leaves a graph of the branch. */
interface Output {
  readonly name: string;
  readonly type: number;
  /** Dimensions where nothing is learned. */
  readonly none: readonly number[];
}

/**
 * If(learn): nodes with their results; else empty results of the same types. Without a branch every run would learn.
 * @param learn the condition
 * @param nodes in an order in which they can run; they are changed
 * @param typeOf `TensorProto.DataType` of a value from outside; undefined where it is not known
 * @param size nodes of a part, about
 */
export function branch(
  learn: string,
  nodes: readonly NodeProto[],
  results: readonly BranchResult[],
  typeOf: (value: string) => number | undefined,
  size: number = PART,
): NodeProto {
  const types = typesOf(nodes, typeOf);
  for (const { value } of results) types.set(value, FLOAT);
  const needed = new Set(results.map(({ value }) => value));
  const parts: NodeProto[] = [];
  for (const [i, own] of [...partsOf(nodes, types, size).entries()].reverse()) {
    const leaving = own.flatMap(outputsOf).filter((value) => needed.has(value));
    if (leaving.length === 0) continue;
    for (const { input } of own) for (const value of input) needed.add(value);
    const outputs = leaving.map((name) => ({ name, type: types.get(name)!, none: [0] }));
    parts.unshift(choice(learn, `${PREFIX}/learn/${i}`, renamed(leavesLast(own), leaving), outputs));
  }
  const made = results.map(({ value, as }) => makeNode("Identity", inner("then", as), [value], inner("then", as)));
  const outputs = results.map(({ as, rank }): Output => ({ name: as, type: FLOAT, none: Array(rank).fill(0) }));
  return choice(learn, `${PREFIX}/learn`, [...parts, ...made], outputs);
}

/** Outputs that have a name: others are left out. */
function outputsOf({ output }: NodeProto): string[] {
  return output.filter((value) => value !== "");
}

/** Name of an output inside a graph that makes it: no two values of nested graphs may have the same name. */
function inner(graph: "then" | "else", output: string): string {
  return `${PREFIX}/${graph}/${output}`;
}

/** If(learn): nodes that make the inner names of outputs; else constants. */
function choice(learn: string, name: string, nodes: NodeProto[], outputs: readonly Output[]): NodeProto {
  const graph = (of: "then" | "else", node: NodeProto[], more: Partial<GraphProto> = {}): GraphProto => {
    const output = outputs.map((one) => makeValue(inner(of, one.name), one.type));
    return create(GraphProtoSchema, { ...more, name: `${name}/${of}`, node, output });
  };
  const none = ({ type, none }: Output): string => `${name}/none/${[type, ...none].join("/")}`;
  const constants = new Map(outputs.map((one) => [none(one), one]));
  const initializer = [...constants].map(([name, { type, none }]) =>
    create(TensorProtoSchema, {
      ...{ name, dataType: type, dims: none.map(BigInt), rawData: new Uint8Array(none.length === 0 ? 4 : 0) },
    }),
  );
  const others = outputs.map((one) =>
    makeNode("Identity", inner("else", one.name), [none(one)], inner("else", one.name)),
  );
  return makeNode(
    "If",
    name,
    [learn],
    outputs.map(({ name }) => name),
    { then_branch: graph("then", nodes), else_branch: graph("else", others, { initializer }) },
  );
}

/** Weight of a value of unknown type, which must not leave a part: the output of a graph declares its type. */
const UNKNOWN = 1e6;

/** Divides nodes where the fewest values are still needed, since these stay in memory until the next part has run. */
function partsOf(
  nodes: readonly NodeProto[],
  types: ReadonlyMap<string, number | undefined>,
  size: number,
): NodeProto[][] {
  const last = new Map(nodes.flatMap(({ input }, i) => input.map((value) => [value, i] as const)));
  const needed = new Float64Array(nodes.length);
  for (const [i, node] of nodes.entries())
    for (const value of outputsOf(node)) {
      const weight = types.get(value) === undefined ? UNKNOWN : 1;
      needed[i]! += weight;
      needed[last.get(value) ?? i]! -= weight;
    }
  for (let i = 1; i < nodes.length; i++) needed[i]! += needed[i - 1]!;
  const parts: NodeProto[][] = [];
  let from = 0;
  while (nodes.length - from > 1.5 * size) {
    let best = from + (size >> 1);
    for (let i = best + 1; i < nodes.length && (i < from + 1.5 * size || needed[best]! >= UNKNOWN); i++)
      if (needed[i]! < needed[best]!) best = i;
    parts.push(nodes.slice(from, best + 1));
    from = best + 1;
  }
  return [...parts, nodes.slice(from)];
}

/** Nodes with the inner names of values that leave them. */
function renamed(nodes: NodeProto[], leaving: readonly string[]): NodeProto[] {
  const names = new Map(leaving.map((value) => [value, inner("then", value)]));
  const rename = (value: string): string => names.get(value) ?? value;
  for (const node of nodes) [node.input, node.output] = [node.input.map(rename), node.output.map(rename)];
  return nodes;
}

/** Types of what nodes make. */
function typesOf(
  nodes: readonly NodeProto[],
  typeOf: (value: string) => number | undefined,
): Map<string, number | undefined> {
  const types = new Map<string, number | undefined>();
  const at = (value = ""): number | undefined => (types.has(value) ? types.get(value) : typeOf(value));
  for (const node of nodes) {
    // The model's own operators are of any kind, and what they make was probed; others are the emitter's.
    for (const value of outputsOf(node))
      types.set(value, value.startsWith(AGAIN) ? typeOf(value.slice(AGAIN.length)) : typeOfResult(node, at));
  }
  return types;
}

function typeOfResult(node: NodeProto, at: (value?: string) => number | undefined): number | undefined {
  const { opType, input } = node;
  if (opType === "Cast") return Number(attribute(node, "to")?.i);
  if (/^(Shape|Size)$/.test(opType)) return INT64;
  if (/^(Equal|Less|Greater|LessOrEqual|And)$/.test(opType)) return BOOL;
  if (opType === "GatherBlockQuantized") return at(input[2]);
  return at(input[Number(/^(Where|DequantizeLinear)$/.test(opType))]);
}

/**
 * Moves nodes that no other reads to the end, the first ones last. onnxruntime begins with the last of such nodes and what it needs. In the
 * order of the backward pass that would be the first layer's gradients, and all that the other layers' need would wait until the end.
 */
function leavesLast(nodes: readonly NodeProto[]): NodeProto[] {
  const read = new Set(nodes.flatMap(({ input }) => input));
  const isLeaf = ({ output }: NodeProto): boolean => !output.some((value) => read.has(value));
  return [...nodes.filter((node) => !isLeaf(node)), ...nodes.filter(isLeaf).reverse()];
}

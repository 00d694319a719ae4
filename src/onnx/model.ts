/**
 * An ONNX model in memory: the whole protobuf, parsed once, and an index of its graph. Tensor data are views of the
 * file's bytes, never copies. It executes nothing and infers no shapes but ranks; only the runtime knows the values.
 */
import { FormatError } from "../errors.ts";
import {
  type AttributeProto,
  fromBinary,
  type GraphProto,
  type ModelProto,
  type NodeProto,
  type TensorProto,
  type ValueInfoProto,
} from "./protobuf.ts";

export interface Use {
  readonly node: NodeProto;
  readonly input: number;
  /** The graph that holds the node: the model's, or one nested in an attribute (a branch of `If`, a body of `Loop`). */
  readonly graph: GraphProto;
}

/** The values that one graph makes itself, without those of graphs nested in it. */
interface Scope {
  readonly initializers: ReadonlyMap<string, TensorProto>;
  readonly producers: ReadonlyMap<string, NodeProto>;
  readonly outputs: ReadonlySet<string>;
}

/** A graph's values by name. Made by `indexGraph`; it does not follow later changes of `proto`. */
export interface Graph extends Scope {
  readonly proto: GraphProto;
  /** The graph itself and all nested ones. */
  readonly scopes: ReadonlyMap<GraphProto, Scope>;
  /** The nodes that read a value, nested graphs' nodes included. */
  readonly consumers: ReadonlyMap<string, readonly Use[]>;
  /** The graph around each nested one. */
  readonly around: ReadonlyMap<GraphProto, GraphProto>;
}

export interface OnnxModel {
  readonly name: string;
  readonly proto: ModelProto;
  readonly graph: Graph;
  /** Version of the standard operators. */
  readonly opset: number;
}

/**
 * Parses a model, whose tensors are views of `bytes`.
 * @throws FormatError where they are truncated or no model with all mandatory parts
 */
export function parseModel(bytes: Uint8Array, name: string): OnnxModel {
  let proto: ModelProto;
  try {
    proto = fromBinary("ModelProto", bytes);
  } catch (cause) {
    const why = (cause as Error).message;
    throw new FormatError(`its ${bytes.length} bytes are truncated or no ONNX model (${why}); fetch it again`, {
      file: name,
      part: "model",
      cause,
    });
  }
  if (!proto.graph) {
    throw new FormatError("holds no graph: truncated, or no ONNX model", { file: name, part: "model" });
  }
  const opset = proto.opsetImport.find(({ domain }) => domain === "" || domain === "ai.onnx")?.version;
  if (opset === undefined || opset < 1n || opset > 1000n) {
    const found = opset === undefined ? "none" : String(opset);
    throw new FormatError(`expected a version of the standard operators, found ${found}: damaged, export it again`, {
      file: name,
      part: "opset",
    });
  }
  return { name, proto, graph: indexGraph(proto.graph, name), opset: Number(opset) };
}

/** @throws FormatError when a value of the main graph has two origins */
export function indexGraph(proto: GraphProto, file: string): Graph {
  const consumers = new Map<string, Use[]>();
  const around = new Map<GraphProto, GraphProto>();
  const scopes = new Map<GraphProto, Scope>();
  // The protobuf runtime reads graphs in graphs to a depth of 33 only.
  const visit = (graph: GraphProto): void => {
    scopes.set(graph, scopeOf(graph, graph === proto ? file : undefined));
    for (const node of graph.node) {
      for (const [input, value] of node.input.entries()) {
        if (value === "") continue;
        const uses = consumers.get(value);
        if (uses) uses.push({ node, input, graph });
        else consumers.set(value, [{ node, input, graph }]);
      }
      for (const nested of nestedGraphs(node)) {
        around.set(nested, graph);
        visit(nested);
      }
    }
  };
  visit(proto);
  return { proto, ...scopes.get(proto)!, scopes, consumers, around };
}

/** @param file for the message, where a value must not have two origins */
function scopeOf(graph: GraphProto, file: string | undefined): Scope {
  const initializers = new Map<string, TensorProto>();
  const producers = new Map<string, NodeProto>();
  const isNew = (value: string): boolean => {
    if (!initializers.has(value) && !producers.has(value)) return true;
    if (file === undefined) return false;
    const message = `the value "${value}" has two origins: damaged, export the model again`;
    throw new FormatError(message, { file, part: "graph" });
  };
  for (const tensor of graph.initializer) if (isNew(tensor.name)) initializers.set(tensor.name, tensor);
  for (const node of graph.node) {
    // Optional outputs that are left out have an empty name.
    for (const output of node.output) if (output !== "" && isNew(output)) producers.set(output, node);
  }
  return { initializers, producers, outputs: new Set(graph.output.map(({ name }) => name)) };
}

export function nestedGraphs(node: NodeProto): readonly GraphProto[] {
  return node.attribute.flatMap(({ g, graphs }) => (g ? [g, ...graphs] : graphs));
}

export function attribute(node: NodeProto | undefined, name: string): AttributeProto | undefined {
  return node?.attribute.find((candidate) => candidate.name === name);
}

export function intOf(node: NodeProto | undefined, name: string, otherwise = 0): number {
  return Number(attribute(node, name)?.i ?? otherwise);
}

export function intsOf(node: NodeProto | undefined, name: string): number[] | undefined {
  return attribute(node, name)?.ints.map(Number);
}

export function floatOf(node: NodeProto | undefined, name: string, otherwise: number): number {
  return attribute(node, name)?.f ?? otherwise;
}

/**
 * Visits an item behind all that it needs, each once, without recursion: models are thousands of nodes deep. Circles
 * are cut.
 */
export function inOrder<T>(
  first: T,
  done: { has(item: T): boolean },
  needs: (item: T) => readonly T[],
  visit: (item: T) => void,
): void {
  const waiting = new Set<T>();
  const pending = [first];
  while (pending.length > 0) {
    const item = pending.at(-1)!;
    if (!done.has(item) && !waiting.has(item)) {
      waiting.add(item);
      pending.push(...needs(item).filter((need) => !waiting.has(need) && !done.has(need)));
      continue;
    }
    pending.pop();
    if (!done.has(item)) visit(item);
  }
}

/** The tensor that a node holds; undefined for other nodes than Constant. */
export function constantOf(node: NodeProto | undefined): TensorProto | undefined {
  return node?.opType === "Constant" ? attribute(node, "value")?.t : undefined;
}

/**
 * Dimensions of a value: numbers, and names of free ones, "" without a name. Undefined where the file does not tell
 * them.
 */
export function dimsOf({ type }: Pick<ValueInfoProto, "type">): (number | string)[] | undefined {
  return type?.tensorType?.shape?.dim.map(({ dimValue, dimParam }) =>
    dimValue === undefined ? (dimParam ?? "") : Number(dimValue),
  );
}

// Ranks: one number, for the operators between a transformer's inputs and its linear layers. Unknown ranks are
// undefined.

/** Operators whose result has as many dimensions as their first input. */
const KEEPS: ReadonlySet<string> = new Set(
  (
    "Abs BiasGelu Cast Clip Concat DequantizeLinear Dropout DynamicQuantizeLinear Erf FastGelu Gelu " +
    "GroupQueryAttention Identity LayerNormalization LeakyRelu MatMulNBits Mod MultiHeadAttention Neg " +
    "QuantizeLinear QuickGelu RMSNormalization Reciprocal Relu Sigmoid SimplifiedLayerNormalization " +
    "SkipLayerNormalization SkipSimplifiedLayerNormalization Slice Softmax Softplus Split Sqrt Tanh Transpose"
  ).split(" "),
);

const BROADCASTS = new Set(["Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "Sum"]);

/** Most nested Concats that are followed. */
const DEEPEST_SHAPE = 8;

/** Rank of a value, as far as the file and the operators before it tell. */
export type RankOf = (value: string) => number | undefined;

export function ranksOf({ graph }: OnnxModel): RankOf {
  const { initializers, producers, proto } = graph;
  const known = new Map<string, number | undefined>();
  /** Number of elements of values that are shapes. */
  const lengths = new Map<string, number | undefined>();
  for (const info of [...proto.input, ...proto.valueInfo]) {
    const rank = dimsOf(info)?.length;
    if (rank !== undefined) known.set(info.name, rank);
  }
  for (const [name, { dims }] of initializers) known.set(name, dims.length);
  const needs = (name: string): string[] => {
    const node = producers.get(name);
    return node ? inputsOf(node).filter((input) => input !== "") : [];
  };
  return (value) => {
    inOrder(value, known, needs, (name) => {
      const node = producers.get(name);
      known.set(name, node && rankOf(node));
    });
    return known.get(value);
  };

  function rankOf(node: NodeProto): number | undefined {
    const ranks = inputsOf(node).map((input) => known.get(input));
    const [first, second] = ranks;
    if (KEEPS.has(node.opType)) return first;
    if (BROADCASTS.has(node.opType)) {
      return ranks.reduce((a, b) => (a === undefined || b === undefined ? undefined : Math.max(a, b)), 0);
    }
    switch (node.opType) {
      case "MatMul":
      case "MatMulInteger":
        if (first === undefined || second === undefined || first < 2 || second < 2) return undefined;
        return Math.max(first, second);
      case "Gemm":
        return 2;
      case "Shape":
      case "Range":
        return 1;
      case "Constant":
        return constantOf(node)?.dims.length;
      case "ReduceMean":
        return intOf(node, "keepdims", 1) === 0 ? undefined : first;
      case "Unsqueeze": {
        const axes = attribute(node, "axes")?.ints.length ?? elements(node.input[1] ?? "");
        return first === undefined || axes === undefined ? undefined : first + axes;
      }
      case "Gather":
        return first === undefined || second === undefined ? undefined : first - 1 + second;
      case "Reshape":
        return elements(node.input[1] ?? "");
      default:
        return undefined;
    }
  }

  /** Number of elements of a shape, made by a few Concats at most. */
  function elements(value: string, depth = 0): number | undefined {
    if (!lengths.has(value)) lengths.set(value, lengthOf(value, depth));
    return lengths.get(value);
  }

  function lengthOf(value: string, depth: number): number | undefined {
    const node = producers.get(value);
    const { dims } = initializers.get(value) ?? constantOf(node) ?? {};
    if (dims) return dims.length === 1 ? Number(dims[0]) : undefined;
    if (node?.opType !== "Concat" || depth > DEEPEST_SHAPE) return undefined;
    let sum = 0;
    for (const input of node.input) {
      const part = producers.get(input)?.opType === "Unsqueeze" ? 1 : elements(input, depth + 1);
      if (part === undefined) return undefined;
      sum += part;
    }
    return sum;
  }
}

/** Inputs that decide the rank. */
function inputsOf({ opType, input }: NodeProto): readonly string[] {
  if (BROADCASTS.has(opType)) return input;
  if (opType === "Reshape" || opType === "Gemm") return [];
  return KEEPS.has(opType) ? input.slice(0, 1) : input.slice(0, 2);
}

/**
 * An ONNX model in memory: the whole protobuf, parsed once, and an index of its graph. Tensor data are views of the file's bytes, never
 * copies. It executes nothing and infers no shapes; only the runtime knows the values.
 */
import { FormatError } from "../errors.ts";
import type { AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto } from "./protobuf.ts";
import { fromBinary, ModelProtoSchema } from "./protobuf.ts";

/** Where a value enters a node. */
export interface Use {
  readonly node: NodeProto;
  /** Index among the node's inputs. */
  readonly input: number;
  /** The graph that holds the node: the model's, or one nested in an attribute (a branch of `If`, a body of `Loop`). */
  readonly graph: GraphProto;
}

/** The values that one graph makes itself, without those of graphs nested in it. */
export interface Scope {
  readonly initializers: ReadonlyMap<string, TensorProto>;
  /** The node that makes a value. */
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

/** A parsed model. */
export interface OnnxModel {
  /** Path or URL, for messages. */
  readonly name: string;
  readonly proto: ModelProto;
  readonly graph: Graph;
  /** Version of the standard operators. */
  readonly opset: number;
}

/**
 * Parses a model. `bytes` stay in use: tensors with embedded data are views of them.
 * @param name of the file, for messages
 * @throws FormatError when the bytes are truncated, are no ONNX model, or the model lacks mandatory parts
 */
export function parseModel(bytes: Uint8Array, name: string): OnnxModel {
  let proto: ModelProto;
  try {
    proto = fromBinary(ModelProtoSchema, bytes);
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

/**
 * @param file for messages
 * @throws FormatError when a value of the main graph has two origins
 */
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

/** The graphs in a node's attributes. */
export function nestedGraphs(node: NodeProto): readonly GraphProto[] {
  return node.attribute.flatMap(({ g, graphs }) => (g ? [g, ...graphs] : graphs));
}

/** The attribute, or undefined when the node has none with this name. */
export function attribute(node: NodeProto, name: string): AttributeProto | undefined {
  return node.attribute.find((candidate) => candidate.name === name);
}

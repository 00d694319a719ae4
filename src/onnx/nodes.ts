/**
 * Nodes and a graph's list of them: making nodes, adding some behind another, removing unused ones. Knows nothing of what nodes compute.
 */

import { FormatError } from "../errors.ts";
import { FLOAT, FLOAT16, INT64 } from "./linear.ts";
import { nestedGraphs, type OnnxModel } from "./model.ts";
import {
  type AttributeProto,
  AttributeProtoSchema,
  create,
  type GraphProto,
  type NodeProto,
  NodeProtoSchema,
  OperatorSetIdProtoSchema,
  type TensorProto,
  TensorProtoSchema,
  type ValueInfoProto,
  ValueInfoProtoSchema,
} from "./protobuf.ts";

/** First word of the names of all added values and nodes. */
export const PREFIX = "eigenlora";

/** Attributes by name: integers, lists of integers, graphs, floats as `{ float }`, and strings. */
export type Attributes = Readonly<
  Record<string, number | string | readonly number[] | { readonly float: number } | GraphProto>
>;

/** `AttributeProto.AttributeType`. */
const ATTRIBUTE = { float: 1, int: 2, string: 3, graph: 5, ints: 7 };

/** A tensor that was added to a graph; its bytes are held back until the model is written. */
export interface Added {
  readonly name: string;
  /** `TensorProto.DataType` of `data`. */
  readonly type: number;
  readonly dims: readonly number[];
  readonly data: Float32Array | Int8Array | Uint8Array;
}

/** The domain of onnxruntime's own operators. */
export const CONTRIBUTED = "com.microsoft";

/** Declares that the model uses operators of that domain. */
export function importContributed({ proto: { opsetImport } }: OnnxModel): void {
  if (opsetImport.some(({ domain }) => domain === CONTRIBUTED)) return;
  opsetImport.push(create(OperatorSetIdProtoSchema, { domain: CONTRIBUTED, version: 1n }));
}

export function makeNode(
  opType: string,
  name: string,
  input: readonly string[],
  output: string | readonly string[],
  attributes: Attributes = {},
  domain = "",
): NodeProto {
  return create(NodeProtoSchema, {
    opType,
    domain,
    name,
    input: [...input],
    output: typeof output === "string" ? [output] : [...output],
    attribute: Object.entries(attributes).map(([key, value]) => makeAttribute(key, value)),
  });
}

function makeAttribute(name: string, value: Attributes[string]): AttributeProto {
  if (typeof value === "number") return create(AttributeProtoSchema, { name, i: BigInt(value), type: ATTRIBUTE.int });
  if (typeof value === "string")
    return create(AttributeProtoSchema, { name, s: new TextEncoder().encode(value), type: ATTRIBUTE.string });
  if (Array.isArray(value))
    return create(AttributeProtoSchema, { name, ints: value.map(BigInt), type: ATTRIBUTE.ints });
  if ("float" in value) return create(AttributeProtoSchema, { name, f: value.float, type: ATTRIBUTE.float });
  return create(AttributeProtoSchema, { name, g: value as GraphProto, type: ATTRIBUTE.graph });
}

/** Makes a constant int64 vector, or a scalar where `dims` is empty. */
export function makeInts(
  name: string,
  values: readonly number[],
  dims: readonly number[] = [values.length],
): TensorProto {
  const rawData = new Uint8Array(BigInt64Array.from(values, BigInt).buffer);
  return create(TensorProtoSchema, { name, dims: dims.map(BigInt), dataType: INT64, rawData });
}

/** Makes a Split. @param axis of the value. Default: the last */
export function makeSplit(
  model: OnnxModel,
  name: string,
  value: string,
  outputs: readonly string[],
  sizes: readonly number[],
  axis = -1,
): NodeProto {
  // Opset 13 turned the sizes into an input.
  const asInput = model.opset >= 13;
  if (asInput) model.graph.proto.initializer.push(makeInts(`${name}/sizes`, sizes));
  const inputs = asInput ? [value, `${name}/sizes`] : [value];
  return makeNode("Split", name, inputs, outputs, { axis, ...(asInput ? {} : { split: sizes }) });
}

export function makeFloats(name: string, values: readonly number[], dims: readonly number[]): TensorProto {
  const rawData = new Uint8Array(Float32Array.from(values).buffer);
  return create(TensorProtoSchema, { name, dims: dims.map(BigInt), dataType: FLOAT, rawData });
}

/**
 * Makes an input or output. A string in `dims` is a free dimension with that name, "" without a name; without `dims` any shape is
 * allowed.
 */
export function makeValue(name: string, elemType: number, dims?: readonly (number | string)[]): ValueInfoProto {
  const dim = dims?.map((d) => {
    if (typeof d === "number") return { value: { case: "dimValue" as const, value: BigInt(d) } };
    return { value: d === "" ? { case: undefined } : { case: "dimParam" as const, value: d } };
  });
  const value = { elemType, ...(dim ? { shape: { dim } } : {}) };
  return create(ValueInfoProtoSchema, { name, type: { value: { case: "tensorType", value } } });
}

interface NodeEdit {
  readonly before: NodeProto[];
  readonly behind: NodeProto[][];
  removed: boolean;
}

/** Edits of the nodes of graphs, collected until `apply`: moving the end of a list for each edit would take quadratic time. */
export class NodeEdits {
  readonly #graphs = new Map<GraphProto, Map<NodeProto, NodeEdit>>();

  /** Puts nodes directly behind one, in front of those that were put there before. */
  insert(graph: GraphProto, node: NodeProto, nodes: NodeProto[]): void {
    this.#of(graph, node).behind.push(nodes);
  }

  /** Puts nodes directly in front of one, behind those that were put there before. */
  insertBefore(graph: GraphProto, node: NodeProto, nodes: readonly NodeProto[]): void {
    this.#of(graph, node).before.push(...nodes);
  }

  remove(graph: GraphProto, node: NodeProto): void {
    this.#of(graph, node).removed = true;
  }

  #of(graph: GraphProto, node: NodeProto): NodeEdit {
    const edits = this.#graphs.get(graph) ?? new Map<NodeProto, NodeEdit>();
    this.#graphs.set(graph, edits);
    const edit = edits.get(node) ?? { before: [], behind: [], removed: false };
    edits.set(node, edit);
    return edit;
  }

  apply(): void {
    for (const [graph, edits] of this.#graphs) {
      graph.node = graph.node.flatMap((node) => {
        const { before = [], behind = [], removed = false } = edits.get(node) ?? {};
        return [...before, ...(removed ? [] : [node]), ...[...behind].reverse().flat()];
      });
    }
    this.#graphs.clear();
  }
}

/** Collects nodes to add behind one node or in front of it, in order. */
export class Place {
  readonly #edits: NodeEdits;
  readonly #graph: GraphProto;
  readonly #node: NodeProto;
  readonly #name: string;
  readonly #type: number;
  readonly #nodes: NodeProto[] = [];
  #result = "";

  /** @param type of the model's values there; added nodes compute in f32 */
  constructor(edits: NodeEdits, graph: GraphProto, node: NodeProto, name: string, type: number) {
    this.#edits = edits;
    this.#graph = graph;
    this.#node = node;
    this.#name = name;
    this.#type = type;
  }

  op(opType: string, input: readonly string[], attributes: Attributes = {}, domain = ""): string {
    const name = `${this.#name}/${opType}_${this.#nodes.length}`;
    this.#nodes.push(makeNode(opType, name, input, name, attributes, domain));
    return name;
  }

  split(model: OnnxModel, value: string, sizes: readonly number[]): string[] {
    const name = `${this.#name}/Split_${this.#nodes.length}`;
    const parts = sizes.map((_, i) => `${name}/${i}`);
    this.#nodes.push(makeSplit(model, name, value, parts, sizes));
    return parts;
  }

  /** Puts the nodes collected so far in front of the node. */
  before(): void {
    this.#edits.insertBefore(this.#graph, this.#node, this.#nodes.splice(0));
  }

  /** Adds a copy of the model's node with other inputs. @param opType another operator for the copy */
  like({ opType, domain, attribute }: NodeProto, input: readonly string[], as: Partial<NodeProto> = {}): string {
    const name = this.op(as.opType ?? opType, input);
    Object.assign(this.#nodes.at(-1)!, { domain, attribute: [...attribute], ...as });
    return name;
  }

  /** Casts a value of the model to f32. */
  up(value: string): string {
    return this.#type === FLOAT16 ? this.op("Cast", [value], { to: FLOAT }) : value;
  }

  /** Casts an f32 value to the model's type. */
  down(value: string): string {
    return this.#type === FLOAT16 ? this.op("Cast", [value], { to: FLOAT16 }) : value;
  }

  /** Renames the node's result; `end` puts another value in its place. */
  begin(): string {
    this.#result = this.#node.output[0]!;
    this.#node.output[0] = `${this.#name}/base`;
    return this.#node.output[0];
  }

  end(value: string): void {
    this.#insert(value, this.#result);
  }

  replace(value: string): void {
    this.#insert(value, this.#node.output[0]!);
    this.#edits.remove(this.#graph, this.#node);
  }

  #insert(value: string, result: string): void {
    const last = this.#nodes[this.#nodes.length - 1]!;
    if (last.output[0] !== value) throw new Error(`${value} is not made last`);
    last.output[0] = result;
    this.#edits.insert(this.#graph, this.#node, this.#nodes);
  }
}

/** Frees the last dimension of outputs where it has one of these sizes, and forgets what the file says of values inside. */
export function freeLast(graph: GraphProto, sizes: ReadonlySet<bigint>): void {
  for (const { type } of graph.output) {
    const dims = type?.value.case === "tensorType" ? (type.value.value.shape?.dim ?? []) : [];
    const last = dims[dims.length - 1];
    if (last?.value.case === "dimValue" && sizes.has(last.value.value)) last.value = { case: undefined };
  }
  graph.valueInfo.length = 0;
}

/** Removes nodes and values that no output of a graph needs. @param stays tells if an input stays that is not read */
export function dropUnused(graph: GraphProto, stays: (input: ValueInfoProto) => boolean): void {
  const makers = new Map(graph.node.flatMap((node) => node.output.map((value) => [value, node] as const)));
  const kept = new Set<NodeProto>();
  const read = new Set(graph.output.map(({ name }) => name));
  // The set grows during the loop: what a node that is needed reads is needed too.
  for (const value of read) {
    const maker = makers.get(value);
    if (!maker || kept.has(maker)) continue;
    kept.add(maker);
    for (const one of readBy(maker)) read.add(one);
  }
  graph.node = graph.node.filter((node) => kept.has(node));
  graph.initializer = graph.initializer.filter(({ name }) => read.has(name));
  graph.input = graph.input.filter((input) => read.has(input.name) || stays(input));
}

/** Values that a node and the graphs in it read. */
export function readBy(node: NodeProto): string[] {
  const nested = nestedGraphs(node).flatMap((graph) => [
    ...graph.node.flatMap(readBy),
    ...graph.output.map(({ name }) => name),
  ]);
  return [...node.input, ...nested].filter((value) => value !== "");
}

/** The oldest opset in which the added operators mean what is meant here. */
const LEAST_OPSET = 11;

/**
 * Checks that a model can take task inputs, before anything is added: afterwards, added names cannot be told from the file's own.
 * @throws FormatError when the model's opset is too old, it has task inputs already, or it uses names of ours
 */
export function checkInjectable(model: OnnxModel): void {
  if (model.opset < LEAST_OPSET) {
    const message = `opset ${model.opset}: at least ${LEAST_OPSET} is needed; export it again with opset_version=17`;
    throw new FormatError(message, { file: model.name, part: "opset" });
  }
  if (model.graph.proto.input.some(({ name }) => name.startsWith(`${PREFIX}.`))) {
    throw new FormatError("has task inputs already; pass the model as it was before", {
      file: model.name,
      part: "graph",
    });
  }
  const taken = ownNames(model).find((name) => name.startsWith(`${PREFIX}/`) || name.startsWith(`${PREFIX}.`));
  if (taken === undefined) return;
  // Values of one name would be confused.
  const message = `its value "${taken}" has a name as this package gives them: rename it, or pass the model as it was before`;
  throw new FormatError(message, { file: model.name, part: "graph" });
}

function ownNames({ graph }: OnnxModel): string[] {
  const inputs = [...graph.scopes.keys()].flatMap(({ input }) => input.map(({ name }) => name));
  const made = [...graph.scopes.values()].flatMap(({ initializers, producers, outputs }) => [
    ...initializers.keys(),
    ...producers.keys(),
    ...outputs,
  ]);
  return [...inputs, ...made, ...graph.consumers.keys()];
}

/**
 * Nodes and what becomes of a graph's list of them: making one, adding some behind another, removing what nothing uses.
 * No knowledge of what the nodes compute.
 */
import { FLOAT, FLOAT16, INT64 } from "./linear.ts";
import type { OnnxModel } from "./model.ts";
import type { AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto } from "./onnx_pb.ts";
import { AttributeProtoSchema, create, NodeProtoSchema, TensorProtoSchema, ValueInfoProtoSchema } from "./protobuf.ts";

/** The first word of every value and node that is added. */
export const PREFIX = "eigenlora";

/** Attributes by name: integers, lists of integers, graphs, and floats as `{ float }`. */
export type Attributes = Readonly<Record<string, number | readonly number[] | { readonly float: number } | GraphProto>>;

/** `AttributeProto.AttributeType`. */
const ATTRIBUTE = { float: 1, int: 2, graph: 5, ints: 7 };

/** A node with one output or several. */
export function makeNode(
  opType: string,
  name: string,
  input: readonly string[],
  output: string | readonly string[],
  attributes: Attributes = {},
): NodeProto {
  return create(NodeProtoSchema, {
    opType,
    name,
    input: [...input],
    output: typeof output === "string" ? [output] : [...output],
    attribute: Object.entries(attributes).map(([key, value]) => makeAttribute(key, value)),
  });
}

function makeAttribute(name: string, value: Attributes[string]): AttributeProto {
  if (typeof value === "number") return create(AttributeProtoSchema, { name, i: BigInt(value), type: ATTRIBUTE.int });
  if (Array.isArray(value))
    return create(AttributeProtoSchema, { name, ints: value.map(BigInt), type: ATTRIBUTE.ints });
  if ("float" in value) return create(AttributeProtoSchema, { name, f: value.float, type: ATTRIBUTE.float });
  return create(AttributeProtoSchema, { name, g: value as GraphProto, type: ATTRIBUTE.graph });
}

/** A constant int64 vector, or a scalar where `dims` is empty. */
export function makeInts(
  name: string,
  values: readonly number[],
  dims: readonly number[] = [values.length],
): TensorProto {
  const rawData = new Uint8Array(BigInt64Array.from(values, BigInt).buffer);
  return create(TensorProtoSchema, { name, dims: dims.map(BigInt), dataType: INT64, rawData });
}

/** Constant f32 values. */
export function makeFloats(name: string, values: readonly number[], dims: readonly number[]): TensorProto {
  const rawData = new Uint8Array(Float32Array.from(values).buffer);
  return create(TensorProtoSchema, { name, dims: dims.map(BigInt), dataType: FLOAT, rawData });
}

/** An input or output. A dimension of type string is a free one of that name, "" without a name; no `dims`: of any shape. */
export function makeValue(name: string, elemType: number, dims?: readonly (number | string)[]): ValueInfoProto {
  const dim = dims?.map((d) => {
    if (typeof d === "number") return { value: { case: "dimValue" as const, value: BigInt(d) } };
    return { value: d === "" ? { case: undefined } : { case: "dimParam" as const, value: d } };
  });
  const value = { elemType, ...(dim ? { shape: { dim } } : {}) };
  return create(ValueInfoProtoSchema, { name, type: { value: { case: "tensorType", value } } });
}

/** Nodes that are added behind one node, in order. */
export class Place {
  readonly #graph: GraphProto;
  readonly #node: NodeProto;
  readonly #name: string;
  readonly #type: number;
  readonly #nodes: NodeProto[] = [];
  #result = "";

  /** @param type of the values of the model there; what is added computes in f32 */
  constructor(graph: GraphProto, node: NodeProto, name: string, type: number) {
    this.#graph = graph;
    this.#node = node;
    this.#name = name;
    this.#type = type;
  }

  op(opType: string, input: readonly string[], attributes: Attributes = {}): string {
    const name = `${this.#name}/${opType}_${this.#nodes.length}`;
    this.#nodes.push(makeNode(opType, name, input, name, attributes));
    return name;
  }

  /** A value of the model as f32. */
  up(value: string): string {
    return this.#type === FLOAT16 ? this.op("Cast", [value], { to: FLOAT }) : value;
  }

  /** An f32 value in the model's type. */
  down(value: string): string {
    return this.#type === FLOAT16 ? this.op("Cast", [value], { to: FLOAT16 }) : value;
  }

  /** Takes the node's result out of the model; `end` puts another in its place. */
  begin(): string {
    this.#result = this.#node.output[0]!;
    this.#node.output[0] = `${this.#name}/base`;
    return this.#node.output[0];
  }

  end(value: string): void {
    this.#insert(value, this.#result);
  }

  /** The node goes, `value` takes its place. */
  replace(value: string): void {
    this.#insert(value, this.#node.output[0]!);
    this.#graph.node.splice(this.#graph.node.indexOf(this.#node), 1);
  }

  #insert(value: string, result: string): void {
    const last = this.#nodes.at(-1)!;
    if (last.output[0] !== value) throw new Error(`${value} is not made last`);
    last.output[0] = result;
    this.#graph.node.splice(this.#graph.node.indexOf(this.#node) + 1, 0, ...this.#nodes);
  }
}

/** Removes nodes and initializers of the main graph that nothing uses any more. */
export function dropUnused(model: OnnxModel): void {
  const main = model.graph.proto;
  const outputs = new Set(main.output.map(({ name }) => name));
  for (;;) {
    const used = usedValues(main, outputs);
    const keep = main.node.filter((node) => node.output.some((value) => used.has(value)));
    if (keep.length === main.node.length) {
      const tensors = main.initializer.filter(({ name }) => used.has(name));
      main.initializer.splice(0, main.initializer.length, ...tensors);
      // Old exporters list initializers among the inputs; without its values such an input would have to be fed.
      const inputs = main.input.filter(({ name }) => used.has(name) || !model.graph.initializers.has(name));
      main.input.splice(0, main.input.length, ...inputs);
      return;
    }
    main.node.splice(0, main.node.length, ...keep);
  }
}

function usedValues(graph: GraphProto, used: Set<string>): Set<string> {
  const all = new Set(used);
  const visit = ({ node }: GraphProto): void => {
    for (const { input, attribute } of node) {
      for (const value of input) all.add(value);
      for (const { g, graphs } of attribute)
        for (const nested of g ? [g, ...graphs] : graphs) {
          visit(nested);
          for (const { name } of nested.output) all.add(name);
        }
    }
  };
  visit(graph);
  return all;
}

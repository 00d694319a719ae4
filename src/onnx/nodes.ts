/**
 * Nodes and a graph's list of them: making nodes, adding some behind another, removing unused ones. Knows nothing of
 * what nodes compute.
 */

import { FormatError } from "../errors.ts";
import { FLOAT, FLOAT16, INT64 } from "./linear.ts";
import { nestedGraphs, type OnnxModel } from "./model.ts";
import {
  type AttributeProto,
  create,
  type GraphProto,
  type NodeProto,
  type TensorProto,
  type ValueInfoProto,
} from "./protobuf.ts";

/** First word of the names of all added values and nodes. */
export const PREFIX = "eigenlora";

/** Attributes by name: integers, lists of integers, graphs, floats as `{ float }`, and strings. */
export type Attributes = Readonly<
  Record<string, number | string | readonly number[] | { readonly float: number } | GraphProto>
>;

/** `AttributeProto.AttributeType`. */
const ATTRIBUTE = { float: 1, int: 2, string: 3, graph: 5, ints: 7 };

/** The domain of onnxruntime's own operators. */
export const CONTRIBUTED = "com.microsoft";

export function importContributed({ proto: { opsetImport } }: OnnxModel): void {
  if (opsetImport.some(({ domain }) => domain === CONTRIBUTED)) return;
  opsetImport.push(create("OperatorSetIdProto", { domain: CONTRIBUTED, version: 1n }));
}

export function makeNode(
  opType: string,
  name: string,
  input: readonly string[],
  output: string | readonly string[],
  attributes: Attributes = {},
  domain = "",
): NodeProto {
  return create("NodeProto", {
    opType,
    domain,
    name,
    input: [...input],
    output: typeof output === "string" ? [output] : [...output],
    attribute: Object.entries(attributes).map(([key, value]) => makeAttribute(key, value)),
  });
}

function makeAttribute(name: string, value: Attributes[string]): AttributeProto {
  const make = (type: number, fields: Partial<AttributeProto>) => create("AttributeProto", { name, type, ...fields });
  if (typeof value === "number") return make(ATTRIBUTE.int, { i: BigInt(value) });
  if (typeof value === "string") return make(ATTRIBUTE.string, { s: new TextEncoder().encode(value) });
  if (Array.isArray(value)) return make(ATTRIBUTE.ints, { ints: value.map(BigInt) });
  return "float" in value
    ? make(ATTRIBUTE.float, { f: value.float })
    : make(ATTRIBUTE.graph, { g: value as GraphProto });
}

/** Makes a constant int64 vector, or a scalar where `dims` is empty. */
export function makeInts(
  name: string,
  values: readonly number[],
  dims: readonly number[] = [values.length],
): TensorProto {
  return makeTensor(name, INT64, dims, BigInt64Array.from(values, BigInt));
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
  const write = writerOn(model, name);
  write.split(value, axis, sizes);
  return Object.assign(write.nodes[0]!, { output: [...outputs] });
}

export function makeFloats(name: string, values: readonly number[], dims: readonly number[]): TensorProto {
  return makeTensor(name, FLOAT, dims, Float32Array.from(values));
}

export function makeTensor(
  name: string,
  dataType: number,
  dims: readonly number[],
  data: ArrayBufferView,
): TensorProto {
  const rawData = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
  return create("TensorProto", { name, dims: dims.map(BigInt), dataType, rawData });
}

/**
 * Makes an input or output. A string in `dims` is a free dimension, "" one without a name; without `dims` any shape is
 * allowed.
 */
export function makeValue(name: string, elemType: number, dims?: readonly (number | string)[]): ValueInfoProto {
  const dim = dims?.map((d) => (typeof d === "number" ? { dimValue: BigInt(d) } : d === "" ? {} : { dimParam: d }));
  return create("ValueInfoProto", { name, type: { tensorType: { elemType, ...(dim && { shape: { dim } }) } } });
}

/**
 * Edits of the nodes of graphs, collected until `apply`: moving the end of a list for each edit would take quadratic
 * time.
 */
export class NodeEdits {
  readonly #graphs = new Set<GraphProto>();
  readonly #edits = new Map<NodeProto, { before: NodeProto[]; behind: NodeProto[]; removed: boolean }>();

  /** Puts nodes directly behind one, in front of those that were put there before. */
  insert(graph: GraphProto, node: NodeProto, nodes: NodeProto[]): void {
    this.#of(graph, node).behind.unshift(...nodes);
  }

  /** Puts nodes directly in front of one, behind those that were put there before. */
  insertBefore(graph: GraphProto, node: NodeProto, nodes: readonly NodeProto[]): void {
    this.#of(graph, node).before.push(...nodes);
  }

  remove(graph: GraphProto, node: NodeProto): void {
    this.#of(graph, node).removed = true;
  }

  #of(graph: GraphProto, node: NodeProto) {
    this.#graphs.add(graph);
    const edit = this.#edits.get(node) ?? { before: [], behind: [], removed: false };
    this.#edits.set(node, edit);
    return edit;
  }

  apply(): void {
    for (const graph of this.#graphs) {
      graph.node = graph.node.flatMap((node) => {
        const { before = [], behind = [], removed = false } = this.#edits.get(node) ?? {};
        return [...before, ...(removed ? [] : [node]), ...behind];
      });
    }
  }
}

/** A value by name, or a constant: an f32 scalar for a number, an int64 vector for a list. */
export type Operand = string | number | readonly number[];

/** Constants that are added to a graph, each once. */
export class Constants {
  readonly opset: number;
  readonly #graph: GraphProto;
  readonly #prefix: string;
  readonly #names = new Set<string>();

  constructor(graph: GraphProto, opset: number, prefix: string) {
    this.#graph = graph;
    this.opset = opset;
    this.#prefix = prefix;
  }

  of(value: Operand): string {
    if (typeof value === "string") return value;
    if (typeof value === "number") return this.add(`float/${value}`, (name) => makeFloats(name, [value], []));
    return this.add(`ints/${value.join(",")}`, (name) => makeInts(name, value));
  }

  add(key: string, make: (name: string) => TensorProto): string {
    const name = `${this.#prefix}/${key}`;
    if (!this.#names.has(name)) this.#graph.initializer.push(make(name));
    this.#names.add(name);
    return name;
  }
}

/**
 * Most inputs of one Concat. WebGPU allows a shader eight storage buffers, and onnxruntime-web 1.30's older build does
 * not check it: a Concat of 24 tensors gives garbage without an error.
 */
const CONCAT_INPUTS = 6;

/** Writes nodes of standard operators in the form that the model's opset needs. A node is never written twice. */
export class NodeWriter {
  readonly nodes: NodeProto[] = [];
  readonly constants: Constants;
  /** Names by what a node computes. */
  protected readonly made: Map<string, string> = new Map();
  readonly #prefix: string;
  #count = 0;

  /** @param prefix of the names of written nodes and values */
  constructor(constants: Constants, prefix: string) {
    this.constants = constants;
    this.#prefix = prefix;
  }

  /** @param opType "Add", or "com.microsoft.Gelu" @param given inputs; attributes may follow */
  op(opType: string, ...given: readonly (Operand | Attributes)[]): string {
    const last = given.at(-1);
    const operands = given.filter((one): one is Operand => !isAttributes(one));
    return this.write(opType, operands, isAttributes(last) ? last : {}, 1)[0]!;
  }

  protected write(
    opType: string,
    operands: readonly Operand[],
    attributes: Attributes,
    outputs: number,
  ): readonly string[] {
    const values = operands.map((operand) => this.constants.of(operand));
    const key = JSON.stringify([opType, values, attributes]);
    const known = this.made.get(key);
    const name = known ?? this.fresh(opType);
    const names = outputs === 1 ? [name] : Array.from({ length: outputs }, (_, i) => `${name}/${i}`);
    if (known !== undefined) return names;
    this.made.set(key, name);
    const dot = opType.lastIndexOf(".");
    const domain = opType.slice(0, Math.max(dot, 0));
    this.nodes.push(makeNode(opType.slice(dot + 1), name, values, names, attributes, domain));
    return names;
  }

  protected fresh(opType: string): string {
    return `${this.#prefix}/${opType}_${this.#count++}`;
  }

  /**
   * Splits a value along an axis.
   * @param sizes of the pieces: numbers, and vectors of one number (not before opset 13)
   */
  split(value: string, axis: number, sizes: readonly (number | string)[]): readonly string[] {
    const known = sizes.filter((size) => typeof size === "number");
    // Opset 13 turned the sizes into an input.
    if (this.constants.opset < 13) return this.write("Split", [value], { axis, split: known }, sizes.length);
    const all = known.length === sizes.length ? known : this.join(sizes);
    return this.write("Split", [value, all], { axis }, sizes.length);
  }

  /** A vector of numbers and vectors. */
  join(parts: readonly (number | string)[]): string {
    return this.concat(
      parts.map((part) => (typeof part === "number" ? [part] : part)),
      0,
    );
  }

  add(a: Operand, b: Operand): string {
    return this.op("Add", a, b);
  }

  sub(a: Operand, b: Operand): string {
    return this.op("Sub", a, b);
  }

  mul(a: Operand, b: Operand): string {
    return this.op("Mul", a, b);
  }

  div(a: Operand, b: Operand): string {
    return this.op("Div", a, b);
  }

  reshape(value: string, shape: Operand): string {
    return this.op("Reshape", value, shape);
  }

  shapeOf(value: string): string {
    return this.op("Shape", value);
  }

  matMul(a: string, b: string): string {
    return this.op("MatMul", a, b);
  }

  transpose(value: string, perm: readonly number[]): string {
    return this.op("Transpose", value, { perm });
  }

  cast(value: string, to: number): string {
    return this.op("Cast", value, { to });
  }

  /** Takes rows of a table, or elements of a vector. */
  gather(value: string, indices: string): string {
    return this.op("Gather", value, indices, { axis: 0 });
  }

  /** The numbers from 0 to a scalar, int64. */
  range(end: string): string {
    return this.op("Range", this.int(0), end, this.int(1));
  }

  /** Reshapes [… , in] to [x, in]. */
  rows(value: string): string {
    return this.op("Flatten", value, { axis: -1 });
  }

  /** Reshapes [x, width] to [… , width], as the leading dimensions of `like`. */
  unrows(value: string, like: string, width: Operand): string {
    return this.reshape(value, this.concat([this.slice(this.shapeOf(like), 0, 0, -1), width], 0));
  }

  slice(value: string, axis: number, from: number, to: number): string {
    return this.op("Slice", value, [from], [to], [axis]);
  }

  concat(values: readonly Operand[], axis: number): string {
    let level = values.map((value) => this.constants.of(value));
    while (level.length > 1) {
      const next: string[] = [];
      for (let i = 0; i < level.length; i += CONCAT_INPUTS) {
        const part = level.slice(i, i + CONCAT_INPUTS);
        next.push(part.length === 1 ? part[0]! : this.op("Concat", ...part, { axis }));
      }
      level = next;
    }
    return level[0]!;
  }

  int(value: number): string {
    return this.constants.add(`int/${value}`, (name) => makeInts(name, [value], []));
  }
}

/** A writer whose nodes, and constants of the main graph, have a name in front of theirs. */
export function writerOn({ graph, opset }: OnnxModel, name: string): NodeWriter {
  return new NodeWriter(new Constants(graph.proto, opset, name), name);
}

function isAttributes(given: Operand | Attributes | undefined): given is Attributes {
  return typeof given === "object" && !Array.isArray(given);
}

/** Collects nodes to add behind one node or in front of it. */
export class Place extends NodeWriter {
  readonly #edits: NodeEdits;
  readonly #graph: GraphProto;
  readonly #node: NodeProto;
  readonly #name: string;
  readonly #type: number;
  #result = "";

  /** @param type of the model's values there; added nodes compute in f32 */
  constructor(edits: NodeEdits, constants: Constants, graph: GraphProto, node: NodeProto, name: string, type: number) {
    super(constants, name);
    this.#edits = edits;
    this.#graph = graph;
    this.#node = node;
    this.#name = name;
    this.#type = type;
  }

  /** Puts the nodes collected so far in front of the node. */
  before(): void {
    this.#edits.insertBefore(this.#graph, this.#node, this.nodes.splice(0));
  }

  /** Adds a copy of the model's node with other inputs, and other fields where given. */
  like(node: NodeProto, input: readonly string[], fields: Partial<NodeProto> = {}): string {
    const name = this.fresh(node.opType);
    const copy = makeNode(node.opType, name, input, name, {}, node.domain);
    this.nodes.push(Object.assign(copy, { attribute: [...node.attribute], ...fields }));
    return name;
  }

  /** Casts a value of the model to f32. */
  up(value: string): string {
    return this.#type === FLOAT16 ? this.cast(value, FLOAT) : value;
  }

  /** Casts an f32 value to the model's type. */
  down(value: string): string {
    return this.#type === FLOAT16 ? this.cast(value, FLOAT16) : value;
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
    const last = this.nodes.at(-1)!;
    if (last.output[0] !== value) throw new Error(`${value} is not made last`);
    last.output[0] = result;
    this.#edits.insert(this.#graph, this.#node, this.nodes);
  }
}

/**
 * Frees the last dimension of outputs where it has one of these sizes, and forgets what the file says of values inside.
 */
export function freeLast(graph: GraphProto, sizes: ReadonlySet<bigint>): void {
  for (const { type } of graph.output) {
    const last = type?.tensorType?.shape?.dim.at(-1);
    if (last?.dimValue !== undefined && sizes.has(last.dimValue)) last.dimValue = undefined;
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
 * Checks that a model can take task inputs, before added names cannot be told from its own.
 * @throws FormatError when its opset is too old, or it has task inputs already, or other values with names as ours
 */
export function checkInjectable(model: OnnxModel): void {
  if (model.opset < LEAST_OPSET) {
    const message = `opset ${model.opset}: at least ${LEAST_OPSET} is needed; export it again with opset_version=17`;
    throw new FormatError(message, { file: model.name, part: "opset" });
  }
  const { scopes, consumers } = model.graph;
  const names = [...scopes].flatMap(([{ input }, { initializers, producers, outputs }]) => [
    ...input.map(({ name }) => name),
    ...[...initializers.keys(), ...producers.keys(), ...outputs],
  ]);
  const ours = new RegExp(`^${PREFIX}[/.]`);
  const taken = [...names, ...consumers.keys()].find((name) => ours.test(name));
  if (taken === undefined) return;
  // Values of one name would be confused.
  const message = `has task inputs already; pass the model as it was before, or rename its value "${taken}", whose name is as ours`;
  throw new FormatError(message, { file: model.name, part: "graph" });
}

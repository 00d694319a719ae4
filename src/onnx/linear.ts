/**
 * Layers and parameters of a model that tasks change, and the nodes at which something can be added to them: what
 * enters a linear layer and what comes out, whatever operators the exporter or a quantiser has made of it; biases; rows
 * of tables. Looks at names and operators only, reads no value and changes nothing.
 */

import { biasedRows } from "../core/mismatch.ts";
import { sum } from "../tensor/dtypes.ts";
import { constantOf, floatOf, intOf, type OnnxModel, type Use } from "./model.ts";
import { matrixShape, type OnnxParameter, partSize, type Slice, SUMS } from "./modules.ts";
import type { GraphProto, NodeProto, TensorProto } from "./protobuf.ts";

/** `TensorProto.DataType`. */
export const FLOAT = 1;
export const FLOAT16 = 10;
export const INT64 = 7;
export const UINT8 = 2;
export const INT8 = 3;
export const BOOL = 9;

/** One application of an adapted layer. Linear: y = x · Wᵀ, with the bias where the same node adds it. */
export interface Site {
  readonly graph: GraphProto;
  /** Node that makes y, its first output. */
  readonly node: NodeProto;
  /** Node that multiplies or looks up, where `node` dequantises or hands on a part of its result, or joins several. */
  readonly product?: NodeProto;
  /** Input: float rows of [in], values [batch, channels, …] of a convolution, or indices into a table. */
  readonly x: string;
  /** Type of y: `FLOAT` or `FLOAT16`. */
  readonly type: number;
  /** Value that the multiplying node adds itself, as bias. */
  readonly bias?: string | undefined;
  /** Part of the node's result, where y is only a part. */
  readonly slice?: Slice;
  /** The layers whose results, one behind the other, are y; `node` belongs to the first one. */
  readonly joined?: { readonly sites: readonly Site[]; readonly sizes: readonly number[] };
}

/** The components of one side of a module, [rows, width]. */
export interface ComponentRows {
  readonly rows: number;
  readonly width: number;
  floats(): Float32Array;
  /** Integers, where the pack stores them: component = scale of its row · integer. */
  readonly integers?: StoredIntegers | undefined;
}

interface StoredIntegers {
  readonly bits: 3 | 4 | 8;
  readonly scales: Float32Array;
  values(): Int8Array;
}

/** Components one below the other: integers of the widest type among theirs, floats where some are. */
export function joinedRows(all: readonly ComponentRows[]): ComponentRows {
  const [first, ...others] = all as [ComponentRows, ...ComponentRows[]];
  if (others.length === 0) return first;
  const rows = sum(all, (part) => part.rows);
  const joined = { rows, width: first.width, floats: () => joinedArrays(all.map((part) => part.floats())) };
  const integers = all.flatMap((part) => part.integers ?? []);
  if (integers.length < all.length) return joined;
  return {
    ...joined,
    integers: {
      bits: Math.max(...integers.map(({ bits }) => bits)) as StoredIntegers["bits"],
      scales: joinedArrays(integers.map(({ scales }) => scales)),
      values: () => joinedArrays(integers.map((part) => part.values())),
    },
  };
}

function joinedArrays<T extends Float32Array | Int8Array>(parts: readonly T[]): T {
  const Typed = parts[0]!.constructor as new (length: number) => T;
  const joined = new Typed(sum(parts, ({ length }) => length));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

export interface Components {
  readonly A: ComponentRows;
  readonly B: ComponentRows;
}

/** A layer of the model that gets a term: the one record of it between a pack's module and the inputs of the graph. */
export interface AdaptedLayer {
  /** The pack's name of the module, and its sizes. */
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly kind: "linear" | "convolution" | "embedding";
  readonly sites: readonly Site[];
  /** Shape of a convolution's weight: [out, channels, …]. */
  readonly shape?: readonly number[] | undefined;
  readonly components?: Components | undefined;
  /** True if tasks bring factors: expanded ones, or private ones next to a core. True without components. */
  readonly factors: boolean;
  /** Components that rows of the factors are coefficients over, on the sides where they are. */
  readonly over?: Partial<Components> | undefined;
  /** True if a task's factors may have to be made of components: where no core and no coefficients stand for them. */
  readonly expands?: boolean | undefined;
  /** True if tasks scale the rows of W + ΔW (DoRA). */
  readonly rowScale: boolean;
}

/** A bias that tasks change, of any layer: the change is added to the node's result. */
export interface AdaptedBias {
  readonly name: string;
  readonly size: number;
  readonly type: number;
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
  /** Set where it is a part of the vector that the nodes add. */
  readonly slice?: Slice | undefined;
}

/** A vector that tasks change and that is not added to the last dimension of a node's result. */
export interface AdaptedVector {
  readonly name: string;
  readonly size: number;
  readonly places: readonly VectorPlace[];
}

/** `weight`: multiplies the last dimension of the input that `op` normalises. `bias`: is added to channels. */
export interface VectorPlace {
  readonly kind: "weight" | "bias";
  readonly graph: GraphProto;
  readonly op: NodeProto;
  /** Index of the vector among the node's inputs. */
  readonly input: number;
  readonly node: NodeProto;
  readonly type: number;
}

/**
 * Rows of an embedding that tasks replace, or of a linear layer's weight, which has one for each output. Where an index
 * is met, y' = (1 − s)·y + s·row, and at the output of a linear layer y' = (1 − s)·y + s·x·row, with the strength s
 * behind the values of the row: so the base's rows need not be known.
 */
export interface AdaptedRows {
  readonly name: string;
  /** Number of rows, and of numbers in each. */
  readonly count: number;
  readonly width: number;
  readonly type: number;
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
  readonly sites: readonly Site[];
  /**
   * The pack's name of an embedding that the parameter is tied to: its rows are taken where a task has none for this
   * one.
   */
  readonly follows?: string | undefined;
}

/** A layer that each task brings whole, with a number of outputs of its own. */
export interface AdaptedHead {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly bias: boolean;
  readonly places: readonly { site: Site; end: NodeProto }[];
}

export interface GraphChanges {
  readonly modules: readonly AdaptedLayer[];
  readonly biases: readonly AdaptedBias[];
  readonly rows: readonly AdaptedRows[];
  readonly heads: readonly AdaptedHead[];
  readonly vectors: readonly AdaptedVector[];
}

/** @returns the linear layer that a use of a weight belongs to, or the reason why it is none */
function linearOf(model: OnnxModel, use: Use): Site | string {
  const { node, graph, input } = use;
  const refuse = (why: string): string => `${node.opType} "${node.name}" ${why}`;
  /** @param typed an input of the type of y @param bias index of the bias */
  const simple = (typed: number, bias = -1): Site => {
    const value = node.input[bias] ?? "";
    const type = typeOf(model, graph, node.input[typed]!);
    return { graph, node: requantized(model, use) ?? node, x: node.input[0]!, type, ...(value && { bias: value }) };
  };
  switch (node.opType) {
    case "MatMul":
    case "FusedMatMul":
      if (input !== 1) return refuse("multiplies the weight from the left");
      if (["transA", "transBatchA", "transBatchB"].some((name) => intOf(node, name)))
        return refuse("turns what enters it");
      if (floatOf(node, "alpha", 1) !== 1) return refuse("scales the product");
      return simple(1);
    case "Gemm":
      if (input !== 1 || intOf(node, "transA")) return refuse("multiplies from the left or transposed");
      if (floatOf(node, "alpha", 1) !== 1) return refuse("scales the product");
      if (node.input[2] && floatOf(node, "beta", 1) !== 1) return refuse("scales its bias");
      return simple(1, 2);
    case "MatMulNBits":
      return simple(2, 5);
    case "DynamicQuantizeMatMul":
      return simple(2, 4);
    case "MatMulInteger":
      return dynamic(model, use) ?? refuse("is not the dynamic quantisation that onnxruntime writes");
    case "QLinearMatMul":
      return quantized(model, use) ?? refuse("does not lie between QuantizeLinear and DequantizeLinear");
    default:
      return refuse(`is none of MatMul, Gemm, MatMulNBits, MatMulInteger, QLinearMatMul`);
  }
}

/** All linear layers with a parameter, or a copy of it, as weight. @returns the reason where a use of it is none */
export function linearsOf(model: OnnxModel, parameter: OnnxParameter): Site[] | string {
  const { uses, initializer, copies, slice, joined } = parameter;
  if (joined)
    return together(
      joined.map((part) => linearsOf(model, part)),
      joined.map((part) => matrixShape(part)![0]),
    );
  if (uses.length === 0) return `nothing in the graph uses "${initializer}"`;
  const linears: Site[] = [];
  for (const use of [uses, ...copies.map((copy) => copy.uses)].flat()) {
    const linear = linearOf(model, use);
    if (typeof linear === "string") return linear;
    linears.push(slice ? { ...linear, slice } : linear);
  }
  return linears;
}

/** Joins layers that are parts of one: each has the same input. */
function together(parts: readonly (Site[] | string)[], sizes: readonly number[]): Site[] | string {
  const reason = parts.find((part) => typeof part === "string");
  if (reason !== undefined) return reason as string;
  const lists = parts as readonly Site[][];
  const first = lists[0]!;
  const isSame = ({ x, graph, type }: Site, i: number): boolean =>
    x === first[i]?.x && graph === first[i].graph && type === first[i].type;
  if (!lists.every((list) => list.length === first.length && list.every(isSame)))
    return "its parts in the file take different values";
  return first.map((site, i) => {
    const sites = lists.map((list) => list[i]!);
    const bias = sites.find((part) => part.bias !== undefined)?.bias;
    return { ...site, bias, joined: { sites, sizes } };
  });
}

/**
 * The DequantizeLinear of a QDQ pair behind a node. Additions go behind it: its range was measured without a task and
 * would clip one.
 */
export function requantized(model: OnnxModel, { node, graph }: Pick<Use, "node" | "graph">): NodeProto | undefined {
  const quantize = onlyConsumer(model, graph, node);
  const dequantize = quantize?.opType === "QuantizeLinear" ? onlyConsumer(model, graph, quantize) : undefined;
  return dequantize?.opType === "DequantizeLinear" ? dequantize : undefined;
}

/** DynamicQuantizeLinear → MatMulInteger → Cast → Mul by the scales. */
export function dynamic(model: OnnxModel, { node, graph }: Use): Site | undefined {
  const before = producer(model, graph, node.input[0]!);
  const cast = onlyConsumer(model, graph, node);
  const scaled = cast?.opType === "Cast" ? onlyConsumer(model, graph, cast) : undefined;
  if (before?.opType !== "DynamicQuantizeLinear" || scaled?.opType !== "Mul") return undefined;
  const type = intOf(cast, "to", FLOAT);
  return { graph, node: scaled, x: before.input[0]!, type };
}

/** QuantizeLinear → QLinearMatMul → DequantizeLinear. */
export function quantized(model: OnnxModel, { node, graph }: Use): Site | undefined {
  const before = producer(model, graph, node.input[0]!);
  const after = onlyConsumer(model, graph, node);
  if (before?.opType !== "QuantizeLinear" || after?.opType !== "DequantizeLinear") return undefined;
  return { graph, node: after, x: before.input[0]!, type: FLOAT };
}

/** The Add of a linear layer's bias. Undefined when the layer has no bias, or its own node adds it. */
function biasAdd(model: OnnxModel, { node, graph }: Site): NodeProto | undefined {
  const next = onlyConsumer(model, graph, node);
  if (next?.opType !== "Add") return undefined;
  const [a, b] = next.input;
  const other = a === node.output[0] ? b! : a!;
  // Exporters put a Cast or DequantizeLinear between.
  const { initializers, producers } = model.graph;
  const bias = initializers.get(other) ?? initializers.get(producers.get(other)?.input[0] ?? "");
  return bias?.dims.length === 1 ? next : undefined;
}

/** The node that makes a linear layer's whole result: behind its bias, and behind the quantised values of that. */
export function endOf(model: OnnxModel, linear: Site): NodeProto {
  const add = biasAdd(model, linear);
  return add ? (requantized(model, { node: add, graph: linear.graph }) ?? add) : linear.node;
}

/**
 * A node that holds the weights of several layers, as optimisers make them: these can be neither found nor added to one
 * by one.
 */
export function fusedNode(model: OnnxModel): NodeProto | undefined {
  return model.graph.proto.node.find(
    ({ domain, opType }) =>
      domain === "com.microsoft" &&
      /^(Q|QOrdered|Packed|Longformer|Decoder|DecoderMaskedSelf)?Attention$|MoE$/.test(opType),
  );
}

/** The node that makes a value, and its graph: the given one or one around it. */
export function origin(model: OnnxModel, graph: GraphProto, value: string): Pick<Use, "node" | "graph"> | undefined {
  const { scopes, around } = model.graph;
  for (let at: GraphProto | undefined = graph; at; at = around.get(at)) {
    const node = scopes.get(at)?.producers.get(value);
    if (node) return { node, graph: at };
  }
  return undefined;
}

/** The node that makes a value, in the graph itself or in one around it. */
export function producer(model: OnnxModel, graph: GraphProto, value: string): NodeProto | undefined {
  return origin(model, graph, value)?.node;
}

/** The only node that reads a node's result, if it lies in the same graph and the result is no output of the graph. */
export function onlyConsumer(
  model: OnnxModel,
  graph: GraphProto,
  { output: [value = ""] }: NodeProto,
): NodeProto | undefined {
  const uses = model.graph.consumers.get(value) ?? [];
  const isOutput = model.graph.scopes.get(graph)?.outputs.has(value);
  return uses.length === 1 && uses[0]!.graph === graph && !isOutput ? uses[0]!.node : undefined;
}

/**
 * Follows a value back through the nodes that make it.
 * @param next the input of a node that counts; undefined ends it
 */
function* origins(
  model: OnnxModel,
  graph: GraphProto,
  value: string,
  next: (node: NodeProto) => string | undefined,
): Generator<{ readonly node: NodeProto | undefined; readonly tensor: TensorProto | undefined }> {
  const seen = new Set<string>();
  for (let at: string | undefined = value; at !== undefined && !seen.has(at); ) {
    seen.add(at);
    const { initializers, scopes } = model.graph;
    const node = producer(model, graph, at);
    const tensor = initializers.get(at) ?? scopes.get(graph)?.initializers.get(at) ?? constantOf(node);
    yield { node, tensor };
    at = node && next(node);
  }
}

/** Element type of a weight at the input of a product, as far as the nodes before it tell; otherwise f32. */
export function typeOf(model: OnnxModel, graph: GraphProto, value: string): number {
  const next = ({ opType, input }: NodeProto) => input[/^(CastLike|DequantizeLinear)$/.test(opType) ? 1 : 0];
  for (const { node, tensor } of origins(model, graph, value, next)) {
    if (tensor) return tensor.dataType;
    if (node?.opType === "Cast") return intOf(node, "to", FLOAT);
  }
  return FLOAT;
}

/** A bias that the model has; undefined where it cannot be added to. */
export function biasOf(model: OnnxModel, name: string, parameter: OnnxParameter): AdaptedBias | undefined {
  const { slice, shape, uses } = parameter;
  if (shape.length !== 1) return undefined;
  const size = partSize(parameter);
  const places = uses.flatMap((use) => placeOfBias(model, use) ?? []);
  if (places.length === 0 || places.length < uses.length) return undefined;
  return { name, size, type: typeWhereUsed(parameter), places, ...(slice && { slice }) };
}

/**
 * Rows of a parameter that tasks replace; the reason where it has none.
 * @throws BaseMismatchError for a layer with a bias
 */
export function rowsOf(model: OnnxModel, name: string, parameter: OnnxParameter): AdaptedRows | string {
  const { dtype, layout, shape, uses } = parameter;
  const type = typeWhereUsed(parameter);
  if (layout === "embedding") {
    const places = uses.filter(({ node, input }) => node.opType === "Gather" && input === 0);
    if (dtype === "other") return "which is quantised here";
    if (places.length === 0 || places.length < uses.length) return "which is no plain table of rows here";
    return { name, count: shape[0]!, width: shape[1]!, type, places, sites: [] };
  }
  const linears = linearsOf(model, parameter);
  if (typeof linears === "string") return `which has no rows here: ${linears}`;
  const biased = linears.some((linear) => linear.bias !== undefined || endOf(model, linear) !== linear.node);
  if (biased) throw biasedRows(name);
  const [count, width] = matrixShape(parameter)!;
  return { name, count, width, type, places: [], sites: linears };
}

/** Inputs that are added to the last dimension of what the node makes. */
const LAST: Readonly<Record<string, number>> = {
  EmbedLayerNormalization: 6,
  Gemm: 2,
  LayerNormalization: 2,
  MatMulNBits: 5,
  SkipLayerNormalization: 3,
};

/** The node to whose result a change of the bias is added. */
function placeOfBias(model: OnnxModel, { node, input, graph }: Use): Pick<Use, "node" | "graph"> | undefined {
  if (node.opType === "Add" || LAST[node.opType] === input)
    return { node: requantized(model, { node, graph }) ?? node, graph };
  // Operators of onnxruntime's optimiser add it to their first input, and go on from there.
  const [before = ""] = node.input;
  const isAlone = SUMS[node.opType] === input && model.graph.consumers.get(before)?.length === 1;
  const made = isAlone ? origin(model, graph, before) : undefined;
  return made?.node.output[0] === before ? made : undefined;
}

/** Type of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}

/**
 * The places of a bias that the model lacks: torch's optimiser drops zeros.
 * @param weight of the same layer
 * @returns undefined where that is no linear layer's, or what is added to its result may be the bias
 */
export function droppedBias(model: OnnxModel, name: string, weight: OnnxParameter): AdaptedBias | undefined {
  const linears = linearsOf(model, weight);
  const [size] = matrixShape(weight) ?? [];
  if (size === undefined || typeof linears === "string") return undefined;
  if (linears.some((linear) => addsVector(model, linear, size))) return undefined;
  return { name, size, type: linears[0]!.type, places: linears.map(({ graph, node }) => ({ graph, node })) };
}

/** Operators that pass the numbers of their first input on, in another shape or type. */
const RESHAPES = new Set(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]);

/** True if a constant of this size, so maybe a bias, is added to a layer's result. The shape may change in between. */
function addsVector(model: OnnxModel, { node, bias }: Site, size: number): boolean {
  if (bias !== undefined) return true;
  const seen = new Set(node.output.slice(0, 1));
  // The set grows during the loop.
  for (const value of seen) {
    for (const { node: next, graph } of model.graph.consumers.get(value) ?? []) {
      const { opType, input, output } = next;
      if (RESHAPES.has(opType) && input[0] === value && output[0]) seen.add(output[0]);
      const first = /^(Add|Sub|Bias.*)$/.test(opType) ? 0 : SUMS[opType];
      const others = first === undefined ? [] : input.slice(first).filter((other) => other !== value);
      if (others.some((other) => constantSize(model, graph, other) === size)) return true;
    }
  }
  return false;
}

/** Number of a constant's elements; undefined where a value is none. */
function constantSize(model: OnnxModel, graph: GraphProto, value: string): number | undefined {
  const next = ({ opType, input }: NodeProto) =>
    opType === "DequantizeLinear" || RESHAPES.has(opType) ? input[0] : undefined;
  for (const { tensor } of origins(model, graph, value, next))
    if (tensor) return tensor.dims.reduce((a, b) => a * Number(b), 1);
  return undefined;
}

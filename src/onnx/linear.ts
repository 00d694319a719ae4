/**
 * Applications of linear layers: the value that enters and the one that comes out, whatever operators the exporter or a quantiser has
 * made of the layer. Looks at names and operators only and reads no value.
 */
import { attribute, type OnnxModel, type Use } from "./model.ts";
import { matrixShape, type OnnxParameter, type Slice } from "./modules.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

/** `TensorProto.DataType`. */
export const FLOAT = 1;
export const FLOAT16 = 10;
export const INT64 = 7;
export const UINT8 = 2;
export const INT8 = 3;
export const BOOL = 9;

/** One application of a linear layer: y = x · Wᵀ, with the bias where the same node adds it. */
export interface Linear {
  /** The graph that holds the nodes. */
  readonly graph: GraphProto;
  /** Node that makes y, its first output. */
  readonly node: NodeProto;
  /** Node that multiplies, where `node` hands on a part of its result, or joins several. */
  readonly product?: NodeProto;
  /** Float input, rows of [in]. */
  readonly x: string;
  /** Type of x and y: `FLOAT` or `FLOAT16`. */
  readonly type: number;
  /** Value that the multiplying node adds itself, as bias. */
  readonly bias?: string | undefined;
  /** Part of the node's result, where y is only a part. */
  readonly slice?: Slice;
  /** The layers whose results, one behind the other, are y; `node` belongs to the first one. */
  readonly joined?: { readonly linears: readonly Linear[]; readonly sizes: readonly number[] };
}

/** Reason why a use of a weight is no linear layer with a result that can be added to. */
export class NotLinear {
  readonly reason: string;

  constructor(reason: string) {
    this.reason = reason;
  }
}

/** Linear layer that a use of a weight belongs to. */
function linearOf(model: OnnxModel, use: Use): Linear | NotLinear {
  const { node, graph, input } = use;
  const refuse = (why: string): NotLinear => new NotLinear(`${node.opType} "${node.name}" ${why}`);
  const simple = (type: number, bias?: number): Linear => {
    const end = requantized(model, use) ?? node;
    const value = bias === undefined ? "" : (node.input[bias] ?? "");
    return { graph, node: end, x: node.input[0]!, type, ...(value && { bias: value }) };
  };
  switch (node.opType) {
    case "MatMul":
      if (input !== 1) return refuse("multiplies the weight from the left");
      return simple(typeOf(model, graph, node.input[1]!));
    case "FusedMatMul":
      if (input !== 1) return refuse("multiplies the weight from the left");
      if (["transA", "transBatchA", "transBatchB"].some((name) => attribute(node, name)?.i))
        return refuse("turns what enters it");
      if ((attribute(node, "alpha")?.f ?? 1) !== 1) return refuse("scales the product");
      return simple(typeOf(model, graph, node.input[1]!));
    case "Gemm":
      if (input !== 1 || attribute(node, "transA")?.i) return refuse("multiplies from the left or transposed");
      if ((attribute(node, "alpha")?.f ?? 1) !== 1) return refuse("scales the product");
      if (has(node, 2) && (attribute(node, "beta")?.f ?? 1) !== 1) return refuse("scales its bias");
      return simple(typeOf(model, graph, node.input[1]!), 2);
    case "MatMulNBits":
      return simple(typeOf(model, graph, node.input[2]!), 5);
    case "DynamicQuantizeMatMul":
      return simple(FLOAT, 4);
    case "MatMulInteger":
      return dynamic(model, use) ?? refuse("is not the dynamic quantisation that onnxruntime writes");
    case "QLinearMatMul":
      return quantized(model, use) ?? refuse("does not lie between QuantizeLinear and DequantizeLinear");
    default:
      return refuse(`is none of MatMul, Gemm, MatMulNBits, MatMulInteger, QLinearMatMul`);
  }
}

/** All linear layers with a parameter, or a copy of it, as weight. */
export function linearsOf(model: OnnxModel, parameter: OnnxParameter): Linear[] | NotLinear {
  const { uses, initializer, copies, slice, joined } = parameter;
  if (joined)
    return together(
      joined.map((one) => linearsOf(model, one)),
      joined.map((one) => matrixShape(one)![0]),
    );
  if (uses.length === 0) return new NotLinear(`nothing in the graph uses "${initializer}"`);
  const linears: Linear[] = [];
  for (const use of [uses, ...copies.map((copy) => copy.uses)].flat()) {
    const linear = linearOf(model, use);
    if (linear instanceof NotLinear) return linear;
    linears.push(slice ? { ...linear, slice } : linear);
  }
  return linears;
}

/** Joins layers that are parts of one: each has the same input. */
function together(parts: readonly (Linear[] | NotLinear)[], sizes: readonly number[]): Linear[] | NotLinear {
  const lists: Linear[][] = [];
  for (const part of parts) {
    if (part instanceof NotLinear) return part;
    lists.push(part);
  }
  const [first] = lists as [Linear[], ...Linear[][]];
  const made: Linear[] = [];
  for (const [i, linear] of first.entries()) {
    const linears = lists.flatMap((list) => list[i] ?? []);
    const isOne = linears.every(
      ({ x, graph, type }) => x === linear.x && graph === linear.graph && type === linear.type,
    );
    if (!isOne || lists.some((list) => list.length !== first.length))
      return new NotLinear("its parts in the file take different values");
    made.push({ ...linear, bias: linears.find(({ bias }) => bias !== undefined)?.bias, joined: { linears, sizes } });
  }
  return made;
}

/**
 * The DequantizeLinear of a QuantizeLinear → DequantizeLinear pair directly behind a node. Additions go behind it: the pair's range was
 * measured without a task and would clip one.
 */
export function requantized(model: OnnxModel, { node, graph }: Pick<Use, "node" | "graph">): NodeProto | undefined {
  const quantize = onlyConsumer(model, graph, node);
  const dequantize = quantize?.opType === "QuantizeLinear" ? onlyConsumer(model, graph, quantize) : undefined;
  return dequantize?.opType === "DequantizeLinear" ? dequantize : undefined;
}

/** DynamicQuantizeLinear → MatMulInteger → Cast → Mul by the scales. */
export function dynamic(model: OnnxModel, { node, graph }: Use): Linear | undefined {
  const before = producer(model, graph, node.input[0]!);
  const cast = onlyConsumer(model, graph, node);
  const scaled = cast?.opType === "Cast" ? onlyConsumer(model, graph, cast) : undefined;
  if (before?.opType !== "DynamicQuantizeLinear" || scaled?.opType !== "Mul") return undefined;
  const type = Number(attribute(cast!, "to")?.i ?? FLOAT);
  return { graph, node: scaled, x: before.input[0]!, type };
}

/** QuantizeLinear → QLinearMatMul → DequantizeLinear. */
export function quantized(model: OnnxModel, { node, graph }: Use): Linear | undefined {
  const before = producer(model, graph, node.input[0]!);
  const after = onlyConsumer(model, graph, node);
  if (before?.opType !== "QuantizeLinear" || after?.opType !== "DequantizeLinear") return undefined;
  return { graph, node: after, x: before.input[0]!, type: FLOAT };
}

/**
 * The Add of a linear layer's bias: its output is the layer's whole result. Undefined when the layer has no bias, or its own node adds
 * it.
 */
function biasAdd(model: OnnxModel, { node, graph }: Linear): NodeProto | undefined {
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
export function endOf(model: OnnxModel, linear: Linear): NodeProto {
  const add = biasAdd(model, linear);
  return add ? (requantized(model, { node: add, graph: linear.graph }) ?? add) : linear.node;
}

/**
 * Finds a node that holds the weights of several layers, as graph optimisers make them: these layers can be neither found nor added to
 * one by one.
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

function has({ input }: NodeProto, index: number): boolean {
  return (input[index] ?? "") !== "";
}

/** Element type of a weight at the input of a product, as far as the nodes before it tell; otherwise f32. */
export function typeOf(model: OnnxModel, graph: GraphProto, value: string): number {
  const seen = new Set<string>();
  for (let at = value; !seen.has(at); ) {
    seen.add(at);
    const tensor = model.graph.initializers.get(at) ?? model.graph.scopes.get(graph)?.initializers.get(at);
    if (tensor) return tensor.dataType;
    const node = producer(model, graph, at);
    if (!node) return FLOAT;
    switch (node.opType) {
      case "Cast":
        return Number(attribute(node, "to")?.i ?? FLOAT);
      case "CastLike":
      case "DequantizeLinear":
        at = node.input[1]!;
        break;
      case "Constant":
        return attribute(node, "value")?.t?.dataType ?? FLOAT;
      default:
        at = node.input[0] ?? "";
    }
  }
  return FLOAT;
}

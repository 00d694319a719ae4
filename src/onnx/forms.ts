/**
 * Uses of weights that do not belong to linear layers but can be adapted: convolutions, tables of embeddings, weights of normalisations,
 * biases of convolutions. Looks at names and operators only and reads no value. Loaded only for packs with such modules.
 */
import { dynamic, FLOAT, FLOAT16, onlyConsumer, quantized, requantized, typeOf } from "./linear.ts";
import { attribute, type OnnxModel, type Use } from "./model.ts";
import type { OnnxParameter } from "./modules.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

/** One application of a convolution or of a table. */
export interface FormPlace {
  readonly graph: GraphProto;
  /** The convolution, quantised or not, or the Gather. */
  readonly op: NodeProto;
  /** Node that makes y, its first output: `op` itself, or the one that dequantises its result. */
  readonly node: NodeProto;
  /** Input: float values [batch, channels, …], or indices. */
  readonly x: string;
  /** Type of y: `FLOAT` or `FLOAT16`. */
  readonly type: number;
  /** The bias that `op` adds; then `op` is `node`. */
  readonly bias: string | undefined;
}

/** Kind and uses of an adapted module that is no linear layer. */
export interface Form {
  readonly kind: "convolution" | "embedding";
  /** Shape of a convolution's weight: [out, channels, …]. */
  readonly shape: readonly number[];
  readonly places: readonly FormPlace[];
}

/** A vector that tasks change and that is not added to the last dimension of a node's result. */
export interface GraftVector {
  /** Name of the parameter. */
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
  /** Node that makes the result, its first output. */
  readonly node: NodeProto;
  readonly type: number;
}

/** @returns the reason where a use of the weight cannot be adapted */
export function formOf(model: OnnxModel, { uses, copies, initializer, shape }: OnnxParameter): Form | string {
  const all = [uses, ...copies.map((copy) => copy.uses)].flat().filter(readsValues);
  if (all.length === 0) return `nothing in the graph uses "${initializer}"`;
  const kind = all[0]!.node.opType.startsWith("Gather") ? "embedding" : "convolution";
  const places: FormPlace[] = [];
  for (const use of all) {
    const place = kind === "embedding" ? tableOf(model, use) : convolutionOf(model, use);
    if (typeof place === "string") return `${use.node.opType} "${use.node.name}" ${place}`;
    places.push(place);
  }
  return { kind, shape, places };
}

/** Whether a node reads more than the weight's shape, which is all that some exporters ask for. */
function readsValues({ node }: Use): boolean {
  return node.opType !== "Shape";
}

/** Index of the weight among the inputs, by operator. */
const WEIGHTS: Readonly<Record<string, number>> = { Conv: 1, ConvInteger: 1, QLinearConv: 3 };

function convolutionOf(model: OnnxModel, use: Use): FormPlace | string {
  const { node: op, graph, input } = use;
  const groups = Number(attribute(op, "group")?.i ?? 1);
  if (WEIGHTS[op.opType] !== input) return "is none of Conv, ConvInteger, QLinearConv";
  if (groups !== 1) return `is a grouped convolution (${groups} groups), whose groups see other channels each`;
  if (op.opType === "Conv") {
    const node = requantized(model, use) ?? op;
    const bias = node === op ? op.input[2] || undefined : undefined;
    return { graph, op, node, x: op.input[0]!, type: typeOf(model, graph, op.input[1]!), bias };
  }
  const found = op.opType === "ConvInteger" ? dynamic(model, use) : quantized(model, use);
  if (!found) return "does not lie between the nodes that quantisers of onnxruntime write";
  return { graph, op, node: found.node, x: found.x, type: found.type, bias: undefined };
}

function tableOf(model: OnnxModel, use: Use): FormPlace | string {
  const { node: op, graph, input } = use;
  const axis = Number(attribute(op, op.opType === "Gather" ? "axis" : "gather_axis")?.i ?? 0);
  if (!/^Gather(BlockQuantized)?$/.test(op.opType) || input !== 0 || axis !== 0) return "does not look up rows";
  const place = { graph, op, x: op.input[1]!, bias: undefined };
  if (op.opType !== "Gather") return { ...place, node: op, type: typeOf(model, graph, op.input[2]!) };
  const next = onlyConsumer(model, graph, op);
  const node = requantized(model, use) ?? (next?.opType === "DequantizeLinear" ? next : op);
  return { ...place, node, type: typeOf(model, graph, node === next ? next.input[1]! : op.input[0]!) };
}

/** Normalisations, and the index of their weight. */
const NORMALISATIONS: Readonly<Record<string, number>> = {
  LayerNormalization: 1,
  RMSNormalization: 1,
  SimplifiedLayerNormalization: 1,
  SkipLayerNormalization: 2,
  SkipSimplifiedLayerNormalization: 2,
};

/** Uses of a vector; undefined where one is neither the weight of a normalisation nor the bias of a convolution. */
export function vectorOf(model: OnnxModel, name: string, { shape, uses }: OnnxParameter): GraftVector | undefined {
  const [size] = shape;
  if (shape.length !== 1 || size === undefined || uses.length === 0) return undefined;
  const places: VectorPlace[] = [];
  for (const use of uses.filter(readsValues)) {
    const { node: op, graph, input } = use;
    const kind = NORMALISATIONS[op.opType] === input || op.opType === "Mul" ? "weight" : "bias";
    if (kind === "bias" && !(op.opType === "Conv" && input === 2)) return undefined;
    // The type of a convolution's bias is that of its weight, since a quantised bias is integers.
    const type = typeOf(model, graph, op.input[kind === "weight" ? input : 1]!);
    if (type !== FLOAT && type !== FLOAT16) return undefined;
    places.push({ kind, graph, op, input, node: requantized(model, use) ?? op, type });
  }
  return { name, size, places };
}

/**
 * onnxruntime's own `Attention`, as its optimiser makes it of BERT and its kin: the weights of queries, keys and values lie in it as
 * one matrix. It is taken apart into the product, its bias, a Split, and `MultiHeadAttention`, the same kernel without the
 * product; so there is a packed layer that packed.ts adapts. What that cannot say stays as it is. Loaded where there is one.
 */
import { isParameterName, placeOf } from "./claims.ts";
import { attribute, indexGraph, type OnnxModel } from "./model.ts";
import { makeNode, makeSplit, NodeEdits } from "./nodes.ts";
import type { NodeProto } from "./onnx_pb.ts";

/** What both operators understand alike. */
const SHARED = new Set(["num_heads", "unidirectional", "mask_filter_value", "scale"]);

/** Inputs of `Attention`. */
const [X, WEIGHT, BIAS, MASK, PAST, SCORES, PAST_LENGTH] = [0, 1, 2, 3, 4, 5, 6] as const;

/** Operators that hold the weights of several layers, and how a file without them is made. */
const OTHERS: Readonly<Record<string, string>> = {
  QAttention: "is an attention that was quantised after it had been fused: quantise the unoptimised export instead",
  PackedAttention: "is an attention without padding: pass the file from before convert_to_packing_mode",
};

/** Whether a node is an `Attention` with weights inside. */
export function isAttention({ domain, opType }: NodeProto): boolean {
  return domain === "com.microsoft" && opType === "Attention";
}

/** Takes the attentions of the main graph apart, where it can. Changes `model.proto`. @returns the model with a new index */
export function unfuse(model: OnnxModel): OnnxModel {
  const { proto } = model.graph;
  const edits = new NodeEdits();
  for (const node of proto.node) {
    if (!isAttention(node)) continue;
    const sizes = sizesOf(model, node);
    if (typeof sizes === "string") continue;
    edits.insert(proto, node, apart(model, node, sizes));
    edits.remove(proto, node);
  }
  edits.apply();
  return { ...model, graph: indexGraph(proto, model.name) };
}

/** Why a node that holds the weights of several layers could not be taken apart, and what to do. */
export function whyFused(model: OnnxModel, node: NodeProto): string {
  const which = `${node.opType} "${node.name || node.output[0]}"`;
  const known = OTHERS[node.opType];
  if (known) return `the model is fused already: ${which} ${known}`;
  const why = isAttention(node) ? sizesOf(model, node) : undefined;
  const reason = typeof why === "string" ? ` ${why}` : "";
  return `the model is fused already: ${which}${reason}; pass the unoptimised export`;
}

/** How the product is divided; or why the node cannot be taken apart. */
function sizesOf({ graph }: OnnxModel, node: NodeProto): readonly number[] | string {
  const has = (input: number): boolean => (node.input[input] ?? "") !== "";
  if (has(PAST) || has(PAST_LENGTH) || node.output.slice(1).some((value) => value !== ""))
    return "keeps its keys and values for the next run";
  if (attribute(node, "do_rotary")?.i) return "turns its queries and keys (do_rotary)";
  if (!graph.proto.node.includes(node)) return "lies in a nested graph";
  const weight = graph.initializers.get(node.input[WEIGHT] ?? "");
  const total = Number(weight?.dims[1] ?? 0);
  if (weight?.dims.length !== 2) return "has a weight that the file does not hold as a matrix";
  const given = (attribute(node, "qkv_hidden_sizes")?.ints ?? []).map(Number);
  const sizes = given.length > 0 ? given : [total / 3, total / 3, total / 3];
  const fits = sizes.length === 3 && sizes.every((size) => Number.isInteger(size) && size > 0);
  if (!fits || sizes.reduce((a, b) => a + b, 0) !== total || sizes[0] !== sizes[1])
    return `divides ${total} columns into [${sizes.join(", ")}]`;
  return sizes;
}

function apart(model: OnnxModel, node: NodeProto, sizes: readonly number[]): NodeProto[] {
  const [out] = node.output as [string];
  // Not with a slash in front, as names of modules have it, but for the product.
  const name = `${node.name || "Attention"}/${out}`.replace(/^\/+/, "");
  const module = moduleOf(model, node);
  const product = `${name}/product`;
  const nodes = [
    makeNode("MatMul", module ? `/${module}/MatMul` : product, [node.input[X]!, node.input[WEIGHT]!], product),
  ];
  let value = product;
  if (node.input[BIAS]) {
    value = `${name}/sum`;
    nodes.push(makeNode("Add", module ? `/${module}/Add` : value, [product, node.input[BIAS]], value));
  }
  const parts = ["query", "key", "value"].map((part) => `${name}/${part}`);
  nodes.push(makeSplit(model, `${name}/split`, value, parts, sizes));
  const heads = makeNode("MultiHeadAttention", name, parts, out);
  heads.domain = node.domain;
  heads.attribute = node.attribute.filter((one) => SHARED.has(one.name));
  // Behind the parts: a bias, which is added already, the mask, and what is added to the scores.
  heads.input.push(...trimmed(["", node.input[MASK] ?? "", node.input[SCORES] ?? ""]));
  return [...nodes, heads];
}

/**
 * A path for the packed layer, told by the projection behind it: "…/attention/qkv" of "…attention.output.dense". The weight
 * has a name that the optimiser has made up, or, of GPT-2, that of the checkpoint, which stays.
 */
function moduleOf({ graph }: OnnxModel, node: NodeProto): string | undefined {
  if (isParameterName(node.input[WEIGHT]!)) return undefined;
  const [out] = node.output as [string];
  const paths = (graph.consumers.get(out) ?? []).flatMap(({ node: next, input }) => {
    const place = input === 0 && /MatMul|Gemm/.test(next.opType) ? placeOf(graph, next) : undefined;
    return place?.shared === 1 && place.path !== "" ? [place.path] : [];
  });
  const [path] = paths;
  return path === undefined ? undefined : `${path.replace(/\.(output\.dense|[^.]+)$/, "")}.qkv`.replaceAll(".", "/");
}

function trimmed(inputs: string[]): string[] {
  while (inputs.length > 0 && inputs.at(-1) === "") inputs.pop();
  return inputs;
}

/**
 * Takes apart onnxruntime's own `Attention`, which its optimiser makes for BERT-like models with the weights of queries, keys and values
 * in one matrix. The parts are the product, its bias, a Split, and `MultiHeadAttention`, the same kernel without the product; packed.ts
 * then adapts the packed layer. An attention that these operators cannot express stays as it is. Loaded only for models with one.
 */

import { FLOAT16, INT64 } from "./linear.ts";
import { attribute, indexGraph, type OnnxModel } from "./model.ts";
import { isParameterName, modulePathOf } from "./modules.ts";
import { type Attributes, makeFloats, makeInts, makeNode, makeSplit, NodeEdits } from "./nodes.ts";
import type { NodeProto } from "./protobuf.ts";
import { Ranks } from "./rank.ts";

/** Attributes with the same meaning in both operators. */
const SHARED = new Set(["num_heads", "unidirectional", "mask_filter_value", "scale"]);

/** Indices of the inputs of `Attention`. */
const [X, WEIGHT, BIAS, MASK, PAST, SCORES, PAST_LENGTH] = [0, 1, 2, 3, 4, 5, 6] as const;

/** Other operators that hold the weights of several layers, and how to make a file without them. */
const OTHERS: Readonly<Record<string, string>> = {
  QAttention: "is an attention that was quantised after it had been fused: quantise the unoptimised export instead",
  PackedAttention: "is an attention without padding: pass the file from before convert_to_packing_mode",
};

/** Whether a node is an `Attention` with weights inside. */
function isAttention({ domain, opType }: NodeProto): boolean {
  return domain === "com.microsoft" && opType === "Attention";
}

/** Takes the attentions of the main graph apart where possible. Changes `model.proto`. @returns the model with a new index */
export function unfuse(model: OnnxModel): OnnxModel {
  const { proto } = model.graph;
  const edits = new NodeEdits();
  const masks = new Masks(model);
  for (const node of proto.node) {
    if (!isAttention(node)) continue;
    const sizes = sizesOf(model, node);
    if (typeof sizes === "string") continue;
    edits.insert(proto, node, apart(model, node, sizes, masks));
    edits.remove(proto, node);
  }
  edits.apply();
  return { ...model, graph: indexGraph(proto, model.name) };
}

/** Reason why a node with the weights of several layers was not taken apart, and what to do. */
export function whyFused(model: OnnxModel, node: NodeProto): string {
  const which = `${node.opType} "${node.name || node.output[0]}"`;
  const known = OTHERS[node.opType];
  if (known) return `the model is fused already: ${which} ${known}`;
  const why = isAttention(node) ? sizesOf(model, node) : undefined;
  const reason = typeof why === "string" ? ` ${why}` : "";
  return `the model is fused already: ${which}${reason}; pass the unoptimised export`;
}

/** Sizes that the product is split into; or the reason why the node cannot be taken apart. */
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

function apart(model: OnnxModel, node: NodeProto, sizes: readonly number[], masks: Masks): NodeProto[] {
  const [out] = node.output as [string];
  // The name has no slash in front, except for the product's: names of modules are read from that one only.
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
  // The remaining inputs of MultiHeadAttention: an empty bias, which is added already; the mask; the addition to the scores.
  const mask = masks.of(node, nodes);
  heads.input.push(...trimmed(["", mask.padding, mask.scores]));
  return [...nodes, heads];
}

/**
 * Turns masks into additions to the scores, which is how an attention uses them: on WebGPU `MultiHeadAttention` takes no other masks. A
 * mask stays as it is where the file does not tell its form.
 */
class Masks {
  readonly #model: OnnxModel;
  readonly #ranks: Ranks;
  readonly #made = new Map<string, string>();

  constructor(model: OnnxModel) {
    this.#model = model;
    this.#ranks = new Ranks(model);
  }

  /** Mask and addition to the scores of a node. @param nodes that go in front of it; some are added */
  of(node: NodeProto, nodes: NodeProto[]): { padding: string; scores: string } {
    const [padding = "", scores = ""] = [node.input[MASK], node.input[SCORES]];
    const rank = padding === "" ? undefined : this.#rankOf(padding);
    if (rank !== 1 && rank !== 2) return { padding, scores };
    const type = Number(this.#model.graph.initializers.get(node.input[WEIGHT]!)!.dataType);
    const least = attribute(node, "mask_filter_value")?.f ?? -10000;
    // Another input may have as many rows of another length.
    const key = `${padding}/${node.input[X]}/${least}`;
    let added = this.#made.get(key);
    if (added === undefined) {
      added = this.#add(rank, node, type === FLOAT16 ? Math.max(least, -65504) : least, type, nodes);
      this.#made.set(key, added);
    }
    if (scores === "") return { padding: "", scores: added };
    const sum = `${node.output[0]}/scores`;
    nodes.push(makeNode("Add", sum, [scores, added], sum));
    return { padding: "", scores: sum };
  }

  /** Rank of a mask. 1: lengths of rows; 2: a mask of rows. */
  #rankOf(mask: string): number | undefined {
    const { producers } = this.#model.graph;
    const made = producers.get(mask);
    if (made?.opType === "EmbedLayerNormalization") return made.output[1] === mask ? 1 : undefined;
    if (made?.opType === "ReduceSum") return attribute(made, "keepdims")?.i === 0n ? 1 : undefined;
    // Vectors of other lengths are ambiguous: ends of rows, or starts and ends.
    const rank = this.#ranks.of(mask);
    return rank === 2 ? 2 : undefined;
  }

  /** Makes [batch, 1, length, length]: 0, or the least score where a position is masked. */
  #add(rank: number, node: NodeProto, least: number, type: number, nodes: NodeProto[]): string {
    const { initializer } = this.#model.graph.proto;
    const name = `${node.output[0]}/mask`;
    const op = (opType: string, input: readonly string[], attributes: Attributes = {}): string => {
      const out = `${name}/${nodes.length}`;
      nodes.push(makeNode(opType, out, input, out, attributes));
      return out;
    };
    const ints = (...values: number[]): string => {
      initializer.push(makeInts(`${name}/ints/${initializer.length}`, values));
      return initializer.at(-1)!.name;
    };
    initializer.push(makeFloats(`${name}/none`, [0], [1]), makeFloats(`${name}/least`, [least], [1]));
    // The length of rows, [1].
    const length = op("Slice", [op("Shape", [node.input[X]!]), ints(1), ints(2)]);
    const mask = op("Cast", [node.input[MASK]!], { to: INT64 });
    let kept: string;
    if (rank === 1) {
      const ones = op("Expand", [ints(1), length]);
      // Positions 1, 2, …: a row keeps as many as its length.
      const positions = op("CumSum", [ones, ints(0)]);
      kept = op("Less", [op("Sub", [positions, ints(1)]), op("Reshape", [mask, ints(-1, 1)])]);
    } else kept = op("Less", [ints(0), mask]);
    const added = op("Where", [kept, `${name}/none`, `${name}/least`]);
    const rows = op("Reshape", [type === FLOAT16 ? op("Cast", [added], { to: FLOAT16 }) : added, ints(0, 1, 1, -1)]);
    return op("Expand", [rows, op("Concat", [ints(1, 1), length, ints(1)], { axis: 0 })]);
  }
}

/**
 * A path for the packed layer, from the projection behind it: "…/attention/qkv" for "…attention.output.dense". The weight's own name is
 * made up by the optimiser; in GPT-2 it is the checkpoint's and stays.
 */
function moduleOf({ graph }: OnnxModel, node: NodeProto): string | undefined {
  if (isParameterName(node.input[WEIGHT]!)) return undefined;
  const [out] = node.output as [string];
  const paths = (graph.consumers.get(out) ?? []).flatMap(({ node: next, input }) => {
    const place = input === 0 && /MatMul|Gemm/.test(next.opType) ? modulePathOf(graph, next) : undefined;
    return place?.shared === 1 && place.path !== "" ? [place.path] : [];
  });
  const [path] = paths;
  return path === undefined ? undefined : `${path.replace(/\.(output\.dense|[^.]+)$/, "")}.qkv`.replaceAll(".", "/");
}

function trimmed(inputs: string[]): string[] {
  while (inputs.length > 0 && inputs.at(-1) === "") inputs.pop();
  return inputs;
}

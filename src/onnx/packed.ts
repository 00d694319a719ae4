/**
 * Layers that a file holds in other pieces than the checkpoint: several packed into one, such as the queries, keys and
 * values of an attention, or one divided into several. In a packed layer weights lie one below the other and results
 * one behind the other: the result is split, added to and joined again. The results of a divided layer are joined and
 * split again.
 *
 * `Attention` of onnxruntime's optimiser, with the weights of queries, keys and values in one matrix, becomes such a
 * layer: a product, its bias, a Split, and `MultiHeadAttention`, the same kernel without the product. An attention that
 * these operators cannot express stays as it is. Loaded only for models with such layers.
 */
import { elementsOf, sum } from "../tensor/dtypes.ts";
import { type AdaptedBias, type AdaptedLayer, FLOAT16, INT64, type Site } from "./linear.ts";
import { constantOf, floatOf, indexGraph, inOrder, intOf, intsOf, type OnnxModel, ranksOf } from "./model.ts";
import { isParameterName, matrixShape, modulePathOf, type OnnxParameter } from "./modules.ts";
import { makeNode, makeSplit, NodeEdits, PREFIX, readBy, writerOn } from "./nodes.ts";
import type { GraphProto, NodeProto, TensorProto } from "./protobuf.ts";

/** Packed layers, and the layers in them in order. "qkv" is the name that `unfuse` gives to that of an `Attention`. */
const PACKED: readonly (readonly [whole: string, ...parts: string[]])[] = [
  ["qkv_proj", "q_proj", "k_proj", "v_proj"],
  ["gate_up_proj", "gate_proj", "up_proj"],
  ["qkv", "self.query", "self.key", "self.value"],
  ["qkv", "attention.query", "attention.key", "attention.value"],
  ["qkv", "query", "key", "value"],
  ["qkv", "q_lin", "k_lin", "v_lin"],
  ["qkv", "q_proj", "k_proj", "v_proj"],
];

/**
 * Packed layers that a layer may lie in: their names, with and without the segments in front, and its place among their
 * parts.
 */
function packedNames(module: string) {
  return PACKED.flatMap(([whole, ...parts]) => {
    const index = parts.findIndex((part) => module === part || module.endsWith(`.${part}`));
    const part = parts[index];
    if (part === undefined) return [];
    return [{ name: module.slice(0, module.length - part.length) + whole, whole, part, index, count: parts.length }];
  });
}

/** Layers that a layer of this name may have been divided into. */
function dividedNames(module: string): string[][] {
  return PACKED.slice(0, 2).flatMap(([whole, ...parts]) => {
    if (module !== whole && !module.endsWith(`.${whole}`)) return [];
    return [parts.map((part) => module.slice(0, module.length - whole.length) + part)];
  });
}

/** Makes a parameter of its own for a part of a packed one; undefined where the graph does not tell the split. */
function partOfPacked(
  model: OnnxModel,
  packed: OnnxParameter,
  name: string,
  { index, count }: { readonly index: number; readonly count: number },
): OnnxParameter | undefined {
  const total = packed.shape.length === 1 ? packed.shape[0] : matrixShape(packed)?.[0];
  const sizes = total === undefined ? undefined : sizesOf(model, packed, total, count);
  return sizes?.[index] === undefined ? undefined : { ...packed, name, slice: { index, sizes, of: packed.name } };
}

/** Joins parts to one parameter; undefined where they do not fit each other. */
function joinParts(name: string, parts: readonly OnnxParameter[]): OnnxParameter | undefined {
  const shapes = parts.map((part) => matrixShape(part));
  const [first] = parts as [OnnxParameter];
  const fit = shapes.every((shape) => shape !== undefined && shape[1] === shapes[0]![1]);
  if (!fit || parts.some(({ dtype }) => dtype !== first.dtype)) return undefined;
  const out = sum(shapes, (shape) => shape![0]);
  const [, inputs] = shapes[0]!;
  const { initializer, dtype, layout } = first;
  const shape = layout === "in-out" ? [inputs, out] : [out, inputs];
  const uses = parts.flatMap((part) => part.uses);
  return {
    ...{ name, initializer, dtype, shape, uses, joined: parts, candidates: [], copies: [] },
    ...(layout && { layout }),
  };
}

/**
 * A parameter that lies in a packed layer, or is put together from the layers that it has been divided into, under a
 * name as the model's.
 * @param find a parameter of the model by a name of the pack's, with its copies
 */
export async function findPiece(
  model: OnnxModel,
  module: string,
  suffix: "weight" | "bias",
  find: (name: string) => Promise<OnnxParameter | undefined>,
): Promise<OnnxParameter | undefined> {
  for (const place of packedNames(module)) {
    const whole = await find(`${place.name}.${suffix}`);
    if (!whole) continue;
    const end = `${place.whole}.${suffix}`;
    if (!whole.name.endsWith(end)) continue;
    const name = `${whole.name.slice(0, -end.length)}${place.part}.${suffix}`;
    // Copies are of the whole: a part has none of its own.
    const parameter = partOfPacked(model, whole, name, place);
    if (parameter) return parameter;
  }
  for (const names of suffix === "weight" ? dividedNames(module) : []) {
    const found = await Promise.all(names.map((name) => find(`${name}.weight`)));
    const parts = found.filter((part) => part !== undefined);
    if (parts.length < names.length) continue;
    // The model's name of the first part, with the layer's own last segment.
    const last = module.slice(module.lastIndexOf(".") + 1);
    const first = parts[0]!.name.split(".");
    const name = [...first.slice(0, -2), last, "weight"].join(".");
    const parameter = joinParts(name, parts);
    if (parameter) return parameter;
  }
  return undefined;
}

/** The part of a weight that was named by hand, and holds others too. */
export function partByHand(model: OnnxModel, module: string, whole: OnnxParameter): OnnxParameter | undefined {
  for (const place of packedNames(module)) {
    const parameter = partOfPacked(model, whole, `${whole.name}/${place.part}`, place);
    if (parameter) return parameter;
  }
  return undefined;
}

/** Sizes that a packed layer's result is split into, from its readers. */
function sizesOf(
  model: OnnxModel,
  { uses }: OnnxParameter,
  total: number,
  count: number,
): readonly number[] | undefined {
  const { consumers } = model.graph;
  let value = uses[0]?.node.output[0] ?? "";
  for (let passed = 0; passed < 2; passed++) {
    for (const { node } of consumers.get(value) ?? []) {
      if (node.opType === "GroupQueryAttention" && count === 3) return ofHeads(node, total);
      if (node.opType === "Split") return ofSplit(model, node, total, count);
    }
    // The bias is added first.
    const [next] = consumers.get(value) ?? [];
    value = next?.node.opType === "Add" ? next.node.output[0]! : "";
  }
  return undefined;
}

function ofHeads(node: NodeProto, total: number): readonly number[] | undefined {
  const heads = intOf(node, "num_heads");
  const kvHeads = intOf(node, "kv_num_heads");
  const width = total / (heads + 2 * kvHeads);
  return Number.isInteger(width) && kvHeads > 0 ? [heads * width, kvHeads * width, kvHeads * width] : undefined;
}

function ofSplit(
  { graph: { initializers, producers } }: OnnxModel,
  node: NodeProto,
  total: number,
  count: number,
): readonly number[] | undefined {
  const [, name = ""] = node.input;
  const constant = constantOf(producers.get(name)) ?? initializers.get(name);
  const given = constant ? integersOf(constant) : (intsOf(node, "split") ?? []);
  // All parts are equal if no sizes are given.
  const sizes = given.length > 0 || name !== "" ? given : node.output.map(() => total / node.output.length);
  const isWhole = sizes.length === count && sizes.every((size) => Number.isInteger(size) && size > 0);
  return isWhole && sum(sizes) === total ? sizes : undefined;
}

function integersOf({ rawData }: TensorProto): number[] {
  const view = new DataView(rawData.buffer, rawData.byteOffset, rawData.byteLength);
  return Array.from({ length: Math.floor(rawData.byteLength / 8) }, (_, i) => Number(view.getBigInt64(8 * i, true)));
}

/**
 * Splits the results of packed layers and joins them again, or the other way round, so that each module and bias has
 * nodes of its own.
 */
export function takeApart(
  model: OnnxModel,
  modules: readonly AdaptedLayer[],
  biases: readonly AdaptedBias[],
): { modules: AdaptedLayer[]; biases: AdaptedBias[] } {
  const pieces = new Map<NodeProto, NodeProto[]>();
  const edits = new NodeEdits();
  const piece = (graph: GraphProto, node: NodeProto, { index, sizes }: NonNullable<Site["slice"]>): NodeProto => {
    const own = pieces.get(node) ?? divide(model, edits, graph, node, sizes, pieces.size);
    pieces.set(node, own);
    return own[index]!;
  };
  const touched = new Set<GraphProto>();
  let count = 0;
  const apart = modules.map((module) => ({
    ...module,
    sites: module.sites.map((site) => {
      const { slice, joined, graph, node, x, type } = site;
      if (joined) touched.add(graph);
      if (joined) return { graph, node: unite(model, edits, graph, joined, count++), product: node, x, type };
      return slice ? { graph, node: piece(graph, node, slice), product: node, x, type } : site;
    }),
  }));
  const added = biases.map(({ slice, ...bias }) => {
    if (!slice) return bias;
    return { ...bias, places: bias.places.map(({ graph, node }) => ({ graph, node: piece(graph, node, slice) })) };
  });
  edits.apply();
  for (const graph of touched) sortNodes(graph);
  return { modules: apart, biases: added };
}

/** Adds Split, a node for each piece, and Concat behind a node. @returns the nodes of the pieces */
function divide(
  model: OnnxModel,
  edits: NodeEdits,
  graph: GraphProto,
  node: NodeProto,
  sizes: readonly number[],
  index: number,
): NodeProto[] {
  const name = `${PREFIX}/packed/${index}`;
  const write = writerOn(model, name);
  const result = node.output[0]!;
  node.output[0] = `${name}/whole`;
  write.concat(
    write.split(node.output[0], -1, sizes).map((part) => write.op("Identity", part)),
    -1,
  );
  write.nodes.at(-1)!.output = [result];
  edits.insert(graph, node, write.nodes);
  return write.nodes.slice(1, -1);
}

/** Adds Concat and Split behind the last of the layers' nodes, which others may read before it. @returns the Concat */
function unite(
  model: OnnxModel,
  edits: NodeEdits,
  graph: GraphProto,
  { sites, sizes }: NonNullable<Site["joined"]>,
  index: number,
): NodeProto {
  const name = `${PREFIX}/divided/${index}`;
  const results = sites.map(({ node }) => node.output[0]!);
  for (const [i, { node }] of sites.entries()) node.output[0] = `${name}/${i}`;
  const parts = sites.map(({ node }) => node.output[0]!);
  const whole = makeNode("Concat", `${name}/whole`, parts, `${name}/whole`, { axis: -1 });
  const split = makeSplit(model, `${name}/cut`, `${name}/whole`, results, sizes);
  const nodes = new Set(sites.map(({ node }) => node));
  edits.insert(graph, graph.node.findLast((node) => nodes.has(node))!, [whole, split]);
  return whole;
}

/** Sorts nodes behind those that make their inputs; otherwise keeps the order. */
function sortNodes(graph: GraphProto): void {
  const makers = new Map(graph.node.flatMap((node) => node.output.map((value) => [value, node] as const)));
  const sorted = new Set<NodeProto>();
  const makersOf = (node: NodeProto): NodeProto[] => readBy(node).flatMap((value) => makers.get(value) ?? []);
  for (const node of graph.node) inOrder(node, sorted, makersOf, (next) => sorted.add(next));
  graph.node = [...sorted];
}

// Differences between files of onnxruntime-genai's model builder and the checkpoint.

/**
 * True if the weights of normalisations are stored with 1 added, as the builder does for Gemma, whose layers multiply
 * by 1 + w. The file does not say so; these models are recognised by the scaling of their embeddings, which no others
 * have.
 */
export function addsOneToNorms({ proto, graph }: OnnxModel): boolean {
  return (
    proto.producerName === "onnxruntime-genai" &&
    graph.proto.node.some(({ name }) => name.endsWith("/embed_tokens/Mul"))
  );
}

/** Values in memory, and where along an axis a part of them begins. */
interface AxisPart {
  readonly data: Uint8Array;
  readonly shape: readonly number[];
  readonly start: number;
}

/** Copies `count` rows or columns. @param width bytes of a value */
export function copyPart(from: AxisPart, to: AxisPart, axis: number, count: number, width: number): void {
  const inner = width * elementsOf(from.shape.slice(axis + 1));
  const outer = elementsOf(from.shape.slice(0, axis));
  const fromStep = from.shape[axis]! * inner;
  const toStep = to.shape[axis]! * inner;
  for (let i = 0; i < outer; i++) {
    const at = i * fromStep + from.start * inner;
    to.data.set(from.data.subarray(at, at + count * inner), i * toStep + to.start * inner);
  }
}

// onnxruntime's `Attention`.

/** Attributes with the same meaning in both operators. */
const SHARED = new Set(["num_heads", "unidirectional", "mask_filter_value", "scale"]);

/** Indices of the inputs of `Attention`. */
const [X, WEIGHT, BIAS, MASK, PAST, SCORES, PAST_LENGTH] = [0, 1, 2, 3, 4, 5, 6] as const;

/** Other operators that hold the weights of several layers, and how to make a file without them. */
const OTHERS: Readonly<Record<string, string>> = {
  QAttention: "is an attention that was quantised after it had been fused: quantise the unoptimised export instead",
  PackedAttention: "is an attention without padding: pass the file from before convert_to_packing_mode",
};

function isAttention({ domain, opType }: NodeProto): boolean {
  return domain === "com.microsoft" && opType === "Attention";
}

/**
 * Takes the attentions of the main graph apart where possible. Changes `model.proto`.
 * @returns the model with a new index
 */
export function unfuse(model: OnnxModel): OnnxModel {
  const { proto } = model.graph;
  const edits = new NodeEdits();
  const masks = masksOf(model);
  for (const node of proto.node) {
    if (!isAttention(node)) continue;
    const sizes = attentionSizes(model, node);
    if (typeof sizes === "string") continue;
    edits.insert(proto, node, unfused(model, node, sizes, masks));
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
  const why = isAttention(node) ? attentionSizes(model, node) : undefined;
  const reason = typeof why === "string" ? ` ${why}` : "";
  return `the model is fused already: ${which}${reason}; pass the unoptimised export`;
}

/** Sizes that the product is split into; or the reason why the node cannot be taken apart. */
function attentionSizes({ graph }: OnnxModel, node: NodeProto): readonly number[] | string {
  const has = (input: number): boolean => (node.input[input] ?? "") !== "";
  if (has(PAST) || has(PAST_LENGTH) || node.output.slice(1).some((value) => value !== ""))
    return "keeps its keys and values for the next run";
  if (intOf(node, "do_rotary")) return "turns its queries and keys (do_rotary)";
  if (!graph.proto.node.includes(node)) return "lies in a nested graph";
  const weight = graph.initializers.get(node.input[WEIGHT] ?? "");
  const total = Number(weight?.dims[1] ?? 0);
  if (weight?.dims.length !== 2) return "has a weight that the file does not hold as a matrix";
  const given = intsOf(node, "qkv_hidden_sizes") ?? [];
  const sizes = given.length > 0 ? given : [total / 3, total / 3, total / 3];
  const fits = sizes.length === 3 && sizes.every((size) => Number.isInteger(size) && size > 0);
  if (!fits || sum(sizes) !== total || sizes[0] !== sizes[1])
    return `divides ${total} columns into [${sizes.join(", ")}]`;
  return sizes;
}

function unfused(
  model: OnnxModel,
  node: NodeProto,
  sizes: readonly number[],
  masks: ReturnType<typeof masksOf>,
): NodeProto[] {
  const [out] = node.output as [string];
  // The name has no slash in front, except for the product's: names of modules are read from that one only.
  const name = `${node.name || "Attention"}/${out}`.replace(/^\/+/, "");
  const module = packedModule(model, node);
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
  // The remaining inputs of MultiHeadAttention: an empty bias, which is added already; the mask; the addition to the
  // scores.
  const mask = masks(node, nodes);
  heads.input.push(...["", mask.padding, mask.scores].slice(0, mask.scores ? 3 : mask.padding ? 2 : 0));
  return [...nodes, heads];
}

/**
 * Turns masks into additions to the scores, which is how an attention uses them: on WebGPU `MultiHeadAttention` takes
 * no other masks. A mask stays as it is where the file does not tell its form.
 * @returns a function that gives mask and addition of a node, and adds nodes to those that go in front of it
 */
function masksOf(model: OnnxModel) {
  const { initializers, producers } = model.graph;
  const ranks = ranksOf(model);
  const known = new Map<string, string>();
  return (node: NodeProto, nodes: NodeProto[]): { padding: string; scores: string } => {
    const [padding = "", scores = ""] = [node.input[MASK], node.input[SCORES]];
    const rank = padding === "" ? undefined : rankOf(padding);
    if (rank === undefined) return { padding, scores };
    const type = Number(initializers.get(node.input[WEIGHT]!)!.dataType);
    const least = floatOf(node, "mask_filter_value", -10000);
    // Another input may have as many rows of another length.
    const key = `${padding}/${node.input[X]}/${least}`;
    const added = known.get(key) ?? add(rank, node, type === FLOAT16 ? Math.max(least, -65504) : least, type, nodes);
    known.set(key, added);
    if (scores === "") return { padding: "", scores: added };
    const sum = `${node.output[0]}/scores`;
    nodes.push(makeNode("Add", sum, [scores, added], sum));
    return { padding: "", scores: sum };
  };

  /**
   * Rank of a mask. 1: lengths of rows; 2: a mask of rows. Other vectors are ambiguous: ends of rows, or starts and
   * ends.
   */
  function rankOf(mask: string): 1 | 2 | undefined {
    const made = producers.get(mask);
    if (made?.opType === "EmbedLayerNormalization") return made.output[1] === mask ? 1 : undefined;
    if (made?.opType === "ReduceSum") return intOf(made, "keepdims", 1) === 0 ? 1 : undefined;
    return ranks(mask) === 2 ? 2 : undefined;
  }

  /** Makes [batch, 1, length, length]: 0, or the least score where a position is masked. */
  function add(rank: 1 | 2, node: NodeProto, least: number, type: number, nodes: NodeProto[]): string {
    const name = `${node.output[0]}/mask`;
    const write = writerOn(model, name);
    // The length of rows, [1].
    const length = write.slice(write.shapeOf(node.input[X]!), 0, 1, 2);
    const mask = write.cast(node.input[MASK]!, INT64);
    // Positions 1, 2, …: a row keeps as many as its length.
    const positions = (): string => write.op("CumSum", write.op("Expand", [1], length), [0]);
    const kept =
      rank === 1
        ? write.op("Less", write.sub(positions(), [1]), write.reshape(mask, [-1, 1]))
        : write.op("Less", [0], mask);
    const added = write.op("Where", kept, 0, least);
    const typed = type === FLOAT16 ? write.cast(added, FLOAT16) : added;
    const shape = write.concat([[1, 1], length, [1]], 0);
    const scores = write.op("Expand", write.reshape(typed, [0, 1, 1, -1]), shape);
    nodes.push(...write.nodes);
    return scores;
  }
}

/**
 * A path for the packed layer, from the projection behind it: "…/attention/qkv" for "…attention.output.dense". The
 * weight's own name is made up by the optimiser; in GPT-2 it is the checkpoint's and stays.
 */
function packedModule({ graph }: OnnxModel, node: NodeProto): string | undefined {
  if (isParameterName(node.input[WEIGHT]!)) return undefined;
  const [out] = node.output as [string];
  const paths = (graph.consumers.get(out) ?? []).flatMap(({ node: next, input }) => {
    const place = input === 0 && /MatMul|Gemm/.test(next.opType) ? modulePathOf(graph, next) : undefined;
    return place?.shared === 1 && place.path !== "" ? [place.path] : [];
  });
  const [path] = paths;
  return path === undefined ? undefined : `${path.replace(/\.(output\.dense|[^.]+)$/, "")}.qkv`.replaceAll(".", "/");
}

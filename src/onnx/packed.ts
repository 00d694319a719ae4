/**
 * Layers that an exporter has packed into one: queries, keys and values of an attention as one product. Their weights lie one below the
 * other, and its result holds theirs one behind the other; so each is a slice that can be added to.
 */
import type { GraftModule } from "./graft.ts";
import type { Linear } from "./linear.ts";
import { attribute, type Graph, type OnnxModel } from "./model.ts";
import { matrixShape, type OnnxParameter } from "./modules.ts";
import { makeInts, makeNode, PREFIX } from "./nodes.ts";
import type { NodeProto, TensorProto } from "./onnx_pb.ts";

/** The packed layer of an attention, and the layers in it in their order. */
const WHOLE = "qkv_proj";
const PARTS = ["q_proj", "k_proj", "v_proj"];

/** Where a layer may lie in a packed one. */
interface PlaceInPacked {
  /** Of the packed layer, with the segments in front, and without. */
  readonly name: string;
  readonly whole: string;
  /** The layer's own last segment, and the how manieth part it is. */
  readonly part: string;
  readonly index: number;
}

/** The packed layer that may hold a layer of this name. */
export function packedName(module: string): PlaceInPacked | undefined {
  const cut = module.lastIndexOf(".") + 1;
  const part = module.slice(cut);
  const index = PARTS.indexOf(part);
  return index < 0 ? undefined : { name: module.slice(0, cut) + WHOLE, whole: WHOLE, part, index };
}

/** The part of a packed weight, as a weight of its own; undefined where the graph does not tell how it is divided. */
export function partOfPacked(
  model: OnnxModel,
  packed: OnnxParameter,
  name: string,
  index: number,
): OnnxParameter | undefined {
  const shape = matrixShape(packed);
  const sizes = shape && sizesOf(model.graph, packed, shape[0]);
  return sizes?.[index] === undefined ? undefined : { ...packed, name, slice: { index, sizes } };
}

/** How a packed layer's result is divided, by what reads it. */
function sizesOf(graph: Graph, { uses }: OnnxParameter, total: number): readonly number[] | undefined {
  let value = uses[0]?.node.output[0] ?? "";
  for (let passed = 0; passed < 2; passed++) {
    for (const { node } of graph.consumers.get(value) ?? []) {
      if (node.opType === "GroupQueryAttention") return ofHeads(node, total);
      if (node.opType === "Split") return ofSplit(graph, node, total);
    }
    // The bias is added first.
    const [next] = graph.consumers.get(value) ?? [];
    value = next?.node.opType === "Add" ? next.node.output[0]! : "";
  }
  return undefined;
}

function ofHeads(node: NodeProto, total: number): readonly number[] | undefined {
  const [heads, kvHeads] = [
    Number(attribute(node, "num_heads")?.i ?? 0),
    Number(attribute(node, "kv_num_heads")?.i ?? 0),
  ];
  const width = total / (heads + 2 * kvHeads);
  return Number.isInteger(width) && kvHeads > 0 ? [heads * width, kvHeads * width, kvHeads * width] : undefined;
}

function ofSplit({ initializers, producers }: Graph, node: NodeProto, total: number): readonly number[] | undefined {
  const [, name = ""] = node.input;
  const constant = attribute(producers.get(name) ?? node, "value")?.t ?? initializers.get(name);
  const sizes = constant ? integersOf(constant) : (attribute(node, "split")?.ints ?? []).map(Number);
  const isWhole = sizes.length === 3 && sizes.every((size) => size > 0) && sizes.reduce((a, b) => a + b, 0) === total;
  return isWhole ? sizes : undefined;
}

function integersOf({ rawData }: TensorProto): number[] {
  const view = new DataView(rawData.buffer, rawData.byteOffset, rawData.byteLength);
  return Array.from({ length: Math.floor(rawData.byteLength / 8) }, (_, i) => Number(view.getBigInt64(8 * i, true)));
}

/**
 * Takes the results of packed layers apart and puts them together again, so that terms can be added in between. Changes the graph.
 * @returns the modules, each with layers that make its own slice of a result
 */
export function takeApart(model: OnnxModel, modules: readonly GraftModule[]): GraftModule[] {
  const pieces = new Map<NodeProto, NodeProto[]>();
  return modules.map((module) => ({
    ...module,
    linears: module.linears.map((linear) => {
      const { slice, graph, node, x, type } = linear;
      if (!slice) return linear;
      let own = pieces.get(node);
      if (!own) pieces.set(node, (own = divide(model, linear, slice.sizes, pieces.size)));
      return { graph, node: own[slice.index]!, x, type, addsBias: false };
    }),
  }));
}

/** Split, a node for each piece, Concat: behind the layer's node. @returns the nodes of the pieces */
function divide(model: OnnxModel, { graph, node }: Linear, sizes: readonly number[], index: number): NodeProto[] {
  const name = `${PREFIX}/packed/${index}`;
  const result = node.output[0]!;
  node.output[0] = `${name}/whole`;
  const cut = sizes.map((_, i) => `${name}/cut/${i}`);
  const pieces = sizes.map((_, i) => makeNode("Identity", `${name}/${i}`, [cut[i]!], `${name}/${i}`));
  // From opset 13 on the sizes are an input.
  const asInput = model.opset >= 13;
  if (asInput) model.graph.proto.initializer.push(makeInts(`${name}/sizes`, sizes));
  const inputs = [`${name}/whole`, ...(asInput ? [`${name}/sizes`] : [])];
  const split = makeNode("Split", `${name}/cut`, inputs, cut, { axis: -1, ...(asInput ? {} : { split: sizes }) });
  const whole = pieces.map((piece) => piece.output[0]!);
  const together = makeNode("Concat", `${name}/together`, whole, result, { axis: -1 });
  graph.node.splice(graph.node.indexOf(node) + 1, 0, split, ...pieces, together);
  return pieces;
}

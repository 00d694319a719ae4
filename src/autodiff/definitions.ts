/**
 * Fused operators and their definitions. The graph that is examined and differentiated is a shadow of the model's
 * graph: it has definitions in place of the fused nodes, which the model itself keeps.
 */

import { INT64 } from "../onnx/linear.ts";
import { dimsOf, type Graph, indexGraph, intOf, type OnnxModel, type RankOf, ranksOf } from "../onnx/model.ts";
import { PREFIX } from "../onnx/nodes.ts";
import { create, type NodeProto } from "../onnx/protobuf.ts";
import { Emitter, OperatorNode } from "./emit.ts";

// Attention over all heads at once: onnxruntime's operators written as products, a mask and a softmax. Training has no
// past, so there are as many keys as queries; a graph with more keys has shapes that do not fit, and its run fails.

/** Score of a masked position: its exponential is 0, and adding any score to it keeps it finite. */
const MASKED = -1e30;

interface Attention {
  /** [batch, queries, heads, width] */
  readonly q: string;
  /** Keys and values [batch, keys, kvHeads, width]. */
  readonly k: string;
  readonly v: string;
  readonly heads: number;
  readonly kvHeads: number;
  readonly scale: number;
  /** Soft cap of the scores; 0: none. */
  readonly softcap?: number;
  /** Biases of the scores, each broadcast to [batch, heads, queries, keys]. */
  readonly bias: readonly string[];
}

/** @returns [batch, queries, heads · width] */
function attend(emit: Emitter, { q, k, v, heads, kvHeads, scale, softcap = 0, bias }: Attention): string {
  const groups = heads / kvHeads;
  /** Repeats keys or values for each head where several share one. */
  const all = (value: string): string => {
    if (groups === 1) return value;
    const repeated = emit.op("Expand", emit.unsqueeze(value, [3]), [1, 1, 1, groups, 1]);
    return emit.reshape(repeated, [0, 0, heads, -1]);
  };
  const queries = emit.transpose(emit.mul(q, scale), [0, 2, 1, 3]);
  const keys = emit.transpose(all(k), [0, 2, 3, 1]);
  const values = emit.transpose(all(v), [0, 2, 1, 3]);
  let scores = emit.matMul(queries, keys);
  if (softcap !== 0) scores = emit.mul(emit.op("Tanh", emit.mul(scores, 1 / softcap)), softcap);
  for (const one of bias) scores = emit.add(scores, one);
  const context = emit.matMul(emit.op("Softmax", scores, { axis: -1 }), values);
  return emit.reshape(emit.transpose(context, [0, 2, 1, 3]), [0, 0, -1]);
}

/**
 * Causal mask for `length` (an int64 scalar) rows and columns: a row sees no column behind it, and only the last
 * `window` up to itself.
 */
function causal(emit: Emitter, length: string, window = -1): string {
  const places = emit.range(length);
  const rows = emit.unsqueeze(places, [1]);
  const columns = emit.unsqueeze(places, [0]);
  let seen = emit.op("LessOrEqual", columns, rows);
  if (window > 0) seen = emit.op("And", seen, emit.op("Less", emit.sub(rows, columns), emit.int(window)));
  return emit.op("Where", seen, 0, MASKED);
}

function scalar(emit: Emitter, value: string): string {
  return emit.reshape(emit.cast(value, INT64), []);
}

/** Factor of the scores: the node's attribute, or 1 / √(width of a head). */
function scaleOf(node: Fused, width: number | undefined): number | undefined {
  const given = node.float("scale", 0);
  if (given !== 0) return given;
  return width === undefined || !Number.isInteger(width) ? undefined : 1 / Math.sqrt(width);
}

const NO_WIDTH = "does not tell how wide a head is, which its scale depends on";

/** Inputs and attributes of GroupQueryAttention that change its result and are not supported here. */
const UNKNOWN_INPUTS = [
  [11, "head sinks"],
  [12, "a quantised cache"],
  [13, "a quantised cache"],
] as const;

const groupQueryAttention: Define = (node) => {
  const { emit } = node;
  const heads = node.int("num_heads");
  const kvHeads = node.int("kv_num_heads");
  for (const [input, what] of UNKNOWN_INPUTS) if (node.has(input)) return `has ${what}, which gradients do not pass`;
  if (node.int("smooth_softmax") > 0) return "has a smooth softmax, which gradients do not pass";
  const sides = heads + 2 * kvHeads;
  const packed = !node.has(1);
  const output = node.width(node.proto.output[0]!);
  const whole = output !== undefined ? output / heads : (node.width(node.x(0)) ?? NaN) / (packed ? sides : heads);
  const scale = scaleOf(node, node.declared(node.x(3), 3) ?? whole);
  if (scale === undefined) return NO_WIDTH;
  const split = (value: string, into: number): string => emit.reshape(value, [0, 0, into, -1]);
  const apart = packed
    ? emit.split(split(node.x(0), sides), 2, [heads + kvHeads, kvHeads])
    : [emit.concat([split(node.x(0), heads), split(node.x(1), kvHeads)], 2), split(node.x(2), kvHeads)];
  let [both, v] = apart as [string, string];
  const length = scalar(emit, node.x(6));
  if (node.int("do_rotary") !== 0) {
    const places = node.has(9) ? node.x(9) : emit.range(length);
    const turned = 2 * (node.weight(node.x(7))?.at(-1) ?? NaN);
    if (Number.isNaN(turned)) return NO_TABLES;
    both = rotated(emit, both, {
      ...{ cos: node.x(7), sin: node.x(8), places, turned, rest: whole > turned },
      interleaved: node.int("rotary_interleaved") !== 0,
    });
  }
  const [q, k] = emit.split(both, 2, [heads, kvHeads]) as [string, string];
  const bias = [causal(emit, length, node.int("local_window_size", -1)), ...(node.has(10) ? [node.x(10)] : [])];
  node.give(0, attend(emit, { q, k, v, heads, kvHeads, scale, softcap: node.float("softcap", 0), bias }));
  givePresent(node, k, v);
  return undefined;
};

function givePresent(node: Fused, k: string, v: string): void {
  for (const [output, value] of [k, v].entries())
    if (node.wants(output + 1)) node.give(output + 1, node.emit.transpose(value, [0, 2, 1, 3]));
}

/** Biases of the scores that mask padded keys, from a mask [batch, keys]. */
function padding(node: Fused, mask: string): string {
  const { emit } = node;
  const seen = emit.op("Greater", emit.cast(mask, INT64), emit.int(0));
  const scores = emit.op("Where", seen, 0, node.float("mask_filter_value", -10000));
  return emit.unsqueeze(scores, [1, 2]);
}

const PACKED = "takes queries, keys and values packed for another device, which gradients do not pass";

const multiHeadAttention: Define = (node) => {
  const { emit } = node;
  const heads = node.int("num_heads");
  if (!node.has(1) || !node.has(2)) return PACKED;
  for (const input of [0, 1, 2]) if (node.rank(node.x(input), 3) !== 3) return PACKED;
  if (node.has(4) && node.rank(node.x(4), 2) !== 2) return "has a mask other than [batch, keys], which is not known";
  const scale = scaleOf(node, (node.width(node.x(0)) ?? node.width(node.proto.output[0]!) ?? NaN) / heads);
  if (scale === undefined) return NO_WIDTH;
  const sides = [node.x(0), node.x(1), node.x(2)];
  if (node.has(3)) {
    const widths = sides.map((side) => node.width(side));
    const all = node.weight(node.x(3))?.[0];
    const each = widths.map((width) => width ?? (all === undefined ? NaN : all / 3));
    if (each.some((width) => !Number.isInteger(width)) || each.reduce((a, b) => a + b) !== all)
      return "does not tell the parts of its bias";
    for (const [i, part] of emit.split(node.x(3), 0, each).entries()) sides[i] = emit.add(sides[i]!, part);
  }
  const [q, k, v] = sides.map((side) => emit.reshape(side, [0, 0, heads, -1])) as [string, string, string];
  const bias: string[] = [];
  if (node.has(4)) bias.push(padding(node, node.x(4)));
  if (node.has(5)) bias.push(node.x(5));
  if (node.int("unidirectional") !== 0) bias.push(causal(emit, emit.gather(emit.shapeOf(node.x(0)), emit.int(1))));
  node.give(0, attend(emit, { q, k, v, heads, kvHeads: heads, scale, bias }));
  givePresent(node, k, v);
  return undefined;
};

// Operators that combine a sum with one other operator: a sum with a bias, or with a residual.

function sum(node: Fused, inputs: readonly number[]): string {
  const there = inputs.filter((input) => node.has(input)).map((input) => node.x(input));
  return there.reduce((a, b) => node.emit.add(a, b));
}

/** @param weights inputs of the weights of the norm behind the sum @param bias input of the bias of the sum */
function skipped(opType: string, weights: readonly number[], bias: number): Define {
  return (node) => {
    const whole = sum(node, [0, 1, bias]);
    const given = weights.filter((input) => node.has(input)).map((input) => node.x(input));
    const epsilon = { float: node.float("epsilon", 1e-12) };
    node.give(0, node.emit.op(opType, whole, ...given, { axis: -1, epsilon }));
    node.give(3, whole);
    return node.wants(1) || node.wants(2)
      ? "gives out what it has computed on the way, which gradients do not come back from"
      : undefined;
  };
}

const biased =
  (opType: string): Define =>
  (node) => {
    node.give(0, node.emit.op(`com.microsoft.${opType}`, sum(node, [0, 1])));
    return undefined;
  };

const quickGelu: Define = (node) => {
  const { emit } = node;
  const alpha = node.float("alpha", 1.702);
  const inner = alpha === 1 ? node.x(0) : emit.mul(node.x(0), alpha);
  node.give(0, emit.mul(node.x(0), emit.op("Sigmoid", inner)));
  return undefined;
};

// Rotary position embeddings: pairs of elements of a head are rotated by an angle that depends on the position.

const NO_TABLES = "has tables of positions that are no weights";

interface Rotary {
  /** Tables of cosines and sines, [all positions, turned / 2]. */
  readonly cos: string;
  readonly sin: string;
  /** int64 [positions] or [batch, positions]. */
  readonly places: string;
  /** Number of elements of a head that are rotated; the others behind them stay. */
  readonly turned: number;
  /** True where some elements stay. */
  readonly rest: boolean;
  readonly interleaved: boolean;
}

/** @param x [batch, positions, heads, width] */
function rotated(emit: Emitter, x: string, rotary: Rotary): string {
  const { places, turned, rest, interleaved } = rotary;
  const [cos, sin] = [rotary.cos, rotary.sin].map((table) => emit.unsqueeze(emit.gather(table, places), [-2]));
  const front = rest ? emit.slice(x, 3, 0, turned) : x;
  const behind = rest ? [emit.slice(x, 3, turned, 2 ** 31)] : [];
  const turn = (a: string, b: string): readonly [string, string] => [
    emit.sub(emit.mul(a, cos!), emit.mul(b, sin!)),
    emit.add(emit.mul(b, cos!), emit.mul(a, sin!)),
  ];
  if (!interleaved) {
    const [a, b] = emit.split(front, 3, [turned / 2, turned / 2]) as [string, string];
    return emit.concat([...turn(a, b), ...behind], 3);
  }
  const pairs = emit.reshape(front, [0, 0, 0, turned / 2, 2]);
  const [a, b] = emit.split(pairs, 4, [1, 1]).map((half) => emit.op("Squeeze", half, [4]));
  const halves = turn(a!, b!).map((half) => emit.unsqueeze(half, [4]));
  return emit.concat([emit.reshape(emit.concat(halves, 4), [0, 0, 0, turned]), ...behind], 3);
}

/** @param inputs indices of the tables and the positions */
function embedding(inputs: { readonly cos: number; readonly sin: number; readonly places: number }): Define {
  return (node) => {
    const { emit } = node;
    if (!node.has(inputs.places)) return "has no positions, but a row of its tables for each token: that is not known";
    if (node.float("scale", 1) !== 1) return "scales what it turns, which is not known";
    const rank = node.rank(node.x(0), 3);
    const places = node.x(inputs.places);
    if (node.rank(places, 2) !== 2) return "has positions other than [batch, positions], which is not known";
    const part = node.int("rotary_embedding_dim");
    const cos = node.x(inputs.cos);
    const turned = part > 0 ? part : 2 * (node.weight(cos)?.at(-1) ?? NaN);
    const heads = node.int("num_heads");
    const width = part > 0 && rank === 3 ? (node.width(node.x(0)) ?? NaN) / heads : undefined;
    if (part > 0 && (rank !== 3 || !Number.isInteger(width))) return "does not tell how wide a head is";
    if (Number.isNaN(turned)) return NO_TABLES;
    const rotary: Rotary = {
      ...{ cos, sin: node.x(inputs.sin), places: emit.cast(places, INT64), turned },
      rest: width !== undefined && width > turned,
      interleaved: node.int("interleaved") !== 0,
    };
    if (rank === 4) {
      const perm = [0, 2, 1, 3];
      node.give(0, emit.transpose(rotated(emit, emit.transpose(node.x(0), perm), rotary), perm));
    } else {
      const split = heads > 0 ? [0, 0, heads, -1] : [0, 0, -1, turned];
      node.give(0, emit.reshape(rotated(emit, emit.reshape(node.x(0), split), rotary), [0, 0, -1]));
    }
    return undefined;
  };
}

/** Definitions by operator, with the domain in front where it is not the standard one. */
export const DEFINITIONS: ReadonlyMap<string, Define> = new Map(
  Object.entries({
    "com.microsoft.GroupQueryAttention": groupQueryAttention,
    "com.microsoft.MultiHeadAttention": multiHeadAttention,
    "com.microsoft.RotaryEmbedding": embedding({ places: 1, cos: 2, sin: 3 }),
    RotaryEmbedding: embedding({ cos: 1, sin: 2, places: 3 }),
    "com.microsoft.SkipSimplifiedLayerNormalization": skipped("SimplifiedLayerNormalization", [2], 3),
    "com.microsoft.SkipLayerNormalization": skipped("LayerNormalization", [2, 3], 4),
    "com.microsoft.BiasGelu": biased("Gelu"),
    // FastGelu without a bias has a rule.
    "com.microsoft.FastGelu": (node) => (node.has(1) ? biased("FastGelu")(node) : undefined),
    "com.microsoft.QuickGelu": quickGelu,
  } satisfies Record<string, Define>),
);

interface Shadow {
  /** The shadow, which shares the model's weights; the model itself where nothing is fused. */
  readonly model: OnnxModel;
  readonly refused: ReadonlyMap<NodeProto, string>;
  readonly ranks: ReadonlyMap<string, number>;
}

/** Makes a shadow of the model, which stays as it is. */
export function shadowOf(model: OnnxModel): Shadow {
  const { graph } = model;
  const refused = new Map<NodeProto, string>();
  const ranks = new Map<string, number>();
  const shadow = create("GraphProto", { name: graph.proto.name });
  shadow.input = graph.proto.input;
  shadow.output = [...graph.proto.output];
  shadow.initializer = [...graph.proto.initializer];
  const emit = new Emitter(shadow, model.opset, `${PREFIX}/defined`);
  const known = ranksOf(model);
  for (const node of graph.proto.node) {
    const written = emit.nodes.length;
    const define = DEFINITIONS.get(operatorOf(node));
    const fused = define && new Fused(node, emit, graph, known, ranks);
    const refusal = fused && define(fused);
    // Nodes that a refused definition has written stay: the next definition may use them.
    const fresh = emit.nodes.slice(written);
    shadow.node.push(...fresh);
    if (refusal !== undefined) refused.set(node, refusal);
    if (!fused || refusal !== undefined || fused.given.length === 0) shadow.node.push(node);
    else for (const [name, value] of fused.given) shadow.node.push(...emit.rename(value, name, fresh));
  }
  if (emit.nodes.length === 0) return { model, refused, ranks };
  const proto = create("ModelProto", { ...model.proto, graph: shadow });
  return { model: { ...model, proto, graph: indexGraph(shadow, model.name) }, refused, ranks };
}

export function operatorOf({ domain, opType }: NodeProto): string {
  return domain === "" || domain === "ai.onnx" ? opType : `${domain}.${opType}`;
}

// One fused node on its way to a definition: what the definition can ask about it, and where it puts the nodes it
// writes.

/** Writes nodes that compute the same as a fused one. @returns the reason if it cannot: the end of a message */
type Define = (node: Fused) => string | undefined;

class Fused extends OperatorNode {
  /** Outputs that have a definition. */
  readonly given: [name: string, value: string][] = [];
  /** Ranks that were assumed, by value; a run checks them. */
  readonly assumed: Map<string, number>;
  readonly #graph: Graph;
  readonly #rankOf: RankOf;

  constructor(proto: NodeProto, emit: Emitter, graph: Graph, rankOf: RankOf, assumed: Map<string, number>) {
    super(proto, emit);
    this.#graph = graph;
    this.#rankOf = rankOf;
    this.assumed = assumed;
  }

  wants(output: number): boolean {
    const name = this.proto.output[output] ?? "";
    return name !== "" && this.#graph.consumers.has(name);
  }

  give(output: number, value: string): void {
    const name = this.proto.output[output] ?? "";
    if (name !== "") this.given.push([name, value]);
  }

  weight(value: string): readonly number[] | undefined {
    return this.#graph.initializers.get(value)?.dims.map(Number);
  }

  /** Size of a value that an input of the graph declares. */
  declared(value: string, axis: number): number | undefined {
    const input = this.#graph.proto.input.find(({ name }) => name === value);
    const size = input && dimsOf(input)?.[axis];
    return typeof size === "number" ? size : undefined;
  }

  /** Width of a value that a linear layer makes or takes. */
  width(value: string): number | undefined {
    const producer = this.#graph.producers.get(value);
    const made = producer && (sizeOf(producer, "N") ?? this.weight(producer.input[1] ?? "")?.[1]);
    if (made !== undefined) return made;
    for (const { node, input } of this.#graph.consumers.get(value) ?? []) {
      if (input !== 0 || !/^(MatMul|MatMulNBits)$/.test(node.opType)) continue;
      const taken = sizeOf(node, "K") ?? this.weight(node.input[1]!)?.[0];
      if (taken !== undefined) return taken;
    }
    return undefined;
  }

  /** Rank of a value as far as the graph tells, else `otherwise`; a run checks the assumption. */
  rank(value: string, otherwise: number): number {
    const rank = this.#rankOf(value) ?? otherwise;
    this.assumed.set(value, rank);
    return rank;
  }
}

function sizeOf(node: NodeProto, name: "K" | "N"): number | undefined {
  return node.opType === "MatMulNBits" ? intOf(node, name) || undefined : undefined;
}

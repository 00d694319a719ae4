/**
 * Attention over all heads at once: onnxruntime's operators written as products, a mask and a softmax. Training has no past, so there are
 * as many keys as queries; a graph with more keys has shapes that do not fit, and its run fails.
 */
import { INT64 } from "../../onnx/linear.ts";
import type { Emitter } from "../emit.ts";
import type { Define, Fused } from "./fused.ts";
import { rotaryOf, rotated } from "./rotary.ts";

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
    const repeated = emit.op("Expand", [emit.unsqueeze(value, [3]), emit.ints([1, 1, 1, groups, 1])]);
    return emit.op("Reshape", [repeated, emit.ints([0, 0, heads, -1])]);
  };
  const queries = emit.op("Transpose", [emit.mul(q, scale)], { perm: [0, 2, 1, 3] });
  const keys = emit.op("Transpose", [all(k)], { perm: [0, 2, 3, 1] });
  const values = emit.op("Transpose", [all(v)], { perm: [0, 2, 1, 3] });
  let scores = emit.op("MatMul", [queries, keys]);
  if (softcap !== 0) scores = emit.mul(emit.op("Tanh", [emit.mul(scores, 1 / softcap)]), softcap);
  for (const one of bias) scores = emit.add(scores, one);
  const context = emit.op("MatMul", [emit.op("Softmax", [scores], { axis: -1 }), values]);
  return emit.op("Reshape", [emit.op("Transpose", [context], { perm: [0, 2, 1, 3] }), emit.ints([0, 0, -1])]);
}

/**
 * Causal mask for `length` (an int64 scalar) rows and columns: a row sees no column behind it, and only the last `window` up to itself.
 */
function causal(emit: Emitter, length: string, window = -1): string {
  const places = emit.op("Range", [emit.int(0), length, emit.int(1)]);
  const [rows, columns] = [emit.unsqueeze(places, [1]), emit.unsqueeze(places, [0])];
  let seen = emit.op("LessOrEqual", [columns, rows]);
  if (window > 0) seen = emit.op("And", [seen, emit.op("Less", [emit.sub(rows, columns), emit.int(window)])]);
  return emit.op("Where", [seen, 0, MASKED]);
}

/** Turns a value with one element into an int64 scalar. */
function scalar(emit: Emitter, value: string): string {
  return emit.op("Reshape", [emit.op("Cast", [value], { to: INT64 }), emit.ints([])]);
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
  const [heads, kvHeads] = [node.int("num_heads"), node.int("kv_num_heads")];
  for (const [input, what] of UNKNOWN_INPUTS) if (node.has(input)) return `has ${what}, which gradients do not pass`;
  if (node.int("smooth_softmax") > 0) return "has a smooth softmax, which gradients do not pass";
  const sides = heads + 2 * kvHeads;
  const packed = !node.has(1);
  const output = node.width(node.proto.output[0]!);
  const whole = output !== undefined ? output / heads : (node.width(node.x(0)) ?? NaN) / (packed ? sides : heads);
  const scale = scaleOf(node, node.declared(node.x(3), 3) ?? whole);
  if (scale === undefined) return NO_WIDTH;
  const split = (value: string, into: number): string => emit.op("Reshape", [value, emit.ints([0, 0, into, -1])]);
  const apart = packed
    ? emit.split(split(node.x(0), sides), 2, [heads + kvHeads, kvHeads])
    : [emit.concat([split(node.x(0), heads), split(node.x(1), kvHeads)], 2), split(node.x(2), kvHeads)];
  let [both, v] = apart as [string, string];
  const length = scalar(emit, node.x(6));
  if (node.int("do_rotary") !== 0) {
    const places = node.has(9) ? node.x(9) : emit.op("Range", [emit.int(0), length, emit.int(1)]);
    const rotary = rotaryOf(node, node.x(7), node.x(8), places, whole);
    if (typeof rotary === "string") return rotary;
    both = rotated(emit, both, { ...rotary, interleaved: node.int("rotary_interleaved") !== 0 });
  }
  const [q, k] = emit.split(both, 2, [heads, kvHeads]) as [string, string];
  const bias = [causal(emit, length, node.int("local_window_size", -1)), ...(node.has(10) ? [node.x(10)] : [])];
  node.give(0, attend(emit, { q, k, v, heads, kvHeads, scale, softcap: node.float("softcap", 0), bias }));
  if (node.wants(1)) node.give(1, emit.op("Transpose", [k], { perm: [0, 2, 1, 3] }));
  if (node.wants(2)) node.give(2, emit.op("Transpose", [v], { perm: [0, 2, 1, 3] }));
  return undefined;
};

/** Biases of the scores that mask padded keys, from a mask [batch, keys]. */
function padding(node: Fused, mask: string): string {
  const { emit } = node;
  const seen = emit.op("Greater", [emit.op("Cast", [mask], { to: INT64 }), emit.int(0)]);
  const scores = emit.op("Where", [seen, 0, node.float("mask_filter_value", -10000)]);
  return emit.unsqueeze(scores, [1, 2]);
}

/** Biases of the scores: the padding mask, the given biases, and the causal mask. */
function biases(node: Fused, mask: number, added: number, q: string): readonly string[] {
  const { emit } = node;
  const all: string[] = [];
  if (node.has(mask)) all.push(padding(node, node.x(mask)));
  if (node.has(added)) all.push(node.x(added));
  if (node.int("unidirectional") !== 0) {
    all.push(causal(emit, emit.op("Gather", [emit.op("Shape", [q]), emit.int(1)], { axis: 0 })));
  }
  return all;
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
  const [q, k, v] = sides.map((side) => emit.op("Reshape", [side, emit.ints([0, 0, heads, -1])]));
  const bias = biases(node, 4, 5, node.x(0));
  node.give(0, attend(emit, { q: q!, k: k!, v: v!, heads, kvHeads: heads, scale, bias }));
  if (node.wants(1)) node.give(1, emit.op("Transpose", [k!], { perm: [0, 2, 1, 3] }));
  if (node.wants(2)) node.give(2, emit.op("Transpose", [v!], { perm: [0, 2, 1, 3] }));
  return undefined;
};

/** Attention with the projections inside the operator. */
const attention: Define = (node) => {
  const { emit } = node;
  const heads = node.int("num_heads");
  const columns = node.weight(node.x(1))?.[1];
  if (columns === undefined) return "has projections that are no weights";
  if (node.int("do_rotary") !== 0) return "turns positions itself, which gradients do not pass";
  if (node.has(4)) return "has a past, which gradients do not pass";
  if (node.has(3) && node.rank(node.x(3), 2) !== 2) return "has a mask other than [batch, keys], which is not known";
  const given = node.ints("qkv_hidden_sizes");
  const sizes = given.length === 3 ? given : [columns / 3, columns / 3, columns / 3];
  const scale = scaleOf(node, sizes[0]! / heads);
  if (scale === undefined) return NO_WIDTH;
  const product = emit.op("MatMul", [node.x(0), node.x(1)]);
  const parts = emit.split(node.has(2) ? emit.add(product, node.x(2)) : product, 2, sizes);
  const [q, k, v] = parts.map((side) => emit.op("Reshape", [side, emit.ints([0, 0, heads, -1])]));
  const bias = biases(node, 3, 5, node.x(0));
  node.give(0, attend(emit, { q: q!, k: k!, v: v!, heads, kvHeads: heads, scale, bias }));
  return node.wants(1) ? "is used by more than its first output, which gradients do not come back from" : undefined;
};

export const ATTENTIONS: readonly (readonly [string, Define])[] = [
  ["com.microsoft.GroupQueryAttention", groupQueryAttention],
  ["com.microsoft.MultiHeadAttention", multiHeadAttention],
  ["com.microsoft.Attention", attention],
];

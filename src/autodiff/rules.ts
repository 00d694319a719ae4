/**
 * All operators that gradients pass, with a rule for each, and those at which gradients end.
 */

import { attribute, type Graph, intsOf, type Use } from "../onnx/model.ts";
import { CONTRIBUTED } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/protobuf.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { type BlockWeight, blocksOf, inParts, unpacked } from "./block-weights.ts";
import { type Emitter, type Moment, OperatorNode } from "./emit.ts";
import { type Dims, fromFront, type Problems, type Shapes } from "./shapes.ts";

/** Rule to differentiate one operator. */
export interface Rule {
  /** Inputs that a gradient can flow to. Default: all of them. */
  readonly inputs?: readonly number[];
  /** The rule uses gradients of other outputs than the first. */
  readonly manyOutputs?: boolean;
  readonly backward: (node: NodeGradient) => void;
}

/**
 * Rule of an operator that broadcasts: gives the gradient of each input in the shape of the output. Inputs without an
 * entry get none.
 */
export function broadcast(derive: Readonly<Record<number, (node: NodeGradient) => string>>): Rule {
  const inputs = Object.keys(derive).map(Number);
  return {
    inputs,
    backward(node) {
      for (const input of inputs) node.giveSummed(input, () => derive[input]!(node));
    },
  };
}

export interface Walk {
  readonly graph: Graph;
  readonly active: ReadonlySet<string>;
  readonly shapes: Shapes;
  readonly emit: Emitter;
  readonly problems: Problems;
  /** Sums of the gradients of values so far. */
  readonly gradients: Map<string, string>;
}

/**
 * One node in the backward pass: what a rule can ask about it, and where it puts the gradients of the node's inputs.
 */
export class NodeGradient extends OperatorNode {
  readonly #walk: Walk;

  constructor(proto: NodeProto, walk: Walk) {
    super(proto, walk.emit);
    this.#walk = walk;
  }

  get graph(): Graph {
    return this.#walk.graph;
  }

  get y(): string {
    return this.proto.output[0]!;
  }

  get g(): string {
    return this.gradient(this.y)!;
  }

  gradient(value: string): string | undefined {
    return this.#walk.gradients.get(value);
  }

  wants(input: number): boolean {
    return this.has(input) && this.#walk.active.has(this.x(input));
  }

  dims(value: string): Dims {
    return this.#walk.shapes.dims(value);
  }

  rank(value: string): number {
    return this.dims(value).length;
  }

  type(value: string): string {
    return this.#walk.shapes.type(value);
  }

  /** An int64 vector of these numbers that becomes available together with this node's gradient. */
  late(numbers: readonly number[]): string {
    const { value, axis } = this.moment();
    return this.emit.late(numbers, value, axis);
  }

  /** Moment at which this node's gradient is available. */
  moment(): Moment {
    const value = this.proto.output.find((output) => this.gradient(output) !== undefined)!;
    return { value: this.gradient(value)!, axis: this.#walk.shapes.freeAxis(value) };
  }

  constant(value: string): readonly number[] | undefined {
    return this.#walk.shapes.constant(value);
  }

  text(name: string): string {
    return new TextDecoder().decode(attribute(this.proto, name)?.s);
  }

  /** An axis of the attribute `axis`, counted from the front. */
  axis(otherwise: number, rank: number): number {
    return fromFront(this.int("axis", otherwise), rank);
  }

  /** Gives a gradient in the shape of the input. */
  give(input: number, gradient: string): void {
    if (!this.wants(input)) return;
    const other = this.gradient(this.x(input));
    this.#walk.gradients.set(this.x(input), other === undefined ? gradient : this.emit.add(other, gradient));
  }

  /** Gives a gradient that has the elements of the input in another shape. */
  giveReshaped(input: number, gradient: string): void {
    if (this.wants(input)) this.give(input, this.emit.reshapeAs(gradient, this.x(input)));
  }

  /** Gives a gradient that has the rows of y as a matrix. */
  giveRows(input: number, gradient: string): void {
    if (this.rank(this.y) === 2) this.give(input, gradient);
    else this.giveReshaped(input, gradient);
  }

  /** Gives a gradient in a shape that the input was broadcast to, summed over what was repeated. */
  giveSummed(input: number, gradient: () => string, dims: Dims = this.dims(this.y)): void {
    if (this.wants(input)) this.give(input, this.summed(gradient(), dims, this.dims(this.x(input))));
  }

  /** Sums a value of dimensions `from` over the dimensions that broadcasting from `to` has repeated. */
  summed(value: string, from: Dims, to: Dims): string {
    const more = from.length - to.length;
    const leading = from.slice(0, more).map((_, axis) => axis);
    const repeated = to.flatMap((size, axis) => (size === 1 && from[more + axis] !== 1 ? [axis] : []));
    return this.emit.sum(this.emit.sum(value, leading, false), repeated, true);
  }

  refuse(why: string): void {
    this.#walk.problems.node(this.proto, why);
  }
}

// Operators that move elements and compute nothing: their gradients move back.

/** Rule of operators that keep the elements and change the shape. */
const reshape: Rule = { inputs: [0], backward: (node) => node.giveReshaped(0, node.g) };

const transpose: Rule = {
  backward(node) {
    const rank = node.rank(node.x(0));
    const perm = node.ints("perm") ?? [...Array(rank).keys()].reverse();
    const inverse = perm.map((_, axis) => perm.indexOf(axis));
    node.give(0, node.emit.transpose(node.g, inverse));
  },
};

const concat: Rule = {
  backward(node) {
    const { emit } = node;
    const axis = node.axis(0, node.rank(node.y));
    const sizes = node.proto.input.map(
      (value) => node.dims(value)[axis] ?? emit.slice(emit.shape(value), 0, axis, axis + 1),
    );
    for (const [input, piece] of emit.split(node.g, axis, sizes).entries()) node.give(input, piece);
  },
};

const split: Rule = {
  inputs: [0],
  manyOutputs: true,
  backward(node) {
    const { emit } = node;
    const pieces = node.proto.output.map((output) => node.gradient(output) ?? emit.zerosLike(output));
    node.give(0, emit.concat(pieces, node.axis(0, node.rank(node.x(0)))));
  },
};

/** Gather of one index of a dimension, or of rows of a matrix. */
const gather: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    const [x, index] = [node.x(0), node.x(1)];
    const dims = node.dims(index);
    const rank = node.rank(x);
    const axis = node.axis(0, rank);
    const rows = rank === 2 && axis === 0 && dims.length === 1;
    if (!rows && dims.some((size) => size !== 1))
      return node.refuse("takes several places at once, which gradients do not come back from");
    const size = emit.size(x, axis);
    const at = emit.reshape(emit.cast(index, 7), [-1]);
    const place = emit.op("Where", emit.op("Less", at, emit.int(0)), emit.add(at, size), at);
    const places = emit.range(size);
    if (rows) {
      // Each row gets the sum of the gradients of its copies.
      const met = emit.toFloat(emit.op("Equal", emit.unsqueeze(place, [1]), places));
      return node.give(0, emit.op("Gemm", met, node.g, { transA: 1 }));
    }
    const met = emit.toFloat(emit.op("Equal", places, place));
    const trailing = Array.from({ length: rank - axis - 1 }, (_, i) => i + 1);
    // The index replaces one dimension by all of its own.
    let { g } = node;
    const more = dims.slice(1).map((_, i) => axis + i);
    if (dims.length === 0) g = emit.unsqueeze(g, [axis]);
    if (more.length > 0) g = emit.op("Squeeze", g, more);
    node.give(0, emit.mul(g, emit.unsqueeze(met, trailing)));
  },
};

const slice: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    const [x, starts, ends] = [node.x(0), node.x(1), node.x(2)];
    const dims = node.dims(x);
    const rank = dims.length;
    const [from, to] = [node.constant(starts), node.constant(ends)];
    const count = node.dims(starts)[0];
    const axes = (
      node.has(3) ? node.constant(node.x(3)) : count === undefined ? undefined : [...Array(count).keys()]
    )?.map((axis) => fromFront(axis, rank));
    const steps = node.has(4) ? node.constant(node.x(4)) : axes?.map(() => 1);
    if (!axes || !steps) return node.refuse("takes axes or steps that depend on the input");
    if (steps.some((by) => by !== 1)) return node.refuse("takes steps other than 1");
    const [before, after] = [Array<number | string>(rank).fill(0), Array<number | string>(rank).fill(0)];
    for (const [i, axis] of axes.entries()) {
      const size = dims[axis];
      if (from && to && size !== undefined) {
        const at = (end: number): number => Math.min(Math.max(end < 0 ? end + size : end, 0), size);
        before[axis] = at(from[i]!);
        after[axis] = size - Math.max(at(to[i]!), at(from[i]!));
      } else {
        // Running the operator on 0, 1, 2, … shows which elements it takes.
        const all = emit.size(x, axis);
        const one = (value: string): string => emit.slice(value, 0, i, i + 1);
        const taken = emit.op("Slice", emit.range(all), one(starts), one(ends), [0]);
        before[axis] = emit.slice(taken, 0, 0, 1);
        after[axis] = emit.sub(emit.sub(all, emit.int(1)), emit.slice(taken, 0, -1, 2 ** 31));
      }
    }
    node.give(0, padded(node, [...before, ...after]));
  },
};

function padded({ emit, g }: NodeGradient, pads: readonly (number | string)[]): string {
  if (pads.every((pad) => pad === 0)) return g;
  if (pads.every((pad) => typeof pad === "number")) return emit.op("Pad", g, pads);
  return emit.op("Pad", g, emit.join(pads));
}

// Sums, means and maxima over dimensions.

/** @param derive turns the gradient with kept dimensions into that of the input, which may still have to be repeated */
function reduction(derive: (node: NodeGradient, g: string, axes: readonly number[]) => string): Rule {
  return {
    inputs: [0],
    backward(node) {
      const axes = axesOf(node);
      if (!axes) return node.refuse("reduces over axes that depend on the input");
      if (axes.length === 0) return node.give(0, node.g);
      const kept = node.int("keepdims", 1) === 0 ? node.emit.unsqueeze(node.g, axes) : node.g;
      node.give(0, derive(node, kept, axes));
    },
  };
}

function axesOf(node: NodeGradient): readonly number[] | undefined {
  const rank = node.rank(node.x());
  const given = node.has(1) ? node.constant(node.x(1)) : (node.ints("axes") ?? []);
  if (given?.length === 0) return node.int("noop_with_empty_axes") ? [] : [...Array(rank).keys()];
  return given?.map((axis) => fromFront(axis, rank)).sort((a, b) => a - b);
}

function repeated(node: NodeGradient, g: string): string {
  return node.emit.op("Expand", g, node.emit.shape(node.x()));
}

const sum = reduction(repeated);

const mean = reduction((node, g, axes) => {
  const { emit } = node;
  const x = node.x();
  const sizes = axes.map((axis) => node.dims(x)[axis]);
  const count = sizes.every((size) => size !== undefined)
    ? elementsOf(sizes)
    : emit.toFloat(axes.map((axis) => emit.size(x, axis)).reduce((a, b) => emit.mul(a, b)));
  return repeated(node, emit.div(g, count));
});

/** Shares the gradient evenly where several elements are the largest. */
const max = reduction((node, g, axes) => {
  const { emit } = node;
  const y = node.int("keepdims", 1) === 0 ? emit.unsqueeze(node.y, axes) : node.y;
  const met = emit.toFloat(emit.op("Equal", node.x(), y));
  return emit.mul(met, emit.div(g, emit.sum(met, axes, true)));
});

// Products with weights in blocks of 4 or 8 bits.

const matMulNBits: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    const blocks = blocksOf(node.proto, (value) => ({ dims: node.dims(value), bytes: node.type(value) === "uint8" }));
    if (typeof blocks === "string") return node.refuse(`${blocks}, which gradients do not pass`);
    const { K, block, count } = blocks;
    const g = node.rank(node.y) === 2 ? node.g : emit.rows(node.g);
    const sum = (emit.gathers ? byGather : byBytes)(node, g, blocks);
    node.giveRows(0, count * block > K ? emit.slice(sum, 1, 0, K) : sum);
  },
};

function columns(emit: Emitter, g: string, { N }: BlockWeight, from: number, to: number): string {
  return to - from < N ? emit.slice(g, 1, from, to) : g;
}

/** Unpacks as the forward product does, for processors. @returns [rows of g, count · block] */
function byBytes(node: NodeGradient, g: string, blocks: BlockWeight): string {
  const { emit } = node;
  const [whole, upper] = inParts<readonly string[]>(blocks, (from, to, before = []) => {
    const last = before.at(-1);
    const weights = unpacked(emit, blocks, from, to, (numbers) =>
      last === undefined ? node.late(numbers) : emit.late(numbers, last),
    );
    const products: string[] = [];
    for (const [i, weight] of weights.entries()) {
      const gradient = columns(emit, g, blocks, from, to);
      // One after the other, where there are many: what waits for its product takes memory.
      const waits = i > 0 && gradient !== g;
      const late = waits ? emit.reshape(gradient, emit.late([0, 0], products[i - 1]!)) : gradient;
      const product = emit.matMul(late, weight);
      products.push(before[i] === undefined ? product : emit.add(before[i], product));
    }
    return products;
  }) as [string, string | undefined];
  if (upper === undefined) return whole;
  const halves = [emit.sub(whole, emit.mul(16, upper)), upper].map((half) => emit.unsqueeze(half, [0]));
  const inPlace = emit.transpose(emit.concat(halves, 0), [1, 2, 0]);
  return emit.op("Flatten", inPlace, { axis: 1 });
}

/**
 * Unpacks with onnxruntime's operator, for devices without other operators on bytes. On processors it takes several
 * times as long.
 * @returns [rows of g, count · block]
 */
function byGather(node: NodeGradient, g: string, blocks: BlockWeight): string {
  const { emit } = node;
  const { bits, block, count, N } = blocks;
  const packed = emit.reshape(blocks.packed, [N, (count * block * bits) / 8]);
  const scales = emit.reshape(blocks.scales, [N, count]);
  const zeros = blocks.zeros ? [emit.reshape(blocks.zeros, [N, Math.ceil((count * bits) / 8)])] : [];
  const attributes = { bits, block_size: block, gather_axis: 0, quantize_axis: 1 };
  return inParts<string>(blocks, (from, to, before) => {
    const places = emit.op("Range", emit.int(from), emit.int(to), emit.int(1));
    const late = emit.add(places, before === undefined ? node.late([0]) : emit.late([0], before, 0));
    const rows = emit.op(`${CONTRIBUTED}.GatherBlockQuantized`, packed, late, scales, ...zeros, attributes);
    return emit.op("Gemm", ...[columns(emit, g, blocks, from, to), rows, before ?? []].flat());
  });
}

// Softmax and the normalisations. Intermediate results that a forward operator does not return are computed again.

const softmax: Rule = {
  backward(node) {
    const { emit, g } = node;
    const axes = [node.axis(-1, node.rank(node.y))];
    const y = guarded(node);
    const along = emit.sum(emit.mul(g, y), axes, true);
    node.give(0, emit.mul(y, emit.sub(g, along)));
  },
};

/**
 * The gradient through Where(IsNaN(y), 0, y), which exporters of scaled dot-product attention put behind the softmax
 * for rows that see nothing. Their gradient is 0 as well, and 0 · NaN would spoil all others.
 */
function guarded({ graph, y }: NodeGradient): string {
  const users = (value: string): readonly Use[] => graph.consumers.get(value) ?? [];
  const guards = users(y)
    .filter(({ node }) => node.opType === "IsNaN")
    .flatMap(({ node }) => users(node.output[0]!).filter((use) => use.node.opType === "Where" && use.input === 0));
  return guards.find(({ node }) => node.input[2] === y)?.node.output[0] ?? y;
}

const logSoftmax: Rule = {
  backward(node) {
    const { emit, g, y } = node;
    const axes = [node.axis(-1, node.rank(y))];
    node.give(0, emit.sub(g, emit.mul(emit.op("Exp", y), emit.sum(g, axes, true))));
  },
};

/** y = x̂ · scale + bias, x̂ = (x − mean) / √(variance + ε) over the last dimensions; `centred`: false has no mean. */
function normalization(centred: boolean): Rule {
  return {
    backward(node) {
      const { emit, g } = node;
      const [x, rank] = [node.x(0), node.rank(node.x(0))];
      const first = node.axis(-1, rank);
      const axes = Array.from({ length: rank - first }, (_, i) => first + i);
      const deviation = centred ? emit.sub(x, emit.mean(x, axes)) : x;
      const variance = emit.mean(emit.mul(deviation, deviation), axes);
      const inverse = emit.op("Reciprocal", emit.op("Sqrt", emit.add(variance, node.float("epsilon", 1e-5))));
      const normal = emit.mul(deviation, inverse);
      if (node.wants(0)) {
        const scaled = node.has(1) ? emit.mul(g, node.x(1)) : g;
        const along = emit.mul(normal, emit.mean(emit.mul(scaled, normal), axes));
        const across = centred ? emit.sub(scaled, emit.mean(scaled, axes)) : scaled;
        node.give(0, emit.mul(inverse, emit.sub(across, along)));
      }
      node.giveSummed(1, () => emit.mul(g, normal));
      node.giveSummed(2, () => g);
    },
  };
}

// Products of matrices. The transpose of a weight is never written as a node of its own: runtimes would fold it into a
// second copy of the weight when they load the graph.

const matMul: Rule = {
  backward(node) {
    const { emit } = node;
    let { g } = node;
    let [a, b] = [node.x(0), node.x(1)];
    let [aDims, bDims] = [node.dims(a), node.dims(b)];
    const single = bDims.length === 3 && bDims[0] === 1;
    if (aDims.length >= 2 && (bDims.length === 2 || single)) {
      // The weight is a matrix: all rows of the other side are joined, so that no batch remains to sum over.
      const rows = (value: string): string => (node.rank(node.y) === 2 ? value : emit.rows(value));
      if (node.wants(0)) {
        const source = untransposed(node.graph, b);
        const matrix = single ? emit.op("Squeeze", b, [0]) : (source ?? b);
        node.giveRows(0, emit.op("Gemm", rows(g), matrix, { transB: single || source === undefined ? 1 : 0 }));
      }
      if (!node.wants(1)) return;
      const x = aDims.length === 2 ? a : emit.rows(a);
      // A factor has few columns, and their number is free. Its gradient is computed through the transpose, since
      // products are fast for long rows. The order matters: runtimes would fuse the Transpose into the Gemm.
      const isThin = single && bDims[1] !== undefined && bDims[2] === undefined;
      const product = emit.op("Gemm", ...(isThin ? [rows(g), x] : [x, rows(g)]), { transA: 1 });
      const given = single ? emit.unsqueeze(product, [0]) : product;
      return node.give(1, isThin ? emit.transpose(given, [0, 2, 1]) : given);
    }
    // A vector is a matrix of one row or column.
    if (aDims.length === 1) [a, aDims, g] = [emit.unsqueeze(a, [0]), [1, ...aDims], emit.unsqueeze(g, [-2])];
    if (bDims.length === 1) [b, bDims, g] = [emit.unsqueeze(b, [1]), [...bDims, 1], emit.unsqueeze(g, [-1])];
    const yDims = node.dims(node.y);
    const vectors = (node.rank(node.x(0)) === 1 ? 1 : 0) + (node.rank(node.x(1)) === 1 ? 1 : 0);
    const batch = yDims.slice(0, yDims.length - 2 + vectors);
    const one = (input: number, product: string, to: typeof aDims): void => {
      const summed = node.summed(product, [...batch, ...to.slice(-2)], to);
      if (node.rank(node.x(input)) === 1) node.giveReshaped(input, summed);
      else node.give(input, summed);
    };
    if (node.wants(0)) one(0, emit.matMul(g, swapLast(node, b, bDims.length)), aDims);
    if (node.wants(1)) one(1, emit.matMul(swapLast(node, a, aDims.length), g), bDims);
  },
};

const gemm: Rule = {
  backward(node) {
    const { emit, g } = node;
    const [a, b] = [node.x(0), node.x(1)];
    const [transA, transB] = [node.int("transA"), node.int("transB")];
    const alpha = { float: node.float("alpha", 1) };
    const product = (left: string, right: string, transA: number, transB: number): string =>
      emit.op("Gemm", left, right, { alpha, transA, transB });
    if (node.wants(0)) node.give(0, transA ? product(b, g, transB, 1) : product(g, b, 0, 1 - transB));
    if (node.wants(1)) node.give(1, transB ? product(g, a, 1, transA) : product(a, g, 1 - transA, 0));
    const beta = node.float("beta", 1);
    node.giveSummed(2, () => (beta === 1 ? g : emit.mul(g, beta)));
  },
};

/** The matrix that a value is the Transpose of; undefined for other values. */
export function untransposed({ producers }: Graph, value: string): string | undefined {
  const node = producers.get(value);
  return node?.opType === "Transpose" && intsOf(node, "perm")?.join() !== "0,1" ? node.input[0] : undefined;
}

function swapLast({ emit }: NodeGradient, value: string, rank: number): string {
  return emit.transpose(value, [...Array(rank - 2).keys(), rank - 1, rank - 2]);
}

// Operators that work on each element by itself, and those that broadcast two or more inputs.

/** Rule of one input: `derive` gives g · dy/dx. */
function unary(derive: (emit: Emitter, g: string, x: string, y: string, node: NodeGradient) => string): Rule {
  return broadcast({ 0: (node) => derive(node.emit, node.g, node.x(), node.y, node) });
}

const pass = unary((_, g) => g);

const add: Rule = {
  backward(node) {
    for (const input of node.proto.input.keys()) node.giveSummed(input, () => node.g);
  },
};

const pow: Rule = {
  backward(node) {
    const { emit, g, y } = node;
    if (node.wants(1)) return node.refuse("has a trained exponent, which gradients do not flow to");
    const [x, exponent] = [node.x(0), node.x(1)];
    const known = node.constant(exponent);
    const [e] = known?.length === 1 ? known : [];
    node.giveSummed(0, () => {
      if (e === 2) return emit.mul(g, emit.mul(x, 2));
      if (e === 3) return emit.mul(g, emit.mul(emit.mul(x, x), 3));
      if (e === 0.5) return emit.div(emit.mul(g, 0.5), y);
      if (e !== undefined) return emit.mul(g, emit.mul(emit.op("Pow", x, e - 1), e));
      return emit.mul(g, emit.mul(exponent, emit.op("Pow", x, emit.sub(exponent, 1))));
    });
  },
};

/** 2/√π · exp(−x²), the derivative of erf, in the fewest passes over the elements. */
const erfSlope = (emit: Emitter, x: string): string =>
  emit.op("Exp", emit.sub(Math.log(2 / Math.sqrt(Math.PI)), emit.mul(x, x)));

const SQRT_2_BY_PI = Math.sqrt(2 / Math.PI);
/** Coefficient in the approximation of GELU by a hyperbolic tangent. */
const CUBIC = 0.044715;

/** x · Φ(x), or its approximation. */
const gelu = unary((emit, g, x, _, node) => {
  if (node.proto.opType !== "FastGelu" && node.text("approximate") !== "tanh") {
    const u = emit.mul(x, Math.SQRT1_2);
    return emit.mul(emit.mul(g, 0.5), emit.add(emit.add(emit.op("Erf", u), emit.mul(u, erfSlope(emit, u))), 1));
  }
  const square = emit.mul(x, x);
  const t = emit.op("Tanh", emit.mul(emit.mul(x, emit.add(emit.mul(square, CUBIC), 1)), SQRT_2_BY_PI));
  const inner = emit.mul(emit.add(emit.mul(square, 3 * CUBIC), 1), SQRT_2_BY_PI);
  const slope = emit.mul(emit.mul(x, emit.sub(1, emit.mul(t, t))), inner);
  return emit.mul(g, emit.mul(emit.add(emit.add(t, 1), slope), 0.5));
});

/**
 * Rules by operator, with the domain in front where it is not the standard one. Where no gradient passes it is exactly
 * 0, never 0 · NaN.
 */
export const RULES: ReadonlyMap<string, Rule> = new Map(
  Object.entries({
    Identity: pass,
    Cast: pass,
    Dropout: pass,
    Add: add,
    Sum: add,
    Sub: broadcast({ 0: ({ g }) => g, 1: ({ emit, g }) => emit.neg(g) }),
    Mul: broadcast({ 0: (node) => node.emit.mul(node.g, node.x(1)), 1: (node) => node.emit.mul(node.g, node.x(0)) }),
    Div: broadcast({
      0(node) {
        // Multiplication is faster.
        const known = node.constant(node.x(1));
        return known?.length === 1 ? node.emit.mul(node.g, 1 / known[0]!) : node.emit.div(node.g, node.x(1));
      },
      1: (node) => node.emit.neg(node.emit.div(node.emit.mul(node.g, node.y), node.x(1))),
    }),
    Pow: pow,
    Where: broadcast({
      1: (node) => node.emit.op("Where", node.x(0), node.g, 0),
      2: (node) => node.emit.op("Where", node.x(0), 0, node.g),
    }),
    Gelu: gelu,
    "com.microsoft.Gelu": gelu,
    "com.microsoft.FastGelu": gelu,
    Neg: unary((emit, g) => emit.neg(g)),
    Reciprocal: unary((emit, g, _, y) => emit.neg(emit.mul(g, emit.mul(y, y)))),
    Sqrt: unary((emit, g, _, y) => emit.div(emit.mul(g, 0.5), y)),
    Exp: unary((emit, g, _, y) => emit.mul(g, y)),
    Log: unary((emit, g, x) => emit.div(g, x)),
    Erf: unary((emit, g, x) => emit.mul(g, erfSlope(emit, x))),
    Tanh: unary((emit, g, _, y) => emit.mul(g, emit.sub(1, emit.mul(y, y)))),
    Sigmoid: unary((emit, g, _, y) => emit.mul(g, emit.mul(y, emit.sub(1, y)))),
    Softplus: unary((emit, g, x) => emit.mul(g, emit.op("Sigmoid", x))),
    Relu: unary((emit, g, _, y) => emit.op("Where", emit.op("Less", 0, y), g, 0)),
    // The gradient passes where nothing was clipped.
    Clip: unary((emit, g, x, y) => emit.op("Where", emit.op("Equal", x, y), g, 0)),
    MatMul: matMul,
    Gemm: gemm,
    "com.microsoft.MatMulNBits": matMulNBits,
    Softmax: softmax,
    LogSoftmax: logSoftmax,
    LayerNormalization: normalization(true),
    RMSNormalization: normalization(false),
    // onnxruntime's own operator, which it accepts in the standard domain at any opset.
    SimplifiedLayerNormalization: normalization(false),
    ReduceSum: sum,
    ReduceMean: mean,
    ReduceMax: max,
    Reshape: reshape,
    Flatten: reshape,
    Squeeze: reshape,
    Unsqueeze: reshape,
    Transpose: transpose,
    Expand: broadcast({ 0: ({ g }) => g }),
    Concat: concat,
    Split: split,
    Gather: gather,
    Slice: slice,
  }),
);

/** Operators whose results do not change with small changes of their inputs. */
export const STOPS: ReadonlySet<string> = new Set([
  ...["Shape", "Size", "Range", "ConstantOfShape", "NonZero", "ArgMax", "ArgMin"],
  ...["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"],
  ...["Floor", "Ceil", "Round", "Sign"],
]);

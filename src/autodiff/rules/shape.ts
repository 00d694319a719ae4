/**
 * Operators that move elements and compute nothing: their gradients move back.
 */
import { broadcast, type NodeGradient, type Rule } from "../node-gradient.ts";
import { fromFront } from "../shapes.ts";

/** Rule of operators that keep the elements and change the shape. */
const reshape: Rule = { inputs: [0], backward: (node) => node.giveReshaped(0, node.g) };

const transpose: Rule = {
  backward(node) {
    const rank = node.rank(node.x(0));
    const perm = node.ints("perm") ?? [...Array(rank).keys()].reverse();
    const inverse = perm.map((_, axis) => perm.indexOf(axis));
    node.give(0, node.emit.op("Transpose", [node.g], { perm: inverse }));
  },
};

const concat: Rule = {
  backward(node) {
    const { emit, g } = node;
    const axis = node.axis(0, node.rank(node.y));
    // A number while all sizes before are fixed.
    let from: number | string = 0;
    for (const [input, value] of node.proto.input.entries()) {
      const size = node.dims(value)[axis];
      const at: string = typeof from === "number" ? emit.ints([from]) : from;
      const to: number | string =
        typeof from === "number" && size !== undefined
          ? from + size
          : emit.add(at, emit.slice(emit.shape(value), 0, axis, axis + 1));
      if (node.wants(input)) {
        node.give(input, emit.op("Slice", [g, at, typeof to === "number" ? emit.ints([to]) : to, emit.ints([axis])]));
      }
      from = to;
    }
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
    const at = emit.op("Reshape", [emit.op("Cast", [index], { to: 7 }), emit.ints([-1])]);
    const place = emit.op("Where", [emit.op("Less", [at, emit.int(0)]), emit.add(at, size), at]);
    const places = emit.op("Range", [emit.int(0), size, emit.int(1)]);
    if (rows) {
      // Each row gets the sum of the gradients of its copies.
      const met = emit.toFloat(emit.op("Equal", [emit.unsqueeze(place, [1]), places]));
      return node.give(0, emit.op("Gemm", [met, node.g], { transA: 1 }));
    }
    const met = emit.toFloat(emit.op("Equal", [places, place]));
    const trailing = Array.from({ length: rank - axis - 1 }, (_, i) => i + 1);
    // The index replaces one dimension by all of its own.
    let { g } = node;
    if (dims.length === 0) g = emit.unsqueeze(g, [axis]);
    if (dims.length > 1) g = emit.op("Squeeze", [g, emit.ints(dims.slice(1).map((_, i) => axis + i))]);
    node.give(0, emit.mul(g, emit.unsqueeze(met, trailing)));
  },
};

/** Puts zeros where nothing was taken. */
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
        const taken = emit.op("Slice", [
          emit.op("Range", [emit.int(0), all, emit.int(1)]),
          one(starts),
          one(ends),
          emit.ints([0]),
        ]);
        before[axis] = emit.slice(taken, 0, 0, 1);
        after[axis] = emit.sub(emit.sub(all, emit.int(1)), emit.slice(taken, 0, -1, 2 ** 31));
      }
    }
    node.give(0, padded(node, [...before, ...after]));
  },
};

function padded({ emit, g }: NodeGradient, pads: readonly (number | string)[]): string {
  if (pads.every((pad) => pad === 0)) return g;
  if (pads.every((pad) => typeof pad === "number")) return emit.op("Pad", [g, emit.ints(pads)]);
  const parts = pads.map((pad) => (typeof pad === "number" ? emit.ints([pad]) : pad));
  return emit.op("Pad", [g, emit.concat(parts, 0)]);
}

export const MOVES: readonly (readonly [string, Rule])[] = [
  ["Reshape", reshape],
  ["Flatten", reshape],
  ["Squeeze", reshape],
  ["Unsqueeze", reshape],
  ["Transpose", transpose],
  ["Expand", broadcast({ 0: ({ g }) => g })],
  ["Concat", concat],
  ["Split", split],
  ["Gather", gather],
  ["Slice", slice],
];

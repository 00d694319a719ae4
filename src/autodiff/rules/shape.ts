/**
 * Operators that move elements and compute nothing: their gradients are moved back.
 */
import type { Rule, Step } from "../step.ts";

/** The same elements in another shape. */
const reshape: Rule = { inputs: [0], backward: (step) => step.giveReshaped(0, step.g) };

const transpose: Rule = {
  backward(step) {
    const rank = step.rank(step.x(0));
    const perm = step.ints("perm") ?? [...Array(rank).keys()].reverse();
    const inverse = perm.map((_, axis) => perm.indexOf(axis));
    step.give(0, step.emit.op("Transpose", [step.g], { perm: inverse }));
  },
};

const expand: Rule = { inputs: [0], backward: (step) => step.giveSummed(0, () => step.g) };

const concat: Rule = {
  backward(step) {
    const { emit, g, node } = step;
    const axis = step.axis(0, step.rank(step.y));
    const sizes = node.input.map((value) => step.dims(value)[axis]);
    const sizeOf = (value: string): string => emit.slice(emit.shape(value), 0, axis, axis + 1);
    // A number as long as all sizes before are fixed.
    let from: number | string = 0;
    for (const [input, value] of node.input.entries()) {
      const size = sizes[input];
      const at: string = typeof from === "number" ? emit.ints([from]) : from;
      const to: number | string =
        typeof from === "number" && size !== undefined ? from + size : emit.add(at, sizeOf(value));
      if (step.wants(input)) {
        step.give(input, emit.op("Slice", [g, at, typeof to === "number" ? emit.ints([to]) : to, emit.ints([axis])]));
      }
      from = to;
    }
  },
};

const split: Rule = {
  inputs: [0],
  manyOutputs: true,
  backward(step) {
    const { emit, node } = step;
    const pieces = node.output.map((output) => step.gradient(output) ?? emit.zerosLike(output));
    step.give(0, emit.concat(pieces, step.axis(0, step.rank(step.x(0)))));
  },
};

/** One place of a dimension. Several would need a sum over those that name the same place. */
const gather: Rule = {
  inputs: [0],
  backward(step) {
    const { emit } = step;
    const [x, index] = [step.x(0), step.x(1)];
    const dims = step.dims(index);
    if (dims.some((size) => size !== 1))
      return step.refuse("takes several places at once, which gradients do not come back from");
    const rank = step.rank(x);
    const axis = step.axis(0, rank);
    const size = emit.size(x, axis);
    const at = emit.op("Reshape", [emit.op("Cast", [index], { to: 7 }), emit.ints([1])]);
    const place = emit.op("Where", [emit.op("Less", [at, emit.int(0)]), emit.add(at, size), at]);
    const met = emit.toFloat(emit.op("Equal", [emit.op("Range", [emit.int(0), size, emit.int(1)]), place]));
    const trailing = Array.from({ length: rank - axis - 1 }, (_, i) => i + 1);
    // The index has as many dimensions as it has put in the place of one.
    const g =
      dims.length === 1
        ? step.g
        : dims.length === 0
          ? emit.unsqueeze(step.g, [axis])
          : squeezed(step, axis, dims.length);
    step.give(0, emit.mul(g, emit.unsqueeze(met, trailing)));
  },
};

function squeezed({ emit, g }: Step, axis: number, many: number): string {
  return emit.op("Squeeze", [g, emit.ints(Array.from({ length: many - 1 }, (_, i) => axis + i))]);
}

/** Zeros where nothing was taken. */
const slice: Rule = {
  inputs: [0],
  backward(step) {
    const { emit } = step;
    const [x, starts, ends] = [step.x(0), step.x(1), step.x(2)];
    const dims = step.dims(x);
    const rank = dims.length;
    const [from, to] = [step.constant(starts), step.constant(ends)];
    const count = step.dims(starts)[0];
    const axes = (
      step.has(3) ? step.constant(step.x(3)) : count === undefined ? undefined : [...Array(count).keys()]
    )?.map((axis) => (axis < 0 ? axis + rank : axis));
    const steps = step.has(4) ? step.constant(step.x(4)) : axes?.map(() => 1);
    if (!axes || !steps) return step.refuse("takes axes or steps that depend on the input");
    if (steps.some((by) => by !== 1)) return step.refuse("takes steps other than 1");
    const [before, after] = [Array<number | string>(rank).fill(0), Array<number | string>(rank).fill(0)];
    for (const [i, axis] of axes.entries()) {
      const size = dims[axis];
      if (from && to && size !== undefined) {
        const at = (end: number): number => Math.min(Math.max(end < 0 ? end + size : end, 0), size);
        before[axis] = at(from[i]!);
        after[axis] = size - Math.max(at(to[i]!), at(from[i]!));
      } else {
        // Which places were taken, by what the operator itself takes of 0, 1, 2, …
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
    step.give(0, padded(step, [...before, ...after]));
  },
};

function padded({ emit, g }: Step, pads: readonly (number | string)[]): string {
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
  ["Expand", expand],
  ["Concat", concat],
  ["Split", split],
  ["Gather", gather],
  ["Slice", slice],
];

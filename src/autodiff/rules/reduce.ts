/**
 * Sums, means and maxima over dimensions.
 */
import type { Rule, Step } from "../step.ts";

/** @param derive from the gradient with the dimensions kept to that of the input, which may still have to be repeated */
function reduction(derive: (step: Step, g: string, axes: readonly number[]) => string): Rule {
  return {
    inputs: [0],
    backward(step) {
      const axes = axesOf(step);
      if (!axes) return step.refuse("reduces over axes that depend on the input");
      if (axes.length === 0) return step.give(0, step.g);
      const kept = step.int("keepdims") === 0 ? step.emit.unsqueeze(step.g, axes) : step.g;
      step.give(0, derive(step, kept, axes));
    },
  };
}

/** Counted from the front; undefined where they are not fixed. */
function axesOf(step: Step): readonly number[] | undefined {
  const rank = step.rank(step.x(0));
  const given = step.has(1) ? step.constant(step.x(1)) : (step.ints("axes") ?? []);
  if (given?.length === 0) return step.int("noop_with_empty_axes") ? [] : [...Array(rank).keys()];
  return given?.map((axis) => (axis < 0 ? axis + rank : axis)).sort((a, b) => a - b);
}

function repeated({ emit }: Step, input: string, g: string): string {
  return emit.op("Expand", [g, emit.shape(input)]);
}

const sum = reduction((step, g) => repeated(step, step.x(0), g));

const mean = reduction((step, g, axes) => {
  const { emit } = step;
  const x = step.x(0);
  const sizes = axes.map((axis) => step.dims(x)[axis]);
  const fixed = sizes.every((size) => size !== undefined) ? (sizes as number[]).reduce((a, b) => a * b, 1) : undefined;
  const count = fixed ?? emit.toFloat(axes.map((axis) => emit.size(x, axis)).reduce((a, b) => emit.mul(a, b)));
  return repeated(step, x, emit.div(g, count));
});

/** Shared evenly where several elements are the largest. */
const max = reduction((step, g, axes) => {
  const { emit } = step;
  const x = step.x(0);
  const y = step.int("keepdims") === 0 ? emit.unsqueeze(step.y, axes) : step.y;
  const met = emit.toFloat(emit.op("Equal", [x, y]));
  return emit.mul(met, emit.div(g, emit.sum(met, axes, true)));
});

export const REDUCTIONS: readonly (readonly [string, Rule])[] = [
  ["ReduceSum", sum],
  ["ReduceMean", mean],
  ["ReduceMax", max],
];

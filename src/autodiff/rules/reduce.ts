/**
 * Sums, means and maxima over dimensions.
 */
import type { NodeGradient, Rule } from "../node-gradient.ts";
import { fromFront } from "../shapes.ts";

/** @param derive turns the gradient with kept dimensions into that of the input, which may still have to be repeated */
function reduction(derive: (node: NodeGradient, g: string, axes: readonly number[]) => string): Rule {
  return {
    inputs: [0],
    backward(node) {
      const axes = axesOf(node);
      if (!axes) return node.refuse("reduces over axes that depend on the input");
      if (axes.length === 0) return node.give(0, node.g);
      const kept = node.int("keepdims") === 0 ? node.emit.unsqueeze(node.g, axes) : node.g;
      node.give(0, derive(node, kept, axes));
    },
  };
}

/** Axes counted from the front; undefined where they are not fixed. */
function axesOf(node: NodeGradient): readonly number[] | undefined {
  const rank = node.rank(node.x());
  const given = node.has(1) ? node.constant(node.x(1)) : (node.ints("axes") ?? []);
  if (given?.length === 0) return node.int("noop_with_empty_axes") ? [] : [...Array(rank).keys()];
  return given?.map((axis) => fromFront(axis, rank)).sort((a, b) => a - b);
}

function repeated(node: NodeGradient, g: string): string {
  return node.emit.op("Expand", [g, node.emit.shape(node.x())]);
}

const sum = reduction(repeated);

const mean = reduction((node, g, axes) => {
  const { emit } = node;
  const x = node.x();
  const sizes = axes.map((axis) => node.dims(x)[axis]);
  const count = sizes.every((size) => size !== undefined)
    ? sizes.reduce((a, b) => a * b, 1)
    : emit.toFloat(axes.map((axis) => emit.size(x, axis)).reduce((a, b) => emit.mul(a, b)));
  return repeated(node, emit.div(g, count));
});

/** Shares the gradient evenly where several elements are the largest. */
const max = reduction((node, g, axes) => {
  const { emit } = node;
  const y = node.int("keepdims") === 0 ? emit.unsqueeze(node.y, axes) : node.y;
  const met = emit.toFloat(emit.op("Equal", [node.x(), y]));
  return emit.mul(met, emit.div(g, emit.sum(met, axes, true)));
});

export const REDUCTIONS: readonly (readonly [string, Rule])[] = [
  ["ReduceSum", sum],
  ["ReduceMean", mean],
  ["ReduceMax", max],
];

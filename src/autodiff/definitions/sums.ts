/**
 * Operators that combine a sum with one other operator: a sum with a bias, or with a residual.
 */
import type { Define, Fused } from "./fused.ts";

/** Adds those of the inputs that are present. */
function sum(node: Fused, inputs: readonly number[]): string {
  const there = inputs.filter((input) => node.has(input)).map((input) => node.x(input));
  return there.reduce((a, b) => node.emit.add(a, b));
}

/**
 * @param weights inputs of the weights of the norm behind the sum
 * @param bias input of the bias of the sum
 */
function skipped(opType: string, weights: readonly number[], bias: number): Define {
  return (node) => {
    const whole = sum(node, [0, 1, bias]);
    const given = weights.filter((input) => node.has(input)).map((input) => node.x(input));
    const epsilon = { float: node.float("epsilon", 1e-12) };
    node.give(0, node.emit.op(opType, [whole, ...given], { axis: -1, epsilon }));
    node.give(3, whole);
    return node.wants(1) || node.wants(2)
      ? "gives out what it has computed on the way, which gradients do not come back from"
      : undefined;
  };
}

const biased =
  (opType: string): Define =>
  (node) => {
    node.give(0, node.emit.op(opType, [sum(node, [0, 1])], {}, "com.microsoft"));
    return undefined;
  };

const quickGelu: Define = (node) => {
  const { emit } = node;
  const alpha = node.float("alpha", 1.702);
  const inner = alpha === 1 ? node.x(0) : emit.mul(node.x(0), alpha);
  node.give(0, emit.mul(node.x(0), emit.op("Sigmoid", [inner])));
  return undefined;
};

export const SUMS: readonly (readonly [string, Define])[] = [
  ["com.microsoft.SkipSimplifiedLayerNormalization", skipped("SimplifiedLayerNormalization", [2], 3)],
  ["com.microsoft.SkipLayerNormalization", skipped("LayerNormalization", [2, 3], 4)],
  ["com.microsoft.BiasGelu", biased("Gelu")],
  // FastGelu without a bias has a rule.
  ["com.microsoft.FastGelu", (node) => (node.has(1) ? biased("FastGelu")(node) : undefined)],
  ["com.microsoft.QuickGelu", quickGelu],
];

/**
 * Softmax and the normalisations. Intermediate results that a forward operator does not return are computed again.
 */
import type { Use } from "../../onnx/model.ts";
import type { NodeGradient, Rule } from "../node-gradient.ts";

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
 * The gradient through Where(IsNaN(y), 0, y), which exporters of scaled dot-product attention put behind the softmax for rows that see
 * nothing. Their gradient is 0 as well, and 0 · NaN would spoil all others.
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
    node.give(0, emit.sub(g, emit.mul(emit.op("Exp", [y]), emit.sum(g, axes, true))));
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
      const inverse = emit.op("Reciprocal", [emit.op("Sqrt", [emit.add(variance, node.float("epsilon", 1e-5))])]);
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

export const NORMALIZATIONS: readonly (readonly [string, Rule])[] = [
  ["Softmax", softmax],
  ["LogSoftmax", logSoftmax],
  ["LayerNormalization", normalization(true)],
  ["RMSNormalization", normalization(false)],
  // onnxruntime's own operators, which it accepts in the standard domain at any opset.
  ["SimplifiedLayerNormalization", normalization(false)],
];

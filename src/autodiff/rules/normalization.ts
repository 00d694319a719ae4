/**
 * Softmax and the normalisations. What a forward operator has computed on the way and does not give out is computed again.
 */
import type { Rule, Step } from "../step.ts";

const softmax: Rule = {
  backward(step) {
    const { emit, g } = step;
    const axes = [step.axis(-1, step.rank(step.y))];
    const y = guarded(step);
    const along = emit.sum(emit.mul(g, y), axes, true);
    step.give(0, emit.mul(y, emit.sub(g, along)));
  },
};

/**
 * Exporters of scaled dot-product attention put Where(IsNaN(y), 0, y) behind the softmax, for rows that see nothing. Their
 * gradient is 0 as well, and 0 · NaN would spoil all others.
 */
function guarded({ graph, y }: Step): string {
  for (const { node } of graph.consumers.get(y) ?? []) {
    if (node.opType !== "IsNaN") continue;
    const guard = graph.consumers
      .get(node.output[0]!)
      ?.find((use) => use.node.opType === "Where" && use.input === 0)?.node;
    if (guard?.input[2] === y) return guard.output[0]!;
  }
  return y;
}

const logSoftmax: Rule = {
  backward(step) {
    const { emit, g, y } = step;
    const axes = [step.axis(-1, step.rank(y))];
    step.give(0, emit.sub(g, emit.mul(emit.op("Exp", [y]), emit.sum(g, axes, true))));
  },
};

/** y = x̂ · scale + bias, x̂ = (x − mean) / √(variance + ε) over the last dimensions; `centred`: false has no mean. */
function normalization(centred: boolean): Rule {
  return {
    backward(step) {
      const { emit, g } = step;
      const [x, rank] = [step.x(0), step.rank(step.x(0))];
      const first = step.axis(-1, rank);
      const axes = Array.from({ length: rank - first }, (_, i) => first + i);
      const deviation = centred ? emit.sub(x, emit.mean(x, axes)) : x;
      const variance = emit.mean(emit.mul(deviation, deviation), axes);
      const inverse = emit.op("Reciprocal", [emit.op("Sqrt", [emit.add(variance, step.float("epsilon", 1e-5))])]);
      const normal = emit.mul(deviation, inverse);
      if (step.wants(0)) {
        const scaled = step.has(1) ? emit.mul(g, step.x(1)) : g;
        const along = emit.mul(normal, emit.mean(emit.mul(scaled, normal), axes));
        const across = centred ? emit.sub(scaled, emit.mean(scaled, axes)) : scaled;
        step.give(0, emit.mul(inverse, emit.sub(across, along)));
      }
      step.giveSummed(1, () => emit.mul(g, normal));
      step.giveSummed(2, () => g);
    },
  };
}

export const NORMALIZATIONS: readonly (readonly [string, Rule])[] = [
  ["Softmax", softmax],
  ["LogSoftmax", logSoftmax],
  ["LayerNormalization", normalization(true)],
  ["RMSNormalization", normalization(false)],
];

/**
 * Reverse-mode differentiation of a graph: from the gradient of one value, with one rule per operator, to those of the trained values.
 */
import { operatorOf } from "./definitions/index.ts";
import type { Emitter } from "./emit.ts";
import { NodeGradient, type Walk } from "./node-gradient.ts";
import type { ProbedPath } from "./path.ts";
import type { Problems } from "./problems.ts";
import { farUsed } from "./recompute.ts";
import { RULES } from "./rules/index.ts";

/**
 * Emits the nodes that compute gradients.
 * @param end the value whose gradient `seed` emits
 * @param problems receives what gradients do not pass
 * @returns the gradients by value
 */
export function differentiate(
  { graph, nodes, active, shapes }: ProbedPath,
  end: string,
  seed: () => string,
  emit: Emitter,
  problems: Problems,
): ReadonlyMap<string, string> {
  for (const node of nodes) {
    const half = node.output.filter((value) => active.has(value)).find((value) => shapes.type(value) !== "float32");
    if (half !== undefined)
      problems.node(node, `computes in ${shapes.type(half)}, which is not trained in (export in float32)`);
  }
  emit.dimensions = (value) => shapes.dimensions(value);
  const gradients = new Map([[end, seed()]]);
  const walk: Walk = {
    ...{ graph, active, shapes, emit, problems },
    gradient: (value) => gradients.get(value),
    add(value, gradient) {
      const other = gradients.get(value);
      gradients.set(value, other === undefined ? gradient : emit.add(other, gradient));
    },
  };
  const far = farUsed({ graph, active });
  for (const node of nodes.toReversed()) {
    const came = node.output.map((value) => gradients.has(value));
    if (!came.includes(true)) continue;
    const rule = RULES.get(operatorOf(node))!;
    if (!rule.manyOutputs && came.lastIndexOf(true) > 0) {
      problems.node(node, "is used by more than its first output, which gradients do not come back from");
    } else {
      const at = new NodeGradient(node, walk);
      // One moment per layer is enough: values made again within a layer are made about when they are needed anyway.
      if (emit.moment === undefined || node.output.some((value) => far.has(value))) emit.moment = at.moment();
      rule.backward(at);
    }
  }
  emit.moment = undefined;
  return gradients;
}

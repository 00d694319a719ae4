/**
 * Reverse-mode differentiation of a graph: from the gradient of one value, by one rule per operator, to those of the
 * trained values.
 */
import type { Graph } from "../onnx/model.ts";
import type { Emitter } from "./emit.ts";
import type { Path } from "./path.ts";
import type { Problems } from "./problems.ts";
import { RULES } from "./rules/index.ts";
import type { Shapes } from "./shapes.ts";
import { Step, type Walk } from "./step.ts";

/**
 * @param end the value whose gradient is `seed`
 * @returns the gradients by value; those of the trained ones among them
 */
export function walkBack(
  graph: Graph,
  { nodes, active }: Path,
  shapes: Shapes,
  emit: Emitter,
  end: string,
  seed: string,
  problems: Problems,
): ReadonlyMap<string, string> {
  const gradients = new Map([[end, seed]]);
  const walk: Walk = {
    ...{ graph, active, shapes, emit, problems },
    gradient: (value) => gradients.get(value),
    add(value, gradient) {
      const other = gradients.get(value);
      gradients.set(value, other === undefined ? gradient : emit.add(other, gradient));
    },
  };
  for (const node of nodes.toReversed()) {
    const came = node.output.map((value) => gradients.has(value));
    if (!came.includes(true)) continue;
    const rule = RULES.get(node.opType)!;
    if (!rule.manyOutputs && came.lastIndexOf(true) > 0) {
      problems.node(node, "is used by more than its first output, which gradients do not come back from");
    } else {
      rule.backward(new Step(node, walk));
    }
  }
  return gradients;
}

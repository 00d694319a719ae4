/**
 * Reverse-mode differentiation of a graph: from the gradient of one value, by one rule per operator, to those of the
 * trained values.
 */
import type { Feed } from "../onnx/feeds.ts";
import type { Added } from "../onnx/graft.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { Emitter } from "./emit.ts";
import { findPath } from "./path.ts";
import type { Problems } from "./problems.ts";
import { RULES } from "./rules/index.ts";
import { probeShapes, type Probe, type Shapes } from "./shapes.ts";
import { Step, type Walk } from "./step.ts";

/** What the graph is run with, to look at shapes. */
export interface Probing {
  readonly probe: Probe;
  /** Two, for every input; undefined when there are none, which `problems` says. */
  readonly feeds: readonly ReadonlyMap<string, Feed>[] | undefined;
  /** Tensors that the graph has beside its own. */
  readonly initializers: readonly Added[];
}

/**
 * Emits the nodes that compute gradients.
 * @param file its graph indexed as it is now
 * @param sources the values whose gradients are wanted
 * @param end the value whose gradient `seed` emits
 * @param problems found so far; thrown with what is found here
 * @returns the gradients by value, those of the sources among them
 * @throws FormatError with all problems
 */
export async function differentiate(
  file: ModelFile,
  sources: readonly string[],
  end: string,
  seed: () => string,
  emit: Emitter,
  problems: Problems,
  { probe, feeds, initializers }: Probing,
): Promise<ReadonlyMap<string, string>> {
  const { graph, name } = file.model;
  const { nodes, active } = findPath(graph, sources, end, problems);
  const shapes = feeds && (await look(file, nodes, feeds, probe, initializers, problems));
  if (!shapes) {
    problems.throwIfAny(name);
    throw new Error("neither shapes nor problems");
  }
  for (const node of nodes) {
    const half = node.output.filter((value) => active.has(value)).find((value) => shapes.type(value) !== "float32");
    if (half !== undefined) problems.node(node, `computes in ${shapes.type(half)}, which is not trained in (export in float32)`);
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
  problems.throwIfAny(name);
  return gradients;
}

/** Undefined where the model does not run, which is the least of its problems. */
async function look(
  file: ModelFile,
  nodes: readonly NodeProto[],
  feeds: readonly ReadonlyMap<string, Feed>[],
  probe: Probe,
  initializers: readonly Added[],
  problems: Problems,
): Promise<Shapes | undefined> {
  const values = nodes.flatMap(({ input, output }) => [...input, ...output]).filter((value) => value !== "");
  try {
    return await probeShapes(file, initializers, values, feeds, probe, problems);
  } catch (error) {
    if (problems.any) return undefined;
    throw error;
  }
}

/**
 * What there is to differentiate: the nodes between trained values and the loss, with the shapes of all that they take and make.
 */
import type { Feed } from "../onnx/feeds.ts";
import type { Graph } from "../onnx/model.ts";
import type { Added } from "../onnx/nodes.ts";
import type { ModelFile } from "../onnx/read.ts";
import { shadowOf } from "./definitions/index.ts";
import { asGelu } from "./gelu.ts";
import { lift } from "./lift.ts";
import { findPath, type Path } from "./path.ts";
import type { Problems } from "./problems.ts";
import { probeShapes, type ShapeProbe, type Shapes } from "./shapes.ts";

export interface ProbedPath extends Path {
  /** With definitions in the place of fused nodes. */
  readonly graph: Graph;
  /** Of all values of the nodes. */
  readonly shapes: Shapes;
}

/** What the graph is run with, to look at shapes. */
export interface Probing {
  readonly probe: ShapeProbe;
  /** Two, for every input; undefined when there are none, which `problems` says. */
  readonly feeds: readonly ReadonlyMap<string, Feed>[] | undefined;
  /** Tensors that the graph has beside its own. */
  readonly initializers: readonly Added[];
}

/**
 * Looks at the graph and takes positions early in it (lift.ts), in place.
 * @param file its graph indexed as it is now
 * @param sources the values whose gradients are wanted
 * @param end the value whose gradient will be known
 * @param problems found so far; gets what gradients do not pass
 * @throws FormatError with all problems, where there are too many to look at shapes
 */
export async function probePath(
  file: ModelFile,
  sources: readonly string[],
  end: string,
  problems: Problems,
  { probe, feeds, initializers }: Probing,
): Promise<ProbedPath> {
  const { model, refused, ranks } = shadowOf(file.model);
  const path = findPath(model.graph, sources, end, problems, refused);
  const values = path.nodes.flatMap(({ input, output }) => [...input, ...output]).filter((value) => value !== "");
  let shapes: Shapes | undefined;
  try {
    shapes = feeds && (await probeShapes({ ...file, model }, initializers, values, feeds, probe, problems));
  } catch (error) {
    // Where there are problems, a model that does not run is the least of them.
    if (!problems.any) throw error;
  }
  if (!shapes) {
    problems.throwIfAny(model.name);
    throw new Error("neither shapes nor problems");
  }
  for (const [value, rank] of ranks) {
    if (!shapes.has(value) || shapes.dims(value).length === rank) continue;
    problems.add(`a fused operator takes a value of another rank than ${rank}, which gradients do not pass`, value);
  }
  // Positions are taken in the model itself.
  const graph = problems.any || model !== file.model ? undefined : lift(model, shapes);
  const { nodes, active } = graph ? findPath(graph, sources, end, problems, refused) : path;
  const found = graph ?? model.graph;
  return { graph: found, shapes, active, nodes: asGelu(nodes, found, shapes) };
}

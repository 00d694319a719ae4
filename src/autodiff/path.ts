/**
 * The nodes and values that gradients flow through, between trained values and the loss, and the shapes of all that
 * they take and make.
 */

import type { Feed } from "../onnx/feeds.ts";
import { type Graph, indexGraph, intOf, intsOf, nestedGraphs, type OnnxModel, type Use } from "../onnx/model.ts";
import { Constants, makeNode, PREFIX, readBy } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { operatorOf, shadowOf } from "./definitions.ts";
import { RULES, STOPS } from "./rules.ts";
import { fromFront, type Problems, probeShapes, type ShapeProbe, type Shapes } from "./shapes.ts";

/** `TensorProto.DataType` of float, float16, double, bfloat16. */
const FLOATS: ReadonlySet<number> = new Set([1, 10, 11, 16]);

const QUANTISED = /^(Quantize|Dequantize|DynamicQuantize|QLinear|MatMulInteger|ConvInteger)/;

/**
 * Finds the path by the inputs through which each operator can be differentiated. Looks at operators and names, not at
 * shapes.
 * @param refused why fused nodes have no definition
 */
function findPath(
  graph: Graph,
  sources: readonly string[],
  end: string,
  problems: Problems,
  refused: ReadonlyMap<NodeProto, string>,
): Pick<ProbedPath, "nodes" | "active"> {
  const nodes = graph.proto.node;
  const reached = new Set(sources);
  for (const node of nodes) {
    if (flowing(node).some((value) => reached.has(value))) {
      for (const output of node.output) reached.add(output);
    }
  }
  const needed = new Set([end]);
  for (const node of nodes.toReversed()) {
    if (!node.output.some((value) => needed.has(value))) continue;
    for (const value of flowing(node)) needed.add(value);
  }
  const active = new Set([...reached].filter((value) => value !== "" && needed.has(value)));
  for (const source of sources)
    if (!active.has(source)) problems.add("what is trained does not reach the loss", source);

  const path = nodes.filter((node) => {
    const enters = flowing(node).some((value) => active.has(value));
    return enters && node.output.some((value) => active.has(value));
  });
  for (const node of path) {
    const why = refused.get(node) ?? obstacle(node);
    if (why) problems.node(node, why);
  }
  return { nodes: path.filter((node) => obstacle(node) === undefined), active };
}

/** Inputs that a gradient can flow to, and what graphs inside the node read. */
function flowing(node: NodeProto): readonly string[] {
  if (STOPS.has(operatorOf(node))) return [];
  if (node.opType === "Cast" && !FLOATS.has(intOf(node, "to", 1))) return [];
  const inputs = RULES.get(operatorOf(node))?.inputs;
  return inputs ? inputs.map((i) => node.input[i] ?? "") : readBy(node);
}

function obstacle(node: NodeProto): string | undefined {
  if (nestedGraphs(node).length > 0)
    return "is control flow, which gradients do not pass (export the model without it)";
  if (QUANTISED.test(node.opType)) return "is quantised, which gradients do not pass (pass a float export)";
  const operator = operatorOf(node);
  if (RULES.has(operator)) return undefined;
  if (operator !== node.opType) return `is an operator of ${node.domain}, fused already (pass the unoptimised export)`;
  return "has no rule for gradients";
}

export interface ProbedPath {
  /** Nodes in the order of the graph. */
  readonly nodes: readonly NodeProto[];
  /** Values that have a gradient. */
  readonly active: ReadonlySet<string>;
  /** The graph with definitions in place of fused nodes. */
  readonly graph: Graph;
  /** Shapes of all values of the nodes. */
  readonly shapes: Shapes;
}

/**
 * Finds path and shapes of the gradients from `end` to `sources`, and takes positions early in the graph, in place.
 * @param feeds two, with every input; undefined when there are none, which `problems` reports
 * @throws FormatError with all problems, where they prevent the runs that find shapes
 */
export async function probePath(
  file: ModelFile,
  sources: readonly string[],
  end: string,
  problems: Problems,
  probe: ShapeProbe,
  feeds: readonly ReadonlyMap<string, Feed>[] | undefined,
): Promise<ProbedPath> {
  const { model, refused, ranks } = shadowOf(file.model);
  const path = findPath(model.graph, sources, end, problems, refused);
  const values = path.nodes.flatMap(({ input, output }) => [...input, ...output]).filter((value) => value !== "");
  let shapes: Shapes | undefined;
  try {
    shapes = feeds && (await probeShapes({ ...file, model }, values, feeds, probe, problems));
  } catch (error) {
    // Known problems explain more than the error of a run.
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
  // Positions are taken in the model itself, so only where no definition stands in its place.
  const graph = problems.any || model !== file.model ? undefined : lift(model, shapes);
  if (!graph) return { ...path, graph: model.graph, shapes };
  return { ...findPath(graph, sources, end, problems, refused), graph, shapes };
}

// Takes the position that a classifier looks at ([CLS], say) as early as possible. The last layer computes all
// positions, but most of its operators need only that position of their input; keys and values are the exception. The
// numbers stay the same, for one position of each text. The forward run saves most of a layer, the backward run work on
// zeros.

const ELEMENTWISE =
  /^(Add|Sub|Mul|Div|Pow|Erf|Tanh|Sigmoid|Relu|Gelu|Sqrt|Reciprocal|Neg|Exp|Identity|Cast|Where|IsNaN)$/;

/** Operators over all elements along the dimensions from `axis` on, or along `axis`. */
const ALONG = /^(LogSoftmax|Softmax|(Simplified)?LayerNormalization|RMSNormalization)$/;

/** Operators that make shapes for a Reshape. */
const SHAPES = /^(Shape|Gather|Slice|Cast|Squeeze|Unsqueeze|Concat)$/;

/** Most Gathers of a position that are examined, each with all nodes in front of it. Classifiers have one. */
const MOST_GATHERS = 64;

/** Inputs of a node with positions, and their dimension of the positions. */
type Carried = ReadonlyMap<number, number>;

/** A node that computes one position only, and the dimension of the positions in its output. */
interface Lifted {
  readonly at: number;
  readonly carried: Carried;
}

/**
 * Takes positions as early as shapes allow, in place.
 * @returns the graph indexed anew; undefined where no product is saved
 */
function lift({ graph, name, opset }: OnnxModel, shapes: Shapes): Graph | undefined {
  const nodes = graph.proto.node.filter(({ input, output }) =>
    [...input, ...output].every((value) => value === "" || shapes.has(value)),
  );
  let lifted: Graph | undefined;
  let left = MOST_GATHERS;
  for (const gather of nodes.filter(({ opType }) => opType === "Gather")) {
    const [all, index] = gather.input as [string, string];
    if (shapes.constant(index)?.length !== 1 || shapes.dims(index).length > 1 || shapes.dims(all).length < 2) continue;
    if (--left < 0) break;
    const axis = fromFront(intOf(gather, "axis"), shapes.dims(all).length);
    const found = liftable(lifted ?? graph, gather, axis, nodes, shapes);
    if (![...found.keys()].some(({ opType }) => opType === "MatMul")) continue;
    takeEarly(lifted ?? graph, opset, gather, axis, found, shapes);
    lifted = indexGraph(graph.proto, name);
  }
  return lifted;
}

/**
 * Finds the nodes in front of a Gather of one position that need to compute no other.
 * @param nodes those with known shapes
 */
function liftable(
  { proto: main, consumers }: Graph,
  gather: NodeProto,
  axis: number,
  nodes: readonly NodeProto[],
  shapes: Shapes,
): ReadonlyMap<NodeProto, Lifted> {
  const outputs = new Set(main.output.map(({ name }) => name));
  const users = (value: string): readonly Use[] => consumers.get(value) ?? [];
  /** Dimensions along which only one position of a value is needed. */
  const wanted = new Map([[gather.input[0]!, new Set([axis])]]);
  const found = new Map<NodeProto, Lifted>();
  /** Tells whether a shape is used only by a Reshape that will get another one. */
  const vanishes = (shape: Use): boolean => {
    const seen = new Set<NodeProto>();
    const pending = [shape];
    for (const { node, input } of pending) {
      const dropped = found.has(node) && node.opType === "Reshape" && input === 1;
      if (dropped || seen.has(node)) continue;
      if (found.has(node) || !SHAPES.test(node.opType) || outputs.has(node.output[0]!)) return false;
      seen.add(node);
      for (const use of users(node.output[0]!)) pending.push(use);
    }
    return true;
  };
  // A value that another node needs whole stays, together with the nodes before it.
  const alone = (use: Use): boolean | undefined => {
    if (use.node === gather) return use.input === 0;
    return use.node.opType === "Shape" ? vanishes(use) : found.get(use.node)?.carried.has(use.input);
  };
  for (const node of nodes.toReversed()) {
    const [made, ...more] = node.output.filter((value) => value !== "");
    const [at, ...others] = wanted.get(made!) ?? [];
    if (at === undefined || others.length > 0 || more.length > 0 || outputs.has(made!)) continue;
    if (!users(made!).every(alone)) continue;
    const carried = carriedBy(node, at, shapes);
    if (!carried) continue;
    found.set(node, { at, carried });
    for (const [input, along] of carried) {
      const value = node.input[input]!;
      wanted.set(value, (wanted.get(value) ?? new Set()).add(along));
    }
  }
  return found;
}

/** Puts a Gather of the position in front of the found nodes, in place; the old Gather has nothing left to do. */
function takeEarly(
  { proto: main, producers }: Graph,
  opset: number,
  gather: NodeProto,
  axis: number,
  found: ReadonlyMap<NodeProto, Lifted>,
  shapes: Shapes,
): void {
  const prefix = `${PREFIX}/lift/${gather.output[0]}`;
  const index = gather.input[1]!;
  const places = shapes.constant(index)!;
  const constants = new Constants(main, opset, prefix);
  const place = constants.of(places);
  shapes.addInts(place, places);
  const taken = new Map<string, string>();
  for (const node of main.node.filter((one) => found.has(one))) {
    const { at, carried } = found.get(node)!;
    for (const [input, along] of carried) {
      const value = node.input[input]!;
      if (found.has(producers.get(value)!)) continue;
      const key = `${value} ${along}`;
      const name = taken.get(key) ?? `${prefix}/position_${taken.size}`;
      if (!taken.has(key)) {
        const take = makeNode("Gather", name, [value, place], name, { axis: along });
        main.node.splice(main.node.indexOf(node), 0, take);
        shapes.narrow(value, along, name);
      }
      taken.set(key, name);
      node.input[input] = name;
    }
    const [made] = node.output as [string];
    shapes.narrow(made, at, made);
    if (node.opType !== "Reshape") continue;
    node.input[1] = constants.of(shapes.dims(made).map((size) => size ?? -1));
  }
  // One position remains in the dimension that the node would take.
  const scalar = shapes.dims(index).length === 0;
  gather.opType = scalar ? "Squeeze" : "Identity";
  gather.attribute.length = 0;
  gather.input.splice(1, 1, ...(scalar ? [constants.of([axis])] : []));
}

/**
 * Inputs that need only one position too if the output needs one along `at`; undefined where all of an input may be
 * needed.
 */
function carriedBy(node: NodeProto, at: number, shapes: Shapes): Carried | undefined {
  const { opType, input, output } = node;
  const made = shapes.sizes(output[0]!);
  const rank = made.length;
  const first = shapes.sizes(input[0]!);
  if (ELEMENTWISE.test(opType)) {
    const carried = input.flatMap((value, i) => {
      const sizes = value === "" ? [] : shapes.sizes(value);
      const along = at - (rank - sizes.length);
      return along >= 0 && sizes[along]![0] !== 1 ? [[i, along] as const] : [];
    });
    return new Map(carried);
  }
  /** Reduces the first input only. */
  const one = (along: number | undefined): Carried | undefined =>
    along === undefined ? undefined : new Map([[0, along]]);
  if (ALONG.test(opType)) return one(at < fromFront(intOf(node, "axis", -1), rank) ? at : undefined);
  switch (opType) {
    case "MatMul":
      return one(at === rank - 2 && first.length >= 2 ? first.length - 2 : undefined);
    case "Transpose":
      return one(intsOf(node, "perm")?.[at]);
    case "ReduceMean": {
      const axes = intsOf(node, "axes") ?? shapes.constant(input[1] ?? "");
      const apart = axes !== undefined && axes.length > 0 && !axes.some((axis) => fromFront(axis, rank) === at);
      return one(apart && intOf(node, "keepdims", 1) === 1 ? at : undefined);
    }
    case "Reshape": {
      // The dimension with as many elements in front of it and as many positions, so that the rest moves as a whole.
      // One may be free.
      const before = (sizes: typeof made, axis: number): string =>
        String([0, 1].map((run) => sizes.slice(0, axis).reduce((product, size) => product * size[run]!, 1)));
      const along = first.findIndex(
        (size, axis) => String(size) === String(made[at]) && before(first, axis) === before(made, at),
      );
      const free = made.filter(([one, other], axis) => axis !== at && one !== other).length;
      return one(along >= 0 && free <= 1 ? along : undefined);
    }
    default:
      return undefined;
  }
}

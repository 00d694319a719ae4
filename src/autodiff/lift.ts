/**
 * A classifier looks at one position of its last layer ([CLS], say), yet the layer computes all of them. What an operator makes of
 * one position needs that position of its input alone, in most of a layer: not of keys and values. So the position is taken as
 * early as can be: the same numbers, for one position of each text. Forwards it saves most of a layer, backwards what would be
 * zeros.
 */
import { attribute, type Graph, indexGraph, type OnnxModel, type Use } from "../onnx/model.ts";
import { makeInts, makeNode, PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { Shapes } from "./shapes.ts";

/** Of each element by itself, with broadcasting. */
const ELEMENTWISE: ReadonlySet<string> = new Set([
  ...[
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Erf",
    "Tanh",
    "Sigmoid",
    "Relu",
    "Gelu",
    "Sqrt",
    "Reciprocal",
    "Neg",
    "Exp",
    "Identity",
    "Cast",
  ],
  ...["Where", "IsNaN"],
]);

/** Of all elements along the dimensions from `axis` on, or along `axis`. */
const ALONG: ReadonlySet<string> = new Set([
  "Softmax",
  "LogSoftmax",
  "LayerNormalization",
  "RMSNormalization",
  "SimplifiedLayerNormalization",
]);

/** What shapes for a Reshape are made with. */
const SHAPES: ReadonlySet<string> = new Set(["Shape", "Gather", "Slice", "Cast", "Squeeze", "Unsqueeze", "Concat"]);

/** For inputs that have the positions, along which dimension. */
type Carried = ReadonlyMap<number, number>;

/**
 * Takes positions as early as shapes allow, in place.
 * @param shapes of what gradients flow through; gets those of what has changed
 * @returns the graph indexed anew; undefined where no product is spared
 */
export function lift({ graph, name }: OnnxModel, shapes: Shapes): Graph | undefined {
  const nodes = graph.proto.node.filter(({ input, output }) =>
    [...input, ...output].every((value) => value === "" || shapes.has(value)),
  );
  let lifted: Graph | undefined;
  for (const gather of nodes.filter(({ opType }) => opType === "Gather")) {
    if (liftOne(lifted ?? graph, gather, nodes, shapes)) lifted = indexGraph(graph.proto, name);
  }
  return lifted;
}

/** @param nodes those whose shapes are known, in order */
function liftOne(
  { proto: main, consumers, producers }: Graph,
  gather: NodeProto,
  nodes: readonly NodeProto[],
  shapes: Shapes,
): boolean {
  const [all, index] = gather.input as [string, string];
  const places = shapes.constant(index);
  const scalar = shapes.dims(index).length === 0;
  if (places?.length !== 1 || shapes.dims(index).length > 1) return false;
  const rank = shapes.dims(all).length;
  const given = Number(attribute(gather, "axis")?.i ?? 0n);
  const axis = given < 0 ? given + rank : given;

  const outputs = new Set(main.output.map(({ name }) => name));
  /** The dimension along which a value is wanted at one position. */
  const wanted = new Map<string, Set<number>>([[all, new Set([axis])]]);
  const kept = new Map<NodeProto, Carried>();
  /** Whether a shape ends at a Reshape that will get another one. */
  const vanishes = ({ node, input }: Use): boolean => {
    if (kept.has(node)) return node.opType === "Reshape" && input === 1;
    return (
      SHAPES.has(node.opType) && !outputs.has(node.output[0]!) && (consumers.get(node.output[0]!) ?? []).every(vanishes)
    );
  };
  for (const node of nodes.toReversed()) {
    const [made, ...more] = node.output.filter((value) => value !== "");
    const [at, ...others] = wanted.get(made!) ?? [];
    if (at === undefined || others.length > 0 || more.length > 0 || outputs.has(made!)) continue;
    // What something else needs whole stays, and so does what is before it.
    const alone = (use: Use): boolean | undefined => {
      if (use.node === gather) return use.input === 0;
      return use.node.opType === "Shape" ? vanishes(use) : kept.get(use.node)?.has(use.input);
    };
    if (!(consumers.get(made!) ?? []).every(alone)) continue;
    const carried = carriedBy(node, at, shapes);
    if (!carried) continue;
    kept.set(node, carried);
    for (const [input, along] of carried) {
      const value = node.input[input]!;
      wanted.set(value, (wanted.get(value) ?? new Set()).add(along));
    }
  }
  if (![...kept.keys()].some(({ opType }) => opType === "MatMul")) return false;

  const prefix = `${PREFIX}/lift/${gather.output[0]}`;
  const taken = new Map<string, string>();
  main.initializer.push(makeInts(`${prefix}/index`, places));
  shapes.addInts(`${prefix}/index`, places);
  for (const node of nodes.filter((one) => kept.has(one))) {
    for (const [input, along] of kept.get(node)!) {
      const value = node.input[input]!;
      if (kept.has(producers.get(value)!)) continue;
      const key = `${value} ${along}`;
      if (!taken.has(key)) {
        const name = `${prefix}/position_${taken.size}`;
        taken.set(key, name);
        main.node.splice(
          main.node.indexOf(node),
          0,
          makeNode("Gather", name, [value, `${prefix}/index`], name, { axis: along }),
        );
        shapes.narrow(value, along, name);
      }
      node.input[input] = taken.get(key)!;
    }
    const [made] = node.output as [string];
    shapes.narrow(made, [...wanted.get(made)!][0]!, made);
    if (node.opType !== "Reshape") continue;
    main.initializer.push(
      makeInts(
        `${prefix}/shape/${made}`,
        shapes.dims(made).map((size) => size ?? -1),
      ),
    );
    node.input[1] = `${prefix}/shape/${made}`;
  }
  // One position is left, which the node would take.
  gather.opType = scalar ? "Squeeze" : "Identity";
  gather.attribute.length = 0;
  main.initializer.push(makeInts(`${prefix}/axis`, [axis]));
  gather.input.splice(1, 1, ...(scalar ? [`${prefix}/axis`] : []));
  return true;
}

/** Which inputs the one position `at` of a node's output needs at one position too; undefined where it may need all of an input. */
function carriedBy(node: NodeProto, at: number, shapes: Shapes): Carried | undefined {
  const { opType, input, output } = node;
  const made = shapes.sizes(output[0]!);
  const rank = made.length;
  const ints = (name: string): readonly number[] | undefined => attribute(node, name)?.ints.map(Number);
  const int = (name: string, otherwise: number): number => Number(attribute(node, name)?.i ?? otherwise);
  const first = shapes.sizes(input[0]!);
  if (ELEMENTWISE.has(opType)) {
    const carried = input.flatMap((value, i) => {
      const sizes = value === "" ? [] : shapes.sizes(value);
      const along = at - (rank - sizes.length);
      return along >= 0 && sizes[along]![0] !== 1 ? [[i, along] as const] : [];
    });
    return new Map(carried);
  }
  if (ALONG.has(opType)) {
    const axis = int("axis", -1);
    return at < (axis < 0 ? axis + rank : axis) ? new Map([[0, at]]) : undefined;
  }
  switch (opType) {
    case "MatMul":
      return at === rank - 2 && first.length >= 2 ? new Map([[0, first.length - 2]]) : undefined;
    case "Transpose": {
      const perm = ints("perm");
      return perm && new Map([[0, perm[at]!]]);
    }
    case "ReduceMean": {
      const axes = ints("axes") ?? shapes.constant(input[1] ?? "");
      const apart = axes !== undefined && axes.length > 0 && !axes.some((axis) => axis === at || axis + rank === at);
      return apart && int("keepdims", 1) === 1 ? new Map([[0, at]]) : undefined;
    }
    case "Reshape": {
      // The dimension with as much in front of it and as many places, so that all else is moved by itself. One may be free.
      const before = (sizes: typeof made, axis: number): string =>
        String([0, 1].map((run) => sizes.slice(0, axis).reduce((product, size) => product * size[run]!, 1)));
      const along = first.findIndex(
        (size, axis) => String(size) === String(made[at]) && before(first, axis) === before(made, at),
      );
      const free = made.filter(([one, other], axis) => axis !== at && one !== other).length;
      return along >= 0 && free <= 1 ? new Map([[0, along]]) : undefined;
    }
    default:
      return undefined;
  }
}

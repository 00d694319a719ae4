/**
 * A classifier looks at one position of its last layer ([CLS], say), yet the layer computes all of them. Behind attention every
 * operator works on each position by itself, so the position can be taken before them instead: the same numbers, for one
 * position of each text. Forwards it saves most of a layer, backwards what would be zeros.
 */
import { attribute, indexGraph, type Graph, type OnnxModel } from "../onnx/model.ts";
import { makeInts, makeNode, PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { Shapes } from "./shapes.ts";

/** Of each element by itself, with broadcasting. */
const ELEMENTWISE: ReadonlySet<string> = new Set([
  ...["Add", "Sub", "Mul", "Div", "Pow", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "Sqrt", "Reciprocal", "Neg", "Exp", "Identity", "Cast"],
]);

/** Of each row of the last dimension by itself. */
const ROWWISE: ReadonlySet<string> = new Set(["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean"]);

const SEQUENCE = 1;

/** One position taken of all, and the nodes before it that could work on that position alone. */
export interface Lift {
  readonly gather: NodeProto;
  readonly nodes: ReadonlySet<NodeProto>;
}

/** What could be lifted, as far as operators and names tell. Nothing where no product would be spared. */
export function findLifts({ proto, initializers, producers, consumers }: Graph): Lift[] {
  const outputs = new Set(proto.output.map(({ name }) => name));
  const isOne = (value: string): boolean => {
    const dims = initializers.get(value)?.dims ?? attribute(producers.get(value) ?? makeNode("", "", [], ""), "value")?.t?.dims;
    return dims !== undefined && dims.every((size) => size === 1n);
  };
  const gathers = proto.node.filter((node) => node.opType === "Gather" && Number(attribute(node, "axis")?.i ?? 0n) === SEQUENCE && isOne(node.input[1]!));
  return gathers.flatMap((gather) => {
    const nodes = new Set<NodeProto>();
    for (const node of proto.node.toReversed()) {
      const [made, ...more] = node.output.filter((value) => value !== "");
      const uses = made === undefined || more.length > 0 || outputs.has(made) ? [] : (consumers.get(made) ?? []);
      const spared = uses.length > 0 && uses.every((use) => (use.node === gather ? use.input === 0 : nodes.has(use.node) && (use.node.opType !== "MatMul" || use.input === 0)));
      if (spared && isOfRows(node)) nodes.add(node);
    }
    return [...nodes].some(({ opType }) => opType === "MatMul") ? [{ gather, nodes }] : [];
  });
}

/** Whether an operator works on positions one by one, if shapes are as usual. */
function isOfRows(node: NodeProto): boolean {
  if (ELEMENTWISE.has(node.opType) || node.opType === "MatMul") return true;
  if (!ROWWISE.has(node.opType)) return false;
  if (node.opType !== "ReduceMean") return Number(attribute(node, "axis")?.i ?? -1n) === -1;
  // Axes have become an input in opset 18, which is not looked into.
  const axes = attribute(node, "axes")?.ints;
  return axes?.length === 1 && axes[0] === -1n && Number(attribute(node, "keepdims")?.i ?? 1n) === 1;
}

/** The values whose shapes say whether a lift is right. */
export function valuesOf({ gather, nodes }: Lift): string[] {
  return [...new Set([gather.input[0]!, ...[...nodes].flatMap(({ input, output }) => [...input, output[0]!])])].filter((value) => value !== "");
}

/**
 * Takes the position as early as shapes allow, in place.
 * @returns the graph indexed anew
 */
export function lift({ graph, name }: OnnxModel, lifts: readonly Lift[], shapes: Shapes): Graph {
  const main = graph.proto;
  for (const [i, { gather, nodes }] of lifts.entries()) {
    const [batch, sequence] = shapes.sizes(gather.input[0]!).map((sizes) => String(sizes));
    /** Values [batch, sequence, …]. */
    const hasRows = (value: string): boolean => {
      const sizes = shapes.sizes(value);
      return sizes.length === 3 && String(sizes[0]) === batch && String(sizes[SEQUENCE]) === sequence;
    };
    const kept = new Set<NodeProto>();
    // Backwards: a node whose result something else needs whole stays, and so does what is before it.
    for (const node of main.node.toReversed()) {
      if (!nodes.has(node) || !hasRows(node.output[0]!)) continue;
      if (!(graph.consumers.get(node.output[0]!) ?? []).every((use) => use.node === gather || kept.has(use.node))) continue;
      const others = node.input.filter((value, at) => value !== "" && !(hasRows(value) && (node.opType !== "MatMul" || at === 0)));
      const fits = node.opType === "MatMul" ? hasRows(node.input[0]!) : others.every((value) => shapes.sizes(value).length <= 1);
      if (fits) kept.add(node);
    }
    if (![...kept].some(({ opType }) => opType === "MatMul")) continue;
    const prefix = `${PREFIX}/lift/${i}`;
    const taken = new Map<string, string>();
    for (const node of main.node.filter((one) => kept.has(one))) {
      for (const [at, value] of node.input.entries()) {
        if (value === "" || !hasRows(value) || kept.has(graph.producers.get(value)!) || (node.opType === "MatMul" && at > 0)) continue;
        if (!taken.has(value)) {
          const name = `${prefix}/position_${taken.size}`;
          taken.set(value, name);
          const place = makeNode("Reshape", `${prefix}/index`, [gather.input[1]!, `${prefix}/one`], `${prefix}/index`);
          const all = [...(taken.size === 1 ? [place] : []), makeNode("Gather", name, [value, `${prefix}/index`], name, { axis: SEQUENCE })];
          main.node.splice(main.node.indexOf(node), 0, ...all);
        }
        node.input[at] = taken.get(value)!;
      }
    }
    main.initializer.push(makeInts(`${prefix}/one`, [1]), makeInts(`${prefix}/first`, [0], []));
    gather.input[1] = `${prefix}/first`;
  }
  return indexGraph(main, name);
}

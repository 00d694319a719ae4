/**
 * Restricts the last product of a model that answers at every position to some of them. Only positions of an answer meet a target, not
 * those of its prompt, and the last product, with a vocabulary of tens of thousands, is by far the widest.
 */
import { FLOAT, INT64 } from "../onnx/linear.ts";
import type { Graph } from "../onnx/model.ts";
import { makeInts, makeNode, makeValue, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/onnx_pb.ts";
import { create, GraphProtoSchema } from "../onnx/protobuf.ts";

/** int64 [N]: positions among all rows of all texts, batch · length. Empty: every position is answered. */
export const POSITIONS: string = `${PREFIX}.positions`;

const PICKED = `${PREFIX}/positions`;

/** Operators on each element by itself that may follow the product of the logits. */
const BEHIND = /^(Add|Sub|Mul|Div|Tanh|Identity|Cast)$/;

const PRODUCTS = /^(MatMul|Gemm|FusedMatMul|MatMulNBits)$/;

/**
 * Restricts the product that gives the logits to rows at the positions, in place. At first it does so always, so that the graph can be
 * differentiated.
 * @param graph indexed in its current state
 * @returns `choose`, which makes it a choice: all rows where no positions are given. Undefined where no product gives the logits
 */
export function pickPositions(graph: Graph, logits: string): { readonly choose: () => void } | undefined {
  const main = graph.proto;
  const x = rowsBefore(graph, logits);
  if (x === undefined) return undefined;
  const before = ancestors(graph, logits);
  const uses = (graph.consumers.get(x) ?? []).filter(({ node }) => before.has(node));
  const [flat, some, picked] = [`${PICKED}/flat`, `${PICKED}/some`, `${PICKED}/picked`];
  const nodes = [
    makeNode("Flatten", flat, [x], flat, { axis: -1 }),
    makeNode("Gather", some, [flat, POSITIONS], some, { axis: 0 }),
    makeNode("Unsqueeze", picked, [some, `${PICKED}/front`], picked),
  ];
  main.initializer.push(makeInts(`${PICKED}/front`, [0]));
  main.input.push(makeValue(POSITIONS, INT64, [`${PICKED}/count`]));
  const at = Math.min(...uses.map(({ node }) => main.node.indexOf(node)));
  main.node.splice(at, 0, ...nodes);
  const read = (value: string): void => {
    for (const { node, input } of uses) node.input[input] = value;
  };
  read(picked);
  const choose = (): void => {
    const rows = `${PICKED}/rows`;
    main.initializer.push(makeInts(`${PICKED}/none`, [0], []));
    const choice = [
      makeNode("Size", `${PICKED}/size`, [POSITIONS], `${PICKED}/size`),
      makeNode("Greater", `${PICKED}/any`, [`${PICKED}/size`, `${PICKED}/none`], `${PICKED}/any`),
      makeNode("If", rows, [`${PICKED}/any`], rows, {
        then_branch: only(picked, "some"),
        else_branch: only(x, "all"),
      }),
    ];
    main.node.splice(main.node.indexOf(nodes.at(-1)!) + 1, 0, ...choice);
    read(rows);
  };
  return { choose };
}

function only(value: string, name: string): GraphProto {
  const output = `${PICKED}/${name}/rows`;
  return create(GraphProtoSchema, {
    name: `${PICKED}/${name}`,
    node: [makeNode("Identity", output, [value], output)],
    output: [makeValue(output, FLOAT)],
  });
}

/** Input of the product that gives the logits; undefined where there is no such product, or several with different rows. */
function rowsBefore({ producers }: Graph, logits: string): string | undefined {
  const found = new Set<string>();
  const pending = [logits];
  for (const value of pending) {
    const node = producers.get(value);
    if (!node) continue;
    if (PRODUCTS.test(node.opType)) found.add(beforeOwn(producers, node.input[0]!));
    else if (BEHIND.test(node.opType)) pending.push(...node.input);
    else if (node.opType === "Reshape" && isOwn(node)) pending.push(node.input[0]!);
  }
  return found.size === 1 ? [...found][0] : undefined;
}

/** The rows from which terms and heads of tasks have made a value. */
function beforeOwn(producers: Graph["producers"], value: string): string {
  const node = producers.get(value);
  return node && isOwn(node) && /^(MatMul|Reshape|Flatten)$/.test(node.opType)
    ? beforeOwn(producers, node.input[0]!)
    : value;
}

function isOwn({ name }: NodeProto): boolean {
  return name.startsWith(`${PREFIX}/`);
}

/** All nodes that a value depends on. */
function ancestors({ producers }: Graph, value: string): ReadonlySet<NodeProto> {
  const found = new Set<NodeProto>();
  const pending = [value];
  for (const one of pending) {
    const node = producers.get(one);
    if (!node || found.has(node)) continue;
    found.add(node);
    pending.push(...node.input);
  }
  return found;
}

/**
 * Chooses which values of the forward run the backward nodes find kept, and makes the others again. Kept values are memory that an
 * answering run does not need, so few are kept; but no product with a weight is computed twice. What is made again waits for the gradient
 * that needs it: runtimes order nodes by their inputs alone, and would recompute all layers first.
 */

import type { Graph } from "../onnx/model.ts";
import { makeNode, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/protobuf.ts";
import type { Emitter, Moment } from "./emit.ts";
import type { ProbedPath } from "./path.ts";

/** First letters of the names of values that are made again. */
export const AGAIN: string = `${PREFIX}/again/`;

/**
 * Adds the nodes that make values again.
 * @param path forward nodes
 * @param main the model's graph; receives shapes of its values, and constants of definitions
 * @param emit has written the backward nodes; their inputs are changed
 * @returns the backward nodes, each behind the nodes that make its values again
 */
export function recompute(path: ProbedPath, main: GraphProto, emit: Emitter): NodeProto[] {
  const { graph, active, shapes } = path;
  const backward = [...emit.nodes];
  const constants = new Set(main.initializer.map(({ name }) => name));
  /** Values of the model itself, rather than of definitions. */
  const real = new Set([
    ...main.node.flatMap(({ output }) => output),
    ...main.input.map(({ name }) => name),
    ...constants,
  ]);
  const makers = new Map(graph.producers);
  for (const node of emit.shapes) {
    const [shape] = node.output as [string];
    if (real.has(node.input[0]!)) {
      main.node.push(node);
      real.add(shape);
    } else makers.set(shape, node);
  }
  const kept = valuesToKeep(path);
  const isCaptured = (value: string): boolean =>
    !makers.has(value) || (real.has(value) && (!active.has(value) || kept.has(value)));
  /** Names in the branch, by value. */
  const made = new Map<string, string>();
  const waiting = emit.beside(`${PREFIX}/late`);
  const nodes: NodeProto[] = [];

  /** Re-emits an existing value so that it becomes available only after `moment`. Reshape reuses its buffer. */
  const late = (value: string, moment: Moment | undefined): string => {
    const constant = graph.initializers.get(value);
    if (constant && !constants.has(value)) {
      main.initializer.push(constant);
      constants.add(value);
    }
    const rank = moment && active.has(value) && makers.has(value) ? shapes.dims(value).length : 0;
    if (rank === 0) return value;
    const written = waiting.nodes.length;
    const zeros = waiting.late(Array<number>(rank).fill(0), moment!.value, moment!.axis);
    const again = waiting.op("Reshape", [value, zeros]);
    nodes.push(...waiting.nodes.slice(written));
    return again;
  };
  const make = (node: NodeProto, moment: Moment | undefined): void => {
    const inputs = node.input.map((value) => (value === "" ? "" : (made.get(value) ?? late(value, moment))));
    for (const value of node.output) if (value !== "") made.set(value, AGAIN + value);
    const outputs = node.output.map((value) => made.get(value) ?? "");
    const copy = makeNode(node.opType, AGAIN + node.output[0]!, inputs, outputs, {}, node.domain);
    copy.attribute = node.attribute;
    nodes.push(copy);
  };
  /** Name under which a value is available in the branch, not before `moment`. */
  const available = (wanted: string, moment: Moment | undefined): string => {
    // A loop rather than recursion: models are thousands of nodes deep.
    const pending = [wanted];
    while (pending.length > 0) {
      const value = pending.at(-1)!;
      const node = isCaptured(value) || made.has(value) ? undefined : makers.get(value);
      const missing = node?.input.filter((input) => input !== "" && !isCaptured(input) && !made.has(input)) ?? [];
      if (missing.length > 0) {
        pending.push(...missing);
        continue;
      }
      if (node) make(node, moment);
      pending.pop();
    }
    return made.get(wanted) ?? late(wanted, moment);
  };

  const own = new Set(backward.flatMap(({ output }) => output));
  for (const node of backward) {
    const moment = emit.moments.get(node);
    node.input = node.input.map((value) => (own.has(value) || value === "" ? value : available(value, moment)));
    nodes.push(node);
  }
  return nodes;
}

/** Product operators; with a weight or a factor they are expensive. */
const PRODUCT = /^(MatMul|Gemm|MatMulNBits|Conv|MatMulInteger.*)$/;

/** Products between a value and its use that make the use far: farther than within one layer. */
const FAR = 2;

/**
 * Values to keep: products with weights, sums in the place of their terms, and what is used far behind. All others can be made from them
 * and from what depends on nothing trained. The cheapest set of values, a minimum cut, takes the same memory and the same time.
 */
function valuesToKeep(path: ProbedPath): ReadonlySet<string> {
  const kept = new Set(farUsed(path));
  for (const node of path.graph.proto.node) {
    const isSum = node.opType === "Add" && node.input.some((value) => kept.has(value));
    if (isSum || isDear(node, path.graph)) for (const value of node.output) kept.add(value);
  }
  return kept;
}

/** Tells whether one factor of a product is a weight or a factor of a task. */
function isDear({ opType, input }: NodeProto, { producers }: Graph): boolean {
  if (!PRODUCT.test(opType)) return false;
  return input.slice(0, 2).some((value) => {
    let name: string | undefined = value;
    // An f16 embedding that is the last layer too passes two of these. Damaged files may contain circles.
    for (let depth = 0; depth < 4 && name !== undefined; depth++) {
      const maker = producers.get(name);
      if (!maker) return true;
      name = /^(Transpose|Cast|Squeeze|Reshape|Constant|Identity)$/.test(maker.opType)
        ? (maker.input[0] ?? "")
        : undefined;
    }
    return false;
  });
}

/**
 * Values that bypass a layer, such as residuals. Each could be made from the one before and the layer's result, but then the last one
 * would need all of them at once.
 */
export function farUsed({ graph, active }: Pick<ProbedPath, "graph" | "active">): ReadonlySet<string> {
  const depths = new Map<string, number>();
  const found = new Set<string>();
  for (const node of graph.proto.node) {
    const before = node.input.filter((value) => active.has(value));
    if (before.length === 0) continue;
    const depth = Math.max(...before.map((value) => depths.get(value) ?? 0)) + Number(isDear(node, graph));
    for (const value of node.output) depths.set(value, depth);
    for (const value of before) if (depth >= (depths.get(value) ?? 0) + FAR) found.add(value);
  }
  return found;
}

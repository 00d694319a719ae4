/**
 * Which values of the forward run the backward nodes find kept, and which they make again. Memory is what an answering run does not
 * need; so little is kept, as long as no product with a weight has to be done twice.
 */
import type { Graph } from "../onnx/model.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import { minCut, type Place } from "./min-cut.ts";
import type { Shapes } from "./shapes.ts";

/** Products; of a weight or a factor they are dear. */
const PRODUCT = /^(MatMul|Gemm|MatMulNBits|Conv|MatMulInteger.*)$/;

/** Size of a free dimension, to compare values by. */
const FREE = 64;

/** So many products further on a value counts as far away: what is behind a layer is. */
const FAR = 2;

export interface Forward {
  readonly graph: Graph;
  /** Values that depend on what is trained. */
  readonly active: ReadonlySet<string>;
  readonly shapes: Shapes;
  /** Whether a value is one of the model's, rather than of a definition. */
  readonly isReal: (value: string) => boolean;
}

/** What is decided. */
export interface Kept {
  /** Whether a value of the model is kept where somebody reads it. */
  stays(value: string): boolean;
}

/**
 * @param needed values that the backward nodes read, of those that depend on what is trained
 * @returns which to keep. Everything else can be made of them and of what depends on nothing that is trained.
 */
export function valuesToKeep(forward: Forward, needed: ReadonlySet<string>): Kept {
  const { graph, active, shapes, isReal } = forward;
  const far = farUsed(forward);
  const mustStay = (value: string): boolean => {
    const node = graph.producers.get(value);
    return node !== undefined && isReal(value) && (isDear(node, graph) || far.has(value));
  };
  const places = new Map<string, Place<string>>();
  const pending = [...needed];
  for (const value of pending) {
    const node = graph.producers.get(value);
    if (!node || !active.has(value) || places.has(value)) continue;
    const real = isReal(value);
    const source = mustStay(value);
    const size = shapes.dims(value).reduce<number>((product, dim) => product * (dim ?? FREE), 1);
    const before = source ? [] : [...new Set(node.input)];
    places.set(value, { cost: real ? size : Infinity, source, sink: needed.has(value), before });
    for (const one of before) pending.push(one);
  }
  const kept = minCut(places);
  return { stays: (value) => kept.has(value) || mustStay(value) };
}

/** Whether one side of a product is a weight or a factor. */
function isDear({ opType, input }: NodeProto, { producers }: Graph): boolean {
  if (!PRODUCT.test(opType)) return false;
  return input.slice(0, 2).some((value) => {
    let name: string | undefined = value;
    // An embedding in f16 that is the last layer too goes through two of them. Damaged files may go in circles.
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
 * Values that go around a layer. Each could be made of the one before and what the layer adds; but then all of them would be made for
 * the last one, and be there at once.
 */
export function farUsed({ graph, active }: Pick<Forward, "graph" | "active">): ReadonlySet<string> {
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

/**
 * Removes Transposes of weights in front of products, as with an embedding that is the last layer too. Runtimes transpose constant
 * weights at load time and hold both copies. The backward pass uses the weight as it is; after this the product does too.
 */
import { FLOAT } from "../onnx/linear.ts";
import { attribute, type Graph } from "../onnx/model.ts";
import { PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import { Emitter } from "./emit.ts";

/**
 * Removes Transposes of weights that only products read, in place.
 * @param graph indexed in its current state
 */
export function takeUntransposed(graph: Graph, opset: number): void {
  const { proto: main, consumers, outputs } = graph;
  const emit = new Emitter(main, opset, `${PREFIX}/untransposed`);
  const gone = new Set<NodeProto>();
  /** Nodes to put in front of a product. */
  const before = new Map<NodeProto, readonly NodeProto[]>();
  for (const node of main.node) {
    const turned = node.output[0] ?? "";
    const weight = transposedWeight(graph, node);
    const uses = consumers.get(turned) ?? [];
    if (weight === undefined || outputs.has(turned)) continue;
    if (!uses.every((use) => use.node.opType === "MatMul" && use.input === 1 && use.graph === main)) continue;
    gone.add(node);
    for (const { node: product } of uses) {
      const written = emit.nodes.length;
      const [x] = product.input as [string];
      const rows = emit.op("Gemm", [emit.rows(x), weight.name], { transB: 1 });
      const shape = emit.concat([emit.slice(emit.op("Shape", [x]), 0, 0, -1), emit.ints([weight.rows])], 0);
      before.set(product, emit.nodes.slice(written));
      product.opType = "Reshape";
      product.input = [rows, shape];
    }
  }
  main.node = main.node.flatMap((node) => (gone.has(node) ? [] : [...(before.get(node) ?? []), node]));
}

/** The f32 weight [rows, columns] that a Transpose takes, also behind a Cast; undefined for other nodes. */
function transposedWeight(
  { initializers, producers }: Graph,
  node: NodeProto,
): { readonly name: string; readonly rows: number } | undefined {
  if (node.opType !== "Transpose" || attribute(node, "perm")?.ints.join() === "0,1") return undefined;
  const [name] = node.input as [string];
  const cast = producers.get(name);
  const tensor = initializers.get(cast?.opType === "Cast" ? cast.input[0]! : name);
  const type = cast ? Number(attribute(cast, "to")?.i ?? 0n) : tensor?.dataType;
  return tensor?.dims.length === 2 && type === FLOAT ? { name, rows: Number(tensor.dims[0]) } : undefined;
}

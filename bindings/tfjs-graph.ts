/**
 * The weights of a GraphModel: constants of a graph that has forgotten its layers, but not the names and operators that come of them.
 */
import { type Called, calledByAdapters } from "./framework-host.ts";

/** A node of a GraphModel's graph. */
interface Node {
  readonly name: string;
  readonly op: string;
  readonly inputNames: readonly string[];
  readonly children: readonly Node[];
  readonly attrParams: { readonly transposeB?: { readonly value: unknown } };
}

/** What executes a GraphModel, with its tensors by the names of nodes. */
export interface Executor<Tensor> {
  weightMap: Record<string, Tensor[]>;
  readonly graph: { readonly nodes: Readonly<Record<string, Node | undefined>> };
}

/** A constant of a graph. */
export function graphEntry<Tensor extends { dispose(): void }>(
  executor: Executor<Tensor>,
  name: string,
): { tensor(): Tensor; put(value: Tensor | null): void } {
  const list = executor.weightMap[name]!;
  return {
    tensor: () => list[0]!,
    put(value) {
      list[0]!.dispose();
      list[0] = value!;
      // It frees tensors after a run, except those that it has seen here.
      executor.weightMap = { ...executor.weightMap };
    },
  };
}

/** Operators that read a weight, with what they make of it, and what follows the layer's name in their own names. */
const MATMUL = /^(_Fused)?MatMul$/;
const CONV = /^(_Fused)?Conv[123]D$/;
const GATHER = /^(Resource)?Gather/;
const OPERATOR =
  /(?:\/(?:MatMul|Tensordot|Conv\dD|ExpandDims|BiasAdd|(?:Resource)?Gather|embedding_lookup|ReadVariableOp)(?:_\w+)?)+$/;

/** A converted graph keeps the names of operators. What reads a weight says what it is. */
export function calledInGraph(path: string, node: Node | undefined): Called {
  let [at, reader] = [node, node?.children[0]];
  while (reader?.op === "Identity") [at, reader] = [reader, reader.children[0]];
  const input = reader?.inputNames.indexOf(at!.name);
  const { op = "", attrParams } = reader ?? {};
  const product = MATMUL.test(op) || CONV.test(op);
  const turned = attrParams?.transposeB?.value === true;
  const layer = path.replace(OPERATOR, "");
  if (product && input === 1) return { ...calledByAdapters(`${layer}/kernel`), ...(turned && { layout: "out-in" }) };
  if ((product && input === 2) || (op === "BiasAdd" && input === 1)) return calledByAdapters(`${layer}/bias`);
  if (GATHER.test(op) && input === 0) return calledByAdapters(`${layer}/embeddings`);
  return calledByAdapters(path);
}

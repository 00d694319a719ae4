/**
 * One fused node on its way to a definition: what the definition can ask about it, and where it puts the nodes it writes.
 */
import { attribute, type Graph } from "../../onnx/model.ts";
import type { NodeProto } from "../../onnx/onnx_pb.ts";
import type { Emitter } from "../emit.ts";

/**
 * Writes nodes that compute the same as a fused one, from the same inputs.
 * @returns why this node cannot be written so, as the end of a message that begins with the operator's name
 */
export type Define = (node: Fused) => string | undefined;

/** Most nodes that are followed to find a rank. */
const FARTHEST = 64;

export class Fused {
  readonly proto: NodeProto;
  readonly emit: Emitter;
  /** Ranks that were assumed, by value; a run checks them. */
  readonly ranks: Map<string, number> = new Map();
  readonly #graph: Graph;
  readonly #given: [name: string, value: string][] = [];

  constructor(proto: NodeProto, graph: Graph, emit: Emitter) {
    this.proto = proto;
    this.emit = emit;
    this.#graph = graph;
  }

  x(input: number): string {
    return this.proto.input[input]!;
  }

  has(input: number): boolean {
    return (this.proto.input[input] ?? "") !== "";
  }

  int(name: string, otherwise = 0): number {
    return Number(attribute(this.proto, name)?.i ?? otherwise);
  }

  ints(name: string): readonly number[] {
    return attribute(this.proto, name)?.ints.map(Number) ?? [];
  }

  float(name: string, otherwise: number): number {
    return attribute(this.proto, name)?.f ?? otherwise;
  }

  /** Whether anything reads an output. */
  wants(output: number): boolean {
    const name = this.proto.output[output] ?? "";
    return name !== "" && this.#graph.consumers.has(name);
  }

  /** Makes a value an output of the node. */
  give(output: number, value: string): void {
    const name = this.proto.output[output] ?? "";
    if (name !== "") this.#given.push([name, value]);
  }

  get given(): readonly (readonly [name: string, value: string])[] {
    return this.#given;
  }

  /** Dimensions of a weight. */
  weight(value: string): readonly number[] | undefined {
    return this.#graph.initializers.get(value)?.dims.map(Number);
  }

  /** Size of a value that an input of the graph declares. */
  declared(value: string, axis: number): number | undefined {
    const { type } = this.#graph.proto.input.find(({ name }) => name === value) ?? {};
    const dim = type?.value.case === "tensorType" ? type.value.value.shape?.dim[axis]?.value : undefined;
    return dim?.case === "dimValue" ? Number(dim.value) : undefined;
  }

  /** Width of a value that a linear layer makes or takes. */
  width(value: string): number | undefined {
    const producer = this.#graph.producers.get(value);
    const made = producer && (sizeOf(producer, "N") ?? this.weight(producer.input[1] ?? "")?.[1]);
    if (made !== undefined) return made;
    for (const { node, input } of this.#graph.consumers.get(value) ?? []) {
      if (input !== 0 || !/^(MatMul|MatMulNBits)$/.test(node.opType)) continue;
      const taken = sizeOf(node, "K") ?? this.weight(node.input[1]!)?.[0];
      if (taken !== undefined) return taken;
    }
    return undefined;
  }

  /** Rank of a value as far as the nodes before it tell, else `otherwise`; a run checks the assumption. */
  rank(value: string, otherwise: number): number {
    const rank = this.#rank(value, FARTHEST) ?? otherwise;
    this.ranks.set(value, rank);
    return rank;
  }

  #rank(value: string, steps: number): number | undefined {
    const node = this.#graph.producers.get(value);
    if (!node || steps === 0) return this.weight(value)?.length;
    const perm = attribute(node, "perm")?.ints.length;
    if (perm !== undefined) return perm;
    if (node.opType === "Reshape") {
      const shape = this.#graph.producers.get(node.input[1]!);
      return shape?.opType === "Concat" ? shape.input.length : this.weight(node.input[1]!)?.[0];
    }
    if (!/^(MatMul|MatMulNBits|Add|Mul|Cast|Identity|.*LayerNormalization)$/.test(node.opType)) return undefined;
    return this.#rank(node.input[0]!, steps - 1);
  }
}

function sizeOf(node: NodeProto, name: "K" | "N"): number | undefined {
  const found = node.opType === "MatMulNBits" ? attribute(node, name)?.i : undefined;
  return found === undefined ? undefined : Number(found);
}

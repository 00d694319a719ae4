/**
 * Fused operators and their definitions. The graph that is examined and differentiated is a shadow of the model's graph: it has
 * definitions in place of the fused nodes, which the model itself keeps.
 */
import { type Graph, indexGraph, type OnnxModel } from "../../onnx/model.ts";
import { PREFIX } from "../../onnx/nodes.ts";
import type { NodeProto } from "../../onnx/onnx_pb.ts";
import { create, GraphProtoSchema, ModelProtoSchema } from "../../onnx/protobuf.ts";
import { Emitter } from "../emit.ts";
import { ATTENTIONS } from "./attention.ts";
import { type Define, Fused } from "./fused.ts";
import { ROTARIES } from "./rotary.ts";
import { SUMS } from "./sums.ts";

/** Definitions by operator, with the domain in front where it is not the standard one. */
export const DEFINITIONS: ReadonlyMap<string, Define> = new Map([...ATTENTIONS, ...ROTARIES, ...SUMS]);

export interface Shadow {
  /** The shadow, which shares the model's weights; the model itself where nothing is fused. */
  readonly model: OnnxModel;
  /** Reasons why nodes stay fused. */
  readonly refused: ReadonlyMap<NodeProto, string>;
  /** Ranks that definitions have assumed, by value. */
  readonly ranks: ReadonlyMap<string, number>;
}

/** Makes a shadow of the model, which stays as it is. */
export function shadowOf(model: OnnxModel): Shadow {
  const { graph } = model;
  const refused = new Map<NodeProto, string>();
  const ranks = new Map<string, number>();
  const shadow = create(GraphProtoSchema, { name: graph.proto.name });
  shadow.input = graph.proto.input;
  shadow.output = [...graph.proto.output];
  shadow.initializer = [...graph.proto.initializer];
  const emit = new Emitter(shadow, model.opset, `${PREFIX}/defined`);
  for (const node of graph.proto.node) {
    const written = emit.nodes.length;
    const fused = defined(node, graph, emit);
    // Nodes that a refused definition has written stay: the next definition may use them.
    const fresh = emit.nodes.slice(written);
    shadow.node.push(...fresh);
    if (typeof fused === "string") refused.set(node, fused);
    if (!(fused instanceof Fused)) {
      shadow.node.push(node);
      continue;
    }
    for (const [name, value] of fused.given) shadow.node.push(...emit.rename(value, name, fresh));
    for (const [value, rank] of fused.ranks) ranks.set(value, rank);
  }
  if (emit.nodes.length === 0) return { model, refused, ranks };
  const proto = create(ModelProtoSchema, { ...model.proto, graph: shadow });
  return { model: { ...model, proto, graph: indexGraph(shadow, model.name) }, refused, ranks };
}

/** Defines a node. @returns the reason if it is refused, undefined where it is not fused */
function defined(node: NodeProto, graph: Graph, emit: Emitter): Fused | string | undefined {
  const define = DEFINITIONS.get(operatorOf(node));
  if (!define) return undefined;
  const fused = new Fused(node, graph, emit);
  return define(fused) ?? (fused.given.length > 0 ? fused : undefined);
}

/** Name of an operator of any domain. */
export function operatorOf({ domain, opType }: NodeProto): string {
  return domain === "" || domain === "ai.onnx" ? opType : `${domain}.${opType}`;
}

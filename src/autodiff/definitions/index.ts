/**
 * Fused operators and what they are made of. The graph that is looked at and differentiated is a shadow of the model's: it has the
 * definitions in the place of fused nodes, which the model itself keeps.
 */
import { type Graph, indexGraph, type OnnxModel } from "../../onnx/model.ts";
import { makeNode, PREFIX } from "../../onnx/nodes.ts";
import type { NodeProto } from "../../onnx/onnx_pb.ts";
import { create, GraphProtoSchema, ModelProtoSchema } from "../../onnx/protobuf.ts";
import { Emitter } from "../emit.ts";
import { ATTENTIONS } from "./attention.ts";
import { type Define, Fused } from "./fused.ts";
import { ROTARIES } from "./rotary.ts";
import { SUMS } from "./sums.ts";

/** By operator, with the domain in front where it is not the standard one. */
export const DEFINITIONS: ReadonlyMap<string, Define> = new Map([...ATTENTIONS, ...ROTARIES, ...SUMS]);

export interface Shadow {
  /** The model itself where nothing is fused. Weights are shared with it. */
  readonly model: OnnxModel;
  /** Why a node stays fused. */
  readonly refused: ReadonlyMap<NodeProto, string>;
  /** Ranks that definitions have taken for granted, by value. */
  readonly ranks: ReadonlyMap<string, number>;
}

/** Changes nothing in the model. */
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
    // What a definition that came to nothing has written may be used by the next one.
    const fresh = emit.nodes.slice(written);
    shadow.node.push(...fresh);
    if (typeof fused === "string") refused.set(node, fused);
    if (!(fused instanceof Fused)) {
      shadow.node.push(node);
      continue;
    }
    for (const [name, value] of fused.given) {
      if (!emit.rename(value, name, fresh))
        shadow.node.push(makeNode("Identity", `${PREFIX}/as/${name}`, [value], name));
    }
    for (const [value, rank] of fused.ranks) ranks.set(value, rank);
  }
  if (emit.nodes.length === 0) return { model, refused, ranks };
  const proto = create(ModelProtoSchema, { ...model.proto, graph: shadow });
  return { model: { ...model, proto, graph: indexGraph(shadow, model.name) }, refused, ranks };
}

/** The definition of a node, why there is none, or undefined where it is not fused. */
function defined(node: NodeProto, graph: Graph, emit: Emitter): Fused | string | undefined {
  const define = DEFINITIONS.get(operatorOf(node));
  if (!define) return undefined;
  const fused = new Fused(node, graph, emit);
  return define(fused) ?? (fused.given.length > 0 ? fused : undefined);
}

/** A name for an operator of any domain. */
export function operatorOf({ domain, opType }: NodeProto): string {
  return domain === "" || domain === "ai.onnx" ? opType : `${domain}.${opType}`;
}

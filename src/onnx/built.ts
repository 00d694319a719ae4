/** Files of onnxruntime-genai's model builder: what they hold otherwise than the checkpoint does. */
import type { OnnxModel } from "./model.ts";

/**
 * Whether the weights of normalisations are stored with 1 added, as the builder does for Gemma, whose layers multiply by 1 + w. Nothing in
 * the file says so: told by the embeddings, which these models alone scale.
 */
export function addsOneToNorms({ proto, graph }: OnnxModel): boolean {
  return (
    proto.producerName === "onnxruntime-genai" &&
    graph.proto.node.some(({ name }) => name.endsWith("/embed_tokens/Mul"))
  );
}

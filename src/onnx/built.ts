/** Differences between files of onnxruntime-genai's model builder and the checkpoint. */
import type { OnnxModel } from "./model.ts";

/**
 * Whether the weights of normalisations are stored with 1 added, as the builder does for Gemma, whose layers multiply by 1 + w. The file
 * does not say so; these models are recognised by the scaling of their embeddings, which no others have.
 */
export function addsOneToNorms({ proto, graph }: OnnxModel): boolean {
  return (
    proto.producerName === "onnxruntime-genai" &&
    graph.proto.node.some(({ name }) => name.endsWith("/embed_tokens/Mul"))
  );
}

/**
 * A model to train on: one file, or an encoder and a decoder in files of their own, which are joined in memory.
 */
import type { SourceInput } from "../source.ts";
import { type ModelFile, type ModelOptions, readModel } from "./read.ts";

/** A model whose encoder and decoder lie in files of their own, as `encoder_model.onnx` and `decoder_model_merged.onnx`. */
export interface ModelParts {
  readonly encoder: SourceInput;
  /** With a branch for each use of its cache or without caches. */
  readonly decoder: SourceInput;
}

/** What a model to train on is given as: what names or holds one file, or two of them. */
export type ModelInput = SourceInput | ModelParts;

/**
 * @param options as `readModel` takes them; `external` is asked for what lies beside either file
 * @throws as `readModel`, and FormatError when two files do not fit each other
 */
export async function readWhole(
  input: ModelInput,
  options: ModelOptions & { readonly weightsApart?: boolean | undefined } = {},
): Promise<ModelFile> {
  if (!isParts(input)) return readModel(input, options);
  return (await import("./parts.ts")).readParts(input, options);
}

/** Whether a model is given as two files. */
export function isParts(input: ModelInput): input is ModelParts {
  return typeof input === "object" && ("encoder" in input || "decoder" in input);
}

/**
 * Reads a model to train on: one file, or an encoder and a decoder in separate files, which are joined in memory.
 */
import { isPlain } from "../arguments.ts";
import type { SourceInput } from "../source.ts";
import { type ModelFile, type ModelOptions, type ModelParts, readModel } from "./read.ts";

/** A model to train on: a name or the contents of one file, or of two. */
export type ModelInput = SourceInput | ModelParts;

/** Options for reading a model; `trainable: false` where only one file is allowed. */
export interface WholeOptions extends ModelOptions {
  readonly weightsApart?: boolean | undefined;
  readonly trainable?: boolean | object | undefined;
}

/**
 * @param options as `readModel` takes them; `external` is asked for files beside either file
 * @throws as `readModel`, FormatError when two files do not fit each other, TypeError for two where one is expected
 */
export async function readWhole(input: ModelInput, options: WholeOptions = {}): Promise<ModelFile> {
  if (!isParts(input)) return readModel(input, options);
  if (options.trainable === false) {
    const message = "model: { encoder, decoder } are joined to be trained, with `trainable: true`";
    throw new TypeError(`${message}; to answer, make a session on each, with createEigenSessions or createSessions`);
  }
  return (await import("./encoder-decoder.ts")).readParts(input, options);
}

/** Whether a model is given as two files. */
function isParts(input: ModelInput): input is ModelParts {
  return isPlain(input) && ("encoder" in input || "decoder" in input);
}

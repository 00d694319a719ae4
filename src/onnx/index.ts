/**
 * `eigenlora/onnx`: ONNX models as base models. Reading only; running them is the bindings' part.
 */

import type { WeightHost } from "../core/base.ts";
import { checkOptions } from "../errors.ts";
import { FETCH_OPTIONS, type SourceInput } from "../source.ts";
import { type ModelOptions, readModel } from "./read.ts";
import { onnxHost } from "./weights.ts";

export type { Parameter, View, WeightHost } from "../core/base.ts";
export type { ModelOptions } from "./read.ts";

/**
 * Opens a model and finds its parameters. The file is read whole and stays in memory; files next to it are read when a
 * weight in them is. Closing the host releases those.
 *
 * @example
 * const base = await openOnnxHost("model.onnx");
 * const runtime = await createRuntime(pack, { base });
 *
 * @throws FormatError when the file is truncated or is no ONNX model
 * @throws SourceError when the file cannot be read; `read` throws it also for missing external files, and
 *   BaseMismatchError for a name that several weights of different values have
 */
export async function openOnnxHost(input: SourceInput, options: ModelOptions = {}): Promise<WeightHost> {
  checkOptions("openOnnxHost", options, ["onProgress", "external", "signal", ...FETCH_OPTIONS]);
  return onnxHost(await readModel(input, options));
}

/**
 * An ONNX model as a base: its weights, under the names that adapters use. Read-only: changes of a task reach a model through the runtime
 * that has loaded it.
 */

import { checkOptions } from "../arguments.ts";
import type { CpuView, View, WeightHost } from "../core/base.ts";
import { SourceError } from "../errors.ts";
import { FETCH_OPTIONS, type ReadOptions, type SourceInput } from "../source.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import { findParameters, type OnnxParameter, outputAxis, partSize, partStart, pieceShape } from "./modules.ts";
import { type ModelFile, type ModelOptions, readModel } from "./read.ts";
import { readTensor } from "./tensors.ts";
import { Copies } from "./weights.ts";

/**
 * Opens a model and finds its parameters. The file is read whole and stays in memory; files next to it are read when a weight in them is.
 * Closing the host releases those.
 *
 * @example
 * const base = await openOnnxHost("model.onnx");
 * const runtime = await createRuntime(pack, { base });
 *
 * @throws FormatError when the file is truncated or is no ONNX model
 * @throws SourceError when the file cannot be read; `read` throws it also for missing external files, and BaseMismatchError
 *   for a name that several weights of different values have
 */
export async function openOnnxHost(input: SourceInput, options: ModelOptions = {}): Promise<WeightHost> {
  checkOptions("openOnnxHost", options, ["onProgress", "external", "signal", ...FETCH_OPTIONS]);
  return onnxHost(await readModel(input, options));
}

/** The float parameters of a model in memory. Read-only. @param pieces parts of packed parameters, or made of several */
export function onnxHost(file: ModelFile, pieces: readonly OnnxParameter[] = []): WeightHost {
  const { model, external, close } = file;
  const all = findParameters(model);
  const copies = new Copies(file, all);
  const floats = [...all, ...pieces].flatMap((parameter) => {
    const { dtype } = parameter;
    return dtype === "other" ? [] : [[parameter.name, { ...parameter, dtype }] as const];
  });
  const parameters = new Map(floats);
  return {
    *list() {
      for (const parameter of parameters.values()) {
        const { name, dtype, layout } = parameter;
        yield { name, shape: pieceShape(parameter), dtype, ...(layout ? { layout } : {}) };
      }
    },
    async read(name, into, options): Promise<View> {
      const parameter = parameters.get(name);
      if (!parameter) throw new SourceError(`has no float parameter "${name}"`, { file: model.name });
      const { dtype, slice, joined, candidates, initializer } = parameter;
      if (candidates.some(({ equal }) => equal)) await copies.of(parameter);
      const { shape, data } =
        slice || joined
          ? await readPiece(file, parameter, options)
          : await readTensor(model.graph.initializers.get(initializer)!, model.name, external, options);
      into?.set(data);
      return { dtype, shape, data: into ?? data, byteOffset: 0 };
    },
    close,
  };
}

/** Reads a parameter that is a part, or made of parts. @throws FormatError, SourceError as `readTensor` */
async function readPiece(
  { model, external }: ModelFile,
  parameter: OnnxParameter & { readonly dtype: FloatDtype },
  options?: ReadOptions,
): Promise<Pick<CpuView, "shape" | "data">> {
  const { copyPart } = await import("./packed.ts");
  const axis = outputAxis(parameter);
  const { dtype, joined = [parameter] } = parameter;
  const shape = pieceShape(parameter);
  const width = dtype === "f32" ? 4 : 2;
  const data = new Uint8Array(shape.reduce((a, b) => a * b, width));
  let done = 0;
  for (const part of joined) {
    const tensor = model.graph.initializers.get(part.initializer)!;
    const whole = await readTensor(tensor, model.name, external, options);
    const size = partSize(part);
    copyPart({ ...whole, start: partStart(part) }, { data, shape, start: done }, axis, size, width);
    done += size;
  }
  return { shape, data };
}

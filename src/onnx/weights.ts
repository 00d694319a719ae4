/**
 * Values of a model's weights. The reader of quantised weights is loaded only for models that have some.
 */
import { type WeightAt, weightAt } from "../core/mismatch.ts";
import { FormatError } from "../errors.ts";
import type { ReadOptions } from "../source.ts";
import { matrixShape, partStart, type Stored } from "./modules.ts";
import type { ModelFile } from "./read.ts";
import { readTensor } from "./tensors.ts";

/** A weight of a linear layer, float or quantised. */
export interface ReadWeight {
  readonly at: WeightAt;
  readonly quantized: boolean;
}

/**
 * @throws FormatError when the quantisation is not supported, or its tensors do not fit each other
 * @throws SourceError when a file beside the model cannot be read
 */
export async function readLinearWeight(
  file: ModelFile,
  parameter: Stored & { readonly name: string },
  options?: ReadOptions,
): Promise<ReadWeight> {
  const { model, external } = file;
  const { slice, joined, ...all } = parameter;
  if (joined) return readJoined(file, joined, options);
  if (slice) {
    const from = partStart(parameter);
    const { at, quantized } = await readLinearWeight(file, all, options);
    return { at: (o, n) => at(o + from, n), quantized };
  }
  if (parameter.dtype !== "other") {
    const [out, inputs] = matrixShape(parameter) ?? [0, 0];
    const { data } = await readTensor(
      model.graph.initializers.get(parameter.initializer)!,
      model.name,
      external,
      options,
    );
    return { at: weightAt(data, parameter.dtype, out, inputs, parameter.layout === "in-out"), quantized: false };
  }
  const at = await (await import("./dequantize.ts")).readQuantizedWeight(file, parameter, options);
  if (at) return { at, quantized: true };
  const use = parameter.uses[0];
  const how = use ? `${use.node.opType} "${use.node.name}"` : "no node";
  const message = `"${parameter.name}" is quantised in a way that is not known here (used by ${how})`;
  throw new FormatError(
    `${message}; pass a model where it is float, or anyBase: true where it is read for its fingerprint only`,
    { file: model.name, part: `initializer ${parameter.initializer}` },
  );
}

/** Reads weights that lie one below the other. */
async function readJoined(
  file: ModelFile,
  parts: readonly (Stored & { readonly name: string })[],
  options: ReadOptions | undefined,
): Promise<ReadWeight> {
  const rows: WeightAt[] = [];
  let quantized = false;
  for (const part of parts) {
    const read = await readLinearWeight(file, part, options);
    const [out] = matrixShape(part)!;
    for (let o = 0; o < out; o++) rows.push((_, n) => read.at(o, n));
    quantized ||= read.quantized;
  }
  return { at: (o, n) => rows[o]!(o, n), quantized };
}

/**
 * Steps of a task's integers, for packs that are made with a step: a task that is trained on keeps those that it was stored with, so
 * that it takes about as many bytes.
 */
import type { TaskBlob } from "../format/format.ts";
import { encodedTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { BITS, decodeScales, isQuantized } from "../tensor/dtypes.ts";
import { toInteger } from "../tensor/encode.ts";
import type { HeadLayer } from "./head.ts";
import { tensorOf } from "./start.ts";
import type { Terms } from "./terms.ts";

/** The step of every number that a task stores as an integer. */
export interface TaskSteps {
  /** Of its parameters. */
  readonly parameters: Float32Array<ArrayBuffer>;
  /** Of the weight of each layer of its head; undefined where that has another number format. */
  readonly head: readonly (LayerSteps | undefined)[];
}

/** The steps of a head's layer. */
export interface LayerSteps {
  readonly weight: Float32Array<ArrayBuffer>;
  /** Integer of the weight's number format. */
  readonly largest: number;
}

/** What is trained, or stored, as integers. */
export interface Stepped {
  /** Of these steps. Default: number formats say how numbers are stored. */
  readonly stored?: TaskSteps | undefined;
}

/** Steps of a stored task; undefined in packs without a step. */
export function stepsOf(
  pack: Pack,
  terms: Terms,
  blob: TaskBlob,
  head: readonly Pick<HeadLayer, "module">[],
): TaskSteps | undefined {
  if (pack.directory.basis.step === undefined) return undefined;
  const parameters = new Float32Array(terms.size);
  for (const parameter of terms.parameters) {
    const tensor = tensorOf(pack, blob, parameter);
    const part = terms.part(parameters, parameter.module, parameter.kind)!;
    if (tensor) part.set(ofRows(decodeScales(encodedTensor(blob.bytes, tensor), tensor.rows), tensor.width));
  }
  return { parameters, head: head.map(({ module }) => layerSteps(blob, module)) };
}

function layerSteps(blob: TaskBlob, module: string): LayerSteps | undefined {
  const stored = blob.parameters.find(({ name }) => name === `${module}.weight`)?.tensor;
  if (!stored || !isQuantized(stored.dtype)) return undefined;
  const { dtype, rows, width } = stored;
  const weight = ofRows(decodeScales(encodedTensor(blob.bytes, stored), rows), width);
  return { weight, largest: 2 ** (BITS[dtype] - 1) - 1 };
}

function ofRows(scales: Float32Array, width: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: scales.length * width }, (_, i) => scales[Math.floor(i / width)]!);
}

/** Numbers as they will be read: multiples of their steps. @param largest of them, in magnitude. Default: that of int8 */
export function toSteps(values: Float32Array, steps: Float32Array, largest: number = 127): Float32Array<ArrayBuffer> {
  return Float32Array.from(values, (value, i) => {
    const step = steps[i]!;
    return step > 0 ? toInteger(value / step, largest) * step : 0;
  });
}

/** Steps of so many rows. @param steps [rows, width]; of rows without numbers 0 */
export function rowsOf(steps: Float32Array, rows: number): Float32Array {
  const width = steps.length / rows;
  return Float32Array.from({ length: rows }, (_, row) => steps[row * width] ?? 0);
}

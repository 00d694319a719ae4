/**
 * Bytes of parts of weights: of one layer within a packed weight, or of a divided weight joined from all its parts. Loaded only for
 * models with such weights.
 */
import type { CpuView } from "../core/base.ts";
import type { ReadOptions } from "../source.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import { type OnnxParameter, outputAxis, partSize, partStart, pieceShape } from "./modules.ts";
import type { ModelFile } from "./read.ts";
import { readTensor } from "./tensors.ts";

/** Values in memory, and where along an axis a part of them begins. */
export interface AxisPart {
  readonly data: Uint8Array;
  readonly shape: readonly number[];
  readonly start: number;
}

/** Copies `count` rows or columns. @param width bytes of a value */
export function copyPart(from: AxisPart, to: AxisPart, axis: number, count: number, width: number): void {
  const inner = from.shape.slice(axis + 1).reduce((a, b) => a * b, width);
  const outer = from.shape.slice(0, axis).reduce((a, b) => a * b, 1);
  const [fromStep, toStep] = [from.shape[axis]! * inner, to.shape[axis]! * inner];
  for (let i = 0; i < outer; i++) {
    const at = i * fromStep + from.start * inner;
    to.data.set(from.data.subarray(at, at + count * inner), i * toStep + to.start * inner);
  }
}

/** Reads a parameter that is a part, or made of parts. @throws FormatError, SourceError as `readTensor` */
export async function readPiece(
  { model, external }: ModelFile,
  parameter: OnnxParameter & { readonly dtype: FloatDtype },
  options?: ReadOptions,
): Promise<CpuView> {
  const axis = outputAxis(parameter);
  const { dtype, joined = [parameter] } = parameter;
  const shape = pieceShape(parameter);
  const width = dtype === "f32" ? 4 : 2;
  const data = new Uint8Array(shape.reduce((a, b) => a * b, width));
  let done = 0;
  for (const part of joined) {
    const tensor = model.graph.initializers.get(part.initializer)!;
    const whole = await readTensor(tensor, model.name, external, options);
    const [start, size] = [partStart(part), partSize(part)];
    copyPart({ ...whole, start }, { data, shape, start: done }, axis, size, width);
    done += size;
  }
  return { dtype, shape, data, byteOffset: 0 };
}

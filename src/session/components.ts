/** A pack's components of a module as a graph takes them. */
import { encodedTensor, type PackModule, readTensor, sharedBases, type TensorRef } from "../format/format.ts";
import type { ComponentRows, Components } from "../onnx/components.ts";
import { BITS, isQuantized } from "../tensor/dtypes.ts";
import { decodeIntegers, decodeScales } from "../tensor/encode.ts";

/**
 * @param bases of the pack, which are read when the graph is made
 * @returns undefined for a module that no core can lie between
 */
export function componentsOf(module: PackModule, bases: Uint8Array): Components | undefined {
  const { A, B } = sharedBases(module) ?? {};
  if (A?.kind !== "column" || B?.kind !== "column") return undefined;
  if (A.tensor.rows === 0 || B.tensor.rows === 0) return undefined;
  return { A: rowsOf(A.tensor, bases), B: rowsOf(B.tensor, bases) };
}

function rowsOf(tensor: TensorRef, bases: Uint8Array): ComponentRows {
  const { dtype, rows, width } = tensor;
  const floats = (): Float32Array => readTensor(bases, tensor);
  if (!isQuantized(dtype)) return { rows, width, floats };
  const bytes = encodedTensor(bases, tensor);
  const values = (): Int8Array => decodeIntegers(dtype, bytes, rows, width);
  return {
    rows,
    width,
    floats,
    integers: { bits: BITS[dtype] as 3 | 4 | 8, scales: decodeScales(bytes, rows), values },
  };
}

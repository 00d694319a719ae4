/**
 * Tensors inside a section that has been read: where the bytes of one are, and its numbers.
 */
import { decodeTensor } from "../tensor/dtypes.ts";
import type { TensorRef } from "./format.ts";

/** The encoded bytes of a tensor, a view of its section. */
export function encodedTensor(section: Uint8Array, { byteOffset, byteLength }: TensorRef): Uint8Array {
  return section.subarray(byteOffset, byteOffset + byteLength);
}

/**
 * The numbers of a tensor [rows, width], f32.
 * @param out Default: new memory
 */
export function readTensor(section: Uint8Array, ref: TensorRef, out?: Float32Array): Float32Array {
  return decodeTensor(ref.dtype, encodedTensor(section, ref), ref.rows, ref.width, out);
}

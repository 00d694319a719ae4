/**
 * Tensors that are made of others: transposed, or in the place of a file's own.
 */
import type { ReadOptions } from "../source.ts";
import type { TensorFile, TensorInfo } from "./tensor-file.ts";

/** A tensor that is made of others: another shape, and values of its own. */
export interface Derived extends TensorInfo {
  read(options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** The file with some of its tensors replaced. */
export function withDerived<T extends TensorFile>(file: T, derived: ReadonlyMap<string, Derived>): T {
  if (derived.size === 0) return file;
  return {
    ...file,
    tensors: new Map([...file.tensors, ...derived]),
    readF32: (name: string, options?: ReadOptions) => derived.get(name)?.read(options) ?? file.readF32(name, options),
  };
}

/** The tensor [a, b] as [b, a]. */
export function transposed(file: TensorFile, name: string): Derived {
  const { dtype, shape } = file.tensors.get(name)!;
  const [rows = 0, columns = 0] = shape;
  return {
    dtype,
    shape: [columns, rows],
    read: async (options) => transpose(await file.readF32(name, options), rows, columns),
  };
}

/** [rows, columns] → [columns, rows]. */
export function transpose(values: Float32Array, rows: number, columns: number): Float32Array<ArrayBuffer> {
  const turned = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = values[r * columns + c]!;
  return turned;
}

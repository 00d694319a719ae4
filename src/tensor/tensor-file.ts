/**
 * A file of named tensors, whatever its format: names, dtypes and shapes known, values on demand.
 */

import type { ReadOptions } from "../source.ts";
import { transpose } from "./transpose.ts";

/** What is known of a tensor before it is read. */
export interface TensorInfo {
  /** "F32", "BF16", "I64", …; in GGUF also "Q8_0" and others. */
  readonly dtype: string;
  /** Row-major: the last dimension is the one whose elements lie side by side. */
  readonly shape: readonly number[];
}

/** Tensors by name, each read on demand. */
export interface TensorFile {
  /** Name of the source, for messages. */
  readonly name: string;
  /** Size of the whole file. */
  readonly byteLength: number;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /**
   * A tensor's values as f32, row-major. F16, BF16 and Q8_0 are exact, F64 is rounded.
   * @throws FormatError when there is no such tensor or its dtype is none of these and F32; SourceError when the bytes cannot be had
   */
  readF32(name: string, options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** Whether `readF32` decodes this dtype. */
export function isFloatDtype(dtype: string): boolean {
  return dtype === "F32" || dtype === "F16" || dtype === "BF16" || dtype === "F64" || dtype === "Q8_0";
}

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

/**
 * The base model as the runtime sees it: who lists its weights, hands them out and, where they live in the user's
 * memory, takes the folded ones. Knows nothing of packs. Which of the weights an adapted module is, `mismatch.ts`
 * finds.
 */

import type { DeviceBuffer } from "../backends/backend.ts";
import type { Layout } from "../format/format.ts";
import type { ReadOptions, SourceInput } from "../source.ts";
import { decodeTensor, elementsOf, type FloatDtype, readFloats, rowBytes } from "../tensor/dtypes.ts";

/** A tensor as it lies in memory: little-endian, row-major, `shape` elements of `dtype` from `byteOffset` of `data`. */
export interface View {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  readonly data: Uint8Array | DeviceBuffer;
  readonly byteOffset: number;
}

/** A view of the CPU's memory. */
export type CpuView = View & { readonly data: Uint8Array };

/** A parameter of the base model. */
export interface Parameter {
  /** The checkpoint's name: "encoder.layer.0.attention.self.query.weight". */
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: FloatDtype;
  /** Layout of the stored weight. Default: the layout of the checkpoint that the adapters were trained on. */
  readonly layout?: Layout;
}

/** Changes to a host that take effect together. */
export interface Transaction {
  /**
   * New value of a parameter, or null to remove one that a task had added. `view` is valid during the call only: copy
   * it.
   */
  write(name: string, view: View | null): void | Promise<void>;
  /** Makes all writes visible to readers before it resolves. */
  commit(): void | Promise<void>;
  /**
   * Gives readers what was there before `begin`. Parameters that a host shows by `view` may stay as they are, since the
   * runtime writes those again. When it fails, nothing is read until another switch has succeeded.
   */
  rollback(): void | Promise<void>;
}

/**
 * Holds the weights of a base model. Adapted weights whose `view` is a buffer of a device are folded into in place, and
 * `write` is not called for them; the transaction's `commit` says when they are whole. All other values go through
 * `read` and `write`, in the CPU's memory.
 */
export interface WeightHost {
  list(): Iterable<Parameter>;
  /**
   * The parameter's bytes, in `into` when given. Called before the parameter is first written, so what it returns is
   * pristine.
   */
  read(name: string, into?: Uint8Array, options?: ReadOptions): Promise<View>;
  /** The parameter as it is now, where it lies in memory; undefined where it can only be read and written. */
  view?(name: string): View | undefined;
  /**
   * Called before weights are folded in place. Work that the model has recorded must not run with the new weights:
   * submit it first, or move the weights to other memory and leave the old ones to it. `view` is asked again
   * afterwards; what it shows then is overwritten as a whole.
   * @param names of the weights that are folded in place next
   */
  flush?(names: readonly string[]): void | Promise<void>;
  /**
   * Absent: the host cannot be written. The runtime then keeps the folded weights; take them from `runtime.weight`.
   * @param names of all parameters that will change; what speaks against it is best said here, before anything has
   *   changed
   * @param alone subset of `names` whose new values must not reach other parameters in the same memory
   */
  begin?(names: Iterable<string>, alone?: Iterable<string>): Transaction;
  close?(): Promise<void>;
}

/** A weight in the user's memory. Typed arrays are taken as they are; the runtime folds into them in place. */
export interface Tensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  readonly data: Float32Array | Uint16Array | Uint8Array;
  readonly layout?: Layout;
}

/** A weight on the WebGPU device that is given as `webgpu({ device })`. The runtime folds into the buffer in place. */
export interface DeviceTensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  /** Needs the usage STORAGE | COPY_SRC | COPY_DST. */
  readonly buffer: DeviceBuffer;
  /** First byte of the weight. Default: 0. */
  readonly byteOffset?: number;
  readonly layout?: Layout;
}

/** Whatever can serve as the base model: a host, tensors by parameter name, or a safetensors file. */
export type BaseInput = WeightHost | Map<string, Tensor | DeviceTensor> | SourceInput;

/** True if data lies on a device. */
export function onDevice(data: View["data"] | undefined): data is DeviceBuffer {
  return data !== undefined && !ArrayBuffer.isView(data);
}

/** Bytes of a parameter. */
export function byteLengthOf({ dtype, shape }: Pick<Parameter, "dtype" | "shape">): number {
  return rowBytes(dtype, 1) * elementsOf(shape);
}

/** The values of a view, f32. @param out Default: new memory */
export function viewValues({ dtype, shape, data, byteOffset }: CpuView, out?: Float32Array): Float32Array {
  const count = elementsOf(shape);
  const bytes = data.subarray(byteOffset);
  if (dtype === "f32") return decodeTensor(dtype, bytes, 1, count, out);
  const values = out ?? new Float32Array(count);
  // Halves need not end at a multiple of 4, as a tensor does.
  readFloats(dtype, bytes, 0, count, values);
  return values;
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}

/** A weight of the base that a module adapts. */
export interface Located extends Parameter {
  /** Stored as [in, out]. */
  readonly transposed: boolean;
  readonly byteLength: number;
}

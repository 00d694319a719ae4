/**
 * The base model's weights as the runtime sees them: who lists them, hands them out and, where they live in the user's
 * memory, takes the folded ones. Hosts know nothing of packs.
 */

import type { DeviceBuffer } from "../backends/backend.ts";
import type { Layout } from "../format/format.ts";
import type { ReadOptions, SourceInput } from "../source.ts";
import { align4, decodeTensor, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";

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
  /** As in the checkpoint: "encoder.layer.0.attention.self.query.weight". */
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: FloatDtype;
  /** How a weight is stored. Absent: as the checkpoint the adapters were trained on stores it. */
  readonly layout?: Layout;
}

/** Changes to a host that take effect together. */
export interface Transaction {
  /**
   * New value of a parameter, or null to remove one that a task had added. `view` is valid during the call only: copy it.
   */
  write(name: string, view: View | null): void | Promise<void>;
  /** After it resolves, readers see all writes. */
  commit(): void | Promise<void>;
  /**
   * After it resolves, readers see what was there before `begin`; but parameters that a host shows by `view` may be left as they
   * are, the runtime writes those again. When it fails, nothing is read until another switch has succeeded.
   */
  rollback(): void | Promise<void>;
}

/**
 * Holds the weights of a base model. Adapted weights whose `view` is a buffer of a device are folded into in place, and `write` is
 * not called for them; the transaction's `commit` says when they are whole. All other values go through `read` and `write`, in the
 * CPU's memory.
 */
export interface WeightHost {
  list(): Iterable<Parameter>;
  /** The parameter's bytes, in `into` when given. Called before the parameter is first written, so what it returns is pristine. */
  read(name: string, into?: Uint8Array, options?: ReadOptions): Promise<View>;
  /** The parameter as it is now, where it lies in memory; undefined where it can only be read and written. */
  view?(name: string): View | undefined;
  /**
   * Called before weights are folded in place. What the model has recorded and will only run later must not compute with the new
   * weights: hand it to the device first, or move the weights, which leaves the old ones to it. `view` is asked again afterwards; what
   * it shows then is overwritten as a whole.
   * @param names of the weights that are folded in place next
   */
  settle?(names: readonly string[]): void | Promise<void>;
  /**
   * Absent: the host cannot be written. The runtime then keeps the folded weights; take them from `runtime.weight`.
   * @param names of all parameters that will change; what speaks against it is best said here, before anything has changed
   */
  begin?(names: Iterable<string>): Transaction;
  close?(): Promise<void>;
}

/** A weight in the user's memory. Typed arrays are taken as they are; the runtime folds into them in place. */
export interface Tensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  readonly data: Float32Array | Uint16Array | Uint8Array;
  readonly layout?: Layout;
}

/** A weight on the WebGPU device that is given as `webgpu: { device }`. The runtime folds into the buffer in place. */
export interface DeviceTensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  /** With usage STORAGE | COPY_SRC | COPY_DST. */
  readonly buffer: DeviceBuffer;
  /** First byte of the weight. Default: 0. */
  readonly byteOffset?: number;
  readonly layout?: Layout;
}

/** Whatever can serve as the base model: a host, tensors by parameter name, or a safetensors file. */
export type BaseInput = WeightHost | Map<string, Tensor | DeviceTensor> | SourceInput;

/** Whether data lies on a device. */
export function onDevice(data: View["data"] | undefined): data is DeviceBuffer {
  return data !== undefined && !ArrayBuffer.isView(data);
}

/** Bytes of a parameter. */
export function byteLengthOf({ dtype, shape }: Pick<Parameter, "dtype" | "shape">): number {
  return shape.reduce((a, b) => a * b, rowBytes(dtype, 1));
}

/** The values of a view, f32. @param out Default: new memory */
export function viewValues(view: CpuView, out?: Float32Array): Float32Array {
  const count = view.shape.reduce((a, b) => a * b, 1);
  let bytes = view.data.subarray(view.byteOffset);
  if (bytes.length % 4) {
    // The decoder reads whole tensors, which end at multiples of 4.
    const padded = new Uint8Array(align4(bytes.length));
    padded.set(bytes);
    bytes = padded;
  }
  return decodeTensor(view.dtype, bytes, 1, count, out);
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}

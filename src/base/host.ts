/**
 * The base model's weights as the runtime sees them: who lists them, hands them out and, where they live in the user's
 * memory, takes the folded ones. Hosts know nothing of packs.
 */

import type { DeviceBuffer } from "../backends/backend.ts";
import { BaseMismatchError, SourceError } from "../errors.ts";
import type { Layout } from "../format/format.ts";
import { type FetchOptions, openSource, type ReadOptions, type SourceInput } from "../source.ts";
import { type FloatDtype, rowBytes } from "../tensor/dtypes.ts";
import type { SafetensorsFile } from "../tensor/safetensors.ts";

/** A tensor as it lies in memory: little-endian, row-major, `shape` elements of `dtype` from `byteOffset` of `data`. */
export interface View {
  dtype: FloatDtype;
  shape: readonly number[];
  data: Uint8Array | DeviceBuffer;
  byteOffset: number;
}

/** A parameter of the base model. */
export interface Parameter {
  /** As in the checkpoint: "encoder.layer.0.attention.self.query.weight". */
  name: string;
  shape: readonly number[];
  dtype: FloatDtype;
  /** How a weight is stored. Absent: as the checkpoint the adapters were trained on stores it. */
  layout?: Layout;
}

/** Changes to a host that take effect together. */
export interface Transaction {
  /**
   * New value of a parameter, or null to remove one that a task had added. `view` is valid during the call only: copy it.
   */
  write(name: string, view: View | null): void | Promise<void>;
  /** After it resolves, readers see all writes. */
  commit(): void | Promise<void>;
  /** After it resolves, readers see what was there before `begin`. */
  rollback(): void | Promise<void>;
}

/**
 * Holds the weights of a base model. Weights whose `view` is a buffer of a device are folded into in place, and `write` is not
 * called for them; the transaction's `commit` says when they are whole.
 */
export interface WeightHost {
  list(): Iterable<Parameter>;
  /** The parameter's bytes, in `into` when given. Called before any write, so what it returns is pristine. */
  read(name: string, into?: Uint8Array, options?: ReadOptions): Promise<View>;
  /** The parameter as it is now, where it lies in memory. */
  view?(name: string): View;
  /** Absent: the host cannot be written. The runtime then keeps the folded weights; take them from `runtime.weight`. */
  begin?(): Transaction;
  close?(): Promise<void>;
}

/** A weight in the user's memory. Typed arrays are taken as they are; the runtime folds into them in place. */
export interface Tensor {
  dtype: FloatDtype;
  shape: readonly number[];
  data: Float32Array | Uint16Array | Uint8Array;
  layout?: Layout;
}

/** A weight on the WebGPU device that is given as `webgpu: { device }`. The runtime folds into the buffer in place. */
export interface DeviceTensor {
  dtype: FloatDtype;
  shape: readonly number[];
  /** With usage STORAGE | COPY_SRC | COPY_DST. */
  buffer: DeviceBuffer;
  /** First byte of the weight; 0 unless given. */
  byteOffset?: number;
  layout?: Layout;
}

/** Whatever can serve as the base model: a host, tensors by parameter name, or a safetensors file. */
export type BaseInput = WeightHost | Map<string, Tensor | DeviceTensor> | SourceInput;

/** @throws TypeError when `base` is none of the accepted kinds; SourceError, FormatError when the file cannot be read */
export async function openHost(base: BaseInput, options: FetchOptions & ReadOptions = {}): Promise<WeightHost> {
  if (base instanceof Map) return memoryHost(base);
  if (typeof (base as WeightHost).list === "function") return base as WeightHost;
  const source = await openSource(base as SourceInput, options);
  try {
    // Apps whose weights belong to a framework need no file reader.
    const { openSafetensors } = await import("../tensor/safetensors.ts");
    return safetensorsHost(await openSafetensors(source, { signal: options.signal }), async () => source.close?.());
  } catch (error) {
    await source.close?.();
    throw error;
  }
}

const DTYPES = new Map<string, FloatDtype>([
  ["F32", "f32"],
  ["F16", "f16"],
  ["BF16", "bf16"],
]);

/** The float tensors of a safetensors file. Read-only. */
export function safetensorsHost(file: SafetensorsFile, close?: () => Promise<void>): WeightHost {
  const host: WeightHost = {
    *list() {
      for (const [name, { dtype, shape }] of file.tensors) {
        const type = DTYPES.get(dtype);
        if (type) yield { name, shape, dtype: type };
      }
    },
    async read(name, into, options) {
      const tensor = file.tensors.get(name);
      const dtype = DTYPES.get(tensor?.dtype ?? "");
      if (!tensor || !dtype) throw new SourceError(`has no float tensor "${name}"`, { file: file.name });
      const bytes = await file.read(name, options);
      return { dtype, shape: tensor.shape, data: fill(into, bytes), byteOffset: 0 };
    },
  };
  if (close) host.close = close;
  return host;
}

function fill(into: Uint8Array | undefined, bytes: Uint8Array): Uint8Array {
  if (!into) return bytes;
  into.set(bytes);
  return into;
}

/** Whether data lies on a device. */
export function onDevice(data: View["data"]): data is DeviceBuffer {
  return !ArrayBuffer.isView(data);
}

function viewOf(tensor: Tensor | DeviceTensor): View {
  const { dtype, shape } = tensor;
  if ("buffer" in tensor) return { dtype, shape, data: tensor.buffer, byteOffset: tensor.byteOffset ?? 0 };
  const { buffer, byteOffset, byteLength } = tensor.data;
  return { dtype, shape, data: new Uint8Array(buffer, byteOffset, byteLength), byteOffset: 0 };
}

/** Bytes of a parameter. */
export function byteLengthOf({ dtype, shape }: { dtype: FloatDtype; shape: readonly number[] }): number {
  return shape.reduce((a, b) => a * b, rowBytes(dtype, 1));
}

/**
 * Tensors in the user's memory, written in place. Added parameters become new entries of the map.
 * @throws BaseMismatchError when a tensor's data is not as long as its shape says, for instance because it was transferred
 */
export function memoryHost(tensors: Map<string, Tensor | DeviceTensor>): WeightHost {
  const checkSizes = (): void => {
    for (const [name, tensor] of tensors) {
      const { dtype, shape } = tensor;
      const bytes = byteLengthOf(tensor);
      const found = "buffer" in tensor ? tensor.buffer.size - (tensor.byteOffset ?? 0) : tensor.data.byteLength;
      if ("buffer" in tensor ? found >= bytes : found === bytes) continue;
      throw new BaseMismatchError(
        `base tensor "${name}": ${dtype} [${shape.join(", ")}] needs ${bytes} bytes, its data has ${found}`,
        { module: name, expected: bytes, found },
      );
    }
  };
  checkSizes();
  const view = (name: string): View => {
    const tensor = tensors.get(name);
    if (!tensor) throw new RangeError(`the base has no tensor "${name}"`);
    return viewOf(tensor);
  };
  return {
    *list() {
      for (const [name, { dtype, shape, layout }] of tensors)
        yield { name, dtype, shape, ...(layout ? { layout } : {}) };
    },
    async read(name, into) {
      const found = view(name);
      return onDevice(found.data) ? found : { ...found, data: fill(into, found.data) };
    },
    view,
    begin() {
      // The one way a write in place can fail is an array that was transferred away: find it before the first write.
      checkSizes();
      const undo: (() => void)[] = [];
      return {
        write(name, view) {
          const old = tensors.get(name);
          if (view === null) {
            tensors.delete(name);
            undo.push(() => old && tensors.set(name, old));
            return;
          }
          const { dtype, shape, data, byteOffset } = view;
          const before = old && viewOf(old).data;
          if (before && !onDevice(before) && !onDevice(data) && old.dtype === dtype && sameShape(old.shape, shape)) {
            before.set(data);
            return;
          }
          tensors.set(name, {
            dtype,
            shape: [...shape],
            ...(onDevice(data) ? { buffer: data, byteOffset } : { data: data.slice() }),
          });
          undo.push(() => (old ? tensors.set(name, old) : tensors.delete(name)));
        },
        commit() {},
        rollback() {
          for (const step of undo.reverse()) step();
        },
      };
    },
  };
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}

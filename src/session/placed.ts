/**
 * Inputs of tasks as buffers of the device that the engine computes on: written once a switch, they cost a run nothing. Loaded where there
 * is such a device.
 */
/// <reference types="@webgpu/types" />

import type { DeviceHandle } from "../backends/backend.ts";
import type { TaskInput } from "../onnx/adapted.ts";
import type { Engine, EngineGpu, EngineTensor } from "./engine.ts";
import { type InputValues, stackValues } from "./values.ts";

/** STORAGE, COPY_SRC and COPY_DST of GPUBufferUsage, which is a global in browsers only. */
export const USAGE: number = 128 | 4 | 8;

/** Bytes of a buffer: whole vectors of four words, which kernels of runtimes read. */
export function roundUp16(bytes: number): number {
  return Math.max(16, Math.ceil(bytes / 16) * 16);
}

/** Feeds whose values lie on the device. */
export interface PlacedFeeds {
  readonly feeds: Readonly<Record<string, EngineTensor>>;
  /** Bytes that a run carries from the CPU's memory all the same: indices are 64-bit integers. */
  readonly bytes: number;
  /** Bytes that were written to the device. */
  readonly written: number;
  /** Called once no run reads them any more: their buffers are used again. */
  readonly retire: () => void;
}

/** Places tasks on a device. */
export class Placer {
  readonly #engine: Engine;
  readonly #gpu: EngineGpu;
  readonly #device: GPUDevice;
  readonly #inputs: readonly TaskInput[];
  /** Buffers of tasks that were active before, by input. */
  readonly #spare = new Map<string, GPUBuffer[]>();
  readonly #all = new Set<GPUBuffer>();

  constructor(engine: Engine, gpu: EngineGpu, device: DeviceHandle, inputs: readonly TaskInput[]) {
    this.#engine = engine;
    this.#gpu = gpu;
    this.#device = device as unknown as GPUDevice;
    this.#inputs = inputs;
  }

  place(values: InputValues): PlacedFeeds {
    const feeds: Record<string, EngineTensor> = {};
    const used: (readonly [name: string, buffer: GPUBuffer])[] = [];
    let [bytes, written] = [0, 0];
    for (const input of this.#inputs) {
      const { name } = input;
      const { dims, data } = stackValues(input, [values.get(name)!]);
      if (data instanceof BigInt64Array) {
        feeds[name] = this.#engine.tensor(data, dims);
        bytes += data.byteLength;
        continue;
      }
      const buffer = this.#bufferFor(name, roundUp16(data.byteLength));
      this.#device.queue.writeBuffer(buffer, 0, data as Float32Array<ArrayBuffer>);
      feeds[name] = this.#gpu.tensor(buffer, "f32", dims);
      used.push([name, buffer]);
      written += data.byteLength;
    }
    const retire = (): void => {
      for (const [name, buffer] of used) this.#spare.set(name, [...(this.#spare.get(name) ?? []), buffer]);
    };
    return { feeds, bytes, written, retire };
  }

  /** A buffer that nothing reads: tasks differ in rank, and so in size. */
  #bufferFor(name: string, size: number): GPUBuffer {
    const spare = this.#spare.get(name)?.pop();
    if (spare?.size === size) return spare;
    if (spare) this.#free(spare);
    const buffer = this.#device.createBuffer({ label: `eigenlora ${name}`, size, usage: USAGE });
    this.#all.add(buffer);
    return buffer;
  }

  #free(buffer: GPUBuffer): void {
    this.#all.delete(buffer);
    buffer.destroy();
  }

  get byteLength(): number {
    return [...this.#all].reduce((sum, { size }) => sum + size, 0);
  }

  close(): void {
    for (const buffer of this.#all) this.#free(buffer);
  }
}

/**
 * Records kernels and copies into one command buffer, and keeps what a repeated dispatch needs: pipelines, bind groups,
 * parameters. Knows buffers and shaders, not what they are for.
 */
/// <reference types="@webgpu/types" />
import * as shaders from "../../kernels/wgsl.js";
import { align4 } from "../dtypes.ts";
import { BackendError } from "../errors.ts";
import type { DeviceHandle } from "./backend.ts";
import { compile, Faults } from "./webgpu-device.ts";

/** A buffer and the number it goes by in keys. */
export interface Held {
  readonly id: number;
  readonly buffer: GPUBuffer;
}

/** The part of a buffer that a kernel sees. */
export interface Binding {
  held: Held;
  offset: number;
  size: number;
}

export interface Dispatch {
  shader: keyof typeof shaders;
  entry: string;
  /** The shader's FORMAT, where it has one. */
  format?: number;
  /** By binding, from 1. */
  bindings: readonly Binding[];
  /** The shader's `Job`: 32-bit words. */
  job: readonly number[];
  /** Workgroups: `count` of them in x and y, `layers` in z. */
  count: number;
  layers?: number;
}

interface Prepared {
  pipeline: GPUComputePipeline;
  group: GPUBindGroup;
  slot: Slot;
  ids: readonly number[];
}

interface Slot {
  buffer: GPUBuffer;
  offset: number;
}

/** Bytes of a slot, the alignment of uniform bindings; slots of a buffer. */
const SLOT_BYTES = 256;
const SLOTS = 256;
/** Dispatches that are remembered. One switch of 100 modules needs 300; more tasks than fit are prepared again. */
const MAX_PREPARED = 8192;
const MAX_GROUPS = 65535;

/** GPUBufferUsage, which is a global in browsers only. */
const MAP_READ = 1;
const COPY_SRC = 4;
const COPY_DST = 8;
const UNIFORM = 64;
const STORAGE = 128;

export class Recorder {
  readonly #device: GPUDevice;
  readonly #faults: Faults;
  readonly #modules: ReadonlyMap<string, GPUShaderModule>;
  readonly #pipelines = new Map<string, GPUComputePipeline>();
  readonly #prepared = new Map<string, Prepared>();
  readonly #slots: Slot[] = [];
  readonly #slotBuffers: GPUBuffer[] = [];
  #nextId = 1;
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  /** Buffers that commands not yet submitted use. */
  readonly #waiting = new Set<number>();
  /** Buffers that live until the next submit. */
  #temporaries: Held[] = [];

  /** Use `createRecorder`. */
  constructor(device: DeviceHandle, modules: ReadonlyMap<string, GPUShaderModule>) {
    this.#device = device as GPUDevice;
    this.#faults = new Faults(device);
    this.#modules = modules;
  }

  /** Bytes of parameters. */
  get reserved(): number {
    return this.#slotBuffers.length * SLOTS * SLOT_BYTES;
  }

  /** A zeroed buffer of `size` bytes, a multiple of 4. Lack of memory is reported by `finish`. */
  create(label: string, size: number): Held {
    return { id: this.#nextId++, buffer: this.#buffer(label, size, STORAGE | COPY_SRC | COPY_DST) };
  }

  /** As `create`, until the commands recorded next are submitted. */
  temporary(size: number): Held {
    const held = this.create("eigenlora temporary", size);
    this.#temporaries.push(held);
    return held;
  }

  #buffer(label: string, size: number, usage: GPUBufferUsageFlags): GPUBuffer {
    return this.#faults.guard(`${label} of ${size} bytes`, () => this.#device.createBuffer({ label, size, usage }));
  }

  destroy({ id, buffer }: Held): void {
    if (this.#waiting.has(id)) this.submit();
    for (const [key, { ids, slot }] of this.#prepared) {
      if (!ids.includes(id)) continue;
      this.#prepared.delete(key);
      this.#slots.push(slot);
    }
    buffer.destroy();
  }

  /** Writes bytes at a multiple of 4, zero-padded to one, after everything recorded that uses the buffer. */
  write({ id, buffer }: Held, offset: number, source: Uint8Array): void {
    if (this.#waiting.has(id)) this.submit();
    // Shared memory is refused by some implementations.
    const bytes = source.buffer instanceof ArrayBuffer ? (source as Uint8Array<ArrayBuffer>) : new Uint8Array(source);
    const whole = bytes.length - (bytes.length % 4);
    if (whole > 0) this.#device.queue.writeBuffer(buffer, offset, bytes, 0, whole);
    if (whole === bytes.length) return;
    const tail = new Uint8Array(4);
    tail.set(bytes.subarray(whole));
    this.#device.queue.writeBuffer(buffer, offset + whole, tail);
  }

  /** Records a copy between two buffers; offsets and size are multiples of 4. */
  copy(from: Held, fromOffset: number, to: Held, toOffset: number, size: number): void {
    this.#commands(from.id, to.id).copyBufferToBuffer(from.buffer, fromOffset, to.buffer, toOffset, size);
  }

  /** Records a kernel. */
  dispatch(dispatch: Dispatch): void {
    const { count, layers = 1 } = dispatch;
    if (count === 0 || layers === 0) return;
    const { pipeline, group, ids } = this.#prepare(dispatch);
    this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" });
    this.#pass ??= this.#encoder.beginComputePass({ label: "eigenlora" });
    for (const id of ids) this.#waiting.add(id);
    const y = Math.ceil(count / MAX_GROUPS);
    this.#pass.setPipeline(pipeline);
    this.#pass.setBindGroup(0, group);
    this.#pass.dispatchWorkgroups(Math.ceil(count / y), y, layers);
  }

  #commands(...ids: readonly number[]): GPUCommandEncoder {
    this.#pass?.end();
    this.#pass = undefined;
    for (const id of ids) this.#waiting.add(id);
    return (this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" }));
  }

  #prepare({ shader, entry, format, bindings, job }: Dispatch): Prepared {
    const places = bindings.map(({ held, offset, size }) => `${held.id}+${offset}:${size}`);
    const key = `${entry} ${format} ${places.join(" ")} ${job.join(" ")}`;
    const known = this.#prepared.get(key);
    if (known) return known;
    if (this.#prepared.size >= MAX_PREPARED) {
      this.submit();
      for (const { slot } of this.#prepared.values()) this.#slots.push(slot);
      this.#prepared.clear();
    }
    const pipeline = this.#pipeline(shader, entry, format);
    const slot = this.#slots.pop() ?? this.#moreSlots();
    this.#device.queue.writeBuffer(slot.buffer, slot.offset, Uint32Array.from(job));
    const label = `eigenlora ${entry}`;
    const entries = [
      { buffer: slot.buffer, offset: slot.offset, size: SLOT_BYTES },
      ...bindings.map(({ held, offset, size }) => ({ buffer: held.buffer, offset, size })),
    ].map((resource, binding) => ({ binding, resource }));
    const group = this.#faults.guard(label, () =>
      this.#device.createBindGroup({ label, layout: pipeline.getBindGroupLayout(0), entries }),
    );
    const prepared = { pipeline, group, slot, ids: bindings.map(({ held }) => held.id) };
    this.#prepared.set(key, prepared);
    return prepared;
  }

  #pipeline(shader: string, entryPoint: string, format: number | undefined): GPUComputePipeline {
    const label = `eigenlora ${entryPoint}${format === undefined ? "" : ` ${format}`}`;
    const known = this.#pipelines.get(label);
    if (known) return known;
    const pipeline = this.#faults.guard(label, () =>
      this.#device.createComputePipeline({
        label,
        layout: "auto",
        compute: {
          module: this.#modules.get(shader)!,
          entryPoint,
          ...(format === undefined ? {} : { constants: { FORMAT: format } }),
        },
      }),
    );
    this.#pipelines.set(label, pipeline);
    return pipeline;
  }

  #moreSlots(): Slot {
    const buffer = this.#buffer("eigenlora parameters", SLOTS * SLOT_BYTES, UNIFORM | COPY_DST);
    this.#slotBuffers.push(buffer);
    for (let i = SLOTS - 1; i > 0; i--) this.#slots.push({ buffer, offset: i * SLOT_BYTES });
    return { buffer, offset: 0 };
  }

  /** Hands everything recorded to the device, in one command buffer. */
  submit(): void {
    const encoder = this.#encoder;
    if (encoder) {
      this.#pass?.end();
      this.#encoder = this.#pass = undefined;
      this.#waiting.clear();
      this.#faults.guard("submit", () => this.#device.queue.submit([encoder.finish({ label: "eigenlora" })]));
    }
    const done = this.#temporaries;
    this.#temporaries = [];
    for (const held of done) this.destroy(held);
  }

  /** Submits, and resolves when the device is done. @throws BackendError with what went wrong since the last call */
  async finish(): Promise<void> {
    this.submit();
    // On a lost device this may reject; the loss itself is the better message.
    await this.#device.queue.onSubmittedWorkDone().catch(() => undefined);
    await this.#faults.settle();
  }

  /** `size` bytes from `offset`, after everything recorded. */
  async read(from: Held, offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const start = offset - (offset % 4);
    const whole = align4(offset + size - start);
    if (whole === 0) return new Uint8Array(0);
    const buffer = this.#buffer("eigenlora read", whole, MAP_READ | COPY_DST);
    try {
      this.#commands(from.id).copyBufferToBuffer(from.buffer, start, buffer, 0, whole);
      this.submit();
      const refused = await buffer.mapAsync(MAP_READ).then(
        () => undefined,
        (cause: Error) => new BackendError(`webgpu: bytes cannot be read: ${cause.message}`, { backend: "webgpu", cause }),
      );
      // The fault behind a refusal is the better message.
      await this.#faults.settle();
      if (refused) throw refused;
      return new Uint8Array(buffer.getMappedRange()).slice(offset - start, offset - start + size);
    } finally {
      buffer.destroy();
    }
  }

  /** Drops what is recorded and frees the parameters; the buffers are the caller's. */
  dispose(): void {
    this.#encoder = this.#pass = undefined;
    this.#waiting.clear();
    for (const { buffer } of this.#temporaries) buffer.destroy();
    for (const buffer of this.#slotBuffers) buffer.destroy();
    this.#temporaries = [];
    this.#slotBuffers.length = this.#slots.length = 0;
    this.#prepared.clear();
  }
}

/** @throws BackendError when the device refuses a shader */
export async function createRecorder(device: DeviceHandle): Promise<Recorder> {
  const modules = await Promise.all(
    Object.entries(shaders).map(async ([name, code]) => [name, await compile(device, `${name}.wgsl`, code)] as const),
  );
  return new Recorder(device, new Map(modules));
}

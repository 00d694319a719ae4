/**
 * Records kernels and copies into one command buffer, and keeps what a repeated dispatch needs: pipelines, bind groups,
 * parameters. Knows buffers and shaders, not what they are for.
 */
/// <reference types="@webgpu/types" />

import { openGpu } from "#files";
import * as shaders from "../../kernels/wgsl.ts";
import { BackendError } from "../errors.ts";
import { align4 } from "../tensor/dtypes.ts";
import type { DeviceHandle } from "./backend.ts";

/** The part of a buffer that a kernel sees. */
export interface Binding {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly size: number;
}

export interface Dispatch {
  readonly shader: keyof typeof shaders;
  readonly entry: string;
  /** The shader's FORMAT, where it has one. */
  readonly format?: number;
  /** Buffers by binding, from 1. */
  readonly bindings: readonly Binding[];
  /** The shader's `Job`, or several of them in a row: 32-bit words. */
  readonly job: readonly number[];
  /** Workgroups. */
  readonly count: number;
}

interface BoundPipeline {
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly slot: Slot;
  /** Numbers of its buffers. */
  readonly ids: readonly number[];
}

/** Where a job lies: in a buffer that many share, or, if it is long, in one of its own. */
interface Slot {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly own: boolean;
}

/** Bytes of a slot, the alignment of bindings; slots of a buffer. */
const SLOT_BYTES = 256;
const SLOTS = 256;
/** Dispatches that are remembered. One switch of 100 modules needs 101; what does not fit is prepared again. */
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
  readonly #prepared = new Map<string, BoundPipeline>();
  readonly #slots: Slot[] = [];
  readonly #slotBuffers: GPUBuffer[] = [];
  #ownSlotBytes = 0;
  /** Numbers that buffers go by in keys. What was prepared with a buffer that the caller drops goes with it. */
  readonly #ids = new WeakMap<GPUBuffer, number>();
  readonly #gone = new FinalizationRegistry<number>((id) => this.#forgetPrepared(id));
  #nextId = 1;
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  /** Buffers that commands not yet submitted use. */
  readonly #waiting = new Set<GPUBuffer>();
  /** Buffers that live until the next submit. */
  #temporaries: GPUBuffer[] = [];

  /** Use `createRecorder`. */
  constructor(device: DeviceHandle, modules: ReadonlyMap<string, GPUShaderModule>, timeout: number | undefined) {
    this.#device = device as GPUDevice;
    this.#faults = new Faults(device, timeout);
    this.#modules = modules;
  }

  /** Resolves when the device is lost. */
  get lost(): Promise<Error> {
    return this.#faults.lost;
  }

  /** Bytes of jobs. */
  get reserved(): number {
    return this.#slotBuffers.length * SLOTS * SLOT_BYTES + this.#ownSlotBytes;
  }

  /** A zeroed buffer of `size` bytes, a multiple of 4. Lack of memory is reported by `finish`, and to `refused`. */
  create(label: string, size: number, refused?: () => void): GPUBuffer {
    return this.#buffer(label, size, STORAGE | COPY_SRC | COPY_DST, refused);
  }

  /** Like `create`; the buffer lives until the commands recorded next are submitted. */
  temporary(size: number): GPUBuffer {
    const buffer = this.create("eigenlora temporary", size);
    this.#temporaries.push(buffer);
    return buffer;
  }

  #buffer(label: string, size: number, usage: GPUBufferUsageFlags, refused?: () => void): GPUBuffer {
    return this.#faults.guard(
      `${label} of ${size} bytes`,
      () => this.#device.createBuffer({ label, size, usage }),
      refused,
    );
  }

  destroy(buffer: GPUBuffer): void {
    this.forget(buffer);
    buffer.destroy();
  }

  /** Lets go of a buffer, once what is recorded with it is submitted. */
  forget(buffer: GPUBuffer): void {
    if (this.#waiting.has(buffer)) this.submit();
    this.#forgetPrepared(this.#ids.get(buffer));
  }

  #forgetPrepared(id: number | undefined): void {
    if (id === undefined) return;
    for (const [key, prepared] of this.#prepared) if (prepared.ids.includes(id)) this.#forget(key, prepared);
  }

  #idOf(buffer: GPUBuffer): number {
    let id = this.#ids.get(buffer);
    if (id === undefined) {
      id = this.#nextId++;
      this.#ids.set(buffer, id);
      this.#gone.register(buffer, id);
    }
    return id;
  }

  #forget(key: string, { slot }: BoundPipeline): void {
    this.#prepared.delete(key);
    if (!slot.own) return void this.#slots.push(slot);
    this.#ownSlotBytes -= slot.buffer.size;
    slot.buffer.destroy();
  }

  /** Writes bytes at a multiple of 4, zero-padded to one, after everything recorded that uses the buffer. */
  write(buffer: GPUBuffer, offset: number, source: Uint8Array): void {
    if (this.#waiting.has(buffer)) this.submit();
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
  copy(from: GPUBuffer, fromOffset: number, to: GPUBuffer, toOffset: number, size: number): void {
    this.#commands(from, to).copyBufferToBuffer(from, fromOffset, to, toOffset, size);
  }

  /** Records a kernel. */
  dispatch(dispatch: Dispatch): void {
    const { count } = dispatch;
    if (count === 0) return;
    const { pipeline, group } = this.#prepare(dispatch);
    this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" });
    this.#pass ??= this.#encoder.beginComputePass({ label: "eigenlora" });
    for (const { buffer } of dispatch.bindings) this.#waiting.add(buffer);
    const y = Math.ceil(count / MAX_GROUPS);
    this.#pass.setPipeline(pipeline);
    this.#pass.setBindGroup(0, group);
    this.#pass.dispatchWorkgroups(Math.ceil(count / y), y);
  }

  #commands(...buffers: readonly GPUBuffer[]): GPUCommandEncoder {
    this.#pass?.end();
    this.#pass = undefined;
    for (const buffer of buffers) this.#waiting.add(buffer);
    return (this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" }));
  }

  #prepare({ shader, entry, format, bindings, job }: Dispatch): BoundPipeline {
    const ids = bindings.map(({ buffer }) => this.#idOf(buffer));
    const places = bindings.map(({ offset, size }, i) => `${ids[i]}+${offset}:${size}`);
    const key = `${shader} ${entry} ${format} ${places.join(" ")} ${job.join(" ")}`;
    const known = this.#prepared.get(key);
    if (known) return known;
    if (this.#prepared.size >= MAX_PREPARED) {
      this.submit();
      for (const [known, prepared] of this.#prepared) this.#forget(known, prepared);
    }
    const pipeline = this.#pipeline(shader, entry, format);
    const slot = this.#slot(4 * job.length);
    this.#device.queue.writeBuffer(slot.buffer, slot.offset, Uint32Array.from(job));
    const label = `eigenlora ${entry}`;
    const entries = [{ buffer: slot.buffer, offset: slot.offset, size: 4 * job.length }, ...bindings].map(
      ({ buffer, offset, size }, binding) => ({ binding, resource: { buffer, offset, size } }),
    );
    const group = this.#faults.guard(label, () =>
      this.#device.createBindGroup({ label, layout: pipeline.getBindGroupLayout(0), entries }),
    );
    const prepared = { pipeline, group, slot, ids };
    this.#prepared.set(key, prepared);
    return prepared;
  }

  #pipeline(shader: string, entryPoint: string, format: number | undefined): GPUComputePipeline {
    const label = `eigenlora ${shader} ${entryPoint}${format === undefined ? "" : ` ${format}`}`;
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

  #slot(bytes: number): Slot {
    const own = bytes > SLOT_BYTES;
    if (!own && this.#slots.length > 0) return this.#slots.pop()!;
    const size = own ? bytes : SLOTS * SLOT_BYTES;
    const buffer = this.#buffer("eigenlora jobs", size, UNIFORM | STORAGE | COPY_DST);
    if (own) {
      this.#ownSlotBytes += bytes;
      return { buffer, offset: 0, own };
    }
    this.#slotBuffers.push(buffer);
    for (let i = SLOTS - 1; i > 0; i--) this.#slots.push({ buffer, offset: i * SLOT_BYTES, own });
    return { buffer, offset: 0, own };
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
    for (const buffer of done) this.destroy(buffer);
  }

  /** Submits, and resolves when the device is done. @throws BackendError with what went wrong since the last call */
  async finish(): Promise<void> {
    this.submit();
    await this.#faults.wait(this.#device.queue.onSubmittedWorkDone());
  }

  /** `size` bytes from `offset`, after everything recorded. */
  async read(from: GPUBuffer, offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const start = offset - (offset % 4);
    const whole = align4(offset + size - start);
    if (whole === 0) return new Uint8Array(0);
    const buffer = this.#buffer("eigenlora read", whole, MAP_READ | COPY_DST);
    try {
      this.#commands(from).copyBufferToBuffer(from, start, buffer, 0, whole);
      this.submit();
      await this.#faults.wait(buffer.mapAsync(MAP_READ));
      return new Uint8Array(buffer.getMappedRange()).slice(offset - start, offset - start + size);
    } finally {
      buffer.destroy();
    }
  }

  /** Drops what is recorded and frees the jobs; other buffers are the caller's to free. */
  close(): void {
    this.#encoder = this.#pass = undefined;
    this.#waiting.clear();
    for (const buffer of this.#temporaries) buffer.destroy();
    for (const [key, prepared] of this.#prepared) this.#forget(key, prepared);
    for (const buffer of this.#slotBuffers) buffer.destroy();
    this.#temporaries = [];
    this.#slotBuffers.length = this.#slots.length = 0;
  }
}

/**
 * @param timeout as in `DeviceOptions`
 * @throws BackendError when the device refuses a shader
 */
export async function createRecorder(device: DeviceHandle, timeout: number | undefined): Promise<Recorder> {
  const modules = new Map<string, GPUShaderModule>();
  await Promise.all(
    Object.entries(shaders).map(async ([name, code]) => modules.set(name, await compile(device, `${name}.wgsl`, code))),
  );
  return new Recorder(device, modules, timeout);
}

/**
 * A WebGPU device: the user's, or one asked for; and what it says went wrong, which WebGPU tells later than it happens.
 * Knows nothing of blocks or kernels.
 */
/// <reference types="@webgpu/types" />

const ADVICE = "Make a new runtime";

export interface DeviceOptions {
  /** The device to compute on, which stays the caller's. Absent: one is requested, and destroyed by `close`. */
  readonly device?: DeviceHandle | undefined;
  /** Refuse an adapter that computes on the CPU. */
  readonly hardware?: boolean | undefined;
  /** Milliseconds to wait for the device, each time. Default: 60 000. */
  readonly timeout?: number | undefined;
}

interface OpenDevice {
  readonly device: DeviceHandle;
  /** Names the adapter, for people. */
  readonly description: string;
  /** Ends the device, if it was asked for here. */
  close(): void;
}

/** A device that has not answered by then is taken for lost. Software adapters need seconds for large weights. */
const TIMEOUT = 60_000;

/**
 * @throws BackendError when there is no WebGPU, no adapter, the adapter gives no device, or does not answer
 * @throws TypeError when the given device is none
 */
export async function openDevice({ device: given, hardware, timeout = TIMEOUT }: DeviceOptions): Promise<OpenDevice> {
  if (given) {
    const { adapterInfo, createShaderModule } = given as GPUDevice;
    if (typeof createShaderModule !== "function") throw new TypeError("webgpu.device: expected a WebGPU device");
    return { device: given, description: describe(adapterInfo), close() {} };
  }
  try {
    const gpu = (await openGpu()) as GPU;
    const asked = gpu.requestAdapter({ powerPreference: "high-performance" });
    const adapter = await inTime(asked, timeout, "the adapter");
    if (!adapter)
      throw new Error("there is no adapter; a driver may be missing, or the browser may have WebGPU disabled");
    if (hardware && adapter.info.isFallbackAdapter) {
      throw new Error(`the adapter is software (${describe(adapter.info)}); ask for it with backend: "webgpu"`);
    }
    // Limits are raised only where they decide which weights fit: the size of a buffer, and how much of it a kernel sees.
    const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
    const requested = adapter.requestDevice({
      label: "eigenlora",
      requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
    });
    const device = await inTime(requested, timeout, "the device");
    return {
      device,
      description: describe(adapter.info),
      close: () => device.destroy(),
    };
  } catch (cause) {
    throw new BackendError(`webgpu: ${(cause as Error).message}`, { backend: "webgpu", cause });
  }
}

function describe(info: GPUAdapterInfo | undefined): string {
  return info?.description || info?.architecture || info?.vendor || "unknown adapter";
}

/** @throws Error when `work` takes longer than `timeout` milliseconds */
async function inTime<T>(work: Promise<T>, timeout: number, what: string): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not answer within ${timeout} ms`)), timeout);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Collects errors of a device. Error scopes are opened and closed within one call, so that a user's own stay in order. */
export class Faults {
  /** Resolves when the device is lost, or has not answered in time. */
  readonly lost: Promise<BackendError>;
  readonly #device: GPUDevice;
  readonly #timeout: number;
  readonly #open = new Set<Promise<void>>();
  /** Ends waits when the device is lost. A race with `lost` would be kept as long as the device. */
  readonly #waiting = new Set<() => void>();
  #first: BackendError | undefined;
  #loss: BackendError | undefined;
  #lose!: (loss: BackendError) => void;

  constructor(device: DeviceHandle, timeout: number = TIMEOUT) {
    this.#device = device as GPUDevice;
    this.#timeout = timeout;
    this.lost = new Promise((resolve) => {
      this.#lose = (loss) => {
        resolve((this.#loss ??= loss));
        for (const end of this.#waiting) end();
      };
    });
    void this.#device.lost.then(({ reason, message }) => {
      this.#lose(fault(`the device was lost (${reason || "unknown"}): ${message.replace(/\.+$/, "")}. ${ADVICE}`));
    });
  }

  /**
   * Runs `call` and listens for what the device thinks of it.
   * @param refused called when it was refused
   * @throws BackendError when the device is lost
   */
  guard<T>(what: string, call: () => T, refused?: () => void): T {
    if (this.#loss) throw this.#loss;
    const kinds = ["validation", "out-of-memory", "internal"] as const;
    for (const kind of kinds) this.#device.pushErrorScope(kind);
    try {
      return call();
    } finally {
      for (const kind of kinds.toReversed()) this.#listen(`${what}, ${kind}`, this.#device.popErrorScope(), refused);
    }
  }

  #listen(what: string, scope: Promise<GPUError | null>, refused: (() => void) | undefined): void {
    const heard = scope
      .then((error) => {
        if (!error) return;
        this.#first ??= fault(`${what}: ${error.message}`, error);
        refused?.();
      })
      // A lost device has no scopes; its loss is reported by itself.
      .catch(() => undefined)
      .finally(() => this.#open.delete(heard));
    this.#open.add(heard);
  }

  /**
   * Waits for what the device was asked for. A device that is not done in time counts as lost from then on.
   * @throws BackendError, the first fault since the last call, or the loss of the device
   */
  async wait(work: Promise<unknown>): Promise<void> {
    let refused: BackendError | undefined;
    const heard = work
      .catch((cause: Error) => void (refused = fault(cause.message, cause)))
      .then(() => Promise.all(this.#open));
    let end!: () => void;
    const lost = new Promise<void>((resolve) => (end = resolve));
    this.#waiting.add(end);
    if (this.#loss) end();
    try {
      await inTime(Promise.race([heard, lost]), this.#timeout, "the device");
    } catch (cause) {
      this.#lose(fault(`${(cause as Error).message}. ${ADVICE}`, cause));
    } finally {
      this.#waiting.delete(end);
    }
    // The fault behind a refusal is the better message.
    const found = this.#loss ?? this.#first ?? refused;
    this.#first = undefined;
    if (found) throw found;
  }
}

function fault(message: string, cause?: unknown): BackendError {
  return new BackendError(`webgpu: ${message}`, { backend: "webgpu", cause });
}

/**
 * Compiles a shader.
 * @throws BackendError with label, line, column and the line itself
 */
export async function compile(device: DeviceHandle, label: string, code: string): Promise<GPUShaderModule> {
  const gpu = device as GPUDevice;
  gpu.pushErrorScope("validation");
  const module = gpu.createShaderModule({ label, code });
  const scope = gpu.popErrorScope();
  const { messages } = await module.getCompilationInfo();
  const reasons = messages
    .filter((m) => m.type === "error")
    .map((m) => `${label}:${m.lineNum}:${m.linePos}: ${m.message}\n  ${code.split("\n")[m.lineNum - 1] ?? ""}`);
  const refused = await scope;
  if (refused && reasons.length === 0) reasons.push(`${label}: ${refused.message}`);
  if (reasons.length > 0) throw new BackendError(`webgpu: ${reasons.join("\n")}`, { backend: "webgpu", reasons });
  return module;
}

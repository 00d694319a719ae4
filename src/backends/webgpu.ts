/**
 * The WebGPU backend: the kernels of `kernels/` on buffers of a device. Operations are recorded into one command
 * buffer, and `finish` submits them at once. Blocks are buffers of their own; what crosses the bus is what is uploaded
 * and read. What goes wrong, WebGPU tells later than it happens.
 */
/// <reference types="@webgpu/types" />

import { openDawn } from "#gpu";
import * as shaders from "../../kernels/wgsl.ts";
import { BackendError } from "../errors.ts";
import { align4, DTYPES, type Dtype, rowBytes, scaleBytes, tensorBytes } from "../tensor/dtypes.ts";
import type * as backend from "./backend.ts";
import { after, at, checkLength, checkSlice, weightBytes } from "./backend.ts";

/** Options of `webgpu`. */
export interface WebgpuOptions {
  /**
   * The device to compute on, for instance the one that the model runs on; it stays the caller's. Absent: the system's
   * is requested.
   */
  readonly device?: backend.DeviceHandle | undefined;
  /** Milliseconds to wait for the device before it counts as lost. Default: 60 000. */
  readonly timeout?: number | undefined;
}

/** GPUBufferUsage, which is a global in browsers only. */
const MAP_READ = 1;
const COPY_SRC = 4;
const COPY_DST = 8;
const UNIFORM = 64;
const STORAGE = 128;
/** Usages that kernels and copies need. */
const BLOCK_USAGE = COPY_SRC | COPY_DST | STORAGE;

/**
 * Sizes of the kernels: columns or words of a workgroup; rows of a fold's tile; rows of an expansion or projection;
 * columns of a norm.
 */
const LANES = 64;
const TILE_ROWS = 8;
const ROWS = 8;
const ACROSS = 16;

/**
 * A backend on the device given, or on one of the system's.
 * @param options `bindingBytes`: most bytes that a kernel sees of one buffer, if less than the device allows; larger
 *   weights are folded in parts
 * @throws BackendError when there is no WebGPU, no adapter, no device, or a shader is refused
 */
export async function createWebgpuBackend(
  options: WebgpuOptions & { readonly bindingBytes?: number } = {},
): Promise<backend.Backend> {
  const opened = await openDevice(options);
  const modules = new Map<string, GPUShaderModule>();
  const compiled = Object.entries(shaders).map(async ([name, code]) =>
    modules.set(name, await compile(opened.device, `${name}.wgsl`, code)),
  );
  await Promise.all(compiled);
  return new WebgpuBackend(opened, new Recorder(opened.device, modules, options.timeout), options.bindingBytes);
}

/** The part of a buffer that a kernel sees. */
interface Binding {
  readonly buffer: GPUBuffer;
  readonly offset: number;
  readonly size: number;
}

/** A slice in a kernel: a binding, and the slice's first byte in it. */
interface Bound {
  readonly binding: Binding;
  readonly at: number;
}

/** Bytes of a slice, and what they are called in errors. */
interface ByteRange {
  readonly name: string;
  readonly slice: backend.Slice;
  readonly byteLength: number;
}

/** A job of kernels/components.wgsl: `count` rows of numbers and a tensor [rows, width] make a result. */
interface ComponentsJob {
  readonly entry: "expand" | "project";
  readonly dtype: Dtype;
  readonly count: number;
  readonly rows: number;
  readonly width: number;
  readonly add?: boolean | undefined;
  /** The result, the numbers, the tensor. */
  readonly ranges: readonly ByteRange[];
  readonly workgroups: number;
}

class WebgpuBackend implements backend.Backend {
  readonly name = "webgpu";
  readonly variant: string;
  readonly device: backend.DeviceHandle;
  readonly lost: Promise<Error>;
  readonly #recorder: Recorder;
  readonly #closeDevice: () => void;
  /** Most bytes that a kernel sees of one buffer. */
  readonly #bindingBytes: number;
  /** A binding's first byte is a multiple of it. */
  readonly #alignment: number;
  readonly #bufferBytes: number;
  readonly #owners = new Map<backend.Block, backend.Owner>();
  /** Blocks by buffer; those of the caller's buffers are kept as long as the caller keeps these. */
  readonly #byBuffer = new WeakMap<backend.DeviceBuffer, backend.Block>();
  /** Jobs of one kernel that wait for one dispatch, and the ranges of buffers that they cover. */
  #jobs: ComponentsJob[] = [];
  #covered: readonly ByteRange[] = [];

  constructor(
    { device, description, close }: Awaited<ReturnType<typeof openDevice>>,
    recorder: Recorder,
    bindingBytes = Infinity,
  ) {
    const { limits } = device as GPUDevice;
    this.variant = description;
    this.device = device;
    this.lost = recorder.faults.lost;
    this.#recorder = recorder;
    this.#closeDevice = close;
    this.#bindingBytes = Math.min(bindingBytes, limits.maxStorageBufferBindingSize);
    this.#alignment = limits.minStorageBufferOffsetAlignment;
    this.#bufferBytes = limits.maxBufferSize;
  }

  allocate(byteLength: number, owner: backend.Owner): backend.Block {
    checkLength(byteLength);
    const size = padded(byteLength);
    if (size > this.#bufferBytes) {
      const most = `a buffer of this device has at most ${this.#bufferBytes}`;
      throw new BackendError(`webgpu: no memory for ${byteLength} bytes (${owner}); ${most}`, { backend: "webgpu" });
    }
    const state = { refused: false };
    const device = this.#recorder.create(`eigenlora ${owner}`, size, BLOCK_USAGE, () => (state.refused = true));
    const block: backend.Block = Object.assign(state, { byteLength, device });
    this.#byBuffer.set(device, block);
    this.#owners.set(block, owner);
    return block;
  }

  /** Finds or makes the block of a buffer. @throws TypeError when kernels cannot use it */
  adopt(buffer: backend.DeviceBuffer): backend.Block {
    const known = this.#byBuffer.get(buffer);
    if (known) return known;
    const { size, usage, label } = buffer as GPUBuffer;
    if (size % 4 !== 0 || (usage & BLOCK_USAGE) !== BLOCK_USAGE) {
      throw new TypeError(
        `webgpu: the buffer "${label}" cannot be folded into: it has ${size} bytes and usage ${usage}; ` +
          "expected a multiple of 4 and STORAGE | COPY_SRC | COPY_DST",
      );
    }
    const block = { byteLength: size, device: buffer };
    this.#byBuffer.set(buffer, block);
    return block;
  }

  free(block: backend.Block): void {
    this.#flush();
    const buffer = block.device as GPUBuffer | undefined;
    if (!buffer || this.#byBuffer.get(buffer) !== block) return;
    this.#byBuffer.delete(buffer);
    this.#recorder.forget(buffer);
    if (this.#owners.delete(block)) buffer.destroy();
  }

  /** @throws TypeError when the slice's block is not of this backend, RangeError as `checkSlice` */
  #buffer(name: string, slice: backend.Slice, byteLength: number, align = 1): GPUBuffer {
    const { block } = slice;
    if (!block.device || this.#byBuffer.get(block.device) !== block)
      throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    checkSlice(name, slice, byteLength, align);
    return block.device as GPUBuffer;
  }

  upload(to: backend.Slice, bytes: Uint8Array): void {
    const target = this.#buffer("to", to, bytes.byteLength);
    if (bytes.byteLength === 0) return;
    this.#flush();
    if (wordwise(to, bytes.byteLength)) return this.#recorder.write(target, to.byteOffset, bytes);
    const block = this.allocate(bytes.byteLength, "scratch");
    this.upload(at(block), bytes);
    this.copy(at(block), to, bytes.byteLength);
    this.free(block);
  }

  copy(from: backend.Slice, to: backend.Slice, byteLength: number): void {
    const source = this.#buffer("from", from, byteLength, 2);
    const target = this.#buffer("to", to, byteLength, 2);
    if (byteLength === 0) return;
    this.#flush();
    if (from.byteOffset % 4 === 0 && from.block !== to.block && wordwise(to, byteLength)) {
      return this.#recorder.copy(source, from.byteOffset, target, to.byteOffset, align4(byteLength));
    }
    // Halves of words: a fold of nothing copies them, in rows as long as a binding allows wherever they begin.
    const most = this.#bindingBytes - this.#alignment - 8;
    for (let start = 0; start < byteLength; start += most) {
      const columns = Math.min(most, byteLength - start) / 2;
      const base = after(from, start);
      const shape = { dtype: "f16", rows: 1, columns, stride: columns, rank: 0 } as const;
      this.#foldRows({ ...shape, out: after(to, start), base, left: at(from.block), right: at(from.block) }, 0, 1);
    }
  }

  async read(from: backend.Slice, byteLength: number): Promise<Uint8Array<ArrayBuffer>> {
    const source = this.#buffer("at", from, byteLength);
    this.#flush();
    return this.#recorder.read(source, from.byteOffset, byteLength);
  }

  expand({ dtype, rank, rows, width, add, out, coefficients, basis }: backend.ExpandJob): void {
    if (rank === 0 || width === 0) return;
    this.#add({
      ...{ entry: "expand", dtype, count: rank, rows, width, add },
      ranges: [
        { name: "out", slice: out, byteLength: 4 * rank * width },
        { name: "coefficients", slice: coefficients, byteLength: 4 * rank * rows },
        { name: "basis", slice: basis, byteLength: tensorBytes(dtype, rows, width) },
      ],
      workgroups: Math.ceil(width / LANES) * Math.ceil(rank / ROWS),
    });
  }

  project({ count, rows, width, out, x, basis }: backend.ProjectJob): void {
    if (count === 0 || rows === 0) return;
    this.#add({
      ...{ entry: "project", dtype: "f32", count, rows, width },
      ranges: [
        { name: "out", slice: out, byteLength: 4 * count * rows },
        { name: "x", slice: x, byteLength: 4 * count * width },
        { name: "basis", slice: basis, byteLength: 4 * rows * width },
      ],
      workgroups: rows * Math.ceil(count / ROWS),
    });
  }

  /** @throws BackendError when a kernel cannot see one of the job's tensors, RangeError when one is not whole */
  #add(job: ComponentsJob): void {
    for (const range of job.ranges) {
      checkSlice(range.name, range.slice, range.byteLength, 4);
      this.#checkVisible(range);
    }
    const covered = this.#widened(job);
    if (!covered) this.#flush();
    this.#covered = covered ?? job.ranges;
    this.#jobs.push(job);
  }

  /** The ranges that the jobs cover with one more; undefined where it cannot go with those that are waiting. */
  #widened(job: ComponentsJob): ByteRange[] | undefined {
    const covered = this.#covered;
    const [first] = this.#jobs;
    if (first?.entry !== job.entry || first.dtype !== job.dtype) return undefined;
    if (job.ranges.some(({ slice }, i) => slice.block !== covered[i]!.slice.block)) return undefined;
    // An input in the block of the result is copied when it is bound, so this job could not change it afterwards.
    // Offsets of results only grow, so no two results overlap.
    const [out, ...inputs] = job.ranges as [ByteRange, ...ByteRange[]];
    const { block, byteOffset } = out.slice;
    if (inputs.some(({ slice }) => slice.block === block) || byteOffset < end(covered[0]!)) return undefined;
    const wider = job.ranges.map((range, i) => union(covered[i]!, range));
    return wider.every(({ byteLength }) => byteLength + this.#alignment <= this.#bindingBytes) ? wider : undefined;
  }

  /** Records the jobs that wait. */
  #flush(): void {
    const jobs = this.#jobs;
    const covered = this.#covered;
    const [first] = jobs;
    if (!first) return;
    this.#jobs = [];
    const bound = covered.map(({ name, slice, byteLength }, i) =>
      this.#bind(name, slice, byteLength, i > 0 ? covered[0]!.slice : undefined),
    );
    let workgroups = 0;
    const words = jobs.flatMap(({ dtype, count, rows, width, add, ...job }) => {
      workgroups += job.workgroups;
      const starts = job.ranges.map(({ slice }, i) => bound[i]!.at + slice.byteOffset - covered[i]!.slice.byteOffset);
      const packed = starts[2]! + scaleBytes(dtype, rows);
      const places = [...starts.map((byte) => byte / 4), packed, rowBytes(dtype, width)];
      return [workgroups, count, rows, width, ...places, add ? 1 : 0];
    });
    this.#recorder.dispatch("components", first.entry, first.dtype, bound, words, workgroups);
  }

  fold(job: backend.FoldJob): void {
    const { dtype, rows, columns, stride, rank, out, base } = job;
    const size = rowBytes(dtype, 1);
    for (const [name, slice] of Object.entries({ out, base })) checkSlice(name, slice, weightBytes(job), size);
    if (rows === 0 || columns === 0) return;
    this.#flush();
    const rowSize = stride * size;
    if (rank === 0 && stride === columns && !job.rowScale && !job.columnScale) {
      if (!samePlace(out, base)) this.copy(base, out, rows * rowSize);
      return;
    }
    // An even number of rows, so that every part begins at the same half of a word; one row more is bound.
    const most = 2 * Math.floor((this.#bindingBytes - this.#alignment - rowSize) / rowSize / 2);
    const step = rows * rowSize + this.#alignment <= this.#bindingBytes ? rows : Math.max(2, most);
    for (let first = 0; first < rows; first += step) this.#foldRows(job, first, Math.min(rows, first + step));
  }

  #foldRows(job: backend.FoldJob, first: number, end: number): void {
    const { dtype, rows, columns, stride, rank, out, base, rowScale, columnScale } = job;
    const size = rowBytes(dtype, 1);
    // The last word may hold the first element of one row more.
    const bytes = ((Math.min(end + 1, rows) - first - 1) * stride + columns) * size;
    const part = (slice: backend.Slice): backend.Slice => after(slice, first * stride * size);
    const input = (name: string, slice: backend.Slice, length: number): Bound =>
      this.#bind(name, slice, 4 * length, out);
    const inPlace = samePlace(out, base);
    const target = this.#bind("out", part(out), bytes, undefined, size);
    const source = inPlace ? target : this.#bind("base", part(base), bytes, out, size);
    const left = input("left", job.left, rank * rows);
    const right = input("right", job.right, rank * columns);
    const scaleOfRow = rowScale ? input("rowScale", rowScale, rows) : left;
    const scaleOfColumn = columnScale ? input("columnScale", columnScale, columns) : left;
    const perWord = 4 / size;
    this.#recorder.dispatch(
      "fold",
      inPlace ? "fold_in_place" : "fold",
      dtype,
      [target, left, right, scaleOfRow, scaleOfColumn, ...(inPlace ? [] : [source])],
      [
        ...[rows, columns, stride, rank, first, end, target.at / size, source.at / size, left.at / 4, right.at / 4],
        ...[scaleOfRow.at / 4, scaleOfColumn.at / 4, (rowScale ? 1 : 0) + (columnScale ? 2 : 0)],
      ],
      Math.ceil((columns + perWord - 1) / (LANES * perWord)) * Math.ceil((end - first) / TILE_ROWS),
    );
  }

  scale(job: backend.ScaleJob): void {
    const { dtype, rows, columns, stride, rank, axis } = job;
    const length = axis === "rows" ? rows : columns;
    if (length === 0) return;
    this.#flush();
    const size = rowBytes(dtype, 1);
    const bind = (name: "left" | "right" | "magnitude", numbers: number): Bound =>
      this.#bind(name, job[name], 4 * numbers, job.out);
    const out = this.#bind("out", job.out, 4 * length);
    const base = this.#bind("base", job.base, weightBytes(job), job.out, size);
    const left = bind("left", rank * rows);
    const right = bind("right", rank * columns);
    const magnitude = bind("magnitude", length);
    const places = [out.at / 4, base.at / size, left.at / 4, right.at / 4, magnitude.at / 4];
    this.#recorder.dispatch(
      ...(["scale", `scale_${axis}`, dtype, [out, left, right, magnitude, base]] as const),
      [rows, columns, stride, rank, ...places],
      axis === "rows" ? rows : Math.ceil(columns / ACROSS),
    );
  }

  /**
   * @param apart the result, if this is an input: where both share a buffer, the kernel gets a copy
   * @throws BackendError when the slice is longer than a kernel can see, RangeError when it is not whole
   */
  #bind(name: string, slice: backend.Slice, byteLength: number, apart?: backend.Slice, align = 4): Bound {
    const from = this.#buffer(name, slice, byteLength, align);
    // A binding cannot be empty.
    const byteOffset = byteLength === 0 ? 0 : slice.byteOffset;
    const end = Math.max(align4(byteOffset + byteLength), 4);
    if (apart?.block === slice.block) {
      const start = byteOffset - (byteOffset % 4);
      const copied = this.#recorder.temporary(end - start);
      this.#recorder.copy(from, start, copied, 0, end - start);
      return { binding: { buffer: copied, offset: 0, size: end - start }, at: byteOffset - start };
    }
    this.#checkVisible({ name, slice, byteLength });
    const offset = byteOffset - (byteOffset % this.#alignment);
    return { binding: { buffer: from, offset, size: end - offset }, at: byteOffset - offset };
  }

  /** @throws BackendError when the range is longer than a kernel can see */
  #checkVisible({ name, slice, byteLength }: ByteRange): void {
    if (align4((slice.byteOffset % this.#alignment) + byteLength) <= this.#bindingBytes) return;
    throw new BackendError(
      `webgpu: ${name} has ${byteLength} bytes; a kernel of this device sees at most ${this.#bindingBytes}. ` +
        "Use a device with a larger maxStorageBufferBindingSize, or the wasm backend",
      { backend: "webgpu" },
    );
  }

  submit(): void {
    this.#flush();
    this.#recorder.submit();
  }

  async finish(): Promise<void> {
    this.#flush();
    await this.#recorder.finish();
  }

  /** Live bytes by owner; the caller's buffers are not counted. */
  memory(): Record<backend.Owner | "reserved", number> {
    const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved: this.#recorder.reserved };
    for (const [{ byteLength }, owner] of this.#owners) {
      total[owner] += byteLength;
      total.reserved += padded(byteLength) - byteLength;
    }
    return total;
  }

  close(): void {
    this.#jobs = [];
    this.#recorder.close();
    for (const block of this.#owners.keys()) this.free(block);
    this.#closeDevice();
  }
}

/** True if bytes can be written by whole words: up to a word's end, or into the padding at the block's. */
function wordwise({ byteOffset, block }: backend.Slice, byteLength: number): boolean {
  return byteOffset % 4 === 0 && (byteLength % 4 === 0 || byteOffset + byteLength === block.byteLength);
}

function samePlace(a: backend.Slice, b: backend.Slice): boolean {
  return a.block === b.block && a.byteOffset === b.byteOffset;
}

/** Whole words, and at least one vector, so that no binding is empty. */
function padded(byteLength: number): number {
  return Math.max(16, align4(byteLength));
}

function end({ slice, byteLength }: ByteRange): number {
  return slice.byteOffset + byteLength;
}

/** The range from the first byte of two to the last; both are of one block. */
function union(a: ByteRange, b: ByteRange): ByteRange {
  if (a.byteLength === 0 || b.byteLength === 0) return a.byteLength === 0 ? b : a;
  const byteOffset = Math.min(a.slice.byteOffset, b.slice.byteOffset);
  const byteLength = Math.max(end(a), end(b)) - byteOffset;
  return { name: a.name, slice: at(a.slice.block, byteOffset), byteLength };
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

/**
 * Records kernels and copies, and keeps what a repeated dispatch needs: pipelines, bind groups, parameters. Knows
 * buffers and shaders, not what they are for.
 */
class Recorder {
  readonly faults: Faults;
  readonly #device: GPUDevice;
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

  constructor(
    device: backend.DeviceHandle,
    modules: ReadonlyMap<string, GPUShaderModule>,
    timeout: number | undefined,
  ) {
    this.#device = device as GPUDevice;
    this.faults = new Faults(device, timeout);
    this.#modules = modules;
  }

  /** Bytes of jobs. */
  get reserved(): number {
    return this.#slotBuffers.length * SLOTS * SLOT_BYTES + this.#ownSlotBytes;
  }

  /** A zeroed buffer of `size` bytes, a multiple of 4. Lack of memory is reported by `finish`, and to `refused`. */
  create(label: string, size: number, usage: number, refused?: () => void): GPUBuffer {
    const make = (): GPUBuffer => this.#device.createBuffer({ label, size, usage });
    return this.faults.guard(`${label} of ${size} bytes`, make, refused);
  }

  /** A buffer for a block's bytes that lives until the commands recorded next are submitted. */
  temporary(size: number): GPUBuffer {
    const buffer = this.create("eigenlora temporary", size, BLOCK_USAGE);
    this.#temporaries.push(buffer);
    return buffer;
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

  /**
   * Records a kernel.
   * @param dtype of the shader's FORMAT
   * @param bound buffers by binding, from 1
   * @param job 32-bit words: the shader's `Job`, or several of them in a row
   * @param count workgroups
   */
  dispatch(
    shader: keyof typeof shaders,
    entry: string,
    dtype: Dtype,
    bound: readonly Bound[],
    job: readonly number[],
    count: number,
  ): void {
    if (count === 0) return;
    const bindings = bound.map(({ binding }) => binding);
    const ids = bindings.map(({ buffer }) => this.#idOf(buffer));
    const places = bindings.map(({ offset, size }, i) => `${ids[i]}+${offset}:${size}`);
    const key = `${shader} ${entry} ${dtype} ${places.join(" ")} ${job.join(" ")}`;
    let prepared = this.#prepared.get(key);
    if (!prepared) {
      if (this.#prepared.size >= MAX_PREPARED) {
        this.submit();
        for (const [known, prepared] of this.#prepared) this.#forget(known, prepared);
      }
      const pipeline = this.#pipeline(shader, entry, DTYPES.indexOf(dtype));
      const slot = this.#slot(4 * job.length);
      this.#device.queue.writeBuffer(slot.buffer, slot.offset, Uint32Array.from(job));
      const label = `eigenlora ${entry}`;
      const entries = [{ buffer: slot.buffer, offset: slot.offset, size: 4 * job.length }, ...bindings].map(
        ({ buffer, offset, size }, binding) => ({ binding, resource: { buffer, offset, size } }),
      );
      const group = this.faults.guard(label, () =>
        this.#device.createBindGroup({ label, layout: pipeline.getBindGroupLayout(0), entries }),
      );
      prepared = { pipeline, group, slot, ids };
      this.#prepared.set(key, prepared);
    }
    this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" });
    this.#pass ??= this.#encoder.beginComputePass({ label: "eigenlora" });
    for (const { buffer } of bindings) this.#waiting.add(buffer);
    const y = Math.ceil(count / MAX_GROUPS);
    this.#pass.setPipeline(prepared.pipeline);
    this.#pass.setBindGroup(0, prepared.group);
    this.#pass.dispatchWorkgroups(Math.ceil(count / y), y);
  }

  #commands(...buffers: readonly GPUBuffer[]): GPUCommandEncoder {
    this.#pass?.end();
    this.#pass = undefined;
    for (const buffer of buffers) this.#waiting.add(buffer);
    return (this.#encoder ??= this.#device.createCommandEncoder({ label: "eigenlora" }));
  }

  #pipeline(shader: string, entryPoint: string, format: number): GPUComputePipeline {
    const label = `eigenlora ${shader} ${entryPoint} ${format}`;
    const known = this.#pipelines.get(label);
    if (known) return known;
    const compute = { module: this.#modules.get(shader)!, entryPoint, constants: { FORMAT: format } };
    const make = (): GPUComputePipeline => this.#device.createComputePipeline({ label, layout: "auto", compute });
    const pipeline = this.faults.guard(label, make);
    this.#pipelines.set(label, pipeline);
    return pipeline;
  }

  #slot(bytes: number): Slot {
    const own = bytes > SLOT_BYTES;
    if (!own && this.#slots.length > 0) return this.#slots.pop()!;
    const size = own ? bytes : SLOTS * SLOT_BYTES;
    const buffer = this.create("eigenlora jobs", size, UNIFORM | STORAGE | COPY_DST);
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
      this.faults.guard("submit", () => this.#device.queue.submit([encoder.finish({ label: "eigenlora" })]));
    }
    const done = this.#temporaries;
    this.#temporaries = [];
    for (const buffer of done) {
      this.forget(buffer);
      buffer.destroy();
    }
  }

  /** Submits, and resolves when the device is done. @throws BackendError with what went wrong since the last call */
  async finish(): Promise<void> {
    this.submit();
    await this.faults.wait(this.#device.queue.onSubmittedWorkDone());
  }

  /** `size` bytes from `offset`, after everything recorded. */
  async read(from: GPUBuffer, offset: number, size: number): Promise<Uint8Array<ArrayBuffer>> {
    const start = offset - (offset % 4);
    const whole = align4(offset + size - start);
    if (whole === 0) return new Uint8Array(0);
    const buffer = this.create("eigenlora read", whole, MAP_READ | COPY_DST);
    try {
      this.#commands(from).copyBufferToBuffer(from, start, buffer, 0, whole);
      this.submit();
      await this.faults.wait(buffer.mapAsync(MAP_READ));
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

const ADVICE = "Make a new runtime";

/** A device that has not answered by then is taken for lost. Software adapters need seconds for large weights. */
const TIMEOUT = 60_000;

/**
 * @throws BackendError when there is no WebGPU, no adapter, the adapter gives no device, or does not answer
 * @throws TypeError when the given device is none
 */
async function openDevice({ device: given, timeout = TIMEOUT }: WebgpuOptions) {
  if (given) {
    const { adapterInfo, createShaderModule } = given as GPUDevice;
    if (typeof createShaderModule !== "function") throw new TypeError("webgpu: device: expected a WebGPU device");
    return { device: given, description: describe(adapterInfo), close() {} };
  }
  try {
    const gpu = ((globalThis.navigator as Navigator | undefined)?.gpu ?? (await openDawn?.())) as GPU | undefined;
    if (!gpu) throw new Error("this browser has no WebGPU, or the page is not served over https");
    const asked = gpu.requestAdapter({ powerPreference: "high-performance" });
    const adapter = await inTime(asked, timeout, "the adapter");
    if (!adapter)
      throw new Error("there is no adapter; a driver may be missing, or the browser may have WebGPU disabled");
    // Limits are raised only where they decide which weights fit: the size of a buffer, and how much of it a kernel
    // sees.
    const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
    const requested = adapter.requestDevice({
      label: "eigenlora",
      requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
    });
    const device = await inTime(requested, timeout, "the device");
    return { device, description: describe(adapter.info), close: () => device.destroy() };
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

/**
 * Collects errors of a device. Error scopes are opened and closed within one call, so that a user's own stay in order.
 */
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

  constructor(device: backend.DeviceHandle, timeout: number = TIMEOUT) {
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
async function compile(device: backend.DeviceHandle, label: string, code: string): Promise<GPUShaderModule> {
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

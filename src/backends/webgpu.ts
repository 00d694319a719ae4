/**
 * The WebGPU backend: the kernels of `kernels/` on buffers of a device. Operations are recorded, and `finish` submits them
 * at once. Blocks are buffers of their own; what crosses the bus is what is uploaded and read.
 */
/// <reference types="@webgpu/types" />

import { BackendError } from "../errors.ts";
import { align4, DTYPES, type Dtype, rowBytes, scaleBytes, tensorBytes } from "../tensor/dtypes.ts";
import {
  after,
  at,
  type Backend,
  type Block,
  checkLength,
  checkSlice,
  type DeviceBuffer,
  type DeviceHandle,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ProjectJob,
  type ScaleJob,
  type Slice,
  weightBytes,
} from "./backend.ts";
import { type Binding, createRecorder, type DeviceOptions, openDevice, type Recorder } from "./webgpu-recorder.ts";

export interface WebgpuOptions extends DeviceOptions {
  /** Most bytes that a kernel sees of one buffer, if less than the device allows: larger weights are folded in parts. */
  readonly bindingBytes?: number;
}

/** Sizes of the kernels: columns or words of a workgroup; rows of a fold's tile; rows of an expansion or projection; columns of a norm. */
const LANES = 64;
const TILE_ROWS = 8;
const ROWS = 8;
const ACROSS = 16;

/**
 * A backend on the device given, or on one of the system's.
 * @throws BackendError when there is no WebGPU, no adapter, no device, or a shader is refused
 */
export async function createWebgpuBackend(options: WebgpuOptions = {}): Promise<Backend> {
  const opened = await openDevice(options);
  return new WebgpuBackend(opened, await createRecorder(opened.device, options.timeout), options.bindingBytes);
}

class WebgpuBackend implements Backend {
  readonly name = "webgpu";
  readonly variant: string;
  readonly device: DeviceHandle;
  readonly lost: Promise<Error>;
  readonly #recorder: Recorder;
  readonly #blocks: Blocks;
  readonly #batch: Batch;
  readonly #closeDevice: () => void;

  constructor(
    { device, description, close }: Awaited<ReturnType<typeof openDevice>>,
    recorder: Recorder,
    bindingBytes = Infinity,
  ) {
    const { limits } = device as GPUDevice;
    this.variant = description;
    this.device = device;
    this.lost = recorder.lost;
    this.#recorder = recorder;
    this.#closeDevice = close;
    this.#blocks = new Blocks(recorder, {
      bindingBytes: Math.min(bindingBytes, limits.maxStorageBufferBindingSize),
      alignment: limits.minStorageBufferOffsetAlignment,
      bufferBytes: limits.maxBufferSize,
    });
    this.#batch = new Batch(recorder, this.#blocks);
  }

  allocate(byteLength: number, owner: Owner): Block {
    return this.#blocks.allocate(byteLength, owner);
  }

  adopt(buffer: DeviceBuffer): Block {
    return this.#blocks.adopt(buffer);
  }

  free(block: Block): void {
    this.#batch.flush();
    this.#blocks.free(block);
  }

  upload(to: Slice, bytes: Uint8Array): void {
    const target = this.#blocks.held("to", to);
    checkSlice("to", to, bytes.byteLength);
    if (bytes.byteLength === 0) return;
    this.#batch.flush();
    if (wordwise(to, bytes.byteLength)) return this.#recorder.write(target, to.byteOffset, bytes);
    const block = this.allocate(bytes.byteLength, "scratch");
    this.upload(at(block), bytes);
    this.copy(at(block), to, bytes.byteLength);
    this.free(block);
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    const source = this.#blocks.held("from", from);
    const target = this.#blocks.held("to", to);
    checkSlice("from", from, byteLength, 2);
    checkSlice("to", to, byteLength, 2);
    if (byteLength === 0) return;
    this.#batch.flush();
    if (from.byteOffset % 4 === 0 && from.block !== to.block && wordwise(to, byteLength)) {
      return this.#recorder.copy(source, from.byteOffset, target, to.byteOffset, align4(byteLength));
    }
    // Halves of words: a fold of nothing copies them, in rows as long as a binding allows wherever they begin.
    const { bindingBytes, alignment } = this.#blocks.limits;
    const most = bindingBytes - alignment - 8;
    for (let start = 0; start < byteLength; start += most) {
      const columns = Math.min(most, byteLength - start) / 2;
      const base = after(from, start);
      const shape = { dtype: "f16", rows: 1, columns, stride: columns, rank: 0 } as const;
      this.#foldRows({ ...shape, out: after(to, start), base, left: at(from.block), right: at(from.block) }, 0, 1);
    }
  }

  async read(from: Slice, byteLength: number): Promise<Uint8Array<ArrayBuffer>> {
    const source = this.#blocks.held("at", from);
    checkSlice("at", from, byteLength);
    this.#batch.flush();
    return this.#recorder.read(source, from.byteOffset, byteLength);
  }

  expand(job: ExpandJob): void {
    const { dtype, rank, rows, width, add } = job;
    if (rank === 0 || width === 0) return;
    this.#batch.add({
      ...{ entry: "expand", dtype, count: rank, rows, width, add },
      out: { name: "out", slice: job.out, byteLength: 4 * rank * width },
      numbers: { name: "coefficients", slice: job.coefficients, byteLength: 4 * rank * rows },
      basis: { name: "basis", slice: job.basis, byteLength: tensorBytes(dtype, rows, width) },
      workgroups: Math.ceil(width / LANES) * Math.ceil(rank / ROWS),
    });
  }

  project(job: ProjectJob): void {
    const { count, rows, width } = job;
    if (count === 0 || rows === 0) return;
    this.#batch.add({
      ...{ entry: "project", dtype: "f32", count, rows, width },
      out: { name: "out", slice: job.out, byteLength: 4 * count * rows },
      numbers: { name: "x", slice: job.x, byteLength: 4 * count * width },
      basis: { name: "basis", slice: job.basis, byteLength: 4 * rows * width },
      workgroups: rows * Math.ceil(count / ROWS),
    });
  }

  fold(job: FoldJob): void {
    const { dtype, rows, columns, stride, rank, out, base } = job;
    const size = rowBytes(dtype, 1);
    for (const [name, slice] of Object.entries({ out, base })) checkSlice(name, slice, weightBytes(job), size);
    if (rows === 0 || columns === 0) return;
    this.#batch.flush();
    const rowSize = stride * size;
    if (rank === 0 && stride === columns && !job.rowScale && !job.columnScale) {
      if (!samePlace(out, base)) this.copy(base, out, rows * rowSize);
      return;
    }
    // An even number of rows, so that every part begins at the same half of a word; one row more is bound.
    const { bindingBytes, alignment } = this.#blocks.limits;
    const most = 2 * Math.floor((bindingBytes - alignment - rowSize) / rowSize / 2);
    const step = rows * rowSize + alignment <= bindingBytes ? rows : Math.max(2, most);
    for (let first = 0; first < rows; first += step) this.#foldRows(job, first, Math.min(rows, first + step));
  }

  #foldRows(job: FoldJob, first: number, end: number): void {
    const { dtype, rows, columns, stride, rank, out, base, rowScale, columnScale } = job;
    const size = rowBytes(dtype, 1);
    // The last word may hold the first element of one row more.
    const bytes = ((Math.min(end + 1, rows) - first - 1) * stride + columns) * size;
    const part = (slice: Slice): Slice => after(slice, first * stride * size);
    const input = (name: string, slice: Slice, length: number): Bound =>
      this.#blocks.bind(name, slice, 4 * length, out);
    const inPlace = samePlace(out, base);
    const target = this.#blocks.bind("out", part(out), bytes, undefined, size);
    const source = inPlace ? target : this.#blocks.bind("base", part(base), bytes, out, size);
    const left = input("left", job.left, rank * rows);
    const right = input("right", job.right, rank * columns);
    const scaleOfRow = rowScale ? input("rowScale", rowScale, rows) : left;
    const scaleOfColumn = columnScale ? input("columnScale", columnScale, columns) : left;
    const perWord = 4 / size;
    const inputs = [left, right, scaleOfRow, scaleOfColumn, ...(inPlace ? [] : [source])];
    this.#recorder.dispatch({
      shader: "fold",
      entry: inPlace ? "fold_in_place" : "fold",
      format: DTYPES.indexOf(dtype),
      bindings: [target, ...inputs].map(({ binding }) => binding),
      job: [
        ...[rows, columns, stride, rank, first, end, target.at / size, source.at / size, left.at / 4, right.at / 4],
        ...[scaleOfRow.at / 4, scaleOfColumn.at / 4, (rowScale ? 1 : 0) + (columnScale ? 2 : 0)],
      ],
      count: Math.ceil((columns + perWord - 1) / (LANES * perWord)) * Math.ceil((end - first) / TILE_ROWS),
    });
  }

  scale(job: ScaleJob): void {
    const { dtype, rows, columns, stride, rank, axis } = job;
    const length = axis === "rows" ? rows : columns;
    if (length === 0) return;
    this.#batch.flush();
    const size = rowBytes(dtype, 1);
    const bind = (name: "left" | "right" | "magnitude", numbers: number): Bound =>
      this.#blocks.bind(name, job[name], 4 * numbers, job.out);
    const out = this.#blocks.bind("out", job.out, 4 * length);
    const base = this.#blocks.bind("base", job.base, weightBytes(job), job.out, size);
    const left = bind("left", rank * rows);
    const right = bind("right", rank * columns);
    const magnitude = bind("magnitude", length);
    this.#recorder.dispatch({
      shader: "scale",
      entry: `scale_${axis}`,
      format: DTYPES.indexOf(dtype),
      bindings: [out, left, right, magnitude, base].map(({ binding }) => binding),
      job: [
        ...[rows, columns, stride, rank],
        ...[out.at / 4, base.at / size, left.at / 4, right.at / 4, magnitude.at / 4],
      ],
      count: axis === "rows" ? rows : Math.ceil(columns / ACROSS),
    });
  }

  submit(): void {
    this.#batch.flush();
    this.#recorder.submit();
  }

  async finish(): Promise<void> {
    this.#batch.flush();
    await this.#recorder.finish();
  }

  memory(): Record<Owner | "reserved", number> {
    return this.#blocks.memory();
  }

  close(): void {
    this.#recorder.close();
    this.#blocks.close();
    this.#closeDevice();
  }
}

/** True if bytes can be written by whole words: up to a word's end, or into the padding at the block's. */
function wordwise({ byteOffset, block }: Slice, byteLength: number): boolean {
  return byteOffset % 4 === 0 && (byteLength % 4 === 0 || byteOffset + byteLength === block.byteLength);
}

function samePlace(a: Slice, b: Slice): boolean {
  return a.block === b.block && a.byteOffset === b.byteOffset;
}

/**
 * The blocks of the WebGPU backend: buffers of its own and of the caller's, whose bytes they count as, how a kernel sees a part of one; and
 * jobs of one kernel on their way to one dispatch.
 */
/// <reference types="@webgpu/types" />

/** View of a slice in a kernel: a binding, and the slice's first byte in it. */
interface Bound {
  readonly binding: Binding;
  readonly at: number;
}

interface Limits {
  /** Most bytes that a kernel sees of one buffer. */
  readonly bindingBytes: number;
  /** A binding's first byte is a multiple of it. */
  readonly alignment: number;
  readonly bufferBytes: number;
}

/** Usages that kernels and copies need: COPY_SRC, COPY_DST and STORAGE of GPUBufferUsage. */
const USAGE = 4 | 8 | 128;

class Blocks {
  readonly limits: Limits;
  readonly #recorder: Recorder;
  readonly #owners = new Map<Block, Owner>();
  /** Blocks by buffer; those of the caller's buffers are kept as long as the caller keeps these. */
  readonly #byBuffer = new WeakMap<DeviceBuffer, Block>();

  constructor(recorder: Recorder, limits: Limits) {
    this.#recorder = recorder;
    this.limits = limits;
  }

  allocate(byteLength: number, owner: Owner): Block {
    checkLength(byteLength);
    const size = padded(byteLength);
    if (size > this.limits.bufferBytes) {
      throw new BackendError(
        `webgpu: no memory for ${byteLength} bytes (${owner}); ` +
          `a buffer of this device has at most ${this.limits.bufferBytes}`,
        { backend: "webgpu" },
      );
    }
    const state = { refused: false };
    const device = this.#recorder.create(`eigenlora ${owner}`, size, () => (state.refused = true));
    const block: Block = Object.assign(state, { byteLength, device });
    this.#byBuffer.set(device, block);
    this.#owners.set(block, owner);
    return block;
  }

  /** Finds or makes the block of a buffer. @throws TypeError when kernels cannot use it */
  adopt(buffer: DeviceBuffer): Block {
    const known = this.#byBuffer.get(buffer);
    if (known) return known;
    const { size, usage, label } = buffer as GPUBuffer;
    if (size % 4 !== 0 || (usage & USAGE) !== USAGE) {
      throw new TypeError(
        `webgpu: the buffer "${label}" cannot be folded into: it has ${size} bytes and usage ${usage}; ` +
          "expected a multiple of 4 and STORAGE | COPY_SRC | COPY_DST",
      );
    }
    const block = { byteLength: size, device: buffer };
    this.#byBuffer.set(buffer, block);
    return block;
  }

  free(block: Block): void {
    const buffer = block.device as GPUBuffer | undefined;
    if (!buffer || this.#byBuffer.get(buffer) !== block) return;
    this.#byBuffer.delete(buffer);
    this.#recorder.forget(buffer);
    if (this.#owners.delete(block)) buffer.destroy();
  }

  /** @throws TypeError when the slice's block is none of these */
  held(name: string, { block }: Slice): GPUBuffer {
    const { device } = block;
    if (device && this.#byBuffer.get(device) === block) return device as GPUBuffer;
    throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
  }

  /**
   * @param apart the result, if this is an input: where both share a buffer, the kernel gets a copy
   * @throws BackendError when the slice is longer than a kernel can see, RangeError when it is not whole
   */
  bind(name: string, slice: Slice, byteLength: number, apart?: Slice, align = 4): Bound {
    const from = this.held(name, slice);
    checkSlice(name, slice, byteLength, align);
    let { byteOffset } = slice;
    // A binding cannot be empty.
    if (byteLength === 0) byteOffset = 0;
    const end = Math.max(align4(byteOffset + byteLength), 4);
    if (apart?.block === slice.block) {
      const start = byteOffset - (byteOffset % 4);
      const copied = this.#recorder.temporary(end - start);
      this.#recorder.copy(from, start, copied, 0, end - start);
      return { binding: { buffer: copied, offset: 0, size: end - start }, at: byteOffset - start };
    }
    this.checkVisible(name, slice, byteLength);
    const offset = byteOffset - (byteOffset % this.limits.alignment);
    return { binding: { buffer: from, offset, size: end - offset }, at: byteOffset - offset };
  }

  /** @throws BackendError when the slice is longer than a kernel can see */
  checkVisible(name: string, { byteOffset }: Slice, byteLength: number): void {
    const { bindingBytes, alignment } = this.limits;
    if (align4((byteOffset % alignment) + byteLength) <= bindingBytes) return;
    throw new BackendError(
      `webgpu: ${name} has ${byteLength} bytes; a kernel of this device sees at most ${bindingBytes}. ` +
        "Use a device with a larger maxStorageBufferBindingSize, or the wasm backend",
      { backend: "webgpu" },
    );
  }

  /** Live bytes by owner; the caller's buffers are not counted. */
  memory(): Record<Owner | "reserved", number> {
    const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved: this.#recorder.reserved };
    for (const [{ byteLength }, owner] of this.#owners) {
      total[owner] += byteLength;
      total.reserved += padded(byteLength) - byteLength;
    }
    return total;
  }

  close(): void {
    for (const block of this.#owners.keys()) this.free(block);
  }
}

/** Whole words, and at least one vector, so that no binding is empty. */
function padded(byteLength: number): number {
  return Math.max(16, align4(byteLength));
}

/** A job of kernels/components.wgsl: `count` rows of numbers and a tensor [rows, width] make `out`. */
interface BatchJob {
  readonly entry: "expand" | "project";
  readonly dtype: Dtype;
  readonly count: number;
  readonly rows: number;
  readonly width: number;
  readonly out: ByteRange;
  /** Coefficients of expand, x of project. */
  readonly numbers: ByteRange;
  readonly basis: ByteRange;
  readonly add?: boolean | undefined;
  readonly workgroups: number;
}

/** Bytes of a slice, and what they are called in errors. */
interface ByteRange {
  readonly name: string;
  readonly slice: Slice;
  readonly byteLength: number;
}

const ROLES = ["out", "numbers", "basis"] as const;

class Batch {
  readonly #recorder: Recorder;
  readonly #blocks: Blocks;
  #jobs: BatchJob[] = [];
  /** Ranges of each buffer that the jobs cover. */
  #covered: Record<(typeof ROLES)[number], ByteRange> | undefined;

  constructor(recorder: Recorder, blocks: Blocks) {
    this.#recorder = recorder;
    this.#blocks = blocks;
  }

  /** @throws BackendError when a kernel cannot see one of the job's tensors, RangeError when one is not whole */
  add(job: BatchJob): void {
    for (const role of ROLES) {
      const { name, slice, byteLength } = job[role];
      checkSlice(name, slice, byteLength, 4);
      this.#blocks.checkVisible(name, slice, byteLength);
    }
    if (!this.#widen(job)) {
      this.flush();
      this.#covered = { out: job.out, numbers: job.numbers, basis: job.basis };
    }
    this.#jobs.push(job);
  }

  /** Makes room for a job, if it can go with those that are waiting. */
  #widen(job: BatchJob): boolean {
    const covered = this.#covered;
    const first = this.#jobs[0];
    if (!covered || !first || first.entry !== job.entry || first.dtype !== job.dtype) return false;
    if (ROLES.some((role) => covered[role].slice.block !== job[role].slice.block)) return false;
    // An input in the block of the result is copied when it is bound, so this job could not change it afterwards. Offsets of results only grow,
    // so no two results overlap.
    const { block, byteOffset } = job.out.slice;
    if (block === job.numbers.slice.block || block === job.basis.slice.block || byteOffset < end(covered.out))
      return false;
    const { bindingBytes, alignment } = this.#blocks.limits;
    const wider = {
      out: union(covered.out, job.out),
      numbers: union(covered.numbers, job.numbers),
      basis: union(covered.basis, job.basis),
    };
    if (ROLES.some((role) => wider[role].byteLength + alignment > bindingBytes)) return false;
    this.#covered = wider;
    return true;
  }

  /** Records what is waiting. */
  flush(): void {
    const jobs = this.#jobs;
    const covered = this.#covered;
    if (!covered) return;
    this.#jobs = [];
    this.#covered = undefined;
    const bound = ROLES.map((role) => {
      const { name, slice, byteLength } = covered[role];
      const { binding, at } = this.#blocks.bind(
        name,
        slice,
        byteLength,
        role === "out" ? undefined : covered.out.slice,
      );
      return { binding, blockStart: at - slice.byteOffset };
    });
    let workgroups = 0;
    const words: number[] = [];
    for (const { dtype, count, rows, width, add, ...job } of jobs) {
      workgroups += job.workgroups;
      const starts = ROLES.map((role, i) => bound[i]!.blockStart + job[role].slice.byteOffset);
      const packed = starts[2]! + scaleBytes(dtype, rows);
      words.push(
        workgroups,
        count,
        rows,
        width,
        ...starts.map((byte) => byte / 4),
        packed,
        rowBytes(dtype, width),
        add ? 1 : 0,
      );
    }
    const { entry, dtype } = jobs[0]!;
    const format = DTYPES.indexOf(dtype);
    this.#recorder.dispatch({
      shader: "components",
      entry,
      format,
      bindings: bound.map((b) => b.binding),
      job: words,
      count: workgroups,
    });
  }
}

function end({ slice, byteLength }: ByteRange): number {
  return slice.byteOffset + byteLength;
}

function union(a: ByteRange, b: ByteRange): ByteRange {
  if (a.byteLength === 0) return b;
  if (b.byteLength === 0) return a;
  const byteOffset = Math.min(a.slice.byteOffset, b.slice.byteOffset);
  return {
    name: a.name,
    slice: { block: a.slice.block, byteOffset },
    byteLength: Math.max(end(a), end(b)) - byteOffset,
  };
}

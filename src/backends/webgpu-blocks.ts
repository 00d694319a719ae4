/**
 * The blocks of the WebGPU backend: buffers of its own and of the caller's, whose bytes they count as, how a kernel sees a part of one; and
 * jobs of one kernel on their way to one dispatch.
 */
/// <reference types="@webgpu/types" />
import { BackendError } from "../errors.ts";
import { align4, DTYPES, type Dtype, rowBytes, scaleBytes } from "../tensor/dtypes.ts";
import { type Block, checkCount, type DeviceBuffer, type Owner, type Slice } from "./backend.ts";
import type { Binding, Held, Recorder } from "./webgpu-recorder.ts";

/** What a kernel sees of a slice: a binding, and the slice's first byte in it. */
export interface Bound {
  readonly binding: Binding;
  readonly at: number;
}

export interface Limits {
  /** Most bytes that a kernel sees of one buffer. */
  readonly bindingBytes: number;
  /** A binding's first byte is a multiple of it. */
  readonly alignment: number;
  readonly bufferBytes: number;
}

/** What kernels and copies need of a buffer: COPY_SRC, COPY_DST and STORAGE of GPUBufferUsage. */
const USAGE = 4 | 8 | 128;

export class Blocks {
  readonly limits: Limits;
  readonly #recorder: Recorder;
  readonly #held = new Map<Block, Held & { readonly owner: Owner }>();
  /** The caller's, kept as long as the caller keeps them. */
  readonly #adopted = new WeakMap<Block, Held>();
  readonly #gone = new FinalizationRegistry<number>((id) => this.#recorder.forget({ id }));
  readonly #byBuffer = new WeakMap<DeviceBuffer, Block>();

  constructor(recorder: Recorder, limits: Limits) {
    this.#recorder = recorder;
    this.limits = limits;
  }

  allocate(byteLength: number, owner: Owner): Block {
    checkCount("byteLength", byteLength, Number.MAX_SAFE_INTEGER);
    const size = padded(byteLength);
    if (size > this.limits.bufferBytes) {
      throw new BackendError(
        `webgpu: no memory for ${byteLength} bytes (${owner}); ` +
          `a buffer of this device has at most ${this.limits.bufferBytes}`,
        { backend: "webgpu" },
      );
    }
    const state = { refused: false };
    const created = this.#recorder.create(`eigenlora ${owner}`, size, () => (state.refused = true));
    const block = this.#blockOf(created, byteLength, state);
    this.#held.set(block, { ...created, owner });
    return block;
  }

  #blockOf({ buffer }: Held, byteLength: number, state: { refused: boolean } = { refused: false }): Block {
    const block: Block = Object.assign(state, { byteLength, device: buffer });
    this.#byBuffer.set(buffer, block);
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
    const adopted = this.#recorder.adopt(buffer);
    const block = this.#blockOf(adopted, size);
    this.#adopted.set(block, adopted);
    this.#gone.register(buffer, adopted.id);
    return block;
  }

  free(block: Block): void {
    const own = this.#held.get(block);
    const found = own ?? this.#adopted.get(block);
    if (!found) return;
    this.#held.delete(block);
    this.#adopted.delete(block);
    this.#byBuffer.delete(found.buffer);
    this.#recorder.forget(found);
    own?.buffer.destroy();
  }

  /** @throws TypeError when the slice's block is none of these */
  held(name: string, { block }: Slice): Held {
    const found = this.#held.get(block) ?? this.#adopted.get(block);
    if (found === undefined) throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    return found;
  }

  /**
   * @param apart the result, if this is an input: where both share a buffer, the kernel gets a copy
   * @throws BackendError when the slice is longer than a kernel can see
   */
  bind(name: string, slice: Slice, byteLength: number, apart?: Slice): Bound {
    const from = this.held(name, slice);
    let { byteOffset } = slice;
    // A binding cannot be empty.
    if (byteLength === 0) byteOffset = 0;
    const end = Math.max(align4(byteOffset + byteLength), 4);
    if (apart?.block === slice.block) {
      const start = byteOffset - (byteOffset % 4);
      const copied = this.#recorder.temporary(end - start);
      this.#recorder.copy(from, start, copied, 0, end - start);
      return { binding: { held: copied, offset: 0, size: end - start }, at: byteOffset - start };
    }
    this.checkVisible(name, slice, byteLength);
    const offset = byteOffset - (byteOffset % this.limits.alignment);
    return { binding: { held: from, offset, size: end - offset }, at: byteOffset - offset };
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
    for (const [{ byteLength }, { owner }] of this.#held) {
      total[owner] += byteLength;
      total.reserved += padded(byteLength) - byteLength;
    }
    return total;
  }

  close(): void {
    for (const { buffer } of this.#held.values()) buffer.destroy();
    this.#held.clear();
  }
}

/** Whole words, and at least one vector, so that no binding is empty. */
function padded(byteLength: number): number {
  return Math.max(16, align4(byteLength));
}

/** A job of kernels/components.wgsl: `count` rows of numbers and a tensor [rows, width] make `out`. */
export interface BatchJob {
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
export interface ByteRange {
  readonly name: string;
  readonly slice: Slice;
  readonly byteLength: number;
}

const ROLES = ["out", "numbers", "basis"] as const;

export class Batch {
  readonly #recorder: Recorder;
  readonly #blocks: Blocks;
  #jobs: BatchJob[] = [];
  /** What the jobs cover of each buffer. */
  #covered: Record<(typeof ROLES)[number], ByteRange> | undefined;

  constructor(recorder: Recorder, blocks: Blocks) {
    this.#recorder = recorder;
    this.#blocks = blocks;
  }

  /** @throws BackendError when a kernel cannot see one of the job's tensors */
  add(job: BatchJob): void {
    for (const role of ROLES) this.#blocks.checkVisible(job[role].name, job[role].slice, job[role].byteLength);
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
    // Inputs that lie beside the result are copied when bound, as they are then; results go up, so that none meets another.
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

/**
 * The interface that every backend implements: memory in blocks, and a few operations on slices of blocks; the check
 * that slices stay in their blocks, and what backends of the CPU share. A backend knows nothing of packs, tasks,
 * modules or hosts. CPU backends run an operation when it is called; a GPU backend records it, and `finish` submits the
 * whole switch at once. Either way operations take effect in the order of the calls.
 *
 * All matrices are row-major. Factors are stored by rank: A as [rank, in] and B transposed, Bᵀ as [rank, out], so that
 * both factors expand from their bases in the same way and either orientation of a weight folds with the same loop.
 */
import { atOnce } from "../pace.ts";
import { type Dtype, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";

/** Counts bytes by what they are for, as `runtime.memory()` reports them. */
export type Owner = "basis" | "coefficients" | "pristine" | "active" | "scratch";

/** A WebGPU device, by structure, so that published types do not depend on WebGPU's. */
export interface DeviceHandle {
  readonly label: string;
  readonly limits: object;
  readonly queue: object;
  createBuffer(descriptor: never): object;
}

/** A GPU buffer, likewise. */
export interface DeviceBuffer {
  readonly size: number;
  readonly label: string;
  destroy(): void;
}

/** Memory held by a backend. Opaque but for its size and, on a device, the buffer that it is. */
export interface Block {
  readonly byteLength: number;
  readonly device?: DeviceBuffer;
  /** The device said later that it had no memory for it: free it and allocate again. */
  readonly refused?: boolean;
}

/** A place in a block. Byte offsets are multiples of 4 for f32, of 2 for f16 and bf16, of 4 for encoded tensors. */
export interface Slice {
  readonly block: Block;
  readonly byteOffset: number;
}

/** The beginning of a block, or a place in it. */
export function at(block: Block, byteOffset = 0): Slice {
  return { block, byteOffset };
}

/** Moves a place by some bytes. */
export function after({ block, byteOffset }: Slice, bytes: number): Slice {
  return { block, byteOffset: byteOffset + bytes };
}

/** out[i, :] = Σ_k coefficients[i, k] · basis[k, :], for i < rank and k < rows. */
export interface ExpandJob {
  /** f32 [rank, width]; overwritten, or added to. */
  readonly out: Slice;
  /** True if the sums are added to what `out` holds. */
  readonly add?: boolean | undefined;
  /** f32 [rank, rows]. A mean is the basis' last row with coefficient 1. */
  readonly coefficients: Slice;
  /**
   * One encoded tensor [rows, width] (`dtypes.ts`): scales first where the type has them, then rows of packed values.
   */
  readonly basis: Slice;
  readonly dtype: Dtype;
  readonly rank: number;
  readonly rows: number;
  readonly width: number;
}

/** out[i, k] = Σ_j x[i, j] · basis[k, j], for i < count, k < rows and j < width. */
export interface ProjectJob {
  /** f32 [count, rows]; overwritten. */
  readonly out: Slice;
  /** f32 [count, width]. */
  readonly x: Slice;
  /** f32 [rows, width]. */
  readonly basis: Slice;
  readonly count: number;
  readonly rows: number;
  readonly width: number;
}

/** base + leftᵀ·right, a weight of a task. */
export interface WeightJob {
  /** [rows, columns] of `dtype`, rows `stride` elements apart. */
  readonly base: Slice;
  readonly dtype: FloatDtype;
  readonly rows: number;
  readonly columns: number;
  /** Elements from one row to the next, ≥ columns. */
  readonly stride: number;
  /** f32 [rank, rows]. */
  readonly left: Slice;
  /** f32 [rank, columns]. */
  readonly right: Slice;
  /** ≥ 0. */
  readonly rank: number;
}

/**
 * out[i, j] = (base[i, j] + Σ_k left[k, i] · right[k, j]) · rowScale[i] · columnScale[j], computed in f32, rounded
 * once. Rank 0 copies base to out (times the scales).
 */
export interface FoldJob extends WeightJob {
  /** [rows, columns] like `base`. May be exactly `base`; must not overlap it otherwise. */
  readonly out: Slice;
  /** f32 [rows]; absent: ones. */
  readonly rowScale?: Slice | undefined;
  /** f32 [columns]; absent: ones. */
  readonly columnScale?: Slice | undefined;
}

/**
 * DoRA's scale of one axis: out[i] = magnitude[i] / ‖(base + leftᵀ·right)[i, :]‖₂ for axis "rows", over [:, j] for
 * "columns". Squares are accumulated in f64 where the backend has it. A zero norm gives 0. NaN stands for another scale
 * that is no normal f32: it would have lost digits, or all.
 */
export interface ScaleJob extends WeightJob {
  /** f32 [rows] or [columns]. */
  readonly out: Slice;
  /** f32, as long as `out`. */
  readonly magnitude: Slice;
  readonly axis: "rows" | "columns";
}

/** A backend on a device, as `webgpu()` of `eigenlora/webgpu` makes it. */
export interface DeviceBackend {
  readonly name: "webgpu";
  /** The caller's device, where one was given. */
  readonly device: DeviceHandle | undefined;
  /** @internal */
  readonly start: () => Promise<Backend>;
}

/** One way to hold and compute weights. Made by `createBackend`; freed by `close`. */
export interface Backend {
  readonly name: "js" | "wasm" | "webgpu";
  /** Which build runs: "scalar", "simd", "relaxed-simd"; for js "js"; for webgpu the adapter's name. */
  readonly variant: string;
  /**
   * Zeroed memory, 16-byte aligned, counted under `owner` until freed.
   * @throws BackendError when there is none left.
   */
  allocate(byteLength: number, owner: Owner): Block;
  free(block: Block): void;
  /** The block that a buffer of the device is; one of the caller's stays the caller's. Backends on a device have it. */
  adopt?(buffer: DeviceBuffer): Block;
  /** Copies `bytes` into the block. */
  upload(to: Slice, bytes: Uint8Array): void;
  /** Copies `byteLength` bytes from one place to another (they do not overlap). */
  copy(from: Slice, to: Slice, byteLength: number): void;
  /** Bytes as they lie in memory now. Valid until the next `allocate`. CPU backends have it. */
  view?(at: Slice, byteLength: number): Uint8Array;
  /** A copy of bytes, once all operations so far have taken effect. Backends without `view` have it. */
  read?(at: Slice, byteLength: number): Promise<Uint8Array>;
  expand(job: ExpandJob): void;
  project(job: ProjectJob): void;
  fold(job: FoldJob): void;
  scale(job: ScaleJob): void;
  /** The operations in pieces of some milliseconds: they yield where others may have a turn. CPU backends have them. */
  expanding?(job: ExpandJob): Generator<void>;
  folding?(job: FoldJob): Generator<void>;
  scaling?(job: ScaleJob): Generator<void>;
  /**
   * Hands what is recorded to the device and does not wait; what goes wrong is told by `finish`. CPU backends do not
   * have it.
   */
  submit?(): void;
  /** Resolves when all operations so far have taken effect. CPU backends return nothing. */
  finish(): Promise<void> | void;
  /** Live bytes by owner, and `reserved`: bytes held beyond them (allocator slack, wasm pages of code and stack). */
  memory(): Record<Owner | "reserved", number>;
  /** The device that it computes on. CPU backends do not have it. */
  readonly device?: DeviceHandle;
  /** Resolves, with the reason, when the backend's device is lost: its memory is gone. CPU backends do not have it. */
  readonly lost?: Promise<Error>;
  close(): void;
}

/** @throws RangeError unless `value` is a whole number from 0 on that a buffer may have as its length */
export function checkLength(value: number): void {
  if (!Number.isSafeInteger(value) || value < 0)
    throw new RangeError(`byteLength must be a whole number, got ${value}`);
}

/** @throws RangeError unless `byteLength` bytes from the slice lie in its block, at a multiple of `align` */
export function checkSlice(name: string, { block, byteOffset }: Slice, byteLength: number, align = 1): void {
  if (!(byteOffset >= 0) || byteOffset % align !== 0) {
    throw new RangeError(`${name}.byteOffset must be a multiple of ${align} ≥ 0, got ${byteOffset}`);
  }
  if (!(byteLength >= 0) || byteOffset + byteLength > block.byteLength) {
    throw new RangeError(
      `${name} needs ${byteLength} bytes from offset ${byteOffset}; its block has ${block.byteLength}`,
    );
  }
}

/** Bytes of weights from the first to the last element, gaps between rows included. */
export function weightBytes({ dtype, rows, columns, stride }: WeightJob): number {
  return rows === 0 ? 0 : rowBytes(dtype, (rows - 1) * stride + columns);
}

/** A tile of a matrix: its first row, how many rows, its first column, how many columns. */
type Tile = readonly [row: number, rows: number, column: number, columns: number];

/**
 * Divides a matrix, row by row, into tiles that take at most `most` products where each of its numbers takes `depth`:
 * whole rows where four of them are few enough, since kernels work on four at a time, else 32 columns and more, which
 * are whole bytes in every type.
 */
export function* tilesOf(rows: number, columns: number, depth: number, most: number): Generator<Tile> {
  // Numbers are moved where there are no products, too.
  const each = Math.max(8, depth);
  const isWhole = Math.min(rows, 4) * columns * each <= most;
  const wide = isWhole ? columns : Math.max(32, 32 * Math.floor(most / each / 128));
  const high = Math.max(4, 4 * Math.floor(most / each / wide / 4));
  for (let i = 0; i < rows; i += high)
    for (let j = 0; j < columns; j += wide) yield [i, Math.min(high, rows - i), j, Math.min(wide, columns - j)];
}

/** A backend whose blocks each have an `Address` in the CPU's memory. */
export abstract class CpuBackend<Address> implements Backend {
  abstract readonly name: "js" | "wasm";
  abstract readonly variant: string;
  readonly #blocks = new Map<Block, { readonly place: Address; readonly owner: Owner }>();

  abstract expanding(job: ExpandJob): Generator<void>;
  abstract project(job: ProjectJob): void;
  abstract folding(job: FoldJob): Generator<void>;
  abstract scaling(job: ScaleJob): Generator<void>;

  expand(job: ExpandJob): void {
    atOnce(this.expanding(job));
  }

  fold(job: FoldJob): void {
    atOnce(this.folding(job));
  }

  scale(job: ScaleJob): void {
    atOnce(this.scaling(job));
  }

  /** Zeroed bytes. @throws BackendError when there are none */
  protected abstract claim(byteLength: number, owner: Owner): Address;
  protected abstract release(place: Address, byteLength: number): void;
  protected abstract bytesAt(place: Address, byteOffset: number, byteLength: number): Uint8Array;
  /** Bytes held beyond those of blocks. */
  protected abstract beyond(blockBytes: number): number;

  allocate(byteLength: number, owner: Owner): Block {
    checkLength(byteLength);
    const place = this.claim(byteLength, owner);
    const block: Block = { byteLength };
    this.#blocks.set(block, { place, owner });
    return block;
  }

  free(block: Block): void {
    const held = this.#blocks.get(block);
    if (held && this.#blocks.delete(block)) this.release(held.place, block.byteLength);
  }

  /**
   * Where the block of a slice lies.
   * @throws TypeError when the block is not held, RangeError as `checkSlice`
   */
  protected place(name: string, slice: Slice, byteLength: number, align = 4): Address {
    const held = this.#blocks.get(slice.block);
    if (held === undefined) throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    checkSlice(name, slice, byteLength, align);
    return held.place;
  }

  protected bytes(name: string, slice: Slice, byteLength: number, align = 1): Uint8Array {
    return this.bytesAt(this.place(name, slice, byteLength, align), slice.byteOffset, byteLength);
  }

  upload(to: Slice, source: Uint8Array): void {
    this.bytes("to", to, source.byteLength).set(source);
  }

  copy(from: Slice, to: Slice, byteLength: number): void {
    const source = this.bytes("from", from, byteLength);
    const target = this.bytes("to", to, byteLength);
    target.set(source);
  }

  view(at: Slice, byteLength: number): Uint8Array {
    return this.bytes("at", at, byteLength);
  }

  finish(): void {}

  memory(): Record<Owner | "reserved", number> {
    const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved: 0 };
    let sum = 0;
    for (const [{ byteLength }, { owner }] of this.#blocks) {
      total[owner] += byteLength;
      sum += byteLength;
    }
    return { ...total, reserved: this.beyond(sum) };
  }

  close(): void {
    for (const block of this.#blocks.keys()) this.free(block);
  }
}

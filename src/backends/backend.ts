/**
 * The interface that every backend implements: memory in blocks, and a few operations on slices of blocks. A backend knows
 * nothing of packs, tasks, modules or hosts. CPU backends run an operation when it is called; a GPU backend records it, and
 * `finish` submits the whole switch at once. Either way operations take effect in the order of the calls.
 *
 * All matrices are row-major. Factors are stored by rank: A as [rank, in] and B transposed, Bᵀ as [rank, out], so that
 * both sides expand from their bases in the same way and either orientation of a weight folds with the same loop.
 */
import type { Dtype, FloatDtype } from "../tensor/dtypes.ts";

/** Whose bytes they are, as `runtime.memory()` reports them. */
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
  /** The device had no memory for it, as it said later: free it and allocate again. */
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

/** The place that many bytes behind another. */
export function after({ block, byteOffset }: Slice, bytes: number): Slice {
  return { block, byteOffset: byteOffset + bytes };
}

/** out[i, :] = Σ_k coefficients[i, k] · basis[k, :], for i < rank and k < rows. */
export interface ExpandJob {
  /** f32 [rank, width]; overwritten, or added to. */
  readonly out: Slice;
  /** Whether the sums are added to what `out` holds. */
  readonly add?: boolean | undefined;
  /** f32 [rank, rows]. A mean is the basis' last row with coefficient 1. */
  readonly coefficients: Slice;
  /** One encoded tensor [rows, width] (`dtypes.ts`): scales first where the type has them, then rows of packed values. */
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
  /** One encoded tensor [rows, width], as in `ExpandJob`. */
  readonly basis: Slice;
  readonly dtype: Dtype;
  readonly count: number;
  readonly rows: number;
  readonly width: number;
}

/** weight[i, j] = (base[i, j] + Σ_k left[k, i] · right[k, j]) · rowScale[i] · columnScale[j], computed in f32, rounded once. */
export interface FoldJob {
  /** [rows, columns] of `type`, rows `stride` elements apart. May be exactly `base`; must not overlap it otherwise. */
  readonly out: Slice;
  /** [rows, columns] of `type`, rows `stride` elements apart. */
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
  /** ≥ 0; 0 copies base to out (times the scales). */
  readonly rank: number;
  /** f32 [rows]; absent: ones. */
  readonly rowScale?: Slice | undefined;
  /** f32 [columns]; absent: ones. */
  readonly columnScale?: Slice | undefined;
}

/**
 * DoRA's scale of one axis: out[i] = magnitude[i] / ‖(base + leftᵀ·right)[i, :]‖₂ for axis "rows", over [:, j] for
 * "columns". Squares are accumulated in f64 where the backend has it. A zero norm gives 0.
 */
export interface ScaleJob extends Omit<FoldJob, "out" | "rowScale" | "columnScale"> {
  /** f32 [rows] or [columns]. */
  readonly out: Slice;
  /** f32, as long as `out`. */
  readonly magnitude: Slice;
  readonly axis: "rows" | "columns";
}

/** One way to hold and compute weights. Made by `createBackend`; freed by `close`. */
export interface Backend {
  readonly name: "js" | "wasm" | "webgpu";
  /** Which build runs: "scalar", "simd", "relaxed-simd"; for js "js"; for webgpu the adapter's name. */
  readonly variant: string;
  /** Zeroed memory, 16-byte aligned, counted under `owner` until freed. @throws BackendError when there is none left. */
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
  /** Hands what is recorded to the device and does not wait; what goes wrong is told by `finish`. CPU backends do not have it. */
  submit?(): void;
  /** Resolves when all operations so far have taken effect. CPU backends return nothing. */
  finish(): Promise<void> | void;
  /** Live bytes by owner, and `reserved`: bytes held beyond them (allocator slack, wasm pages of code and stack). */
  memory(): Record<Owner | "reserved", number>;
  /** What it computes on. CPU backends do not have it. */
  readonly device?: DeviceHandle;
  /** Resolves, with the reason, when the backend's device is lost: its memory is gone. CPU backends do not have it. */
  readonly lost?: Promise<Error>;
  close(): void;
}

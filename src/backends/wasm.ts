/**
 * The WebAssembly backend: the kernels of `assembly/` on a linear memory of their own. One thread; operations run when
 * called. Of the three builds the best runs that the engine compiles.
 */

import { DTYPES, type Dtype } from "../tensor/dtypes.ts";
import {
  type Backend,
  CpuBackend,
  checkExpand,
  checkFold,
  checkProject,
  checkScale,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ProjectJob,
  type ScaleJob,
  type Slice,
} from "./backend.ts";
import { type Binaries, claim, type Instance, instantiate, type WasmVariant } from "./wasm-instance.ts";

export interface WasmOptions {
  /** Insist on one build. Default: the best that this engine accepts. */
  readonly variant?: WasmVariant;
  /**
   * One of the package's `wasm/*.wasm`, compiled by the caller, for engines that refuse to compile bytes at run time
   * (workerd: `import module from "eigenlora/wasm/simd.wasm"`).
   */
  readonly module?: WebAssembly.Module;
}

/** Exports of `assembly/exports.ts`. Addresses and counts are 32-bit, unsigned; 0 stands for an absent address. */
export interface WasmKernels {
  variant: WebAssembly.Global;
  expand(
    type: number,
    out: number,
    coefficients: number,
    basis: number,
    rank: number,
    rows: number,
    width: number,
    add: number,
  ): void;
  project(type: number, out: number, x: number, basis: number, count: number, rows: number, width: number): void;
  fold(
    type: number,
    out: number,
    base: number,
    stride: number,
    rows: number,
    columns: number,
    left: number,
    right: number,
    rank: number,
    rowScale: number,
    columnScale: number,
  ): void;
  scaleRows: ScaleKernel;
  scaleColumns: ScaleKernel;
}

type ScaleKernel = (
  type: number,
  out: number,
  magnitude: number,
  base: number,
  stride: number,
  rows: number,
  columns: number,
  left: number,
  right: number,
  rank: number,
) => void;

/** Literal specifiers, so that bundlers see them; three, so that only the build that runs is loaded. */
const BINARIES: Binaries<WasmVariant> = {
  scalar: () => import("#wasm/scalar"),
  simd: () => import("#wasm/simd"),
  "relaxed-simd": () => import("#wasm/relaxed"),
};

/**
 * A backend with its own linear memory.
 * @throws BackendError when the engine has no WebAssembly, refuses the variant asked for, or refuses the module
 */
export async function createWasmBackend(options: WasmOptions = {}): Promise<Backend> {
  return new WasmBackend(await instantiate<WasmKernels, WasmVariant>(BINARIES, options));
}

class WasmBackend extends CpuBackend<number> {
  readonly name = "wasm";
  readonly variant: WasmVariant;
  readonly #instance: Instance<WasmKernels>;

  constructor(instance: Instance<WasmKernels>) {
    super();
    this.variant = instance.variant;
    this.#instance = instance;
  }

  protected claim(byteLength: number, owner: Owner): number {
    return claim(this.#instance, byteLength, owner);
  }

  protected release(address: number, byteLength: number): void {
    this.#instance.heap.free(address, byteLength);
  }

  protected bytesAt(address: number, byteOffset: number, byteLength: number): Uint8Array {
    return new Uint8Array(this.#instance.memory.buffer, address + byteOffset, byteLength);
  }

  protected beyond(blockBytes: number): number {
    return this.#instance.memory.buffer.byteLength - blockBytes;
  }

  /** Addresses of a job's slices; 0 for one that is absent. */
  #at<Job, const Names extends readonly (keyof Job & string)[]>(
    job: Job,
    ...names: Names
  ): { -readonly [I in keyof Names]: number } {
    return names.map((name) => {
      const slice = job[name] as Slice | undefined;
      return slice ? this.place(name, slice) + slice.byteOffset : 0;
    }) as { -readonly [I in keyof Names]: number };
  }

  expand(job: ExpandJob): void {
    checkExpand(job);
    const { rank, rows, width, add } = job;
    const places = this.#at(job, "out", "coefficients", "basis");
    this.#instance.kernels.expand(code(job), ...places, rank, rows, width, add ? 1 : 0);
  }

  project(job: ProjectJob): void {
    checkProject(job);
    const { count, rows, width } = job;
    this.#instance.kernels.project(code(job), ...this.#at(job, "out", "x", "basis"), count, rows, width);
  }

  fold(job: FoldJob): void {
    checkFold(job);
    const { stride, rows, columns, rank } = job;
    const [out, base, left, right, rowScale, columnScale] = this.#at(
      job,
      ...(["out", "base", "left", "right", "rowScale", "columnScale"] as const),
    );
    const { fold } = this.#instance.kernels;
    fold(code(job), out, base, stride, rows, columns, left, right, rank, rowScale, columnScale);
  }

  scale(job: ScaleJob): void {
    checkScale(job);
    const { stride, rows, columns, rank, axis } = job;
    const places = this.#at(job, "out", "magnitude", "base");
    const { scaleRows, scaleColumns } = this.#instance.kernels;
    const kernel = axis === "rows" ? scaleRows : scaleColumns;
    kernel(code(job), ...places, stride, rows, columns, ...this.#at(job, "left", "right"), rank);
  }
}

function code({ dtype }: { readonly dtype: Dtype }): number {
  return DTYPES.indexOf(dtype);
}

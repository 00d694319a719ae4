/**
 * The WebAssembly backend: the kernels of `assembly/` on a linear memory of their own. One thread; operations run when
 * called. Of the three builds the best runs that the engine compiles.
 */
import { BackendError } from "../errors.ts";
import { DTYPES, type Dtype, rowBytes } from "../tensor/dtypes.ts";
import {
  type Backend,
  CpuBackend,
  checkExpand,
  checkFold,
  checkLength,
  checkProject,
  checkScale,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ProjectJob,
  type ScaleJob,
  type Slice,
  tilesOf,
} from "./backend.ts";

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
    from: number,
    to: number,
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
    leftStride: number,
    rightStride: number,
  ): void;
  scaleRows: ScaleKernel;
  scaleColumns: ScaleKernel;
}

/** Products of a piece of work: a millisecond with SIMD, five or more without. */
const PIECE = 2 ** 22;

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
  leftStride: number,
  rightStride: number,
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
    checkLength(byteLength);
    const { heap, memory } = this.#instance;
    const start = heap.allocate(byteLength);
    if (start !== undefined) return start;
    throw new BackendError(
      `wasm: no memory for ${byteLength} bytes (${owner}); ${memory.buffer.byteLength} are held: load fewer tasks, or use policy "reload"`,
      { backend: "wasm" },
    );
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

  *expanding(job: ExpandJob): Generator<void> {
    checkExpand(job);
    const { rank, rows, width, add } = job;
    const [out, coefficients, basis] = this.#at(job, "out", "coefficients", "basis");
    // Each piece decodes its columns of the basis, for many rows but not for all: they may lie on as many pages that are new.
    const high = Math.min(rank, 256);
    const wide = 32 * Math.max(1, Math.floor(PIECE / Math.max(1, high * rows) / 32));
    const { expand } = this.#instance.kernels;
    for (let i = 0; i < rank; i += high) {
      for (let j = 0; j < width; j += wide) {
        if (i + j > 0) yield;
        const [to, from] = [out + 4 * i * width, coefficients + 4 * i * rows];
        const [m, end] = [Math.min(high, rank - i), Math.min(j + wide, width)];
        expand(code(job), to, from, basis, m, rows, width, add ? 1 : 0, j, end);
      }
    }
  }

  project(job: ProjectJob): void {
    checkProject(job);
    const { count, rows, width } = job;
    this.#instance.kernels.project(code(job), ...this.#at(job, "out", "x", "basis"), count, rows, width);
  }

  *folding(job: FoldJob): Generator<void> {
    checkFold(job);
    const { stride, rows, columns, rank } = job;
    const [out, base, left, right, rowScale, columnScale] = this.#at(
      job,
      ...(["out", "base", "left", "right", "rowScale", "columnScale"] as const),
    );
    const { fold } = this.#instance.kernels;
    for (const [i, m, j, n] of tilesOf(rows, columns, rank, PIECE)) {
      if (i + j > 0) yield;
      const at = (i * stride + j) * rowBytes(job.dtype, 1);
      const [a, b] = [left + 4 * i, right + 4 * j];
      const [r, c] = [rowScale && rowScale + 4 * i, columnScale && columnScale + 4 * j];
      fold(code(job), out + at, base + at, stride, m, n, a, b, rank, r, c, rows, columns);
    }
  }

  *scaling(job: ScaleJob): Generator<void> {
    checkScale(job);
    const { dtype, stride, rows, columns, rank } = job;
    const [out, magnitude, base, left, right] = this.#at(
      job,
      ...(["out", "magnitude", "base", "left", "right"] as const),
    );
    const { scaleRows, scaleColumns } = this.#instance.kernels;
    const byRow = job.axis === "rows";
    // A norm is made at once: tiles are whole along the other axis.
    const depth = Math.max(8, rank) * (byRow ? columns : rows);
    for (const [i, m, j, n] of tilesOf(byRow ? rows : 1, byRow ? 1 : columns, depth, PIECE)) {
      if (i + j > 0) yield;
      const from = base + (i * stride + j) * rowBytes(dtype, 1);
      const to = 4 * (i + j);
      const [height, width] = byRow ? [m, columns] : [rows, n];
      const kernel = byRow ? scaleRows : scaleColumns;
      const factors = [left + 4 * i, right + 4 * j] as const;
      kernel(code(job), out + to, magnitude + to, from, stride, height, width, ...factors, rank, rows, columns);
    }
  }
}

function code({ dtype }: { readonly dtype: Dtype }): number {
  return DTYPES.indexOf(dtype);
}

/** The builds, best last; a build's index is the value of its export `variant`. */
export const WASM_VARIANTS = ["scalar", "simd", "relaxed-simd"] as const;
export type WasmVariant = (typeof WASM_VARIANTS)[number];

/** A build at work on its memory. */
export interface Instance<Kernels> {
  readonly variant: WasmVariant;
  readonly kernels: Kernels;
  readonly memory: WebAssembly.Memory;
  readonly heap: Heap;
}

/** The kernels keep tables and panels in the first page (`assembly/layout.ts`); blocks begin after it. */
const RESERVED_BYTES = 65536;
const RESERVED_PAGES = 1;

/** Where the builds of a module are, best last. */
export type Binaries<Variant extends string> = Record<Variant, () => Promise<{ default: Uint8Array<ArrayBuffer> }>>;

/** The module given, the build asked for, or the best that validates, on a memory of its own. */
export async function instantiate<Kernels extends { variant: WebAssembly.Global }, Variant extends string>(
  binaries: Binaries<Variant>,
  options: { variant?: Variant; module?: WebAssembly.Module },
): Promise<Instance<Kernels>> {
  if (typeof WebAssembly === "undefined") {
    throw new BackendError("wasm: this engine has no WebAssembly; use the js backend", { backend: "wasm" });
  }
  const memory = new WebAssembly.Memory({ initial: RESERVED_PAGES });
  const module = options.module ?? (await compile(binaries, options.variant));
  try {
    const kernels = (await WebAssembly.instantiate(module, { env: { memory } })).exports as unknown as Kernels;
    const variant = WASM_VARIANTS[kernels.variant.value as number]!;
    return { variant, kernels, memory, heap: createHeap(memory, RESERVED_BYTES) };
  } catch (cause) {
    throw new BackendError(`wasm: the module is none of eigenlora/wasm/*.wasm: ${cause}`, {
      backend: "wasm",
      cause,
    });
  }
}

async function compile<Variant extends string>(
  binaries: Binaries<Variant>,
  variant?: Variant,
): Promise<WebAssembly.Module> {
  const reasons: string[] = [];
  for (const candidate of variant === undefined ? (Object.keys(binaries) as Variant[]).reverse() : [variant]) {
    const { default: bytes } = await binaries[candidate]();
    try {
      // Compiled instead of validated: edge runtimes, and pages whose policy forbids it, accept the binary and do not compile it.
      return await WebAssembly.compile(bytes);
    } catch (cause) {
      reasons.push(`${candidate}: ${cause}`);
    }
  }
  throw new BackendError(`wasm: ${reasons.join("; ")}`, { backend: "wasm", reasons });
}

/** Every address is a multiple of this: the width of a vector. */
const ALIGN = 16;
const PAGE = 65536;

/** Hands out ranges of a `WebAssembly.Memory`. */
export interface Heap {
  /**
   * Address of `byteLength` bytes, or `undefined` when the memory cannot grow by what is missing.
   * @param zeroed whether all of them are 0. Default: true
   */
  allocate(byteLength: number, zeroed?: boolean): number | undefined;
  /** Takes back what `allocate` gave for the same `byteLength`. */
  free(address: number, byteLength: number): void;
}

interface FreeRange {
  start: number;
  end: number;
}

/** A heap over `memory` from byte `start` on, a multiple of 16. Memory grows by whole pages, never ahead of need. */
export function createHeap(memory: WebAssembly.Memory, start: number): Heap {
  // Sorted, disjoint, never adjacent. Beyond `top` nothing was ever handed out: those bytes are zero and not listed.
  const ranges: FreeRange[] = [];
  let top = start;

  return {
    allocate(byteLength, zeroed = true) {
      const size = roundUp(byteLength);
      const index = ranges.findIndex(({ start, end }) => end - start >= size);
      if (index >= 0) {
        const range = ranges[index]!;
        const address = range.start;
        range.start += size;
        if (range.start === range.end) ranges.splice(index, 1);
        if (zeroed) new Uint8Array(memory.buffer, address, size).fill(0);
        return address;
      }
      // A free range that ends at the top is the beginning of the block; only the rest is new.
      const last = ranges.at(-1);
      const address = last?.end === top ? last.start : top;
      const missing = address + size - memory.buffer.byteLength;
      if (missing > 0) {
        try {
          memory.grow(Math.ceil(missing / PAGE));
        } catch {
          return undefined;
        }
      }
      if (address < top) {
        ranges.pop();
        if (zeroed) new Uint8Array(memory.buffer, address, top - address).fill(0);
      }
      top = address + size;
      return address;
    },

    free(address, byteLength) {
      ranges.push({ start: address, end: address + roundUp(byteLength) });
      ranges.sort((a, b) => a.start - b.start);
      for (let i = ranges.length - 1; i > 0; i--) {
        const [range, following] = [ranges[i - 1]!, ranges[i]!];
        if (range.end < following.start) continue;
        range.end = following.end;
        ranges.splice(i, 1);
      }
    },
  };
}

/** Whole vectors, and at least one, so that no two blocks share an address. */
function roundUp(byteLength: number): number {
  return Math.max(ALIGN, Math.ceil(byteLength / ALIGN) * ALIGN);
}

/**
 * The WebAssembly backend: the kernels of `assembly/` on a linear memory of their own. One thread; operations run when
 * called. Of the three builds the best runs that the engine compiles.
 */
import { BackendError } from "../errors.ts";
import { DTYPES, type Dtype, rowBytes, tensorBytes } from "../tensor/dtypes.ts";
import {
  type Backend,
  CpuBackend,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ProjectJob,
  type ScaleJob,
  type Slice,
  tilesOf,
  type WeightJob,
  weightBytes,
} from "./backend.ts";

/**
 * A kernel with the parameters of its namesake in `assembly/kernels.ts`: 32-bit numbers; the address 0 stands for an
 * absent slice.
 */
type Kernel = (...values: number[]) => void;

type WasmKernels = Record<"expand" | "project" | "fold" | "scaleRows" | "scaleColumns", Kernel> & {
  readonly variant: WebAssembly.Global;
};

/** Products of a piece of work: a millisecond with SIMD, five or more without. */
const PIECE = 2 ** 22;

/** Literal specifiers, so that bundlers see them; three, so that only the build that runs is loaded. */
const BINARIES: Binaries<WasmVariant> = {
  scalar: () => import("#wasm/scalar"),
  simd: () => import("#wasm/simd"),
  "relaxed-simd": () => import("#wasm/relaxed"),
};

/** A backend with its own linear memory. @param options as of `instantiate` @throws BackendError as `instantiate` */
export async function createWasmBackend(options: InstanceOptions<WasmVariant> = {}): Promise<Backend> {
  return new WasmBackend(await instantiate<WasmKernels, WasmVariant>(BINARIES, options));
}

class WasmBackend extends CpuBackend<number> {
  readonly name = "wasm";
  readonly variant: WasmVariant;
  readonly #wasm: Instance<WasmKernels>;

  constructor(instance: Instance<WasmKernels>) {
    super();
    this.variant = instance.variant;
    this.#wasm = instance;
  }

  protected claim(byteLength: number, owner: Owner): number {
    const start = this.#wasm.heap.allocate(byteLength);
    if (start !== undefined) return start;
    const held = `${this.#wasm.memory.buffer.byteLength} are held: load fewer tasks, or use policy "reload"`;
    throw new BackendError(`wasm: no memory for ${byteLength} bytes (${owner}); ${held}`, { backend: "wasm" });
  }

  protected release(address: number, byteLength: number): void {
    this.#wasm.heap.free(address, byteLength);
  }

  protected bytesAt(address: number, byteOffset: number, byteLength: number): Uint8Array {
    return new Uint8Array(this.#wasm.memory.buffer, address + byteOffset, byteLength);
  }

  protected beyond(blockBytes: number): number {
    return this.#wasm.memory.buffer.byteLength - blockBytes;
  }

  /** The address of a slice; 0 for one that is absent. */
  #address(name: string, slice: Slice | undefined, byteLength: number, align = 4): number {
    return slice ? this.place(name, slice, byteLength, align) + slice.byteOffset : 0;
  }

  #weight(name: "out" | "base", slice: Slice, job: WeightJob): number {
    return this.#address(name, slice, weightBytes(job), rowBytes(job.dtype, 1));
  }

  *expanding(job: ExpandJob): Generator<void> {
    const { dtype, rank, rows, width, add } = job;
    const out = this.#address("out", job.out, 4 * rank * width);
    const coefficients = this.#address("coefficients", job.coefficients, 4 * rank * rows);
    const basis = this.#address("basis", job.basis, tensorBytes(dtype, rows, width));
    // Each piece decodes its columns of the basis, for many rows but not for all: they may lie on as many pages that
    // are new.
    const high = Math.min(rank, 256);
    const wide = 32 * Math.max(1, Math.floor(PIECE / Math.max(1, high * rows) / 32));
    for (let i = 0; i < rank; i += high) {
      for (let j = 0; j < width; j += wide) {
        if (i + j > 0) yield;
        const to = out + 4 * i * width;
        const from = coefficients + 4 * i * rows;
        const count = Math.min(high, rank - i);
        const end = Math.min(j + wide, width);
        this.#wasm.kernels.expand(code(dtype), to, from, basis, count, rows, width, add ? 1 : 0, j, end);
      }
    }
  }

  project(job: ProjectJob): void {
    const { count, rows, width } = job;
    const out = this.#address("out", job.out, 4 * count * rows);
    const x = this.#address("x", job.x, 4 * count * width);
    this.#wasm.kernels.project(out, x, this.#address("basis", job.basis, 4 * rows * width), count, rows, width);
  }

  *folding(job: FoldJob): Generator<void> {
    const { dtype, stride, rows, columns, rank, rowScale, columnScale } = job;
    const out = this.#weight("out", job.out, job);
    const base = this.#weight("base", job.base, job);
    const left = this.#address("left", job.left, 4 * rank * rows);
    const right = this.#address("right", job.right, 4 * rank * columns);
    const scaleOfRow = this.#address("rowScale", rowScale, 4 * rows);
    const scaleOfColumn = this.#address("columnScale", columnScale, 4 * columns);
    for (const [i, m, j, n] of tilesOf(rows, columns, rank, PIECE)) {
      if (i + j > 0) yield;
      const at = (i * stride + j) * rowBytes(dtype, 1);
      const factors = [left + 4 * i, right + 4 * j, rank];
      const scales = [scaleOfRow && scaleOfRow + 4 * i, scaleOfColumn && scaleOfColumn + 4 * j];
      this.#wasm.kernels.fold(code(dtype), out + at, base + at, stride, m, n, ...factors, ...scales, rows, columns);
    }
  }

  *scaling(job: ScaleJob): Generator<void> {
    const { dtype, stride, rows, columns, rank } = job;
    const byRow = job.axis === "rows";
    const length = 4 * (byRow ? rows : columns);
    const out = this.#address("out", job.out, length);
    const magnitude = this.#address("magnitude", job.magnitude, length);
    const base = this.#weight("base", job.base, job);
    const left = this.#address("left", job.left, 4 * rank * rows);
    const right = this.#address("right", job.right, 4 * rank * columns);
    const kernel = this.#wasm.kernels[byRow ? "scaleRows" : "scaleColumns"];
    // A norm is made at once: tiles are whole along the other axis.
    const depth = Math.max(8, rank) * (byRow ? columns : rows);
    for (const [i, m, j, n] of tilesOf(byRow ? rows : 1, byRow ? 1 : columns, depth, PIECE)) {
      if (i + j > 0) yield;
      const from = base + (i * stride + j) * rowBytes(dtype, 1);
      const to = 4 * (i + j);
      const size = byRow ? [m, columns] : [rows, n];
      const factors = [left + 4 * i, right + 4 * j, rank];
      kernel(code(dtype), out + to, magnitude + to, from, stride, ...size, ...factors, rows, columns);
    }
  }
}

function code(dtype: Dtype): number {
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
const RESERVED_PAGES = 1;
const PAGE = 65536;

/** Where the builds of a module are, best last. */
export type Binaries<Variant extends string> = Record<Variant, () => Promise<{ default: Uint8Array<ArrayBuffer> }>>;

export interface InstanceOptions<Variant extends string> {
  /** Insist on one build. Default: the best that this engine accepts. */
  readonly variant?: Variant;
  /**
   * One of the package's `wasm/*.wasm`, compiled by the caller, for engines that refuse to compile bytes at run time
   * (workerd: `import module from "eigenlora/wasm/simd.wasm"`).
   */
  readonly module?: WebAssembly.Module;
}

/**
 * A build on a memory of its own.
 * @throws BackendError when the engine has no WebAssembly, refuses the variant asked for, or refuses the module
 */
export async function instantiate<Kernels extends { variant: WebAssembly.Global }, Variant extends string>(
  binaries: Binaries<Variant>,
  options: InstanceOptions<Variant>,
): Promise<Instance<Kernels>> {
  if (typeof WebAssembly === "undefined")
    throw new BackendError("wasm: this engine has no WebAssembly; use the js backend", { backend: "wasm" });
  const memory = new WebAssembly.Memory({ initial: RESERVED_PAGES });
  const module = options.module ?? (await compile(binaries, options.variant));
  try {
    const kernels = new WebAssembly.Instance(module, { env: { memory } }).exports as unknown as Kernels;
    const variant = WASM_VARIANTS[kernels.variant.value as number]!;
    return { variant, kernels, memory, heap: new Heap(memory, RESERVED_PAGES * PAGE) };
  } catch (cause) {
    throw new BackendError(`wasm: the module is none of eigenlora/wasm/*.wasm: ${cause}`, { backend: "wasm", cause });
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
      // Compiled instead of validated: edge runtimes, and pages whose policy forbids it, accept the binary and do not
      // compile it. Compiled without a promise, because that of WebAssembly.compile may never settle in a worker of
      // WebKit.
      return new WebAssembly.Module(bytes);
    } catch (cause) {
      reasons.push(`${candidate}: ${cause}`);
    }
  }
  throw new BackendError(`wasm: ${reasons.join("; ")}`, { backend: "wasm", reasons });
}

/** Every address is a multiple of this: the width of a vector. */
const ALIGN = 16;

/** Hands out ranges of a memory, which grows by whole pages, never ahead of need. */
export class Heap {
  readonly #memory: WebAssembly.Memory;
  /**
   * Sorted, disjoint, never adjacent. Beyond `#top` nothing was ever handed out: those bytes are zero and not listed.
   */
  readonly #free: { start: number; end: number }[] = [];
  #top: number;

  /** @param start first byte, a multiple of 16 */
  constructor(memory: WebAssembly.Memory, start: number) {
    this.#memory = memory;
    this.#top = start;
  }

  /**
   * Address of `byteLength` bytes, or `undefined` when the memory cannot grow by what is missing.
   * @param zeroed whether all of them are 0
   */
  allocate(byteLength: number, zeroed = true): number | undefined {
    const size = roundUp(byteLength);
    const range = this.#free.find(({ start, end }) => end - start >= size);
    // A free range that ends at the top is the beginning of the block; only the rest is new.
    const last = this.#free.at(-1);
    const taken = range ?? (last?.end === this.#top ? last : undefined);
    const address = taken?.start ?? this.#top;
    const missing = address + size - this.#memory.buffer.byteLength;
    if (missing > 0) {
      try {
        this.#memory.grow(Math.ceil(missing / PAGE));
      } catch {
        return undefined;
      }
    }
    if (taken) {
      const end = Math.min(taken.end, address + size);
      if (zeroed) new Uint8Array(this.#memory.buffer, address, end - address).fill(0);
      taken.start = end;
      if (end === taken.end) this.#free.splice(this.#free.indexOf(taken), 1);
    }
    this.#top = Math.max(this.#top, address + size);
    return address;
  }

  /** Takes back what `allocate` gave for the same `byteLength`. */
  free(address: number, byteLength: number): void {
    const ranges = this.#free;
    ranges.push({ start: address, end: address + roundUp(byteLength) });
    ranges.sort((a, b) => a.start - b.start);
    for (let i = ranges.length - 1; i > 0; i--) {
      const range = ranges[i - 1]!;
      const following = ranges[i]!;
      if (range.end < following.start) continue;
      range.end = following.end;
      ranges.splice(i, 1);
    }
  }
}

/** Whole vectors, and at least one, so that no two blocks share an address. */
function roundUp(byteLength: number): number {
  return Math.max(ALIGN, Math.ceil(byteLength / ALIGN) * ALIGN);
}

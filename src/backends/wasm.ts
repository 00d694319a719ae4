/**
 * The WebAssembly backend: the kernels of `assembly/` on a linear memory of their own. One thread; operations run when
 * called. Which of the three builds runs is decided by `WebAssembly.validate` on the binary itself.
 */

import { BackendError } from "../errors.ts";
import { DTYPES, type Dtype } from "../tensor/dtypes.ts";
import type { Backend, Block, ExpandJob, FoldJob, Owner, ProjectJob, ScaleJob, Slice } from "./backend.ts";
import { checkApart, checkCount, checkExpand, checkFold, checkProject, checkScale, checkSlice } from "./checks.ts";
import { createHeap, type Heap } from "./wasm-memory.ts";

/** The builds, best last; a build's index is the value of its export `variant`. */
export const WASM_VARIANTS = ["scalar", "simd", "relaxed-simd"] as const;
export type WasmVariant = (typeof WASM_VARIANTS)[number];

export interface WasmOptions {
  /** Insist on one build. Default: the best that this engine accepts. */
  variant?: WasmVariant;
  /**
   * One of the package's `wasm/*.wasm`, compiled by the caller, for engines that refuse to compile bytes at run time
   * (workerd: `import module from "eigenlora/wasm/simd.wasm"`).
   */
  module?: WebAssembly.Module;
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

/** A build at work on its memory. */
export interface Instance<Kernels> {
  variant: WasmVariant;
  kernels: Kernels;
  memory: WebAssembly.Memory;
  heap: Heap;
}

/** The kernels keep tables and panels in the first page (`assembly/layout.ts`); blocks begin after it. */
const RESERVED_BYTES = 65536;
const RESERVED_PAGES = 1;

/** Where the builds of a module are, best last. */
export type Binaries<Variant extends string> = Record<Variant, () => Promise<{ default: string }>>;

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
  const instance = await instantiate<WasmKernels, WasmVariant>(BINARIES, options);
  const { variant, kernels, memory, heap } = instance;
  const blocks = new Map<Block, { address: number; owner: Owner }>();

  function address(name: string, slice: Slice): number {
    const block = blocks.get(slice.block);
    if (block === undefined) throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    return block.address + slice.byteOffset;
  }

  function bytes(name: string, slice: Slice, byteLength: number): Uint8Array {
    checkSlice(name, slice, byteLength);
    return new Uint8Array(memory.buffer, address(name, slice), byteLength);
  }

  return {
    name: "wasm",
    variant,

    allocate(byteLength: number, owner: Owner): Block {
      const start = claim(instance, byteLength, owner);
      const block: Block = { byteLength };
      blocks.set(block, { address: start, owner });
      return block;
    },

    free(block: Block): void {
      const held = blocks.get(block);
      if (held === undefined) return;
      blocks.delete(block);
      heap.free(held.address, block.byteLength);
    },

    upload(to: Slice, source: Uint8Array): void {
      bytes("to", to, source.byteLength).set(source);
    },

    copy(from: Slice, to: Slice, byteLength: number): void {
      const source = bytes("from", from, byteLength);
      const target = bytes("to", to, byteLength);
      checkApart("to", to, byteLength, "from", from, byteLength);
      target.set(source);
    },

    view(at: Slice, byteLength: number): Uint8Array {
      return bytes("at", at, byteLength);
    },

    expand(job: ExpandJob): void {
      checkExpand(job);
      kernels.expand(
        code(job.dtype),
        address("out", job.out),
        address("coefficients", job.coefficients),
        address("basis", job.basis),
        job.rank,
        job.rows,
        job.width,
        job.add ? 1 : 0,
      );
    },

    project(job: ProjectJob): void {
      checkProject(job);
      kernels.project(
        code(job.dtype),
        address("out", job.out),
        address("x", job.x),
        address("basis", job.basis),
        job.count,
        job.rows,
        job.width,
      );
    },

    fold(job: FoldJob): void {
      checkFold(job);
      kernels.fold(
        code(job.dtype),
        address("out", job.out),
        address("base", job.base),
        job.stride,
        job.rows,
        job.columns,
        address("left", job.left),
        address("right", job.right),
        job.rank,
        job.rowScale ? address("rowScale", job.rowScale) : 0,
        job.columnScale ? address("columnScale", job.columnScale) : 0,
      );
    },

    scale(job: ScaleJob): void {
      checkScale(job);
      const kernel = job.axis === "rows" ? kernels.scaleRows : kernels.scaleColumns;
      kernel(
        code(job.dtype),
        address("out", job.out),
        address("magnitude", job.magnitude),
        address("base", job.base),
        job.stride,
        job.rows,
        job.columns,
        address("left", job.left),
        address("right", job.right),
        job.rank,
      );
    },

    finish(): void {},

    memory(): Record<Owner, number> & { reserved: number } {
      const reserved = memory.buffer.byteLength;
      const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved };
      for (const [{ byteLength }, { owner }] of blocks) {
        total[owner] += byteLength;
        total.reserved -= byteLength;
      }
      return total;
    },

    close(): void {
      for (const [block, held] of blocks) heap.free(held.address, block.byteLength);
      blocks.clear();
    },
  };
}

function code(type: Dtype): number {
  return DTYPES.indexOf(type);
}

/** Address of `byteLength` zeroed bytes. @throws BackendError when there are none */
export function claim({ heap, memory }: Instance<unknown>, byteLength: number, owner: Owner): number {
  checkCount("byteLength", byteLength, Number.MAX_SAFE_INTEGER);
  const start = heap.allocate(byteLength);
  if (start !== undefined) return start;
  throw new BackendError(
    `wasm: no memory for ${byteLength} bytes (${owner}); ${memory.buffer.byteLength} are held, and the limit is ` +
      "4 GiB or what the device has left. Load fewer tasks, or use the fold policy that keeps no copy",
    { backend: "wasm" },
  );
}

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
    throw new BackendError(`wasm: the module is none of eigenlora/wasm/*.wasm: ${String(cause)}`, {
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
    const { default: base64 } = await binaries[candidate]();
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    if (WebAssembly.validate(bytes)) return WebAssembly.compile(bytes);
    reasons.push(`${candidate}: not supported by this engine`);
  }
  throw new BackendError(`wasm: ${reasons.join("; ")}`, { backend: "wasm", reasons });
}

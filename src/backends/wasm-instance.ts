/**
 * A build of `assembly/` at work on a linear memory of its own: the best that the engine compiles, and blocks in that memory.
 */
import { BackendError } from "../errors.ts";
import { checkLength, type Owner } from "./backend.ts";

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

/** Address of `byteLength` bytes, by default of zeros. @throws BackendError when there are none */
export function claim({ heap, memory }: Instance<unknown>, byteLength: number, owner: Owner, zeroed?: boolean): number {
  checkLength(byteLength);
  const start = heap.allocate(byteLength, zeroed);
  if (start !== undefined) return start;
  throw new BackendError(
    `wasm: no memory for ${byteLength} bytes (${owner}); ${memory.buffer.byteLength} are held: load fewer tasks, or use policy "reload"`,
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

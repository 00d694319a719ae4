/**
 * A build of `assembly/` at work on a linear memory of its own: the best that the engine compiles.
 */
import { BackendError } from "../errors.ts";
import type { Owner } from "./backend.ts";
import { checkCount } from "./checks.ts";
import { createHeap, type Heap } from "./wasm-memory.ts";

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

/** Address of `byteLength` zeroed bytes. @throws BackendError when there are none */
export function claim({ heap, memory }: Instance<unknown>, byteLength: number, owner: Owner): number {
  checkCount("byteLength", byteLength, Number.MAX_SAFE_INTEGER);
  const start = heap.allocate(byteLength);
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
      // Not `validate`: edge runtimes, and pages whose policy forbids it, know the binary and do not compile it.
      return await WebAssembly.compile(bytes);
    } catch (cause) {
      reasons.push(`${candidate}: ${cause}`);
    }
  }
  throw new BackendError(`wasm: ${reasons.join("; ")}`, { backend: "wasm", reasons });
}

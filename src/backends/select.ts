/**
 * Picks a backend. Each arrives by dynamic import, so that an app loads the one it runs.
 */
import type { Backend } from "./backend.ts";

export interface BackendOptions {
  /** "auto" tries wasm, then js. */
  backend?: "auto" | "wasm" | "js" | undefined;
  wasm?:
    | {
        /** Instead of the best build that this engine validates. */
        variant?: "scalar" | "simd" | "relaxed-simd";
        /** A precompiled build, for engines that do not compile at run time (`eigenlora/wasm/simd.wasm`). */
        module?: WebAssembly.Module;
      }
    | undefined;
}

/**
 * @returns the backend, and why those before it in the order were passed over
 * @throws BackendError when the backend asked for by name cannot start
 */
export async function createBackend(options: BackendOptions = {}): Promise<{ backend: Backend; passedOver: string[] }> {
  const { backend = "auto" } = options;
  if (!["auto", "wasm", "js"].includes(backend)) {
    throw new RangeError(`backend: expected "auto", "wasm" or "js", got ${JSON.stringify(backend)}`);
  }
  const js = async (): Promise<Backend> => (await import("./js.ts")).createJsBackend();
  if (backend === "js") return { backend: await js(), passedOver: [] };
  try {
    const { createWasmBackend } = await import("./wasm.ts");
    return { backend: await createWasmBackend(options.wasm), passedOver: [] };
  } catch (cause) {
    if (backend === "wasm") throw cause;
    return { backend: await js(), passedOver: [(cause as Error).message] };
  }
}

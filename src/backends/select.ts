/**
 * Picks a backend. Each arrives by dynamic import, so that an app loads the one it runs.
 */
import type { Backend, DeviceHandle } from "./backend.ts";

export interface BackendOptions {
  /** "auto" tries webgpu where a device is given, then wasm, then js. */
  backend?: "auto" | "webgpu" | "wasm" | "js" | undefined;
  webgpu?:
    | {
        /** The WebGPU device to use, for instance the one that the model runs on. Without one, the system's is requested. */
        device?: DeviceHandle;
      }
    | undefined;
  wasm?:
    | {
        /** Instead of the best build that this engine validates. */
        variant?: "scalar" | "simd" | "relaxed-simd";
        /** A precompiled build, for engines that do not compile at run time (`eigenlora/wasm/simd.wasm`). */
        module?: WebAssembly.Module;
      }
    | undefined;
}

/** In the order of "auto". */
const BACKENDS = {
  webgpu: async ({ webgpu }: BackendOptions): Promise<Backend> => (await import("./webgpu.ts")).createWebgpuBackend(webgpu),
  wasm: async ({ wasm }: BackendOptions): Promise<Backend> => (await import("./wasm.ts")).createWasmBackend(wasm),
  js: async (): Promise<Backend> => (await import("./js.ts")).createJsBackend(),
};

/**
 * @returns the backend, and why those before it in the order were passed over
 * @throws BackendError when the backend asked for by name cannot start
 */
export async function createBackend(options: BackendOptions = {}): Promise<{ backend: Backend; passedOver: string[] }> {
  const { backend = "auto", webgpu } = options;
  if (backend !== "auto" && !Object.hasOwn(BACKENDS, backend)) {
    throw new RangeError(`backend: expected "auto", "webgpu", "wasm" or "js", got ${JSON.stringify(backend)}`);
  }
  if (backend !== "auto") return { backend: await BACKENDS[backend](options), passedOver: [] };
  const passedOver: string[] = [];
  for (const start of [...(webgpu?.device ? [BACKENDS.webgpu] : []), BACKENDS.wasm]) {
    try {
      return { backend: await start(options), passedOver };
    } catch (cause) {
      passedOver.push((cause as Error).message);
    }
  }
  return { backend: await BACKENDS.js(), passedOver };
}

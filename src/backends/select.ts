/**
 * Picks a backend. Each arrives by dynamic import, so that an app loads the one it runs.
 */
import { checkChoice } from "../arguments.ts";
import type { Backend, DeviceHandle } from "./backend.ts";

/** Which backend computes. */
export interface BackendOptions {
  /**
   * "auto" tries webgpu, then wasm, then js. It takes a GPU that is one, and only where results stay there: not for weights in
   * the CPU's memory, nor for terms that are handed out.
   */
  readonly backend?: "auto" | "webgpu" | "wasm" | "js" | undefined;
  /** `false`: "auto" leaves WebGPU out, so that weights are always in the CPU's memory. */
  webgpu?:
    | false
    | {
        /** The WebGPU device to use, for instance the one that the model runs on. Without one, the system's is requested. */
        readonly device?: DeviceHandle | undefined;
        /** Milliseconds to wait for the device before it counts as lost. Default: 60 000. */
        readonly timeout?: number;
      }
    | undefined;
  wasm?:
    | {
        /** Instead of the best build that this engine validates. */
        readonly variant?: "scalar" | "simd" | "relaxed-simd";
        /** A precompiled build, for engines that do not compile at run time (`eigenlora/wasm/simd.wasm`). */
        readonly module?: WebAssembly.Module;
      }
    | undefined;
}

const BACKENDS = {
  webgpu: async ({ backend, webgpu }: BackendOptions): Promise<Backend> => {
    const { createWebgpuBackend } = await import("./webgpu.ts");
    // Software is slower than wasm: only who asks for it gets it.
    return createWebgpuBackend({ hardware: backend !== "webgpu", ...webgpu });
  },
  wasm: async ({ wasm }: BackendOptions): Promise<Backend> => (await import("./wasm.ts")).createWasmBackend(wasm),
  js: async (): Promise<Backend> => (await import("./js.ts")).createJsBackend(),
};

/**
 * @param onCpu why results are wanted in the CPU's memory, if they are: "auto" then takes a device only if one is given
 * @returns the backend, and why those before it in the order were passed over
 * @throws BackendError when the backend asked for by name cannot start
 */
export async function createBackend(
  options: BackendOptions = {},
  onCpu?: string,
): Promise<{ backend: Backend; passedOver: string[] }> {
  const { backend = "auto", webgpu } = options;
  checkChoice("backend", backend, ["auto", "webgpu", "wasm", "js"]);
  if (backend !== "auto") return { backend: await BACKENDS[backend](options), passedOver: [] };
  const why = webgpu === false ? "left out" : webgpu?.device ? undefined : onCpu;
  const passedOver: string[] = why === undefined ? [] : [`webgpu: ${why}`];
  for (const start of why === undefined ? [BACKENDS.webgpu, BACKENDS.wasm] : [BACKENDS.wasm]) {
    try {
      return { backend: await start(options), passedOver };
    } catch (cause) {
      passedOver.push((cause as Error).message);
    }
  }
  return { backend: await BACKENDS.js(), passedOver };
}

/**
 * Stands in for `wasm.ts` and `webgpu.ts` of `src/backends/` and for `src/format/coded-wasm.ts` in bundles for React
 * Native. Its engine has neither WebAssembly nor WebGPU, and Metro puts everything that can be imported into one file.
 * The field "react-native" of package.json makes the exchange.
 */
import type { Backend } from "../src/backends/backend.ts";
import { BackendError } from "../src/errors.ts";

const none = (backend: string) => async (): Promise<Backend> => {
  throw new BackendError(`${backend}: not in bundles for React Native; use the js backend`, { backend });
};

/** @throws BackendError always */
export const createWasmBackend: () => Promise<Backend> = none("wasm");
/** @throws BackendError always */
export const instantiate: () => Promise<Backend> = none("wasm");
/** @throws BackendError always */
export const createWebgpuBackend: () => Promise<Backend> = none("webgpu");
/** Nothing: sections are decoded in JavaScript, and so are the numbers of tensors. */
export const wasmWork = async (): Promise<undefined> => undefined;
export const wasmFloats = (): undefined => undefined;

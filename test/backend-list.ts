/**
 * The backends that tests run on. A backend that this engine cannot start is left out; test/backends.test.ts reports it by name and fails
 * where EIGENLORA_REQUIRE lists it.
 */
import { setFlagsFromString } from "node:v8";
import type { BackendOptions } from "eigenlora";
import { createWebgpuBackend } from "./internals.ts";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway.
setFlagsFromString("--experimental-wasm-relaxed-simd");

/** Reason why Dawn does not start here; undefined where it does. */
export const dawnMissing: string | undefined = (await createWebgpuBackend().then(
  (backend) => backend.close(),
  (error: Error) => error.message,
)) as string | undefined;

export function backends(): BackendOptions[] {
  return [
    { backend: "js" },
    { backend: "wasm", wasm: { variant: "scalar" } },
    { backend: "wasm", wasm: { variant: "simd" } },
    { backend: "wasm", wasm: { variant: "relaxed-simd" } },
    ...(dawnMissing === undefined ? [{ backend: "webgpu" } as const] : []),
  ];
}

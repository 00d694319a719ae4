/**
 * The backends that tests run on. Where Dawn cannot start it is left out: each file that asks for backends says so as a skipped test, or
 * fails where EIGENLORA_REQUIRE lists dawn.
 */
import { setFlagsFromString } from "node:v8";
import type { BackendOptions } from "eigenlora";
import t from "tap";
import { createWebgpuBackend } from "./internals.ts";
import { skip } from "./required.ts";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway.
setFlagsFromString("--experimental-wasm-relaxed-simd");

/** Reason why Dawn does not start here; undefined where it does. */
export const dawnMissing: string | undefined = (await createWebgpuBackend().then(
  (backend) => backend.close(),
  (error: Error) => error.message,
)) as string | undefined;
if (dawnMissing !== undefined) skip(t, "dawn", dawnMissing);

export function backends(): BackendOptions[] {
  return [
    { backend: "js" },
    { backend: "wasm", wasm: { variant: "scalar" } },
    { backend: "wasm", wasm: { variant: "simd" } },
    { backend: "wasm", wasm: { variant: "relaxed-simd" } },
    ...(dawnMissing === undefined ? [{ backend: "webgpu" } as const] : []),
  ];
}

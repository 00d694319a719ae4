/**
 * The backends that tests run on: all in the gate. Dawn starts when it is asked for; where it cannot, it is left out,
 * and the file that asked says so as a skipped test, or fails where EIGENLORA_REQUIRE lists dawn.
 */
import { setFlagsFromString } from "node:v8";
import type { BackendOptions } from "eigenlora";
import { webgpu } from "eigenlora/webgpu";
import t from "tap";
import { createWebgpuBackend } from "./internals/runtime.ts";
import { bare, skip, whole } from "./required.ts";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway.
setFlagsFromString("--experimental-wasm-relaxed-simd");

async function start(): Promise<string | undefined> {
  if (bare) return "EIGENLORA_BARE=1";
  if (!whole) return "npm test starts no Dawn";
  return createWebgpuBackend().then(
    (backend) => void backend.close(),
    (error: Error) => error.message,
  );
}

let started: Promise<string | undefined> | undefined;

/** Reason why Dawn does not start here; undefined where it does. */
export async function dawnMissing(): Promise<string | undefined> {
  const first = started === undefined;
  started ??= start();
  const reason = await started;
  if (first && reason !== undefined) skip(t, "dawn", reason);
  return reason;
}

/** Name of a backend in tests: "simd". */
export const labelOf = ({ backend, wasm }: BackendOptions): string =>
  wasm?.variant ?? (typeof backend === "object" ? "webgpu" : backend!);

export async function backends(): Promise<BackendOptions[]> {
  const missing = await dawnMissing();
  return [
    { backend: "js" },
    { backend: "wasm", wasm: { variant: "simd" } },
    ...(whole
      ? ([
          { backend: "wasm", wasm: { variant: "scalar" } },
          { backend: "wasm", wasm: { variant: "relaxed-simd" } },
        ] as const)
      : []),
    ...(missing === undefined ? [{ backend: webgpu() }] : []),
  ];
}

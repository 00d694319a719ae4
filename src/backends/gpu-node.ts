/**
 * WebGPU of Node, Deno and Bun: what `#gpu` of package.json is where the condition `node` is set.
 */
/// <reference types="@webgpu/types" />

/** Dawn's entry point, kept for the life of the process: when it is collected, drivers may crash (dawn-gpu/node-webgpu#18). */
let dawn: object | undefined;

/**
 * The system's WebGPU: the runtime's own (Deno, newer engines), else that of the optional package `webgpu`.
 * @throws Error when neither is there
 */
export async function openGpu(): Promise<object> {
  const own = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (own) return own;
  try {
    const { create } = await import("webgpu");
    return (dawn ??= create([]));
  } catch (cause) {
    throw new Error(`WebGPU needs the package "webgpu": npm install webgpu (${(cause as Error).message})`, { cause });
  }
}

/**
 * Dawn, the WebGPU of the optional package `webgpu`, for Node and Bun: `#gpu` of package.json is this where the
 * condition `node` is set.
 */

/**
 * Dawn's entry point, kept for the life of the process: when it is collected, drivers may crash
 * (dawn-gpu/node-webgpu#18).
 */
let dawn: object | undefined;

/** @throws Error when the package is not there */
export async function openDawn(): Promise<object> {
  try {
    const { create } = await import("webgpu");
    return (dawn ??= create([]));
  } catch (cause) {
    throw new Error(`WebGPU needs the package "webgpu": npm install webgpu (${(cause as Error).message})`, { cause });
  }
}

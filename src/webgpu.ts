/**
 * `eigenlora/webgpu`: WebGPU as a backend of `createRuntime`.
 */
import type { DeviceBackend } from "./backends/backend.ts";
import type { WebgpuOptions } from "./backends/webgpu.ts";
import { checkOptions } from "./errors.ts";

export type { WebgpuOptions };

/**
 * The kernels and the device are asked for when a runtime is made.
 * @throws TypeError for an option that it does not know
 * @example
 * const runtime = await createRuntime(pack, { base: "model.safetensors", backend: webgpu({ device }) });
 */
export function webgpu(options: WebgpuOptions = {}): DeviceBackend {
  checkOptions("webgpu", options, ["device", "timeout"]);
  const start = async () => (await import("./backends/webgpu.ts")).createWebgpuBackend(options);
  return { name: "webgpu", device: options.device, start };
}

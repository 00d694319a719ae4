/**
 * WebGPU of browsers and workers: what `#gpu` of package.json is unless the condition `node` is set.
 */
/// <reference types="@webgpu/types" />

/** @throws Error where the browser has none */
export async function openGpu(): Promise<object> {
  const own = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (own) return own;
  throw new Error("this browser has no WebGPU, or the page is not served over https");
}

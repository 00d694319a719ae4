/**
 * Browsers, workers and React Native have no files, and may have WebGPU: `#files` of package.json is this unless the condition `node` is set.
 */
/// <reference types="@webgpu/types" />
import type { AbortOptions, ByteSource, FetchOptions } from "./source.ts";

/** Every string is a URL here, relative ones against the document or worker. */
export const openPath: ((path: string, options: FetchOptions & AbortOptions) => Promise<ByteSource>) | undefined =
  undefined;

/** @throws Error where the browser has no WebGPU */
export async function openGpu(): Promise<object> {
  const gpu = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (gpu) return gpu;
  throw new Error("this browser has no WebGPU, or the page is not served over https");
}

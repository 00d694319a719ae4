/**
 * Files and the GPU of Node, Deno and Bun: `#files` of package.json is this where the condition `node` is set.
 */
/// <reference types="@webgpu/types" />
import { openDisk } from "./disk.ts";
import type { AbortOptions, ByteSource, FetchOptions } from "./source.ts";

/**
 * Opens a file by its path, file: URL, or name on the Hugging Face Hub (`hf:org/name/file`), which the first read downloads into the Hub's cache.
 * @throws SourceError when it is not a readable file
 */
export async function openPath(text: string, options: FetchOptions & AbortOptions): Promise<ByteSource> {
  if (!/^hf:/i.test(text)) return openDisk(text);
  // Loaded late: most programs never ask the Hub.
  const { openHub } = await import("./http/hub.ts");
  return openHub(text, options);
}

/** Dawn's entry point, kept for the life of the process: when it is collected, drivers may crash (dawn-gpu/node-webgpu#18). */
let dawn: object | undefined;

/**
 * The system's WebGPU: the runtime's own (Deno, newer engines), else that of the optional package `webgpu`.
 * @throws Error when neither is there
 */
export async function openGpu(): Promise<object> {
  const gpu = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (gpu) return gpu;
  try {
    const { create } = await import("webgpu");
    return (dawn ??= create([]));
  } catch (cause) {
    throw new Error(`WebGPU needs the package "webgpu": npm install webgpu (${(cause as Error).message})`, { cause });
  }
}

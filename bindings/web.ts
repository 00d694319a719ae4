/**
 * Platform glue for browsers, workers and any runtime without a file system: strings are URLs. Not a public module: it is
 * what `#platform` resolves to wherever the `node` condition is not set.
 */
/// <reference types="@webgpu/types" />
import type { Thread } from "../src/extract/extractor.ts";
import type { ByteSource } from "../src/source.ts";

/** On this platform every string is a URL, relative ones against the document or worker. */
export const openPath: ((path: string) => Promise<ByteSource>) | undefined = undefined;

/** Threads are not started here: extraction is done where it is asked for. */
export const openThread: (() => Promise<Thread>) | undefined = undefined;

/** The browser's WebGPU. @throws Error where it has none */
export const openGpu: () => Promise<object> = async () => {
  const own = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (own) return own;
  throw new Error("this browser has no WebGPU, or the page is not served over https");
};

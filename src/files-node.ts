/**
 * Opens names of files in Node, Deno and Bun: `#files` of package.json is this where the condition `node` is set.
 */
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

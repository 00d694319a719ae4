/**
 * Sources of bytes from whatever names or holds them.
 */

import { openPath } from "#files";
import { described } from "./errors.ts";
import { throwIfAborted } from "./pace.ts";
import type { FileProgress, OnProgress, WatchedSource } from "./progress.ts";
import { type AbortOptions, type ByteSource, checkRange, type FetchOptions, type SourceInput } from "./source.ts";

/** Names of sources that are bytes. */
const IN_MEMORY = ["Uint8Array", "ArrayBuffer"];

/**
 * Makes a source of whatever names or holds bytes. URLs are not contacted before the first read.
 * @param where what the caller passed it to, for messages
 * @throws TypeError when `input` is none of the accepted kinds
 * @throws SourceError when a path cannot be opened
 */
export async function openSource(
  input: SourceInput,
  options: FetchOptions & AbortOptions = {},
  where = "source",
): Promise<ByteSource> {
  if (input instanceof ArrayBuffer || input instanceof Uint8Array) {
    // A plain view: Node's Buffer is a Uint8Array whose `slice` does not copy. What has no `buffer` is one.
    const { buffer, byteOffset, byteLength } = input as Uint8Array<ArrayBuffer>;
    const bytes = new Uint8Array(buffer ?? input, byteOffset, byteLength);
    return localSource(IN_MEMORY[buffer ? 0 : 1]!, byteLength, async (start, end) => bytes.subarray(start, end));
  }
  if (typeof Blob !== "undefined" && input instanceof Blob) {
    const get = async (start: number, end: number) => new Uint8Array(await input.slice(start, end).arrayBuffer());
    return localSource((input as Partial<File>).name ?? "Blob", input.size, get);
  }
  // Told by its field, since engines without a web platform have no URL.
  const text = (input as Partial<URL> | undefined)?.href ?? input;
  if (typeof text === "string") {
    const url = addressOf(text, where);
    if (!url) return openPath!(text);
    // Loaded late: apps that have the bytes, a Blob or a file do without.
    const { openUrl } = await import("./http/url-source.ts");
    return openUrl(url, options, text);
  }
  if (typeof (input as ByteSource | undefined)?.read === "function") return input as ByteSource;
  throw new TypeError(`${where}: expected a path, URL, Blob, ArrayBuffer or ByteSource, got ${described(input)}`);
}

/**
 * Reports the reads of a source. Bytes in memory have nothing to tell.
 * @param total as `watch` takes it
 * @returns undefined where nobody asks
 */
export async function watchedOf(
  source: ByteSource,
  stage: FileProgress["stage"],
  onProgress: OnProgress | undefined,
  total?: (loaded: number) => number | undefined,
): Promise<WatchedSource | undefined> {
  if (onProgress === undefined || IN_MEMORY.includes(source.name)) return undefined;
  return (await import("./progress.ts")).watch(source, stage, onProgress, total);
}

/**
 * The address that a string or URL stands for, which may be a name of the Hub; undefined for a path, where there are
 * files.
 * @throws TypeError when it is no address, and there are no files
 */
export function addressOf(text: string, where: string): URL | undefined {
  if (!/^(https?|blob|data|hf):/i.test(text) && openPath) return undefined;
  const base = (globalThis as { location?: { href: string } }).location?.href;
  try {
    return new URL(text, base);
  } catch (cause) {
    throw new TypeError(`${where}: "${text}" is not a URL, and there are no files here`, { cause });
  }
}

/** A source of known size. @param get exactly the bytes of a range that was checked */
export function localSource(
  name: string,
  byteLength: number,
  get: (start: number, end: number) => Promise<Uint8Array>,
): ByteSource {
  return {
    name,
    byteLength,
    async read(offset, length, options) {
      throwIfAborted(options?.signal);
      checkRange(name, offset, length, byteLength);
      const bytes = await get(offset, offset + length);
      throwIfAborted(options?.signal);
      return bytes;
    },
  };
}

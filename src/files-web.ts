/**
 * Browsers, workers and React Native have no files: what `#files` of package.json is unless the condition `node` is set.
 */
import type { AbortOptions, ByteSource, FetchOptions } from "./source.ts";

/** Every string is a URL here, relative ones against the document or worker. */
export const openPath: ((path: string, options: FetchOptions & AbortOptions) => Promise<ByteSource>) | undefined =
  undefined;

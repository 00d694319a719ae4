/**
 * Platform glue for browsers, workers and any runtime without a file system: strings are URLs. Not a public module: it is
 * what `#platform` resolves to wherever the `node` condition is not set.
 */
import type { ByteSource } from "../src/source.ts";

/** On this platform every string is a URL, relative ones against the document or worker. */
export const openPath: ((path: string) => Promise<ByteSource>) | undefined = undefined;

/**
 * Browsers, workers and React Native have no files, and no cache of the Hugging Face Hub: `#files` and `#hub` of
 * package.json are this unless the condition `node` is set.
 */
import type { SnapshotOptions } from "./http/hub.ts";
import type { ByteSource } from "./source.ts";

/** Every string is a URL here, relative ones against the document or worker. */
export const openPath: ((path: string, name?: string) => Promise<ByteSource>) | undefined = undefined;
/** Names of the Hub are addresses. */
export const openHub: ((text: string, options?: SnapshotOptions) => Promise<ByteSource>) | undefined = undefined;

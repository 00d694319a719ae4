/**
 * `eigenlora/node`: adapters in folders, and a folder as a cache, for Node, Deno and Bun. What works with sources of any kind is `eigenlora/build`.
 */

export type { Adapter } from "./adapters/adapter.ts";
export { type AdapterLocation, findAdapters } from "./adapters/find.ts";
export { readAdapters } from "./adapters/folder.ts";
export { folderStore } from "./cache/folder.ts";

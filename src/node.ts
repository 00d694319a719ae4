/**
 * `eigenlora/node`: adapters in folders, for Node, Deno and Bun. What works with sources of any kind is `eigenlora/build`.
 */

export type { Adapter } from "./adapters/adapter.ts";
export { type AdapterLocation, findAdapters, readAdapters } from "./adapters/folder.ts";

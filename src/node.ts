/**
 * `eigenlora/node`: adapters in folders, and a folder as a cache, for Node, Deno and Bun. What works with sources of any kind is `eigenlora/build`.
 */

export type { Adapter, BaseFacts } from "./adapters/adapter.ts";
export {
  type AdapterFormat,
  type AdapterLocation,
  findAdapters,
  type ReadAdaptersOptions,
  readAdapters,
} from "./adapters/folder.ts";
export { describeBase } from "./adapters/tree.ts";
export { folderStore } from "./cache/folder.ts";
export type { HubOptions } from "./http/hub.ts";

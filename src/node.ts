/**
 * `eigenlora/node`: adapters in folders, and a folder as a cache, for Node, Deno and Bun. What works with sources of any kind is `eigenlora/build`.
 */

export type { Adapter } from "./adapters/adapter.ts";
export type { BaseFacts } from "./adapters/base-facts.ts";
export { describeBase } from "./adapters/describe-base.ts";
export {
  type AdapterFormat,
  type AdapterLocation,
  findAdapters,
  type ReadAdaptersOptions,
  readAdapters,
} from "./adapters/folder.ts";
export { folderStore } from "./cache/folder.ts";
export type { HubOptions } from "./http/hub.ts";

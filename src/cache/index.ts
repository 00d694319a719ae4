/**
 * `eigenlora/cache`: keeps what was read from a URL in the browser, so that it is there after a reload. A folder of Node as
 * a store is in `eigenlora/node`.
 */
export { type CacheCounts, type CachedSource, type CacheOptions, cachedSource } from "./cached.ts";
export type { RangeStore } from "./store.ts";
export { cacheStore, opfsStore } from "./web.ts";

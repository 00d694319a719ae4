/**
 * `eigenlora/cache`: keeps what was read from a URL in the browser, so that it is there after a reload. A folder of
 * Node as a store is in `eigenlora/node`.
 */

export type { RangeStore } from "./cached.ts";
export {
  type CacheCounts,
  type CachedSource,
  type CacheOptions,
  cachedSource,
  cacheStore,
} from "./cached.ts";

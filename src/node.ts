/**
 * `eigenlora/node`: adapters in folders, and a folder as a cache, for Node, Deno and Bun. What works with sources of
 * any kind is `eigenlora/build`.
 */

import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { RangeStore } from "./cache/cached.ts";
import { described } from "./errors.ts";

export type { Adapter, BaseFacts } from "./adapters/adapter.ts";
export {
  type AdapterLocation,
  findAdapters,
  type ReadAdaptersOptions,
  readAdapters,
} from "./adapters/folder.ts";
export { describeBase } from "./adapters/tree.ts";
export type { HubOptions } from "./http/hub.ts";

/**
 * A folder as a store for `cachedSource` of `eigenlora/cache`, one file for each entry. It is made when something is
 * kept, and several processes may use it.
 * @param path of the folder, yours alone
 * @example
 * const pack = await openPack(cachedSource("https://example.org/tasks.eigen", folderStore("cache")));
 */
export function folderStore(path: string): RangeStore {
  if (typeof path !== "string")
    throw new TypeError(`folderStore: expected the path of a folder, got ${described(path)}`);
  const unlessMissing = (error: unknown): undefined => {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  };
  return {
    async get(key) {
      const bytes = await readFile(join(path, key)).catch(unlessMissing);
      return bytes && new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.length);
    },
    async put(key, bytes) {
      await mkdir(path, { recursive: true });
      // Not under another name first: half an entry fails its checksum, and is read from the source again.
      await writeFile(join(path, key), bytes);
    },
    delete: (key) => rm(join(path, key), { force: true }),
    keys: async () => (await readdir(path).catch(unlessMissing)) ?? [],
  };
}

/** Stores of browsers. Both need a secure context: https, or localhost. */
import type { RangeStore } from "./store.ts";

/** Cache API keys are addresses; no server has these. */
const ORIGIN = "https://eigenlora.invalid/";

/**
 * The Cache API, in windows and in workers.
 * @param name of the cache, yours alone; `caches.delete(name)` removes all of it
 * @example
 * const pack = await openPack(cachedSource("https://example.org/tasks.eigen", cacheStore("packs")));
 */
export function cacheStore(name: string): RangeStore {
  const open = (): Promise<Cache> => {
    if (!globalThis.caches) throw new TypeError("cacheStore: there is no Cache API here; a page needs https for it");
    return caches.open(name);
  };
  return {
    async get(key) {
      const found = await (await open()).match(ORIGIN + key);
      return found && new Uint8Array(await found.arrayBuffer());
    },
    async put(key, bytes) {
      await (await open()).put(ORIGIN + key, new Response(bytes as Uint8Array<ArrayBuffer>));
    },
    async delete(key) {
      await (await open()).delete(ORIGIN + key);
    },
    async keys() {
      return (await (await open()).keys()).map(({ url }) => url.slice(ORIGIN.length));
    },
  };
}

/**
 * A folder of the origin private file system, where files can be written by `createWritable`.
 * @param folder name of the folder, yours alone
 */
export function opfsStore(folder: string): RangeStore {
  const open = async (): Promise<FileSystemDirectoryHandle> => {
    const root = await globalThis.navigator?.storage?.getDirectory?.();
    if (!root) throw new TypeError("opfsStore: there is no private file system here; a page needs https for it");
    return root.getDirectoryHandle(folder, { create: true });
  };
  const unlessMissing = (error: unknown): undefined => {
    if ((error as Error).name !== "NotFoundError") throw error;
  };
  return {
    async get(key) {
      const handle = await (await open()).getFileHandle(key).catch(unlessMissing);
      return handle && new Uint8Array(await (await handle.getFile()).arrayBuffer());
    },
    async put(key, bytes) {
      const handle = await (await open()).getFileHandle(key, { create: true });
      const file = await handle.createWritable();
      await file.write(bytes as Uint8Array<ArrayBuffer>);
      await file.close();
    },
    async delete(key) {
      await (await open()).removeEntry(key).catch(unlessMissing);
    },
    async keys() {
      const found: string[] = [];
      // Not in the declarations of TypeScript 5.9.
      const names = (await open()) as unknown as { keys(): AsyncIterable<string> };
      for await (const name of names.keys()) found.push(name);
      return found;
    },
  };
}

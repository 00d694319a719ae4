/** A folder as a store, for Node, Deno and Bun. */
import { randomUUID } from "node:crypto";
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { described } from "../arguments.ts";
import type { RangeStore } from "./cached.ts";

/** Names of files that are being written, and the age in milliseconds from which their writer is gone. */
const UNFINISHED = ".tmp";
const OLD = 3_600_000;

/**
 * A folder as a store for `cachedSource` of `eigenlora/cache`, one file for each entry. It is made when something is kept, and
 * several processes may use it.
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
      // A reader sees the old entry or the new one meanwhile, never a half.
      const written = join(path, `${randomUUID()}${UNFINISHED}`);
      try {
        await writeFile(written, bytes);
        await rename(written, join(path, key));
      } catch (error) {
        await rm(written, { force: true });
        throw error;
      }
    },
    async delete(key) {
      await rm(join(path, key), { force: true });
    },
    async keys() {
      const names = (await readdir(path).catch(unlessMissing)) ?? [];
      for (const name of names.filter((name) => name.endsWith(UNFINISHED))) {
        const file = join(path, name);
        const { mtimeMs = Infinity } = (await stat(file).catch(unlessMissing)) ?? {};
        if (Date.now() - mtimeMs > OLD) await rm(file, { force: true });
      }
      return names;
    },
  };
}

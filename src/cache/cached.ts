/**
 * A source that keeps what it reads in a store, and reads it from there the next time. What a version of a file is, its
 * server says, or the caller who knows what the file must hold; bytes of different versions never meet.
 */

import { checkOptions, described, SourceError } from "../errors.ts";
import { fromIntegrity, sha256 } from "../format/fields.ts";
import { addressOf, openSource } from "../open-source.ts";
import { throwIfAborted } from "../pace.ts";
import {
  type ByteSource,
  FETCH_OPTIONS,
  type FetchOptions,
  joined,
  nameOfUrl,
  type ReadOptions,
  type Reads,
  readAll,
  readBeginning,
  unlessAborted,
} from "../source.ts";
import { toHex } from "../text.ts";

/** Options of `cachedSource`. */
export interface CacheOptions extends FetchOptions {
  /**
   * The root that the pack must have, as `openPack` takes it; give it to both, for it is `openPack` that checks it.
   * What is kept is then found by this, whatever the address, and works offline: the server is not even asked for its
   * version. Of other files, such as models, it is a name that the caller vouches for: the hash of the file, say.
   * Default: the server's ETag or Last-Modified, asked for once by one request without bytes.
   */
  readonly integrity?: string;
}

/** Counts of the reads of a cached source. */
export interface CacheCounts {
  /** Ranges that were kept. */
  readonly hits: number;
  /** Ranges that were not kept, and were read from the source. */
  readonly misses: number;
  /** Ranges that were damaged in the store, and were read from the source again. */
  readonly damaged: number;
  /** Times that the store failed: it is full, or not allowed here. Reads go to the source then. */
  readonly failures: number;
  /** The store's last error. */
  readonly lastFailure: unknown;
}

/** A source with a memory. */
export interface CachedSource extends ByteSource {
  readonly counts: CacheCounts;
  /** Requests to the source behind it; ranges that are kept need none. */
  readonly reads: Reads;
  /** Forgets all that is kept of this file, of all versions. */
  clear(): Promise<void>;
  close(): Promise<void>;
}

/** Longer reads go in pieces of this many bytes, so that one that breaks off goes on where it was. */
const PIECE_BYTES = 4 * 2 ** 20;

/**
 * A URL, or a source of your own that can `identify` itself, with a memory. `openPack`, sessions and everything else
 * that reads bytes takes it.
 *
 * Only checksums are compared when bytes come from the store: a program that can write there can change them.
 * `integrity` of `openPack` finds that out.
 * @param source nothing is read before it is needed
 * @param store `cacheStore`, `folderStore` of `eigenlora/node`, or your own
 * @throws TypeError when `source`, `store` or `integrity` is something else
 * @example
 * import { cachedSource, cacheStore } from "eigenlora/cache";
 * const pack = await openPack(cachedSource("https://example.org/tasks.eigen", cacheStore("packs")));
 */
export function cachedSource(
  source: string | URL | ByteSource,
  store: RangeStore,
  options: CacheOptions = {},
): CachedSource {
  checkOptions("cachedSource", options, ["integrity", ...FETCH_OPTIONS]);
  if (typeof (store as RangeStore | undefined)?.keys !== "function")
    throw new TypeError(`cachedSource: expected a store, such as cacheStore("packs"), got ${described(store)}`);
  // Checked first: nothing must be kept under a hash that is none.
  if (options.integrity !== undefined) fromIntegrity(options.integrity);
  const url =
    typeof source === "string" || source instanceof URL ? addressOf(String(source), "cachedSource") : undefined;
  const custom = typeof (source as ByteSource | undefined)?.read === "function" ? (source as ByteSource) : undefined;
  if (!url && !custom)
    throw new TypeError(`cachedSource: expected a URL or a ByteSource, got ${described(source)}; files need no cache`);
  const { integrity, ...fetchOptions } = options;
  const name = url ? nameOfUrl(url) : custom!.name;
  // A relative address is resolved now; a name of the Hub is read as it was given.
  const input = url ? (url.protocol === "hf:" ? String(source) : url.href) : custom!;
  const address = typeof input === "string" ? input : name;
  const counts = { hits: 0, misses: 0, damaged: 0, failures: 0, lastFailure: undefined as unknown };
  /** Counts for sources that do not count themselves. */
  const counted = { requests: 0, bytes: 0, whole: false };
  let inner: ByteSource | undefined;
  /** Size of the file as the store has it. */
  let length: number | undefined;
  let isClosed = false;
  // One for all callers: each would ask for the version, and count, by itself.
  let opening: Promise<ByteSource> | undefined;
  let finding: Promise<Ranges | undefined> | undefined;
  const now = (): Reads => inner?.reads ?? counted;

  const refuseClosed = (): void => {
    if (isClosed) throw new SourceError("cannot be read: it was closed; open it again", { file: name });
  };
  const openInner = async (): Promise<ByteSource> => {
    refuseClosed();
    opening ??= openSource(input, fetchOptions);
    opening.catch(() => (opening = undefined));
    return (inner = await opening);
  };
  const identify = async (how?: ReadOptions): Promise<string | undefined> =>
    integrity ?? (await openInner()).identify?.(how);
  /** A store that fails, for instance because it is full, costs requests and nothing else. */
  const unlessFailing = async <T>(work: () => Promise<T>): Promise<T | undefined> => {
    try {
      return await work();
    } catch (error) {
      counts.failures++;
      counts.lastFailure = error;
      return undefined;
    }
  };
  /** Digest that stands for the file in keys. */
  const fileKey = (): Promise<string> =>
    digestOf(integrity === undefined ? `address ${address}` : `integrity ${integrity}`);
  const find = async (): Promise<Ranges | undefined> => {
    const identity = await identify();
    if (identity === undefined) {
      const message = "nothing tells its version: no ETag or Last-Modified that can be read here";
      throw new SourceError(`${message}; give \`integrity\`, or do without a cache`, { file: name });
    }
    return unlessFailing(async () => openRanges(store, await fileKey(), await digestOf(identity)));
  };
  /** Undefined where the store does not work. */
  const rangesFor = (signal: AbortSignal | undefined): Promise<Ranges | undefined> => {
    throwIfAborted(signal);
    refuseClosed();
    finding ??= find();
    // Not kept when it failed: the next read may find the server.
    finding.catch(() => (finding = undefined));
    return unlessAborted(finding, signal);
  };
  const readPiece = async (
    ranges: Ranges | undefined,
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
  ): Promise<Uint8Array> => {
    const kept = await unlessFailing(async () => ranges?.get(offset, length));
    if (kept === "damaged") counts.damaged++;
    else if (kept) {
      counts.hits++;
      return kept;
    }
    counts.misses++;
    const bytes = await (await openInner()).read(offset, length, { signal });
    counted.requests++;
    counted.bytes += bytes.length;
    await unlessFailing(async () => ranges?.put(offset, bytes));
    return bytes;
  };

  const cached: CachedSource = {
    name,
    counts,
    reads: {
      get requests() {
        return now().requests;
      },
      get bytes() {
        return now().bytes;
      },
      get whole() {
        return now().whole;
      },
    },
    get byteLength() {
      return inner?.byteLength ?? length;
    },
    identify,
    async read(offset, length, { signal, onBytes } = {}) {
      const ranges = length === 0 ? undefined : await rangesFor(signal);
      if (length <= PIECE_BYTES) return length === 0 ? new Uint8Array(0) : readPiece(ranges, offset, length, signal);
      // Joined at the end: memory follows what arrives, not what is asked for.
      const pieces: Uint8Array[] = [];
      for (let at = offset; at < offset + length; at += PIECE_BYTES) {
        const piece = await readPiece(ranges, at, Math.min(PIECE_BYTES, offset + length - at), signal);
        pieces.push(piece);
        onBytes?.(piece.length);
      }
      return joined(pieces);
    },
    /** Whole files need their size, which is kept as well: there may be no server to ask. */
    async readAll(options = {}) {
      const ranges = await rangesFor(options.signal);
      length = ranges?.size();
      if (length === undefined) {
        const source = await openInner();
        if (source.byteLength === undefined) await source.read(0, 1, { signal: options.signal });
        const { byteLength } = source;
        // A server of another origin may not let it be seen.
        if (byteLength === undefined) return readAll(source, options);
        await unlessFailing(async () => ranges?.put(byteLength, new Uint8Array(0)));
      }
      return readBeginning(cached, cached.byteLength!, options);
    },
    async clear() {
      const ranges = (await finding?.catch(() => undefined)) ?? (await openRanges(store, await fileKey()));
      await ranges.clear();
    },
    async close() {
      isClosed = true;
      await (await opening?.catch(() => undefined))?.close?.();
    },
  };
  return cached;
}

const KEY = /^([0-9a-f]{32})\.([0-9a-f]{32})\.(\d{1,16})-(\d{1,16})$/;
const CHECKSUM_BYTES = 32;

/** The ranges of one version of a file in a store. */
type Ranges = Awaited<ReturnType<typeof openRanges>>;

/**
 * The ranges as of now and what happens here from now on. An entry is a range, followed by its SHA-256. Its key says
 * which file, which version, which bytes: the store's list of keys is all there is to know, so nothing can disagree
 * with it. An entry of no bytes lies at the end of the file, and so tells its size. Other versions of the file are
 * forgotten.
 * @param version undefined: all that there are stay
 */
async function openRanges(store: RangeStore, file: string, version?: string) {
  const kept = new Map<string, { readonly offset: number; readonly length: number }>();
  const forget = async (key: string): Promise<void> => {
    kept.delete(key);
    await store.delete(key);
  };
  for (const key of await store.keys()) {
    const [, owner, found, offset, length] = KEY.exec(key) ?? [];
    if (owner !== file) continue;
    if (version === undefined || found === version) kept.set(key, { offset: Number(offset), length: Number(length) });
    else await store.delete(key);
  }
  return {
    /** Size of the file, once it is known. */
    size: () => [...kept.values()].find(({ length }) => length === 0)?.offset,
    /** Bytes of a range that lie in one that is kept; "damaged" when they did, and are gone now. */
    async get(offset: number, length: number): Promise<Uint8Array | "damaged" | undefined> {
      const all = [...kept];
      const [key, range] = all.find(([, at]) => at.offset <= offset && offset + length <= at.offset + at.length) ?? [];
      if (!key || !range) return undefined;
      const entry = await store.get(key);
      if (!entry) {
        // Another program has deleted it.
        kept.delete(key);
        return undefined;
      }
      const bytes = entry.subarray(0, Math.max(0, entry.length - CHECKSUM_BYTES));
      const sum = entry.subarray(bytes.length);
      if (bytes.length === range.length && toHex(await sha256(bytes)) === toHex(sum))
        return bytes.subarray(offset - range.offset, offset - range.offset + length);
      await forget(key);
      return "damaged";
    },
    async put(offset: number, bytes: Uint8Array): Promise<void> {
      const { length } = bytes;
      const key = `${file}.${version}.${offset}-${length}`;
      const entry = new Uint8Array(length + CHECKSUM_BYTES);
      entry.set(bytes);
      entry.set(await sha256(bytes), length);
      await store.put(key, entry);
      // Listed only once it is there: a reader that did not find it would take it off the list, and it would never be
      // deleted.
      kept.set(key, { offset, length });
    },
    async clear(): Promise<void> {
      for (const key of [...kept.keys()]) await forget(key);
    },
  };
}

/** Stands for a text in keys: 128 bits of its SHA-256. */
async function digestOf(text: string): Promise<string> {
  return toHex((await sha256(new TextEncoder().encode(text))).subarray(0, 16));
}

/**
 * Bytes under names. Entries may vanish or be damaged at any time: they are checked when they are read. Keys are up to
 * 120 letters, digits, dots and hyphens.
 */
export interface RangeStore {
  /** The bytes; undefined when there are none. */
  get(key: string): Promise<Uint8Array | undefined>;
  /** Keeps bytes, in place of those that were there. They must not be changed afterwards. */
  put(key: string, bytes: Uint8Array): Promise<void>;
  /** Forgets bytes, if there are any. */
  delete(key: string): Promise<void>;
  /** The keys of all entries; others may be among them. */
  keys(): Promise<Iterable<string>>;
}

/** Keys of the Cache API are addresses; no server has these. */
const ORIGIN = "https://eigenlora.invalid/";

/**
 * The Cache API, in windows and in workers of secure contexts: https, or localhost.
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

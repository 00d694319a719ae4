/**
 * A source that keeps what it reads in a store, and reads it from there the next time. What a version of a file is, its server
 * says, or the caller who knows what the file must hold; bytes of different versions never meet.
 */

import { checkOptions, described } from "../arguments.ts";
import { SourceError } from "../errors.ts";
import { fromIntegrity, sha256 } from "../format/fields.ts";
import { addressOf, openSource } from "../open-source.ts";
import { throwIfAborted } from "../pace.ts";
import {
  type ByteSource,
  FETCH_OPTIONS,
  type FetchOptions,
  nameOfUrl,
  type ReadAllOptions,
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
   * The root that the pack must have, as `openPack` takes it; give it to both, for it is `openPack` that checks it. What is kept is
   * then found by this, whatever the address, and works offline: the server is not even asked for its version. Of other files, such as
   * models, it is a name that the caller vouches for: the hash of the file, say. Default: the server's ETag or Last-Modified, asked for
   * once by one request without bytes.
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
 * A URL, or a source of your own that can `identify` itself, with a memory. `openPack`, sessions and everything else that reads
 * bytes takes it.
 *
 * Only checksums are compared when bytes come from the store: a program that can write there can change them. `integrity` of
 * `openPack` finds that out.
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
  // A relative address is resolved now; a name of the Hub is read as it was given.
  const input = url && (url.protocol === "hf:" ? String(source) : url.href);
  return new Cached(input ?? custom!, url ? nameOfUrl(url) : custom!.name, store, options);
}

class Cached implements CachedSource {
  readonly name: string;
  readonly counts = { hits: 0, misses: 0, damaged: 0, failures: 0, lastFailure: undefined as unknown };
  readonly reads: Reads;
  readonly #input: string | ByteSource;
  readonly #store: RangeStore;
  readonly #integrity: string | undefined;
  readonly #fetchOptions: FetchOptions;
  /** Counts for sources that do not count themselves. */
  readonly #counted = { requests: 0, bytes: 0, whole: false };
  #inner: ByteSource | undefined;
  /** Size of the file as the store has it. */
  #length: number | undefined;
  /** One for all: each would ask for the version, and count, by itself. */
  #opening: Promise<ByteSource> | undefined;
  #closed = false;
  #ranges: Promise<Ranges | undefined> | undefined;

  constructor(input: string | ByteSource, name: string, store: RangeStore, { integrity, ...options }: CacheOptions) {
    this.name = name;
    this.#input = input;
    this.#store = store;
    this.#integrity = integrity;
    this.#fetchOptions = options;
    const now = (): Reads => this.#inner?.reads ?? this.#counted;
    this.reads = {
      get requests() {
        return now().requests;
      },
      get bytes() {
        return now().bytes;
      },
      get whole() {
        return now().whole;
      },
    };
  }

  get byteLength(): number | undefined {
    return this.#inner?.byteLength ?? this.#length;
  }

  /** Whole files need their size, which is kept as well: there may be no server to ask. */
  async readAll(options: ReadAllOptions = {}): Promise<Uint8Array> {
    const { signal } = options;
    throwIfAborted(signal);
    this.#refuseClosed();
    const ranges = await unlessAborted(this.#open(), signal);
    this.#length = ranges?.size;
    if (this.#length === undefined) {
      const source = await this.#source();
      if (source.byteLength === undefined) await source.read(0, 1, { signal });
      const { byteLength } = source;
      // A server of another origin may not let it be seen.
      if (byteLength === undefined) return readAll(source, options);
      await this.#unlessFailing(async () => ranges?.put(byteLength, new Uint8Array(0)));
    }
    return readBeginning(this, this.byteLength!, options);
  }

  async read(offset: number, length: number, { signal, onBytes }: ReadOptions = {}): Promise<Uint8Array> {
    throwIfAborted(signal);
    this.#refuseClosed();
    if (length === 0) return new Uint8Array(0);
    const ranges = await unlessAborted(this.#open(), signal);
    if (length <= PIECE_BYTES) return this.#piece(ranges, offset, length, signal);
    // Joined at the end: memory follows what arrives, not what is asked for.
    const pieces: Uint8Array[] = [];
    for (let at = offset; at < offset + length; at += PIECE_BYTES) {
      const piece = await this.#piece(ranges, at, Math.min(PIECE_BYTES, offset + length - at), signal);
      pieces.push(piece);
      onBytes?.(piece.length);
    }
    const bytes = new Uint8Array(length);
    for (const [i, piece] of pieces.entries()) bytes.set(piece, i * PIECE_BYTES);
    return bytes;
  }

  async identify(options?: ReadOptions): Promise<string | undefined> {
    return this.#integrity ?? (await this.#source()).identify?.(options);
  }

  async clear(): Promise<void> {
    const ranges = (await this.#ranges?.catch(() => undefined)) ?? (await Ranges.open(this.#store, await this.#file()));
    await ranges.clear();
  }

  async close(): Promise<void> {
    this.#closed = true;
    await (await this.#opening?.catch(() => undefined))?.close?.();
  }

  #refuseClosed(): void {
    if (this.#closed) throw new SourceError("cannot be read: it was closed; open it again", { file: this.name });
  }

  async #source(): Promise<ByteSource> {
    this.#refuseClosed();
    this.#opening ??= openSource(this.#input, this.#fetchOptions).catch((error: unknown) => {
      this.#opening = undefined;
      throw error;
    });
    return (this.#inner = await this.#opening);
  }

  /** Undefined where the store does not work. */
  #open(): Promise<Ranges | undefined> {
    // Not kept when it failed: the next read may find the server.
    this.#ranges ??= this.#find().catch((error: unknown) => {
      this.#ranges = undefined;
      throw error;
    });
    return this.#ranges;
  }

  async #find(): Promise<Ranges | undefined> {
    const identity = await this.identify();
    if (identity === undefined) {
      const message = "nothing tells its version: no ETag or Last-Modified that can be read here";
      throw new SourceError(`${message}; give \`integrity\`, or do without a cache`, { file: this.name });
    }
    return this.#unlessFailing(async () => Ranges.open(this.#store, await this.#file(), await digestOf(identity)));
  }

  /** Digest that stands for the file in keys. */
  #file(): Promise<string> {
    const integrity = this.#integrity;
    const address = typeof this.#input === "string" ? this.#input : this.#input.name;
    return digestOf(integrity === undefined ? `address ${address}` : `integrity ${integrity}`);
  }

  async #piece(
    ranges: Ranges | undefined,
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
  ): Promise<Uint8Array> {
    const kept = await this.#unlessFailing(async () => ranges?.get(offset, length));
    if (kept === "damaged") this.counts.damaged++;
    else if (kept) {
      this.counts.hits++;
      return kept;
    }
    this.counts.misses++;
    const bytes = await (await this.#source()).read(offset, length, { signal });
    this.#counted.requests++;
    this.#counted.bytes += bytes.length;
    await this.#unlessFailing(async () => ranges?.put(offset, bytes));
    return bytes;
  }

  /** A store that fails, for instance because it is full, costs requests and nothing else. */
  async #unlessFailing<T>(work: () => Promise<T>): Promise<T | undefined> {
    try {
      return await work();
    } catch (error) {
      this.counts.failures++;
      this.counts.lastFailure = error;
      return undefined;
    }
  }
}

/** A range that is kept. */
interface Kept {
  readonly key: string;
  readonly offset: number;
  readonly length: number;
}

const KEY = /^([0-9a-f]{32})\.([0-9a-f]{32})\.(\d{1,16})-(\d{1,16})$/;
const CHECKSUM_BYTES = 32;

/**
 * The ranges of one version of a file in a store, as of when it was opened and what happened here since. An entry is a range, followed by its
 * SHA-256. Its key says which file, which version, which bytes: the store's list of keys is all there is to know, so nothing can disagree with it.
 * An entry of no bytes lies at the end of the file, and so tells its size.
 */
class Ranges {
  readonly #store: RangeStore;
  /** Beginning of the keys. */
  readonly #prefix: string;
  #kept: readonly Kept[];

  private constructor(store: RangeStore, prefix: string, kept: readonly Kept[]) {
    this.#store = store;
    this.#prefix = prefix;
    this.#kept = kept;
  }

  /** Forgets other versions of the file. @param version undefined: whichever there are stay */
  static async open(store: RangeStore, file: string, version?: string): Promise<Ranges> {
    const kept: Kept[] = [];
    for (const key of await store.keys()) {
      const [, owner, found, offset, length] = KEY.exec(key) ?? [];
      if (owner !== file) continue;
      if (version === undefined || found === version)
        kept.push({ key, offset: Number(offset), length: Number(length) });
      else await store.delete(key);
    }
    return new Ranges(store, `${file}.${version}`, kept);
  }

  /** Size of the file, once it is known. */
  get size(): number | undefined {
    return this.#kept.find(({ length }) => length === 0)?.offset;
  }

  /**
   * Bytes of a range that lie in one that is kept.
   * @returns "damaged" when they did, and are gone now; undefined when there are none
   */
  async get(offset: number, length: number): Promise<Uint8Array | "damaged" | undefined> {
    const kept = this.#kept.find((range) => range.offset <= offset && offset + length <= range.offset + range.length);
    if (!kept) return undefined;
    const entry = await this.#store.get(kept.key);
    if (!entry) {
      // Another program has deleted it.
      this.#kept = this.#kept.filter((range) => range !== kept);
      return undefined;
    }
    const bytes = entry.subarray(0, Math.max(0, entry.length - CHECKSUM_BYTES));
    const sum = entry.subarray(bytes.length);
    if (bytes.length === kept.length && toHex(await sha256(bytes)) === toHex(sum))
      return bytes.subarray(offset - kept.offset, offset - kept.offset + length);
    await this.#delete(kept);
    return "damaged";
  }

  async put(offset: number, bytes: Uint8Array): Promise<void> {
    const { length } = bytes;
    const key = `${this.#prefix}.${offset}-${length}`;
    const entry = new Uint8Array(length + CHECKSUM_BYTES);
    entry.set(bytes);
    entry.set(await sha256(bytes), length);
    await this.#store.put(key, entry);
    // Listed only once it is there: a reader that did not find it would take it off the list, and it would never be deleted.
    this.#kept = [...this.#kept, { key, offset, length }];
  }

  async clear(): Promise<void> {
    for (const range of this.#kept) await this.#delete(range);
  }

  async #delete(kept: Kept): Promise<void> {
    this.#kept = this.#kept.filter((range) => range !== kept);
    await this.#store.delete(kept.key);
  }
}

/** Stands for a text in keys: 128 bits of its SHA-256. */
async function digestOf(text: string): Promise<string> {
  return toHex((await sha256(new TextEncoder().encode(text))).subarray(0, 16));
}

/**
 * Bytes under names. Entries may vanish or be damaged at any time: they are checked when they are read. Keys are up to 120
 * letters, digits, dots and hyphens.
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

/**
 * A source that keeps what it reads in a store, and reads it from there the next time. What a version of a file is, its server
 * says, or the caller who knows what the file must hold; bytes of different versions never meet.
 */

import { checkOptions, described } from "../arguments.ts";
import { SourceError } from "../errors.ts";
import { fromIntegrity, sha256 } from "../format/fields.ts";
import { nameOf } from "../http/exchange.ts";
import { addressOf, openSource } from "../open-source.ts";
import { throwIfAborted } from "../pace.ts";
import {
  type ByteSource,
  FETCH_OPTIONS,
  type FetchOptions,
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
  const own = typeof (source as ByteSource | undefined)?.read === "function" ? (source as ByteSource) : undefined;
  if (!url && !own)
    throw new TypeError(`cachedSource: expected a URL or a ByteSource, got ${described(source)}; files need no cache`);
  // A relative address is resolved now; a name of the Hub is read as it was given.
  const input = url && (url.protocol === "hf:" ? String(source) : url.href);
  return new Cached(input ?? own!, url ? nameOf(url) : own!.name, store, options);
}

/** A file in the store. */
interface CachedFile {
  readonly shelf: Shelf;
  readonly file: string;
  readonly version: string;
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
  #place: Promise<CachedFile | undefined> | undefined;

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
    this.#live();
    const place = await unlessAborted(this.#open(), signal);
    const file = await this.#sizeFile();
    const kept = place && (await this.#unlessFailing(() => place.shelf.get(file, place.version, 0, 8)));
    if (kept && kept !== "damaged") this.#length = new DataView(kept.slice().buffer).getFloat64(0);
    else {
      const source = await this.#source();
      if (source.byteLength === undefined) await source.read(0, 1, { signal });
      // A server of another origin may not let it be seen.
      if (source.byteLength === undefined) return readAll(source, options);
      const bytes = new Uint8Array(8);
      new DataView(bytes.buffer).setFloat64(0, source.byteLength);
      if (place) await this.#unlessFailing(() => place.shelf.put(file, place.version, 0, bytes));
    }
    return readBeginning(this, this.byteLength!, options);
  }

  async read(offset: number, length: number, { signal, onBytes }: ReadOptions = {}): Promise<Uint8Array> {
    throwIfAborted(signal);
    this.#live();
    if (length === 0) return new Uint8Array(0);
    const place = await unlessAborted(this.#open(), signal);
    if (length <= PIECE_BYTES) return this.#piece(place, offset, length, signal);
    // Joined at the end: memory follows what arrives, not what is asked for.
    const pieces: Uint8Array[] = [];
    for (let at = offset; at < offset + length; at += PIECE_BYTES) {
      const piece = await this.#piece(place, at, Math.min(PIECE_BYTES, offset + length - at), signal);
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
    const place = await this.#place?.catch(() => undefined);
    const shelf = place?.shelf ?? (await Shelf.open(this.#store));
    for (const file of [await this.#file(), await this.#sizeFile()]) await shelf.forget(file);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await (await this.#opening?.catch(() => undefined))?.close?.();
  }

  #live(): void {
    if (this.#closed) throw new SourceError("cannot be read: it was closed; open it again", { file: this.name });
  }

  async #source(): Promise<ByteSource> {
    this.#live();
    this.#opening ??= openSource(this.#input, this.#fetchOptions).catch((error: unknown) => {
      this.#opening = undefined;
      throw error;
    });
    return (this.#inner = await this.#opening);
  }

  /** Undefined where the store does not work. */
  #open(): Promise<CachedFile | undefined> {
    // Not kept when it failed: the next read may find the server.
    this.#place ??= this.#find().catch((error: unknown) => {
      this.#place = undefined;
      throw error;
    });
    return this.#place;
  }

  async #find(): Promise<CachedFile | undefined> {
    const identity = await this.identify();
    if (identity === undefined) {
      const message = "nothing tells its version: no ETag or Last-Modified that can be read here";
      throw new SourceError(`${message}; give \`integrity\`, or do without a cache`, { file: this.name });
    }
    return this.#unlessFailing(async () => {
      const [file, version, shelf] = [await this.#file(), await digestOf(identity), await Shelf.open(this.#store)];
      for (const one of [file, await this.#sizeFile()]) await shelf.forget(one, version);
      return { shelf, file, version };
    });
  }

  /** Digest that stands for the file in keys. */
  #file(): Promise<string> {
    const integrity = this.#integrity;
    const address = typeof this.#input === "string" ? this.#input : this.#input.name;
    return digestOf(integrity === undefined ? `address ${address}` : `integrity ${integrity}`);
  }

  /** Digest that stands for the file's size in keys. */
  async #sizeFile(): Promise<string> {
    return digestOf(`size of ${await this.#file()}`);
  }

  async #piece(
    place: CachedFile | undefined,
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
  ): Promise<Uint8Array> {
    const kept = place && (await this.#unlessFailing(() => place.shelf.get(place.file, place.version, offset, length)));
    if (kept === "damaged") this.counts.damaged++;
    else if (kept) {
      this.counts.hits++;
      return kept;
    }
    this.counts.misses++;
    const bytes = await (await this.#source()).read(offset, length, { signal });
    this.#counted.requests++;
    this.#counted.bytes += bytes.length;
    if (place) await this.#unlessFailing(() => place.shelf.put(place.file, place.version, offset, bytes));
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

// The ranges of files in a store. An entry is a range, followed by its SHA-256. Its key says which file, which version, which bytes: the
// store's list of keys is all there is to know, so nothing can disagree with it.

/** A range that is kept. */
interface Kept {
  readonly key: string;
  readonly file: string;
  readonly version: string;
  readonly offset: number;
  readonly length: number;
}

const KEY = /^([0-9a-f]{32})\.([0-9a-f]{32})\.(\d{1,16})-(\d{1,16})$/;
const CHECKSUM_BYTES = 32;

/** The ranges in a store, as of when it was opened and what happened here since. */
class Shelf {
  readonly #store: RangeStore;
  readonly #kept: Map<string, Kept>;

  private constructor(store: RangeStore, kept: Map<string, Kept>) {
    this.#store = store;
    this.#kept = kept;
  }

  static async open(store: RangeStore): Promise<Shelf> {
    const kept = new Map<string, Kept>();
    for (const key of await store.keys()) {
      const [, file, version, offset, length] = KEY.exec(key) ?? [];
      if (file && version) kept.set(key, { key, file, version, offset: Number(offset), length: Number(length) });
    }
    return new Shelf(store, kept);
  }

  /**
   * Bytes of a range that lie in one that is kept.
   * @returns "damaged" when they did, and are gone now; undefined when there are none
   */
  async get(
    file: string,
    version: string,
    offset: number,
    length: number,
  ): Promise<Uint8Array | "damaged" | undefined> {
    for (const kept of this.#kept.values()) {
      const from = offset - kept.offset;
      if (kept.file !== file || kept.version !== version || from < 0 || from + length > kept.length) continue;
      const entry = await this.#store.get(kept.key);
      if (!entry) {
        // Another program has deleted it.
        this.#kept.delete(kept.key);
        return undefined;
      }
      const bytes = entry.subarray(0, Math.max(0, entry.length - CHECKSUM_BYTES));
      const sum = entry.subarray(bytes.length);
      if (bytes.length === kept.length && toHex(await sha256(bytes)) === toHex(sum))
        return bytes.subarray(from, from + length);
      await this.#delete(kept.key);
      return "damaged";
    }
    return undefined;
  }

  async put(file: string, version: string, offset: number, bytes: Uint8Array): Promise<void> {
    const { length } = bytes;
    const key = `${file}.${version}.${offset}-${length}`;
    const entry = new Uint8Array(length + CHECKSUM_BYTES);
    entry.set(bytes);
    entry.set(await sha256(bytes), length);
    await this.#store.put(key, entry);
    // Listed only once it is there: a reader that did not find it would take it off the list, and it would never be deleted.
    this.#kept.set(key, { key, file, version, offset, length });
  }

  /** Forgets the ranges of a file, except those of one version. */
  async forget(file: string, except?: string): Promise<void> {
    for (const kept of [...this.#kept.values()])
      if (kept.file === file && kept.version !== except) await this.#delete(kept.key);
  }

  async #delete(key: string): Promise<void> {
    this.#kept.delete(key);
    await this.#store.delete(key);
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

/**
 * Sources of bytes. Everything that reads a file in this package reads it through `ByteSource`: exact ranges, and for
 * some sources a little more. Paths, blobs, buffers and URLs become sources in open-source.ts; a cache is
 * eigenlora/cache.
 */
import { SourceError } from "./errors.ts";
import { reasonOf } from "./pace.ts";

export type {} from "./globals.ts";

/** Options of what can be cancelled. */
export interface AbortOptions {
  /** Aborted, the work ends as soon as it can, and its promise is rejected with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Options of one read. */
export interface ReadOptions extends AbortOptions {
  /** Told the number of bytes as they arrive, by sources that do not have all at once. */
  readonly onBytes?: ((count: number) => void) | undefined;
}

/** Options of reading a file whole. */
export interface ReadAllOptions extends ReadOptions {
  /**
   * Told the first bytes, at least 64 or all that there are: how many the file may have. No more than one byte beyond
   * is taken, since an answer may have no end.
   */
  readonly most?: ((first: Uint8Array) => number) | undefined;
}

/** Cost of reading. */
export interface Reads {
  /** Requests made; those of other sources than URLs count as one for each read. */
  readonly requests: number;
  /** Bytes that arrived. */
  readonly bytes: number;
  /** True when the server has no ranges: the file was read whole and stays in memory until it is closed. */
  readonly whole: boolean;
}

/**
 * Random access to bytes. Implement it to read from anything else: a database, an archive. Only what has no `?` is
 * needed.
 */
export interface ByteSource {
  /** Path or URL, for messages. */
  readonly name: string;
  /** Size in bytes, once known: at once for files and buffers, after the first read for URLs. */
  readonly byteLength: number | undefined;
  /**
   * Exactly `length` bytes from `offset`. The result may be a view of shared memory: do not write to it.
   * @throws SourceError when the bytes cannot be had, including when the source ends before `offset + length`.
   */
  read(offset: number, length: number, options?: ReadOptions): Promise<Uint8Array>;
  /** The folder of a file on a disk; undefined where it is reached by a link, as in the caches of model hubs. */
  readonly folder?: string | undefined;
  /** Cost of reading so far, kept up to date. For sources that do not make one request for each read. */
  readonly reads?: Reads;
  /**
   * The whole file, in one request where `read` would need two.
   * @throws SourceError when the bytes cannot be had
   */
  readAll?(options?: ReadAllOptions): Promise<Uint8Array>;
  /**
   * Validator of this version of the file, such as an ETag; undefined if there is none.
   * @throws SourceError when that cannot be found out
   */
  identify?(options?: ReadOptions): Promise<string | undefined>;
  /** Forgets what it keeps of the file, for instance because it turned out to be damaged. */
  clear?(): Promise<void>;
  /** Releases file handles. Reading afterwards is an error. */
  close?(): Promise<void>;
}

/**
 * Input of `openSource`, and so of `openPack`. A string is a path where there are files, else a URL; in both
 * `hf:org/name@revision/file` is a file on the Hugging Face Hub.
 */
export type SourceInput = string | URL | Blob | ArrayBuffer | Uint8Array | ByteSource;

/** Options of reading URLs. */
export interface FetchOptions {
  /** Used in place of the global `fetch`. */
  readonly fetch?: (url: string, init: RequestInit) => Promise<Response>;
  /**
   * Sent with every request to the host of the address, for instance `Authorization`; another host that a redirect
   * leads to gets none. With others than `Authorization`, browsers, which hide redirects, refuse them.
   */
  readonly headers?: Record<string, string>;
  /** Milliseconds that a server has to answer, and to send what `minRate` asks for. Default: 30 000. */
  readonly timeout?: number;
  /**
   * Bytes per second: a request fails when fewer than `minRate` × `timeout` of them arrive within `timeout`. Default:
   * 500.
   */
  readonly minRate?: number;
  /**
   * Number of retries after retryable faults: network faults, and the statuses 408, 429, 500, 502, 503 and 504.
   * Pauses grow from a quarter of a second, or are what the server asks for, up to `timeout`. Default: 3.
   */
  readonly retries?: number;
  /** Most bytes of a file that is read whole because the server has no ranges. Default: 256 MiB. */
  readonly maxWholeBytes?: number;
}

/** The names of `FetchOptions`. */
export const FETCH_OPTIONS = ["fetch", "headers", "timeout", "minRate", "retries", "maxWholeBytes"] as const;

/** @throws SourceError when a range is not inside the file */
export function checkRange(name: string, offset: number, length: number, size: number): void {
  if (!(offset >= 0 && length >= 0 && offset + length <= size)) {
    const message = `ends at byte ${size}, but bytes ${offset} to ${offset + length} are needed: it is truncated`;
    throw new SourceError(message, { file: name });
  }
}

/** The address without what may be secret, and without the content of a data: URL. */
export function nameOfUrl(url: URL): string {
  const { protocol, origin, pathname, search, href } = url;
  if (protocol === "data:") return "data: URL";
  return /^(blob|hf):/.test(protocol) ? href : `${origin}${pathname}${search && "?…"}`;
}

/** Bytes one behind the other. */
export function joined(chunks: readonly Uint8Array[]): Uint8Array {
  if (chunks.length === 1) return chunks[0]!;
  const bytes = new Uint8Array(chunks.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

/** Bytes by which a file says how long it is. */
export const FIRST_BYTES = 64;

/** @throws SourceError when the source cannot say how large it is */
export async function readAll(source: ByteSource, options: ReadAllOptions = {}): Promise<Uint8Array> {
  if (source.readAll) return source.readAll(options);
  // The size may be known only after the first read.
  if (source.byteLength === undefined) await source.read(0, 1, options);
  const { byteLength } = source;
  if (byteLength === undefined) {
    throw new SourceError("does not say its size after the first read; read it yourself and pass its bytes", {
      file: source.name,
    });
  }
  return readBeginning(source, byteLength, options);
}

/** All bytes of a source, or as many as `most` allows. */
export async function readBeginning(
  source: ByteSource,
  byteLength: number,
  { most, ...options }: ReadAllOptions,
): Promise<Uint8Array> {
  const first = most && (await source.read(0, Math.min(FIRST_BYTES, byteLength), options));
  return source.read(0, Math.min(byteLength, first ? most(first) + 1 : Infinity), options);
}

/** Waits that a signal ends. It has one listener for all of them, since Node warns of more than ten. */
const waits = new WeakMap<AbortSignal, Set<() => void>>();

function endWaits(this: AbortSignal): void {
  for (const end of waits.get(this)!) end();
}

/** Waits for a promise, or throws the signal's reason as soon as it is aborted; the work behind the promise goes on. */
export function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise;
  return new Promise<T>((resolve, reject) => {
    const end = (): void => reject(reasonOf(signal) as Error);
    if (signal.aborted) end();
    const ends = waits.get(signal) ?? new Set();
    waits.set(signal, ends.add(end));
    // Listens no second time with the same function.
    signal.addEventListener("abort", endWaits);
    promise.then(resolve, reject).finally(() => {
      ends.delete(end);
      if (!ends.size) signal.removeEventListener("abort", endWaits);
    });
  });
}

/** Work that several callers wait for, each as long as its own signal allows. It is stopped once all have left. */
export class SharedWork<T> {
  readonly #controller: AbortController | undefined;
  readonly #result: Promise<T>;
  #waiting = 0;
  #done = false;
  /** True once it failed or all have left: the next caller begins anew. */
  #stopped = false;

  /** @param first signal of the first caller: without one that caller never leaves, and the work is never stopped */
  constructor(work: (signal: AbortSignal | undefined) => Promise<T>, first: AbortSignal | undefined) {
    this.#controller = first && new AbortController();
    this.#result = work(this.#controller?.signal);
    this.#result.then(
      () => (this.#done = true),
      () => (this.#stopped = true),
    );
  }

  /** The work that is under way, or new work where there is none that can be joined. */
  static join<T>(
    known: SharedWork<T> | undefined,
    work: (signal: AbortSignal | undefined) => Promise<T>,
    signal: AbortSignal | undefined,
  ): SharedWork<T> {
    return known && !known.#stopped ? known : new SharedWork(work, signal);
  }

  /** Waits for the result, or throws the reason of the signal as soon as that is aborted. */
  wait(signal: AbortSignal | undefined): Promise<T> {
    this.#waiting++;
    return unlessAborted(this.#result, signal).finally(() => {
      if (--this.#waiting > 0 || this.#done) return;
      this.#stopped = true;
      this.#controller?.abort();
    });
  }
}

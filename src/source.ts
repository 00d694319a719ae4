/**
 * Where bytes come from. Everything that reads a file in this package reads it through `ByteSource`: one method, exact
 * ranges, no state. Paths, blobs, buffers and URLs become sources in `openSource`. Not a cache, and nothing is retried.
 */
import { openPath } from "#platform";
import { described } from "./arguments.ts";
import { SourceError } from "./errors.ts";

/** Options of one read. */
export interface ReadOptions {
  signal?: AbortSignal | undefined;
}

/** Random access to bytes. Implement it to read from anything else: a cache, a database, an archive. */
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
  /** Releases file handles. Reading afterwards is an error. */
  close?(): Promise<void>;
}

/** What `openSource`, and so `openPack`, accepts. A string is a path where there are files, else a URL. */
export type SourceInput = string | URL | Blob | ArrayBuffer | Uint8Array | ByteSource;

/** How URLs are read. */
export interface FetchOptions {
  /** In place of the global `fetch`. */
  fetch?: typeof fetch;
  /** Sent with every request, for instance `Authorization`. */
  headers?: Record<string, string>;
  /** Milliseconds without a byte after which a read fails. 30 000 unless given. */
  timeout?: number;
}

/**
 * Makes a source of whatever names or holds bytes. URLs are not contacted before the first read.
 * @throws TypeError when `input` is none of the accepted kinds
 * @throws SourceError when a path cannot be opened
 */
export async function openSource(input: SourceInput, options: FetchOptions = {}): Promise<ByteSource> {
  if (input instanceof ArrayBuffer) return bufferSource(new Uint8Array(input), "ArrayBuffer");
  if (input instanceof Uint8Array) {
    // A plain view: Node's Buffer is a Uint8Array whose `slice` does not copy.
    return bufferSource(new Uint8Array(input.buffer, input.byteOffset, input.byteLength), "Uint8Array");
  }
  if (typeof Blob !== "undefined" && input instanceof Blob) return blobSource(input);
  if (typeof input === "string" || input instanceof URL) {
    const text = String(input);
    if (!/^(https?|blob|data):/i.test(text) && openPath) return openPath(text);
    const base = (globalThis as { location?: { href: string } }).location?.href;
    if (!URL.canParse(text, base))
      throw new TypeError(`openSource: "${text}" is not a URL, and there are no files here`);
    return urlSource(new URL(text, base).href, options);
  }
  if (typeof (input as ByteSource | undefined)?.read === "function") return input as ByteSource;
  throw new TypeError(`openSource: expected a path, URL, Blob, ArrayBuffer or ByteSource, got ${described(input)}`);
}

function checkRange(name: string, offset: number, length: number, size: number): void {
  if (!(offset >= 0 && length >= 0 && offset + length <= size)) {
    throw new SourceError(
      `ends at byte ${size}, but bytes ${offset} to ${offset + length} are needed: it is truncated`,
      {
        file: name,
      },
    );
  }
}

/** Bytes in memory; reads are views. */
function bufferSource(bytes: Uint8Array, name: string): ByteSource {
  return {
    name,
    byteLength: bytes.length,
    async read(offset, length, options) {
      options?.signal?.throwIfAborted();
      checkRange(name, offset, length, bytes.length);
      return bytes.subarray(offset, offset + length);
    },
  };
}

function blobSource(blob: Blob): ByteSource {
  const name = (blob as Partial<File>).name ?? "Blob";
  return {
    name,
    byteLength: blob.size,
    async read(offset, length, options) {
      options?.signal?.throwIfAborted();
      checkRange(name, offset, length, blob.size);
      const bytes = new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
      options?.signal?.throwIfAborted();
      return bytes;
    },
  };
}

/**
 * A file behind HTTP ranges. Every answer is held against what was asked: status, range, total size, entity tag and number
 * of bytes, so that a file that changes between two reads is noticed and never mixed.
 */
function urlSource(url: string, options: FetchOptions): ByteSource {
  let total: number | undefined;
  let validator: string | undefined;
  const fail = (message: string, more: { status?: number; cause?: unknown } = {}): never => {
    throw new SourceError(message, { file: url, ...more });
  };

  async function read(offset: number, length: number, signal: AbortSignal | undefined): Promise<Uint8Array> {
    if (length === 0) return new Uint8Array(0);
    if (total !== undefined) checkRange(url, offset, length, total);
    const stalled = new AbortController();
    const timeout = options.timeout ?? 30_000;
    let timer = setTimeout(() => stalled.abort(), timeout);
    const progress = (): void => {
      clearTimeout(timer);
      timer = setTimeout(() => stalled.abort(), timeout);
    };
    const stop = (): void => stalled.abort();
    signal?.addEventListener("abort", stop);
    try {
      const headers = { ...options.headers, Range: `bytes=${offset}-${offset + length - 1}` };
      const response = await (options.fetch ?? fetch)(url, { headers, signal: stalled.signal });
      progress();
      try {
        checkResponse(response, offset, length);
      } catch (error) {
        await response.body?.cancel().catch(() => undefined);
        throw error;
      }
      return await readBody(response, length, progress);
    } catch (cause) {
      signal?.throwIfAborted();
      if (cause instanceof SourceError) throw cause;
      if (stalled.signal.aborted) fail(`no byte arrived for ${timeout} ms; try again, or raise \`timeout\``, { cause });
      return fail(`cannot be fetched: ${(cause as Error).message}`, { cause });
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", stop);
    }
  }

  function checkResponse(response: Response, offset: number, length: number): void {
    const { status } = response;
    if (status === 200) {
      fail(
        "the server ignores ranges (status 200); use one that supports them, or fetch it yourself and pass the bytes",
        { status },
      );
    }
    if (status === 416) {
      fail(`the server has no bytes ${offset} to ${offset + length} (status 416): the file is truncated`, { status });
    }
    if (status !== 206) fail(`the server answered ${status} ${response.statusText}; check the address`, { status });
    const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(response.headers.get("content-range") ?? "");
    // Cross-origin answers hide Content-Range unless the server exposes it; then the number of bytes is the only check.
    if (range) {
      const [start, end, size] = [Number(range[1]), Number(range[2]) + 1, range[3]];
      if (size !== "*") {
        if (total !== undefined && Number(size) !== total) changed();
        total = Number(size);
        checkRange(url, offset, length, total);
      }
      if (start !== offset || end !== offset + length) {
        fail(`asked for bytes ${offset} to ${offset + length}, the server sent ${start} to ${end}`, { status });
      }
    }
    const seen = response.headers.get("etag") ?? response.headers.get("last-modified") ?? undefined;
    if (validator !== undefined && seen !== undefined && seen !== validator) changed();
    validator ??= seen;
  }

  const changed = (): never => fail("the file changed between two reads; open it again");

  async function readBody(response: Response, length: number, progress: () => void): Promise<Uint8Array> {
    const bytes = new Uint8Array(length);
    let done = 0;
    const reader = response.body?.getReader();
    if (!reader) {
      // Runtimes without streaming bodies, React Native among them.
      const whole = new Uint8Array(await response.arrayBuffer());
      if (whole.length !== length) fail(`${whole.length} bytes arrived of ${length}; try again`);
      return whole;
    }
    for (;;) {
      const { value, done: end } = await reader.read();
      if (end) break;
      progress();
      if (done + value.length > length) {
        await reader.cancel().catch(() => undefined);
        fail(`more than the ${length} bytes asked for arrived`);
      }
      bytes.set(value, done);
      done += value.length;
    }
    if (done !== length) fail(`the connection ended after ${done} of ${length} bytes; try again`);
    return bytes;
  }

  return {
    name: url,
    get byteLength() {
      return total;
    },
    async read(offset, length, readOptions) {
      readOptions?.signal?.throwIfAborted();
      return read(offset, length, readOptions?.signal);
    },
  };
}

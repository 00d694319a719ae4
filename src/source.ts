/**
 * Where bytes come from. Everything that reads a file in this package reads it through `ByteSource`: one method, exact
 * ranges, no state. Paths, blobs, buffers and URLs become sources in `openSource`. Not a cache, and nothing is retried.
 */
import { openPath } from "#platform";
import { described } from "./arguments.ts";
import { SourceError } from "./errors.ts";

/** Options of one read. */
export interface ReadOptions {
  readonly signal?: AbortSignal | undefined;
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
  readonly fetch?: typeof fetch;
  /** Sent with every request, for instance `Authorization`. */
  readonly headers?: Record<string, string>;
  /** Milliseconds without a byte after which a read fails. Default: 30 000. */
  readonly timeout?: number;
}

/**
 * Makes a source of whatever names or holds bytes. URLs are not contacted before the first read.
 * @throws TypeError when `input` is none of the accepted kinds
 * @throws SourceError when a path cannot be opened
 */
export async function openSource(input: SourceInput, options: FetchOptions = {}): Promise<ByteSource> {
  if (input instanceof ArrayBuffer || input instanceof Uint8Array) {
    // A plain view: Node's Buffer is a Uint8Array whose `slice` does not copy.
    const bytes =
      input instanceof ArrayBuffer
        ? new Uint8Array(input)
        : new Uint8Array(input.buffer, input.byteOffset, input.byteLength);
    const name = input instanceof ArrayBuffer ? "ArrayBuffer" : "Uint8Array";
    return localSource(name, bytes.length, (start, end) => bytes.subarray(start, end));
  }
  if (typeof Blob !== "undefined" && input instanceof Blob) {
    const get = async (start: number, end: number) => new Uint8Array(await input.slice(start, end).arrayBuffer());
    return localSource((input as Partial<File>).name ?? "Blob", input.size, get);
  }
  if (typeof input === "string" || input instanceof URL) {
    const text = String(input);
    if (!/^(https?|blob|data):/i.test(text) && openPath) return openPath(text);
    const base = (globalThis as { location?: { href: string } }).location?.href;
    if (!URL.canParse(text, base))
      throw new TypeError(`openSource: "${text}" is not a URL, and there are no files here`);
    return new UrlSource(new URL(text, base).href, options);
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

/** @param get exactly the bytes of a range that was checked */
function localSource(
  name: string,
  byteLength: number,
  get: (start: number, end: number) => Uint8Array | Promise<Uint8Array>,
): ByteSource {
  return {
    name,
    byteLength,
    async read(offset, length, options) {
      options?.signal?.throwIfAborted();
      checkRange(name, offset, length, byteLength);
      const bytes = await get(offset, offset + length);
      options?.signal?.throwIfAborted();
      return bytes;
    },
  };
}

/**
 * A file behind HTTP ranges. Every answer is held against what was asked: status, range, total size, entity tag and number
 * of bytes, so that a file that changes between two reads is noticed and never mixed.
 */
class UrlSource implements ByteSource {
  readonly name: string;
  byteLength: number | undefined;
  /** Entity tag or date of the file. */
  #validator: string | undefined;
  readonly #options: FetchOptions;

  constructor(url: string, options: FetchOptions) {
    this.name = url;
    this.#options = options;
  }

  async read(offset: number, length: number, { signal }: ReadOptions = {}): Promise<Uint8Array> {
    signal?.throwIfAborted();
    if (length === 0) return new Uint8Array(0);
    if (this.byteLength !== undefined) checkRange(this.name, offset, length, this.byteLength);
    const { headers, timeout = 30_000, fetch: ask = fetch } = this.#options;
    const stalled = new AbortController();
    const stop = (): void => stalled.abort();
    let timer = setTimeout(stop, timeout);
    const progress = (): void => {
      clearTimeout(timer);
      timer = setTimeout(stop, timeout);
    };
    signal?.addEventListener("abort", stop);
    try {
      const range = `bytes=${offset}-${offset + length - 1}`;
      const response = await ask(this.name, { headers: { ...headers, Range: range }, signal: stalled.signal });
      progress();
      try {
        this.#check(response, offset, length);
      } catch (error) {
        await response.body?.cancel().catch(() => undefined);
        throw error;
      }
      return await this.#body(response, length, progress);
    } catch (cause) {
      signal?.throwIfAborted();
      if (cause instanceof SourceError) throw cause;
      const late = `no byte arrived for ${timeout} ms; try again, or raise \`timeout\``;
      return this.#fail(stalled.signal.aborted ? late : `cannot be fetched: ${(cause as Error).message}`, { cause });
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", stop);
    }
  }

  #fail(message: string, more: { status?: number; cause?: unknown } = {}): never {
    throw new SourceError(message, { file: this.name, ...more });
  }

  #changed(): never {
    return this.#fail("the file changed between two reads; open it again");
  }

  #check({ status, statusText, headers }: Response, offset: number, length: number): void {
    const end = offset + length;
    if (status !== 206) {
      const problem =
        status === 200
          ? "ignores ranges (status 200); use one that supports them, or fetch it yourself and pass the bytes"
          : status === 416
            ? `has no bytes ${offset} to ${end} (status 416): the file is truncated`
            : `answered ${status} ${statusText}; check the address`;
      this.#fail(`the server ${problem}`, { status });
    }
    const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(headers.get("content-range") ?? "");
    // Cross-origin answers hide Content-Range unless the server exposes it; then the number of bytes is the only check.
    if (range) {
      const [first, last, size] = [Number(range[1]), Number(range[2]) + 1, Number(range[3])];
      if (range[3] !== "*") {
        if (size !== (this.byteLength ?? size)) this.#changed();
        this.byteLength = size;
        checkRange(this.name, offset, length, size);
      }
      if (first !== offset || last !== end) {
        this.#fail(`asked for bytes ${offset} to ${end}, the server sent ${first} to ${last}`, { status });
      }
    }
    const seen = headers.get("etag") ?? headers.get("last-modified") ?? undefined;
    if (seen !== undefined && seen !== (this.#validator ??= seen)) this.#changed();
  }

  async #body(response: Response, length: number, progress: () => void): Promise<Uint8Array> {
    const reader = response.body?.getReader();
    if (!reader) {
      // Runtimes without streaming bodies, React Native among them.
      const whole = new Uint8Array(await response.arrayBuffer());
      if (whole.length !== length) this.#fail(`${whole.length} bytes arrived of ${length}; try again`);
      return whole;
    }
    const bytes = new Uint8Array(length);
    let done = 0;
    for (;;) {
      const { value, done: end } = await reader.read();
      if (end) break;
      progress();
      if (done + value.length > length) {
        await reader.cancel().catch(() => undefined);
        this.#fail(`more than the ${length} bytes asked for arrived`);
      }
      bytes.set(value, done);
      done += value.length;
    }
    if (done !== length) this.#fail(`the connection ended after ${done} of ${length} bytes; try again`);
    return bytes;
  }
}

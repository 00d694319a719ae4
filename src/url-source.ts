/**
 * Packs, models and adapters behind a URL, read by HTTP ranges. Loaded when a URL is opened.
 */
import { SourceError } from "./errors.ts";
import { type ByteSource, checkRange, type FetchOptions, type ReadOptions } from "./source.ts";

/**
 * A file behind HTTP ranges. Every answer is held against what was asked: status, range, total size, entity tag and number
 * of bytes, so that a file that changes between two reads is noticed and never mixed.
 */
export class UrlSource implements ByteSource {
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

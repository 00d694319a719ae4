/**
 * Packs, models and adapters behind a URL, read by HTTP ranges; whole where the server has none. Loaded when a URL is
 * opened.
 */
import { described, SourceError } from "../errors.ts";
import { pacer, throwIfAborted, turn } from "../pace.ts";
import {
  type ByteSource,
  checkRange,
  type FetchOptions,
  FIRST_BYTES,
  joined,
  nameOfUrl,
  type ReadAllOptions,
  type ReadOptions,
  unlessAborted,
} from "../source.ts";
import { fromLatin1 } from "../text.ts";

/** Most bytes of a file that was asked for whole: no message of protobuf, and so no ONNX model, is larger. */
const MOST_WHOLE = 2 ** 31;
/** Statuses after which another try may succeed: RFC 9110 and RFC 6585. */
const RETRYABLE_STATUS = [408, 429, 500, 502, 503, 504];
/** First pause between two tries in milliseconds, and the longest that is chosen here. */
const PAUSE = 250;
const LONGEST_PAUSE = 8000;
const MOST_REDIRECTS = 10;
/** A longer time is no time for `setTimeout`. */
const LONGEST_TIMER = 2 ** 31 - 1;
/** Queries of addresses, which may be secret; a redirect leads to signed ones. */
const QUERIES = /(\bhttps?:\/\/[^\s?]*\?)[^\s)"']+/g;
/** Skips the bytes of a byte order mark, if there is one. */
const HTML_START = /^(\xef\xbb\xbf)?\s*<(!doctype html|html[\s>])/i;

/**
 * Version of a file by the headers of a response. Missing headers are undefined: servers differ, and browsers hide
 * headers.
 */
interface Version {
  /** Entity tag, without the mark of a weak one: there is one representation here. */
  readonly etag: string | undefined;
  readonly modified: string | undefined;
  readonly size: number | undefined;
}

/**
 * Reads the body of a response.
 * @param length in bytes; undefined when it is not known
 * @param limit bytes of a body of unknown length
 * @param excess error message for a longer body
 * @param most of `ReadAllOptions`: where it allows fewer bytes, the rest is left
 */
type ReadBody = (
  length: number | undefined,
  limit: number,
  excess: string,
  most?: ReadAllOptions["most"],
) => Promise<Uint8Array>;

/**
 * Opens an address, or a file of the Hugging Face Hub by its name.
 * @param text source of `url`: a parser of addresses may have changed a name
 * @throws RangeError, TypeError for options, an address or a name that make no sense
 */
export async function openUrl(url: URL, options: FetchOptions, text: string): Promise<UrlSource> {
  if (!/^hf:/i.test(text)) return new UrlSource(url, options);
  const { hubFile, hubHeaders } = await import("./hub-name.ts");
  return new UrlSource(hubFile(text), { ...options, headers: hubHeaders(options) });
}

/**
 * A file behind a URL. Every response is compared with the request and with earlier responses: status, range, total
 * size, entity tag or date, and number of bytes, so that a file that changes between two reads is noticed and never
 * mixed.
 */
export class UrlSource implements ByteSource {
  readonly name: string;
  readonly reads: { requests: number; bytes: number; whole: boolean } = { requests: 0, bytes: 0, whole: false };
  readonly #url: URL;
  readonly #options: Required<FetchOptions>;
  #version: Version = { etag: undefined, modified: undefined, size: undefined };
  /** The file, or its way here, once the server has answered with all of it. */
  #whole: Promise<Uint8Array> | undefined;

  /**
   * @throws RangeError for options that are no numbers in their range, TypeError for headers that are none, or an
   *   address with a password
   */
  constructor(url: URL, { fetch: given, headers = {}, ...numbers }: FetchOptions) {
    const { timeout = 30_000, minRate = 500, retries = 3, maxWholeBytes = 2 ** 28 } = numbers;
    for (const [name, value] of Object.entries({ timeout, minRate, retries, maxWholeBytes }) as [string, unknown][])
      if (!(typeof value === "number" && value >= 0))
        throw new RangeError(`${name}: expected a number from 0, got ${described(value)}`);
    this.name = nameOfUrl(url);
    if (url.username || url.password) {
      const advice = "give them as the option `headers`, { authorization: … }";
      throw new TypeError(`${this.name}: an address must not hold a name and a password; ${advice}`);
    }
    // Headers that are none would look like a network fault later.
    new Headers(headers);
    this.#url = url;
    // Browsers refuse a `fetch` that is called as a method of something else.
    const ask = given ?? ((...args) => fetch(...args));
    this.#options = { fetch: ask, headers, timeout, minRate, retries, maxWholeBytes };
  }

  get byteLength(): number | undefined {
    return this.#version.size;
  }

  async read(offset: number, length: number, options: ReadOptions = {}): Promise<Uint8Array> {
    const { signal } = options;
    throwIfAborted(signal);
    if (length === 0) return new Uint8Array(0);
    if (this.byteLength !== undefined) checkRange(this.name, offset, length, this.byteLength);
    for (;;) {
      const whole = await this.#arrived(signal);
      if (whole) return this.#partOf(whole, offset, length);
      const bytes = await this.#range(offset, length, options);
      if (bytes) return bytes;
    }
  }

  /** Undefined when the server gives the whole file, and another read is at it already. */
  #range(offset: number, length: number, options: ReadOptions): Promise<Uint8Array | undefined> {
    return this.#request(`bytes=${offset}-${offset + length - 1}`, options, async (response, body) => {
      this.#checkStatus(response, [206, 200], `bytes ${offset} to ${offset + length}`);
      if (response.status === 206) {
        this.#checkRange(response, offset, length);
        const bytes = await body(length, length, `more than the ${length} bytes asked for arrived`);
        if (offset === 0) this.#refuseHtml(bytes, response.status);
        return bytes;
      }
      if (this.#whole) return undefined;
      // Reads that come meanwhile wait for it.
      const whole = this.#everything(response, body, this.#options.maxWholeBytes);
      this.#whole = whole;
      try {
        const bytes = await whole;
        this.reads.whole = true;
        return this.#partOf(bytes, offset, length);
      } catch (error) {
        if (this.#whole === whole) this.#whole = undefined;
        throw error;
      }
    });
  }

  async readAll({ most, ...options }: ReadAllOptions = {}): Promise<Uint8Array> {
    throwIfAborted(options.signal);
    const whole = await this.#arrived(options.signal);
    if (whole) return whole;
    return this.#request(undefined, options, (response, body) => {
      this.#checkStatus(response, [200], "the file");
      return this.#everything(response, body, MOST_WHOLE, most);
    });
  }

  async identify({ signal }: ReadOptions = {}): Promise<string | undefined> {
    const isKnown = ({ etag, modified }: Version): boolean => (etag ?? modified) !== undefined;
    if (!isKnown(this.#version)) {
      // A range keeps the server from compressing, which would change the entity tag. The body is not read. Not HEAD,
      // which addresses that are signed for GET refuse.
      await this.#request("bytes=0-0", { signal }, async (response) => {
        this.#checkStatus(response, [200, 206], "the file");
        this.#recognise(response, response.status === 206 ? rangeOf(response)?.size : sizeOf(response));
      });
    }
    return isKnown(this.#version) ? JSON.stringify(this.#version) : undefined;
  }

  async close(): Promise<void> {
    this.#whole = undefined;
  }

  #checkStatus({ status, headers }: Response, good: readonly number[], wanted: string): void {
    if (good.includes(status)) {
      if (/^text\/html\b/i.test(headers.get("content-type") ?? "")) this.#failAsHtml(status);
      return;
    }
    const problem =
      status === 416
        ? `has no ${wanted} (status 416): the file is truncated`
        : status === 401 || status === 403
          ? `does not give it to you (status ${status}); check the address, give the option \`headers\`, or for the Hugging Face Hub set HF_TOKEN`
          : `answered ${status}; check the address`;
    this.#fail(`the server ${problem}`, { status });
  }

  #refuseHtml(bytes: Uint8Array, status: number): void {
    if (HTML_START.test(fromLatin1(bytes.subarray(0, 64)))) this.#failAsHtml(status);
  }

  #failAsHtml(status: number): never {
    const advice = "it is a login page, or what an app shows for unknown addresses; check the address";
    return this.#fail(`answered an HTML page, not the file: ${advice}`, { status });
  }

  /**
   * @throws SourceError when the response to a request for a range is another one, or of another version of the file
   */
  #checkRange(response: Response, offset: number, length: number): void {
    const { headers, status } = response;
    const end = offset + length;
    const coding = headers.get("content-encoding") ?? "identity";
    if (coding !== "identity")
      this.#fail(`the server compresses ranges (content-encoding: ${coding}); switch that off`, { status });
    // Cross-origin responses hide Content-Range unless the server exposes it; then the number of bytes is the only
    // check.
    const range = rangeOf(response);
    this.#recognise(response, range?.size);
    if (range?.size !== undefined) checkRange(this.name, offset, length, range.size);
    if (range && (range.start !== offset || range.end !== end))
      this.#fail(`asked for bytes ${offset} to ${end}, the server sent ${range.start} to ${range.end}`, { status });
    const size = sizeOf(response);
    if (size !== undefined && size !== length)
      this.#fail(`asked for ${length} bytes, the server announces ${size}`, { status });
  }

  /** @throws SourceError when something tells this version from the one before, or nothing tells that it is the same */
  #recognise({ headers }: Response, size: number | undefined): void {
    const known = this.#version;
    const found: Version = {
      etag: headers.get("etag")?.replace(/^W\//, ""),
      modified: headers.get("last-modified") ?? undefined,
      size,
    };
    const differs = (key: keyof Version): boolean =>
      known[key] !== undefined && found[key] !== undefined && known[key] !== found[key];
    const tagged = known.etag !== undefined && found.etag !== undefined;
    const lost = (known.etag ?? known.modified) !== undefined && (found.etag ?? found.modified) === undefined;
    if (lost) this.#fail("an answer has no ETag and no Last-Modified, and others had; open it again");
    if (differs("size") || differs("etag") || (!tagged && differs("modified")))
      this.#fail("the file changed between two reads; open it again");
    this.#version = {
      etag: known.etag ?? found.etag,
      modified: known.modified ?? found.modified,
      size: known.size ?? found.size,
    };
  }

  /** The file if it is here or on its way; a way that fails is not this read's. */
  #arrived(signal: AbortSignal | undefined): Promise<Uint8Array | undefined> {
    return unlessAborted(Promise.resolve(this.#whole?.catch(() => undefined)), signal);
  }

  async #everything(
    response: Response,
    body: ReadBody,
    limit: number,
    most?: ReadAllOptions["most"],
  ): Promise<Uint8Array> {
    const { status } = response;
    // A response of another origin, in a browser, does not show whether it was compressed on the way.
    const size = response.type === "cors" ? undefined : sizeOf(response);
    const excess =
      limit === MOST_WHOLE
        ? `the file has ${size ?? "more"} bytes, at most ${limit} can be read whole`
        : `the server ignores ranges (status 200), and the file has ${size ?? "more"} bytes, above \`maxWholeBytes\`, ${limit}; use a server with ranges, or raise it`;
    if ((size ?? 0) > limit) this.#fail(excess, { status });
    this.#recognise(response, size);
    const bytes = await body(size, limit, size === undefined ? excess : `more than ${size} bytes arrived`, most);
    this.#refuseHtml(bytes, status);
    // A part of the file does not tell its size.
    if (!(most && bytes.length > most(bytes))) this.#recognise(response, bytes.length);
    return bytes;
  }

  #partOf(whole: Uint8Array, offset: number, length: number): Uint8Array {
    checkRange(this.name, offset, length, whole.length);
    return whole.subarray(offset, offset + length);
  }

  /**
   * Sends a request, again if need be, until `take` makes something of the response.
   * @param range value of the header `Range`
   * @param take throws a SourceError with `transient` for what another try may mend
   * @throws SourceError when there is none; the signal's reason when it is aborted
   */
  async #request<T>(
    range: string | undefined,
    options: ReadOptions,
    take: (response: Response, body: ReadBody) => Promise<T>,
  ): Promise<T> {
    const { signal } = options;
    const { retries, timeout } = this.#options;
    for (let tries = 1; ; tries++) {
      throwIfAborted(signal);
      try {
        return await this.#once(range, options, take);
      } catch (error) {
        throwIfAborted(signal);
        if (!(error instanceof SourceError && error.transient)) throw error;
        const { retryAfter = 0 } = error;
        if (tries > retries || retryAfter > timeout) {
          if (tries > 1) error.message += ` (tried ${tries} times)`;
          throw error;
        }
        // Spread out, so that many clients of a server that was down do not come back all at once.
        const backOff = Math.min(LONGEST_PAUSE, PAUSE * 2 ** (tries - 1)) * (0.5 + Math.random() / 2);
        let timer: ReturnType<typeof setTimeout> | undefined;
        const over = new Promise<void>((resolve) => (timer = setTimeout(resolve, Math.max(backOff, retryAfter))));
        await unlessAborted(over, signal).finally(() => clearTimeout(timer));
      }
    }
  }

  async #once<T>(
    range: string | undefined,
    { signal, onBytes }: ReadOptions,
    take: (response: Response, body: ReadBody) => Promise<T>,
  ): Promise<T> {
    const { timeout, minRate } = this.#options;
    const ended = new AbortController();
    const stop = (): void => ended.abort();
    let response: Response | undefined;
    let timer: ReturnType<typeof setTimeout> | undefined;
    /** Bytes since the clock was last set. */
    let count = 0;
    const setClock = (time = timeout): void => {
      clearTimeout(timer);
      count = 0;
      timer = setTimeout(stop, Math.min(time, LONGEST_TIMER));
    };
    // The clock is set anew by what the rate asks for, not by every byte: a drop now and then keeps no request alive.
    const arrived = (more: number): void => {
      count += more;
      if (count >= Math.max(1, (minRate * timeout) / 1000)) setClock();
      this.reads.bytes += more;
      onBytes?.(more);
    };
    const ask = async (): Promise<T> => {
      setClock();
      this.reads.requests++;
      const headers: Record<string, string> = range === undefined ? {} : { Range: range };
      // The race ends a `fetch` that does not heed the signal.
      response = await unlessAborted(this.#send({ headers, signal: ended.signal }), ended.signal);
      setClock();
      this.#refuseBusy(response);
      return take(response, this.#bodyOf(response, arrived, setClock));
    };
    try {
      return await unlessAborted(unlessAborted(ask(), ended.signal), signal);
    } catch (cause) {
      throwIfAborted(signal);
      if (cause instanceof SourceError) throw cause;
      if (ended.signal.aborted) {
        const found = count === 0 ? "no byte arrived" : `only ${count} bytes arrived`;
        const problem = response
          ? `${found} for ${timeout} ms; try again, or raise \`timeout\` or lower \`minRate\``
          : `no answer within ${timeout} ms; try again, or raise \`timeout\``;
        return this.#fail(problem, { transient: true, cause });
      }
      const [message, transient] = causeOf(cause, this.#url);
      const named = message.replaceAll(this.#url.href, this.name).replace(QUERIES, "$1…");
      return this.#fail(`cannot be fetched: ${named}`, { transient, cause });
    } finally {
      stop();
      // Stops a body that nobody reads.
      void response?.body?.cancel().catch(() => undefined);
      clearTimeout(timer);
    }
  }

  /**
   * Sends `headers` to the host of the address alone: of all headers, `fetch` keeps only authorization from other
   * hosts.
   */
  async #send(init: RequestInit): Promise<Response> {
    const { fetch: ask, headers } = this.#options;
    const secret = { ...init, headers: { ...headers, ...init.headers } };
    if (Object.keys(headers).every((name) => /^authorization$/i.test(name))) return ask(this.#url.href, secret);
    let url = this.#url;
    let stayed = true;
    for (let hops = 0; hops < MOST_REDIRECTS; hops++) {
      const response = await ask(url.href, { ...(stayed ? secret : init), redirect: "manual" });
      if (response.type === "opaqueredirect") {
        const advice = "give the address where the file lies, or no headers but authorization";
        this.#fail(`redirects, and a browser does not show where to: \`headers\` could reach another host; ${advice}`);
      }
      const isRedirect = [301, 302, 303, 307, 308].includes(response.status);
      const location = isRedirect ? response.headers.get("location") : null;
      if (location === null) return response;
      void response.body?.cancel().catch(() => undefined);
      const next = URL.canParse(location, url) ? new URL(location, url) : undefined;
      if (!next || !/^https?:$/.test(next.protocol) || (url.protocol === "https:" && next.protocol === "http:"))
        return this.#fail(`redirects from ${url.protocol}//${url.host} to what is no address, or a less safe one`);
      stayed &&= next.origin === url.origin;
      url = next;
    }
    return this.#fail(`redirects more than ${MOST_REDIRECTS} times`);
  }

  #refuseBusy({ status, headers }: Response): void {
    if (!RETRYABLE_STATUS.includes(status)) return;
    const problem = status === 429 ? "gets too many requests" : "cannot answer now";
    const header = headers.get("retry-after") ?? "";
    // Seconds, or a date.
    const wait = /^\d+$/.test(header) ? Number(header) * 1000 : Date.parse(header) - Date.now();
    const retryAfter = Number.isNaN(wait) ? undefined : Math.max(0, wait);
    const later = retryAfter === undefined ? "later" : `in ${Math.ceil(retryAfter / 1000)} s`;
    const more = { status, transient: true, ...(retryAfter !== undefined && { retryAfter }) };
    this.#fail(`the server ${problem} (status ${status}); try again ${later}`, more);
  }

  #bodyOf(response: Response, arrived: (count: number) => void, setClock: (time: number) => void): ReadBody {
    const { timeout, minRate } = this.#options;
    return async (length, limit, excess, most) => {
      const longest = Math.min(length ?? limit, limit);
      let bytes: Uint8Array;
      if (response.body) bytes = await stream(response.body.getReader(), longest, arrived, most);
      else {
        // Runtimes without streaming bodies, React Native among them: no byte is seen before the last.
        setClock(timeout + (longest / minRate) * 1000);
        bytes = new Uint8Array(await response.arrayBuffer());
        arrived(bytes.length);
      }
      const enough = most ? most(bytes) + 1 : Infinity;
      if (bytes.length >= enough) return bytes.subarray(0, enough);
      if (bytes.length > longest) return this.#fail(excess);
      if (bytes.length >= (length ?? 0)) return bytes;
      const message = `the connection ended after ${bytes.length} of ${length} bytes; try again`;
      return this.#fail(message, { transient: true });
    };
  }

  /** @throws SourceError always */
  #fail(
    message: string,
    more: { status?: number; transient?: boolean; retryAfter?: number; cause?: unknown } = {},
  ): never {
    throw new SourceError(message, { file: this.name, ...more });
  }
}

/** The header Content-Range, half open; undefined when it is hidden, missing or none. */
function rangeOf({ headers }: Response): { start: number; end: number; size: number | undefined } | undefined {
  const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(headers.get("content-range") ?? "");
  if (!range) return undefined;
  const size = range[3] === "*" ? undefined : Number(range[3]);
  return { start: Number(range[1]), end: Number(range[2]) + 1, size };
}

/** Bytes of the body, where the server says so and does not compress them on the way. */
function sizeOf({ headers }: Response): number | undefined {
  const length = headers.get("content-length");
  return length === null || headers.has("content-encoding") ? undefined : Number(length);
}

/**
 * A body in memory of at most twice of what has arrived: what a server promises is not to be believed. Ends with the
 * chunk that exceeds `longest` or what `most` allows.
 */
async function stream(
  reader: ReadableStreamDefaultReader<Uint8Array>,
  longest: number,
  arrived: (count: number) => void,
  most: ReadAllOptions["most"],
): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let done = 0;
  let enough = Infinity;
  const pause = pacer();
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    const { length } = next.value;
    arrived(length);
    chunks.push(next.value);
    done += length;
    // Chunks that wait already come without a turn of the event loop.
    await pause();
    if (most && enough === Infinity && done >= FIRST_BYTES) enough = most(joined(chunks));
    if (done <= longest && done <= enough) continue;
    void reader.cancel().catch(() => undefined);
    break;
  }
  // Megabytes of chunks take longer to join than a share of work.
  await turn();
  return joined(chunks);
}

/** Words for a failure, and true where another try may help. */
type Cause = readonly [message: string, transient: boolean];

/** Codes and messages of Node, Deno and Bun; the first that matches counts. HOST stands for the host. */
const KNOWN: readonly (readonly [pattern: RegExp, transient: boolean, message: string])[] = [
  [
    /ENOTFOUND|EAI_|dns error|failed to lookup|resolve host/i,
    true,
    "the host HOST cannot be found (DNS); check the address and the network",
  ],
  [
    /ECONNREFUSED|ConnectionRefused|connection refused|unable to connect/i,
    true,
    "HOST refuses the connection; check the port, and that the server runs",
  ],
  [
    /ETIMEDOUT|UND_ERR_\w*TIMEOUT|EHOSTUNREACH|ENETUNREACH|ENETDOWN|timed out/i,
    true,
    "HOST cannot be reached; check the network",
  ],
  [
    /CERT|ERR_SSL|ERR_TLS|EPROTO|UNABLE_TO_|certificate|\b(tls|ssl)\b|corrupt message/i,
    false,
    "no secure connection to HOST; check its certificate, and that it speaks https on this port",
  ],
  [/HPE_|invalid http|UND_ERR_INVALID/i, false, "HOST answers something else than HTTP; check the port"],
  [
    /Z_\w+_ERROR|zlib|brotli|decompress/i,
    true,
    "the answer says that it is compressed (content-encoding), and cannot be decompressed",
  ],
  [
    /ECONNRESET|EPIPE|ECONNABORTED|UND_ERR_SOCKET|ConnectionClosed|other side closed|reset|closed|terminated|reading a body/i,
    true,
    "the server broke the connection off",
  ],
];

/** @param error thrown by `fetch`, or by reading a body */
function causeOf(error: unknown, url: URL): Cause {
  if (error instanceof RangeError) return [`there is no memory for it (${error.message})`, false];
  // The error and its causes, outermost first: code and message of each.
  const details: string[] = [];
  for (let at = error as Partial<AggregateError & { code: unknown }> | undefined; at && details.length < 8; ) {
    const message = typeof at.message === "string" ? at.message : String(at);
    details.push(typeof at.code === "string" && !message.includes(at.code) ? `${at.code} ${message}`.trim() : message);
    at = (at.cause ?? at.errors?.[0]) as typeof at;
  }
  // Some runtimes repeat the address, which may hold any word.
  const text = details.join(" ").replaceAll(url.href, "").replaceAll(url.hostname, "");
  const known = KNOWN.find(([pattern]) => pattern.test(text));
  if (known) return [`${known[2].replace("HOST", () => url.host)} (${details.at(-1)})`, known[1]];
  // Browsers keep the cause from scripts: a page must not explore a network by it.
  if (error instanceof TypeError && details.length === 1) return opaque(error.message, url);
  return [details.join(": "), false];
}

/** Meanings of a browser's "Failed to fetch" for this address. */
function opaque(message: string, url: URL): Cause {
  const { location, navigator } = globalThis as Partial<typeof globalThis>;
  if (navigator?.onLine === false) return [`${message}: the browser is offline`, true];
  if (location?.protocol === "https:" && url.protocol === "http:")
    return [`${message}: a page over https may read over https only`, false];
  if (!location) return [message, true];
  const { origin } = location;
  const guesses =
    origin === url.origin
      ? "the network or the server is gone"
      : `no network, no such host, or ${url.host} does not let ${origin} read it (header Access-Control-Allow-Origin)`;
  return [`${message}: ${guesses}; the console of the browser says more`, true];
}

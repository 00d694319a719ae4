/**
 * Requests for one address: limits of time, further tries after what may pass, bodies in memory that grows with what
 * arrives, and errors that name the cause. Does not know what the bytes are, or which range they should be.
 */

import { described } from "../arguments.ts";
import { SourceError } from "../errors.ts";
import { pacer, throwIfAborted } from "../pace.ts";
import { type FetchOptions, FIRST_BYTES, type ReadAllOptions, unlessAborted } from "../source.ts";

/** A request. */
export interface Ask {
  /** Value of the header `Range`. */
  readonly range?: string;
  readonly signal?: AbortSignal | undefined;
  readonly onBytes?: ((count: number) => void) | undefined;
}

/** An answer with a status that did not ask to try again. */
export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  /** True where headers may be missing that the server did send: those of another origin, in a browser. */
  readonly hidden: boolean;
  /**
   * Reads the body.
   * @param length of the body in bytes; undefined when it is not known
   * @param most bytes of a body of unknown length
   * @param excess what to say when more arrive
   * @param told of `ReadAllOptions`: where it allows fewer, the rest is left
   */
  body(length: number | undefined, most: number, excess: string, told?: ReadAllOptions["most"]): Promise<Uint8Array>;
}

/** Statuses after which another try may succeed: RFC 9110 and RFC 6585. */
const RETRYABLE_STATUS = [408, 429, 500, 502, 503, 504];

/** First pause between two tries in milliseconds, and the longest that is chosen here. */
const PAUSE = 250;
const LONGEST_PAUSE = 8000;
/** Memory that is taken before a byte of a body has arrived. */
const FIRST_MEMORY = 2 ** 20;
/** Queries of addresses, which may be secret; a redirect leads to signed ones. */
const QUERIES = /(\bhttps?:\/\/[^\s?]*\?)[^\s)"']+/g;
/** A longer time is no time for `setTimeout`. */
const LONGEST_TIMER = 2 ** 31 - 1;

/** The requests for one address. */
export class Exchange {
  /** The address as errors show it. */
  readonly name: string;
  /** Counts, see `Reads`. */
  readonly reads: { requests: number; bytes: number; whole: boolean } = { requests: 0, bytes: 0, whole: false };
  readonly #url: URL;
  readonly #options: Required<Omit<FetchOptions, "maxWholeBytes">>;

  /** @throws RangeError for options that are no numbers in their range, TypeError for headers that are none, or an address with a password */
  constructor(url: URL, { fetch: ask, headers = {}, timeout = 30_000, minRate = 500, retries = 3 }: FetchOptions) {
    for (const [name, value] of Object.entries({ timeout, minRate, retries })) checkNumber(name, value);
    this.name = nameOf(url);
    if (url.username || url.password) {
      const advice = "give them as the option `headers`, { authorization: … }";
      throw new TypeError(`${this.name}: an address must not hold a name and a password; ${advice}`);
    }
    // Headers that are none would look like a network fault later.
    new Headers(headers);
    this.#url = url;
    // Called as a function of nothing: browsers refuse a `fetch` that is called as a method of something else.
    this.#options = { fetch: ask ?? ((...args) => fetch(...args)), headers, timeout, minRate, retries };
  }

  /**
   * Asks, again if need be, until there is an answer that `take` makes something of.
   * @param take throws a SourceError with `transient` for what another try may mend
   * @throws SourceError when there is none; the signal's reason when it is aborted
   */
  async ask<T>(request: Ask, take: (answer: Answer) => Promise<T>): Promise<T> {
    const { signal } = request;
    for (let tries = 1; ; tries++) {
      throwIfAborted(signal);
      try {
        return await this.#once(request, take);
      } catch (error) {
        throwIfAborted(signal);
        if (!(error instanceof SourceError && error.transient)) throw error;
        const { retryAfter = 0 } = error;
        if (tries > this.#options.retries || retryAfter > this.#options.timeout) {
          if (tries > 1) error.message += ` (tried ${tries} times)`;
          throw error;
        }
        // Spread out, so that many clients of a server that was down do not come back all at once.
        const own = Math.min(LONGEST_PAUSE, PAUSE * 2 ** (tries - 1)) * (0.5 + Math.random() / 2);
        await pause(Math.max(own, retryAfter), signal);
      }
    }
  }

  /** @throws SourceError always */
  fail(
    message: string,
    more: { status?: number; transient?: boolean; retryAfter?: number; cause?: unknown } = {},
  ): never {
    throw new SourceError(message, { file: this.name, ...more });
  }

  async #once<T>({ range, signal, onBytes }: Ask, take: (answer: Answer) => Promise<T>): Promise<T> {
    const { timeout, minRate } = this.#options;
    const ended = new AbortController();
    const stop = (): void => ended.abort();
    const pace = new Pace(timeout, minRate, stop);
    signal?.addEventListener("abort", stop);
    let response: Response | undefined;
    try {
      this.reads.requests++;
      const headers: Record<string, string> = range === undefined ? {} : { Range: range };
      const init = { headers, signal: ended.signal };
      // The race ends a `fetch` that does not heed the signal.
      response = await unlessAborted(this.#send(init), ended.signal);
      pace.answered();
      this.#checkStatus(response);
      return await unlessAborted(take(this.#answer(response, pace, onBytes)), ended.signal);
    } catch (cause) {
      throwIfAborted(signal);
      if (cause instanceof SourceError) throw cause;
      if (ended.signal.aborted) return this.fail(pace.problem(), { transient: true, cause });
      const { message, transient } = causeOf(cause, this.#url);
      const named = message.replaceAll(this.#url.href, this.name).replace(QUERIES, "$1…");
      return this.fail(`cannot be fetched: ${named}`, { transient, cause });
    } finally {
      pace.end();
      // Stops a body that nobody reads.
      void response?.body?.cancel().catch(() => undefined);
      signal?.removeEventListener("abort", stop);
    }
  }

  /** Sends `headers` to the host of the address alone. */
  async #send(init: RequestInit): Promise<Response> {
    const { fetch: ask, headers } = this.#options;
    const own = { ...init, headers: { ...headers, ...init.headers } };
    // Every `fetch` keeps authorization from other hosts.
    if (Object.keys(headers).every((name) => /^authorization$/i.test(name))) return ask(this.#url.href, own);
    const { follow } = await import("./redirects.ts");
    const hop = (url: URL, stayed: boolean) => ask(url.href, { ...(stayed ? own : init), redirect: "manual" });
    return follow(this.#url, hop, (message) => this.fail(message));
  }

  #checkStatus({ status, headers }: Response): void {
    if (!RETRYABLE_STATUS.includes(status)) return;
    const problem = status === 429 ? "gets too many requests" : "cannot answer now";
    const retryAfter = waitOf(headers.get("retry-after"));
    const later = retryAfter === undefined ? "later" : `in ${Math.ceil(retryAfter / 1000)} s`;
    const more = { status, transient: true, ...(retryAfter !== undefined && { retryAfter }) };
    this.fail(`the server ${problem} (status ${status}); try again ${later}`, more);
  }

  #answer(response: Response, pace: Pace, onBytes: Ask["onBytes"]): Answer {
    const { status, headers, type } = response;
    const arrived = (count: number): void => {
      pace.arrived(count);
      this.reads.bytes += count;
      onBytes?.(count);
    };
    const body: Answer["body"] = async (length, most, excess, told) => {
      const limit = Math.min(length ?? most, most);
      let bytes: Uint8Array | undefined;
      if (response.body) bytes = await stream(response.body.getReader(), limit, arrived, told);
      else {
        // Runtimes without streaming bodies, React Native among them.
        bytes = new Uint8Array(await pace.allowing(limit, response.arrayBuffer()));
        arrived(bytes.length);
      }
      const wanted = told && bytes ? told(bytes) + 1 : Infinity;
      if (bytes && bytes.length >= wanted) return bytes.subarray(0, wanted);
      if (!bytes || bytes.length > limit) return this.fail(excess);
      if (bytes.length < (length ?? 0)) {
        const message = `the connection ended after ${bytes.length} of ${length} bytes; try again`;
        return this.fail(message, { transient: true });
      }
      return bytes;
    };
    return { status, headers, hidden: type === "cors", body };
  }
}

/**
 * A body in memory of at most twice of what has arrived: what a server promises is not to be believed.
 * @returns undefined when it is longer than `most`; what has arrived once that is more than `told` allows
 */
async function stream(
  reader: ReadableStreamDefaultReader<Uint8Array>,
  most: number,
  arrived: (count: number) => void,
  told?: ReadAllOptions["most"],
): Promise<Uint8Array | undefined> {
  let bytes = new Uint8Array(Math.min(most, FIRST_MEMORY));
  let done = 0;
  const pause = pacer();
  for (;;) {
    const { value, done: end } = await reader.read();
    if (end) break;
    arrived(value.length);
    const wanted = done + value.length;
    if (wanted > most) {
      void reader.cancel().catch(() => undefined);
      return undefined;
    }
    if (wanted > bytes.length) {
      const larger = new Uint8Array(Math.min(most, Math.max(2 * bytes.length, wanted)));
      larger.set(bytes.subarray(0, done));
      bytes = larger;
    }
    bytes.set(value, done);
    done = wanted;
    // Chunks that wait already come without a turn of the event loop.
    await pause();
    if (told && done >= FIRST_BYTES && done > told(bytes)) {
      void reader.cancel().catch(() => undefined);
      break;
    }
  }
  return done === bytes.length ? bytes : bytes.slice(0, done);
}

/** Sees to it that an answer comes, and then that its bytes keep coming. */
class Pace {
  readonly #timeout: number;
  readonly #minRate: number;
  readonly #late: () => void;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #answered = false;
  /** Bytes since the clock was last set. */
  #count = 0;

  constructor(timeout: number, minRate: number, late: () => void) {
    this.#timeout = timeout;
    this.#minRate = minRate;
    this.#late = late;
    this.#restart(timeout);
  }

  get #quota(): number {
    return Math.max(1, (this.#minRate * this.#timeout) / 1000);
  }

  #restart(time: number): void {
    clearTimeout(this.#timer);
    this.#count = 0;
    this.#timer = setTimeout(this.#late, Math.min(time, LONGEST_TIMER));
  }

  answered(): void {
    this.#answered = true;
    this.#restart(this.#timeout);
  }

  /** The clock is set anew by what the rate asks for, not by every byte: a drop now and then keeps no request alive. */
  arrived(count: number): void {
    this.#count += count;
    if (this.#count >= this.#quota) this.#restart(this.#timeout);
  }

  /** Gives a body that cannot be watched the time that its bytes may take. */
  allowing<T>(length: number, body: Promise<T>): Promise<T> {
    this.#restart(this.#timeout + (length / this.#minRate) * 1000);
    return body;
  }

  problem(): string {
    if (!this.#answered) return `no answer within ${this.#timeout} ms; try again, or raise \`timeout\``;
    const found = this.#count === 0 ? "no byte arrived" : `only ${this.#count} bytes arrived`;
    return `${found} for ${this.#timeout} ms; try again, or raise \`timeout\` or lower \`minRate\``;
  }

  end(): void {
    clearTimeout(this.#timer);
  }
}

/** @throws RangeError when an option is no number from 0 */
export function checkNumber(name: string, value: unknown): void {
  if (!(typeof value === "number" && value >= 0))
    throw new RangeError(`${name}: expected a number from 0, got ${described(value)}`);
}

/** The address without what may be secret, and without the content of a data: URL. */
export function nameOf({ protocol, origin, pathname, search, href }: URL): string {
  if (protocol === "data:") return "data: URL";
  return /^(blob|hf):/.test(protocol) ? href : `${origin}${pathname}${search && "?…"}`;
}

/** Milliseconds of a header Retry-After: seconds, or a date. */
function waitOf(header: string | null): number | undefined {
  if (header === null) return undefined;
  const wait = /^\d+$/.test(header) ? Number(header) * 1000 : Date.parse(header) - Date.now();
  return Number.isNaN(wait) ? undefined : Math.max(0, wait);
}

/** @throws the signal's reason as soon as it is aborted */
async function pause(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const over = new Promise<void>((resolve) => (timer = setTimeout(resolve, milliseconds)));
  await unlessAborted(over, signal).finally(() => clearTimeout(timer));
}

/** Words for a failure, and whether another try may help. */
export interface Cause {
  readonly message: string;
  readonly transient: boolean;
}

/** Codes and messages of Node, Deno and Bun; the first that matches counts. */
const KNOWN: readonly (readonly [pattern: RegExp, transient: boolean, say: (host: string) => string])[] = [
  [
    /ENOTFOUND|EAI_|dns error|failed to lookup|resolve host/i,
    true,
    (host) => `the host ${host} cannot be found (DNS); check the address and the network`,
  ],
  [
    /ECONNREFUSED|ConnectionRefused|connection refused|unable to connect/i,
    true,
    (host) => `${host} refuses the connection; check the port, and that the server runs`,
  ],
  [
    /ETIMEDOUT|UND_ERR_\w*TIMEOUT|EHOSTUNREACH|ENETUNREACH|ENETDOWN|timed out/i,
    true,
    (host) => `${host} cannot be reached; check the network`,
  ],
  [
    /CERT|ERR_SSL|ERR_TLS|EPROTO|UNABLE_TO_|certificate|\b(tls|ssl)\b|corrupt message/i,
    false,
    (host) => `no secure connection to ${host}; check its certificate, and that it speaks https on this port`,
  ],
  [/HPE_|invalid http|UND_ERR_INVALID/i, false, (host) => `${host} answers something else than HTTP; check the port`],
  [
    /Z_\w+_ERROR|zlib|brotli|decompress/i,
    true,
    () => "the answer says that it is compressed (content-encoding), and cannot be decompressed",
  ],
  [
    /ECONNRESET|EPIPE|ECONNABORTED|UND_ERR_SOCKET|ConnectionClosed|other side closed|reset|closed|terminated|reading a body/i,
    true,
    () => "the server broke the connection off",
  ],
];

/** @param error what `fetch`, or reading a body, threw */
function causeOf(error: unknown, url: URL): Cause {
  if (error instanceof RangeError) return { message: `there is no memory for it (${error.message})`, transient: false };
  const details = chainOf(error);
  const inner = details.slice(1);
  // Some runtimes repeat the address, which may hold any word.
  const text = details.join(" ").replaceAll(url.href, "").replaceAll(url.hostname, "");
  const known = KNOWN.find(([pattern]) => pattern.test(text));
  if (known)
    return { message: `${known[2](url.host)} (${inner[inner.length - 1] ?? details[0]})`, transient: known[1] };
  const network = error instanceof TypeError;
  // Browsers keep the cause from scripts: a page must not explore a network by it.
  if (network && inner.length === 0) return opaque(error.message, url);
  return { message: details.join(": "), transient: network && inner.length === 0 };
}

/** An error and its causes, outermost first: code and message of each. */
function chainOf(error: unknown): string[] {
  const found: string[] = [];
  for (let at = error as Partial<AggregateError & { code: unknown }> | undefined; at && found.length < 8; ) {
    const message = typeof at.message === "string" ? at.message : String(at);
    found.push(typeof at.code === "string" && !message.includes(at.code) ? `${at.code} ${message}`.trim() : message);
    at = (at.cause ?? at.errors?.[0]) as typeof at;
  }
  return found;
}

/** Meanings of a browser's "Failed to fetch" for this address. */
function opaque(message: string, url: URL): Cause {
  const { location, navigator } = globalThis as Partial<typeof globalThis>;
  if (navigator?.onLine === false) return { message: `${message}: the browser is offline`, transient: true };
  if (location?.protocol === "https:" && url.protocol === "http:")
    return { message: `${message}: a page over https may read over https only`, transient: false };
  if (!location) return { message, transient: true };
  const { origin } = location;
  const guesses =
    origin === url.origin
      ? "the network or the server is gone"
      : `no network, no such host, or ${url.host} does not let ${origin} read it (header Access-Control-Allow-Origin)`;
  return { message: `${message}: ${guesses}; the console of the browser says more`, transient: true };
}

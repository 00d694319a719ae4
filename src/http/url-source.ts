/**
 * Packs, models and adapters behind a URL, read by HTTP ranges; whole where the server has none. Loaded when a URL is opened.
 */
import { throwIfAborted } from "../pace.ts";
import {
  type ByteSource,
  checkRange,
  type FetchOptions,
  type ReadAllOptions,
  type ReadOptions,
  type Reads,
  unlessAborted,
} from "../source.ts";
import { fromLatin1 } from "../text.ts";
import { type Answer, checkNumber, Exchange } from "./exchange.ts";

/** Most bytes of a file that was asked for whole: no message of protobuf, and so no ONNX model, is larger. */
const MOST_WHOLE = 2 ** 31;

/** Version of a file by the headers of an answer. Missing headers are undefined: servers differ, and browsers hide headers. */
interface Version {
  /** Entity tag, without the mark of a weak one: there is one representation here. */
  readonly etag: string | undefined;
  readonly modified: string | undefined;
  readonly size: number | undefined;
}

/** Skips the bytes of a byte order mark, if there is one. */
const HTML_START = /^(\xef\xbb\xbf)?\s*<(!doctype html|html[\s>])/i;

/**
 * Opens an address, or a name of the Hub where there are no files.
 * @param text what `url` was made of: making it may have changed a name
 * @throws RangeError, TypeError for options, an address or a name that make no sense
 */
export async function openUrl(url: URL, options: FetchOptions, text: string): Promise<UrlSource> {
  const address = /^hf:/i.test(text) ? (await import("./hub-name.ts")).hubFile(text) : url;
  return new UrlSource(address, options);
}

/**
 * A file behind a URL. Every answer is held against what was asked and against the answers before: status, range, total size,
 * entity tag or date, and number of bytes, so that a file that changes between two reads is noticed and never mixed.
 */
export class UrlSource implements ByteSource {
  readonly name: string;
  readonly reads: Reads;
  readonly #exchange: Exchange;
  readonly #maxWholeBytes: number;
  #version: Version = { etag: undefined, modified: undefined, size: undefined };
  /** The file, or its way here, once the server has answered with all of it. */
  #whole: Promise<Uint8Array> | undefined;

  /** @throws RangeError, TypeError for options or an address that make no sense */
  constructor(url: URL, options: FetchOptions) {
    this.#exchange = new Exchange(url, options);
    const { maxWholeBytes = 2 ** 28 } = options;
    checkNumber("maxWholeBytes", maxWholeBytes);
    this.#maxWholeBytes = maxWholeBytes;
    this.name = this.#exchange.name;
    this.reads = this.#exchange.reads;
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
      const whole = await unlessAborted(this.#kept(), signal);
      if (whole) return this.#partOf(whole, offset, length);
      const bytes = await this.#range(offset, length, options);
      if (bytes) return bytes;
    }
  }

  /** Undefined when the server gives the whole file, and another read is at it already. */
  #range(offset: number, length: number, { signal, onBytes }: ReadOptions): Promise<Uint8Array | undefined> {
    const range = `bytes=${offset}-${offset + length - 1}`;
    return this.#exchange.ask({ range, signal, onBytes }, async (answer) => {
      this.#checkStatus(answer, [206, 200], `bytes ${offset} to ${offset + length}`);
      if (answer.status === 200) {
        if (this.#whole) return undefined;
        return this.#partOf(await this.#wholeFrom(answer), offset, length);
      }
      this.#checkRange(answer, offset, length);
      const bytes = await answer.body(length, length, `more than the ${length} bytes asked for arrived`);
      if (offset === 0) this.#checkStart(bytes, answer.status);
      return bytes;
    });
  }

  async readAll({ signal, onBytes, most }: ReadAllOptions = {}): Promise<Uint8Array> {
    throwIfAborted(signal);
    const whole = await unlessAborted(this.#kept(), signal);
    if (whole) return whole;
    return this.#exchange.ask({ signal, onBytes }, (answer) => {
      this.#checkStatus(answer, [200], "the file");
      return this.#everything(answer, MOST_WHOLE, most);
    });
  }

  async identify({ signal }: ReadOptions = {}): Promise<string | undefined> {
    const { etag, modified } = this.#version;
    if ((etag ?? modified) === undefined) {
      // A range keeps the server from compressing, which would change the entity tag. The body is not read. Not HEAD, which addresses
      // that are signed for GET refuse.
      await this.#exchange.ask({ range: "bytes=0-0", signal }, async (answer) => {
        this.#checkStatus(answer, [200, 206], "the file");
        this.#recognise(versionOf(answer, answer.status === 206 ? rangeOf(answer)?.size : sizeOf(answer)));
      });
    }
    const known = this.#version;
    return (known.etag ?? known.modified) === undefined ? undefined : JSON.stringify(known);
  }

  async close(): Promise<void> {
    this.#whole = undefined;
  }

  #checkStatus({ status, headers }: Answer, good: readonly number[], wanted: string): void {
    if (good.includes(status)) {
      if (/^text\/html\b/i.test(headers.get("content-type") ?? "")) this.#isHtml(status);
      return;
    }
    const problem =
      status === 416
        ? `has no ${wanted} (status 416): the file is truncated`
        : status === 401 || status === 403
          ? `does not give it to you (status ${status}); check the address, or give the option \`headers\``
          : `answered ${status}; check the address`;
    this.#exchange.fail(`the server ${problem}`, { status });
  }

  #isHtml(status: number): never {
    const advice = "it is a login page, or what an app shows for unknown addresses; check the address";
    return this.#exchange.fail(`answered an HTML page, not the file: ${advice}`, { status });
  }

  #checkStart(bytes: Uint8Array, status: number): void {
    if (HTML_START.test(fromLatin1(bytes.subarray(0, 64)))) this.#isHtml(status);
  }

  /** @throws SourceError when the answer to a request for a range is another one, or of another version of the file */
  #checkRange(answer: Answer, offset: number, length: number): void {
    const { headers, status } = answer;
    const end = offset + length;
    const coding = headers.get("content-encoding") ?? "identity";
    if (coding !== "identity")
      this.#exchange.fail(`the server compresses ranges (content-encoding: ${coding}); switch that off`, { status });
    // Cross-origin answers hide Content-Range unless the server exposes it; then the number of bytes is the only check.
    const range = rangeOf(answer);
    this.#recognise(versionOf(answer, range?.size));
    if (range?.size !== undefined) checkRange(this.name, offset, length, range.size);
    if (range && (range.start !== offset || range.end !== end)) {
      const found = `the server sent ${range.start} to ${range.end}`;
      this.#exchange.fail(`asked for bytes ${offset} to ${end}, ${found}`, { status });
    }
    const size = sizeOf(answer);
    if (size !== undefined && size !== length)
      this.#exchange.fail(`asked for ${length} bytes, the server announces ${size}`, { status });
  }

  /** @throws SourceError when something tells this version from the one before, or nothing tells that it is the same */
  #recognise(found: Version): void {
    const known = this.#version;
    const differs = (key: keyof Version): boolean =>
      known[key] !== undefined && found[key] !== undefined && known[key] !== found[key];
    const tagged = known.etag !== undefined && found.etag !== undefined;
    const lost = (known.etag ?? known.modified) !== undefined && (found.etag ?? found.modified) === undefined;
    if (lost) this.#exchange.fail("an answer has no ETag and no Last-Modified, and others had; open it again");
    if (differs("size") || differs("etag") || (!tagged && differs("modified")))
      this.#exchange.fail("the file changed between two reads; open it again");
    this.#version = {
      etag: known.etag ?? found.etag,
      modified: known.modified ?? found.modified,
      size: known.size ?? found.size,
    };
  }

  /** The file if it is here or on its way; a way that fails is not this read's. */
  async #kept(): Promise<Uint8Array | undefined> {
    return this.#whole?.catch(() => undefined);
  }

  /** The file, from an answer with all of it. Reads that come meanwhile wait for it. */
  async #wholeFrom(answer: Answer): Promise<Uint8Array> {
    const whole = this.#everything(answer, this.#maxWholeBytes);
    this.#whole = whole;
    try {
      const bytes = await whole;
      this.#exchange.reads.whole = true;
      return bytes;
    } catch (error) {
      if (this.#whole === whole) this.#whole = undefined;
      throw error;
    }
  }

  async #everything(answer: Answer, most: number, told?: ReadAllOptions["most"]): Promise<Uint8Array> {
    const { status } = answer;
    // An answer of another origin does not show whether it was compressed on the way.
    const size = answer.hidden ? undefined : sizeOf(answer);
    const advice = `above \`maxWholeBytes\`, ${most}; use a server with ranges, or raise it`;
    const excess =
      most === MOST_WHOLE
        ? `the file has ${size ?? "more"} bytes, at most ${most} can be read whole`
        : `the server ignores ranges (status 200), and the file has ${size ?? "more"} bytes, ${advice}`;
    if ((size ?? 0) > most) this.#exchange.fail(excess, { status });
    this.#recognise(versionOf(answer, size));
    const sent = size === undefined ? excess : `more than ${size} bytes arrived`;
    const bytes = await answer.body(size, most, sent, told);
    this.#checkStart(bytes, status);
    // A part of the file does not tell its size.
    if (told && bytes.length > told(bytes)) return bytes;
    this.#recognise(versionOf(answer, bytes.length));
    return bytes;
  }

  #partOf(whole: Uint8Array, offset: number, length: number): Uint8Array {
    checkRange(this.name, offset, length, whole.length);
    return whole.subarray(offset, offset + length);
  }
}

function versionOf({ headers }: Answer, size: number | undefined): Version {
  return {
    etag: headers.get("etag")?.replace(/^W\//, ""),
    modified: headers.get("last-modified") ?? undefined,
    size,
  };
}

/** The header Content-Range, half open; undefined when it is hidden, missing or none. */
function rangeOf({ headers }: Answer): { start: number; end: number; size: number | undefined } | undefined {
  const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(headers.get("content-range") ?? "");
  if (!range) return undefined;
  const size = range[3] === "*" ? undefined : Number(range[3]);
  return { start: Number(range[1]), end: Number(range[2]) + 1, size };
}

/** Bytes of the body, where the server says so and does not compress them on the way. */
function sizeOf({ headers }: Answer): number | undefined {
  const length = headers.get("content-length");
  return length === null || headers.has("content-encoding") ? undefined : Number(length);
}

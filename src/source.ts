/**
 * Where bytes come from. Everything that reads a file in this package reads it through `ByteSource`: one method, exact
 * ranges, no state. Paths, blobs, buffers and URLs become sources in open-source.ts. Not a cache, and nothing is retried.
 */
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

/** @throws SourceError when a range is not inside the file */
export function checkRange(name: string, offset: number, length: number, size: number): void {
  if (!(offset >= 0 && length >= 0 && offset + length <= size)) {
    throw new SourceError(
      `ends at byte ${size}, but bytes ${offset} to ${offset + length} are needed: it is truncated`,
      {
        file: name,
      },
    );
  }
}

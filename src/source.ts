/**
 * Where bytes come from. Everything that reads a file in this package reads it through `ByteSource`: one method, exact
 * ranges, no state. Paths, blobs, buffers and URLs become sources in `openSource`.
 */

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

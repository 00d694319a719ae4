/**
 * `eigenlora/workerd`: packs in R2 for Workers. An isolate serves many requests, and what one request waits for another
 * must not wait for: when the first is cancelled, that never comes. So only whole packs are shared here, never reads
 * under way.
 */

import { type OpenOptions, openPack, type Pack } from "../src/core/pack.ts";
import { checkOptions, described, SourceError } from "../src/errors.ts";
import { localSource } from "../src/open-source.ts";
import { throwIfAborted } from "../src/pace.ts";
import { type ByteSource, checkRange, type ReadOptions } from "../src/source.ts";

/** An object of R2, as far as it is needed here. The body is absent where a condition was not met. */
export interface R2Body {
  /** Bytes of the whole object. */
  readonly size: number;
  readonly etag: string;
  arrayBuffer?(): Promise<ArrayBuffer>;
}

/** A bucket of R2, as a Worker has it in `env`. */
export interface R2Bucket {
  get(
    key: string,
    options?: {
      readonly range?: { readonly offset: number; readonly length: number };
      readonly onlyIf?: { readonly etagMatches: string };
    },
  ): Promise<R2Body | null>;
  head(key: string): Promise<R2Body | null>;
}

/** Packs by bucket and key, for the life of the isolate. */
const kept = new WeakMap<R2Bucket, Map<string, Pack>>();

/**
 * An object of R2 as a source for `openPack`, read by ranges: for packs too large for an isolate's memory. All reads
 * are of one version of the object. Open it anew in each request.
 * @returns a source whose `read` throws SourceError when there is no such object, it ends before the range, or it was
 *   replaced
 * @throws TypeError when `bucket` is none
 * @example
 * const pack = await openPack(r2Source(env.PACKS, "tasks.eigen"));
 */
export function r2Source(bucket: R2Bucket, key: string): ByteSource {
  checkBucket("r2Source", bucket);
  let known: { size: number; etag: string } | undefined;
  const get = async (range?: { offset: number; length: number }, options?: ReadOptions): Promise<Uint8Array> => {
    throwIfAborted(options?.signal);
    const onlyIf = known && { etagMatches: known.etag };
    const object = await found(key, bucket.get(key, { ...(range && { range }), ...(onlyIf && { onlyIf }) }));
    if (!object.arrayBuffer || (known && known.etag !== object.etag))
      throw new SourceError("the object was replaced between two reads; open it again", { file: key });
    const { size, etag } = object;
    known = { size, etag };
    if (range) checkRange(key, range.offset, range.length, size);
    const bytes = new Uint8Array(await object.arrayBuffer());
    throwIfAborted(options?.signal);
    const length = range?.length ?? size;
    if (bytes.length === length) return bytes;
    throw new SourceError(`R2 gave ${bytes.length} bytes, ${length} were asked for`, { file: key });
  };
  return {
    name: key,
    get byteLength() {
      return known?.size;
    },
    async read(offset, length, options) {
      if (known) checkRange(key, offset, length, known.size);
      return length === 0 ? new Uint8Array(0) : get({ offset, length }, options);
    },
    readAll: (options) => get(undefined, options),
    async identify() {
      if (known) return known.etag;
      const { etag } = await found(key, bucket.head(key));
      return etag;
    },
  };
}

/**
 * A pack from R2, read whole by the first request and kept for as long as the isolate lives. Give a new version of a
 * pack a new key.
 * @throws SourceError when there is no such object; otherwise as `openPack`
 * @example
 * const pack = await keptPack(env.PACKS, "tasks-7.eigen");
 */
export async function keptPack(
  bucket: R2Bucket,
  key: string,
  options: Pick<OpenOptions, "integrity"> = {},
): Promise<Pack> {
  checkBucket("keptPack", bucket);
  checkOptions("keptPack", options, ["integrity"]);
  let packs = kept.get(bucket);
  if (!packs) kept.set(bucket, (packs = new Map()));
  // Checks that one caller asked for were not asked for by another.
  const name = JSON.stringify([key, options.integrity]);
  const there = packs.get(name);
  if (there) return there;
  const bytes = await r2Source(bucket, key).readAll!();
  const source = localSource(key, bytes.length, async (start, end) => bytes.subarray(start, end));
  const pack = await openPack(source, options);
  // Hashes are computed outside of this thread, and so awaited: now, in this request.
  if (options.integrity !== undefined) await pack.prefetch(pack.tasks.keys());
  // Requests at the same time each read it; the first to be done is kept.
  if (!packs.has(name)) packs.set(name, pack);
  return packs.get(name)!;
}

/** @throws SourceError when there is no object, or R2 fails */
async function found(key: string, asked: Promise<R2Body | null>): Promise<R2Body> {
  let object: R2Body | null;
  try {
    object = await asked;
  } catch (cause) {
    throw new SourceError(`R2 cannot give it: ${(cause as Error).message}`, { file: key, cause });
  }
  if (!object) throw new SourceError("there is no such object in the bucket; check the key", { file: key });
  return object;
}

function checkBucket(where: string, bucket: R2Bucket): void {
  if (typeof bucket?.get === "function" && typeof bucket.head === "function") return;
  throw new TypeError(`${where}: expected a bucket of R2 (env.NAME), got ${described(bucket)}`);
}

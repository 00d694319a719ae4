/**
 * Opens a pack: two reads, the window and then directory and bases, each checked before the next is planned (SPEC.md, sections 2 to 4).
 */
import { checkChoice, checkOptions } from "../arguments.ts";
import { parseDirectory, parseWindow } from "../format/directory.ts";
import { align64 } from "../format/fields.ts";
import { WINDOW_BYTES } from "../format/format.ts";
import { openSource, watchedOf } from "../open-source.ts";
import type { OnProgress } from "../progress.ts";
import { type ByteSource, FETCH_OPTIONS, type FetchOptions, type SourceInput } from "../source.ts";
import { checkSection, explain, Pack } from "./pack.ts";
import type { TrustOptions } from "./trust.ts";

/** Larger directories are read by themselves, since copying them out of what was read with them takes too long. */
const MOST_TOGETHER = 2 ** 22;

/** Options of `openPack`. */
export interface OpenOptions extends FetchOptions, TrustOptions {
  readonly signal?: AbortSignal;
  /** Told how far the pack is read; takes a function for `progress_callback` of transformers.js. Bytes in memory are not told. */
  readonly onProgress?: OnProgress | undefined;
  /**
   * `now` reads the bases together with the directory, so that a first task costs three requests. `later` reads the
   * directory only; the runtime fetches the bases when it starts. Default: `now`.
   */
  readonly bases?: "now" | "later";
  /**
   * Most bytes of task blobs to keep; those used least recently go first. Default: 8 MB, or what four of the largest tasks take; what
   * `prefetch` has read stays then.
   */
  readonly maxResidentBytes?: number;
  /**
   * How many times the bytes stored for it a task may become in memory, as factors or as an exported adapter (SPEC.md, section 10); 16 MiB
   * are always allowed. Set it higher for a pack that you trust. Default: 1024.
   */
  readonly maxExpansion?: number | undefined;
}

/**
 * Opens a pack. Reads the window, then directory and bases (one request where they are adjacent, as in a fresh pack).
 * @param input path, URL (read by HTTP ranges), name on the Hugging Face Hub (`hf:org/name/tasks.eigen`), Blob, ArrayBuffer or any ByteSource
 * @throws SourceError when bytes cannot be had, FormatError when they are not a whole pack of a known version, TrustError when they
 *   are not what `integrity` and `keys` ask for
 * @example
 * const pack = await openPack("tasks.eigen");
 * console.log([...pack.tasks.keys()]);
 */
export async function openPack(input: SourceInput, options: OpenOptions = {}): Promise<Pack> {
  checkOptions("openPack", options, [
    ...(["signal", "onProgress", "bases", "maxResidentBytes", "maxExpansion", "integrity", "keys", "revoked"] as const),
    ...FETCH_OPTIONS,
  ]);
  checkChoice("bases", options.bases ?? "now", ["now", "later"]);
  const inner = await openSource(input, options, "openPack");
  let directoryBytes: Uint8Array | undefined;
  try {
    const counted = { requests: 0, bytes: 0, whole: false };
    let needed: number | undefined;
    // A server without ranges sends the whole file at once.
    const total = (loaded: number) => needed ?? (loaded > WINDOW_BYTES ? inner.byteLength : undefined);
    let watched = await watchedOf(inner, "pack", options.onProgress, total);
    const read: ByteSource["read"] = async (...range) => {
      counted.requests++;
      const bytes = await (watched ?? inner).read(...range);
      counted.bytes += bytes.length;
      return bytes;
    };
    const { signal, integrity, keys, revoked } = options;
    const { name } = inner;
    // An empty hash or list counts as given: it is a mistake that must not pass for trust.
    const asked = [integrity, keys, revoked].some((option) => option !== undefined);
    const trust = asked ? await (await import("./trust.ts")).Trust.create(name, options) : undefined;
    // A file shorter than the window may be of another kind, which its first bytes tell.
    const head = Math.min(WINDOW_BYTES, inner.byteLength ?? WINDOW_BYTES);
    const window = parseWindow(await read(0, head, { signal }), name, inner.byteLength);
    const { directoryOffset, directoryLength, basesOffset, basesLength } = window.superblock;
    const behind = basesOffset === align64(directoryOffset + directoryLength);
    const together = options.bases !== "later" && behind && directoryLength < MOST_TOGETHER;
    const length = together ? basesOffset + basesLength - directoryOffset : directoryLength;
    needed = head + length;
    const bytes = await read(directoryOffset, length, { signal });
    watched?.done();
    watched = undefined;
    const basesAt = together ? basesOffset - directoryOffset : directoryLength;
    // A copy: as a view the directory would keep the bases in memory.
    directoryBytes = together ? bytes.slice(0, directoryLength) : bytes;
    await trust?.checkRoot(window, directoryBytes);
    const directory = await parseDirectory(directoryBytes, window.superblock, name, signal);
    trust?.checkHashes(directory);
    const bases = together ? bytes.subarray(basesAt) : undefined;
    const { reads = counted, byteLength } = inner;
    const source = { name, byteLength, read, clear: async () => inner.clear?.(), close: async () => inner.close?.() };
    if (bases) await checkSection(bases, directory.bases, "bases", name, trust, signal);
    const { maxResidentBytes, maxExpansion } = options;
    return new Pack({ source, reads, window, directory, maxResidentBytes, maxExpansion, trust, bases });
  } catch (error) {
    const refused = await explain(error, inner, directoryBytes);
    await inner.close?.();
    throw refused;
  }
}

/**
 * The cache of the Hugging Face Hub on this disk, in the layout of Python's huggingface_hub, so that each finds what the other has
 * downloaded:
 *
 *   models--org--name/refs/main           the commit that a branch was at when it was last asked for
 *                     trees/COMMIT.json   names, sizes and hashes of a commit's files
 *                     blobs/HASH          contents, by SHA-256 where Git LFS keeps them, else by Git's own hash
 *                     snapshots/COMMIT/…  the files of a commit: links to blobs
 *
 * It needs no locks. A blob gets its name when its hash is right; before that several writers put the same bytes in the same places.
 */
import { createHash, randomUUID } from "node:crypto";
import { constants, createReadStream } from "node:fs";
import { type FileHandle, mkdir, open, readFile, rename, rm, stat, symlink, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative } from "node:path";
import { reasonOf } from "../disk.ts";
import { SourceError } from "../errors.ts";
import type { AbortOptions, ByteSource } from "../source.ts";
import { fromLatin1 } from "../text.ts";
import { isInside } from "./hub-name.ts";

/** What the Hub promises of a file. */
export interface HubFile {
  /** Size in bytes. */
  readonly size: number;
  /** Hexadecimal digits: the 64 of SHA-256, or the 40 of Git's hash of a blob. */
  readonly hash: string;
}

/** Files of a commit, by path. */
export type HubFiles = ReadonlyMap<string, HubFile>;

/** A full commit hash, which names one state for ever. */
export const COMMIT: RegExp = /^[0-9a-f]{40}$/;

/**
 * Bytes of a first request, and of the largest. What a request has not brought to its end is lost, so they grow while they are quick: each
 * begins with a redirect, which takes its time whatever follows.
 */
const [FIRST_PIECE, LARGEST_PIECE] = [2 ** 20, 2 ** 25];
const QUICK_MS = 1000;
/** How the files begin that Git LFS leaves in the place of others, and more than they have. */
const POINTER = "version https://git-lfs.github.com/spec/";
const POINTER_BYTES = 1024;

/** Where Hugging Face keeps things: HF_HOME, or below XDG_CACHE_HOME. */
export function hubHome(): string {
  const cache = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache");
  return absolute(process.env["HF_HOME"] || join(cache, "huggingface"));
}

/** The cache of one repository. */
export class HubCache {
  readonly #folder: string;

  constructor(repository: string) {
    const { HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE } = process.env;
    const cache = absolute(HF_HUB_CACHE || HUGGINGFACE_HUB_CACHE || join(hubHome(), "hub"));
    this.#folder = join(cache, `models--${repository.replace("/", "--")}`);
  }

  /** The folder of a commit's files. */
  snapshot(commit: string): string {
    return join(this.#folder, "snapshots", commit);
  }

  /** The commit that a branch or tag was at when it was last asked for. */
  async commitOf(revision: string): Promise<string | undefined> {
    if (COMMIT.test(revision)) return revision;
    const found = await readFile(join(this.#folder, "refs", revision), "utf8").catch(() => "");
    return COMMIT.test(found.trim()) ? found.trim() : undefined;
  }

  /** All files of a commit, here or not; undefined where they were never listed. */
  async files(commit: string): Promise<HubFiles | undefined> {
    const text = await readFile(this.#tree(commit), "utf8").catch(() => undefined);
    try {
      const { format_version, files } = JSON.parse(text ?? "{}");
      return format_version === 1 ? filesOf(Object.entries(files)) : undefined;
    } catch {
      return undefined;
    }
  }

  /** Keeps what the Hub has said of a revision. @param tree files of the commit, by path */
  async keep(revision: string, commit: string, tree: ReadonlyMap<string, TreeEntry>): Promise<void> {
    const text = JSON.stringify({ format_version: 1, files: Object.fromEntries(tree) }, null, 1);
    try {
      // Python's listing says more of each file: it stays.
      if (!(await this.files(commit))) await this.#write(this.#tree(commit), text);
      if (revision !== commit) await this.#write(join(this.#folder, "refs", revision), commit);
    } catch {
      // It saves requests, no more: a cache that was made by others may not be ours to write.
    }
  }

  /** The path of a file that is here, whole. */
  async find(commit: string, path: string, file: HubFile | undefined): Promise<string | undefined> {
    const place = join(this.snapshot(commit), ...path.split("/"));
    return (await isWhole(place, file)) ? place : undefined;
  }

  /**
   * Puts a file where it belongs; what an earlier try has brought is kept.
   * @param source of its bytes; read where they are not here
   * @returns its path
   * @throws SourceError when it cannot be had or written, or is not what was promised
   */
  async put(commit: string, path: string, file: HubFile, source: ByteSource, how: Receiving): Promise<string> {
    const place = join(this.snapshot(commit), ...path.split("/"));
    if (await isWhole(place, file)) return place;
    const blob = join(this.#folder, "blobs", file.hash);
    await written(blob, () => mkdir(dirname(blob), { recursive: true }));
    if (!(await isWhole(blob, file))) await receive(blob, file, source, how);
    await written(place, async () => {
      await mkdir(dirname(place), { recursive: true });
      await rm(place, { force: true });
      await symlink(relative(dirname(place), blob), place).catch(async (error: NodeJS.ErrnoException) => {
        if (error.code === "EEXIST" && (await isWhole(place, file))) return;
        // Windows allows links to some users only: the file itself lies there then, as Python puts it.
        await rename(blob, place);
      });
    });
    return place;
  }

  #tree(commit: string): string {
    return join(this.#folder, "trees", `${commit}.json`);
  }

  /** Readers see the old content or the new one. */
  async #write(path: string, text: string): Promise<void> {
    const beside = `${path}.${randomUUID().slice(0, 8)}.tmp`;
    await written(path, async () => {
      await mkdir(dirname(path), { recursive: true });
      await writeFile(beside, text);
      await rename(beside, path);
    });
  }
}

/** What huggingface_hub keeps of a file in `trees/COMMIT.json`. */
export interface TreeEntry {
  readonly size: number;
  readonly blob_id: string;
  readonly lfs_sha256?: string;
  readonly lfs_size?: number;
}

/** @throws TypeError when a name or promise is none */
export function filesOf(entries: Iterable<readonly [path: string, entry: TreeEntry]>): HubFiles {
  const files = new Map<string, HubFile>();
  for (const [path, { size, blob_id, lfs_sha256, lfs_size = size }] of entries) {
    const hash = lfs_sha256 ?? blob_id;
    const known = isInside(path) && Number.isSafeInteger(lfs_size) && lfs_size >= 0;
    if (!known || typeof hash !== "string" || !/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(hash))
      throw new TypeError(`${JSON.stringify(path)} has the size ${lfs_size} and the hash ${hash}`);
    files.set(path, { size: lfs_size, hash });
  }
  return files;
}

/** How a file is received. */
interface Receiving extends AbortOptions {
  /** Told how many bytes of it are here. */
  readonly onBytes: (loaded: number) => void;
}

/** Downloads a blob, from where an earlier try has ended, and gives it its name once its hash is right. */
async function receive(blob: string, file: HubFile, source: ByteSource, { signal, onBytes }: Receiving): Promise<void> {
  // Not Python's name: older versions append to what they find.
  const partial = `${blob}.eigenlora.incomplete`;
  const handle = await written(partial, () => open(partial, constants.O_RDWR | constants.O_CREAT));
  try {
    let at = (await handle.stat()).size;
    if (at > file.size) await handle.truncate((at = 0));
    let most = FIRST_PIECE;
    for (onBytes(at); at < file.size; onBytes(at)) {
      const began = performance.now();
      const piece = await read(source, at, Math.min(most, file.size - at), file.size, signal);
      if (performance.now() - began < QUICK_MS) most = Math.min(2 * most, LARGEST_PIECE);
      await written(partial, () => writeAt(handle, piece, at));
      at += piece.length;
    }
    await written(partial, () => handle.sync());
  } finally {
    await handle.close();
  }
  await written(blob, async () => {
    try {
      const problem = await problemOf(partial, file);
      if (problem === undefined) return await rename(partial, blob);
      await rm(partial, { force: true });
      throw new SourceError(`${problem}; nothing of it was kept, try again`, { file: source.name });
    } catch (error) {
      // Another process may have given it its name meanwhile.
      if (!(await isWhole(blob, file))) throw error;
    }
  });
}

/** The next piece. @throws SourceError saying what is there instead, when the file is another than the one promised */
async function read(source: ByteSource, at: number, length: number, size: number, signal: AbortSignal | undefined) {
  try {
    return await source.read(at, length, { signal });
  } catch (error) {
    const found = source.byteLength;
    if (found === undefined || found === size) throw error;
    const head = found < POINTER_BYTES ? fromLatin1(await source.read(0, found, { signal })) : "";
    const what = head.startsWith(POINTER) ? ": it is a Git LFS pointer, and the file itself is not there" : "";
    const message = `has ${found} bytes, where the Hub promises ${size}${what}; check HF_ENDPOINT, or try again later`;
    throw new SourceError(message, { file: source.name, cause: error });
  }
}

/** What is wrong with a file that is here as a whole. */
async function problemOf(path: string, { size, hash }: HubFile): Promise<string | undefined> {
  const sum = hash.length === 40 ? createHash("sha1").update(`blob ${size}\0`) : createHash("sha256");
  let bytes = 0;
  for await (const chunk of createReadStream(path)) {
    sum.update(chunk as Uint8Array);
    bytes += (chunk as Uint8Array).length;
  }
  const found = sum.digest("hex");
  return found === hash
    ? undefined
    : `has ${bytes} bytes with the hash ${found}, where the Hub promises ${size} with ${hash}`;
}

async function isWhole(path: string, file: HubFile | undefined): Promise<boolean> {
  const there = await stat(path).catch(() => undefined);
  return there?.isFile() === true && there.size === (file?.size ?? there.size);
}

async function writeAt(handle: FileHandle, bytes: Uint8Array, at: number): Promise<void> {
  for (let done = 0; done < bytes.length; )
    done += (await handle.write(bytes, done, bytes.length - done, at + done)).bytesWritten;
}

/** @throws SourceError saying why a file of the cache cannot be written */
async function written<T>(path: string, work: () => Promise<T>): Promise<T> {
  return work().catch((cause: unknown) => {
    if (cause instanceof SourceError) throw cause;
    const advice = "HF_HOME or HF_HUB_CACHE name another place for the cache";
    throw new SourceError(`cannot be written: ${reasonOf(cause)}; ${advice}`, { file: path, cause });
  });
}

function absolute(folder: string): string {
  return folder.startsWith("~") ? join(homedir(), folder.slice(1)) : folder;
}

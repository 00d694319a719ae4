/**
 * Downloads from the Hugging Face Hub. Own code, since @huggingface/hub 2.17 checks no hash, which SECURITY.md
 * promises, begins again when a download breaks off, has no offline mode, and puts the files of one revision below
 * several commits.
 *
 * Files of a repository are listed once, so that all are of one commit, and downloaded into the Hub's own cache when
 * they are needed, for Node, Deno and Bun.
 */

import { createHash, randomUUID } from "node:crypto";
import { constants, createReadStream } from "node:fs";
import { mkdir, open, readdir, readFile, rename, rm, stat, symlink, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative, sep } from "node:path";
import { nearest, SourceError } from "../errors.ts";
import { openPath, reasonOf } from "../files-node.ts";
import { type FileProgress, type OnProgress, teller } from "../progress.ts";
import type { AbortOptions, ByteSource, FetchOptions } from "../source.ts";
import { fromUtf8 } from "../text.ts";
import { type HubName, hubEndpoint, hubHeaders, hubUrl, isInside } from "./hub-name.ts";
import { hubName, hubText } from "./hub-page.ts";
import { UrlSource } from "./url-source.ts";

/**
 * Options of requests to the Hub. Default of `headers`: the token of HF_TOKEN, or the one that `hf auth login` has
 * kept.
 */
export interface HubOptions extends FetchOptions, AbortOptions {
  /** Receives the progress of files that were not in the cache. */
  readonly onProgress?: OnProgress | undefined;
}

/** Options of a snapshot. */
export interface SnapshotOptions extends HubOptions {
  /** Kind of the files. Default: "adapter" */
  readonly stage?: FileProgress["stage"] | undefined;
}

const OFFLINE = "is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it to download";
/** Most bytes of the list of a repository's files: some 60 000 files. */
const MOST_LISTING = 2 ** 24;
/** Files that are downloaded at a time: most of an adapter's are small, and wait for answers. */
const AT_A_TIME = 4;

/**
 * Opens a file of a repository from the cache, and downloads it first where it is missing.
 * @throws TypeError for a name that is not well formed
 * @throws SourceError when there is no such file, it may not be read, or it is not what the Hub promises
 */
export async function openHub(text: string, options: SnapshotOptions = {}): Promise<ByteSource> {
  const name = hubName(text)!;
  const snapshot = await openSnapshot(name, options);
  const [place] = await snapshot.get([name.path]);
  return openPath(place!, snapshot.nameOf(name.path));
}

/**
 * Finds out which commit a revision is and which files that has. A commit that was listed before costs no request.
 * @throws SourceError when the Hub has no such repository or revision, or does not show it
 */
export async function openSnapshot(name: HubName, options: SnapshotOptions = {}): Promise<Snapshot> {
  const { repository, revision } = name;
  const { HF_HUB_CACHE, HF_HUB_OFFLINE = "" } = process.env;
  const cache = join(absolute(HF_HUB_CACHE || join(hubHome(), "hub")), `models--${repository.replace("/", "--")}`);
  const isOffline = /^(1|on|yes|true)$/i.test(HF_HUB_OFFLINE);
  const kept = await readFile(join(hubHome(), "token"), "utf8").catch(() => "");
  const hub: Hub = { name, isOffline, endpoint: hubEndpoint(), ...options, headers: hubHeaders(options, kept) };
  const known = await commitOf(cache, revision);
  if (known !== undefined && (isOffline || known === revision)) {
    const files =
      (await listed(cache, known)) ?? (isOffline ? await filesIn(join(cache, "snapshots", known)) : undefined);
    if (files) return new Snapshot(hub, cache, known, files);
  }
  const { commit, tree } = await listingOf(hub);
  try {
    // Python's listing says more of each file: it stays.
    if (!(await listed(cache, commit))) {
      const text = JSON.stringify({ format_version: 1, files: tree }, null, 1);
      await writeWhole(treeOf(cache, commit), text);
    }
    if (revision !== commit) await writeWhole(join(cache, "refs", revision), commit);
  } catch {
    // It saves requests, no more: a cache that was made by others may not be ours to write.
  }
  return new Snapshot(hub, cache, commit, filesOf(tree));
}

/** The files of a repository at one commit. */
export class Snapshot {
  /** Folder in the cache in which its files lie once they are downloaded. */
  readonly folder: string;
  /** Files by path. */
  readonly files: ReadonlyMap<string, HubFile>;
  readonly #hub: Hub;
  readonly #cache: string;
  readonly #commit: string;

  /** @internal Use `openSnapshot`. */
  constructor(hub: Hub, cache: string, commit: string, files: ReadonlyMap<string, HubFile>) {
    this.folder = join(cache, "snapshots", commit);
    this.files = files;
    this.#hub = hub;
    this.#cache = cache;
    this.#commit = commit;
  }

  /** A file's or folder's name on the Hub, with the commit, so that it always names this content. */
  nameOf(path: string): string {
    return hubText({ repository: this.#hub.name.repository, revision: this.#commit, path });
  }

  /**
   * Downloads files that are missing.
   * @returns their paths on the disk
   * @throws SourceError when one is not in the repository, or cannot be had
   */
  async get(paths: readonly string[]): Promise<string[]> {
    const missing: string[] = [];
    for (const path of paths) if (!(await this.#isHere(path))) missing.push(path);
    const { onProgress, signal, stage = "adapter" } = this.#hub;
    // All are reported before the first is asked for, so that a listener knows how much there is.
    const waiting = missing.map((path) => {
      const tell = onProgress && teller(this.nameOf(path), stage, onProgress);
      tell?.("initiate", 0, this.#find(path).size);
      return { path, tell };
    });
    const stop = new AbortController();
    const ended = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
    const lanes = Array.from({ length: AT_A_TIME }, async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) await this.#download(next.path, ended, next.tell);
    });
    await Promise.all(lanes).finally(() => {
      stop.abort();
      return Promise.allSettled(lanes);
    });
    return paths.map((path) => this.#place(path));
  }

  /** Opens a file for reads of parts, without downloading it as a whole. @throws SourceError as `get` */
  async open(path: string): Promise<ByteSource> {
    if (await this.#isHere(path)) return openPath(this.#place(path), this.nameOf(path));
    return this.#remote(path);
  }

  /** @throws SourceError where the Hub must not be asked */
  #remote(path: string): UrlSource {
    const { name, endpoint } = this.#hub;
    return sourceOf(this.#hub, hubUrl(endpoint, { ...name, revision: this.#commit, path }), path);
  }

  #place(path: string): string {
    return join(this.folder, ...path.split("/"));
  }

  /** True for a file that is on the disk, whole. */
  #isHere(path: string): Promise<boolean> {
    return isWhole(this.#place(path), this.#find(path));
  }

  /** @throws SourceError when it cannot be had or written, or is not what was promised */
  async #download(path: string, signal: AbortSignal, tell: ReturnType<typeof teller> | undefined): Promise<void> {
    const source = this.#remote(path);
    const file = this.#find(path);
    const blob = join(this.#cache, "blobs", file.hash);
    const place = this.#place(path);
    const onBytes = (loaded: number): void => tell?.("progress", loaded, file.size);
    tell?.("download", 0, file.size);
    try {
      await mkdir(dirname(blob), { recursive: true });
      if (!(await isWhole(blob, file))) await receive(blob, file, source, signal, onBytes);
      await mkdir(dirname(place), { recursive: true });
      // The link replaces an older one in one step, since others may open the file at any time. Windows allows links to
      // some users only: the file itself then takes its place, as in Python.
      const link = `${place}.${randomUUID().slice(0, 8)}.tmp`;
      const linked = symlink(relative(dirname(place), blob), link).then(() => link);
      await rename(await linked.catch(() => blob), place);
      tell?.("done", file.size, file.size);
    } catch (cause) {
      // Errors of the system have a code; those of a signal are its own.
      if (cause instanceof SourceError || (cause as NodeJS.ErrnoException).syscall === undefined) throw cause;
      const advice = "HF_HOME or HF_HUB_CACHE name another place for the cache";
      throw new SourceError(`cannot be written: ${reasonOf(cause)}; ${advice}`, { file: place, cause });
    } finally {
      await source.close();
    }
  }

  #find(path: string): HubFile {
    const file = this.files.get(path);
    if (file) return file;
    const close = nearest(path, this.files.keys());
    const names = close.length > 0 ? `; the nearest are ${close.join(", ")}` : "";
    const problem = path === "" ? "names a repository, and a file of it is needed" : "there is no such file";
    throw new SourceError(`${problem}${names}`, { file: this.nameOf(path) });
  }
}

/** A repository, and the way to ask for it. */
interface Hub extends SnapshotOptions {
  readonly name: HubName;
  readonly endpoint: string;
  readonly isOffline: boolean;
  /** Headers of each request: the token. */
  readonly headers: Record<string, string>;
}

/** @throws SourceError when it is not shown, or another server answers */
async function listingOf(hub: Hub): Promise<{ commit: string; tree: ListedFiles }> {
  const { name, endpoint, signal } = hub;
  const revision = encodeURIComponent(name.revision);
  const source = sourceOf(
    hub,
    new URL(`${endpoint}/api/models/${name.repository}/revision/${revision}?blobs=true`),
    "",
  );
  const bytes = await source.readAll({ signal, most: () => MOST_LISTING });
  if (bytes.length > MOST_LISTING) {
    const message = `lists more files than fit into ${MOST_LISTING} bytes; download what you need, and give its folder`;
    throw new SourceError(message, { file: source.name });
  }
  try {
    const { sha, siblings }: Listing = JSON.parse(fromUtf8(bytes));
    if (typeof sha !== "string" || !COMMIT.test(sha)) throw new TypeError(`"sha" is ${sha}`);
    const tree = Object.fromEntries(
      siblings.map(({ rfilename, size, blobId, lfs }) => {
        const large = lfs ? { lfs_sha256: lfs.sha256, lfs_size: lfs.size } : {};
        return [rfilename, { size, blob_id: blobId, ...large }];
      }),
    );
    filesOf(tree);
    return { commit: sha, tree };
  } catch (cause) {
    const message = `does not answer as the Hub does (${(cause as Error).message}); check HF_ENDPOINT`;
    throw new SourceError(message, { file: source.name, cause });
  }
}

/**
 * @param path of the file that is asked for; empty for the listing
 * @throws SourceError where the Hub must not be asked
 */
function sourceOf(hub: Hub, address: URL, path: string): UrlSource {
  if (hub.isOffline) throw new SourceError(OFFLINE, { file: hubText({ ...hub.name, path }) });
  const { fetch: ask = (url, init) => fetch(url, init) } = hub;
  return new UrlSource(address, {
    ...hub,
    fetch: async (url, init) => {
      const response = await ask(url, init);
      // Files lie on servers of others, where a redirect leads.
      if ((response.url || url).startsWith(`${hub.endpoint}/`)) refuse(hub, response, path !== "");
      return response;
    },
  });
}

/** @param isFile a file was asked for: its repository is known then @throws SourceError for what the Hub refuses */
function refuse({ name, endpoint, headers: sent }: Hub, { status, headers }: Response, isFile: boolean): void {
  if (![401, 403, 404].includes(status)) return;
  const { repository, revision } = name;
  const token = "authorization" in sent;
  const code = headers.get("x-error-code");
  const explanation = headers.get("x-error-message");
  const fail = (message: string): never => {
    throw new SourceError(`${message} (status ${status})`, { file: hubText({ ...name, path: "" }), status });
  };
  if (/invalid (credentials|user token|username)/i.test(explanation ?? ""))
    fail(`the Hub does not know the token that was sent; make another at ${endpoint}/settings/tokens`);
  if (code === "RevisionNotFound") fail(`has no revision "${revision}"; check the branch, tag or commit`);
  if (code === "GatedRepo" || (isFile && status !== 404)) {
    const who = token ? "the account that HF_TOKEN is of" : "your account, and set HF_TOKEN to its token";
    fail(`is gated: accept its licence at ${endpoint}/${repository} with ${who}`);
  }
  if (status === 403) fail(`the token that was sent may not read it${explanation === null ? "" : `: ${explanation}`}`);
  const hint = token ? "check that the token may see it" : "set HF_TOKEN if it is private";
  if (!isFile) fail(`the Hub has no such repository, or does not show it: check the name, and ${hint}`);
}

/** Answer of the Hub about a repository, as far as it is used. */
interface Listing {
  sha: string;
  siblings: { rfilename: string; size: number; blobId: string; lfs?: { sha256: string; size: number } | null }[];
}

// The cache of the Hugging Face Hub on this disk, in the layout of Python's huggingface_hub, so that each finds what
// the other has downloaded:
// models--org--name/refs/main           the commit that a branch was at when it was last asked for
// trees/COMMIT.json   names, sizes and hashes of a commit's files
// blobs/HASH          contents, by SHA-256 where Git LFS keeps them, else by Git's own hash
// snapshots/COMMIT/…  the files of a commit: links to blobs
// It needs no locks. A blob gets its name when its hash is right; before that several writers put the same bytes in the
// same places.

/** Size and hash that the Hub promises for a file. */
interface HubFile {
  /** Size in bytes. */
  readonly size: number;
  /** Hexadecimal digits: the 64 of SHA-256, or the 40 of Git's hash of a blob. */
  readonly hash: string;
}

/** A full commit hash, which names one state for ever. */
const COMMIT: RegExp = /^[0-9a-f]{40}$/;

/**
 * Bytes of a first request, and of the largest. What a request has not brought to its end is lost, so each asks for
 * twice as much as the one before: each begins with a redirect, which takes its time whatever follows.
 */
const FIRST_PIECE = 2 ** 20;
const LARGEST_PIECE = 2 ** 25;

/** Folder of Hugging Face's files: HF_HOME, or below XDG_CACHE_HOME. */
function hubHome(): string {
  const cache = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache");
  return absolute(process.env["HF_HOME"] || join(cache, "huggingface"));
}

/** The commit that a branch or tag was at when it was last asked for. */
async function commitOf(cache: string, revision: string): Promise<string | undefined> {
  if (COMMIT.test(revision)) return revision;
  const found = await readFile(join(cache, "refs", revision), "utf8").catch(() => "");
  return COMMIT.test(found.trim()) ? found.trim() : undefined;
}

function treeOf(cache: string, commit: string): string {
  return join(cache, "trees", `${commit}.json`);
}

/** All files of a commit, on the disk or not; undefined where they were never listed. */
async function listed(cache: string, commit: string): Promise<ReadonlyMap<string, HubFile> | undefined> {
  try {
    const { format_version, files } = JSON.parse(await readFile(treeOf(cache, commit), "utf8"));
    return format_version === 1 ? filesOf(files) : undefined;
  } catch {
    return undefined;
  }
}

/** Readers see the old content or the new one. */
async function writeWhole(path: string, text: string): Promise<void> {
  const temporary = `${path}.${randomUUID().slice(0, 8)}.tmp`;
  await mkdir(dirname(path), { recursive: true });
  await writeFile(temporary, text);
  await rename(temporary, path);
}

/**
 * Files that another program has downloaded and not listed, for use without the Hub, which alone knows their hashes.
 */
async function filesIn(folder: string): Promise<ReadonlyMap<string, HubFile>> {
  const files = new Map<string, HubFile>();
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true }).catch(() => [])) {
    const path = join(entry.parentPath, entry.name);
    const { size } = (await stat(path).catch(() => undefined)) ?? {};
    if (!entry.isDirectory() && size !== undefined)
      files.set(relative(folder, path).split(sep).join("/"), { size, hash: "" });
  }
  return files;
}

/** Files by path, as huggingface_hub writes them into `trees/COMMIT.json`. */
type ListedFiles = Record<string, { size: number; blob_id: string; lfs_sha256?: string; lfs_size?: number }>;

/** @throws TypeError when a name or promise is none */
function filesOf(tree: ListedFiles): ReadonlyMap<string, HubFile> {
  const files = new Map<string, HubFile>();
  for (const [path, { size, blob_id, lfs_sha256, lfs_size = size }] of Object.entries(tree)) {
    const hash = lfs_sha256 ?? blob_id;
    const isKnown = isInside(path) && Number.isSafeInteger(lfs_size) && lfs_size >= 0;
    if (!isKnown || typeof hash !== "string" || !/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(hash))
      throw new TypeError(`${JSON.stringify(path)} has the size ${lfs_size} and the hash ${hash}`);
    files.set(path, { size: lfs_size, hash });
  }
  return files;
}

/** Downloads a blob, from where an earlier try has ended, and gives it its name once its hash is right. */
async function receive(
  blob: string,
  file: HubFile,
  source: ByteSource,
  signal: AbortSignal | undefined,
  onBytes: (loaded: number) => void,
): Promise<void> {
  // Not Python's name: older versions append to what they find.
  const partial = `${blob}.eigenlora.incomplete`;
  const handle = await open(partial, constants.O_RDWR | constants.O_CREAT);
  try {
    let at = (await handle.stat()).size;
    if (at > file.size) await handle.truncate((at = 0));
    let most = FIRST_PIECE;
    for (onBytes(at); at < file.size; onBytes(at)) {
      const piece = await source.read(at, Math.min(most, file.size - at), { signal });
      most = Math.min(2 * most, LARGEST_PIECE);
      for (let done = 0; done < piece.length; )
        done += (await handle.write(piece, done, piece.length - done, at + done)).bytesWritten;
      at += piece.length;
    }
    await handle.sync();
  } finally {
    await handle.close();
  }
  try {
    const found = await hashOf(partial, file);
    if (found === file.hash) return await rename(partial, blob);
    await rm(partial, { force: true });
    const message = `has the hash ${found}, where the Hub promises ${file.hash}; nothing of it was kept, try again`;
    throw new SourceError(message, { file: source.name });
  } catch (error) {
    // Another process may have given it its name meanwhile.
    if (!(await isWhole(blob, file))) throw error;
  }
}

/** Hash of a whole file on the disk, of the kind that is promised. */
async function hashOf(path: string, { size, hash }: HubFile): Promise<string> {
  const sum = hash.length === 40 ? createHash("sha1").update(`blob ${size}\0`) : createHash("sha256");
  for await (const chunk of createReadStream(path)) sum.update(chunk as Uint8Array);
  return sum.digest("hex");
}

async function isWhole(path: string, { size }: HubFile): Promise<boolean> {
  const there = await stat(path).catch(() => undefined);
  return there?.isFile() === true && there.size === size;
}

function absolute(folder: string): string {
  return folder.startsWith("~") ? join(homedir(), folder.slice(1)) : folder;
}

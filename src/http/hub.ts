/**
 * Downloads from the Hugging Face Hub. Own code, since @huggingface/hub 2.17 checks no hash, which SECURITY.md promises, begins again when a
 * download breaks off, has no offline mode, and puts the files of one revision below several commits.
 *
 * Files of a repository are listed once, so that all are of one commit, and downloaded into the Hub's own cache when they are needed, for Node,
 * Deno and Bun.
 */

import { createHash, randomUUID } from "node:crypto";
import { constants, createReadStream } from "node:fs";
import {
  type FileHandle,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  writeFile,
} from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative, sep } from "node:path";
import { nearest } from "../arguments.ts";
import { openDisk, reasonOf } from "../disk.ts";
import { SourceError } from "../errors.ts";
import { throwIfAborted } from "../pace.ts";
import { type FileProgress, type OnProgress, teller } from "../progress.ts";
import { type AbortOptions, type ByteSource, type FetchOptions, type ReadOptions, SharedWork } from "../source.ts";
import { fromLatin1, fromUtf8 } from "../text.ts";
import { type HubName, hubEndpoint, hubName, hubText, hubUrl, isInside } from "./hub-name.ts";
import { follow } from "./redirects.ts";
import { UrlSource } from "./url-source.ts";

/** How the Hub is asked. Default of `headers`: the token of HF_TOKEN, or the one that `hf auth login` has kept. */
export interface HubOptions extends FetchOptions, AbortOptions {
  /** Told of the files that were not in the cache. */
  readonly onProgress?: OnProgress | undefined;
}

/** What is asked of a snapshot beside. */
export interface SnapshotOptions extends HubOptions {
  /** What the files are. Default: "adapter" */
  readonly stage?: FileProgress["stage"] | undefined;
}

const OFFLINE = "is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it to download";
/** Most bytes of the list of a repository's files: some 60 000 files. */
const MOST_LISTING = 2 ** 24;
/** Files that are downloaded at a time: most of an adapter's are small, and wait for answers. */
const AT_A_TIME = 4;

/**
 * Opens a file of a repository for ranged reads, from the cache. The first read downloads it where it is missing, and reports to `onBytes`.
 * @throws TypeError for a name that is not well formed
 * @throws SourceError when there is no such file, or it may not be read; from a read when it is not what the Hub promises
 */
export async function openHub(text: string, options: FetchOptions & AbortOptions = {}): Promise<ByteSource> {
  const name = hubName(text)!;
  // Progress of a pack or model is that of its reads.
  const snapshot = await openSnapshot(name, { ...options, onProgress: undefined });
  return snapshot.openWhole(name.path);
}

/**
 * Finds out which commit a revision is and which files that has. A commit that was listed before costs no request.
 * @throws SourceError when the Hub has no such repository or revision, or does not show it
 */
export async function openSnapshot(name: HubName, options: SnapshotOptions = {}): Promise<Snapshot> {
  const { repository, revision } = name;
  const cache = cacheOf(repository);
  const known = await commitOf(cache, revision);
  const offline = isOffline();
  const client = new HubClient(name, options);
  if (known !== undefined && (offline || known === revision)) {
    const files =
      (await listed(cache, known)) ?? (offline ? await filesIn(join(cache, "snapshots", known)) : undefined);
    if (files) return new Snapshot(client, cache, known, files);
  }
  if (offline) throw new SourceError(OFFLINE, { file: hubText({ ...name, path: "" }) });
  const { commit, tree } = await client.listing().catch((error: unknown) => {
    // No answer means the network; the cache can be used knowingly.
    if (!(error instanceof SourceError) || error.status !== undefined || known === undefined) throw error;
    const message = `${error.message.slice(error.file.length + 2)}. What is in the cache is taken with HF_HUB_OFFLINE=1`;
    const { file, transient = false } = error;
    throw new SourceError(message, { file, transient, cause: error });
  });
  const files = filesOf(tree);
  try {
    // Python's listing says more of each file: it stays.
    if (!(await listed(cache, commit))) {
      const text = JSON.stringify({ format_version: 1, files: Object.fromEntries(tree) }, null, 1);
      await writeWhole(treeOf(cache, commit), text);
    }
    if (revision !== commit) await writeWhole(join(cache, "refs", revision), commit);
  } catch {
    // It saves requests, no more: a cache that was made by others may not be ours to write.
  }
  return new Snapshot(client, cache, commit, files);
}

/** The files of a repository at one commit. */
export class Snapshot {
  /** Folder in the cache in which its files lie once they are downloaded. */
  readonly folder: string;
  /** Files by path; undefined for those that only the cache knows, without the Hub. */
  readonly files: ReadonlyMap<string, HubFile | undefined>;
  readonly #client: HubClient;
  readonly #cache: string;
  readonly #commit: string;

  /** @internal Use `openSnapshot`. */
  constructor(client: HubClient, cache: string, commit: string, files: ReadonlyMap<string, HubFile | undefined>) {
    this.folder = join(cache, "snapshots", commit);
    this.files = files;
    this.#client = client;
    this.#cache = cache;
    this.#commit = commit;
  }

  /** A file's or folder's name on the Hub, with the commit, so that it always names this content. */
  nameOf(path: string): string {
    return hubText({ repository: this.#client.name.repository, revision: this.#commit, path });
  }

  /**
   * Downloads files that are missing.
   * @returns their paths on the disk
   * @throws SourceError when one is not in the repository, or cannot be had
   */
  async get(paths: readonly string[], options: ReadOptions = this.#client.options): Promise<string[]> {
    const missing: string[] = [];
    for (const path of paths) if ((await this.#here(path)) === undefined) missing.push(path);
    const { onProgress, stage = "adapter" } = this.#client.options;
    // All are reported before the first is asked for, so that a listener knows how much there is.
    const waiting = missing.map((path) => {
      const tell = onProgress && teller(this.nameOf(path), stage, onProgress);
      tell?.("initiate", 0, this.#find(path)?.size ?? 0);
      return { path, tell };
    });
    const { signal, onBytes } = options;
    const stop = new AbortController();
    const all = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
    const failures: unknown[] = [];
    const work = async (): Promise<void> => {
      for (let next = waiting.shift(); next && failures.length === 0; next = waiting.shift())
        await this.#download(next.path, { signal: all, onBytes }, next.tell).catch((error: unknown) => {
          failures.push(error);
          stop.abort();
        });
    };
    await Promise.all(Array.from({ length: AT_A_TIME }, work));
    if (failures.length > 0) throw failures[0];
    return paths.map((path) => this.#place(path));
  }

  /** Opens a file for reads of parts, without downloading it as a whole. @throws SourceError as `get` */
  async open(path: string): Promise<ByteSource> {
    const here = await this.#here(path);
    return here === undefined ? this.#remote(path) : openDisk(here, this.nameOf(path));
  }

  /** Opens a file that the first read downloads, where it is missing. @throws SourceError as `get` */
  async openWhole(path: string): Promise<ByteSource> {
    const name = this.nameOf(path);
    const here = await this.#here(path);
    if (here !== undefined) return openDisk(here, name);
    if (isOffline()) throw new SourceError(OFFLINE, { file: name });
    const download = async (options: ReadOptions): Promise<ByteSource> => {
      const [place] = await this.get([path], options);
      throwIfAborted(options.signal);
      return openDisk(place!, name);
    };
    let coming: SharedWork<ByteSource> | undefined;
    return {
      name,
      byteLength: this.#find(path)!.size,
      async read(offset, length, { signal, onBytes } = {}) {
        if (!coming || coming.stopped) coming = new SharedWork((stop) => download({ signal: stop, onBytes }), signal);
        return (await coming.wait(signal)).read(offset, length, { signal });
      },
      async close() {
        await coming?.wait(undefined).then(
          (disk) => disk.close?.(),
          () => undefined,
        );
      },
    };
  }

  #place(path: string): string {
    return join(this.folder, ...path.split("/"));
  }

  /** The path of a file that is on the disk, whole. */
  async #here(path: string): Promise<string | undefined> {
    const file = this.#find(path);
    return (await isWhole(this.#place(path), file)) ? this.#place(path) : undefined;
  }

  /** @throws SourceError when the Hub must not be asked */
  #remote(path: string): UrlSource {
    if (!isOffline()) return this.#client.open(path, this.#commit);
    throw new SourceError(OFFLINE, { file: this.nameOf(path) });
  }

  /** @throws SourceError when it cannot be had or written, or is not what was promised */
  async #download(path: string, how: ReadOptions, tell: ReturnType<typeof teller> | undefined): Promise<void> {
    const source = this.#remote(path);
    const file = this.#find(path)!;
    let before = 0;
    const onBytes = (loaded: number): void => {
      how.onBytes?.(loaded - before);
      before = loaded;
      tell?.("progress", loaded, file.size);
    };
    tell?.("download", 0, file.size);
    try {
      const blob = join(this.#cache, "blobs", file.hash);
      await written(blob, () => mkdir(dirname(blob), { recursive: true }));
      if (!(await isWhole(blob, file))) await receive(blob, file, source, how.signal, onBytes);
      const place = this.#place(path);
      await written(place, async () => {
        await mkdir(dirname(place), { recursive: true });
        await rm(place, { force: true });
        await symlink(relative(dirname(place), blob), place).catch(async (error: NodeJS.ErrnoException) => {
          if (error.code === "EEXIST" && (await isWhole(place, file))) return;
          // Windows allows links to some users only: the file itself lies there then, as Python puts it.
          await rename(blob, place);
        });
      });
      tell?.("done", file.size, file.size);
    } finally {
      await source.close();
    }
  }

  #find(path: string): HubFile | undefined {
    if (this.files.has(path)) return this.files.get(path);
    const close = nearest(path, this.files.keys());
    const all = [...this.files.keys()];
    const more = all.length > 8 ? ` and ${all.length - 8} more` : "";
    const has = all.length === 0 ? "none" : `${all.slice(0, 8).join(", ")}${more}`;
    const listed = close.length > 0 ? `the nearest are ${close.join(", ")}` : `it has ${has}`;
    const problem = path === "" ? "names a repository, and a file of it is needed" : "there is no such file";
    throw new SourceError(`${problem}; ${listed}`, { file: this.nameOf(path) });
  }
}

/** Requests to the Hub about one repository. */
class HubClient {
  readonly name: HubName;
  readonly options: SnapshotOptions;
  readonly #endpoint = hubEndpoint();
  #token: Promise<string | undefined> | undefined;

  constructor(name: HubName, options: SnapshotOptions) {
    this.name = name;
    this.options = options;
  }

  /** @throws SourceError when it is not shown, or another server answers */
  async listing(): Promise<{ commit: string; tree: ReadonlyMap<string, TreeEntry> }> {
    const { repository, revision } = this.name;
    const address = `${this.#endpoint}/api/models/${repository}/revision/${encodeURIComponent(revision)}?blobs=true`;
    const source = this.#source(new URL(address));
    const bytes = await source.readAll({ signal: this.options.signal, most: () => MOST_LISTING });
    if (bytes.length > MOST_LISTING) {
      const message = `lists more files than fit into ${MOST_LISTING} bytes; download what you need, and give its folder`;
      throw new SourceError(message, { file: source.name });
    }
    try {
      const { sha, siblings } = JSON.parse(fromUtf8(bytes)) as Listing;
      if (typeof sha !== "string" || !COMMIT.test(sha)) throw new TypeError(`"sha" is ${sha}`);
      const tree = new Map(
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

  open(path: string, commit: string): UrlSource {
    return this.#source(hubUrl(this.#endpoint, { ...this.name, revision: commit, path }));
  }

  #source(address: URL): UrlSource {
    const { headers: _, ...options } = this.options;
    return new UrlSource(address, { ...options, fetch: (url, init) => this.#ask(url, init) });
  }

  /** Asks, and follows redirects itself: files lie on servers of others, and they must not see the token. */
  async #ask(address: string, init: RequestInit): Promise<Response> {
    const { fetch: ask = (url, how) => fetch(url, how) } = this.options;
    const hop = async (url: URL, own: boolean): Promise<Response> => {
      const headers = own ? await this.#headers(init.headers) : init.headers!;
      const response = await ask(url.href, { ...init, headers, redirect: "manual" });
      if (own) await this.#refuse(response, address.includes("/resolve/"));
      return response;
    };
    return follow(new URL(address), hop, (message) => {
      throw new SourceError(`${message}; check HF_ENDPOINT`, { file: hubText(this.name) });
    });
  }

  /** Adds what only the Hub may see: HF_TOKEN, or the token that `hf auth login` has kept. */
  async #headers(given?: HeadersInit): Promise<Headers> {
    const headers = new Headers(given);
    for (const [name, value] of Object.entries(this.options.headers ?? {})) headers.set(name, value);
    this.#token ??= tokenOf();
    const token = await this.#token;
    if (token !== undefined && !headers.has("authorization")) headers.set("authorization", `Bearer ${token}`);
    return headers;
  }

  /** @param file whether a file was asked for: its repository is known then @throws SourceError for what the Hub refuses */
  async #refuse({ status, headers }: Response, file: boolean): Promise<void> {
    if (![401, 403, 404].includes(status)) return;
    const { repository, revision } = this.name;
    const token = (await this.#headers()).has("authorization");
    const code = headers.get("x-error-code");
    const said = headers.get("x-error-message");
    const refuse = (message: string): never => {
      throw new SourceError(`${message} (status ${status})`, { file: hubText({ ...this.name, path: "" }), status });
    };
    if (/invalid (credentials|user token|username)/i.test(said ?? ""))
      refuse(`the Hub does not know the token that was sent; make another at ${this.#endpoint}/settings/tokens`);
    if (code === "RevisionNotFound") refuse(`has no revision "${revision}"; check the branch, tag or commit`);
    if (code === "GatedRepo" || (file && status !== 404)) {
      const who = token ? "the account that HF_TOKEN is of" : "your account, and set HF_TOKEN to its token";
      refuse(`is gated: accept its licence at ${this.#endpoint}/${repository} with ${who}`);
    }
    if (status === 403) refuse(`the token that was sent may not read it${said === null ? "" : `: ${said}`}`);
    const hint = token ? "check that the token may see it" : "set HF_TOKEN if it is private";
    if (!file) refuse(`the Hub has no such repository, or does not show it: check the name, and ${hint}`);
  }
}

/** What the Hub says of a repository, as far as it is used. */
interface Listing {
  readonly sha: string;
  readonly siblings: readonly {
    readonly rfilename: string;
    readonly size: number;
    readonly blobId: string;
    readonly lfs?: { readonly sha256: string; readonly size: number } | null;
  }[];
}

async function tokenOf(): Promise<string | undefined> {
  const { HF_TOKEN, HF_TOKEN_PATH } = process.env;
  const kept = HF_TOKEN?.trim() || (await readFile(HF_TOKEN_PATH || join(hubHome(), "token"), "utf8").catch(() => ""));
  return kept.trim() || undefined;
}

function isOffline(): boolean {
  const { HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE } = process.env;
  return /^(1|on|yes|true)$/i.test(HF_HUB_OFFLINE || TRANSFORMERS_OFFLINE || "");
}

/** Files that another program has downloaded, which left no listing. */
async function filesIn(folder: string): Promise<Map<string, undefined>> {
  const found = await readdir(folder, { recursive: true, withFileTypes: true }).catch(() => []);
  const files = found.filter((entry) => !entry.isDirectory());
  const base = folder.length + 1;
  return new Map(
    files.map(({ parentPath, name }) => [join(parentPath, name).slice(base).split(sep).join("/"), undefined]),
  );
}

// The cache of the Hugging Face Hub on this disk, in the layout of Python's huggingface_hub, so that each finds what the other has
// downloaded:
// models--org--name/refs/main           the commit that a branch was at when it was last asked for
// trees/COMMIT.json   names, sizes and hashes of a commit's files
// blobs/HASH          contents, by SHA-256 where Git LFS keeps them, else by Git's own hash
// snapshots/COMMIT/…  the files of a commit: links to blobs
// It needs no locks. A blob gets its name when its hash is right; before that several writers put the same bytes in the same places.

/** What the Hub promises of a file. */
interface HubFile {
  /** Size in bytes. */
  readonly size: number;
  /** Hexadecimal digits: the 64 of SHA-256, or the 40 of Git's hash of a blob. */
  readonly hash: string;
}

/** Files of a commit, by path. */
type HubFiles = ReadonlyMap<string, HubFile>;

/** A full commit hash, which names one state for ever. */
const COMMIT: RegExp = /^[0-9a-f]{40}$/;

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
function hubHome(): string {
  const cache = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache");
  return absolute(process.env["HF_HOME"] || join(cache, "huggingface"));
}

/** The cache of one repository. */
function cacheOf(repository: string): string {
  const { HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE } = process.env;
  const cache = absolute(HF_HUB_CACHE || HUGGINGFACE_HUB_CACHE || join(hubHome(), "hub"));
  return join(cache, `models--${repository.replace("/", "--")}`);
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
async function listed(cache: string, commit: string): Promise<HubFiles | undefined> {
  try {
    const { format_version, files } = JSON.parse(await readFile(treeOf(cache, commit), "utf8"));
    return format_version === 1 ? filesOf(Object.entries(files)) : undefined;
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

/** What huggingface_hub keeps of a file in `trees/COMMIT.json`. */
interface TreeEntry {
  readonly size: number;
  readonly blob_id: string;
  readonly lfs_sha256?: string;
  readonly lfs_size?: number;
}

/** @throws TypeError when a name or promise is none */
function filesOf(entries: Iterable<readonly [path: string, entry: TreeEntry]>): HubFiles {
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

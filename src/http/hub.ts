/**
 * Files of repositories of the Hugging Face Hub, for Node, Deno and Bun: listed once, so that all are of one commit, and downloaded into
 * the Hub's own cache (`hub-cache.ts`) when they are needed.
 *
 * It speaks the plain protocol: a listing with sizes and hashes, and an address for each file, read as any other address is. The package
 * @huggingface/hub would cost more than it adds: it begins again when a download breaks off, checks no hash, and puts the files of one
 * revision below several commits.
 */

import { readdir, readFile } from "node:fs/promises";
import { join, sep } from "node:path";
import { nearest } from "../arguments.ts";
import { openDisk } from "../disk.ts";
import { SourceError } from "../errors.ts";
import { throwIfAborted } from "../pace.ts";
import { type FileProgress, type OnProgress, teller } from "../progress.ts";
import { type AbortOptions, type ByteSource, type FetchOptions, type ReadOptions, SharedWork } from "../source.ts";
import { fromUtf8 } from "../text.ts";
import { COMMIT, filesOf, HubCache, type HubFile, type HubFiles, hubHome, type TreeEntry } from "./hub-cache.ts";
import { type HubName, hubEndpoint, hubName, hubText, hubUrl } from "./hub-name.ts";
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
 * Opens a file of a repository for ranged reads, from the cache. The first read downloads what is not there, and tells `onBytes` of it.
 * @throws TypeError for a name that is not well formed
 * @throws SourceError when there is no such file, or it may not be read; from a read when it is not what the Hub promises
 */
export async function openHub(text: string, options: FetchOptions & AbortOptions = {}): Promise<ByteSource> {
  const name = hubName(text)!;
  // What is asked to be told of a pack or model is told of its reads.
  const snapshot = await openSnapshot(name, { ...options, onProgress: undefined });
  return snapshot.openWhole(name.path);
}

/**
 * Finds out which commit a revision is and which files that has. A commit that was listed before costs no request.
 * @throws SourceError when the Hub has no such repository or revision, or does not show it
 */
export async function openSnapshot(name: HubName, options: SnapshotOptions = {}): Promise<Snapshot> {
  const { repository, revision } = name;
  const cache = new HubCache(repository);
  const known = await cache.commitOf(revision);
  const offline = isOffline();
  const client = new HubClient(name, options);
  if (known !== undefined && (offline || known === revision)) {
    const files = (await cache.files(known)) ?? (offline ? await filesIn(cache.snapshot(known)) : undefined);
    if (files) return new Snapshot(client, cache, known, files);
  }
  if (offline) throw new SourceError(OFFLINE, { file: hubText({ ...name, path: "" }) });
  const { commit, tree, files } = await client.listing().catch((error: unknown) => {
    // No answer means the network; what is here can be used knowingly.
    if (!(error instanceof SourceError) || error.status !== undefined || known === undefined) throw error;
    const message = `${error.message.slice(error.file.length + 2)}. What is in the cache is taken with HF_HUB_OFFLINE=1`;
    const { file, transient = false } = error;
    throw new SourceError(message, { file, transient, cause: error });
  });
  await cache.keep(revision, commit, tree);
  return new Snapshot(client, cache, commit, files);
}

/** The files of a repository at one commit. */
export class Snapshot {
  /** Folder in the cache in which its files lie once they are downloaded. */
  readonly folder: string;
  /** Files by path; undefined for what only the cache knows, without the Hub. */
  readonly files: ReadonlyMap<string, HubFile | undefined>;
  readonly #client: HubClient;
  readonly #cache: HubCache;
  readonly #commit: string;

  /** @internal Use `openSnapshot`. */
  constructor(client: HubClient, cache: HubCache, commit: string, files: ReadonlyMap<string, HubFile | undefined>) {
    this.folder = cache.snapshot(commit);
    this.files = files;
    this.#client = client;
    this.#cache = cache;
    this.#commit = commit;
  }

  /** A file's or folder's name on the Hub, with the commit: whatever happens there, it stays this one. */
  nameOf(path: string): string {
    return hubText({ repository: this.#client.name.repository, revision: this.#commit, path });
  }

  /**
   * Downloads files that are not here yet.
   * @returns their paths on the disk
   * @throws SourceError when one is not in the repository, or cannot be had
   */
  async get(paths: readonly string[], options: ReadOptions = this.#client.options): Promise<string[]> {
    const here = paths.map((path) => this.#cache.find(this.#commit, path, this.#find(path)));
    const places: (string | undefined)[] = await Promise.all(here);
    const missing = [...paths.entries()].filter(([i]) => places[i] === undefined);
    const { onProgress, stage = "adapter" } = this.#client.options;
    // All are told of before the first is asked for, so that a listener knows how much there is.
    const tells = missing.map(([, path]) => onProgress && teller(this.nameOf(path), stage, onProgress));
    for (const [n, [, path]] of missing.entries()) tells[n]?.("initiate", 0, this.#find(path)?.size ?? 0);
    const { signal, onBytes } = options;
    const stop = new AbortController();
    const all = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal;
    const waiting = [...missing.entries()];
    const failures: unknown[] = [];
    const work = async (): Promise<void> => {
      for (let next = waiting.shift(); next && failures.length === 0; next = waiting.shift()) {
        const [n, [i, path]] = next;
        places[i] = await this.#get(path, { signal: all, onBytes }, tells[n]);
      }
    };
    const fail = (error: unknown): void => {
      failures.push(error);
      stop.abort();
    };
    await Promise.all(Array.from({ length: AT_A_TIME }, () => work().catch(fail)));
    if (failures.length > 0) throw failures[0];
    return places as string[];
  }

  /** Opens a file for reads of parts, without downloading it as a whole. @throws SourceError as `get` */
  async open(path: string): Promise<ByteSource> {
    const file = this.#find(path);
    const here = await this.#cache.find(this.#commit, path, file);
    return here === undefined ? this.#remote(path) : openDisk(here, this.nameOf(path));
  }

  /** Opens a file that the first read downloads, where it is not here. @throws SourceError as `get` */
  async openWhole(path: string): Promise<ByteSource> {
    const file = this.#find(path);
    const name = this.nameOf(path);
    const here = await this.#cache.find(this.#commit, path, file);
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
      byteLength: file!.size,
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

  /** @throws SourceError when the Hub must not be asked */
  #remote(path: string): UrlSource {
    if (!isOffline()) return this.#client.open(path, this.#commit);
    throw new SourceError(OFFLINE, { file: this.nameOf(path) });
  }

  async #get(path: string, how: ReadOptions, tell: ReturnType<typeof teller> | undefined): Promise<string> {
    const source = this.#remote(path);
    const file = this.#find(path)!;
    const { size } = file;
    let before = 0;
    const onBytes = (loaded: number): void => {
      how.onBytes?.(loaded - before);
      before = loaded;
      tell?.("progress", loaded, size);
    };
    tell?.("download", 0, size);
    try {
      const place = await this.#cache.put(this.#commit, path, file, source, { signal: how.signal, onBytes });
      tell?.("done", size, size);
      return place;
    } finally {
      await source.close();
    }
  }

  #find(path: string): HubFile | undefined {
    if (this.files.has(path)) return this.files.get(path);
    const close = nearest(path, this.files.keys());
    const listed = close.length > 0 ? `the nearest are ${close.join(", ")}` : `it has ${some([...this.files.keys()])}`;
    const what = path === "" ? "names a repository, and a file of it is needed" : "there is no such file";
    throw new SourceError(`${what}; ${listed}`, { file: this.nameOf(path) });
  }
}

/** "a, b, c and 4 more" */
function some(paths: readonly string[]): string {
  const more = paths.length > 8 ? ` and ${paths.length - 8} more` : "";
  return paths.length === 0 ? "none" : `${paths.slice(0, 8).join(", ")}${more}`;
}

/** What asks the Hub about one repository. */
class HubClient {
  readonly name: HubName;
  readonly options: SnapshotOptions;
  readonly #endpoint = hubEndpoint();
  #token: Promise<string | undefined> | undefined;

  constructor(name: HubName, options: SnapshotOptions) {
    this.name = name;
    this.options = options;
  }

  /** @throws SourceError when it is not shown, or what answers is not the Hub */
  async listing(): Promise<{ commit: string; tree: ReadonlyMap<string, TreeEntry>; files: HubFiles }> {
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
      const tree = new Map(siblings.map(entryOf));
      return { commit: sha, tree, files: filesOf(tree) };
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

  /** Adds what only the Hub may see. */
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

function entryOf({ rfilename, size, blobId, lfs }: Listing["siblings"][number]): [string, TreeEntry] {
  const large = lfs ? { lfs_sha256: lfs.sha256, lfs_size: lfs.size } : {};
  return [rfilename, { size, blob_id: blobId, ...large }];
}

/** HF_TOKEN, or what `hf auth login` has kept. */
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

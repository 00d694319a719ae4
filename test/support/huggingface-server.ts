/**
 * A Hugging Face Hub on real sockets: listings, files behind redirects, and a second origin with what Git LFS keeps. It
 * answers as huggingface.co does, with its headers and codes of errors; what is wrong with it is asked for.
 */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import type { Test } from "tap";
import { folderFor } from "./folder.ts";

/** Files of a commit, by path. */
export type Files = ReadonlyMap<string, Uint8Array>;

/** A repository. Its newest commit is that of `main`. */
export interface Repository {
  /** Commits by hash. */
  readonly commits: Map<string, Files>;
  /** Hashes by branch or tag. */
  readonly refs: Map<string, string>;
  /** Who may see it, or download from it. Default: everybody. */
  access?: "private" | "gated";
}

/** A request, and who got it. */
export interface Asked {
  readonly origin: "hub" | "storage";
  readonly method: string;
  /** Path, decoded. */
  readonly path: string;
  readonly range: string | undefined;
  readonly authorization: string | undefined;
}

export interface Hub {
  readonly endpoint: string;
  readonly repositories: Map<string, Repository>;
  /** Requests so far; emptied by `take`. */
  readonly asked: Asked[];
  take(): Asked[];
  /** The token that opens what is private or gated. */
  readonly token: string;
  /** Bytes that the storage still sends before it breaks off. Default: all. */
  budget: number;
  /** Answer of the storage in place of a file. */
  instead: ((path: string, bytes: Uint8Array) => Uint8Array) | undefined;
  /** Called before a file is given. */
  onFile: (() => void) | undefined;
  /** Changes a listing before it is sent. */
  listing: ((json: { sha: string; siblings: object[] }) => unknown) | undefined;
  /** Adds a commit and lets `main`, or another branch, point to it. @returns its hash */
  push(name: string, files: Files, branch?: string): string;
}

const SETTINGS = ["HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"] as const;

/** A Hub and an empty cache, which this process uses until the test ends. */
export async function hubFor(t: Test): Promise<{ hub: Hub; home: string }> {
  const before = SETTINGS.map((name) => [name, process.env[name]] as const);
  const home = folderFor(t);
  const hub = await startHub(t);
  for (const name of SETTINGS) delete process.env[name];
  Object.assign(process.env, { HF_ENDPOINT: hub.endpoint, HF_HOME: home });
  t.teardown(() => {
    for (const [name, value] of before) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  });
  return { hub, home };
}

/** All files below a folder. @param prefix of their paths */
export function filesBelow(folder: string, prefix = ""): Files {
  const files = new Map<string, Uint8Array>();
  for (const path of readdirSync(folder, { recursive: true, encoding: "utf8" }))
    if (statSync(join(folder, path)).isFile()) files.set(`${prefix}${path}`, readFileSync(join(folder, path)));
  return files;
}

/** Files that Git LFS keeps; the others lie in the repository. */
const LARGE = /\.(safetensors|onnx|onnx_data|data|bin|eigen|gguf|h5)$/;

async function startHub(t: Test): Promise<Hub> {
  const repositories = new Map<string, Repository>();
  const asked: Asked[] = [];
  let [hub, storage] = ["", ""];
  const handle: Hub = {
    get endpoint() {
      return hub;
    },
    repositories,
    asked,
    take: () => asked.splice(0),
    token: "hf_test",
    budget: Infinity,
    instead: undefined,
    onFile: undefined,
    listing: undefined,
    push(name, files, branch = "main") {
      const repository = repositories.get(name) ?? { commits: new Map(), refs: new Map() };
      repositories.set(name, repository);
      const content = [...files].map(([path, bytes]) => `${path} ${sha1(bytes)}`).join("\n");
      const commit = createHash("sha1").update(`${name} ${repository.commits.size}\n${content}`).digest("hex");
      repository.commits.set(commit, files);
      repository.refs.set(branch, commit);
      return commit;
    },
  };
  const note = (origin: Asked["origin"], { method = "", url = "", headers }: IncomingMessage): string => {
    const path = decodeURIComponent(new URL(url, "http://host").pathname);
    asked.push({ origin, method, path, range: headers.range, authorization: headers.authorization });
    return path;
  };
  hub = await listen(t, (request, response) => answer(handle, storage, note("hub", request), request, response));
  storage = await listen(t, (request, response) => {
    const path = note("storage", request);
    // A signed address needs no token: it names repository, commit and file.
    const [, name, commit, file] = /^\/signed\/([^/]+\/[^/]+)\/([^/]+)\/(.*)$/.exec(path)!;
    const bytes = repositories.get(name!)!.commits.get(commit!)!.get(file!)!;
    const sent = handle.instead?.(file!, bytes) ?? bytes;
    handle.budget -= send(request, response, sent, { etag: `"${sha256(bytes)}"` }, Math.max(0, handle.budget));
  });
  return handle;
}

async function listen(t: Test, serve: (request: IncomingMessage, response: ServerResponse) => void): Promise<string> {
  const server: Server = createServer(serve);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.teardown(() => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

function answer(hub: Hub, storage: string, path: string, request: IncomingMessage, response: ServerResponse): void {
  const [, api, name = "", route, rest = ""] =
    /^(\/api(?:\/resolve-cache)?\/models)?\/([^/]+\/[^/]+)(?:\/(revision|tree|resolve|[0-9a-f]{40})(?:\/(.*))?)?$/.exec(
      path,
    ) ?? [];
  const repository = hub.repositories.get(name);
  const known = request.headers.authorization === `Bearer ${hub.token}`;
  const refuse = (status: number, code: string, message = code): void =>
    void response.writeHead(status, { "x-error-code": code, "x-error-message": message }).end(message);
  if (request.headers.authorization !== undefined && !known)
    return refuse(401, "", "Invalid credentials in Authorization header");
  if (!repository || (repository.access === "private" && !known))
    return refuse(known ? 404 : 401, "RepoNotFound", "Repository not found");
  if (route === "resolve" || /^[0-9a-f]{40}$/.test(route ?? "")) {
    const [revision, ...parts] = api ? [route!, ...rest.split("/")] : rest.split("/");
    const commit = repository.refs.get(revision!) ?? revision!;
    const bytes = repository.commits.get(commit)?.get(parts.join("/"));
    if (repository.access === "gated" && !known) return refuse(401, "GatedRepo", "Access to model is restricted");
    if (!bytes) return refuse(404, repository.commits.has(commit) ? "EntryNotFound" : "RevisionNotFound");
    hub.onFile?.();
    return file({ name, commit, path: parts.join("/"), bytes, storage, final: api !== undefined }, request, response);
  }
  const revision = decodeURIComponent(rest) || "main";
  const commit = repository.refs.get(revision) ?? revision;
  const files = repository.commits.get(commit);
  if (!files) return refuse(404, "RevisionNotFound", `Invalid rev id: ${revision}`);
  const json = route === "tree" ? treeOf(files) : listingOf(name, commit, files);
  const changed = route === "tree" ? json : (hub.listing?.(json as never) ?? json);
  response.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(changed));
}

interface Found {
  readonly name: string;
  readonly commit: string;
  readonly path: string;
  readonly bytes: Uint8Array;
  readonly storage: string;
  /** True if a redirect has led to this address. */
  readonly final: boolean;
}

function file(
  { name, commit, path, bytes, storage, final }: Found,
  request: IncomingMessage,
  response: ServerResponse,
) {
  const parts = path.split("/").map(encodeURIComponent).join("/");
  const own = { "x-repo-commit": commit, etag: `"${gitHash(bytes)}"` };
  if (final) return void send(request, response, bytes, own);
  const large = {
    ...own,
    "x-linked-etag": `"${sha256(bytes)}"`,
    "x-linked-size": bytes.length,
    location: `${storage}/signed/${name}/${commit}/${parts}?Signature=secret`,
  };
  if (LARGE.test(path)) return void response.writeHead(302, large).end("Found");
  response.writeHead(307, { ...own, location: `/api/resolve-cache/models/${name}/${commit}/${parts}` }).end();
}

/**
 * Sends what is asked for of a file, as a server with ranges.
 * @param most bytes before the connection breaks
 * @returns the bytes asked for
 */
function send(
  { method, headers }: IncomingMessage,
  response: ServerResponse,
  bytes: Uint8Array,
  own: Record<string, string>,
  most = Infinity,
): number {
  const [, from, to] = /^bytes=(\d+)-(\d*)$/.exec(headers.range ?? "") ?? [];
  const start = Number(from ?? 0);
  const part = bytes.subarray(start, to ? Number(to) + 1 : bytes.length);
  const range = { "content-range": `bytes ${start}-${start + part.length - 1}/${bytes.length}` };
  const all = { ...own, "accept-ranges": "bytes", "content-length": part.length };
  response.writeHead(from === undefined ? 200 : 206, from === undefined ? all : { ...all, ...range });
  if (method === "HEAD") response.end();
  else if (part.length <= most) response.end(part);
  else response.write(part.subarray(0, most), () => response.destroy());
  return part.length;
}

function listingOf(name: string, sha: string, files: Files) {
  const siblings = [...files].map(([rfilename, bytes]) => ({
    rfilename,
    blobId: gitHash(bytes),
    size: bytes.length,
    ...(LARGE.test(rfilename) && { lfs: { sha256: sha256(bytes), size: bytes.length, pointerSize: 134 } }),
  }));
  return { id: name, modelId: name, sha, private: false, gated: false, siblings };
}

/** The listing that Python asks for. */
function treeOf(files: Files): object[] {
  return [...files].map(([path, bytes]) => ({
    type: "file",
    path,
    oid: gitHash(bytes),
    size: bytes.length,
    ...(LARGE.test(path) && { lfs: { oid: sha256(bytes), size: bytes.length, pointerSize: 134 } }),
  }));
}

export const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");
const sha1 = (bytes: Uint8Array): string => createHash("sha1").update(bytes).digest("hex");
/** Git's name of a blob. */
export const gitHash = (bytes: Uint8Array): string =>
  createHash("sha1").update(`blob ${bytes.length}\0`).update(bytes).digest("hex");

/** The command view: shows in a browser what packs, task files and adapters hold. */
import { spawn } from "node:child_process";
import { readFile, stat } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { basename, join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { type AdapterLocation, CONFIG, findAdapters, TASK } from "../adapters/folder.ts";
import { kind } from "../adapters/tree.ts";
import { readTaskFile } from "../core/task-file.ts";
import { reasonOf } from "../disk.ts";
import { AdapterError } from "../errors.ts";
import { openSource } from "../open-source.ts";
import type { ByteSource } from "../source.ts";
import { type Attach, command, downloading, type Run } from "./command.ts";
import { byDefault, number, type Range, toggle, UsageError } from "./options.ts";
import type { Output } from "./output.ts";

/** The viewer, which the build makes of examples/viewer. */
const PAGE = new URL("../../viewer.html", import.meta.url);

const PORT: Range = {
  expected: "a whole number up to 65535",
  holds: (n) => Number.isSafeInteger(n) && n >= 0 && n < 65_536,
};

export const view: Attach = command({
  usage: "view <FILE> [SECOND]",
  details:
    "Task files and adapters can be shown too. The page reads of the files what you look at, from a server on this machine " +
    "that serves nothing else. Ctrl-C ends it.",
  example: "view tasks.eigen",
  options: {
    port: byDefault(0, number("N", "Port of the server; 0 takes a free one.", PORT)),
    noOpen: toggle("Print the address, and open no browser."),
  },
  reads: ["repository"],
  async run(paths: string[], { port, noOpen }, run, out) {
    const files = new Map<string, ServedFile>();
    const shown: string[] = [];
    for (const [i, path] of paths.entries()) {
      const found = await filesOf(path, run, out);
      const folder = ["/files", `${i + 1}`, ...found.folder.map(encodeURIComponent)].join("/");
      for (const [name, file] of found.files) files.set(`${folder}/${encodeURIComponent(name)}`, file);
      shown.push(`${folder}/${encodeURIComponent(found.name)}`);
    }
    const page = await readFile(PAGE);
    const served = await serveViewer(page, files, port, ({ message }) => out.warn(message)).catch((cause) => {
      throw new UsageError(`--port ${port}: ${reasonOf(cause)}; leave it out to take a free one`, { cause });
    });
    run.closing(served);
    const query = shown.map((path) => `url=${encodeURIComponent(path).replaceAll("%2F", "/")}&`);
    const url = `${served.url}?${query.join("")}only`;
    if (!noOpen) openBrowser(url);
    const ended = run.interrupts();
    return {
      json: { url, files: paths.map((path) => run.shown(path)) },
      text: [`${paths.map((path) => run.shown(path)).join(" and ")}: ${url} (Ctrl-C ends it)`],
      until: new Promise<void>((resolve) => ended.addEventListener("abort", () => resolve())),
    };
  },
});

/** What the page opens, and the files that it may read. */
interface Found {
  /** Name of the adapter's folder, where it is one. */
  readonly folder: readonly string[];
  readonly name: string;
  readonly files: ReadonlyMap<string, ServedFile>;
}

/** @throws SourceError, FormatError, AdapterError for what cannot be shown, before a browser is opened */
async function filesOf(path: string, run: Run, out: Output): Promise<Found> {
  const found = await run.kindOf(path);
  if (found === "an EigenLoRA task file") {
    await readTaskFile(path);
    return one(named(path, ".eigentask"), path, run);
  }
  if (found === "an EigenLoRA pack" || /\.eigen(task)?$/.test(path) || /^https?:/i.test(path)) {
    await (await run.pack(path, { bases: "later", maxResidentBytes: 0 })).close();
    return one(named(path, ".eigen"), path, run);
  }
  const adapters = await findAdapters([path], { onProgress: downloading(out) });
  const [adapter, second] = adapters;
  if (second || !adapter || adapter.models) {
    const all = adapters.flatMap(({ path, models }) => (models ? [...models.values()] : [{ path }]));
    const names = all.slice(0, 5).map((one) => run.shown(one.path));
    const more = all.length > names.length ? ", …" : "";
    throw new AdapterError(`holds ${all.length} adapters; name one: ${names.join(", ")}${more}`, {
      file: run.shown(path),
    });
  }
  return adapterFiles(adapter, run);
}

async function adapterFiles({ id, path, tensors }: AdapterLocation, run: Run): Promise<Found> {
  const files = new Map([[basename(tensors), served(tensors, run)]]);
  for (const name of [CONFIG, TASK])
    if ((await kind(join(path, name))) === "file") files.set(name, served(join(path, name), run));
  return { folder: [id], name: basename(tensors), files };
}

function one(name: string, path: string, run: Run): Found {
  return { folder: [], name, files: new Map([[name, served(path, run)]]) };
}

/** The name of a file as the page shows it; its ending says what it is. */
function named(path: string, ending: string): string {
  const name = basename(/^https?:/i.test(path) ? path.replace(/[?#].*/s, "") : path);
  return name.endsWith(ending) ? name : `${name}${ending}`;
}

/** A file of the disk is opened for each answer, so that a reload shows it as it is by then. */
function served(path: string, run: Run): ServedFile {
  if (/^(https?|hf):/i.test(path)) {
    let source: Promise<ByteSource> | undefined;
    return {
      open: () => (source ??= openSource(path).then((opened) => run.closing(opened))),
      release: async () => {},
      version: async () => undefined,
    };
  }
  return {
    open: () => openSource(path),
    release: async (source) => source.close?.(),
    async version() {
      const { size, mtimeMs } = await stat(path);
      return `${size.toString(36)}-${Math.round(mtimeMs).toString(36)}`;
    },
  };
}

/** Commands that open an address in the browser of one's choice. */
const OPENERS: Readonly<Record<string, readonly [string, ...string[]]>> = {
  darwin: ["open"],
  win32: ["rundll32", "url.dll,FileProtocolHandler"],
};

/** Opens the browser where there is one; the address is printed in any case. */
function openBrowser(url: string): void {
  const [command, ...args] = OPENERS[process.platform] ?? ["xdg-open"];
  spawn(command, [...args, url], { stdio: "ignore", detached: true })
    .on("error", () => undefined)
    .unref();
}

// The server of the command view: the viewer's page, and ranges of the named files, on the loopback interface alone.

/** A file as it is served. */
interface ServedFile {
  /** Opens it for one answer. */
  open(): Promise<ByteSource>;
  /** Releases what an answer has opened. */
  release(source: ByteSource): Promise<void>;
  /** Tells this version of the file from others; undefined where nothing does. */
  version(): Promise<string | undefined>;
}

/** The page may talk to this server, and to nobody else. */
const POLICY = "connect-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'";

/** Bytes that are read and sent at a time. */
const PIECE = 2 ** 20;

/** What to send. */
interface Reply {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | number>>;
  /** Bytes [start, end) of the file. */
  readonly range?: readonly [start: number, end: number];
}

/**
 * @param page the viewer
 * @param files by path, "/files/1/tasks.eigen"
 * @param port 0 takes a free one
 * @param onError told what went wrong with an answer
 * @returns its address, with a slash at the end
 * @throws Error when the port is taken
 */
async function serveViewer(
  page: Uint8Array,
  files: ReadonlyMap<string, ServedFile>,
  port: number,
  onError: (error: Error) => void,
): Promise<{ url: string; close(): Promise<void> }> {
  const server = createServer((request, response) => {
    answer(page, files, request, response).catch((error: Error) => {
      if (response.headersSent) response.destroy();
      else response.writeHead(502).end();
      // A visitor who leaves during an answer is no error.
      if ((error as NodeJS.ErrnoException).code !== "ERR_STREAM_PREMATURE_CLOSE") onError(error);
    });
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject).listen(port, "127.0.0.1", resolve);
  });
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    close: () => {
      server.closeAllConnections();
      return new Promise((resolve) => void server.close(() => resolve()));
    },
  };
}

/** Names of this machine. A page of another site reaches the server only by a name of its own, which it has pointed here. */
const HOST = /^(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$/;

async function answer(
  page: Uint8Array,
  files: ReadonlyMap<string, ServedFile>,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const { method, headers } = request;
  const send = ({ status, headers }: Reply): ServerResponse => response.writeHead(status, { ...COMMON, ...headers });
  if (!HOST.test(headers.host ?? ""))
    return void send({ status: 403, headers: {} }).end("ask for it by 127.0.0.1 or localhost");
  if (method !== "GET" && method !== "HEAD") return void send({ status: 405, headers: { allow: "GET, HEAD" } }).end();
  const path = (request.url ?? "/").replace(/\?.*/s, "");
  if (path === "/") {
    const type = { "content-type": "text/html; charset=utf-8", "content-length": page.length };
    return void send({ status: 200, headers: type }).end(method === "HEAD" ? undefined : page);
  }
  const file = files.get(path);
  if (!file) return void send({ status: 404, headers: {} }).end();
  const source = await file.open();
  try {
    // The size of what lies behind an address is known after a first read.
    if (source.byteLength === undefined) await source.read(0, 1);
    const reply = planReply(source.byteLength!, headers.range, await file.version());
    send(reply);
    if (!reply.range || method === "HEAD") return void response.end();
    await pipeline(Readable.from(pieces(source, reply.range)), response);
  } finally {
    await file.release(source);
  }
}

const COMMON = {
  "content-security-policy": POLICY,
  "cache-control": "no-store",
  "x-content-type-options": "nosniff",
  "cross-origin-resource-policy": "same-origin",
  "referrer-policy": "no-referrer",
};

/** Answers by RFC 9110: 206 for a range, 416 for one beyond the end, else 200. */
function planReply(size: number, asked = "", version?: string): Reply {
  const headers = {
    "content-type": "application/octet-stream",
    "accept-ranges": "bytes",
    ...(version !== undefined && { etag: `"${version}"` }),
  };
  const [, first = "", last = ""] = /^bytes=(\d*)-(\d*)$/.exec(asked) ?? [];
  if (first === "" && last === "")
    return { status: 200, headers: { ...headers, "content-length": size }, range: [0, size] };
  const start = first === "" ? Math.max(0, size - Number(last)) : Number(first);
  const end = first === "" || last === "" ? size : Math.min(Number(last) + 1, size);
  if (start >= end) return { status: 416, headers: { ...headers, "content-range": `bytes */${size}` } };
  return {
    status: 206,
    headers: { ...headers, "content-range": `bytes ${start}-${end - 1}/${size}`, "content-length": end - start },
    range: [start, end],
  };
}

async function* pieces(source: ByteSource, [start, end]: readonly [number, number]): AsyncGenerator<Uint8Array> {
  for (let at = start; at < end; at += PIECE) yield source.read(at, Math.min(PIECE, end - at));
}

/** The command view: shows in a browser what packs, task files and adapters hold. */
import { spawn } from "node:child_process";
import { readFile, stat } from "node:fs/promises";
import { createServer, type IncomingMessage, type OutgoingHttpHeaders, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { basename, join } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { findAdapters } from "../adapters/folder.ts";
import { CONFIG, TASK } from "../adapters/formats.ts";
import { kind } from "../adapters/tree.ts";
import { readTaskFile } from "../core/read-task-file.ts";
import { AdapterError } from "../errors.ts";
import { reasonOf } from "../files-node.ts";
import { openSource } from "../open-source.ts";
import type { ByteSource } from "../source.ts";
import { type Attach, command, downloading, type Run } from "./command.ts";
import { byDefault, number, type Range, toggle, UsageError } from "./options.ts";
import type { Output } from "./output.ts";

/** The viewer, which the build makes of examples/viewer. */
const PAGE = new URL("../../viewer.html", import.meta.url);

const PORT: Range = {
  expected: "a whole number from 0 to 65535",
  holds: (n) => Number.isInteger(n) && n >= 0 && n < 2 ** 16,
};

export const view: Attach = command({
  usage: "view <FILE> [SECOND]",
  details:
    "Task files and adapters can be shown too. The page reads the parts of the files that you look at, from a server on this machine " +
    "that serves nothing else. Ctrl-C ends it.",
  example: "view tasks.eigen",
  options: {
    port: byDefault(0, number("N", "Port of the server; 0 takes a free one.", PORT)),
    noOpen: toggle("Print the address, and open no browser."),
  },
  reads: ["repository"],
  async run(paths: string[], { port, noOpen }, run, out) {
    const files = new Map<string, string>();
    const shown: string[] = [];
    for (const [i, path] of paths.entries()) {
      const { folder = [], names } = await namesOf(path, run, out);
      const place = ["/files", `${i + 1}`, ...folder.map(encodeURIComponent)].join("/");
      for (const [name, file] of names) files.set(`${place}/${encodeURIComponent(name)}`, file);
      shown.push(`${place}/${encodeURIComponent(names[0]![0])}`);
    }
    const page = await readFile(PAGE);
    const server = await serveViewer(page, files, port, ({ message }) => out.warn(message)).catch((cause) => {
      throw new UsageError(`--port ${port}: ${reasonOf(cause)}; leave it out to take a free one`, { cause });
    });
    run.closing(server);
    const query = shown.map((path) => `url=${encodeURIComponent(path).replaceAll("%2F", "/")}&`);
    const url = `${server.url}?${query.join("")}only`;
    if (!noOpen) openBrowser(url);
    const ended = run.interrupts();
    return {
      json: { url, files: paths.map((path) => run.shown(path)) },
      text: [`${paths.map((path) => run.shown(path)).join(" and ")}: ${url} (Ctrl-C ends it)`],
      until: new Promise<void>((resolve) => ended.addEventListener("abort", () => resolve())),
    };
  },
});

/**
 * Paths of the files that the page may read, by name; the first is opened. An adapter has the name of its folder.
 * @throws SourceError, FormatError, AdapterError for what cannot be shown, before a browser is opened
 */
async function namesOf(
  path: string,
  run: Run,
  out: Output,
): Promise<{ folder?: string[]; names: [name: string, path: string][] }> {
  const kindOfFile = await run.kindOf(path);
  const isTask = kindOfFile === "an EigenLoRA task file";
  if (isTask || kindOfFile === "an EigenLoRA pack" || /\.eigen(task)?$/.test(path) || /^https?:/i.test(path)) {
    if (isTask) await readTaskFile(path);
    const pack = isTask ? undefined : await run.pack(path, { bases: "later", maxResidentBytes: 0 });
    // The page knows a file by its ending.
    const ending = isTask ? ".eigentask" : ".eigen";
    const isAddress = /^https?:/i.test(path);
    const name = basename(isAddress ? path.replace(/[?#].*/s, "") : path);
    // A pack on the Hub has its commit in its name.
    return { names: [[name.endsWith(ending) ? name : `${name}${ending}`, isAddress ? path : (pack?.name ?? path)]] };
  }
  const adapters = await findAdapters([path], { onProgress: downloading(out) });
  const [adapter] = adapters;
  if (!adapter || adapters.length > 1 || adapter.models) {
    const all = adapters.flatMap(({ path, models }) => (models ? [...models.values()] : [{ path }]));
    const names = all.map(({ path }) => path).slice(0, 5);
    throw new AdapterError(`holds ${all.length} adapters; name one: ${names.join(", ")}`, { file: path });
  }
  const names: [string, string][] = [[basename(adapter.tensors), adapter.tensors]];
  for (const name of [CONFIG, TASK])
    if ((await kind(join(adapter.path, name))) === "file") names.push([name, join(adapter.path, name)]);
  return { folder: [adapter.id], names };
}

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

/** The page may talk to this server, and to nobody else. */
const POLICY = "connect-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'";

const PIECE = 2 ** 20;

/**
 * @param page the viewer
 * @param files paths or addresses by the path that the page asks for, "/files/1/tasks.eigen"
 * @param port 0 takes a free one
 * @param onError called for an answer that failed
 * @returns its address, with a slash at the end
 * @throws Error when the port is taken
 */
async function serveViewer(
  page: Uint8Array,
  files: ReadonlyMap<string, string>,
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

/** Names of this machine. A page of another site reaches the server only by a name that the site has pointed here. */
const HOST = /^(127\.0\.0\.1|localhost|\[::1\])(:\d+)?$/;

async function answer(
  page: Uint8Array,
  files: ReadonlyMap<string, string>,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const { method, headers } = request;
  const send = (status: number, more: OutgoingHttpHeaders = {}): ServerResponse =>
    response.writeHead(status, { ...COMMON, ...more });
  if (!HOST.test(headers.host ?? "")) return void send(403).end("ask for it by 127.0.0.1 or localhost");
  if (method !== "GET" && method !== "HEAD") return void send(405, { allow: "GET, HEAD" }).end();
  const path = (request.url ?? "/").replace(/\?.*/s, "");
  if (path === "/") {
    const type = { "content-type": "text/html; charset=utf-8", "content-length": page.length };
    return void send(200, type).end(method === "HEAD" ? undefined : page);
  }
  const file = files.get(path);
  if (file === undefined) return void send(404).end();
  // Opened for each answer, so that a reload shows the current content.
  const source = await openSource(file);
  try {
    // The size of what lies behind an address is known after a first read.
    if (source.byteLength === undefined) await source.read(0, 1);
    const size = source.byteLength!;
    const entry = await stat(file).catch(() => undefined);
    const about = {
      "content-type": "application/octet-stream",
      "accept-ranges": "bytes",
      ...(entry && { etag: `"${entry.size.toString(36)}-${Math.round(entry.mtimeMs).toString(36)}"` }),
    };
    // RFC 9110: 206 for a range, 416 for one beyond the end, else 200.
    const [, first, last = ""] = /^bytes=(\d+)-(\d*)$/.exec(headers.range ?? "") ?? [];
    const start = Number(first ?? 0);
    const end = last === "" ? size : Math.min(Number(last) + 1, size);
    if (first !== undefined && start >= end)
      return void send(416, { ...about, "content-range": `bytes */${size}` }).end();
    const range = first === undefined ? {} : { "content-range": `bytes ${start}-${end - 1}/${size}` };
    send(first === undefined ? 200 : 206, { ...about, ...range, "content-length": end - start });
    if (method === "HEAD") return void response.end();
    await pipeline(Readable.from(pieces(source, start, end)), response);
  } finally {
    await source.close?.();
  }
}

const COMMON = {
  "content-security-policy": POLICY,
  "cache-control": "no-store",
  "x-content-type-options": "nosniff",
  "cross-origin-resource-policy": "same-origin",
  "referrer-policy": "no-referrer",
};

async function* pieces(source: ByteSource, start: number, end: number): AsyncGenerator<Uint8Array> {
  for (let at = start; at < end; at += PIECE) yield source.read(at, Math.min(PIECE, end - at));
}

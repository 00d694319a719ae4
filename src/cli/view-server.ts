/**
 * The server of the command view: the viewer's page, and ranges of the named files, on the loopback interface alone.
 */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { ByteSource } from "../source.ts";

/** A file as it is served. */
export interface ServedFile {
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
export async function serveViewer(
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

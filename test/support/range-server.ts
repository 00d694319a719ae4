/**
 * A correct HTTP/1.1 range server over files in memory, slow or broken on demand; http.test.ts has servers that lie.
 * Real sockets, real `fetch`.
 */
import { createServer, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** Departure of an answer from the protocol. */
export type Fault = "cut" | "slow" | "stall";

export interface RangeServer {
  url(path: string): string;
  /** [start, end) of every range asked for. */
  readonly ranges: [number, number][];
  readonly methods: string[];
  /** ETag; undefined: none is sent. */
  etag: string | undefined;
  /** Headers of ranges, in addition. */
  headers: Record<string, string>;
  /** A method to answer with 403. */
  refuse: string | undefined;
  /** Faults of the next answers, first one first; undefined entries are correct answers. */
  faults: (Fault | undefined)[];
  close(): Promise<void>;
}

export async function serve(files: Map<string, Uint8Array>): Promise<RangeServer> {
  const ranges: [number, number][] = [];
  const handle: RangeServer = {
    url: (path) => `http://127.0.0.1:${(server.address() as AddressInfo).port}/${path}`,
    ranges,
    methods: [],
    etag: '"first"',
    headers: {},
    refuse: undefined,
    faults: [],
    close: () =>
      new Promise((resolve) => {
        server.closeAllConnections();
        server.close(() => resolve());
      }),
  };
  const server: Server = createServer((request, response) => {
    const { method = "GET", url = "" } = request;
    const path = new URL(url, "http://host").pathname;
    const bytes = files.get(path.slice(1));
    handle.methods.push(method);
    if (method === handle.refuse) return void response.writeHead(403).end();
    const etag: Record<string, string> = handle.etag === undefined ? {} : { etag: handle.etag };
    const fault = handle.faults.shift();
    if (!bytes) return void response.writeHead(404).end("not here");
    const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? "");
    if (!match || method === "HEAD")
      return void response.writeHead(200, { "content-length": bytes.length, ...etag, ...typeOf(path) }).end(bytes);
    const [start, end] = [Number(match[1]), Math.min(Number(match[2]) + 1, bytes.length)];
    ranges.push([start, Number(match[2]) + 1]);
    if (start >= bytes.length) {
      return void response.writeHead(416, { "content-range": `bytes */${bytes.length}` }).end();
    }
    response.writeHead(206, {
      "content-range": `bytes ${start}-${end - 1}/${bytes.length}`,
      "content-length": end - start,
      ...etag,
      ...handle.headers,
    });
    answer(response, bytes.subarray(start, end), fault);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return handle;
}

function answer(response: ServerResponse, body: Uint8Array, fault: Fault | undefined): void {
  if (fault === "cut") {
    response.write(body.subarray(0, body.length >> 1));
    return void setTimeout(() => response.destroy(), 20);
  }
  if (fault === "stall") return void response.write(body.subarray(0, 1));
  if (fault !== "slow") return void response.end(body);
  let at = 0;
  const step = Math.ceil(body.length / 8);
  const timer = setInterval(() => {
    response.write(body.subarray(at, (at += step)));
    if (at >= body.length) {
      clearInterval(timer);
      response.end();
    }
  }, 10);
}

/** Content types, since browsers refuse modules and WebAssembly of another type. */
function typeOf(url = ""): Record<string, string> {
  const types = new Map([
    ["js", "text/javascript"],
    ["mjs", "text/javascript"],
    ["wasm", "application/wasm"],
    ["html", "text/html"],
  ]);
  const type = types.get(url.slice(url.lastIndexOf(".") + 1));
  return type ? { "content-type": type } : {};
}

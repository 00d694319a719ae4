/**
 * A small static file server with correct HTTP ranges, for the page and its test. One range per request, entity tags;
 * no directory listings, no compression, no TLS. Any static host that answers ranges can replace it.
 *
 * node examples/page/serve.js [--model llm|minilm] [--port 8080]    builds the page, then serves it; the one with a
 * language model where
 *   EIGENLORA_SMOLLM2 says where that is
 */
import { createReadStream } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { pipeline } from "node:stream";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { buildPage } from "./build.js";

/** Browsers run modules, and compile WASM while it arrives, only with the right content type. */
const TYPES = new Map([
  [".html", "text/html; charset=utf-8"],
  [".css", "text/css; charset=utf-8"],
  [".js", "text/javascript; charset=utf-8"],
  [".mjs", "text/javascript; charset=utf-8"],
  [".json", "application/json"],
  [".wasm", "application/wasm"],
]);

/**
 * @typedef {object} Answered
 * @property {string} path
 * @property {number} status
 * @property {string | undefined} range as asked for
 */

/**
 * Serves the files of a folder on the loopback interface.
 * @param {string} folder
 * @param {object} [options]
 * @param {number} [options.port] 0 takes a free one
 * @param {string} [options.cacheControl] by default files are kept by browsers, but revalidated each time: a new build
 *   has the same names
 * @param {(answered: Answered) => void} [options.onAnswer]
 * @returns {Promise<{ url: string, close(): Promise<void> }>}
 */
export async function serveFolder(folder, { port = 0, cacheControl = "no-cache", onAnswer } = {}) {
  const policy = await policyOf(folder);
  const server = createServer(async (request, response) => {
    const path = pathOf(request.url ?? "/");
    const { status, headers, range } = await plan(folder, path, request);
    onAnswer?.({ path, status, range: request.headers.range });
    response.writeHead(status, { ...policy, ...headers, "cache-control": cacheControl });
    if (!range || request.method === "HEAD") return void response.end();
    // A visitor who leaves during a response is not an error.
    pipeline(createReadStream(join(folder, path), range), response, () => {});
  });
  await new Promise((resolve, reject) => {
    const refused = (/** @type {NodeJS.ErrnoException} */ error) =>
      reject(
        error.code === "EADDRINUSE"
          ? new Error(
              `port ${port} is taken, perhaps by this page: end that with Ctrl-C, or take another with --port N`,
            )
          : error,
      );
    server.once("error", refused).listen(port, "127.0.0.1", () => resolve(undefined));
  });
  const address = /** @type {import("node:net").AddressInfo} */ (server.address());
  return {
    url: `http://127.0.0.1:${address.port}/`,
    close: () => {
      server.closeAllConnections();
      return new Promise((resolve) => void server.close(() => resolve()));
    },
  };
}

/**
 * The page's Content-Security-Policy as a header. The page has it in itself; its workers obey only what their own
 * answers say.
 * @param {string} folder
 * @returns {Promise<Record<string, string>>}
 */
async function policyOf(folder) {
  const page = await readFile(join(folder, "index.html"), "utf8").catch(() => "");
  const policy = /"Content-Security-Policy" content="([^"]+)"/.exec(page)?.[1];
  return policy === undefined ? {} : { "content-security-policy": policy };
}

/**
 * The path below the folder; never above it.
 * @param {string} url
 */
function pathOf(url) {
  try {
    const path = normalize(decodeURIComponent(new URL(url, "http://host").pathname));
    return path.endsWith("/") ? `${path}index.html` : path;
  } catch {
    return "/";
  }
}

/**
 * Decides the answer by RFC 9110: 206 for a range, 416 for one beyond the end, 304 for a copy that is still good, else
 * 200.
 * @param {string} folder
 * @param {string} path
 * @param {import("node:http").IncomingMessage} request
 * @returns {Promise<{ status: number, headers: Record<string, string | number>, range?: { start: number, end: number }
 *   }>}
 */
async function plan(folder, path, { method, headers: asked }) {
  if (method !== "GET" && method !== "HEAD") return { status: 405, headers: { allow: "GET, HEAD" } };
  const file = await stat(join(folder, path)).catch(() => undefined);
  if (!file?.isFile()) return { status: 404, headers: {} };
  const { size, mtimeMs } = file;
  const etag = `"${size.toString(36)}-${Math.round(mtimeMs).toString(36)}"`;
  const headers = {
    "content-type": TYPES.get(extname(path)) ?? "application/octet-stream",
    "accept-ranges": "bytes",
    etag,
  };
  if (asked["if-none-match"] === etag) return { status: 304, headers };
  const match = /^bytes=(\d*)-(\d*)$/.exec(asked.range ?? "");
  const stale = asked["if-range"] !== undefined && asked["if-range"] !== etag;
  if (!match || (match[1] === "" && match[2] === "") || stale) {
    const range = { start: 0, end: size - 1 };
    return { status: 200, headers: { ...headers, "content-length": size }, ...(size > 0 && { range }) };
  }
  const last = match[1] === "";
  const start = last ? Math.max(0, size - Number(match[2])) : Number(match[1]);
  const end = last || match[2] === "" ? size - 1 : Math.min(Number(match[2]), size - 1);
  if (start >= size || start > end) return { status: 416, headers: { "content-range": `bytes */${size}` } };
  return {
    status: 206,
    headers: { ...headers, "content-range": `bytes ${start}-${end}/${size}`, "content-length": end - start + 1 },
    range: { start, end },
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values } = parseArgs({
    options: {
      port: { type: "string", default: "8080" },
      model: { type: "string", default: process.env["EIGENLORA_SMOLLM2"] ? "llm" : "minilm" },
    },
  });
  const folder = fileURLToPath(new URL(`../../dist/page${values.model === "llm" ? "-llm" : ""}`, import.meta.url));
  try {
    await buildOf(values.model)(folder);
    const { url } = await serveFolder(folder, { port: Number(values.port) });
    console.log(`The page is at ${url} (Ctrl+C ends it)`);
    if (values.model === "minilm")
      console.log(
        "Another one has a language model: npm run smollm2 -- FOLDER, then EIGENLORA_SMOLLM2=FOLDER npm run page",
      );
  } catch (error) {
    console.error(/** @type {Error} */ (error).message);
    process.exitCode = 1;
  }
}

/**
 * @param {string} model
 * @returns {(folder: string) => Promise<unknown>}
 */
function buildOf(model) {
  if (model === "minilm") return buildPage;
  if (model !== "llm") throw new Error(`--model: expected "minilm" or "llm", got "${model}"`);
  return async (folder) => {
    const [{ buildLlmPage }, { smolMaterial }] = await Promise.all([
      import("./llm/build.js"),
      import("./llm/material.js"),
    ]);
    return buildLlmPage(folder, await smolMaterial());
  };
}

/**
 * The page without its server: keeps the files that build.js lists, and answers with them if the network does not. The network
 * comes first, so a new build is seen at once. What is kept is of this build, byte for byte: an error page, a login page or a
 * file of another build never is. Does not know what the files are.
 */

const scope = /** @type {any} */ (self);

/**
 * What to keep: the name of the cache, paths with their SHA-256, and the paths that are kept once they were used.
 * @type {{ version: string, files: [path: string, sha256: string][], later: string[] }}
 */
const { version: VERSION, files, later: LATER } = scope.KEPT;
const FILES = new Map(files);

scope.addEventListener("install", (/** @type {any} */ event) => {
  const keepAll = async () => {
    const now = [...FILES.keys()].filter((path) => !LATER.includes(path));
    await Promise.all(now.map(async (path) => keep(path, await fetch(addressOf(path)))));
    await scope.skipWaiting();
  };
  event.waitUntil(keepAll());
});

scope.addEventListener("activate", (/** @type {any} */ event) => {
  const tidy = async () => {
    // Of this page only: others may live at the same origin.
    const old = (await caches.keys()).filter((name) => /^eigenlora-[0-9a-f]{16}$/.test(name) && name !== VERSION);
    await Promise.all(old.map((name) => caches.delete(name)));
    await scope.clients.claim();
  };
  event.waitUntil(tidy());
});

scope.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  const { origin, pathname } = new URL(request.url);
  const path = `${origin}${pathname}`.slice(scope.registration.scope.length);
  // Whatever is not of the page goes past. A query string makes no file of its own.
  if (request.method === "GET" && addressOf(path) === origin + pathname && FILES.has(path))
    event.respondWith(answer(event, path));
});

/** @param {string} path */
function addressOf(path) {
  return scope.registration.scope + path;
}

/**
 * @param {any} event
 * @param {string} path
 */
async function answer(event, path) {
  const { request } = event;
  const cache = await caches.open(VERSION);
  try {
    const response = await fetch(request);
    if (response.status === 200 && !(await cache.match(addressOf(path))))
      event.waitUntil(keep(path, response.clone()).catch(() => {}));
    return response;
  } catch (error) {
    const kept = await cache.match(addressOf(path));
    if (!kept) throw error;
    return partOf(kept, request.headers.get("range"));
  }
}

/**
 * @param {string} path
 * @param {Response} response
 * @throws when it is not the file of this build
 */
async function keep(path, response) {
  const bytes = await response.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const sha256 = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (response.status !== 200 || sha256 !== FILES.get(path))
    throw new Error(`${path || "the page"} is not the file of this build`);
  // The others stay: the entity tag says that nothing changed when the server goes, the policy binds workers.
  const headers = new Headers(response.headers);
  headers.delete("content-encoding");
  headers.set("content-length", String(bytes.byteLength));
  await (await caches.open(VERSION)).put(addressOf(path), new Response(bytes, { headers }));
}

/**
 * A cache keeps whole files; packs are read in ranges.
 * @param {Response} whole
 * @param {string | null} range
 */
async function partOf(whole, range) {
  const [, from, to] = /^bytes=(\d+)-(\d*)$/.exec(range ?? "") ?? [];
  if (from === undefined) return whole;
  const blob = await whole.blob();
  const start = Number(from);
  const end = to ? Math.min(Number(to) + 1, blob.size) : blob.size;
  if (start >= end) return new Response(null, { status: 416, headers: { "content-range": `bytes */${blob.size}` } });
  const headers = new Headers(whole.headers);
  headers.set("content-range", `bytes ${start}-${end - 1}/${blob.size}`);
  headers.set("content-length", String(end - start));
  return new Response(blob.slice(start, end), { status: 206, headers });
}

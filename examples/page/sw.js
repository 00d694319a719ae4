/**
 * The page without its server: caches the files that build.js lists, and answers from the cache if the network does not.
 * The network comes first, so a new build is seen at once. Does not know what the files are.
 */

const scope = /** @type {any} */ (self);

/** What to keep, and its name. @type {{ version: string, files: string[] }} */
const { version: VERSION, files: FILES } = scope.KEPT;

scope.addEventListener("install", (/** @type {any} */ event) => {
  const keep = async () => {
    await (await caches.open(VERSION)).addAll(FILES);
    await scope.skipWaiting();
  };
  event.waitUntil(keep());
});

scope.addEventListener("activate", (/** @type {any} */ event) => {
  const tidy = async () => {
    for (const name of await caches.keys()) if (name !== VERSION) await caches.delete(name);
    await scope.clients.claim();
  };
  event.waitUntil(tidy());
});

scope.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(scope.registration.scope)) event.respondWith(answer(request));
});

/** @param {Request} request */
async function answer(request) {
  const cache = await caches.open(VERSION);
  try {
    const response = await fetch(request);
    // The larger runtime is cached once it has been used; everything else is cached already.
    if (response.status === 200 && !(await cache.match(request.url)))
      await cache.put(request.url, response.clone()).catch(() => {});
    return response;
  } catch (error) {
    const kept = await cache.match(request.url, { ignoreSearch: true });
    if (!kept) throw error;
    return partOf(kept, request.headers.get("range"));
  }
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
  const end = to ? Math.min(Number(to) + 1, blob.size) : blob.size;
  const headers = new Headers(whole.headers);
  headers.set("content-range", `bytes ${from}-${end - 1}/${blob.size}`);
  headers.set("content-length", String(end - Number(from)));
  return new Response(blob.slice(Number(from), end), { status: 206, headers });
}

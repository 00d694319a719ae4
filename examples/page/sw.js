/**
 * The page without its server: keeps the files that build.js lists, and answers with them if the network does not. The
 * network comes first, so a new build is seen at once. What is kept is of this build, byte for byte: an error page, a
 * login page or a file of another build never is. What was damaged or lost since is noticed and fetched again: on each
 * visit, when the page asks, and before it is used. Parts of a large model are different: their names hold their
 * content, so what is kept comes first, and they are fetched one at a time, when the page asks. Does not know what the
 * files are.
 */

const scope = /** @type {any} */ (self);

/**
 * Files to keep: the name of the cache, paths with their SHA-256, paths that are kept from their first use on, and
 * paths of large files whose names hold their content.
 * @type {{ version: string, files: [path: string, sha256: string][], later: string[], parts: string[] }}
 */
const { version: VERSION, files, later: LATER, parts: PARTS } = scope.KEPT;
const FILES = new Map(files);
/** Their names change with their content, so a browser's copy is never out of date. */
const HASHED = /-[0-9A-Z]{8}\.js$/;

scope.addEventListener("install", (/** @type {any} */ event) => {
  event.waitUntil(
    keepAll()
      .then(keepOldParts)
      .then(() => scope.skipWaiting()),
  );
});

scope.addEventListener("activate", (/** @type {any} */ event) => {
  const tidy = async () => {
    // This page's caches only: other pages may live at the same origin.
    const old = (await caches.keys()).filter((name) => /^eigenlora-[0-9a-f]{16}$/.test(name) && name !== VERSION);
    await Promise.all(old.map((name) => caches.delete(name)));
    await scope.clients.claim();
  };
  event.waitUntil(tidy());
});

/** The page asks whether everything is kept; the answer is a reason why not, or nothing. */
scope.addEventListener("message", (/** @type {any} */ event) => {
  const answer = (/** @type {string | undefined} */ reason) => event.ports[0].postMessage(reason);
  event.waitUntil(
    keepAll()
      .then(keepParts)
      .then(
        () => answer(undefined),
        ({ message }) => answer(message),
      ),
  );
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
 * The server's answer, or what is kept where there is none or an error.
 * @param {any} event
 * @param {string} path
 */
async function answer(event, path) {
  const { request } = event;
  const range = request.headers.get("range");
  if (PARTS.includes(path)) {
    const kept = await keptFile(path).catch(() => undefined);
    if (kept) return partOf(kept, range);
  }
  const hashed = HASHED.test(path);
  // Some hosts let browsers keep files for minutes: after a new build, old and new ones would be mixed.
  const asked = hashed ? request : new Request(request, { cache: "no-cache" });
  const response = await fetch(asked).catch((error) => /** @type {Error} */ (error));
  const failed = response instanceof Error || (response.status >= 400 && response.status !== 416);
  if (failed) {
    const kept = await keptFile(path).catch(() => undefined);
    if (kept) return partOf(kept, range);
    if (response instanceof Error) throw response;
  } else if (response.status === 200 && !PARTS.includes(path) && !(await isKept(path))) {
    event.waitUntil(keep(path, response.clone()).catch(() => {}));
  }
  return hashed || !response.ok ? response : withHeaders(response, response.body, { "cache-control": "no-cache" });
}

/** Fetches what is not kept as it was built. @throws when the server does not have the files of this build */
async function keepAll() {
  const missing = [];
  for (const path of FILES.keys())
    if (!LATER.includes(path) && !PARTS.includes(path) && !(await keptFile(path))) missing.push(path);
  await Promise.all(missing.map(keepFromServer));
}

/**
 * Fetches the parts that are not kept, one at a time: together they may be more than there is memory.
 * @throws as keepAll
 */
async function keepParts() {
  for (const path of PARTS) if (!(await keptFile(path))) await keepFromServer(path);
}

/** Takes over what another build of the page has kept already, before its cache goes. */
async function keepOldParts() {
  const cache = await caches.open(VERSION);
  for (const path of PARTS) {
    if (await cache.match(addressOf(path))) continue;
    const old = await caches.match(addressOf(path));
    // One that is damaged is fetched again.
    if (old) await keep(path, old).catch(() => {});
  }
}

/** @param {string} path */
async function keepFromServer(path) {
  await keep(path, await fetch(addressOf(path), { cache: "no-cache" }));
}

/**
 * Says that a path needs no copy: it has one, or the cache itself fails and the page still has its server.
 * @param {string} path
 */
async function isKept(path) {
  try {
    return !!(await (await caches.open(VERSION)).match(addressOf(path)));
  } catch {
    return true;
  }
}

/**
 * @param {string} path
 * @param {Response} response
 * @throws when it is not the file of this build
 */
async function keep(path, response) {
  const bytes = await response.arrayBuffer();
  if (response.status !== 200 || (await sha256Of(bytes)) !== FILES.get(path))
    throw new Error(`${path || "the page"} on the server is not the one that was built`);
  // The others stay: the entity tag says that nothing changed when the server goes, the policy binds workers.
  const whole = withHeaders(response, bytes, { "content-length": String(bytes.byteLength) });
  whole.headers.delete("content-encoding");
  await (await caches.open(VERSION)).put(addressOf(path), whole);
}

/**
 * @param {Response} response
 * @param {BodyInit | null} body
 * @param {Record<string, string>} changed headers
 */
function withHeaders({ status, headers }, body, changed) {
  const copy = new Headers(headers);
  for (const [name, value] of Object.entries(changed)) copy.set(name, value);
  return new Response(body, { status, headers: copy });
}

/**
 * Returns the kept copy of a path if it is as it was built, and deletes any other.
 * @param {string} path
 * @returns {Promise<Response | undefined>}
 */
async function keptFile(path) {
  const cache = await caches.open(VERSION);
  const kept = await cache.match(addressOf(path));
  if (!kept) return undefined;
  const bytes = await kept
    .clone()
    .arrayBuffer()
    .catch(() => new ArrayBuffer(0));
  if ((await sha256Of(bytes)) === FILES.get(path)) return kept;
  await cache.delete(addressOf(path));
  return undefined;
}

/** @param {ArrayBuffer} bytes */
async function sha256Of(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
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

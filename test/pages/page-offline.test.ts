/**
 * The page's permissions and its kept files: its Content-Security-Policy and its service worker, in a real Chromium.
 */
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import t from "tap";
import { buildPage, writeOfflineWorker } from "../../examples/page/build.js";
import { serveFolder } from "../../examples/page/serve.js";
import { launch, noChromium, settled } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { keepTasks } from "../support/page-pack.ts";

const folder = folderFor(t);
await buildPage(folder);
await keepTasks(folder, ["debtags-admin", "debtags-game", "debtags-role"]);
// Hosts of static files send this: browsers need not ask again for minutes.
const server = await serveFolder(folder, { cacheControl: "max-age=600" });
/** Shared by all tests here: each opens a window of its own. */
const browser = noChromium ? undefined! : await launch(t);
t.teardown(() => server.close());

t.test("the page runs its own scripts only, and talks to its own server only", { skip: noChromium }, async (t) => {
  const policy = (await fetch(server.url)).headers.get("content-security-policy")!;
  t.match(policy, /^default-src 'none'; script-src 'self' 'wasm-unsafe-eval';/);
  t.notMatch(policy, /unsafe-inline|'unsafe-eval'|\*|https?:/);
  t.match(
    await readFile(join(folder, "index.html"), "utf8"),
    policy,
    "hosts that send no header: the page brings it itself",
  );
  const page = await browser.newPage({ serviceWorkers: "block" });
  page.setDefaultTimeout(90_000);
  const violations: string[] = [];
  page.on(
    "console",
    (message) => void (/Content Security Policy/.test(message.text()) && violations.push(message.text())),
  );
  await page.goto(server.url);
  await settled(page);
  t.same(violations, [], "the page itself keeps to it");
  await page.evaluate(() => {
    document.addEventListener("securitypolicyviolation", ({ effectiveDirective }) => {
      document.title += ` ${effectiveDirective}`;
    });
    const script = document.createElement("script");
    script.textContent = "document.title += ' inline script'";
    const image = document.createElement("img");
    image.setAttribute("onerror", "document.title += ' handler'");
    image.src = "http://127.0.0.1:9/image.png";
    document.body.append(script, image);
  });
  const elsewhere = "http://127.0.0.1:9/";
  const ask = (url: string): Promise<string> => fetch(url).then(String, String);
  t.match(await page.evaluate(ask, elsewhere), /TypeError/);
  await page.waitForFunction(() => document.title.includes("connect-src") && document.title.includes("img-src"));
  t.notMatch(await page.title(), /inline script|handler/);
  const worker = page.workers()[0]!;
  const refused = await worker.evaluate(async (url) => {
    const heard = new Promise<string>((resolve) =>
      self.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective)),
    );
    await fetch(url).catch(() => undefined);
    return heard;
  }, elsewhere);
  t.equal(refused, "connect-src", "the worker too");
});

t.test(
  "kept for offline use: this build's files, each once, and nothing else",
  { skip: noChromium, timeout: 360_000 },
  async (t) => {
    const context = await browser.newContext();
    const page = await context.newPage();
    page.setDefaultTimeout(90_000);
    const devtools = await context.newCDPSession(page);
    const note = (text: string): Promise<void> => page.locator("#offline", { hasText: text }).waitFor();
    const get = (path: string, headers: Record<string, string> = {}) =>
      page.evaluate(
        async ([path, headers]) => {
          const response = await fetch(path, { headers });
          const { length } = new Uint8Array(await response.arrayBuffer());
          return [response.status, length, response.headers.get("content-range")];
        },
        [path, headers] as const,
      );
    /** Kept paths, and the caches. */
    const kept = () =>
      page.evaluate(async () => {
        const names = await caches.keys();
        const mine = names.find((name) => name !== "of another app")!;
        const keys = await (await caches.open(mine)).keys();
        return { names, paths: keys.map(({ url }) => url.slice(location.origin.length + 1)).sort() };
      });

    const facts = await readFile(join(folder, "facts.json"), "utf8");
    await writeFile(join(folder, "facts.json"), `${facts} `);
    await page.goto(server.url);
    await note("Not kept for offline use: a file on the server is not the one that was built");
    await writeFile(join(folder, "facts.json"), facts);
    await page.evaluate(async () => {
      await caches.open("eigenlora-0123456789abcdef");
      await caches.open("of another app");
    });
    await page.goto(`${server.url}?one`);
    await note("works offline");
    const runtime = "ort-wasm-simd-threaded.asyncify.wasm";
    const all = [...(await readdir(folder)).filter((file) => file !== "sw.js"), ""];
    const first = all.filter((file) => file !== runtime).sort();
    const { names, paths } = await kept();
    t.equal(names.length, 2, "the old cache is gone, the stranger's is not");
    t.same(paths, first);

    const real = await readFile(join(folder, runtime));
    await writeFile(join(folder, runtime), "<!doctype html>");
    await writeFile(join(folder, "stranger.json"), "{}");
    for (const path of ["?three=3", "stranger.json", "nothing", runtime, "facts.json?x"]) await get(path);
    t.same((await kept()).paths, first);
    await writeFile(join(folder, runtime), real);
    await get(`${runtime}?x`);
    await page.evaluate(async (path) => {
      while (!(await caches.match(path))) await new Promise((resolve) => setTimeout(resolve, 50));
    }, runtime);
    t.same((await kept()).paths, all.sort(), "the larger runtime, once it was asked for");
    await rm(join(folder, "stranger.json"));

    /**
     * Checks that the kept files equal the server's, byte for byte, in one cache, once the newest worker has taken
     * over.
     */
    const keptAsBuilt = async (what: string): Promise<void> => {
      await page.evaluate(async () => {
        const registration = await navigator.serviceWorker.ready;
        await registration.update();
        while (registration.installing) await new Promise((resolve) => setTimeout(resolve, 50));
      });
      // Chromium often lets the old worker stay for five minutes once the new one is ready.
      await devtools.send("ServiceWorker.enable");
      await devtools.send("ServiceWorker.stopAllWorkers");
      await page.evaluate(async () => {
        const registration = await navigator.serviceWorker.ready;
        while (registration.waiting || registration.active?.state !== "activated")
          await new Promise((resolve) => setTimeout(resolve, 50));
      });
      const hashes = await page.evaluate(async () => {
        const [mine] = (await caches.keys()).filter((name) => name.startsWith("eigenlora-"));
        const cache = await caches.open(mine!);
        const found: [string, string][] = [];
        for (const request of await cache.keys()) {
          const digest = await crypto.subtle.digest("SHA-256", await (await cache.match(request))!.arrayBuffer());
          found.push([request.url.slice(location.origin.length + 1), new Uint8Array(digest).toString()]);
        }
        return Object.fromEntries(found);
      });
      const own = (await kept()).names.filter((name) => name.startsWith("eigenlora-"));
      t.equal(own.length, 1, what);
      const built: Record<string, string> = {};
      for (const file of (await readdir(folder)).filter((file) => file !== "sw.js" && file !== runtime)) {
        const digest = await crypto.subtle.digest("SHA-256", await readFile(join(folder, file)));
        built[file] = new Uint8Array(digest).toString();
      }
      const { [runtime]: _, ...rest } = hashes;
      t.same(rest, { ...built, "": built["index.html"] }, what);
    };
    const visit = async (query: string): Promise<void> => {
      await page.goto(`${server.url}?${query}`);
      await note("works offline");
      t.notOk(await page.locator("#failure").isVisible(), query);
    };
    const spoil = (spoiled: readonly string[], lost: readonly string[]): Promise<void> =>
      page.evaluate(
        async ([spoiled, lost]) => {
          const name = (await caches.keys()).find((name) => name.startsWith("eigenlora-"))!;
          const cache = await caches.open(name);
          const scope = `${location.origin}/`;
          for (const path of spoiled) await cache.put(scope + path, new Response("half of i"));
          for (const path of lost) await cache.delete(scope + path);
        },
        [spoiled, lost] as const,
      );

    await spoil(["page.js", "model_fp16.onnx", ""], ["tasks.eigen", "page.css"]);
    await visit("half-written");
    await keptAsBuilt("a damaged and half-written cache");

    // A new build: one file has changed, one has gone, one is new. The old one stays until the new one is complete.
    const style = await readFile(join(folder, "page.css"), "utf8");
    const gone = (await readdir(folder)).find((file) => file.startsWith("ort.webgpu"))!;
    await rm(join(folder, gone));
    await writeFile(join(folder, "new.json"), "{}");
    await writeFile(join(folder, "page.css"), `${style}\nmain { --build: second; }`);
    await writeOfflineWorker(folder);
    await writeFile(join(folder, "new.json"), "not yet");
    await page.goto(`${server.url}?half-deployed`);
    await note("offline");
    t.notOk(await page.locator("#failure").isVisible());
    await writeFile(join(folder, "new.json"), "{}");
    await visit("deployed");
    const build = await page.evaluate(() =>
      getComputedStyle(document.querySelector("main")!).getPropertyValue("--build"),
    );
    t.equal(build, "second", "no copy of the old build is used, whatever the host allows");
    await keptAsBuilt("another build");

    await server.close();
    const choose = async (task: string): Promise<void> => {
      await page.locator(`.card[data-task="${task}"]`).click();
      await page.locator("#log tr:first-child", { hasText: task }).waitFor();
      await settled(page);
    };
    await choose("debtags-role");
    t.notOk(await page.locator("#failure").isVisible(), "the same pack, from the server and from the cache");
    await page.goto(`${server.url}?four`);
    await settled(page);
    await choose("debtags-game");
    const tasks = new URL("../data/tasks/debtags-game.json", import.meta.url);
    const { labels } = JSON.parse(await readFile(tasks, "utf8"));
    t.same(await page.locator("#labels .name").allTextContents(), labels, "offline, at another address");
    const { length } = await readFile(join(folder, "tasks.eigen"));
    t.same(await get("tasks.eigen", { range: "bytes=5-9" }), [206, 5, `bytes 5-9/${length}`]);
    t.same(await get("tasks.eigen", { range: `bytes=${length}-` }), [416, 0, `bytes */${length}`]);
    t.same(await get("tasks.eigen"), [200, length, null]);
    await spoil(["facts.json"], []);
    t.equal(await get("facts.json").catch(() => "refused"), "refused", "what was damaged is never used");
  },
);

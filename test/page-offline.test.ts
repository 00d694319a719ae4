/** What the page may do, and what it keeps: its Content-Security-Policy and its service worker, in a real Chromium. */
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Page } from "playwright-core";
import t from "tap";
import { buildPage } from "../examples/page/build.js";
import { serveFolder } from "../examples/page/serve.js";
import { launch, noChromium } from "./browser.ts";

const folder = await mkdtemp(join(tmpdir(), "eigenlora-page-"));
await buildPage(folder);
const server = await serveFolder(folder);
t.teardown(async () => {
  await server.close();
  await rm(folder, { recursive: true });
});

const settled = (page: Page): Promise<void> => page.locator('main[aria-busy="false"]').waitFor();

t.test("the page runs its own scripts only, and talks to its own server only", { skip: noChromium }, async (t) => {
  const page = await (await launch(t)).newPage({ serviceWorkers: "block" });
  await page.goto(server.url);
  await settled(page);
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
  { skip: noChromium, timeout: 180_000 },
  async (t) => {
    const context = await (await launch(t)).newContext();
    const page = await context.newPage();
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
    /** Paths that are kept, and the caches there are. */
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

    await page.goto(`${server.url}?two`);
    await settled(page);
    const real = await readFile(join(folder, runtime));
    await writeFile(join(folder, runtime), "<!doctype html>");
    await writeFile(join(folder, "stranger.json"), "{}");
    for (const path of ["?three=3", "stranger.json", "nothing", runtime, "facts.json?x"]) await get(path);
    t.same((await kept()).paths, first);
    await writeFile(join(folder, runtime), real);
    await get(`${runtime}?x`);
    await page.waitForFunction(async (path) => !!(await caches.match(path)), runtime);
    t.same((await kept()).paths, all.sort(), "the larger runtime, once it was asked for");

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
    const tasks = new URL("data/tasks/debtags-game.json", import.meta.url);
    const { labels } = JSON.parse(await readFile(tasks, "utf8"));
    t.same(await page.locator("#labels .name").allTextContents(), labels, "offline, at another address");
    const { length } = await readFile(join(folder, "tasks.eigen"));
    t.same(await get("tasks.eigen", { range: "bytes=5-9" }), [206, 5, `bytes 5-9/${length}`]);
    t.same(await get("tasks.eigen", { range: `bytes=${length}-` }), [416, 0, `bytes */${length}`]);
    t.same(await get("tasks.eigen"), [200, length, null]);
  },
);

/** Chromium for tests: files over HTTP, a page of them, and the page's results. */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { type Browser, type BrowserContext, chromium, type Page } from "playwright-core";
import type { Test } from "tap";
import { serve } from "./range-server.ts";
import { chromium as executablePath, lacking } from "./required.ts";

/** Reason why tests in Chromium are skipped; false where they run, or must fail. */
export const noChromium = lacking("chromium", executablePath ? undefined : "chromium is not here");

/** A browser until the test ends. WebGPU needs `--enable-unsafe-webgpu`. @throws Error without Chromium */
export async function launch(t: Test, args: readonly string[] = []): Promise<Browser> {
  if (!executablePath) throw new Error("chromium is required but not installed");
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", ...args] });
  t.teardown(() => browser.close());
  return browser;
}

/** Bundles a module with all its imports for browsers, as if it lay in this folder, or in `resolveDir`. */
export async function bundle(
  contents: string,
  options: { resolveDir?: string; nodePaths?: string[] } = {},
): Promise<Uint8Array> {
  const { outputFiles } = await build({
    stdin: { contents, resolveDir: options.resolveDir ?? fileURLToPath(new URL(".", import.meta.url)) },
    nodePaths: options.nodePaths ?? [],
    bundle: true,
    // internals.ts names files that need Node: none of them is left in a bundle that does not use it.
    external: ["node:*", "worker_threads", "onnxruntime-node", "webgpu"],
    format: "esm",
    platform: "browser",
    target: "es2022",
    write: false,
    logLevel: "silent",
  });
  return outputFiles[0]!.contents;
}

/**
 * Adds binaries of onnxruntime-web under ort/, by the names of its builds: "asyncify" (WebGPU), "jsep" (the older one).
 */
export async function addRuntimes(files: Map<string, Uint8Array>, builds: readonly string[]): Promise<void> {
  for (const build of builds) {
    for (const end of ["mjs", "wasm"]) {
      const file = `ort-wasm-simd-threaded.${build}.${end}`;
      files.set(
        `ort/${file}`,
        await readFile(fileURLToPath(new URL(`../../node_modules/onnxruntime-web/dist/${file}`, import.meta.url))),
      );
    }
  }
}

/**
 * Opens index.html of these files, or without one a page that runs page.js. An uncaught error there fails the test.
 * @param by a browser, whose page is closed when the test ends; or arguments of one for this page alone
 */
export async function openPage(
  t: Test,
  files: ReadonlyMap<string, Uint8Array>,
  by: Browser | BrowserContext | readonly string[] = [],
): Promise<Page> {
  const blank = new TextEncoder().encode('<!doctype html><body><script type="module" src="/page.js"></script>');
  const server = await serve(new Map([["index.html", blank], ...files]));
  t.teardown(() => server.close());
  const page = await ("newPage" in by ? by : await launch(t, by)).newPage();
  t.teardown(() => page.close());
  // Software rendering fills a busy machine.
  page.setDefaultTimeout(120_000);
  page.on("pageerror", (error) => t.fail(`uncaught in the page: ${error.stack}`));
  await page.goto(server.url("index.html"));
  return page;
}

/** A window of its own, and its complaints: errors and warnings of the console, and what nobody catches. */
export async function visitorOf(
  browser: Browser,
  options: Parameters<Browser["newPage"]>[0] = {},
): Promise<{ page: Page; complaints: string[] }> {
  const page = await browser.newPage(options);
  page.setDefaultTimeout(120_000);
  const complaints: string[] = [];
  page.on("console", (message) => {
    const ours = message.text() === "Service Worker registration blocked by Playwright";
    if (["error", "warning"].includes(message.type()) && !ours) complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(error.message));
  return { page, complaints };
}

/** Resolves when the demo page has nothing left to do. */
export const settled = (page: Page): Promise<void> => page.locator('main[aria-busy="false"]').waitFor();

/** Answers for the CDN with packages from a folder. */
export async function beTheCdn(t: Test, page: Page | BrowserContext, packages: string): Promise<void> {
  const TYPES: Record<string, string> = { wasm: "application/wasm", js: "text/javascript", mjs: "text/javascript" };
  await page.route(/^https:/, async (route) => {
    const [, name, version, path] = /\/npm\/((?:@[^/]+\/)?[^@/]+)@([^/]+)\/(.*)$/.exec(route.request().url())!;
    const installed = join(packages, name!);
    const manifest = JSON.parse(await readFile(join(installed, "package.json"), "utf8"));
    t.equal(version, manifest.version, `${name} ${path}`);
    const headers = { "access-control-allow-origin": "*", "content-type": TYPES[path!.split(".").at(-1)!]! };
    await route.fulfill({ body: await readFile(join(installed, path!)), headers });
  });
}

/** Value of `globalThis.answer`, or of its promise. */
export async function answerOf(page: Page): Promise<unknown> {
  await page.waitForFunction(() => "answer" in globalThis);
  return page.evaluate(() => (globalThis as unknown as { answer: unknown }).answer);
}

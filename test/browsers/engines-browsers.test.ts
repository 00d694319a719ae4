/**
 * The case of test/runtimes/engines.test.ts in Chromium, Firefox (BiDi) and WebKitGTK (WebDriver), window and worker,
 * by HTTP ranges; WebGPU in Firefox on whatever adapter there is. Skipped by name where they are not, unless
 * EIGENLORA_REQUIRE lists chromium, firefox, firefox-webgpu, webkit. Debian: firefox-esr; webkit2gtk-driver, xvfb and
 * dbus-daemon. EIGENLORA_RUNTIMES: puppeteer-core 24.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import t, { type Test } from "tap";
import { serveFolder } from "../../examples/page/serve.js";
import { launch, noChromium } from "../support/browser.ts";
import { caseCode, outcomesOf, prepareCase, WASM } from "../support/engine-material.ts";
import { scriptOf } from "../support/engines.ts";
import { packages, skip, without } from "../support/required.ts";

const PUPPETEER = packages("puppeteer-core");
const FIREFOX = "/usr/bin/firefox-esr";
const DRIVER = "/usr/bin/WebKitWebDriver";
const noFirefox = without("firefox", FIREFOX, PUPPETEER);
const XVFB = "/usr/bin/Xvfb";
const noWebkit = without("webkit", DRIVER, XVFB);

const { project, given, check } = await prepareCase(t);
const site = join(project, "site");
await mkdir(site);
const OPTIONS = [{ backend: "js" }, {}, ...WASM];
const BACKENDS = ["js", "wasm (relaxed-simd)", "wasm (scalar)", "wasm (simd)", "wasm (relaxed-simd)"];
/** Pages that write outcomes as text: of the case here, of a worker, and of WebGPU. */
const PAGES = {
  window: caseCode(OPTIONS, "(text) => (document.title = text)", "tasks.eigen"),
  worker: `const worker = new Worker("/thread.js");
worker.onmessage = ({ data }) => (document.title = data);
worker.onerror = ({ message }) => (document.title = "failed: " + message);`,
  webgpu: caseCode([{ gpu: true }], "(text) => (document.title = text)"),
};
for (const [name, code] of Object.entries(PAGES)) {
  await writeFile(join(site, `${name}.js`), await scriptOf(project, code));
  await writeFile(join(site, `${name}.html`), `<!doctype html><title></title><script src="${name}.js"></script>`);
}
await writeFile(join(site, "thread.js"), await scriptOf(project, caseCode(OPTIONS, "postMessage", "tasks.eigen")));
await writeFile(join(site, "tasks.eigen"), Buffer.from(given.pack, "hex"));
const server = await serveFolder(site);
t.teardown(() => server.close());

/** The parts of a browser's page that are used here. */
interface Page {
  goto(url: string): Promise<unknown>;
  evaluate(code: string): Promise<unknown>;
}

/** Text of one of our pages, once it is there. */
async function said(page: Page, name: keyof typeof PAGES): Promise<string> {
  await page.goto(new URL(`${name}.html`, server.url).href);
  for (let i = 0; i < 1800; i++) {
    const text = (await page.evaluate("document.title")) as string;
    if (text !== "") return text;
    await pause(100);
  }
  throw new Error(`${name}: nothing was said within three minutes`);
}

t.test("chromium", { skip: noChromium }, async (t) => {
  const page = await (await launch(t)).newPage();
  for (const where of ["window", "worker"] as const) check(t, outcomesOf(await said(page, where)), BACKENDS);
});

t.test("firefox", { skip: noFirefox }, async (t) => {
  const puppeteer = createRequire(join(PUPPETEER, "package.json"))("puppeteer-core");
  const browser = await puppeteer.launch({
    ...{ browser: "firefox", executablePath: FIREFOX, headless: true },
    extraPrefsFirefox: { "dom.webgpu.enabled": true, "gfx.webgpu.ignore-blocklist": true },
  });
  t.teardown(() => browser.close());
  const page = (await browser.newPage()) as Page;
  t.comment(await browser.version());
  for (const where of ["window", "worker"] as const) check(t, outcomesOf(await said(page, where)), BACKENDS);
  const gpu = await said(page, "webgpu");
  t.comment(`WebGPU: ${gpu.slice(0, 60)}`);
  if (/no WebGPU|no adapter/.test(gpu)) return skip(t, "firefox-webgpu", gpu);
  check(t, outcomesOf(gpu), [/^webgpu/]);
});

/** Starts Xvfb, a session bus and the driver until the test ends. @returns the driver's address */
async function webdriver(t: Test): Promise<string> {
  const port = 4600 + (process.pid % 300);
  const display = `:${port}`;
  const env = { ...process.env, DISPLAY: display, WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS: "1" };
  const start = (...[command, ...args]: [string, ...string[]]): ChildProcess => {
    const child = spawn(command, args, { env, stdio: "ignore", detached: true });
    // The whole group is ended, since each of them starts others.
    t.teardown(() => void (child.pid !== undefined && process.kill(-child.pid, "SIGKILL")));
    return child;
  };
  start(XVFB, display, "-screen", "0", "800x600x24");
  await pause(500);
  start("/usr/bin/dbus-run-session", "--", DRIVER, `--port=${port}`);
  const url = `http://127.0.0.1:${port}`;
  for (let i = 0; i < 100; i++) {
    if (await fetch(`${url}/status`).catch(() => undefined)) return url;
    await pause(100);
  }
  throw new Error("WebKitWebDriver does not answer");
}

t.test("webkit", { skip: noWebkit }, async (t) => {
  const url = await webdriver(t);
  const ask = async (method: string, path: string, body?: object): Promise<unknown> => {
    const headers = { "content-type": "application/json" };
    const sent = body && { headers, body: JSON.stringify(body) };
    const answer = await fetch(`${url}/session${path}`, { method, ...sent });
    const { value } = (await answer.json()) as { value: { error?: string; message?: string } };
    if (value?.error) throw new Error(`${path}: ${value.error}: ${value.message}`);
    return value;
  };
  const versions = readdirSync("/usr/lib/x86_64-linux-gnu").filter((name) => name.startsWith("webkit"));
  const browsers = versions.map((name) => join("/usr/lib/x86_64-linux-gnu", name, "MiniBrowser")).filter(existsSync);
  const options = { binary: browsers[0], args: ["--automation"] };
  const made = await ask("POST", "", { capabilities: { alwaysMatch: { "webkitgtk:browserOptions": options } } });
  const { sessionId, capabilities } = made as { sessionId: string; capabilities: { browserVersion: string } };
  t.comment(capabilities.browserVersion);
  const page: Page = {
    goto: (address) => ask("POST", `/${sessionId}/url`, { url: address }),
    evaluate: (code) => ask("POST", `/${sessionId}/execute/sync`, { script: `return ${code}`, args: [] }),
  };
  for (const where of ["window", "worker"] as const) check(t, outcomesOf(await said(page, where)), BACKENDS);
  await ask("DELETE", `/${sessionId}`);
});

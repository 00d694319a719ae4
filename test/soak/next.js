/**
 * examples/next from a user's side: the packed package and Next.js installed by npm, `next dev` and `next build` with
 * `next start`, in Chromium, compared with PEFT's answers. Not a test: the installation alone is several hundred MB.
 *
 * usage: node test/soak/next.js      skips itself without npm's registry or Chromium, unless EIGENLORA_REQUIRE lists
 * next
 */
import { execFileSync, spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { cp, mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const root = fileURLToPath(new URL("../..", import.meta.url));
const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const required = /\bnext\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "");
/** Milliseconds that a server or a page has to answer. */
const WAIT = 120_000;
/** Rows of test sets that PEFT is sure about. */
const SURE = { "debtags-role": 15, "debtags-game": 7 };

const app = await mkdtemp(join(tmpdir(), "eigenlora-next-"));
const data = (/** @type {string} */ path) => join(root, "test/data", path);
const json = async (/** @type {string} */ path) => JSON.parse(await readFile(data(path), "utf8"));
/** @param {string} command @param {string[]} args */
const run = (command, ...args) => execFileSync(command, args, { cwd: app, encoding: "utf8", stdio: "pipe" });
// Next.js also keeps an id in the home folder, and reports usage.
process.env["NEXT_TELEMETRY_DISABLED"] ??= "1";

try {
  const why = executablePath ? await prepare() : "Chromium is not here";
  if (why !== undefined) {
    if (required) throw new Error(why);
    console.log(`skipped: ${why}`);
  } else {
    await tryApp("next dev", "dev");
    run(process.execPath, "node_modules/next/dist/bin/next", "build");
    await tryApp("next start", "start");
  }
} finally {
  await rm(app, { recursive: true, maxRetries: 5, retryDelay: 200 });
}

/** Installs the app, and makes its pack. @returns {Promise<string | undefined>} why it cannot be done */
async function prepare() {
  await cp(join(root, "examples/next"), app, { recursive: true });
  const pack = ["pack", root, "--json", "--ignore-scripts", "--pack-destination", app];
  const [{ filename }] = JSON.parse(run("npm", ...pack));
  try {
    run("npm", "install", "--prefer-offline", "--no-audit", "--no-fund", join(app, filename));
  } catch (error) {
    return `npm cannot install Next.js: ${/** @type {Error} */ (error).message}`;
  }
  await cp(data("minilm/model_fp16.onnx"), join(app, "public/model.onnx"));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    await cp(data(`minilm/${file}`), join(app, "public", file));
  const adapters = Object.keys(SURE).map((task) => data(`adapters/own-seed/${task}`));
  run("npx", "eigenlora", "pack", ...adapters, "-o", "public/tasks.eigen", "--energy", "1", "--dtype", "f32");
  return undefined;
}

/** @param {string} name @param {"dev" | "start"} command */
async function tryApp(name, command) {
  const port = await freePort();
  const next = join(app, "node_modules/next/dist/bin/next");
  const args = [next, command, "--hostname", "127.0.0.1", "--port", `${port}`];
  const server = spawn(process.execPath, args, { cwd: app, stdio: ["ignore", "ignore", "inherit"] });
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  try {
    const url = `http://127.0.0.1:${port}/`;
    let status = 0;
    for (const until = Date.now() + WAIT; status === 0 && Date.now() < until; await pause(200))
      status = await fetch(url).then(
        (answer) => answer.status,
        () => 0,
      );
    if (status !== 200) throw new Error(`${name}: the page is answered by ${status}`);
    const part = await fetch(`${url}tasks.eigen`, { headers: { range: "bytes=0-9" } });
    console.log(
      `${name}: a range is answered by ${part.status}, a missing file by ${(await fetch(`${url}no-such.eigen`)).status}`,
    );
    if (part.status !== 206) throw new Error("no ranges, unlike docs/hosting.md says");
    const page = await browser.newPage();
    page.setDefaultTimeout(WAIT);
    await page.goto(url);
    await page.locator("output", { hasNotText: "Loading" }).waitFor();
    const reference = (await json("reference/predictions.json"))["own-seed"];
    for (const [task, row] of Object.entries(SURE)) {
      const { test, labels } = await json(`tasks/${task}.json`);
      const label = labels[reference[task].predictions[row]];
      await page.getByLabel("Sentence").fill(test[row][0]);
      await page.getByLabel("Task").selectOption(task);
      await page.locator("output").getByText(label, { exact: true }).waitFor();
      console.log(`${name}: ${task}: ${label}`);
    }
  } finally {
    await browser.close();
    server.kill();
  }
}

/** @returns {Promise<number>} */
function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
      server.close(() => resolve(port));
    });
  });
}

/**
 * Takes the picture of docs/page.md with Chromium: docs/page.png, light or dark.
 *
 * node examples/page/screenshot.js [--scheme light|dark] [--width 1240] [--height 1420] [--text LINE] [-o
 * docs/page.png]
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { buildPage } from "./build.js";
import { serveFolder } from "./serve.js";

const { values } = parseArgs({
  options: {
    scheme: { type: "string", default: "light" },
    width: { type: "string", default: "1240" },
    height: { type: "string", default: "1420" },
    text: { type: "string", default: "pictures of galaxies, stars and planets, written in Python" },
    output: { type: "string", short: "o", default: fileURLToPath(new URL("../../docs/page.png", import.meta.url)) },
    chromium: { type: "string", default: "/usr/bin/chromium" },
  },
});

const folder = await mkdtemp(join(tmpdir(), "eigenlora-page-"));
await buildPage(folder);
const server = await serveFolder(folder);
const browser = await chromium.launch({ executablePath: values.chromium, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage({
    viewport: { width: Number(values.width), height: Number(values.height) },
    colorScheme: values.scheme === "dark" ? "dark" : "light",
    reducedMotion: "reduce",
  });
  await page.goto(server.url);
  const settled = page.locator('main[aria-busy="false"]');
  await settled.waitFor();
  const choose = async (/** @type {string} */ task) => {
    await page.locator(`.card[data-task="${task}"]`).click();
    await page.locator("#log tr:first-child", { hasText: task }).waitFor();
    await settled.waitFor();
  };
  // A visitor who has been here for a while: the engine has compiled what a switch runs.
  for (let i = 0; i < 10; i++) await choose(i % 2 ? "debtags-role" : "debtags-use");
  await choose("debtags-uitoolkit");
  await page.locator("#teach-button").click();
  await page.locator("#teach-note", { hasText: "Learned" }).waitFor({ timeout: 300_000 });
  await page.locator("#sentence").fill(values.text);
  await settled.waitFor();
  for (const task of ["sections-3", "debtags-implemented-in", "sky-or-lab"]) await choose(task);
  await page.mouse.move(0, 0);
  await page.evaluate(() => /** @type {HTMLElement} */ (document.activeElement).blur());
  await page.screenshot({ path: values.output });
} finally {
  await browser.close();
  await server.close();
  await rm(folder, { recursive: true });
}

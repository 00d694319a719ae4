/**
 * Takes the page's picture for the README with Chromium: docs/page.png, light or dark.
 *
 * node examples/page/screenshot.js [--scheme light|dark] [--width 1200] [--height 800] [-o docs/page.png]
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
    width: { type: "string", default: "1200" },
    height: { type: "string", default: "800" },
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
  await page.locator(".labels .top").waitFor();
  // A first switch, which reads, and the same one again, which does not.
  for (const task of ["debtags-role", "debtags-uitoolkit", "debtags-role"]) {
    await page.locator(`.card[data-task="${task}"]`).click();
    await page.locator(".labels .top").waitFor();
  }
  await page.locator("#load-all").click();
  await page.locator("#tasks-note", { hasText: "answers" }).waitFor();
  await page.locator(".card .said b:empty").first().waitFor({ state: "detached" });
  await page.mouse.move(0, 0);
  await page.screenshot({ path: values.output });
} finally {
  await browser.close();
  await server.close();
  await rm(folder, { recursive: true });
}

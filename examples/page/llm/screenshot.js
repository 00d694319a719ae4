/**
 * Takes the picture of the page with a language model for the documents, with Chromium: docs/page-llm.png.
 *
 * EIGENLORA_SMOLLM2=FOLDER node examples/page/llm/screenshot.js [--scheme light|dark] [--width 1240] [--height 1400]
 * [-o docs/page-llm.png]
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { serveFolder } from "../serve.js";
import { buildLlmPage } from "./build.js";
import { smolMaterial } from "./material.js";

const { values } = parseArgs({
  options: {
    scheme: { type: "string", default: "light" },
    width: { type: "string", default: "1240" },
    height: { type: "string", default: "1400" },
    output: {
      type: "string",
      short: "o",
      default: fileURLToPath(new URL("../../../docs/page-llm.png", import.meta.url)),
    },
    chromium: { type: "string", default: "/usr/bin/chromium" },
  },
});

/** A visitor who has been here for a while. */
const MESSAGES = [
  ["words-to-number", "three hundred forty-four"],
  ["time-24h", "5:30 pm"],
  ["camel-case", "above lookup"],
  ["plural", "mouse"],
  ["antonym", "balanced"],
  ["plural", "family"],
];

const folder = await mkdtemp(join(tmpdir(), "eigenlora-page-"));
await buildLlmPage(folder, await smolMaterial());
const server = await serveFolder(folder);
const browser = await chromium.launch({ executablePath: values.chromium, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage({
    viewport: { width: Number(values.width), height: Number(values.height) },
    colorScheme: values.scheme === "dark" ? "dark" : "light",
    reducedMotion: "reduce",
  });
  page.setDefaultTimeout(300_000);
  await page.goto(server.url);
  const settled = page.locator('main[aria-busy="false"]');
  await settled.waitFor();
  const ask = async (/** @type {string} */ skill, /** @type {string} */ words) => {
    await page.locator("#sentence").fill(words);
    await page.locator(`.card[data-task="${skill}"]`).click();
    await settled.waitFor();
  };
  for (const [skill, words] of MESSAGES) await ask(skill, words);
  await page.locator("#ask-all").click();
  await settled.waitFor();
  await page.locator("#offline", { hasText: "offline" }).waitFor();
  await page.mouse.move(0, 0);
  await page.evaluate(() => /** @type {HTMLElement} */ (document.activeElement).blur());
  await page.screenshot({ path: values.output });
} finally {
  await browser.close();
  await server.close();
  await rm(folder, { recursive: true });
}

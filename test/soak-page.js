/**
 * The page with the real language model, in Chromium: each skill's answers to rows of its test set, compared with onnxruntime-node on the
 * same pack; all skills at once compared with each alone; a skill that is taught; and the page without its server. Not a test: it takes
 * minutes.
 *
 * usage: node test/soak-page.js [ROWS]      skips itself without EIGENLORA_SMOLLM2 or Chromium, unless EIGENLORA_REQUIRE lists smollm2
 */
import "./no-telemetry.js";
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { chromium } from "playwright-core";
import { buildLlmPage } from "../examples/page/llm/build.js";
import { decode } from "../examples/page/llm/decode.js";
import { smolMaterial } from "../examples/page/llm/material.js";
import { serveFolder } from "../examples/page/serve.js";

const ROWS = Number(process.argv[2] ?? 2);
/** Least share of equal answers. WebAssembly and the CPU add up in another order, which decides close calls otherwise. */
const LEAST_EQUAL = 0.95;
/** Lines that the page's form does not contain. */
const CAPITALS = [
  ["Italy", "Rome"],
  ["Sweden", "Stockholm"],
  ["Poland", "Warsaw"],
  ["Portugal", "Lisbon"],
  ["Ireland", "Dublin"],
  ["Peru", "Lima"],
];
const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);

const material = await smolMaterial().catch((/** @type {Error} */ { message }) => message);
const why = typeof material === "string" ? material : executablePath ? undefined : "Chromium is not here";
if (why !== undefined) {
  if (/\bsmollm2\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "")) throw new Error(why);
  console.log(`skipped: ${why}`);
} else if (typeof material !== "string") {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-page-"));
  try {
    await soak(folder, material);
  } finally {
    await rm(folder, { recursive: true, maxRetries: 5, retryDelay: 200 });
  }
}

/**
 * @param {string} folder
 * @param {import("../examples/page/llm/build.js").Material} material
 */
async function soak(folder, material) {
  const facts = await buildLlmPage(folder, material);
  const expected = await inNode(facts, material);
  const server = await serveFolder(folder);
  const browser = await chromium.launch({ executablePath: executablePath ?? "", args: ["--no-sandbox"] });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(300_000);
    const settled = page.locator('main[aria-busy="false"]');
    await page.goto(server.url);
    await settled.waitFor();
    let [asked, equal, batched] = [0, 0, 0];
    for (const [id, text, answer] of expected) {
      await page.locator("#sentence").fill(text);
      await page.locator(`.card[data-task="${id}"]`).click();
      await page.locator("#ask").click();
      await settled.waitFor();
      const alone = await page.locator("#reply").textContent();
      asked++;
      if (alone === answer) equal++;
      else console.log(`${id}: ${text}: "${alone}" in the page, "${answer}" in Node`);
    }
    const [[, words]] = expected;
    const skills = [...new Set(expected.map(([id]) => id))];
    /** @type {Map<string, string | null>} */
    const single = new Map();
    await page.locator("#sentence").fill(words);
    for (const id of skills) {
      await page.locator(`.card[data-task="${id}"]`).click();
      await settled.waitFor();
      single.set(id, await page.locator("#reply").textContent());
    }
    await page.locator("#ask-all").click();
    await settled.waitFor();
    for (const id of skills) {
      const said = await page.locator(`.card[data-task="${id}"] .said b`).textContent();
      if (said === single.get(id)) batched++;
      else console.log(`${id}: ${words}: "${said}" in a batch, "${single.get(id)}" alone`);
    }
    await page.locator("#teach-button").click();
    await page.locator("#teach-note", { hasText: "Learned" }).waitFor({ timeout: 1_200_000 });
    await settled.waitFor();
    console.log(
      `${await page.locator("#teach-step").textContent()}; ${await page.locator("#teach-note").textContent()}`,
    );
    let known = 0;
    for (const [country, capital] of CAPITALS) {
      await page.locator("#sentence").fill(country);
      await page.locator("#ask").click();
      await settled.waitFor();
      if ((await page.locator("#reply").textContent()) === capital) known++;
    }
    console.log(`a skill taught from twelve capitals: ${known} of ${CAPITALS.length} others right`);
    await page.locator("#offline", { hasText: "works offline" }).waitFor();
    await server.close();
    await page.reload();
    await settled.waitFor();
    const [[skill, line]] = expected;
    await page.locator("#sentence").fill(line);
    await page.locator(`.card[data-task="${skill}"]`).click();
    await settled.waitFor();
    assert.equal(await page.locator("#reply").textContent(), single.get(skill), "answers without its server");
    console.log(`page and onnxruntime-node: ${equal} of ${asked} answers equal`);
    console.log(`a batch of ${skills.length} skills and each alone: ${batched} equal`);
    assert.ok(known >= CAPITALS.length / 2);
    assert.ok(equal >= LEAST_EQUAL * asked && batched >= LEAST_EQUAL * skills.length);
  } finally {
    await browser.close();
    await server.close().catch(() => {});
  }
}

/**
 * @param {import("../examples/page/llm/build.js").Facts} facts
 * @param {import("../examples/page/llm/build.js").Material} material
 * @returns {Promise<[id: string, text: string, answer: string][]>}
 */
async function inNode(facts, { folder, model, pack: file }) {
  const [rules, config] = await Promise.all(
    ["tokenizer.json", "tokenizer_config.json"].map(async (name) =>
      JSON.parse(await readFile(join(folder, name), "utf8")),
    ),
  );
  const tokenizer = new Tokenizer(rules, config);
  const pack = await openPack(file);
  const session = await createEigenSession(ort, model, pack);
  /** @type {[id: string, text: string, answer: string][]} */
  const answers = [];
  let [right, rows] = [0, 0];
  for (const [id, { prompt, examples }] of Object.entries(facts.skills)) {
    await session.switchTask(id);
    for (const [text, truth] of examples.slice(0, ROWS)) {
      const { ids } = tokenizer.encode(`${prompt.before}${text}${prompt.after}`, { add_special_tokens: false });
      /** @type {number[]} */
      const answer = [];
      for await (const [token] of decode(ort, session, [ids], facts)) if (token !== undefined) answer.push(token);
      const said = tokenizer.decode(answer, { skip_special_tokens: true }).trim();
      answers.push([id, text, said]);
      rows++;
      if (said === truth) right++;
    }
  }
  console.log(`onnxruntime-node: ${right} of ${rows} rows right`);
  await session.close();
  await pack.close();
  return answers;
}

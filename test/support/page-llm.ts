/**
 * Shared by the tests of the page with a language model: its material, from the tiny decoder of test/data, and a
 * visitor.
 */
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import type { Browser, Page } from "playwright-core";
import type { Material } from "../../examples/page/llm/build.js";
import { settled, visitorOf } from "./browser.ts";
import { concat, data, LOSSLESS } from "./packs.ts";

/** Prompts whose greedy tokens by PEFT are known (test/data/decoder/goldens.json). The decoder's texts mean nothing. */
export const PROMPTS = ["Once upon a time", "x = 3;", "The quick brown fox jumps over the lazy dog."] as const;

/** A small page: two skills, and a model of some parts. */
export async function tinyMaterial(): Promise<Material> {
  const adapters = await readAdapters([data("decoder/adapters")]);
  const { chunks, report } = await buildPack(adapters, LOSSLESS);
  for (const adapter of adapters) await adapter.close();
  const skill = (what: string): Material["skills"][string] => ({
    what,
    prompt: { before: "", after: "" },
    examples: PROMPTS.map((prompt) => [prompt, ""]),
  });
  return {
    name: "a tiny decoder",
    folder: data("decoder"),
    model: data("decoder/onnx/model.onnx"),
    pack: concat(chunks),
    adapters: report.adapterBytes,
    skills: { upper: skill("random letters"), lower: skill("other letters") },
    first: ["upper", PROMPTS[0]],
    most: 12,
    partBytes: 64e3,
  };
}

/** Opens the page in a window of its own. @returns it with its complaints */
export async function visit(
  browser: Browser,
  url: string,
  options: Parameters<Browser["newPage"]>[0] = {},
): Promise<{ page: Page; complaints: string[] }> {
  const { page, complaints } = await visitorOf(browser, options);
  await page.goto(url);
  await settled(page);
  return { page, complaints };
}

/** Writes words, and waits for the active skill's answer to them. */
export async function ask(page: Page, text: string): Promise<string> {
  await page.locator("#sentence").fill(text);
  await page.locator("#sentence").press("Enter");
  await settled(page);
  return (await page.locator("#reply").textContent())!;
}

/** Picks a skill, which answers at once. */
export async function pick(page: Page, id: string): Promise<string> {
  await page.locator(`.card[data-task="${id}"]`).click();
  await settled(page);
  return (await page.locator("#reply").textContent())!;
}

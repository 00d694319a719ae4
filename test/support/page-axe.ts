/** axe on a page: the rules of WCAG that a machine can check. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import type { Page } from "playwright-core";
import type { Test } from "tap";

const source = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

interface Axe {
  run(): Promise<{ violations: { id: string; nodes: { target: string[] }[] }[] }>;
}

/** Checks that a page has no violations on a screen and on a phone, in the light and in the dark. */
export async function axeFindsNothing(t: Pick<Test, "same">, page: Page): Promise<void> {
  await page.evaluate(source);
  for (const [width, height] of [
    [1280, 844],
    [390, 844],
  ] as const) {
    await page.setViewportSize({ width, height });
    for (const colorScheme of ["light", "dark"] as const) {
      await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
      const { violations } = await page.evaluate(() => (globalThis as unknown as { axe: Axe }).axe.run());
      const lines = violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target.join(" ")).join()}`);
      t.same(lines, [], `${colorScheme}, ${width} px`);
    }
  }
}

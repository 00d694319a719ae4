/** Suites of frameworks in Chromium. */
import type { Test } from "tap";
import { bundle, openPage } from "./browser.ts";
import { packages } from "./required.ts";
import { type Finding, report } from "./stand-in.ts";

/**
 * Runs a suite once for each of `backends`, on software adapters where there is no GPU.
 * @param script of a module that sets `globalThis.run`, a function from a backend's name to the findings
 */
export async function inChromium(t: Test, script: string, backends: readonly string[]): Promise<void> {
  const files = new Map([["page.js", await bundle(script, { nodePaths: [packages()] })]]);
  const page = await openPage(t, files, ["--enable-unsafe-webgpu", "--enable-unsafe-swiftshader"]);
  await page.waitForFunction(() => "run" in globalThis);
  for (const backend of backends) {
    await t.test(`${backend} in Chromium`, async (t) => {
      const findings = await page.evaluate(
        (backend) => (globalThis as unknown as { run(backend: string): Promise<Finding[]> }).run(backend),
        backend,
      );
      const good = report(t, findings);
      t.ok(good > 0, `${good} assertions`);
    });
  }
}

/**
 * jax-js as published: cpu and wasm in Node, webgl and webgpu in Chromium. EIGENLORA_RUNTIMES names a folder in which
 * `npm install @jax-js/jax@0.1.25` was run. Without it tests are skipped by name, or fail when EIGENLORA_REQUIRE lists
 * "jax".
 */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import t from "tap";
import { noChromium } from "../support/browser.ts";
import { inChromium } from "../support/framework-browser.ts";
import { jaxSuite, type Module } from "../support/jax-suite.ts";
import { packages, without } from "../support/required.ts";

const folder = packages("@jax-js/jax");
const skip = without("jax", folder);

for (const device of ["cpu", "wasm"]) {
  t.test(`jax-js, ${device}`, { skip }, async (t) => {
    const jax = (await import(pathToFileURL(join(folder, "dist/index.js")).href)) as Module & {
      init(device: string): Promise<string[]>;
      defaultDevice(device: string): void;
    };
    t.ok((await jax.init(device)).includes(device));
    jax.defaultDevice(device);
    jaxSuite(t as never, jax, device);
  });
}

const SCRIPT = `import * as jax from "@jax-js/jax";
  import { record } from "./stand-in.ts";
  import { jaxSuite } from "./jax-suite.ts";
  globalThis.run = (device) => record(device, async (t) => {
    t.ok((await jax.init(device)).includes(device), "the device starts");
    jax.defaultDevice(device);
    jaxSuite(t, jax, device);
  });`;

t.test("jax-js", { skip: skip || noChromium }, (t) => inChromium(t, SCRIPT, ["webgl", "webgpu"]));

/**
 * The backend suite and PEFT's golden pairs in Chromium: js, every build of wasm, and WebGPU, each in
 * a window and in a dedicated worker.
 */
import { readFile } from "node:fs/promises";
import type { Page } from "playwright-core";
import t from "tap";
import { labelOf } from "../support/backend-list.ts";
import type { BrowserBackend, Entry } from "../support/backends-browser.ts";
import { bundle, noChromium, openPage } from "../support/browser.ts";
import type { Golden } from "../support/compare.ts";
import { goldenPacks } from "../support/packs.ts";
import { lacking, soak } from "../support/required.ts";
import { report } from "../support/stand-in.ts";

/** A window or worker in which the entry's functions can be called. */
interface Realm {
  evaluate<R, A>(call: (argument: A) => R | Promise<R>, argument: A): Promise<R>;
}

const BACKENDS: readonly BrowserBackend[] = [
  { backend: "js" },
  { backend: "wasm", wasm: { variant: "scalar" } },
  { backend: "wasm", wasm: { variant: "simd" } },
  { backend: "wasm", wasm: { variant: "relaxed-simd" } },
  { gpu: true },
];

/** Backends of the gate: Node runs the same code with every build, and a worker runs what a window does. */
const GATE: Record<string, { suite: readonly string[]; goldens: readonly string[] }> = {
  window: { suite: ["relaxed-simd", "webgpu"], goldens: ["relaxed-simd"] },
  worker: { suite: ["relaxed-simd"], goldens: ["webgpu"] },
};

/** Script of the page and of the worker. */
const SCRIPT = `import { entry } from "./backends-browser.ts";
  Object.assign(globalThis, entry);
  if (!("document" in globalThis)) postMessage("ready");`;

t.test("Chromium", { skip: noChromium }, async (t) => {
  const files = new Map([["page.js", await bundle(SCRIPT)]]);
  const goldens: Golden[] = [];
  for (const golden of await goldenPacks()) {
    const folder = `/goldens/${golden.name}`;
    for (const file of ["base.safetensors", "merged.safetensors"]) {
      files.set(`${folder.slice(1)}/${file}`, await readFile(`${golden.folder}/${file}`));
    }
    files.set(`${folder.slice(1)}/pack.eigen`, golden.pack);
    goldens.push({ ...golden, folder, pack: `${folder}/pack.eigen` });
  }
  const page = await openPage(t, files, ["--enable-unsafe-webgpu"]);
  const realms: [string, Realm][] = [
    ["window", page],
    ["worker", await startWorker(page)],
  ];
  /** Numbers of assertions of each run: all backends must have the same. */
  const counts = { suite: new Set<number>(), goldens: new Set<number>() };

  for (const [where, realm] of realms) {
    const gpu = await realm.evaluate(() => (globalThis as unknown as Entry).adapter(), undefined);
    if (gpu) {
      t.comment(`${where}: ${gpu.description}: ${gpu.features.join(", ")}`);
    }
    for (const options of BACKENDS) {
      const label = options.gpu ? "webgpu" : labelOf(options);
      const name = `${label} in a ${where}`;
      const skip = options.gpu && !gpu && lacking("chromium", "this Chromium has no WebGPU adapter");
      for (const what of ["suite", "goldens"] as const) {
        if (!soak && !GATE[where]![what].includes(label)) continue;
        await t.test(`${what}: ${name}`, { skip }, async (t) => {
          const findings = await realm.evaluate(
            ({ what, name, options, goldens }) => (globalThis as unknown as Entry)[what](name, options, goldens),
            { what, name, options, goldens },
          );
          const assertions = report(t, findings);
          t.ok(assertions > 0, `${assertions} assertions`);
          counts[what].add(assertions);
        });
      }
    }
  }
  for (const [what, found] of Object.entries(counts))
    t.equal(found.size, 1, `${what}: ${[...found].join(" or ")} assertions on each backend`);
});

async function startWorker(page: Page): Promise<Realm> {
  const started = page.waitForEvent("worker");
  await page.evaluate(() =>
    new Promise((resolve, reject) => {
      const worker = new Worker("/page.js", { type: "module" });
      worker.onmessage = resolve;
      worker.onerror = ({ message }) => reject(new Error(message));
    }).then(() => undefined),
  );
  return started;
}

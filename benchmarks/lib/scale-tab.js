/** A tab of Chromium with a model of benchmarks/scale.js in onnxruntime-web, WebAssembly, one thread. */
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";
import { serveFolder } from "../../examples/page/serve.js";
import { inScratch } from "./process.js";

const root = fileURLToPath(new URL("../..", import.meta.url));

/**
 * Creates a session in a fresh browser, switches to every skill and makes tokens.
 * @param {string} model
 * @param {string} pack "" for the plain model
 */
export async function holdInTab(model, pack) {
  const executablePath = process.env.EIGENLORA_CHROMIUM ?? "/usr/bin/chromium";
  return inScratch(async (folder) => {
    await writeFile(join(folder, "index.html"), "<!doctype html><title>A model and its skills</title>");
    await mkdir(join(folder, "ort"));
    const ort = join(root, "node_modules/onnxruntime-web/dist");
    for (const file of ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"])
      await symlink(join(ort, file), join(folder, "ort", file.replace(/mjs$/, "js")));
    await symlink(dirname(model), join(folder, "model"));
    await symlink(join(root, "dist/browser.js"), join(folder, "eigenlora.js"));
    await symlink(join(root, "benchmarks/lib/generation.js"), join(folder, "generation.js"));
    if (pack) await symlink(pack, join(folder, "pack.eigen"));
    const served = await serveFolder(folder);
    const server = await chromium.launchServer({ executablePath, args: ["--no-sandbox"] });
    try {
      const browser = await chromium.connect(server.wsEndpoint());
      const page = await browser.newPage();
      await page.goto(served.url);
      const peak = async () => (await peakOfTab(server.process().pid ?? 0)) / 1e6;
      const creation = await page.evaluate(create, pack !== "");
      const created = await peak();
      const used = await page.evaluate(use, pack !== "");
      return { "creation, s": creation, "peak, MB": created, ...used, "peak of all, MB": await peak() };
    } finally {
      await server.close();
      await served.close();
    }
  });
}

/** Runs in the page: creates a session, which stays. Returns the seconds. @param {boolean} skilled */
async function create(skilled) {
  const files = ["/ort/ort.wasm.bundle.min.js", "/eigenlora.js"];
  const [ort, { createEigenSession, openPack }] = await Promise.all(files.map((file) => import(file)));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: "/ort/ort-wasm-simd-threaded.wasm" };
  const begun = performance.now();
  const externalData = [{ path: "model.onnx.data", data: "/model/model.onnx.data" }];
  const session = skilled
    ? await createEigenSession(ort, "/model/model.onnx", await openPack("/pack.eigen"))
    : await ort.InferenceSession.create("/model/model.onnx", { externalData });
  const seconds = (performance.now() - begun) / 1000;
  Object.assign(globalThis, { ort, session });
  return seconds;
}

/** Runs in the page: switches to every skill and makes tokens. @param {boolean} skilled */
async function use(skilled) {
  const { ort, session } = /** @type {any} */ (globalThis);
  const file = "/generation.js";
  const { generation } = await import(file);
  const config = await (await fetch("/model/genai_config.json")).json();
  /** @type {number[]} */
  const switches = [];
  for (const id of skilled ? session.tasks.keys() : []) {
    const begun = performance.now();
    await session.switchTask(id);
    switches.push(performance.now() - begun);
  }
  const text = generation(ort, session, config.model.decoder, 32);
  await text.next();
  /** @type {number[]} */
  const tokens = [];
  for (let i = 0; i < 16; i++) {
    const begun = performance.now();
    await text.next();
    tokens.push(performance.now() - begun);
  }
  const middle = (/** @type {number[]} */ all) => all.sort((a, b) => a - b)[all.length >> 1];
  return {
    ...(skilled && { "first, from the URL, ms": middle(switches) }),
    "token, ms": middle(tokens),
  };
}

/** Peak resident bytes of the tab's process. @param {number} browser */
async function peakOfTab(browser) {
  /** @type {Map<number, number>} */
  const parents = new Map();
  let peak = 0;
  for (const id of (await readdir("/proc")).map(Number).filter(Boolean)) {
    const stat = await readFile(`/proc/${id}/stat`, "utf8").catch(() => "");
    parents.set(id, Number(/\) \S (\d+)/.exec(stat)?.[1] ?? 0));
  }
  for (const id of parents.keys()) {
    let parent = id;
    while (parent && parent !== browser) parent = parents.get(parent) ?? 0;
    const command = parent ? await readFile(`/proc/${id}/cmdline`, "utf8").catch(() => "") : "";
    if (!command.includes("--type=renderer")) continue;
    const status = await readFile(`/proc/${id}/status`, "utf8").catch(() => "");
    peak = Math.max(peak, 1024 * Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
  }
  return peak;
}

/**
 * Builds the page into a folder of static files: script and worker as bundles, the runtime's binaries, the model, the
 * tokenizer, the pack of the demo, and the sizes of the adapters for comparison. Not a server (serve.js).
 *
 * node examples/page/build.js [FOLDER]
 */

import { createHash } from "node:crypto";
import { cp, mkdir, readdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { readAdapters } from "eigenlora/node";
import { build } from "esbuild";
import { data, model, packed } from "../minilm.js";

/** @param {string} path */
const here = (path) => fileURLToPath(new URL(path, import.meta.url));

/** The builds of onnxruntime-web that the worker imports: the smaller one runs on WASM only. */
const WEBGPU_RUNTIME = "ort-wasm-simd-threaded.asyncify.wasm";
const RUNTIMES = ["ort-wasm-simd-threaded.wasm", WEBGPU_RUNTIME];
const MODEL = ["model_fp16.onnx", "tokenizer.json", "tokenizer_config.json"];
/** Lines of each task's test set that the page offers. */
const EXAMPLES = 12;
/**
 * The sentence that the page begins with (index.html): a line of the test sets that no task was trained on, and what
 * Debian 13 says of its package, tshark, by each task that knows such a label.
 */
const FIRST = {
  text: "network traffic analyzer - console version",
  labels: {
    "debtags-admin": "monitoring",
    "debtags-implemented-in": "c",
    "debtags-interface": "commandline",
    "debtags-role": "program",
    "debtags-scope": "utility",
    "debtags-use": "monitor",
  },
};

/**
 * @param {string} folder emptied first
 * @returns {Promise<{ bytes: number, tasks: number }>} of the pack
 */
export async function buildPage(folder) {
  await bundlePage(folder, here("."), ["index.html", "page.css"]);
  for (const file of MODEL) await cp(data(`minilm/${file}`), join(folder, file));

  await cp(packed, join(folder, "tasks.eigen"));

  const adapters = await readAdapters([data("adapters/own-seed")]);
  for (const adapter of adapters) await adapter.close();
  const facts = {
    model: (await stat(model)).size,
    pack: (await stat(packed)).size,
    adapters: adapters.reduce((sum, { byteLength }) => sum + byteLength, 0),
    first: FIRST,
    examples: Object.fromEntries(await Promise.all(adapters.map(async ({ id }) => [id, await examplesOf(id)]))),
  };
  await writeFile(join(folder, "facts.json"), JSON.stringify(facts));
  await writeOfflineWorker(folder);
  return { bytes: facts.pack, tasks: adapters.length };
}

/**
 * Script and worker as bundles, the runtime's binaries, and other files.
 * @param {string} folder emptied first
 * @param {string} from folder of page.js and worker.js
 * @param {readonly string[]} files seen from there
 */
export async function bundlePage(folder, from, files) {
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  await build({
    entryPoints: [join(from, "page.js"), join(from, "worker.js")],
    outdir: folder,
    bundle: true,
    splitting: true,
    minify: true,
    format: "esm",
    target: "es2022",
    chunkNames: "[name]-[hash]",
    logLevel: "warning",
  });
  for (const file of files) await cp(join(from, file), join(folder, basename(file)));
  for (const file of RUNTIMES) {
    await cp(fileURLToPath(import.meta.resolve(`onnxruntime-web/${file}`)), join(folder, file));
  }
}

/**
 * Writes sw.js with the files to keep and their SHA-256: all of them at once, but the runtime that only WebGPU uses
 * later.
 * @param {string} folder that holds all files of the page
 * @param {readonly string[]} [parts] large files whose names change with their content
 */
export async function writeOfflineWorker(folder, parts = []) {
  await rm(join(folder, "sw.js"), { force: true });
  /** @type {[path: string, sha256: string][]} */
  const files = [];
  for (const file of (await readdir(folder)).sort())
    files.push([
      file,
      createHash("sha256")
        .update(await readFile(join(folder, file)))
        .digest("hex"),
    ]);
  const index = files.find(([file]) => file === "index.html");
  if (index) files.push(["", index[1]]);
  const version = createHash("sha256").update(JSON.stringify(files)).digest("hex").slice(0, 16);
  const kept = { version: `eigenlora-${version}`, files, later: [WEBGPU_RUNTIME], parts };
  const worker = await readFile(here("sw.js"), "utf8");
  await writeFile(join(folder, "sw.js"), `self.KEPT = ${JSON.stringify(kept)};\n${worker}`);
}

/**
 * Lines that the adapter was not trained on, with the label that Debian gives them.
 * @param {string} task
 * @returns {Promise<[text: string, label: string][]>}
 */
async function examplesOf(task) {
  /** @type {{ test: [string, number][], labels: string[] }} */
  const { test, labels } = JSON.parse(await readFile(data(`tasks/${task}.json`), "utf8"));
  return test.slice(0, EXAMPLES).map(([text, label]) => [text, labels[label]]);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const folder = resolve(process.argv[2] ?? here("../../dist/page"));
  const { bytes, tasks } = await buildPage(folder);
  console.log(`${folder}: ${tasks} tasks in a pack of ${bytes} bytes`);
}

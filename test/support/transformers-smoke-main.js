/**
 * Runs `transformers-smoke.js` in Node, with onnxruntime-web instead of onnxruntime-node:
 *   node transformers-smoke-main.js TRANSFORMERS_FOLDER PLAN.json
 */

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { attachPack } from "eigenlora/transformers";
import * as ort from "onnxruntime-web";
import { smoke } from "./transformers-smoke.js";

const [, , folder = "", planFile = ""] = process.argv;
// A path that Node can import from; without one, transformers.js would name a host.
ort.env.wasm.wasmPaths = pathToFileURL(
  join(dirname(createRequire(import.meta.url).resolve("onnxruntime-web")), "/"),
).href;
ort.env.wasm.numThreads = 1;
// transformers.js looks for it while it is imported.
Object.assign(globalThis, { [Symbol.for("onnxruntime")]: ort });
const transformers = await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href);
const plan = JSON.parse(await readFile(planFile, "utf8"));
Object.assign(transformers.env, { localModelPath: plan.models, allowRemoteModels: false });
const read = (/** @type {string} */ file) => readFile(join(plan.models, file));
const result = await smoke(transformers, { openPack, attachPack }, { ...plan, read });
process.stdout.write(JSON.stringify(result), () => process.exit());

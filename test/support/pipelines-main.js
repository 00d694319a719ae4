/**
 * Runs packs on pipelines of transformers.js in Node, with onnxruntime-web instead of onnxruntime-node; prints the
 * pipelines' answers:
 *   node pipelines-main.js TRANSFORMERS_FOLDER PLAN.json
 */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { attachPack } from "eigenlora/transformers";
import * as ort from "onnxruntime-web";
import { inputOf } from "./pipelines-inputs.js";

const [, , folder = "", planFile = ""] = process.argv;
// A path that Node can import from; without one, transformers.js would name a host.
ort.env.wasm.wasmPaths = pathToFileURL(
  join(dirname(createRequire(import.meta.url).resolve("onnxruntime-web")), "/"),
).href;
ort.env.wasm.numThreads = 1;
// transformers.js looks for it while it is imported.
Object.assign(globalThis, { [Symbol.for("onnxruntime")]: ort });
const { env, pipeline, RawImage } = await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href);
/**
 * @type {{ models: string, runs: { pipeline: string, model: string, pack: string, tasks: (string | null)[], calls:
 *   unknown[][] }[] }}
 */
const { models, runs } = JSON.parse(await readFile(planFile, "utf8"));
Object.assign(env, { localModelPath: models, allowRemoteModels: false });

const answers = [];
for (const { pipeline: task, model, pack, tasks, calls } of runs) {
  const pipe = await pipeline(task, model, { dtype: "fp32", device: "auto" });
  const file = await openPack(pack);
  const attached = await attachPack(pipe, file, { model });
  for (const task of tasks) {
    await attached.switchTask(task);
    for (const call of calls)
      answers.push({ model, task, answer: await pipe(...call.map((value) => inputOf(value, RawImage))) });
  }
  await pipe.dispose();
  await file.close();
}
process.stdout.write(JSON.stringify(answers), () => process.exit());

// Every task of a pack answers one sentence: node main.js "a fast mail reader for the terminal"
import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";

// onnxruntime would send telemetry. It looks here when the first session is made.
process.env.ORT_DISABLE_TELEMETRY ??= "1";

const read = async (/** @type {string} */ file) => JSON.parse(await readFile(file, "utf8"));
const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
const pack = await openPack("tasks.eigen");
const session = await createEigenSession(ort, "model.onnx", pack);

const text = process.argv[2] ?? "a fast mail reader for the terminal";
const feeds = await session.encode(text, tokenizer);

console.log(text);
for (const [task, { metadata }] of pack.tasks) {
  await session.switchTask(task);
  const { logits } = await session.run(feeds);
  const scores = /** @type {Float32Array} */ (logits.data);
  const best = scores.indexOf(Math.max(...scores));
  console.log(`${task}: ${metadata.labels?.[best] ?? best}`);
}
await session.close();
await pack.close();

// A sentence, a list of tasks, and the answer of the task that is chosen.
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web/wasm";

const field = /** @type {HTMLInputElement} */ (document.getElementById("text"));
const list = /** @type {HTMLSelectElement} */ (document.getElementById("task"));
const output = /** @type {HTMLOutputElement} */ (document.getElementById("answer"));

// The page says what is missing.
for (const failed of ["error", "unhandledrejection"])
  addEventListener(failed, (/** @type {any} */ { error, reason }) => (output.value = (error ?? reason).message));

async function read(/** @type {string} */ file) {
  const answer = await fetch(file);
  if (!answer.headers.get("content-type")?.includes("json")) throw new Error(`${file} is missing: put it into public/`);
  return answer.json();
}
const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));

/** @type {NonNullable<import("eigenlora").OpenOptions["onProgress"]>} */
const onProgress = ({ status, file, progress }) => {
  if (status === "progress") output.value = `Loading ${file}: ${Math.round(progress)} %`;
};
const pack = await openPack("tasks.eigen", { onProgress });
const session = await createEigenSession(ort, "model.onnx", pack, { onProgress });

async function answer() {
  const task = list.value;
  const feeds = await session.encode(field.value, tokenizer);
  const switched = session.switchTask(task);
  const run = session.run(feeds); // waits for the switch
  await switched;
  const scores = /** @type {Float32Array} */ ((await run).logits.data);
  const best = scores.indexOf(Math.max(...scores));
  if (task === list.value) output.value = String(pack.tasks.get(task)?.metadata.labels?.[best] ?? best);
}

for (const id of pack.tasks.keys()) list.add(new Option(id));
list.onchange = answer;
field.onchange = answer;
await answer();

// A sentence, a list of tasks, and the answer of the task that is chosen.
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web";

const field = /** @type {HTMLInputElement} */ (document.getElementById("text"));
const list = /** @type {HTMLSelectElement} */ (document.getElementById("task"));
const output = /** @type {HTMLOutputElement} */ (document.getElementById("answer"));

const read = async (/** @type {string} */ file) => (await fetch(file)).json();
const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
const pack = await openPack("tasks.eigen");
const session = await createEigenSession(ort, "model.onnx", pack);

function feedsOf(/** @type {string} */ text) {
  const { ids } = tokenizer.encode(text);
  const tensor = (/** @type {number[]} */ values) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  /** @type {Record<string, ort.Tensor>} */
  const inputs = {
    input_ids: tensor(ids),
    attention_mask: tensor(ids.map(() => 1)),
    token_type_ids: tensor(ids.map(() => 0)),
  };
  return Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
}

async function answer() {
  const task = list.value;
  const switched = session.switchTask(task);
  const run = session.run(feedsOf(field.value)); // waits for the switch
  await switched;
  const scores = /** @type {Float32Array} */ ((await run).logits.data);
  const best = scores.indexOf(Math.max(...scores));
  if (task === list.value) output.value = String(pack.tasks.get(task)?.metadata.labels?.[best] ?? best);
}

for (const id of pack.tasks.keys()) list.add(new Option(id));
list.onchange = answer;
field.onchange = answer;
await answer();

// The model, its tokenizer and the pack: loaded once, in the browser.
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web";

async function load() {
  const read = async (file) => (await fetch(file)).json();
  const tokenizer = new Tokenizer(await read("/tokenizer.json"), await read("/tokenizer_config.json"));
  const pack = await openPack("/tasks.eigen");
  return { tokenizer, pack, session: await createEigenSession(ort, "/model.onnx", pack) };
}

let loaded;
export const loadModel = () => (loaded ??= load());

/** The label that a task gives a sentence. */
export async function classify(task, text) {
  const { tokenizer, pack, session } = await loadModel();
  const { ids } = tokenizer.encode(text);
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const inputs = {
    input_ids: tensor(ids),
    attention_mask: tensor(ids.map(() => 1)),
    token_type_ids: tensor(ids.map(() => 0)),
  };
  const feeds = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
  const switched = session.switchTask(task);
  const run = session.run(feeds); // waits for the switch
  await switched;
  const scores = (await run).logits.data;
  const best = scores.indexOf(Math.max(...scores));
  return String(pack.tasks.get(task).metadata.labels?.[best] ?? best);
}

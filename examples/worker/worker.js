// A model and its tasks, off the page's thread. Answers { task, text } with { task, text, label }.
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web/wasm";

const read = async (file = "") => (await fetch(file)).json();
const onProgress = ({ file = "", progress = 0 }) => self.postMessage({ loading: `${file}: ${Math.round(progress)} %` });

async function load() {
  const tokenizer = new Tokenizer(await read("/tokenizer.json"), await read("/tokenizer_config.json"));
  const pack = await openPack("/tasks.eigen", { onProgress });
  const session = await createEigenSession(ort, "/model.onnx", pack, { onProgress });
  self.postMessage({ tasks: [...session.tasks.keys()] });
  return { tokenizer, session };
}
const fail = (error = new Error()) => self.postMessage({ error: error.message });
const ready = load();
ready.catch(fail);

self.onmessage = async ({ data: { task, text } }) => {
  const { tokenizer, session } = await ready;
  try {
    const feeds = await session.encode(text, tokenizer);
    const switched = session.switchTask(task);
    const run = session.run(feeds); // waits for the switch
    await switched;
    const scores = [...(await run).logits.data].map(Number);
    const best = scores.indexOf(Math.max(...scores));
    self.postMessage({ task, text, label: session.tasks.get(task)?.metadata.labels?.[best] ?? best });
  } catch (error) {
    fail(/** @type {Error} */ (error));
  }
};

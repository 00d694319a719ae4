// The model, its tokenizer and the pack: loaded once, in the browser.
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";

async function read(file) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file} is missing (status ${answer.status}): put it into public/`);
  return answer.json();
}

async function load(onProgress) {
  // Next.js also runs pages on the server, where onnxruntime-web finds no address of itself.
  const ort = await import("onnxruntime-web/wasm");
  const tokenizer = new Tokenizer(await read("/tokenizer.json"), await read("/tokenizer_config.json"));
  const pack = await openPack("/tasks.eigen", { onProgress });
  return { tokenizer, pack, session: await createEigenSession(ort, "/model.onnx", pack, { onProgress }) };
}

let loaded;
export const loadModel = (onProgress) => (loaded ??= load(onProgress));

/** The label that a task gives a sentence. */
export async function classify(task, text) {
  const { tokenizer, pack, session } = await loadModel();
  const feeds = await session.encode(text, tokenizer);
  const switched = session.switchTask(task);
  const run = session.run(feeds); // waits for the switch
  await switched;
  const scores = (await run).logits.data;
  const best = scores.indexOf(Math.max(...scores));
  return String(pack.tasks.get(task).metadata.labels?.[best] ?? best);
}

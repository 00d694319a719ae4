// Every task of a pack answers one sentence, by a pipeline of transformers.js: node main.js "a fast mail reader"
import { env, pipeline } from "@huggingface/transformers";
import { openPack } from "eigenlora";
import { attachPack } from "eigenlora/transformers";

// The model lies in models/my-model. Without these two lines its name is that of a model on the Hugging Face Hub.
env.localModelPath = "models/";
env.allowRemoteModels = false;
const model = "my-model";

const pipe = await pipeline("text-classification", model, { dtype: "fp16" });
const pack = await openPack("tasks.eigen");
const tasks = await attachPack(pipe, pack, { model });

const text = process.argv[2] ?? "a fast mail reader for the terminal";
console.log(text);
for (const task of tasks.tasks.keys()) {
  await tasks.switchTask(task);
  const [{ label, score }] = await pipe(text); // label names are those of the task
  console.log(`${task}: ${label} (${Math.round(100 * score)} %)`);
}
await pipe.dispose();
await pack.close();

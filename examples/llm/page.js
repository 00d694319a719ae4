// Words, a list of skills, and the answer of the skill that is chosen, as it comes.
import { env } from "@huggingface/transformers";
import { openSkills } from "./skills.js";

// The model lies in public/models/smollm2. Without these three lines its name is that of a model on the Hugging Face
// Hub.
env.allowLocalModels = true;
env.localModelPath = "/models/";
env.allowRemoteModels = false;

const field = /** @type {HTMLInputElement} */ (document.getElementById("text"));
const list = /** @type {HTMLSelectElement} */ (document.getElementById("skill"));
const output = /** @type {HTMLOutputElement} */ (document.getElementById("answer"));
const cost = /** @type {HTMLElement} */ (document.getElementById("cost"));

const prompts = await (await fetch("prompts.json")).json();
const skills = await openSkills("smollm2", "tasks.eigen", prompts);

/** The newest question. What is said to an older one is not shown. */
let asked = 0;

async function answer() {
  const mine = ++asked;
  output.value = "";
  const { milliseconds, requests } = await skills.answer(list.value, field.value, (piece) => {
    if (mine === asked) output.value += piece;
  });
  if (mine === asked) cost.textContent = `Switched in ${milliseconds.toFixed(1)} ms, with ${requests} requests.`;
}

for (const name of skills.names) list.add(new Option(name));
list.onchange = answer;
field.onchange = answer;
await answer();

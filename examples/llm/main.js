// Skills in the terminal: node main.js plural mouse. Without a skill, lines like "plural mouse" are answered until
// Ctrl-D.
import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline/promises";
import { env } from "@huggingface/transformers";
import { openSkills } from "./skills.js";

// The model lies in public/models/smollm2. Without these two lines its name is that of a model on the Hugging Face Hub.
env.localModelPath = "public/models/";
env.allowRemoteModels = false;

const prompts = JSON.parse(await readFile("public/prompts.json", "utf8"));
const skills = await openSkills("smollm2", "public/tasks.eigen", prompts);

async function answer(/** @type {string} */ skill, /** @type {string} */ text) {
  if (!skills.names.includes(skill)) return console.log(`The skills are ${skills.names.join(", ")}.`);
  const { milliseconds } = await skills.answer(skill, text, (piece) => process.stdout.write(piece));
  console.log(`   (switched in ${milliseconds.toFixed(1)} ms)`);
}

const [skill, ...words] = process.argv.slice(2);
if (skill) await answer(skill, words.join(" "));
else {
  console.log(`A skill and words, please. The skills are ${skills.names.join(", ")}.`);
  for await (const line of createInterface({ input: process.stdin })) {
    const [, first = "", rest = ""] = /^\s*(\S+)\s*(.*)$/.exec(line) ?? [];
    if (first) await answer(first, rest);
  }
}
await skills.close();

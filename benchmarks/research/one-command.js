/**
 * Runs one command on a suite. `eigenlora pack FOLDER -o FILE --model MODEL` in a process of its own: it finds what
 * adapters share, distils on text that it makes of the tokenizer's words, and judges each task by answers. With
 * `--texts` some training texts of each task are the text; with `--ratio` the size is given. The pack is then asked the
 * test rows, 240 of each task at most, and so are the adapters as PEFT answers them. Bytes are those of whole files; of
 * adapters those of their numbers in f32.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { mean, sum } from "simple-statistics";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { model, readTask } from "../../examples/minilm.js";
import { bytesOfAdapter, folderOf, SUITES, testTexts } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { command, inScratch } from "../lib/process.js";
import { print } from "../lib/report.js";
import { Suite } from "../lib/suite.js";

const QUESTION = "What does one command make of a suite?";
const given = readArguments(QUESTION, {
  suite: choice(SUITES, "adapters of the repository", "hub"),
  ratio: number("how many times smaller than the adapters' files. Default: as small as answers allow", undefined, 1),
  texts: number("training texts of each task; 0: text that the command makes", 0),
});
const suite = await Suite.open(given.suite);
await inScratch(async (scratch) => {
  const [file, text] = [join(scratch, "suite.eigen"), join(scratch, "lines.txt")];
  if (given.texts > 0) await writeFile(text, (await textsOf(suite)).join("\n"));
  const options = [
    ...["--model", model, "--tokens", "32"],
    ...(given.texts > 0 ? ["--text", text] : []),
    ...(given.ratio === undefined ? [] : ["--bytes", `1/${given.ratio}`]),
  ];
  const started = performance.now();
  const found = command("pack", folderOf(given.suite), "-o", file, ...options);
  const seconds = (performance.now() - started) / 1000;
  const pack = new Uint8Array(await readFile(file));
  const numbers = sum(suite.adapters.map(bytesOfAdapter));
  const answers = (await suite.answers([pack])).map(({ id, right, same, peft }) => ({
    ...{ id, right: 100 * right, same: 100 * same, peft: 100 * peft },
  }));
  const same = answers.map((one) => one.same);
  const row = {
    name: "pack",
    bytes: pack.length,
    "× fewer than f32": numbers / pack.length,
    "right, %": mean(answers.map((one) => one.right)),
    "as the adapter, %": mean(same),
    "least of a task, %": Math.min(...same),
    minutes: seconds / 60,
  };
  const peft = mean(answers.map((one) => one.peft));
  const peer = { name: "adapters, PEFT's answers", bytes: numbers, "× fewer than f32": 1, "right, %": peft };
  /** @type {Map<string, number>} */
  const kept = new Map();
  for (const one of found.answers ?? []) kept.set(one.kept, (kept.get(one.kept) ?? 0) + 1);
  const notes = [
    `Text: ${given.texts > 0 ? `${given.texts} training texts of each task` : "made of the tokenizer's words"}.`,
    ...(found.answers
      ? [`${[...kept].map(([name, tasks]) => `${tasks} ${name}`).join(", ")}; ${found.steps} steps of each task.`]
      : []),
    ...answers.map(({ id, same, right, peft }) => {
      const held = found.answers?.find((/** @type {{ id: string }} */ one) => one.id === id);
      const own = held ? `, ${held.kept}, ${(100 * (held.agreement ?? NaN)).toFixed(1)} % of held-back answers` : "";
      return `${id}: ${right.toFixed(1)} % right of ${peft.toFixed(1)}, ${same.toFixed(1)} % as the adapter${own}`;
    }),
  ];
  print(given.json, [{ question: QUESTION, rows: [row, peer], notes }]);
});
await suite.close();

/** Some training texts of each task, none of them a test text of any. @param {Suite} suite */
async function textsOf({ adapters }) {
  const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
  const tests = testTexts(tasks);
  return tasks.flatMap(({ train }) => {
    const own = [...new Set(train.map(([text]) => text))].filter((text) => !tests.has(text));
    return shuffle(own, uniform(2)).slice(0, given.texts);
  });
}

/**
 * What does one command make of a suite? `eigenlora pack FOLDER -o FILE --ratio R --model MODEL --text LINES` in a process of its own,
 * with some training texts of each task as lines: it tries ways, judges them by answers and distils the best one. The pack is then asked
 * the test rows, 240 of each task at most, and so are the adapters as PEFT answers them. Bytes are those of whole files; of adapters
 * those of their numbers in f32.
 */
import { spawnSync } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { mean, sum } from "simple-statistics";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { model, readTask } from "../../examples/minilm.js";
import { bytesOfAdapter, folderOf, SUITES, testTexts } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { inScratch } from "../lib/process.js";
import { print } from "../lib/report.js";
import { Suite } from "./size/suite.js";

const CLI = fileURLToPath(new URL("../../dist/src/cli/main.js", import.meta.url));
const QUESTION = "What does one command make of a suite?";
const given = readArguments(QUESTION, {
  suite: choice(SUITES, "adapters of the repository", "hub"),
  ratio: number("how many times smaller than the adapters' files", 60, 1),
  texts: number("training texts of each task", 10, 1),
});
const suite = await Suite.open(given.suite);
const lines = await textsOf(suite);
await inScratch(async (scratch) => {
  const [file, text] = [join(scratch, "suite.eigen"), join(scratch, "lines.txt")];
  await writeFile(text, lines.join("\n"));
  const options = ["--ratio", String(given.ratio), "--model", model, "--text", text, "--json"];
  const started = performance.now();
  const { status, stdout } = spawnSync(process.execPath, [CLI, "pack", folderOf(given.suite), "-o", file, ...options], {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
  });
  if (status !== 0) throw new Error(`eigenlora pack failed with ${status}`);
  const seconds = (performance.now() - started) / 1000;
  const found = JSON.parse(stdout);
  const pack = new Uint8Array(await readFile(file));
  const numbers = sum(suite.adapters.map(bytesOfAdapter));
  const answers = await answersOf(pack);
  const row = {
    name: "pack",
    bytes: pack.length,
    "× fewer than f32": numbers / pack.length,
    "right, %": answers.right,
    minutes: seconds / 60,
  };
  const note = `${lines.length} lines; what the command said: ${JSON.stringify({ ...found, tasks: undefined })}`;
  const peer = { name: "adapters, PEFT's answers", bytes: numbers, "× fewer than f32": 1, "right, %": answers.peft };
  print(given.json, [{ question: QUESTION, rows: [row, peer], notes: [note] }]);
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

/** Right answers to the test rows, means over tasks, in %. @param {Uint8Array} pack */
function answersOf(pack) {
  return suite.withSession([pack], async (session) => {
    const shares = [];
    for (const { id } of suite.adapters) {
      const { labels, peft } = /** @type {import("./size/suite.js").Questions} */ ((await suite.questions()).get(id));
      const right = (await suite.ask(session, id)).right / labels.length;
      shares.push({ right, peft: peft.filter((label, i) => label === labels[i]).length / labels.length });
    }
    return { right: 100 * mean(shares.map((one) => one.right)), peft: 100 * mean(shares.map((one) => one.peft)) };
  });
}

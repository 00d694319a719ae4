/**
 * Packs on the pipelines of test/data/pipelines with onnxruntime-web in Node, compared with PEFT's answers. Needs what
 * `transformers.test.ts` needs.
 */
import { execFile } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import t from "tap";
import { folderFor } from "../support/folder.ts";
import {
  type Answer,
  generations,
  goldens,
  MODELS,
  PACKAGE,
  packBytes,
  ranked,
  type Sound,
  sameAnswers,
  skip,
  textOf,
} from "../support/pipelines.ts";

const CLIP = await goldens("clip");
const VIT = await goldens("vit");
const HEARD = await generations<Sound>("whisper");
const READ = await generations<string>("marian");
const prompts = <Prompt>(all: readonly { task: string; prompt: Prompt }[]): Prompt[] =>
  all.filter(({ task }) => task === "base").map(({ prompt }) => prompt);
const PICTURES = [{ picture: 0 }, { picture: 1 }];
const OPTIONS = { max_new_tokens: 12 };
const RUNS = [
  {
    pipeline: "automatic-speech-recognition",
    model: "whisper",
    tasks: ["clinic", "court", null],
    calls: prompts(HEARD).map((sound) => [sound, { ...OPTIONS, language: "en" }]),
  },
  { pipeline: "translation", model: "marian", tasks: ["formal", "slang", null], calls: [[prompts(READ), OPTIONS]] },
  {
    pipeline: "zero-shot-image-classification",
    model: "clip",
    tasks: ["animals", "weather", null],
    calls: [[PICTURES, CLIP.labels]],
  },
  { pipeline: "image-classification", model: "vit", tasks: ["fish", null], calls: [[PICTURES, { top_k: 4 }]] },
];

t.test("onnxruntime-web answers as PEFT does", { skip }, async (t) => {
  const folder = folderFor(t);
  const runs: object[] = [];
  for (const run of RUNS) {
    const pack = join(folder, `${run.model}.eigen`);
    await writeFile(pack, await packBytes(run.model));
    runs.push({ ...run, pack });
  }
  const plan = join(folder, "plan.json");
  await writeFile(plan, JSON.stringify({ models: MODELS, runs }));
  const main = fileURLToPath(new URL("../support/pipelines-main.js", import.meta.url));
  const { stdout } = await promisify(execFile)(process.execPath, [main, PACKAGE, plan]);
  const said = JSON.parse(stdout.slice(stdout.lastIndexOf("\n") + 1)) as {
    model: string;
    task: string | null;
    answer: never;
  }[];
  const of = (model: string): typeof said => said.filter((one) => one.model === model);
  for (const model of ["whisper", "marian"]) t.equal(of(model).length, model === "whisper" ? 6 : 3);
  const texts = (task: string | null, all: { task: string; ids: number[] }[], special: number): string[] =>
    all.filter((one) => one.task === (task ?? "base")).map(({ ids }) => textOf(ids, special));
  for (const task of ["clinic", "court", null]) {
    const found = of("whisper").filter((one) => one.task === task);
    t.same(
      found.map(({ answer: { text } }) => text),
      texts(task, HEARD, 0),
      `whisper, ${task}`,
    );
  }
  for (const { task, answer } of of("marian"))
    t.same(
      (answer as { translation_text: string }[]).map(({ translation_text: text }) => text),
      texts(task, READ, 5),
      `marian, ${task}`,
    );
  t.same([of("clip").length, of("vit").length], [3, 2]);
  const labels = [0, 1, 2, 3].map((i) => `base ${i}`);
  for (const { task, answer } of of("clip"))
    sameAnswers(t, answer as Answer[][], ranked(CLIP.answers[task ?? "base"]!.logits, CLIP.labels), `clip, ${task}`);
  for (const { task, answer } of of("vit"))
    sameAnswers(t, answer as Answer[][], ranked(VIT.answers[task ?? "base"]!.logits, labels), `vit, ${task}`);
});

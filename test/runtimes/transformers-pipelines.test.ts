/**
 * Packs on pipelines of transformers.js for pictures, speech and translation, compared with PEFT's answers: tiny ViT, CLIP, Whisper and Marian
 * (test/data/pipelines), CLIP as one session and as two models; on onnxruntime-node, then on onnxruntime-web. Needs what `transformers.test.ts`
 * needs.
 */

import { execFile } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import { folderFor } from "../support/folder.ts";
import {
  type Answer,
  generations,
  goldens,
  MODELS,
  PACKAGE,
  type Pipe,
  packBytes,
  packOn,
  pipelineOn,
  ranked,
  type Sound,
  sameAnswers,
  skip,
  type Tensor,
  textOf,
  transformers,
} from "../support/pipelines.ts";
import { pictureOf, soundOf } from "../support/pipelines-inputs.js";
import { difference, MODES, refusal } from "../support/sessions.ts";

const CLIP = await goldens("clip");
const VIT = await goldens("vit");
const TEXTS = CLIP.labels.map((label) => `This is a photo of ${label}`);

/** The two pictures of the goldens. */
async function pictures(): Promise<object[]> {
  const { RawImage } = await transformers();
  return [0, 1].map((number) => {
    return new RawImage(pictureOf(number), 8, 8, 3);
  });
}

async function classifies(t: Test, pipe: Pipe, task: string | null, labels: string[], how: string): Promise<void> {
  const found = (await pipe(await pictures(), { top_k: 4 })) as Answer[][];
  sameAnswers(t, found, ranked(VIT.answers[task ?? "base"]!.logits, labels), `${how}, ${task}`);
}

async function compares(t: Test, pipe: Pipe, task: string | null, how: string): Promise<void> {
  const found = (await pipe(await pictures(), CLIP.labels)) as Answer[][];
  sameAnswers(t, found, ranked(CLIP.answers[task ?? "base"]!.logits, CLIP.labels), `${how}, ${task}`);
}

const names = (what: string): string[] => [0, 1, 2, 3].map((i) => `${what}${i}`);

t.test("image-classification: a ViT answers as PEFT's model does", { skip }, async (t) => {
  const pipe = await pipelineOn("image-classification", "vit");
  await classifies(t, pipe, null, names("base "), "without a pack");
  for (const mode of [...MODES, undefined]) {
    const pack = await packOn("vit");
    // Nothing shows onnxruntime's tensors if there is no tokenizer.
    const tasks = await attachPack(pipe, pack, { model: "vit", mode });
    // A head without names.
    await tasks.switchTask("birds");
    await classifies(t, pipe, "birds", names("LABEL_"), String(mode));
    await tasks.switchTask("fish");
    await classifies(t, pipe, "fish", names("base "), String(mode));
    await tasks.switchTask(null);
    await classifies(t, pipe, null, names("base "), String(mode));
    await tasks.switchTask("birds");
    await tasks.close();
    await pack.close();
    await classifies(t, pipe, null, names("base "), `${mode}, closed`);
  }
  await pipe.dispose();
});

t.test("zero-shot-image-classification: CLIP in one file answers as PEFT's model does", { skip }, async (t) => {
  const pipe = await pipelineOn("zero-shot-image-classification", "clip");
  await compares(t, pipe, null, "without a pack");
  for (const mode of [...MODES, undefined]) {
    const pack = await packOn("clip");
    const tasks = await attachPack(pipe, pack, { model: "clip", mode });
    t.same(tasks.session.leftOut, []);
    for (const task of ["animals", "weather", null] as const) {
      await tasks.switchTask(task);
      await compares(t, pipe, task, String(mode));
    }
    await tasks.switchTask("animals");
    await tasks.close();
    await pack.close();
    await compares(t, pipe, null, `${mode}, closed`);
  }
  await pipe.dispose();
});

/** Models for embeddings; a model may be attached to as a pipeline is. */
async function towers(): Promise<{ text: Embedder; image: Embedder }> {
  const { AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection } =
    await transformers();
  const options = { dtype: "fp32" };
  const tokenizer = await AutoTokenizer.from_pretrained("clip");
  const processor = await AutoProcessor.from_pretrained("clip");
  const text = await CLIPTextModelWithProjection.from_pretrained("clip", options);
  const image = await CLIPVisionModelWithProjection.from_pretrained("clip", options);
  const said = async (): Promise<Tensor> => (await text(tokenizer(TEXTS, { padding: true })))["text_embeds"]!;
  const seen = async (): Promise<Tensor> => (await image(await processor(await pictures())))["image_embeds"]!;
  return { text: { model: text, tokenizer, embed: said }, image: { model: image, embed: seen } };
}
interface Embedder {
  model: Pipe["model"];
  tokenizer?: Pipe["tokenizer"];
  embed(): Promise<Tensor>;
}

t.test("CLIP's towers as models of their own, each with its part of one pack", { skip }, async (t) => {
  const all = await towers();
  const pack = await packOn("clip");
  t.teardown(() => pack.close());
  const holds = async (which: "text" | "image", task: string | null, how: string): Promise<void> => {
    const off = difference((await all[which].embed()).data, CLIP.answers[task ?? "base"]![which]);
    t.ok(off < 2e-5, `${how}, ${which}, ${task}: off by ${off}`);
  };
  const attached = new Map<"text" | "image", AttachedPack>();
  for (const [which, tower] of [
    ["text", /^text_/],
    ["image", /^vis(ion|ual)_/],
  ] as const) {
    const attach = (options: Partial<AttachOptions>): Promise<AttachedPack> =>
      attachPack(all[which], pack, { model: "clip", ...options });
    t.match(await refusal(() => attach({})), { tag: "base" }, "the other tower is not here");
    attached.set(which, await attach({ modules: (module) => tower.test(module) }));
  }
  for (const task of ["animals", "weather", null, "weather"] as const) {
    for (const which of ["text", "image"] as const) {
      await attached.get(which)!.switchTask(task);
      await holds(which, task, "attached");
    }
  }
  await attached.get("text")!.switchTask("animals");
  await holds("text", "animals", "apart");
  await holds("image", "weather", "apart");
  for (const which of ["text", "image"] as const) {
    await attached.get(which)!.close();
    await holds(which, null, "closed");
    await all[which].model.dispose();
  }
});

const TASKS = { whisper: ["clinic", "court", null], marian: ["formal", "slang", null] } as const;
const OPTIONS = { max_new_tokens: 12 };

async function transcribes(t: Test, pipe: Pipe, task: string | null, how: string): Promise<void> {
  // Each token is a character.
  for (const { prompt, ids } of (await generations<Sound>("whisper")).filter((one) => one.task === (task ?? "base")))
    t.same(await pipe(soundOf(prompt), { ...OPTIONS, language: "en" }), { text: textOf(ids, 0) }, `${how}, ${task}`);
}

async function translates(t: Test, pipe: Pipe, task: string | null, how: string): Promise<void> {
  const { Tensor } = await transformers();
  const all = (await generations<string>("marian")).filter((one) => one.task === (task ?? "base"));
  for (const { prompt, ids, logits } of all) {
    const inputs = pipe.tokenizer(prompt);
    // The model's own configuration asks for four beams.
    for (const options of [OPTIONS, { ...OPTIONS, num_beams: 1 }]) {
      const found = await pipe.model.generate({ ...inputs, ...options });
      t.same(found.tolist()[0]!.map(Number).slice(1), ids, `${how}, ${task}: ${prompt}`);
    }
    const first = await pipe.model({ ...inputs, decoder_input_ids: new Tensor("int64", [2n], [1, 1]) });
    t.ok(difference(first["logits"]!.data, logits) < 5e-5, `${how}, ${task}: logits`);
  }
  const expected = all.map(({ ids }) => ({ translation_text: textOf(ids, 5) }));
  t.same(
    await pipe(
      all.map(({ prompt }) => prompt),
      OPTIONS,
    ),
    expected,
    `${how}, ${task}: texts of a padded batch`,
  );
}

for (const [name, pipeline, holds, left] of [
  ["whisper", "automatic-speech-recognition", transcribes, [10, 6]],
  ["marian", "translation", translates, [10, 6]],
] as const) {
  t.test(`${name}: encoder and decoder answer as PEFT's model does`, { skip }, async (t) => {
    const pipe = await pipelineOn(pipeline, name);
    await holds(t, pipe, null, "without a pack");
    for (const mode of ["factors", "folded", undefined] as const) {
      const pack = await packOn(name);
      const tasks: AttachedPack = await attachPack(pipe, pack, { model: name, mode });
      t.same(
        Object.values(tasks.sessions).map(({ leftOut }) => leftOut.length),
        left,
      );
      for (const task of TASKS[name]) {
        await tasks.switchTask(task);
        await holds(t, pipe, task, String(mode));
      }
      await tasks.close();
      await pack.close();
      await holds(t, pipe, null, `${mode}, closed`);
    }
    await pipe.dispose();
  });
}

const HEARD = await generations<Sound>("whisper");
const READ = await generations<string>("marian");
const prompts = <Prompt>(all: readonly { task: string; prompt: Prompt }[]): Prompt[] =>
  all.filter(({ task }) => task === "base").map(({ prompt }) => prompt);
const PICTURES = [{ picture: 0 }, { picture: 1 }];
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

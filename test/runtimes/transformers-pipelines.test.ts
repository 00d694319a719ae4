/**
 * Packs on pipelines of transformers.js for pictures, speech and translation, compared with PEFT's answers: tiny ViT,
 * CLIP, Whisper and Marian (test/data/pipelines), CLIP as one session and as two models; on onnxruntime-node, then on
 * onnxruntime-web. Needs what `transformers.test.ts` needs.
 */

import { execFile } from "node:child_process";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import { folderFor, fromRoot } from "../support/folder.ts";
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
import { inputOf } from "../support/pipelines-inputs.js";
import { difference, MODES, refusal } from "../support/sessions.ts";

const CLIP = await goldens("clip");
const VIT = await goldens("vit");
const HEARD = await generations<Sound>("pipelines/whisper/generations.json");
const READ = await generations("pipelines/marian/generations.json");
const TEXTS = CLIP.labels.map((label) => `This is a photo of ${label}`);
const PICTURES = [{ picture: 0 }, { picture: 1 }];
const OPTIONS = { max_new_tokens: 12 };

const of = <One extends { task: string }>(all: readonly One[], task: string | null): One[] =>
  all.filter((one) => one.task === (task ?? "base"));

/**
 * Pipelines by model: tasks, calls with descriptions of their inputs, modes, and how many modules each session leaves
 * to the other.
 */
const PIPELINES = {
  vit: {
    pipeline: "image-classification",
    tasks: ["birds", "fish", null],
    calls: [[PICTURES, { top_k: 4 }]],
    modes: [...MODES, undefined],
    leftOut: [0],
  },
  clip: {
    pipeline: "zero-shot-image-classification",
    tasks: ["animals", "weather", null],
    calls: [[PICTURES, CLIP.labels]],
    modes: [...MODES, undefined],
    leftOut: [0],
  },
  whisper: {
    pipeline: "automatic-speech-recognition",
    tasks: ["clinic", "court", null],
    calls: of(HEARD, null).map(({ prompt }) => [prompt, { ...OPTIONS, language: "en" }]),
    modes: ["factors", "folded", undefined],
    leftOut: [10, 6],
  },
  marian: {
    pipeline: "translation",
    tasks: ["formal", "slang", null],
    calls: [[of(READ, null).map(({ prompt }) => prompt), OPTIONS]],
    modes: ["factors", "folded", undefined],
    leftOut: [10, 6],
  },
} as const;
type Model = keyof typeof PIPELINES;
const NAMES = Object.keys(PIPELINES) as Model[];

/** Checks a pipeline's answers to its calls. Each token of a text is a character. */
function agrees(t: Test, model: Model, task: string | null, answers: readonly unknown[], how: string): void {
  const what = `${how}, ${model}, ${task}`;
  const texts = (all: typeof HEARD | typeof READ, special: number): string[] =>
    of<{ task: string; ids: number[] }>(all, task).map(({ ids }) => textOf(ids, special));
  // A head that a task brings has no names.
  const labels = [0, 1, 2, 3].map((i) => `${task === "birds" ? "LABEL_" : "base "}${i}`);
  if (model === "whisper") {
    const expected = texts(HEARD, 0).map((text) => ({ text }));
    t.same(answers, expected, what);
  } else if (model === "marian") {
    const expected = texts(READ, 5).map((text) => ({ translation_text: text }));
    t.same(answers, [expected], what);
  } else {
    const [golden, names] = model === "vit" ? [VIT, labels] : [CLIP, CLIP.labels];
    sameAnswers(t, answers[0] as Answer[][], ranked(golden.answers[task ?? "base"]!.logits, names), what);
  }
}

async function holds(t: Test, model: Model, pipe: Pipe, task: string | null, how: string): Promise<void> {
  const { RawImage } = await transformers();
  const answers: unknown[] = [];
  for (const call of PIPELINES[model].calls)
    answers.push(await pipe(...call.map((value: unknown) => inputOf(value, RawImage))));
  agrees(t, model, task, answers, how);
  if (model === "marian") await translates(t, pipe, task, how);
}

/** Checks tokens, with the four beams that Marian's own configuration asks for and without, and logits. */
async function translates(t: Test, pipe: Pipe, task: string | null, how: string): Promise<void> {
  const { Tensor } = await transformers();
  for (const { prompt, ids, logits } of of(READ, task)) {
    const inputs = pipe.tokenizer(prompt);
    for (const options of [OPTIONS, { ...OPTIONS, num_beams: 1 }]) {
      const found = await pipe.model.generate({ ...inputs, ...options });
      t.same(found.tolist()[0]!.map(Number).slice(1), ids, `${how}, ${task}: ${prompt}`);
    }
    const first = await pipe.model({ ...inputs, decoder_input_ids: new Tensor("int64", [2n], [1, 1]) });
    t.ok(difference(first["logits"]!.data, logits) < 5e-5, `${how}, ${task}: logits`);
  }
}

for (const name of NAMES) {
  const { pipeline, tasks, modes, leftOut } = PIPELINES[name];
  t.test(`${pipeline}: ${name} answers as PEFT's model does`, { skip }, async (t) => {
    const pipe = await pipelineOn(pipeline, name);
    await holds(t, name, pipe, null, "without a pack");
    for (const mode of modes) {
      const pack = await packOn(name);
      const attached: AttachedPack = await attachPack(pipe, pack, { model: name, mode });
      const left = Object.values(attached.sessions).map(({ leftOut }) => leftOut.length);
      t.same(left, leftOut);
      for (const task of [...tasks, tasks[0]]) {
        await attached.switchTask(task);
        await holds(t, name, pipe, task, String(mode));
      }
      await attached.close();
      await pack.close();
      await holds(t, name, pipe, null, `${mode}, closed`);
    }
    await pipe.dispose();
  });
}

/** Models for embeddings; a model may be attached to as a pipeline is. */
async function towers(): Promise<{ text: Embedder; image: Embedder }> {
  const { AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage } =
    await transformers();
  const options = { dtype: "fp32" };
  const tokenizer = await AutoTokenizer.from_pretrained("clip");
  const processor = await AutoProcessor.from_pretrained("clip");
  const text = await CLIPTextModelWithProjection.from_pretrained("clip", options);
  const image = await CLIPVisionModelWithProjection.from_pretrained("clip", options);
  const said = async (): Promise<Tensor> => (await text(tokenizer(TEXTS, { padding: true })))["text_embeds"]!;
  const seen = async (): Promise<Tensor> =>
    (await image(await processor(inputOf(PICTURES, RawImage))))["image_embeds"]!;
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

t.test("onnxruntime-web answers as PEFT does", { skip }, async (t) => {
  const folder = folderFor(t);
  const runs: object[] = [];
  for (const model of NAMES) {
    const pack = join(folder, `${model}.eigen`);
    await writeFile(pack, await packBytes(model));
    runs.push({ ...PIPELINES[model], model, pack });
  }
  const plan = join(folder, "plan.json");
  await writeFile(plan, JSON.stringify({ models: MODELS, runs }));
  const main = fromRoot("test/support/pipelines-main.js");
  const { stdout } = await promisify(execFile)(process.execPath, [main, PACKAGE, plan]);
  const said = JSON.parse(stdout.slice(stdout.lastIndexOf("\n") + 1)) as {
    model: string;
    task: string | null;
    answer: unknown;
  }[];
  for (const model of NAMES) {
    for (const task of PIPELINES[model].tasks) {
      const own = said.filter((one) => one.model === model && one.task === task);
      const answers = own.map(({ answer }) => answer);
      agrees(t, model, task, answers, "onnxruntime-web");
    }
  }
});

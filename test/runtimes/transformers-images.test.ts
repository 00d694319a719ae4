/**
 * Packs on pipelines of transformers.js for pictures, compared with PEFT's answers: a tiny ViT and a tiny CLIP (test/data/pipelines),
 * CLIP as one session, and as two models. Needs what `transformers.test.ts` needs.
 */
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import {
  type Answer,
  goldens,
  type Pipe,
  packOn,
  pipelineOn,
  ranked,
  sameAnswers,
  skip,
  type Tensor,
  transformers,
} from "../support/pipelines.ts";
import { pictureOf } from "../support/pipelines-inputs.js";
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

/**
 * Packs on pipelines of transformers.js whose model has several sessions, compared with PEFT's answers: a tiny FLAN-T5
 * (test/data/seq2seq); and switches in the middle of a stream. Needs what `transformers.test.ts` needs.
 */
import { cp, symlink } from "node:fs/promises";
import { join } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t from "tap";
import { relativeDifference } from "../support/compare.ts";
import { folderFor } from "../support/folder.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import {
  type Generation,
  generate,
  generations,
  type Pipe,
  packOn,
  pipelineOn,
  skip,
  textOf,
  transformers,
} from "../support/pipelines.ts";
import { MODES, refusal } from "../support/sessions.ts";

const ENCODER = "model";
const DECODER = "decoder_model_merged";
const TASKS = ["answers", "titles", null] as const;
const GENERATIONS = await generations("seq2seq/generations.json");
const PROMPTS = [...new Set(GENERATIONS.map(({ prompt }) => prompt))];
const of = (task: string | null, prompt: string): Generation<string> =>
  GENERATIONS.find((one) => one.task === (task ?? "base") && one.prompt === prompt)!;

const ADAPTERS = ["seq2seq/adapters"];
const { bytes: whole } = await packOf(ADAPTERS, { ...LOSSLESS, base: data("seq2seq/base.safetensors") });
async function opened(bytes = whole): Promise<Pack> {
  const pack = await openPack(bytes);
  t.teardown(() => pack.close());
  return pack;
}

const models = folderFor(t);
await symlink(data("seq2seq"), join(models, "seq2seq"));

const load = () => transformers(models);
const pipeOn = async (): Promise<Pipe> => (await load()).pipeline("text2text-generation", "seq2seq", { dtype: "fp32" });
const attach = (pipe: Pipe, pack: Pack, options: Partial<AttachOptions> = {}): Promise<AttachedPack> =>
  attachPack(pipe, pack, { model: "seq2seq", ...options });

/** Checks that tokens, texts one by one and in a batch, and logits are PEFT's. */
async function holds(t: Tap, pipe: Pipe, task: string | null, how: string): Promise<void> {
  const { Tensor } = await load();
  for (const prompt of PROMPTS) {
    const { ids, logits } = of(task, prompt);
    t.same(await generate(pipe, prompt), ids, `${how}, ${task}: tokens of ${prompt}`);
    const start = { decoder_input_ids: new Tensor("int64", [0n], [1, 1]) };
    const found = await pipe.model({ ...pipe.tokenizer(prompt), ...start });
    const off = relativeDifference(found["logits"]!.data, logits);
    t.ok(off < 2e-5, `${how}, ${task}: logits off by ${off}`);
  }
  const expected = PROMPTS.map((prompt) => ({ generated_text: textOf(of(task, prompt).ids, 2) }));
  t.same(await pipe(PROMPTS, { max_new_tokens: 12 }), expected, `${how}, ${task}: texts of a padded batch`);
}
type Tap = Pick<typeof t, "same" | "ok">;

t.test("encoder and decoder answer as PEFT's model does, in every mode", { skip }, async (t) => {
  const pipe = await pipeOn();
  const { constructor } = pipe.model.sessions[ENCODER];
  await holds(t, pipe, null, "without a pack");
  for (const mode of [...MODES, undefined]) {
    const tasks = await attach(pipe, await opened(), { mode });
    t.same(Object.keys(tasks.sessions), [ENCODER, DECODER]);
    const all = Object.values(tasks.sessions);
    t.same(
      all.map(({ leftOut }) => leftOut.length),
      [8, 4],
      "modules that live in the other session",
    );
    t.same(
      all.map(({ unconfirmed }) => unconfirmed),
      [[], []],
    );
    t.throws(() => tasks.session, {
      name: "TypeError",
      message: /several sessions, "model", "decoder_model_merged"; take one of `sessions`/,
    });
    t.equal(tasks.task, null);
    for (const task of TASKS) {
      t.equal((await tasks.switchTask(task)).task, task);
      t.same([tasks.task, ...all.map((one) => one.task)], [task, task, task]);
      await holds(t, pipe, task, String(mode));
    }
    const active = all.reduce((sum, one) => sum + one.memory().active, 0);
    t.equal(tasks.memory().active, active);
    await tasks.switchTask("titles");
    await tasks.close();
    await tasks.close();
    for (const name of [ENCODER, DECODER] as const) t.equal(pipe.model.sessions[name].constructor, constructor, name);
    t.notOk(Object.hasOwn(pipe, "_call") || Object.hasOwn(pipe.model, "generate"));
    await holds(t, pipe, null, "after close");
    t.match(await refusal(() => tasks.switchTask("titles")), { tag: "backend", message: /closed/ });
  }
  await pipe.dispose();
});

t.test("a generation is wholly one task's", { skip }, async (t) => {
  const pipe = await pipeOn();
  const attaching = attach(pipe, await opened());
  const before = generate(pipe, PROMPTS[0]!);
  const tasks = await attaching;
  t.same(await before, of(null, PROMPTS[0]!).ids, "a call made meanwhile waits");
  await tasks.switchTask("answers");
  const order: string[] = [];
  let steps = 0;
  const streamer = { put: () => void (steps++ === 2 && void switched()), end: () => undefined };
  let done: Promise<unknown> | undefined;
  // The switch is asked for in the middle of the generation, by its third token.
  const switched = (): void => {
    done = tasks.switchTask("titles").then(() => order.push("switch"));
  };
  const prompt = PROMPTS[0]!;
  const ids = await pipe.model.generate({ ...pipe.tokenizer(prompt), max_new_tokens: 12, streamer });
  order.push("generation");
  t.same(ids.tolist()[0]!.map(Number).slice(1), of("answers", prompt).ids);
  t.same(await generate(pipe, prompt), of("titles", prompt).ids, "calls made after wait for the switch");
  await done;
  t.same(order, ["generation", "switch"]);
  const work: Promise<unknown>[] = [];
  for (let i = 0; i < 24; i++) {
    const [task, prompt] = [TASKS[i % 3]!, PROMPTS[i % 2]!];
    work.push(tasks.switchTask(task));
    work.push(generate(pipe, prompt).then((ids) => t.same(ids, of(task, prompt).ids, `overlapping, ${task}`)));
  }
  await Promise.all(work);
  await pipe.dispose();
  t.match(await refusal(() => tasks.switchTask("titles")), { tag: "backend", message: /closed/ });
});

t.test("what cannot be is refused and leaves the pipeline as it was", { skip }, async (t) => {
  const pipe = await pipeOn();
  const own = { ...pipe.model.sessions };
  const refused = async (options: Partial<AttachOptions>, pack?: Pack): Promise<Error> =>
    refusal(async () => attach(pipe, pack ?? (await opened()), options));
  const path = join(models, "seq2seq/onnx/decoder_model_merged.onnx");
  t.match(await refused({ model: path }), {
    name: "TypeError",
    message: /sessions "model", "decoder_model_merged", and `model` is one file: pass the id.*\{ part \}/,
  });
  t.match(await refused({ part: "decoder" }), { name: "TypeError", message: /^part: .*got "decoder"/ });
  t.match(await refused({ probe: {} as never }), { name: "TypeError", message: /probe: .*\{ part \}/ });
  t.match(await refused({ trainable: true }), { name: "TypeError", message: /trainable: .*\{ part \}/ });
  t.match(await refused({ mode: "fast" as never }), { name: "RangeError", message: /mode/ });
  t.match(await refused({ session: { executionProviders: ["nonsense"] } }), { tag: "backend", message: /nonsense/ });
  const plain = await opened((await packOf(ADAPTERS, LOSSLESS)).bytes);
  t.match(await refused({}, plain), {
    tag: "base",
    message: /"encoder\.block.*in none of the sessions.*no fingerprint confirms: make the pack with its base/,
  });
  t.match(await refused({ model: "decoder" }), { tag: "source", message: /does not find the model again/ });
  // The decoder's file is a copy of the encoder's, which is found out when both sessions are made already.
  await cp(data("seq2seq"), join(models, "copies"), { recursive: true });
  const file = join(models, "copies/onnx/decoder_model_merged.onnx");
  await cp(data("seq2seq/onnx/encoder_model.onnx"), file);
  t.match(await refused({ model: "copies" }), { tag: "base", message: /"decoder\.block.*in none/ });
  await cp(data("decoder/onnx/model.onnx"), file);
  const message = /decoder_model_merged: no module of .*, only "lm_head", which the option `ignore` leaves out/;
  t.match(await refused({ model: "copies" }), { tag: "base", message });
  t.same({ ...pipe.model.sessions }, own);
  t.ok(Object.entries(own).every(([name, session]) => pipe.model.sessions[name] === session));
  t.notOk(Object.hasOwn(pipe, "_call") || Object.hasOwn(pipe.model, "generate"));
  await holds(t, pipe, null, "after all of these");
  await pipe.dispose();
});

t.test("a pack that lives in no session is told what each of them said", { skip }, async (t) => {
  const pipe = await pipelineOn("automatic-speech-recognition", "whisper");
  const other = await packOn("marian");
  t.match(await refusal(() => attachPack(pipe, other, { model: "whisper" })), {
    tag: "base",
    message:
      /lives in none of the sessions \(model: .* is not in the base; .*; decoder_model_merged: .* is not the weight that .* was trained on/,
  });
  await other.close();
  await pipe.dispose();
  const clip = await pipelineOn("zero-shot-image-classification", "clip");
  const wrong = await packOn("whisper");
  const error = await refusal(() => attachPack(clip, wrong, { model: "clip" }));
  t.match(error, { tag: "base", message: /^session "model": "model\.\w+\.layers.* is not in the base/ });
  await wrong.close();
  await clip.dispose();
});

t.test("a stream of a causal model is one task's; a switch asked for meanwhile waits", { skip }, async (t) => {
  const all = await generations("decoder/goldens.json");
  const { prompt } = all[0]!;
  const said = (task: string): string => textOf(all.find((one) => one.task === task && one.prompt === prompt)!.ids, 1);
  const { pipeline, TextStreamer } = await transformers(data("."));
  const pipe = await pipeline("text-generation", "decoder", { dtype: "fp32" });
  const pack = await openPack((await packOf(["decoder/adapters/upper", "decoder/adapters/lower"], LOSSLESS)).bytes);
  const tasks = await attachPack(pipe, pack, { model: "decoder" });
  await tasks.switchTask("upper");
  const order: string[] = [];
  const streamed = async (asked: () => void): Promise<string> => {
    let text = "";
    const callback_function = (piece: string): void => {
      if (text === "") asked();
      text += piece;
    };
    const streamer = new TextStreamer(pipe.tokenizer, { skip_prompt: true, callback_function });
    await pipe(prompt, { max_new_tokens: 12, do_sample: false, streamer });
    return text;
  };
  let switched: Promise<unknown> = Promise.resolve();
  const first = await streamed(() => {
    switched = tasks.switchTask("lower").then(() => order.push("switch"));
  });
  order.push("stream");
  t.equal(first, said("upper"));
  t.equal(await streamed(() => order.push("next")), said("lower"), "calls made after wait for the switch");
  await switched;
  t.same(order, ["stream", "switch", "next"]);
  t.equal(tasks.task, "lower");
  await pipe.dispose();
  await pack.close();
});

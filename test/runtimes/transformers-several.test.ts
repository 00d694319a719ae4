/**
 * Pipelines of transformers.js with several sessions: turns of calls and switches, one pack, options for each session, and switches in
 * the middle of a stream: on the tiny Whisper of test/data/pipelines and the decoder of test/data/decoder. Needs what
 * `transformers.test.ts` needs.
 */
import { readFile } from "node:fs/promises";
import { openPack, type Pack } from "eigenlora";
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t from "tap";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { generations, type Pipe, packOn, pipelineOn, type Sound, skip, transformers } from "../support/pipelines.ts";
import { soundOf } from "../support/pipelines-inputs.js";
import { refusal } from "../support/sessions.ts";

/** Features of one sound, as the tiny Whisper takes them. */
async function features(pipe: Pipe): Promise<object> {
  return (await pipe.processor(soundOf(SOUND)))["input_features"]!;
}
async function heard(pipe: Pipe, inputs: object): Promise<number[]> {
  return (await pipe.model.generate({ inputs, max_new_tokens: 12, language: "en" })).tolist()[0]!.map(Number).slice(4);
}
const whisper = (): Promise<Pipe> => pipelineOn("automatic-speech-recognition", "whisper");
const attach = (pipe: Pipe, pack: Pack, options: Partial<AttachOptions> = {}): Promise<AttachedPack> =>
  attachPack(pipe, pack, { model: "whisper", ...options });
async function opened(only?: (module: string) => boolean): Promise<Pack> {
  const pack = await packOn("whisper", only);
  t.teardown(() => pack.close());
  return pack;
}
const HEARD = await generations<Sound>("whisper");
const SOUND = HEARD[0]!.prompt;
const SAID = new Map(HEARD.flatMap(({ task, prompt, ids }) => (prompt.samples === SOUND.samples ? [[task, ids]] : [])));

t.test("calls and switches take turns, whichever object has the model", { skip }, async (t) => {
  const pipe = await whisper();
  const attaching = attach(pipe, await opened());
  const inputs = await features(pipe);
  const before = heard(pipe, inputs);
  const tasks = await attaching;
  t.same(await before, SAID.get("base"), "a call made meanwhile waits");
  const work: Promise<unknown>[] = [];
  for (const task of ["clinic", null, "court", "clinic", "court", null]) {
    work.push(tasks.switchTask(task));
    for (let i = 0; i < 2; i++)
      work.push(heard(pipe, inputs).then((ids) => t.same(ids, SAID.get(task ?? "base"), `${task}`)));
  }
  await Promise.all(work);
  await pipe.dispose();
});

t.test("a pack that lives in no session is told what each of them said", { skip }, async (t) => {
  const pipe = await whisper();
  const other = await packOn("marian");
  t.match(await refusal(() => attach(pipe, other)), {
    tag: "base",
    message:
      /lives in none of the sessions \(model: .* is not in the base; .*; decoder_model_merged: .* is not the weight that .* was trained on/,
  });
  await other.close();
  await pipe.dispose();
  const clip = await pipelineOn("zero-shot-image-classification", "clip");
  const wrong = await opened();
  const error = await refusal(() => attachPack(clip, wrong, { model: "clip" }));
  t.match(error, { tag: "base", message: /^session "model": "model\.\w+\.layers.* is not in the base/ });
  await clip.dispose();
});

t.test("a stream of a causal model is one task's; a switch asked for meanwhile waits", { skip }, async (t) => {
  interface Generation {
    task: string;
    prompt: string;
    ids: number[];
  }
  const all = JSON.parse(await readFile(data("decoder/goldens.json"), "utf8")) as Generation[];
  const { prompt } = all[0]!;
  const of = (task: string): string =>
    all
      .find((one) => one.task === task && one.prompt === prompt)!
      .ids.map((id) => (id === 0 ? "" : id === 95 ? " " : String.fromCharCode(32 + id)))
      .join("");
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
  t.equal(first, of("upper"));
  t.equal(await streamed(() => order.push("next")), of("lower"), "calls made after wait for the switch");
  await switched;
  t.same(order, ["stream", "switch", "next"]);
  t.equal(tasks.task, "lower");
  await pipe.dispose();
  await pack.close();
});

/**
 * Packs on pipelines of transformers.js that transcribe and translate, compared with PEFT's answers: a tiny Whisper and a tiny Marian
 * (test/data/pipelines). Needs what `transformers.test.ts` needs.
 */
import { createTrainer, type Encode } from "eigenlora/train";
import { type AttachedPack, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import { data } from "./packs.ts";
import { generations, type Pipe, packOn, pipelineOn, type Sound, skip, textOf, transformers } from "./pipelines.ts";
import { soundOf } from "./pipelines-inputs.js";
import { difference, NODE, open } from "./sessions.ts";

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

t.test("marian: the pipeline says what was learned on both files joined", { skip }, async (t) => {
  const pipe = await pipelineOn("translation", "marian");
  const { Tensor } = await transformers();
  const pack = await packOn("marian");
  const of = (name: string): string => data(`pipelines/marian/onnx/${name}.onnx`);
  const parts = { encoder: of("encoder_model"), decoder: of("decoder_model_merged") };
  const session = await open(NODE, parts, pack, { trainable: true });
  const encode = pipe.tokenizer as unknown as Encode;
  const trainer = await createTrainer(session, { encode, decoderStart: 2, seed: 5, train: "lora", rank: 8 });
  const examples = ["cat", "owl"].map((prompt, i) => ({ prompt, completion: ["chat", "hibou"][i]! }));
  const how = { steps: 200, batch: 2, holdout: 0, learningRates: { terms: 0.03 } };
  for await (const _ of trainer.fit(examples, how));
  t.same((await trainer.score(examples)).accuracy, 1, "by heart");
  await session.addTask("french", await trainer.task());
  await session.switchTask("french");
  const { input_ids, attention_mask } = pipe.tokenizer("owl");
  const decoder_input_ids = new Tensor("int64", [2n, 12n, 40n], [1, 3]);
  const own = ({ data, dims }: { data: unknown; dims: number[] }) =>
    new NODE.Tensor("int64", data as BigInt64Array, [...dims]);
  const feeds = {
    input_ids: own(input_ids!),
    attention_mask: own(attention_mask!),
    decoder_input_ids: own(decoder_input_ids),
  };
  const joined = (await session.run(feeds))["logits"]!.data as Float32Array;
  await session.close();

  const tasks = await attachPack(pipe, pack, { model: "marian" });
  await tasks.switchTask("french");
  const { logits } = await pipe.model({ input_ids, attention_mask, decoder_input_ids });
  const off = difference(logits!.data, joined);
  t.ok(off < 5e-5, `logits are the joined model's: off by ${off}`);
  // The model's own configuration asks for four beams, and the learned answers are those of greedy decoding.
  for (const { prompt, completion } of examples)
    t.same(await pipe(prompt, { ...OPTIONS, num_beams: 1 }), [{ translation_text: completion }]);
  await pipe.dispose();
  await pack.close();
});

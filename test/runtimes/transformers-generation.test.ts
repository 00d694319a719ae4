import { type AttachedPack, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import {
  generations,
  type Pipe,
  packOn,
  pipelineOn,
  type Sound,
  skip,
  textOf,
  transformers,
} from "../support/pipelines.ts";
import { soundOf } from "../support/pipelines-inputs.js";
import { difference } from "../support/sessions.ts";

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

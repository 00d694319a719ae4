/**
 * Single files of an encoder and a decoder: refused by name before anything runs, with advice.
 */
import { openPack, type Pack } from "eigenlora";
import { type BatchFeeds, createTrainer } from "eigenlora/train";
import t from "tap";
import { readModel, surveyModel } from "./internals.ts";
import { noise } from "./learning.ts";
import { data, LOSSLESS, packOf } from "./packs.ts";
import { NODE, open, refusal } from "./sessions.ts";

async function opened(): Promise<Pack> {
  const base = data("seq2seq/base.safetensors");
  return openPack((await packOf(["seq2seq/adapters/answers"], { ...LOSSLESS, base })).bytes);
}

const of = (side: string) => (module: string) => module.startsWith(`${side}.`);

t.test("one of several files is refused, with what to do", async (t) => {
  const pack = await opened();
  const refused = (file: string, modules?: (module: string) => boolean) =>
    refusal(() => open(NODE, data(`seq2seq/${file}`), pack, { trainable: true, modules }));
  const decoder = await refused("decoder.onnx");
  t.match(decoder, {
    tag: "base",
    message:
      /decoder\.onnx is the decoder of a model in two files, which cannot be trained by itself: tasks adapt "encoder\./,
  });
  t.match(
    decoder.message,
    /export encoder and decoder as one graph, or train this file's layers alone, with the option `modules`/,
  );
  t.match((await refused("onnx/encoder_model.onnx")).message, /is the encoder of .*: tasks adapt "decoder\./);
  const merged = await refused("onnx/decoder_model_merged.onnx", of("decoder"));
  t.match(merged, { tag: "base", message: /it has a branch for each use of its cache, which gradients do not pass/ });
  const { learning } = await surveyModel(() => readModel(data("seq2seq/onnx/decoder_model_merged.onnx")), pack, {
    modules: of("decoder"),
  });
  t.match(learning, { works: false, why: /it has a branch for each use of its cache/ }, "and told beforehand");
  await pack.close();
});

/** One example of the decoder's inputs: an encoder's output for two tokens, and three tokens. */
function feeds(): BatchFeeds {
  const said = new NODE.Tensor("float32", noise(64, 3), [1, 2, 32]);
  const ids = new NODE.Tensor("int64", BigInt64Array.of(0n, 5n, 7n), [1, 3]);
  const mask = new NODE.Tensor("int64", BigInt64Array.of(1n, 1n), [1, 2]);
  return { input_ids: ids, encoder_hidden_states: said, encoder_attention_mask: mask } as unknown as BatchFeeds;
}

t.test("the decoder's own layers learn alone where that is asked for", async (t) => {
  const pack = await opened();
  const session = await open(NODE, data("seq2seq/decoder.onnx"), pack, { trainable: true, modules: of("decoder") });
  t.ok(session.leftOut.length > 0 && session.leftOut.every((name) => !name.startsWith("decoder.")));
  const trainer = await createTrainer(session, { seed: 1 });
  const step = trainer.fit([{ feeds: feeds(), classes: [5, 7, 9] }], { steps: 1 });
  t.ok((await step.next()).value!.norm > 0);
  await session.close();
  await pack.close();
});

/**
 * Single files of an encoder and a decoder: refused by name before anything runs, with advice.
 */
import { openPack, type Pack } from "eigenlora";
import t from "tap";
import { readModel, surveyModel } from "../support/internals/models.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { NODE, open, refusal } from "../support/sessions.ts";

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
  const { learning } = await surveyModel(await readModel(data("seq2seq/onnx/decoder_model_merged.onnx")), pack, {
    modules: of("decoder"),
  });
  t.match(learning, { works: false, why: /it has a branch for each use of its cache/ }, "and told beforehand");
  await pack.close();
});

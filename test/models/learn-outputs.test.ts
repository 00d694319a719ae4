/**
 * A model's outputs decide whether it can be trained and its packs judged: one row of logits for each text is needed.
 * Over tokens or embeddings one softmax would mix unrelated numbers and report a number all the same.
 */
import { openPack, type Pack } from "eigenlora";
import { type Adapter, buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { type BatchFeeds, createTrainer, distill } from "eigenlora/train";
import t, { type Test } from "tap";
import { fromBinary, type GraphProto, makeNode, makeValue, toBinary } from "../support/internals/models.ts";
import { fitted } from "../support/learning.ts";
import { concat, data, LOSSLESS, packOf } from "../support/packs.ts";
import { modelBytes, NODE, open, refusal } from "../support/sessions.ts";

const [adapter] = await readAdapters([data("sessions/adapters/two")]);
const headless: Adapter = { ...adapter!, saved: [] };
t.teardown(async () => {
  await adapter!.close();
});
const base = data("sessions/base.safetensors");
const bytes = concat((await buildPack([headless], { ...LOSSLESS, base })).chunks);
const texts = Array.from({ length: 8 }, (_, i) => "abcdefgh".slice(0, 2 + (i % 5)));

/** Letters as ids, padded with 0. */
function encode(some: readonly string[]): BatchFeeds {
  const width = Math.max(...some.map(({ length }) => length));
  const row = (value: (letter: number) => number) =>
    BigInt64Array.from(
      some.flatMap((text) =>
        Array.from({ length: width }, (_, i) => BigInt(i < text.length ? value(text.charCodeAt(i) - 96) : 0)),
      ),
    );
  const dims = [some.length, width];
  const [ids, ones, zeros] = [row((letter) => letter), row(() => 1), row(() => 0)];
  return {
    input_ids: { type: "int64", dims, data: ids },
    attention_mask: { type: "int64", dims, data: ones },
    token_type_ids: { type: "int64", dims, data: zeros },
  };
}

/** The encoder with its hidden states [batch, sequence, 32] turned into another output. */
function giving(name: string, add: (graph: GraphProto) => void): Uint8Array {
  const proto = fromBinary("ModelProto", modelBytes("encoder"));
  const graph = proto.graph!;
  add(graph);
  graph.output = [makeValue(name, 1)];
  return toBinary("ModelProto", proto);
}
const HIDDEN = "last_hidden_state";
const mean = (name: string) => (graph: GraphProto) => {
  graph.node.push(makeNode("ReduceMean", name, [HIDDEN], name, { axes: [1], keepdims: 0 }));
};

const REFUSED: Record<string, { model: Uint8Array; output: string; found: string }> = {
  "hidden states": { model: modelBytes("encoder"), output: HIDDEN, found: "batch, input_ids[1], 32" },
  "logits of tokens": {
    model: giving("logits", (graph) => graph.node.push(makeNode("Identity", "logits", [HIDDEN], "logits"))),
    output: "logits",
    found: "batch, input_ids[1], 32",
  },
  "logits of tokens in one list": {
    model: giving("logits", (graph) => graph.node.push(makeNode("Flatten", "logits", [HIDDEN], "logits", { axis: 2 }))),
    output: "logits",
    found: "batch · input_ids[1], 32",
  },
  "an embedding": {
    model: giving("sentence_embedding", mean("sentence_embedding")),
    output: "sentence_embedding",
    found: "batch, 32",
  },
};

async function refuses(t: Test, action: () => Promise<unknown>, output: string, found: string): Promise<void> {
  const error = await action().then(
    () => undefined,
    (cause: Error) => cause,
  );
  t.match(error, { tag: "base", module: output });
  const said = `the model's output "${output}" is [${found}]: training and judging take logits [batch, labels]`;
  t.ok(error?.message.includes(said), error?.message ?? "is not refused");
}

for (const [what, { model, output, found }] of Object.entries(REFUSED)) {
  t.test(`${what}: nothing is trained`, async (t) => {
    const pack = await openPack(bytes);
    const session = await open(NODE, model, pack, { trainable: true });
    await refuses(t, () => distill(session, { adapter: headless, texts, encode, steps: 1 }), output, found);
    await refuses(t, () => createTrainer(session, { labels: ["a", "b"], encode }), output, found);
    await session.close();
  });
}

t.test("one row of logits for each text is trained", async (t) => {
  const model = giving("scores", mean("scores"));
  const pack = await openPack(bytes);
  const session = await open(NODE, model, pack, { trainable: true });
  const labels = Array.from({ length: 32 }, (_, i) => String(i));
  const trainer = await createTrainer(session, { labels, encode });
  const examples = texts.map((text, i) => ({ text, label: i % 2 }));
  const [, , losses] = await fitted(trainer, examples, { steps: 3 });
  t.ok(losses.length === 3 && losses.every(Number.isFinite), losses.join());
  await session.close();
});

/** Single files of an encoder and a decoder: refused by name before anything runs, with advice.
 */
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
  await pack.close();
});

/**
 * Models that answer at every position: language models learn completions, others the labels of words. Losses and
 * gradients at some positions equal PyTorch's, and greedy decoding then gives the learned answers.
 */
import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import type { Feed } from "eigenlora/session";
import { type BatchFeeds, createTrainer, distill, type Encode } from "eigenlora/train";
import t from "tap";
import { fromBinary, makeFloats, makeNode, makeValue, toBinary } from "../support/internals/models.ts";
import { compare, fitted, golden, learning, noise, prepare, relative, run, sessionOf } from "../support/learning.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { modelBytes, NODE, ORTS, type Ort, open, type Session } from "../support/sessions.ts";

const DECODER = data("decoder/onnx/model.onnx");
const TASKS = ["decoder/adapters/upper", "decoder/adapters/lower"];

async function tokenizer(): Promise<Encode & { eos_token?: string }> {
  const [rules, config] = await Promise.all(
    ["tokenizer", "tokenizer_config"].map(async (name) =>
      JSON.parse(await readFile(data(`decoder/${name}.json`), "utf8")),
    ),
  );
  const made = new Tokenizer(rules, config);
  const encode: Encode = ([text]) => {
    const ids = made.encode(text!).ids;
    return { input_ids: { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) } };
  };
  return Object.assign(encode, { eos_token: "<|end|>" });
}
const encode = await tokenizer();

async function decoder(ort: Ort, options: Parameters<typeof packOf>[1] = LOSSLESS): Promise<Session> {
  const pack = await openPack((await packOf(TASKS, options)).bytes);
  return open(ort, DECODER, pack, { trainable: true });
}

/** Sums of two digits in words, which the random model can only learn by heart. */
const EXAMPLES = ["one", "two", "three", "four", "five", "six"].map((word, i) => ({
  prompt: `${i} + 1 =`,
  completion: ` ${word}`,
}));

/** Greedy answer to a prompt, without a cache, until the end or a number of tokens. */
async function greedy(ort: Ort, session: Session, prompt: string, most: number): Promise<number[]> {
  const { input_ids: given } = await encode([prompt], { padding: true, truncation: true }, []);
  const ids = Array.from(given!.data as BigInt64Array, Number);
  const answer: number[] = [];
  while (answer.length < most && answer.at(-1) !== 0) {
    const feeds: Record<string, unknown> = {};
    const int64 = (values: number[]) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    for (const name of session.inputNames) {
      feeds[name] = new ort.Tensor("float32", new Float32Array(0), [1, 2, 0, 8]);
      if (name === "input_ids") feeds[name] = int64(ids);
      if (name === "attention_mask") feeds[name] = int64(ids.map(() => 1));
      if (name === "position_ids") feeds[name] = int64(ids.map((_, i) => i));
    }
    const { logits } = await session.run(feeds as never);
    const values = (logits as unknown as { data: Float32Array }).data.slice(-96);
    answer.push(values.indexOf(Math.max(...values)));
    ids.push(answer.at(-1)!);
  }
  return answer;
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: at some positions, of some classes: PyTorch's loss and gradients`, async (t) => {
    const of = await golden("llama-torchscript");
    const [rows, classes] = of.targets.dims as [number, number];
    const int64 = (values: number[], ...dims: number[]): Feed => ({
      ...{ dataType: 7, dims },
      data: BigInt64Array.from(values, BigInt),
    });
    const prepared = await prepare(of, { tokens: true });
    const { tokens } = prepared.graph;
    const session = await sessionOf(ort, prepared.file, "all");
    // All texts and positions, in an order of their own.
    const order = Array.from({ length: rows }, (_, i) => (i * 5 + 3) % rows);
    t.equal(new Set(order).size, rows);
    const targets = order.flatMap((row) =>
      Array.from((of.targets.data as Float32Array).subarray(row * classes, (row + 1) * classes)),
    );
    const feeds = new Map([
      ...prepared.feeds,
      ...learning(prepared.graph, { ...of.targets, data: Float32Array.from(targets) }),
      [tokens!.positions, int64(order, rows)] as const,
      [
        tokens!.classes,
        int64(
          order.flatMap(() => [...Array(classes).keys()]),
          rows,
          classes,
        ),
      ] as const,
    ]);
    const results = await run(session, ort, feeds);
    const { loss, gradients, worst } = compare(of, prepared, (output) => results[output]!.data as Float32Array);
    t.ok(loss < 2e-5 && gradients < 2e-5, `loss ${loss}, gradients ${gradients} (${worst})`);
    // Two positions with one class each equal targets that are 0 elsewhere, except for the mean.
    const [few, at] = [new Float32Array(rows * classes), [3, 7]];
    for (const row of at) few[row * classes + 5 + row] = 1;
    const dense = await prepare(of);
    const whole = await sessionOf(ort, dense.file, "all");
    const expected = await run(
      whole,
      ort,
      new Map([...dense.feeds, ...learning(dense.graph, { ...of.targets, data: few })]),
    );
    const sparse = new Map([
      ...feeds,
      ...learning(prepared.graph, { dataType: 1, dims: [2, 1], data: Float32Array.of(1, 1) }),
      [tokens!.positions, int64(at, 2)] as const,
      [
        tokens!.classes,
        int64(
          at.map((row) => 5 + row),
          2,
          1,
        ),
      ] as const,
    ]);
    const found = await run(session, ort, sparse);
    for (const [input, output] of prepared.graph.gradients) {
      const scaled = (expected[output]!.data as Float32Array).map((g) => (g * rows) / 2);
      const off = relative(found[output]!.data as Float32Array, scaled);
      t.ok(off < 2e-5, `${input}: ${off}`);
    }
    await session.release();
    await whole.release();
  });
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: completions are learned, and greedy decoding says them`, async (t) => {
    const session = await decoder(ort);
    const trainer = await createTrainer(session, { encode, train: "lora", rank: 8, seed: 3 });
    t.same(trainer.labels, []);
    const [first, last] = await fitted(trainer, EXAMPLES, { steps: 120, batch: 6, learningRates: { terms: 0.03 } });
    t.ok(last < first / 4, `${first} → ${last}`);
    const score = await trainer.score(EXAMPLES);
    await session.addTask("sums", await trainer.task({ dtype: { coefficients: "f32" } }));
    t.same(session.tasks.get("sums")!.metadata.labels, undefined);
    await session.switchTask("sums");
    let right = 0;
    for (const { prompt, completion } of EXAMPLES) {
      const { input_ids: wanted } = await encode([`${completion}<|end|>`], { padding: true, truncation: true }, []);
      const said = await greedy(ort, session, prompt, 10);
      if (said.join() === Array.from(wanted!.data as BigInt64Array, Number).join()) right++;
    }
    t.equal(right / EXAMPLES.length, score.accuracy, "the share that greedy decoding gets right is the score");
    t.ok(score.accuracy >= 0.5, `${right} of ${EXAMPLES.length}`);
    await session.close();
  });
}

t.test("a distilled task answers more like its adapter", async (t) => {
  const coarse = { select: { kind: "k", k: 2 } } as const;
  const session = await decoder(NODE, coarse);
  const adapters = await readAdapters(TASKS.map(data));
  t.teardown(async () => {
    await session.close();
    for (const adapter of adapters) await adapter.close();
  });
  const texts = Array.from({ length: 24 }, (_, i) => `Text ${i * 7919}: what is ${String.fromCharCode(97 + i)} for?`);
  const questions = [
    { texts },
    { examples: texts.map((text) => ({ prompt: text.slice(0, 12), completion: text.slice(12) })) },
  ];
  for (const asked of questions) {
    const how = { encode, steps: 60, batch: 4, learningRates: { terms: 0.02 } };
    const made = await distill(session, { adapter: adapters[0]!, ...asked, ...how });
    t.match(made, { id: adapters[0]!.id, kept: "distilled" });
    t.ok(made.divergenceAfter < 0.7 * made.divergenceBefore, `${made.divergenceBefore} → ${made.divergenceAfter}`);
    await session.addTask("better", made.file);
    session.removeTask("better");
  }
});

t.test("a task with a head is distilled where each token has a label", async (t) => {
  const proto = fromBinary("ModelProto", modelBytes("encoder"));
  const graph = proto.graph!;
  graph.initializer.push(makeFloats("classifier.weight", Array.from(noise(64, 5)), [2, 32]));
  graph.initializer.push(makeFloats("classifier.bias", [0.1, -0.1], [2]));
  graph.node.push(makeNode("Transpose", "/classifier/Transpose", ["classifier.weight"], "turned", { perm: [1, 0] }));
  graph.node.push(makeNode("MatMul", "/classifier/MatMul", ["last_hidden_state", "turned"], "product"));
  graph.node.push(makeNode("Add", "/classifier/Add", ["product", "classifier.bias"], "logits"));
  graph.output = [makeValue("logits", 1, ["batch", "length", 2])];
  const model = toBinary("ModelProto", proto);
  const of = async (how: Parameters<typeof packOf>[1]): Promise<Session> => {
    const pack = await openPack((await packOf(["sessions/adapters"], how)).bytes);
    return open(NODE, model, pack, { trainable: true, anyBase: true });
  };
  const [session, teacher] = [await of({ select: { kind: "k", k: 2 } }), await of(LOSSLESS)];
  const [adapter] = await readAdapters([data("sessions/adapters/two")]);
  t.teardown(() => Promise.all([session.close(), teacher.close(), adapter!.close()]));
  const examples = Array.from({ length: 160 }, (_, i) => {
    const ids = Array.from(noise(6, 20 + i), (value) => 3 + (Math.abs(Math.floor(1e4 * value)) % 50));
    const int64 = (data: number[]) =>
      ({ type: "int64", dims: [1, 6], data: BigInt64Array.from(data, BigInt) }) as const;
    const all = { input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) };
    const feeds: BatchFeeds = { ...all, token_type_ids: int64(ids.map(() => 0)) };
    return { feeds, classes: ids.map(() => 0) };
  });
  const kept = examples.splice(0, 32);
  const encode: Encode = () => ({});
  const how = { steps: 120, batch: 32, learningRates: { terms: 0.005, head: 0.002 } };
  const made = await distill(session, { adapter: adapter!, examples, encode, ...how });
  t.equal(made.kept, "distilled");
  await session.addTask("better", made.file);
  const answers = async (by: Session, task: string): Promise<number[]> => {
    await by.switchTask(task);
    const found: number[] = [];
    for (const { feeds } of kept) {
      const inputs = Object.entries(feeds).map(([name, { data, dims }]) => [
        name,
        new NODE.Tensor("int64", data as BigInt64Array, [...dims]),
      ]);
      const { logits } = await by.run(Object.fromEntries(inputs));
      const values = logits!.data as Float32Array;
      for (let i = 0; i < values.length; i += 2) found.push(1 / (1 + Math.exp(values[i + 1]! - values[i]!)));
    }
    return found;
  };
  const wanted = await answers(teacher, "two");
  const off = (found: number[]): number => Math.hypot(...found.map((value, i) => value - wanted[i]!));
  const [before, after] = [off(await answers(session, "two")), off(await answers(session, "better"))];
  t.ok(after < 0.95 * before, `probabilities by the session's own runs: ${before} → ${after}`);
});

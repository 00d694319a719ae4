/**
 * Heads of several layers: RoBERTa's in one module, DistilBERT's side by side. Adapters with heads that PEFT has saved whole are served;
 * a new task trains all layers, with its own number of labels, and is exported as an adapter that answers alike in PyTorch. Gradients are
 * compared with PyTorch's in learn-graph.test.ts.
 */
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { type BuildOptions, buildPack, peftFiles, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { type BatchFeeds, createTrainer, distill, type Example, type FitOptions } from "eigenlora/train";
import t, { type Test } from "tap";
import { json, workIn } from "./command-line.ts";
import { headInputs, uniform } from "./internals.ts";
import { F32 } from "./learning.ts";
import { concat, data, LOSSLESS, packOf as packed } from "./packs.ts";
import { peftAgrees } from "./peft-agrees.ts";
import { soak } from "./required.ts";
import { difference, modesOn, NODE, ORTS, type Ort, open, outputOf, type Session } from "./sessions.ts";

type Feeds = Parameters<Session["run"]>[0];

/** Layers of the head, the one with the labels last, and their inputs. */
const MODELS = {
  roberta: ["classifier.dense", "classifier.out_proj"],
  distilbert: ["pre_classifier", "classifier"],
} as const;
type Name = keyof typeof MODELS;
const NAMES = Object.keys(MODELS) as Name[];
const WIDTH = 32;
const COLOURS = ["red", "green", "blue", "grey", "none"];

const model = (name: Name): string => data(`heads/${name}/model.onnx`);
const adaptersOf = (name: Name, ...ids: string[]) =>
  readAdapters(ids.map((id) => data(`heads/${name}/adapters/${id}`)));

async function packOf(name: Name, options: BuildOptions = LOSSLESS, ids = ["two", "four"]): Promise<Pack> {
  const paths = ids.map((id) => `heads/${name}/adapters/${id}`);
  return openPack((await packed(paths, options)).bytes);
}

async function trainable(t: Test, name: Name, pack?: Pack, more: Parameters<typeof open>[3] = {}): Promise<Session> {
  const session = await open(NODE, model(name), pack ?? (await packOf(name)), { trainable: true, ...more });
  t.teardown(() => session.close());
  return session;
}

async function goldens(name: Name): Promise<{ feeds: Record<string, number[][]>; logits: Record<string, number[][]> }> {
  return JSON.parse(await readFile(data(`heads/${name}/goldens.json`), "utf8"));
}

function feedsOf({ Tensor }: Pick<Ort, "Tensor">, values: Record<string, number[][]>): Feeds {
  const tensor = (rows: number[][]) =>
    new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0]!.length]);
  return Object.fromEntries(Object.entries(values).map(([name, rows]) => [name, tensor(rows)]));
}

/** Random ids; the label follows from the first one. */
function examples(count: number, labels: number, seed: number): Example[] {
  const random = uniform(seed);
  return Array.from({ length: count }, () => {
    const ids = Array.from({ length: 7 }, () => 3 + Math.floor(random() * 60));
    const feeds = feedsOf(NODE, { input_ids: [ids], attention_mask: [ids.map(() => 1)] });
    return { feeds: feeds as BatchFeeds, label: ids[0]! % labels };
  });
}

for (const name of NAMES) {
  for (const { name: runtime, ort } of ORTS) {
    t.test(`${name} on ${runtime}: tasks bring all layers of their heads, as in PyTorch`, async (t) => {
      const { feeds, logits } = await goldens(name);
      for (const mode of modesOn(runtime)) {
        const session = await open(ort, model(name), await packOf(name), { mode });
        const run = feedsOf(ort, feeds);
        for (const task of ["two", "four", null]) {
          await session.switchTask(task);
          const off = difference(await outputOf(session, run), logits[task ?? "base"]!.flat());
          t.ok(off < 2e-5, `${mode}, ${task}: off by ${off}`);
        }
        if (mode !== "folded") {
          const rows = await session.run(run, { tasks: ["two", null, "four"] });
          const width = rows["logits"]!.dims[1]!;
          for (const [row, task] of ["two", "base", "four"].entries()) {
            const expected = logits[task]![row]!;
            const found = (rows["logits"]!.data as Float32Array).subarray(row * width).subarray(0, expected.length);
            t.ok(difference(found, expected) < 2e-5, `${mode}, row ${row}: ${task}`);
          }
        }
        await session.close();
      }
    });
  }
}

/** Checks that softmaxed logits of the session equal the trainer's probabilities. */
async function answersAlike(
  t: Test,
  session: Session,
  rows: readonly Example[],
  probabilities: readonly Float32Array[],
): Promise<void> {
  for (const [i, { feeds }] of rows.entries()) {
    const exps = [...(await outputOf(session, feeds as Feeds))].map(Math.exp);
    const total = exps.reduce((a, b) => a + b, 0);
    const off = difference(
      exps.map((v) => v / total),
      probabilities[i]!,
    );
    t.ok(off < 1e-5, `row ${i} is off by ${off}`);
  }
}

for (const name of NAMES) {
  t.test(`${name}: a task of another number of labels trains its whole head`, async (t) => {
    const layers = MODELS[name];
    const session = await trainable(t, name);
    const labels = COLOURS.slice(0, 3);
    const how: FitOptions = {
      epochs: 10,
      batch: 16,
      temperature: 0.7,
      learningRates: { terms: 0.02, head: 0.05, inner: 0.01 },
    };
    const trainer = await createTrainer(session, { labels, seed: 1 });
    t.equal(trainer.size.head, WIDTH * WIDTH + WIDTH + 3 * (WIDTH + 1));
    const known = examples(48, 3, 1);
    const losses: number[] = [];
    for await (const { loss } of trainer.fit(known, how)) losses.push(loss);
    t.ok(losses.at(-1)! < 0.7 * losses[0]!, `${losses[0]} → ${losses.at(-1)}`);

    await session.addTask("mine", await trainer.task({ dtype: F32 }));
    const saved = (await session.pack.load("mine")).parameters.map(({ name, shape, role }) => [name, shape, role]);
    t.same(saved, [
      [`${layers[0]}.weight`, [WIDTH, WIDTH], "saved"],
      [`${layers[0]}.bias`, [WIDTH], "saved"],
      [`${layers[1]}.weight`, [3, WIDTH], "saved"],
      [`${layers[1]}.bias`, [3], "saved"],
    ]);
    await session.switchTask("mine");
    const rows = known.slice(0, 5);
    await answersAlike(t, session, rows, await trainer.predict(rows));

    // A trainer that begins with the task has its head too; a new layer of labels has the model's own in front.
    const again = await createTrainer(session, { labels, init: { task: "mine" } });
    await again.begin("mine");
    t.equal((await again.score(rows)).loss, (await trainer.score(rows)).loss);
    const alone = await createTrainer(session, { labels, seed: 1, head: layers[1] });
    t.equal(alone.size.head, 3 * (WIDTH + 1));
    for await (const _ of alone.fit(known, { steps: 1, learningRates: { terms: 0, head: 0 } }));
    const both = await createTrainer(session, { labels, seed: 1 });
    for await (const _ of both.fit(known, { steps: 1, learningRates: { terms: 0, head: 0 } }));
    t.equal((await both.score(rows)).loss, (await alone.score(rows)).loss, "the layer in front begins as the base's");

    const ours = await outputOf(session, feedsOf(NODE, (await goldens(name)).feeds));
    if (soak || name === "roberta") await agrees(t, name, session.pack, "mine", ours);
  });
}

/** Checks that PEFT loads the task as an adapter and answers the same. */
async function agrees(t: Test, name: Name, pack: Pack, task: string, ours: Float32Array): Promise<void> {
  const files = await peftFiles(await taskAdapter(pack, task));
  const modules = name === "roberta" ? ["classifier"] : ["classifier", "pre_classifier"];
  t.same((files.config as { modules_to_save: string[] }).modules_to_save, modules);
  const { feeds } = await goldens(name);
  await peftAgrees(t, files, { base: data(`heads/${name}/base.safetensors`), feeds, ours });
}

t.test("few bits: every step sees both layers as they will be stored", async (t) => {
  const session = await trainable(t, "distilbert");
  const dtype = { coefficients: "int8", head: "int8" } as const;
  const trainer = await createTrainer(session, { labels: COLOURS, seed: 1 });
  const known = examples(32, COLOURS.length, 4);
  for await (const _ of trainer.fit(known, { epochs: 2, dtype, learningRates: { head: 0.05 } }));
  await session.addTask("mine", await trainer.task({ dtype }));
  const { parameters } = await session.pack.load("mine");
  t.same(
    parameters.map(({ name, tensor }) => `${name} ${tensor.dtype}`),
    ["pre_classifier.weight int8", "pre_classifier.bias f16", "classifier.weight int8", "classifier.bias f16"],
  );
});

for (const name of NAMES) {
  t.test(`${name}: distilling trains the whole head`, async (t) => {
    const small = { select: { kind: "k", k: 1 } } as const;
    for (const options of [small, { ...small, gauge: "balanced", step: 0.02, dtype: { head: "int8" } }] as const) {
      const session = await trainable(t, name, await packOf(name, options));
      const [adapter] = await adaptersOf(name, "four");
      t.teardown(() => adapter!.close());
      const feeds = examples(96, 2, 9).map(({ feeds }) => feeds!);
      const made = await distill(session, { adapter: adapter!, feeds, steps: 80, batch: 16 });
      t.equal(made.kept, "distilled");
      t.ok(made.divergenceAfter < 0.8 * made.divergenceBefore, `${made.divergenceBefore} → ${made.divergenceAfter}`);
      await session.addTask("distilled", made.file);
      const of = async (id: string) => (await session.pack.load(id)).parameters;
      const [before, after] = [await of("four"), await of("distilled")];
      const told = (all: typeof before) =>
        all.map(({ name, shape, tensor }) => [name, shape, tensor.dtype].join()).sort();
      t.same(told(after), told(before));
      const weight = `${MODELS[name][0]}.weight`;
      const bytesOf = async (id: string) => {
        const { bytes, parameters } = await session.pack.load(id);
        const { byteOffset, byteLength } = parameters.find((one) => one.name === weight)!.tensor;
        return Buffer.from(bytes.subarray(byteOffset, byteOffset + byteLength)).toString("hex");
      };
      t.ok((await bytesOf("distilled")) !== (await bytesOf("four")), "the layer in front of the labels moved");
    }
  });
}

t.test("which layers are trained", async (t) => {
  const labels = COLOURS.slice(0, 2);
  const sizeOf = async (session: Session, head: string | readonly string[] | false): Promise<number> =>
    (await createTrainer(session, { labels, head })).size.head;
  const [inner, last] = [WIDTH * (WIDTH + 1), 2 * (WIDTH + 1)];
  const roberta = await trainable(t, "roberta");
  t.equal(await sizeOf(roberta, "classifier"), inner + last, "a module that holds them");
  t.equal(await sizeOf(roberta, ["classifier.out_proj", "classifier.dense"]), inner + last);
  t.equal(await sizeOf(roberta, "classifier.dense"), inner);
  t.equal(await sizeOf(roberta, false), 0);
  await t.rejects(createTrainer(roberta, { labels, head: "score" }), {
    name: "RangeError",
    message: /head: the session trains "classifier.dense", "classifier.out_proj", not "score"; create it with reserve/,
  });
  const only = await createTrainer(roberta, { labels, head: "classifier.dense" });
  await t.rejects(only.fit(examples(8, 2, 1), { temperature: 2 }).next(), /needs a trainer with a head/);

  // Tasks without heads: inputs are reserved by name.
  const bare = await openPack(await withoutHeads("distilbert"));
  const reserve = { head: MODELS.distilbert };
  const session = await trainable(t, "distilbert", bare, { reserve });
  t.equal(await sizeOf(session, "classifier"), last, "a layer's own name is that layer alone");
  const trainer = await createTrainer(session, { labels: COLOURS, seed: 2 });
  t.equal(trainer.size.head, inner + COLOURS.length * (WIDTH + 1));
  for await (const _ of trainer.fit(examples(16, 5, 2), { steps: 2 }));
  await session.addTask("mine", await trainer.task());
  await session.switchTask("mine");
  const { logits } = await session.run(examples(1, 2, 3)[0]!.feeds as Feeds);
  t.same(logits!.dims, [1, 5]);

  const inputs = ["a", "b"].map((of) => ({ name: `${of}.w`, of, kind: "headWeight", dims: ["tasks", 4, "labels"] }));
  t.throws(() => headInputs({ inputs } as never, undefined), {
    name: "RangeError",
    message: 'head: expected one layer with a row for each label, the session has "a", "b"; name one',
  });
});

async function withoutHeads(name: Name): Promise<Uint8Array<ArrayBuffer>> {
  const adapters = await adaptersOf(name, "two", "four");
  const { chunks } = await buildPack(
    adapters.map((one) => ({ ...one, saved: [], metadata: {} })),
    LOSSLESS,
  );
  for (const adapter of adapters) await adapter.close();
  return concat(chunks);
}

t.test("the command line learns a task with such a head", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-heads-"));
  workIn(t, folder);
  const words = ["<s>", "<pad>", "</s>", ...Array.from({ length: 61 }, (_, i) => `w${i}`)];
  const vocab = Object.fromEntries(words.map((word, i) => [word, i]));
  const tokenizer = {
    ...{ version: "1.0", truncation: null, padding: null, added_tokens: [], normalizer: null, decoder: null },
    pre_tokenizer: { type: "WhitespaceSplit" },
    post_processor: null,
    model: { type: "WordLevel", vocab, unk_token: "<s>" },
  };
  await writeFile("tokenizer.json", JSON.stringify(tokenizer));
  const random = uniform(3);
  const rows = Array.from({ length: 36 }, () => {
    const ids = Array.from({ length: 4 + Math.floor(4 * random()) }, () => Math.floor(random() * 61));
    return { text: ids.map((id) => `w${id}`).join(" "), label: COLOURS[ids[0]! % 3]! };
  });
  await writeFile("rows.jsonl", rows.map((row) => JSON.stringify(row)).join("\n"));
  for (const name of NAMES) {
    const adapters = ["two", "four"].map((id) => data(`heads/${name}/adapters/${id}`));
    const files = [`${name}.eigen`, `${name}.eigentask`] as const;
    await json(0, "pack", ...adapters, "-o", files[0], "--energy", "1");
    const how = ["--model", model(name), "--tokenizer", "tokenizer.json", "--epochs", "4", "--rate", "0.05"];
    const made = await json(0, "learn", files[0], "rows.jsonl", ...how, "--holdout", "0", "-o", files[1]);
    t.same(made["trained"].head, WIDTH * (WIDTH + 1) + 3 * (WIDTH + 1), name);
    t.ok(made["epochs"].at(-1).loss < 0.9 * made["epochs"][0].loss, JSON.stringify(made["epochs"]));
    await json(0, "add", files[0], files[1]);
    const pack = await openPack(join(folder, files[0]));
    const brings = MODELS[name].flatMap((layer) => [`saved ${layer}.weight`, `saved ${layer}.bias`]);
    t.same(
      pack.tasks
        .get(name)!
        .brings?.filter((one) => one.startsWith("saved"))
        .sort(),
      brings.sort(),
    );
    await pack.close();
  }
});

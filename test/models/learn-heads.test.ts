/**
 * Heads of several layers: RoBERTa's in one module, DistilBERT's side by side. Adapters with heads that PEFT has saved
 * whole are served; a new task trains all layers, with its own number of labels, and is exported as an adapter that
 * answers alike in PyTorch. Gradients are compared with PyTorch's in learn-graph.test.ts.
 */
import { readFile } from "node:fs/promises";
import { openPack, type Pack } from "eigenlora";
import { type BuildOptions, peftFiles, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { type BatchFeeds, createTrainer, distill, type Example, type FitOptions } from "eigenlora/train";
import t, { type Test } from "tap";
import { uniform } from "../support/internals/base.ts";
import { answersAlike, F32, fitted } from "../support/learning.ts";
import { data, LOSSLESS, packOf as packed } from "../support/packs.ts";
import { peftAgrees } from "../support/peft-agrees.ts";
import { soak } from "../support/required.ts";
import {
  checkRows,
  checkTasks,
  int64,
  modesOn,
  NODE,
  ORTS,
  type Ort,
  open,
  outputOf,
  type Session,
} from "../support/sessions.ts";

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

const feedsOf = (ort: Pick<Ort, "Tensor">, values: Record<string, number[][]>): Feeds =>
  Object.fromEntries(Object.entries(values).map(([name, rows]) => [name, int64(ort, rows)]));

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
        const how = { allowed: 2e-5, what: mode };
        await checkTasks(t, session, run, ["two", "four"], (task) => logits[task ?? "base"]!.flat(), how);
        const row = (task: string | null, row: number) => logits[task ?? "base"]![row]!;
        if (mode !== "folded") await checkRows(t, session, run, ["two", null, "four"], row, how);
        await session.close();
      }
    });
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
    const [first, last] = await fitted(trainer, known, how);
    t.ok(last < 0.7 * first, `${first} → ${last}`);

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
    await answersAlike(t, session, trainer, rows);

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

for (const name of NAMES) {
  t.test(`${name}: distilling trains the whole head, and the judge hears it`, async (t) => {
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

/**
 * Biases that an exporter has dropped because they were zero: tasks bring them back, in every mode, on every kind of
 * layer, and through `attach`. A real export of torch, compared with PEFT (test/data/exports), and the models of
 * test/data/sessions without the classifier's bias.
 */
import { readFileSync } from "node:fs";
import { openPack, type Pack } from "eigenlora";
import { type Adapter, buildPack } from "eigenlora/build";
import { createTrainer } from "eigenlora/train";
import { Tensor } from "onnxruntime-node";
import t, { type Test } from "tap";
import { adapterOf } from "../support/adapters.ts";
import { changed, modelOf } from "../support/graphs.ts";
import { atOnce } from "../support/internals/base.ts";
import { parseTask } from "../support/internals/format.ts";
import {
  create,
  fromBinary,
  type GraphProto,
  makeFloats,
  makeNode,
  makeValue,
  type NodeProto,
} from "../support/internals/models.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { concat, data, LOSSLESS, packOf } from "../support/packs.ts";
import type * as sessions from "../support/sessions.ts";
import {
  difference,
  type Feeds,
  int64,
  MODES,
  NODE,
  type Options,
  ORTS,
  open,
  outputOf,
  refusal,
} from "../support/sessions.ts";

const TOLERANCE = 1e-5;
const path = (name: string): string => data(`exports/${name}`);
const goldens = JSON.parse(readFileSync(path("goldens.json"), "utf8")) as {
  feeds: Record<string, number[][]>;
  outputs: Record<string, Record<string, number[][]>>;
};
const ints = (ort: Pick<sessions.Ort, "Tensor">): Feeds =>
  Object.fromEntries(Object.entries(goldens.feeds).map(([name, rows]) => [name, int64(ort, rows)]));
const answer = (file: string, task: string | null): number[] => goldens.outputs[file]![task ?? "base"]!.flat();

/** Bytes of a pack that keeps its adapters whole. */
async function packed(...adapters: string[]): Promise<Uint8Array<ArrayBuffer>> {
  const paths = adapters.map((name) => `exports/adapters/${name}`);
  return (await packOf(paths, { ...LOSSLESS, base: path("base.safetensors") })).bytes;
}

/**
 * Sets of tasks by their overrides: heads with a bias; all biases; a bias with a LoRA; a bias with DoRA; a head that
 * others adapt.
 */
const SETS = [
  ["head", "biases", "lora-bias", "dora"],
  ["same-head", "adapted-head"],
  ["biases", "lora-bias"],
] as const;

async function agrees(
  t: Test,
  ort: sessions.Ort,
  file: string,
  tasks: readonly string[],
  mode: sessions.Mode,
): Promise<void> {
  const pack = await openPack(await packed(...tasks));
  const session = await open(ort, path(`${file}.onnx`), pack, { mode });
  t.equal(session.mode, mode);
  let worst = 0;
  let base: number[] | undefined;
  for (const task of [null, ...tasks, null]) {
    await session.switchTask(task);
    const found = await outputOf(session, ints(ort));
    worst = Math.max(worst, difference(found, answer(file, task)));
    if (task === null) t.same([...found], (base ??= [...found]), "the base comes back bit for bit");
  }
  t.ok(worst <= TOLERANCE, `${file}, ${tasks.join(", ")}, ${mode}: off by ${worst}`);
  await session.close();
}

t.test("torch's default export of a fresh classifier, against PEFT", async (t) => {
  const gemms = fromBinary("ModelProto", readFileSync(path("classifier.onnx"))).graph!.node.filter(
    ({ opType }) => opType === "Gemm",
  );
  t.same(
    gemms.map(({ input }) => input.length),
    [2, 2],
    "the exporter has dropped the biases of pooler and classifier",
  );
  for (const tasks of SETS) for (const mode of MODES) await agrees(t, NODE, "classifier", tasks, mode);
});

for (const { name, ort } of ORTS.slice(1))
  t.test(`${name}: torch's default export`, (t) => agrees(t, ort, "classifier", SETS[0], "core"));

t.test("the same quantised, and without Add", async (t) => {
  for (const tasks of SETS.slice(1)) {
    for (const mode of ["core", "factors"] as const) await agrees(t, NODE, "quantised", tasks, mode);
    const pack = await openPack(await packed(...tasks));
    const error = await refusal(() => open(NODE, path("quantised.onnx"), pack, { mode: "folded" }));
    t.match(error.message, /quantised.*use mode "core" or "factors"/);
  }
});

t.test("a bias that is there by another name is not added once more", async (t) => {
  const pack = await openPack(await packed("head"));
  const broken = (change: (gemm: NodeProto, graph: GraphProto) => void): Uint8Array =>
    changed(readFileSync(path("classifier.onnx")), (graph) => {
      const gemm = graph.node.find(({ input }) => input[1] === "classifier.weight")!;
      gemm.metadataProps = [];
      const bias = graph.initializer.find(({ name }) => name === "bert.embeddings.LayerNorm.bias")!;
      graph.initializer.push({ ...bias, name: "b", dims: [4n], rawData: bias.rawData.slice(0, 16) });
      change(gemm, graph);
    });
  const behind = (opType: string, input: string[], output: string, domain = ""): NodeProto =>
    makeNode(opType, `/${output}`, input, output, {}, domain);
  const ways: Record<string, (gemm: NodeProto, graph: GraphProto) => void> = {
    "as the Gemm's own": (gemm) => gemm.input.push("b"),
    "behind a Reshape and a Cast": (gemm, graph) => {
      const [result] = gemm.output.splice(0, 1, "y0") as [string];
      const nodes = [behind("Identity", ["y0"], "y1"), behind("Squeeze", ["y1"], "y2")];
      graph.node.push(...nodes, behind("Add", ["y2", "b"], result));
    },
    "in front of the sum": (gemm, graph) => {
      const [result] = gemm.output.splice(0, 1, "y0") as [string];
      graph.node.push(behind("Identity", ["b"], "b1"), behind("Add", ["b1", "y0"], result));
    },
    "in a fused operator": (gemm, graph) => {
      const [result] = gemm.output.splice(0, 1, "y0") as [string];
      graph.node.push(behind("BiasGelu", ["y0", "b"], result, "com.microsoft"));
    },
  };
  for (const [what, change] of Object.entries(ways)) {
    for (const mode of MODES) {
      const { message } = await refusal(() => open(NODE, broken(change), pack, { mode }));
      t.match(message, /tasks change "classifier.bias" \(saved\), which is not in the model/, `${what}, ${mode}`);
    }
  }
  const fits = await open(
    NODE,
    broken(() => undefined),
    pack,
  );
  await fits.close();
});

t.test("learned on such a model, a task has the bias too", async (t) => {
  const pack = await openPack(await packed("head"));
  const session = await open(NODE, path("classifier.onnx"), pack, { trainable: true });
  const encode = (texts: string[]): Feeds => {
    const rows = texts.map((text) => [2, 4 + text.length, 3]);
    const all = (value: number) =>
      int64(
        NODE,
        rows.map(() => [value, value, value]),
      );
    return { input_ids: int64(NODE, rows), attention_mask: all(1), token_type_ids: all(0) };
  };
  const trainer = await createTrainer(session, { labels: ["short", "long"], encode: encode as never });
  const examples = [1, 2, 3, 4, 5, 6, 7, 8].map((n) => ({ text: "x".repeat(n), label: n < 5 ? "short" : "long" }));
  for await (const _ of trainer.fit(examples, { epochs: 2, batch: 4, holdout: 0 }));
  const { blob } = parseTaskFile(await trainer.task({ id: "mine" }), "mine");
  const names = atOnce(parseTask(blob, pack.modules, "mine", { id: "mine" })).parameters.map(({ name }) => name);
  t.same(names.sort(), ["classifier.bias", "classifier.weight"]);
  await session.close();
});

/**
 * Layers whose bias or quantised values stand where a task is added, on models of one layer made here: expected values
 * follow by arithmetic.
 */
const FLOAT = 1;
const UINT8 = 2;
const X = [1, 2, 3];
const C = [10, 20, 30];
const feeds = { x: new Tensor("float32", Float32Array.from(X), [1, 3]) };
const diagonal = (value: number): number[] => Array.from({ length: 9 }, (_, i) => (i % 4 === 0 ? value : 0));

/** y of these nodes, with W the identity, C, and what quantises to steps of a half below 64. */
function layers(...nodes: NodeProto[]): Uint8Array<ArrayBuffer> {
  return modelOf({
    node: nodes,
    input: [makeValue("x", FLOAT, ["batch", 3])],
    output: [makeValue("y", FLOAT, ["batch", 3])],
    initializer: [
      makeFloats("classifier.weight", diagonal(1), [3, 3]),
      makeFloats("c", C, [3]),
      makeFloats("step", [0.25], []),
      create("TensorProto", { name: "zero", dataType: UINT8, rawData: new Uint8Array([0]) }),
    ],
  });
}

const gemm = (y: string): NodeProto =>
  makeNode("Gemm", "/classifier/Gemm", ["x", "classifier.weight", "c"], y, { transB: 1 });
/** Quantises a value and turns it back, which clips it at 63.75. */
const requantized = (from: string, to: string): NodeProto[] => [
  makeNode("QuantizeLinear", `${to}/q`, [from, "step", "zero"], `${to}/q`),
  makeNode("DequantizeLinear", `${to}/dq`, [`${to}/q`, "step", "zero"], to),
];

/** Brings a weight of its own, without a bias. */
const head = adapterOf("head", [], {
  saved: [
    { name: "classifier.weight", role: "saved", shape: [3, 3], read: async () => Float32Array.from(diagonal(2)) },
  ],
});

async function packOne(adapter: Adapter): Promise<Pack> {
  return openPack(concat((await buildPack([adapter], LOSSLESS)).chunks));
}

async function answers(model: Uint8Array<ArrayBuffer>, adapter: Adapter, options: Options): Promise<number[][]> {
  const session = await open(NODE, model, await packOne(adapter), options);
  const base = [...(await outputOf(session, feeds))];
  await session.switchTask(adapter.id);
  const found = [...(await outputOf(session, feeds))];
  await session.close();
  return [base, found];
}

t.test("a task that brings a weight without its bias keeps the model's", async (t) => {
  for (const mode of ["factors", "folded"] as const) {
    const [base, found] = await answers(layers(gemm("y")), head, { mode });
    t.same(base, [11, 22, 33], mode);
    t.same(found, [12, 24, 36], mode);
  }
  const bias = {
    name: "classifier.bias",
    role: "saved" as const,
    shape: [3],
    read: async () => Float32Array.of(1, 1, 1),
  };
  for (const mode of ["factors", "folded"] as const) {
    const [, found] = await answers(layers(gemm("y")), { ...head, saved: [...head.saved, bias] }, { mode });
    t.same(found, [3, 5, 7], `${mode}: one that brings both`);
  }
  const [base, found] = await answers(layers(gemm("s"), ...requantized("s", "y")), head, { mode: "factors" });
  t.same(base, [11, 22, 33]);
  t.same(found, [12, 24, 36], "behind quantised values too");
});

/**
 * Models with fused layers: as onnxruntime's optimiser makes them (test/data/fused), with queries, keys and values
 * inside one operator and biases inside the norms and activations behind them; and as onnxruntime-genai's model builder
 * writes them (test/data/builder), in 4 bits too. Compared with PEFT's logits, in 4 bits on the dequantised base.
 */
import { readFileSync } from "node:fs";
import { openPack, type Pack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { relativeDifference } from "../support/compare.ts";
import { changed, modelOf } from "../support/graphs.ts";
import {
  type Attributes,
  makeFloats,
  makeNode,
  makeValue,
  type NodeProto,
  readModel,
  toBinary,
} from "../support/internals/models.ts";
import * as packs from "../support/packs.ts";
import { data, LOSSLESS } from "../support/packs.ts";
import { type Feeds, int64, modesOn, NODE, ORTS, type Ort, refusal } from "../support/sessions.ts";

type Folder = "fused" | "builder";
interface Golden {
  readonly rows: readonly (readonly number[])[];
  readonly mask?: readonly (readonly number[])[];
  /** Answers of a model, by task. */
  readonly logits: Readonly<Record<string, Readonly<Record<string, readonly number[]>>>>;
}
const read = (folder: Folder): Golden => JSON.parse(readFileSync(data(`${folder}/goldens.json`), "utf8"));
const GOLDENS: Readonly<Record<Folder, Golden>> = { fused: read("fused"), builder: read("builder") };

/** Folder, file, the model of its pack, and what its answers are called. */
const FILES: readonly (readonly [Folder, file: string, kind: string, answers: string])[] = [
  ["fused", "bert", "bert", "bert"],
  ["fused", "bert-mask", "bert", "bert"],
  ["fused", "roberta", "roberta", "roberta"],
  ["fused", "distilbert", "distilbert", "distilbert"],
  ["builder", "llama", "llama", "llama"],
  ["builder", "llama-apart", "llama", "llama-apart"],
  ["builder", "llama-int4", "llama", "llama-int4"],
  ["builder", "qwen2", "qwen2", "qwen2"],
  ["builder", "qwen3", "qwen3", "qwen3"],
  // Gate and up in one layer.
  ["builder", "small-gates", "small", "small-gates"],
  // Layers packed in the checkpoint, as they are, and as the builder divides them.
  ["builder", "phi3", "phi3", "phi3"],
  ["builder", "phi3-apart", "phi3", "phi3-apart"],
];

/** A lossless pack of the adapters of a model, with its fingerprints. */
async function packOf(t: Test, kind: string, folder: Folder = "fused", withBase = true): Promise<Pack> {
  const base = withBase && { base: data(`${folder}/${kind}.safetensors`) };
  const { bytes } = await packs.packOf([`${folder}/adapters/${kind}`], { ...LOSSLESS, ...base });
  const pack = await openPack(bytes);
  t.teardown(() => pack.close());
  return pack;
}

/** The golden rows, without a cache. */
function feeds(ort: Ort, folder: Folder = "fused", names = ["input_ids", "attention_mask"], heads = 0): Feeds {
  const { rows, mask = rows.map((row) => row.map(() => 1)) } = GOLDENS[folder];
  const cache = () => new ort.Tensor("float32", new Float32Array(0), [rows.length, heads, 0, 16]);
  const known: Feeds = { input_ids: int64(ort, rows), attention_mask: int64(ort, mask) };
  return Object.fromEntries(names.map((name) => [name, known[name] ?? cache()]));
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: every task as PEFT has it`, async (t) => {
    for (const [folder, file, kind, answers] of FILES) {
      const pack = await packOf(t, kind, folder);
      const expected = GOLDENS[folder].logits[answers]!;
      const quantised = file.endsWith("int4");
      // DoRA needs the float weight.
      if (quantised) pack.removeTask("dora");
      for (const mode of modesOn(name)) {
        const opening = () => createEigenSession(ort, data(`${folder}/${file}.onnx`), pack, { mode });
        if (quantised && mode === "folded") {
          const message = /mode "folded": the weight of "[^"]*_proj" is quantised.*use mode "core" or "factors"/;
          t.match(await refusal(opening), { name: "BaseMismatchError", message });
          continue;
        }
        const session = await opening();
        if (!quantised) t.same(session.unconfirmed, [], file);
        const given = feeds(ort, folder, [...session.inputNames], kind === "small" ? 1 : 2);
        const holds = async (task: string | null, wanted: readonly number[], rows?: { tasks: string[] }) => {
          const off = relativeDifference((await session.run(given, rows))["logits"]!.data as Float32Array, wanted);
          t.ok(off < 1e-5, `${file}, ${mode}, ${rows?.tasks ?? task}: off by ${off}`);
        };
        for (const task of [...pack.tasks.keys(), null]) {
          await session.switchTask(task);
          await holds(task, expected[task ?? "base"]!);
        }
        if (folder === "builder" && mode !== "folded") {
          const half = expected["all"]!.length / 2;
          const mixed = [...expected["few"]!.slice(0, half), ...expected["all"]!.slice(half)];
          await holds(null, mixed, { tasks: ["few", "all"] });
        }
        await session.close();
      }
    }
  });
}

const [BATCH, LENGTH, WIDTH, HEADS] = [2, 4, 8, 2];
const INT32 = 6;

/** Inputs of an attention beside its weights, and its attributes. */
interface Variant {
  readonly mask?: readonly [dims: readonly number[], values: readonly number[]];
  /** True if an input is added to the scores. */
  readonly scores?: boolean;
  /** True if it has a bias, or zeros: some versions of onnxruntime crash without. */
  readonly bias?: "none" | "zeros";
  readonly attributes?: Attributes;
  /** Columns of queries, keys and values. */
  readonly sizes?: readonly number[];
  readonly opset?: number;
}

const VARIANTS: Record<string, Variant> = {
  plain: {},
  "without a bias": { bias: "none" },
  "a mask of rows": {
    mask: [
      [BATCH, LENGTH],
      [1, 1, 1, 0, 0, 1, 1, 1],
    ],
  },
  "lengths of rows": { mask: [[BATCH], [3, 4]] },
  "a mask of pairs": {
    mask: [[BATCH, LENGTH, LENGTH], Array.from({ length: 32 }, (_, i) => (i % 3 === 1 ? 0 : 1))],
  },
  "one direction": { attributes: { unidirectional: 1 } },
  "one direction and a mask": {
    attributes: { unidirectional: 1 },
    mask: [
      [BATCH, LENGTH],
      [1, 1, 1, 0, 1, 1, 1, 1],
    ],
  },
  "a scale and a value for what is masked": {
    attributes: { scale: { float: 0.3 }, mask_filter_value: { float: -3 } },
    mask: [
      [BATCH, LENGTH],
      [1, 1, 1, 0, 0, 1, 1, 1],
    ],
  },
  "scores that are added to": { scores: true },
  "narrow values": { sizes: [8, 8, 4], attributes: { qkv_hidden_sizes: [8, 8, 4] } },
  "an old opset": { opset: 11 },
};

const wave = (count: number, step: number): number[] => Array.from({ length: count }, (_, i) => Math.sin(1 + step * i));

/** A model of one attention. */
function attention(variant: Variant, change: (node: NodeProto) => void = () => undefined): Uint8Array<ArrayBuffer> {
  const { mask, scores, bias, attributes = {}, sizes = [8, 8, 8], opset = 17 } = variant;
  const total = sizes.reduce((a, b) => a + b, 0);
  const input = ["x", "w", bias === "none" ? "" : "b", mask ? "mask" : "", "", scores ? "scores" : ""];
  const node = makeNode("Attention", "attention", input, "y", { num_heads: HEADS, ...attributes });
  node.domain = "com.microsoft";
  change(node);
  const graph = {
    ...{ node: [node], output: [makeValue("y", 1)] },
    input: [
      makeValue("x", 1, [BATCH, LENGTH, WIDTH]),
      ...(mask ? [makeValue("mask", INT32, mask[0])] : []),
      ...(scores ? [makeValue("scores", 1, [BATCH, HEADS, LENGTH, LENGTH])] : []),
    ],
    initializer: [
      makeFloats("w", wave(WIDTH * total, 1.3), [WIDTH, total]),
      makeFloats("b", bias ? Array.from({ length: total }, () => 0) : wave(total, 0.7), [total]),
    ],
  };
  return modelOf(graph, { opset });
}

function attentionFeeds(ort: Ort, { mask, scores }: Variant): Record<string, InstanceType<Ort["Tensor"]>> {
  return {
    x: new ort.Tensor("float32", Float32Array.from(wave(BATCH * LENGTH * WIDTH, 2.1)), [BATCH, LENGTH, WIDTH]),
    ...(mask && { mask: new ort.Tensor("int32", Int32Array.from(mask[1]), [...mask[0]]) }),
    ...(scores && {
      scores: new ort.Tensor("float32", Float32Array.from(wave(64, 0.9)), [BATCH, HEADS, LENGTH, LENGTH]),
    }),
  };
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: an attention that is taken apart computes what it did`, async (t) => {
    for (const [what, variant] of Object.entries(VARIANTS)) {
      const bytes = attention(variant);
      const file = await readModel(bytes);
      const operators = file.model.graph.proto.node.map(({ opType }) => opType);
      const sum = variant.bias === "none" ? [] : ["Add"];
      t.same(operators.slice(0, 2 + sum.length), ["MatMul", ...sum, "Split"], what);
      t.same([operators.at(-1), operators.includes("Attention")], ["MultiHeadAttention", false], what);
      // WebGPU takes no other masks.
      if (variant.mask?.[0].length === 2) t.equal(file.model.graph.proto.node.at(-1)!.input[4], "", what);
      const results = [];
      const before = variant.bias ? attention({ ...variant, bias: "zeros" }) : bytes;
      for (const model of [before, toBinary("ModelProto", file.model.proto)]) {
        const session = await ort.InferenceSession.create(model);
        results.push((await session.run(attentionFeeds(ort, variant)))["y"]!.data as Float32Array);
        await session.release();
      }
      const [expected, found] = results as [Float32Array, Float32Array];
      const off = relativeDifference(found, expected);
      t.ok(off <= 1e-6, `${what}: off by ${off}`);
    }
  });
}

t.test("what cannot be taken apart is refused by name, with a way out", async (t) => {
  const pack = await packOf(t, "bert");
  const bert = (change: (node: NodeProto) => void): Uint8Array =>
    changed(new Uint8Array(readFileSync(data("fused/bert.onnx"))), ({ node }) =>
      node.filter(({ opType }) => opType === "Attention").forEach(change),
    );
  const attributes = (of: Attributes) => (node: NodeProto) =>
    void node.attribute.push(...makeNode("", "", [], "", of).attribute);
  for (const [what, change, message] of [
    ["rotary", attributes({ do_rotary: 1 }), /turns its queries and keys \(do_rotary\); pass the unoptimised export/],
    ["sizes", attributes({ qkv_hidden_sizes: [16, 8, 24] }), /divides 48 columns into \[16, 8, 24\]/],
    ["a past", (node) => void (node.input[4] = "input_ids"), /keeps its keys and values for the next run/],
    ["a present", (node) => void (node.output[1] = `${node.name}/present`), /keeps its keys and values/],
    ["another weight", (node) => void (node.input[1] = "input_ids"), /has a weight that the file does not hold/],
    ["QAttention", (node) => void (node.opType = "QAttention"), /quantise the unoptimised export instead/],
    ["PackedAttention", (node) => void (node.opType = "PackedAttention"), /before convert_to_packing_mode/],
  ] as [string, (node: NodeProto) => void, RegExp][]) {
    t.match(
      await refusal(() => createEigenSession(NODE, bert(change), pack)),
      { name: "BaseMismatchError", message },
      what,
    );
  }
});

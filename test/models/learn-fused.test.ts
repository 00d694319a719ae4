/**
 * Gradients through fused operators: of files of onnxruntime-genai's model builder, compared with PEFT's, packed layers
 * and 4 bits among them; and every definition, compared with ONNX Runtime's fused operator.
 */
import { readFileSync } from "node:fs";
import { openPack } from "eigenlora";
import { taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer, type Encode } from "eigenlora/train";
import t from "tap";
import { modelOf } from "../support/graphs.ts";
import { elementsOf, transpose } from "../support/internals/base.ts";
import { DEFINITIONS, shadowOf } from "../support/internals/learn.ts";
import {
  type Attributes,
  create,
  makeFloats,
  makeInts,
  makeNode,
  makeValue,
  parseModel,
  type TensorProto,
  type Trainable,
  toBinary,
} from "../support/internals/models.ts";
import { fitted, goldensIn, learnedOff, noise, relative } from "../support/learning.ts";
import { data, LOSSLESS, packed, packOf } from "../support/packs.ts";
import { type Feeds, int64, NODE, ORTS, type Ort, open, NODE as ort } from "../support/sessions.ts";

const ROWS: readonly number[][] = JSON.parse(readFileSync(data("builder/goldens.json"), "utf8")).rows;

/** File, model of its adapters, heads of the cache. */
const FILES = [
  ["llama", "llama", 2],
  ["llama-apart", "llama", 2],
  ["llama-int4", "llama", 2],
  ["qwen2", "qwen2", 2],
  ["qwen3", "qwen3", 2],
  ["small-gates", "small", 1],
  ["phi3", "phi3", 2],
] as const;

/** Largest relative difference of a gradient from PEFT's, and that of the loss. */
async function learned(ort: Ort, name: string, kind: string, heads: number): Promise<[string, number][]> {
  const [adapter] = await readAdapters([data(`builder/adapters/${kind}/all`)]);
  const pack = await packed([adapter!]);
  const session = await open(ort, data(`builder/${name}.onnx`), pack, { trainable: true });
  const [batch, length] = [ROWS.length, ROWS[0]!.length];
  const feeds: Feeds = {
    input_ids: int64(ort, ROWS),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(batch * length).fill(1n), [batch, length]),
  };
  for (const input of session.inputNames)
    if (/past/.test(input)) feeds[input] = new ort.Tensor("float32", new Float32Array(0), [batch, heads, 0, 16]);
  // Every position learns one token.
  const classes = Array.from({ length: batch * length }, (_, row) => (7 * row + 3) % 48);
  const expected = await goldensIn(data("builder/gradients.safetensors"), `${name}/`);
  const { off } = await learnedOff(ort, session, adapter!, feeds, classes, expected);
  await session.close();
  await pack.close();
  return off;
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`${runtime}: gradients of files of the model builder are PEFT's`, async (t) => {
    for (const [name, kind, heads] of FILES) {
      if (ort !== NODE && name !== "llama-int4" && name !== "llama") continue;
      const off = await learned(ort, name, kind, heads);
      const [worst, by] = off.reduce((a, b) => (a[1] >= b[1] ? a : b));
      t.ok(off.length > 8 && by <= 2e-5, `${name}: ${worst} is off by ${by.toExponential(1)}`);
    }
  });
}

/** One node, its inputs by kind. */
interface Case {
  readonly op: string;
  readonly inputs: readonly (readonly number[] | TensorProto | bigint[][] | "")[];
  readonly attributes?: Attributes;
  readonly outputs?: readonly string[];
  /** Nodes in front, of inputs "x0" … */
  readonly before?: readonly [op: string, input: string, made: string][];
  readonly opset?: number;
}

const table = (name: string, rows: number, columns: number, of: (angle: number) => number): TensorProto =>
  makeFloats(
    name,
    Array.from({ length: rows * columns }, (_, i) => of(Math.floor(i / columns) / 10 ** ((i % columns) / columns))),
    [rows, columns],
  );
const cos = table("cos", 16, 4, Math.cos);
const sin = table("sin", 16, 4, Math.sin);
const ids = (...rows: number[][]): bigint[][] => rows.map((row) => row.map(BigInt));
const weights = (name: string, ...dims: number[]): TensorProto =>
  makeFloats(name, [...noise(elementsOf(dims), 99)], dims);

const [cos8, sin8] = [table("cos", 16, 8, Math.cos), table("sin", 16, 8, Math.sin)];
const past = [2, 2, 0, 16] as const;
const gqa = (attributes: Attributes, inputs: Case["inputs"]): Case => ({
  op: "com.microsoft.GroupQueryAttention",
  attributes: { num_heads: 4, kv_num_heads: 2, scale: { float: 0.3 }, ...attributes },
  outputs: ["y", "presentKey", "presentValue"],
  inputs,
});

const FORWARD: readonly Case[] = [
  gqa({ do_rotary: 1 }, [[2, 5, 128], "", "", past, past, "seqlens" as never, "total" as never, cos8, sin8]),
  gqa({ do_rotary: 1, local_window_size: 2, softcap: { float: 2 } }, [
    ...[[2, 5, 64] as const, [2, 5, 32] as const, [2, 5, 32] as const, past, past],
    ...["seqlens" as never, "total" as never, cos8, sin8],
  ]),
  gqa({ do_rotary: 1, rotary_interleaved: 1 }, [
    ...[[2, 5, 128] as const, "" as const, "" as const, past, past],
    ...["seqlens" as never, "total" as never, cos8, sin8],
  ]),
  gqa({}, [[2, 5, 128], "", "", past, past, "seqlens" as never, "total" as never]),
  {
    op: "com.microsoft.MultiHeadAttention",
    attributes: { num_heads: 4, scale: { float: 0.4 } },
    inputs: [
      [2, 5, 32],
      [2, 7, 32],
      [2, 7, 32],
    ],
  },
  {
    op: "com.microsoft.MultiHeadAttention",
    attributes: { num_heads: 4, scale: { float: 0.4 }, unidirectional: 1 },
    inputs: [[2, 5, 32], [2, 5, 32], [2, 5, 32], weights("bias", 96), "", [1, 4, 5, 5]],
  },
  {
    op: "com.microsoft.SkipSimplifiedLayerNormalization",
    inputs: [[2, 5, 8], [2, 5, 8], weights("g", 8)],
    outputs: ["y", "", "", "sum"],
    attributes: { epsilon: { float: 1e-3 } },
  },
  {
    op: "com.microsoft.SkipLayerNormalization",
    inputs: [[2, 5, 8], [2, 5, 8], weights("g", 8), weights("b", 8), weights("c", 8)],
    outputs: ["y", "", "", "sum"],
  },
  { op: "com.microsoft.BiasGelu", inputs: [[2, 5, 8], weights("b", 8)] },
  { op: "com.microsoft.FastGelu", inputs: [[2, 5, 8], weights("b", 8)] },
  { op: "com.microsoft.QuickGelu", inputs: [[2, 5, 8]] },
  { op: "com.microsoft.RotaryEmbedding", inputs: [[2, 5, 32], ids([0, 1, 2, 3, 4], [3, 4, 5, 6, 7]), cos, sin] },
  {
    op: "com.microsoft.RotaryEmbedding",
    attributes: { interleaved: 1 },
    inputs: [[2, 5, 32], ids([0, 1, 2, 3, 4], [3, 4, 5, 6, 7]), cos, sin],
  },
  {
    op: "RotaryEmbedding",
    attributes: { num_heads: 4 },
    opset: 23,
    inputs: [[2, 5, 32], cos, sin, ids([0, 1, 2, 3, 4], [3, 4, 5, 6, 7])],
  },
];

t.test("every definition computes what its operator does", async (t) => {
  t.same([...new Set(FORWARD.map(({ op }) => op))].sort(), [...DEFINITIONS.keys()].sort(), "each has a case");
  for (const { op, inputs, attributes = {}, outputs = ["y"], opset = 17 } of FORWARD) {
    const graph = create("GraphProto", { name: "one" });
    const feeds: Record<string, never> = {};
    const names = inputs.map((input, i) => {
      if (input === "") return "";
      const name = `x${i}`;
      if ((input as unknown) === "seqlens") graph.initializer.push(ints32(name, [4, 4], [2]));
      else if ((input as unknown) === "total") graph.initializer.push(ints32(name, [5], []));
      else if (!Array.isArray(input)) graph.initializer.push({ ...(input as TensorProto), name });
      else if (Array.isArray(input[0])) {
        const rows = input as bigint[][];
        graph.initializer.push({ ...makeInts(name, rows.flat().map(Number), [rows.length, rows[0]!.length]) });
      } else {
        const dims = input as unknown as readonly number[];
        graph.input.push(makeValue(name, 1, dims));
        const values = noise(elementsOf(dims), i + 7).map((v) => 4 * v);
        feeds[name] = new NODE.Tensor("float32", values, [...dims]) as never;
      }
      return name;
    });
    const [opType, domain] = op.includes(".") ? [op.split(".").at(-1)!, "com.microsoft"] : [op, ""];
    graph.node.push(makeNode(opType, op, names, outputs, attributes, domain));
    const wanted = outputs.filter((name) => name !== "");
    // Definitions ignore outputs of the graph: a node must read them.
    for (const name of wanted) graph.node.push(makeNode("Identity", `${name}.out`, [name], `${name}.out`));
    graph.output.push(...wanted.map((name) => makeValue(`${name}.out`, 1)));
    const bytes = modelOf(graph, { opset });
    const { model, refused } = shadowOf(parseModel(bytes, op));
    t.same([...refused.values()], [], op);
    t.notOk(
      model.graph.proto.node.some((node) => node.opType === opType && node.name === op),
      `${op} is taken apart`,
    );
    const results = [];
    for (const one of [bytes, toBinary("ModelProto", model.proto)]) {
      const session = await NODE.InferenceSession.create(one);
      results.push(await session.run(feeds));
      await session.release();
    }
    for (const name of wanted) {
      const [fused, apart] = results.map((one) => one[`${name}.out`]!);
      t.same(apart!.dims, fused!.dims, `${op}: ${name}`);
      const off = relative(apart!.data as Float32Array, fused!.data as Float32Array);
      t.ok(off < 1e-5, `${op} ${JSON.stringify(attributes)}: ${name} is off by ${off.toExponential(1)}`);
    }
  }
});

function ints32(name: string, values: readonly number[], dims: readonly number[]): TensorProto {
  const rawData = new Uint8Array(Int32Array.from(values).buffer);
  return { ...makeInts(name, [], dims), dataType: 6, rawData };
}

/** Encodes letters as tokens; the files know 48. */
const tokens = (text: string): number[] => [...text].map((letter) => letter.charCodeAt(0) % 48);
const encode: Encode & { eos_token?: string } = Object.assign(
  ([text]: readonly string[]) => {
    const ids = tokens(text!);
    return { input_ids: { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) } };
  },
  { eos_token: "." },
);
const EXAMPLES = ["abc", "bcd", "cde", "def"].map((prompt) => ({ prompt, completion: "xyz" }));

const [base, fine] = ["llama", "llama-int4"].map((name) => data(`builder/${name}.onnx`)) as [string, string];

/** One text, with an empty cache. */
function feeds(inputNames: readonly string[]): Record<string, never> {
  const ids = tokens("abcxy");
  const ones = ids.map(() => 1);
  const all: Record<string, unknown> = { input_ids: int64(ort, [ids]), attention_mask: int64(ort, [ones]) };
  for (const name of inputNames)
    if (/past/.test(name)) all[name] = new ort.Tensor("float32", new Float32Array(0), [1, 2, 0, 16]);
  return all as Record<string, never>;
}

t.test("learned in f32, used in 4 bits", async (t) => {
  const { bytes } = await packOf(["builder/adapters/llama/all"], LOSSLESS);
  const learning = await createEigenSession(ort, base, await openPack(bytes), { trainable: true });
  const trainer = await createTrainer(learning, { encode, seed: 1 });
  const [first, last] = await fitted(trainer, EXAMPLES, { steps: 12, batch: 4 });
  t.ok(last < first, `loss ${first.toFixed(2)} to ${last.toFixed(2)}`);
  const file = await trainer.task({ id: "mine" });
  await learning.close();

  const served = await openPack(bytes);
  const logits: Float32Array[] = [];
  for (const mode of ["core", "factors"] as const) {
    const session = await createEigenSession(ort, fine, served, { mode });
    if (!served.tasks.has("mine")) await session.addTask("mine", file);
    for (const task of mode === "core" ? ["mine", null] : ["mine"]) {
      await session.switchTask(task);
      logits.push((await session.run(feeds(session.inputNames)))["logits"]!.data as Float32Array);
    }
    await session.close();
  }
  const [core, without, factors] = logits as [Float32Array, Float32Array, Float32Array];

  const other = await createEigenSession(ort, fine, await openPack(bytes), { trainable: true });
  const { inputs, run, base: none } = (other as unknown as { readonly trainable: Trainable }).trainable;
  const { modules } = await taskAdapter(served, "mine");
  const all: Record<string, unknown> = feeds(other.inputNames);
  const values = await none();
  for (const { name, of, kind } of inputs) {
    const { rank, A, Bt } = await modules.get(of)!.read();
    const { data, dims } = values.get(name)!;
    if (kind === "A") all[name] = new ort.Tensor("float32", transpose(A, rank, dims[0]!), [1, dims[0]!, rank]);
    else if (kind === "B") all[name] = new ort.Tensor("float32", Bt, [1, rank, dims[1]!]);
    else all[name] = new ort.Tensor("float32", data as Float32Array, [1, ...dims]);
  }
  const expected = (await run(all as never, ["logits"]))["logits"]!.data as Float32Array;
  await other.close();
  await served.close();

  t.ok(relative(without, expected) > 0.01, "the task changes the answer");
  // The task is not rounded to 4 bits; activations are rounded by the layers.
  t.ok(relative(core, expected) < 1e-4, `core: off by ${relative(core, expected).toExponential(1)}`);
  t.ok(relative(factors, expected) < 1e-4, `factors: off by ${relative(factors, expected).toExponential(1)}`);
});

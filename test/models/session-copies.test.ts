/**
 * Layers that a model applies more than once, in whatever form the exporter wrote them: a task changes all
 * applications. Expected values come from ONNX Runtime, on the same file with W + ΔW written into every initializer
 * that holds the layer.
 */
import { readFileSync } from "node:fs";
import type { CpuView, Pack, WeightHost } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import { InferenceSession, Tensor } from "onnxruntime-node";
import t, { type Test } from "tap";
import { adapterOf, linear } from "../support/adapters.ts";
import { deltaOf } from "../support/compare.ts";
import { changed } from "../support/graphs.ts";
import {
  detachWeights,
  fromBinary,
  type GraphProto,
  prepareModel,
  readModel,
  toBinary,
  type WeightInput,
} from "../support/internals/models.ts";
import { viewValues } from "../support/internals/runtime.ts";
import { data, LOSSLESS, packed } from "../support/packs.ts";
import { difference, MODES, NODE, open, outputOf, refusal } from "../support/sessions.ts";

const SIZE = 8;
const x = new Tensor(
  "float32",
  Float32Array.from({ length: 2 * 3 * 6 }, (_, i) => Math.sin(i)),
  [2, 3, 6],
);

/** A model of test/data/onnx, changed. */
const applied = (name: string, change: (graph: GraphProto) => void = () => undefined): Uint8Array =>
  changed(new Uint8Array(readFileSync(data(`onnx/${name}.onnx`))), change);

function factors(seed: number): { rank: number; A: Float32Array; Bt: Float32Array } {
  const values = (shift: number): Float32Array =>
    Float32Array.from({ length: 2 * SIZE }, (_, i) => 0.4 * Math.sin(seed + shift + 1.3 * i));
  return { rank: 2, A: values(0), Bt: values(100) };
}

const adapter = (id: string, seed: number) => adapterOf(id, [linear("mid", SIZE, SIZE, factors(seed))]);

async function packOn(base?: WeightHost): Promise<Pack> {
  return packed([adapter("a", 1), adapter("b", 2)], base ? { ...LOSSLESS, base } : LOSSLESS);
}

/** ΔW of a task, [out, in]. */
const change = (seed: number): Float64Array => deltaOf(factors(seed));

/** The model's result with ΔW in these initializers, `turned` ones [in, out]. */
async function expected(bytes: Uint8Array, delta: Float64Array, names: Record<string, "turned" | "as it is">) {
  const proto = fromBinary("ModelProto", bytes);
  for (const tensor of proto.graph!.initializer) {
    const how = names[tensor.name];
    if (!how) continue;
    const values = new Float32Array(tensor.rawData.slice().buffer);
    for (let o = 0; o < SIZE; o++) {
      for (let n = 0; n < SIZE; n++) values[how === "turned" ? n * SIZE + o : o * SIZE + n]! += delta[o * SIZE + n]!;
    }
    tensor.rawData = new Uint8Array(values.buffer);
  }
  const session = await InferenceSession.create(toBinary("ModelProto", proto), { logSeverityLevel: 3 });
  const { logits } = await session.run({ x });
  await session.release();
  return logits!.data as Float32Array;
}

/** The model's result where the weights that tasks change are inputs, as for an engine on a device. */
async function fed(t: Test, bytes: Uint8Array, pack: Pack, delta: Float64Array): Promise<Float32Array> {
  const file = await readModel(bytes);
  const options = { mode: "folded", foldedInputs: true } as const;
  const { folded, names } = await prepareModel(file, pack, (await pack.bases()).bytes, options);
  const [{ input, name, shape }, ...others] = folded as [WeightInput];
  t.same([others, name], [[], names.get("mid")], "one input, however often the layer is written down");
  const host = await openOnnxHost(bytes);
  const turned = [...host.list()].find((one) => one.name === name)!.layout === "in-out";
  const values = viewValues((await host.read(name)) as CpuView).slice();
  for (let o = 0; o < SIZE; o++) {
    for (let n = 0; n < SIZE; n++) values[turned ? n * SIZE + o : o * SIZE + n]! += delta[o * SIZE + n]!;
  }
  const detached = await detachWeights(file);
  const session = await InferenceSession.create(detached.bytes as Uint8Array<ArrayBuffer>, {
    externalData: [...detached.files],
    logSeverityLevel: 3,
  });
  const { logits } = await session.run({ x, [input]: new Tensor("float32", values, shape) });
  await session.release();
  await file.close();
  return logits!.data as Float32Array;
}

const forget = ({ node }: GraphProto, names = true): void => {
  for (const one of node) {
    one.metadataProps = [];
    if (names) one.name = "";
  }
};

/** Renames a value wherever it is. */
function rename(graph: GraphProto, from: string, to: string): void {
  for (const tensor of graph.initializer) if (tensor.name === from) tensor.name = to;
  for (const node of graph.node) node.input = node.input.map((value) => (value === from ? to : value));
}

/** One initializer for each application, neither named like the layer. */
function twoTurned(graph: GraphProto): void {
  const gemm = graph.node.find(({ opType }) => opType === "Gemm")!;
  const copy = graph.initializer.find(({ name }) => name === "val_2" || name === "onnx::MatMul_18")!;
  const weight = graph.initializer.find(({ name }) => name === "mid.weight")!;
  weight.rawData = copy.rawData.slice();
  gemm.attribute.find(({ name }) => name === "transB")!.i = 0n;
  rename(graph, "mid.weight", "val_90");
}

const both = (copy: string): Record<string, "turned" | "as it is"> => ({ [copy]: "turned", "mid.weight": "as it is" });
const [TORCHSCRIPT, DYNAMO] = ["onnx::MatMul_18", "val_2"];

const MODELS: Record<string, { bytes: Uint8Array; stored: Record<string, "turned" | "as it is"> }> = {
  "as the TorchScript exporter writes it": { bytes: applied("applied-torchscript"), stored: both(TORCHSCRIPT) },
  "as the dynamo exporter writes it": { bytes: applied("applied-dynamo"), stored: both(DYNAMO) },
  "with the nodes' names lost": { bytes: applied("applied-dynamo", forget), stored: both(DYNAMO) },
  "without anything that names the copy": {
    bytes: applied("applied-dynamo", (graph) => {
      forget(graph);
      // Its bias goes by another name too.
      const bias = graph.initializer.find(({ name }) => name === "mid.bias")!;
      graph.initializer.push({ ...bias, name: "val_70" });
      const add = graph.node.filter(({ opType }) => opType === "Add").find(({ input }) => input.includes("mid.bias"))!;
      add.input = add.input.map((value) => (value === "mid.bias" ? "val_70" : value));
    }),
    stored: both(DYNAMO),
  },
  "two of an equal claim": {
    bytes: applied("applied-dynamo", twoTurned),
    stored: { val_2: "turned", val_90: "turned" },
  },
  "two calls that the exporter has numbered": {
    bytes: applied("applied-torchscript", twoTurned),
    stored: { [TORCHSCRIPT]: "turned", val_90: "turned" },
  },
  "one initializer for both": {
    bytes: applied("applied-dynamo", (graph) => {
      twoTurned(graph);
      rename(graph, "val_90", "val_2");
      graph.initializer.splice(0, Infinity, ...new Map(graph.initializer.map((one) => [one.name, one])).values());
    }),
    stored: { val_2: "turned" },
  },
};

for (const [what, { bytes, stored }] of Object.entries(MODELS)) {
  t.test(what, async (t) => {
    const base = await expected(bytes, new Float64Array(SIZE * SIZE), stored);
    for (const fingerprints of [true, false]) {
      const pack = await packOn(fingerprints ? await openOnnxHost(bytes) : undefined);
      t.equal(pack.modules[0]!.fingerprint !== undefined, fingerprints);
      for (const mode of MODES) {
        const session = await open(NODE, bytes, pack, { mode });
        for (const [task, seed] of [
          ["a", 1],
          ["b", 2],
          [null, 0],
        ] as const) {
          await session.switchTask(task);
          const found = await outputOf(session, { x });
          const wanted = task === null ? base : await expected(bytes, change(seed), stored);
          t.ok(difference(found, wanted) <= 1e-5, `${mode}, ${task}: off by ${difference(found, wanted)}`);
          if (task !== null) t.ok(difference(wanted, base) > 0.05, "the task has an effect");
        }
        await session.close();
      }
      const off = difference(await fed(t, bytes, pack, change(1)), await expected(bytes, change(1), stored));
      t.ok(off <= 1e-5, `weights as inputs: off by ${off}`);
    }
  });
}

/** Changes a value of a weight. */
function alter(graph: GraphProto, name: string): void {
  const tensor = graph.initializer.find((one) => one.name === name)!;
  tensor.rawData = tensor.rawData.slice();
  tensor.rawData[3] = tensor.rawData[3]! ^ 1;
}

t.test("weights of an equal claim that differ are told by their nodes, and one can be chosen", async (t) => {
  const bytes = applied("applied-dynamo", (graph) => {
    twoTurned(graph);
    alter(graph, "val_90");
  });
  const pack = await packOn();
  for (const mode of MODES) {
    const error = await refusal(() => open(NODE, bytes, pack, { mode }));
    t.match(error, {
      tag: "base",
      module: "mid.weight",
      message:
        /"mid\.weight" may be any of several.*"val_90" of Gemm "node_linear_2"; "val_2" of MatMul "node_MatMul_3".*`names`/,
    });
    for (const name of ["val_2", "val_90"]) {
      const session = await open(NODE, bytes, pack, { mode, names: new Map([["mid", name]]) });
      await session.switchTask("a");
      const wanted = await expected(bytes, change(1), { [name]: "turned" });
      t.ok(difference(await outputOf(session, { x }), wanted) <= 1e-5, `${mode}, ${name}`);
      await session.close();
    }
  }
  const host = await openOnnxHost(bytes);
  await t.rejects(host.read("mid.weight"), { tag: "base", message: /"val_2" of MatMul/ });
  t.ok(await host.read("val_2"));
});

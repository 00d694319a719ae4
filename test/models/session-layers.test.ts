/**
 * Layers whose bias or quantised values stand where a task is added, on models of one layer made here: expected values follow by
 * arithmetic.
 */
import { openPack, type Pack } from "eigenlora";
import { type Adapter, buildPack } from "eigenlora/build";
import { Tensor } from "onnxruntime-node";
import t from "tap";
import { adapterOf } from "../support/adapters.ts";
import { modelOf } from "../support/graphs.ts";
import {
  create,
  makeFloats,
  makeNode,
  makeValue,
  type NodeProto,
  TensorProtoSchema,
} from "../support/internals/models.ts";
import { concat, LOSSLESS } from "../support/packs.ts";
import { NODE, type Options, open, outputOf } from "../support/sessions.ts";

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
      create(TensorProtoSchema, { name: "zero", dataType: UINT8, rawData: new Uint8Array([0]) }),
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

async function packed(adapter: Adapter): Promise<Pack> {
  return openPack(concat((await buildPack([adapter], LOSSLESS)).chunks));
}

async function answers(model: Uint8Array<ArrayBuffer>, adapter: Adapter, options: Options): Promise<number[][]> {
  const session = await open(NODE, model, await packed(adapter), options);
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

/**
 * Changes of sessions to graphs, and what they read from them: adapted layers in branches and layers that run twice,
 * and the values of quantised weights, compared with ONNX Runtime's own results.
 */
import { InferenceSession, Tensor } from "onnxruntime-node";
import t from "tap";
import { changed as changedBytes, modelOf } from "../support/graphs.ts";
import {
  create,
  findParameters,
  type GraphProto,
  inject,
  type ModelFile,
  makeNode,
  makeValue,
  type NodeProto,
  type OnnxParameter,
  parseModel,
  planSession,
  readLinearWeight,
  readModel,
  type TensorProto,
} from "../support/internals/models.ts";
import {
  difference,
  feeds,
  GOLDENS,
  golden,
  goldenRow,
  MODES,
  model,
  modelBytes,
  NODE,
  ORTS,
  open,
  outputOf,
  packFor,
  refusal,
} from "../support/sessions.ts";

t.test("beside [batch, sequence, in] terms need no reshapes, whoever exported the model", async (t) => {
  for (const name of ["torchscript", "dynamo", "f16", "external"]) {
    const pack = await packFor(GOLDENS.models[name]!);
    const file = await readModel(model(name));
    const { changes: wanted } = await planSession(file, pack, (await pack.bases()).bytes, { mode: "factors" });
    inject(file.model, wanted);
    const added = file.model.proto.graph!.node.filter(
      (node) =>
        node.name.startsWith("eigenlora/") && wanted.modules.some(({ name }) => node.name.includes(`/${name}/`)),
    );
    t.same([...new Set(added.map(({ opType }) => opType))].sort(), ["Add", "MatMul"], name);
    t.equal(added.length, 3 * wanted.modules.length);
    await file.close();
  }
});

for (const { name, ort } of ORTS) {
  t.test(`${name}: a layer in a branch, once or twice`, async (t) => {
    t.equal(parseModel(modelBytes("branches"), "branches").opset, 11);
    t.equal(parseModel(modelBytes("twice"), "twice").opset, 11);
    for (const mode of MODES) {
      const session = await open(ort, model("branches"), await packFor("mlp"), { mode });
      for (const task of [null, "a", "b"]) {
        await session.switchTask(task);
        for (const deep of [false, true]) {
          const run = { ...feeds(ort, session), deep: new ort.Tensor("bool", Uint8Array.of(Number(deep)), [1]) };
          const off = difference(await outputOf(session, run), golden(deep ? "twice" : "mlp", task));
          t.ok(off <= 1e-5, `${mode}, ${task}, deep ${deep}: off by ${off}`);
        }
      }
      if (mode !== "folded") {
        const run = { ...feeds(ort, session, [2, 1, 0]), deep: new ort.Tensor("bool", Uint8Array.of(1), [1]) };
        const mixed = await outputOf(session, run, { tasks: ["b", null, "a"] });
        const [b, base, a] = ["b", null, "a"].map((task) => golden("twice", task));
        const expected = [...b!.slice(6), ...base!.slice(4, 8), ...a!.slice(0, 2)];
        const found = [...mixed.subarray(0, 3), ...mixed.subarray(4, 8), ...mixed.subarray(8, 10)];
        t.ok(difference(found, expected) <= 1e-5, `${mode}: a task per row inside a branch`);
      }
      await session.close();
    }
  });
}

/** One of the tiny models, changed. */
const changed = (name: string, change: (graph: GraphProto) => void): Uint8Array =>
  changedBytes(modelBytes(name), change);

t.test("what else reads a layer's result", async (t) => {
  // The product itself is an output of the model, and must show the task too.
  const exposed = changed("transposed", (graph) => {
    graph.output.push(makeValue("/mid/MatMul_output_0", FLOAT));
  });
  const products: Float32Array[] = [];
  for (const mode of MODES) {
    const session = await open(NODE, exposed, await packFor("mlp"), { mode });
    t.same(session.outputNames, ["logits", "/mid/MatMul_output_0"]);
    await session.switchTask("b");
    const results = await session.run(feeds(NODE, session));
    t.ok(difference(results["logits"]!.data as Float32Array, golden("mlp", "b")) <= 1e-5);
    products.push(results["/mid/MatMul_output_0"]!.data as Float32Array);
    await session.close();
  }
  for (const product of products) t.ok(difference(product, products[2]!) <= 1e-5, "as folded weights give it");

  // The head's bias comes where it cannot be seen: it must not be added to the task's own.
  const apart = changed("transposed", (graph) => {
    const at = graph.node.findIndex((node) => node.name === "/classifier/Add");
    const add = graph.node[at]!;
    add.input = add.input.map((value) => (value === "/classifier/MatMul_output_0" ? "apart" : value));
    graph.node.splice(at, 0, makeNode("Identity", "apart", ["/classifier/MatMul_output_0"], "apart"));
  });
  for (const mode of ["core", "factors"] as const) {
    const error = await refusal(async () => open(NODE, apart, await packFor("mlp"), { mode }));
    t.match(error, { tag: "base", module: "classifier.weight", message: /use mode "folded"$/ });
  }
  const session = await open(NODE, apart, await packFor("mlp"), { mode: "folded" });
  const error = await refusal(() => session.switchTask("a"));
  const message = /brings "classifier\.(bias" of \[2\]|weight" of \[2, 16\])/;
  t.match(error, { tag: "base", module: /^classifier/, message });
  t.equal(session.task, null);
  t.ok(difference(await outputOf(session, feeds(NODE, session)), golden("mlp", null)) <= 1e-5);
  await session.close();

  // A product that is scaled later would change by another amount than the adapter's.
  const scaled = changed("gemm", (graph) => {
    const node = graph.node.find(({ name }) => name === "/mid/Gemm")!;
    node.attribute.find(({ name }) => name === "alpha")!.f = 0.5;
  });
  t.match(await refusal(async () => open(NODE, scaled, await packFor("mlp"), { mode: "core" })), {
    tag: "base",
    message: /Gemm "\/mid\/Gemm" scales the product; use mode "folded"/,
  });
});

/** The MLP on x [batch, sequence, 12]; inside, the sequence may come first. */
function sequences(first: "batch" | "sequence"): Uint8Array {
  return changed("transposed", (graph) => {
    graph.input[0]!.type!.tensorType!.shape!.dim.splice(1, 0, {});
    graph.output[0]!.type!.tensorType!.shape = undefined;
    graph.valueInfo.length = 0;
    if (first === "batch") return;
    const turn = (from: string, to: string): NodeProto =>
      makeNode("Transpose", `turn/${from}`, [from], to, { perm: [1, 0, 2] });
    for (const one of graph.node) {
      one.input = one.input.map((name) => (name === "x" ? "x/turned" : name));
      one.output = one.output.map((name) => (name === "logits" ? "logits/turned" : name));
    }
    graph.node.unshift(turn("x", "x/turned"));
    graph.node.push(turn("logits/turned", "logits"));
  });
}

t.test("one task per row where the batch is not the first dimension is refused, not mixed up", async (t) => {
  const x = new Tensor(
    "float32",
    Float32Array.from(GOLDENS.feeds["x"]!.flat().slice(0, 24).concat(GOLDENS.feeds["x"]!.flat().slice(12, 36))),
    [2, 2, 12],
  );
  for (const mode of ["core", "factors"] as const) {
    const rows = await open(NODE, sequences("batch"), await packFor("mlp"), { mode });
    const found = await outputOf(rows, { x }, { tasks: ["a", "b"] });
    // Rows 0 and 1 of the goldens with a, which has two labels of three columns, rows 1 and 2 with b.
    const columns = found.length / 4;
    for (const [at, task, row] of [
      [0, "a", 0],
      [1, "a", 1],
      [2, "b", 1],
      [3, "b", 2],
    ] as const) {
      const expected = goldenRow("mlp", task, row);
      t.ok(
        difference(found.subarray(at * columns, at * columns + expected.length), expected) <= 1e-5,
        `${mode}, ${task}`,
      );
    }
    await rows.close();
    const mixed = await open(NODE, sequences("sequence"), await packFor("mlp"), { mode });
    for (const task of ["a", "b"]) {
      await mixed.switchTask(task);
      const alone = await outputOf(mixed, { x });
      t.ok(
        difference(alone.subarray(0, alone.length / 4), goldenRow("mlp", task, 0)) <= 1e-5,
        `${mode}: ${task} alone`,
      );
    }
    const error = await refusal(() => outputOf(mixed, { x }, { tasks: ["a", "b"] }));
    t.match(error, {
      tag: "backend",
      message: /the batch is not the first dimension of some adapted layer.*; run them one by one/,
    });
    await mixed.close();
  }
});

// ---- quantised weights

const [FLOAT, UINT8, INT8, INT32, _FLOAT16, UINT4, INT4] = [1, 2, 3, 6, 10, 21, 22];

let seed = 5;
function random(count: number, least: number, most: number): number[] {
  return Array.from({ length: count }, () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return least + ((seed >>> 8) / 2 ** 24) * (most - least);
  });
}
const integers = (count: number, least: number, most: number): number[] =>
  random(count, least, most + 1).map(Math.floor);

/** An initializer; 4-bit values are packed low nibble first. */
function tensor(name: string, dataType: number, dims: readonly number[], values: readonly number[]): TensorProto {
  const raw = (): Uint8Array => {
    if (dataType === FLOAT) return new Uint8Array(Float32Array.from(values).buffer);
    if (dataType === INT32) return new Uint8Array(Int32Array.from(values).buffer);
    if (dataType !== UINT4 && dataType !== INT4) return Uint8Array.from(values);
    const length = Math.ceil(values.length / 2);
    return Uint8Array.from({ length }, (_, i) => (values[2 * i]! & 15) | ((values[2 * i + 1]! & 15) << 4));
  };
  return create("TensorProto", { name, dataType, dims: dims.map(BigInt), rawData: raw() });
}

/** x [rows, K] → y */
const layer = (K: number, node: NodeProto[], initializer: TensorProto[]): Uint8Array =>
  modelOf(
    { node, initializer, input: [makeValue("x", FLOAT, ["", K])], output: [makeValue("y", FLOAT, ["", ""])] },
    { opset: 21 },
  );

async function opened(bytes: Uint8Array): Promise<{ file: ModelFile; weight: OnnxParameter }> {
  const file = await readModel(bytes);
  return { file, weight: findParameters(file.model).find(({ initializer }) => initializer === "W")! };
}

/** Largest difference between a layer's weight [N, K] as read here and ONNX Runtime's result for the unit matrix. */
async function disagreement(bytes: Uint8Array, N: number, K: number): Promise<number> {
  const session = await InferenceSession.create(bytes);
  const unit = Float32Array.from({ length: K * K }, (_, i) => Number(i % (K + 1) === 0));
  const { y } = await session.run({ x: new Tensor("float32", unit, [K, K]) });
  await session.release();
  const { file, weight } = await opened(bytes);
  if (weight.dtype !== "other") return Infinity;
  const at = await readLinearWeight(file, weight);
  const read = Float32Array.from({ length: N * K }, (_, i) => at(i % N, Math.floor(i / N)));
  return difference(read, y!.data as Float32Array);
}

t.test("MatMulNBits is read as ONNX Runtime computes it", async (t) => {
  const N = 6;
  for (const [bits, size, K] of [
    [4, 16, 48],
    [4, 16, 40],
    [4, 32, 96],
    [8, 16, 48],
    [8, 32, 70],
  ] as const) {
    const blocks = Math.ceil(K / size);
    const scales = tensor("scales", FLOAT, [N * blocks], random(N * blocks, 0.01, 0.2));
    const packed = tensor("W", UINT8, [N, blocks, (size * bits) / 8], integers((N * blocks * size * bits) / 8, 0, 255));
    const rowBytes = Math.ceil((blocks * bits) / 8);
    const zeros: Record<string, TensorProto | undefined> = {
      none: undefined,
      packed: tensor("zeros", UINT8, [N * rowBytes], integers(N * rowBytes, 0, 255)),
      float: tensor("zeros", FLOAT, [N * blocks], random(N * blocks, 0, 2 ** bits)),
    };
    for (const [kind, zero] of Object.entries(zeros)) {
      // ONNX Runtime has no such kernel.
      if (kind === "float" && bits === 8) continue;
      const inputs = ["x", "W", "scales", ...(zero ? ["zeros"] : [])];
      const attributes = { K, N, bits, block_size: size };
      const product = makeNode("MatMulNBits", "/layer/MatMul", inputs, "y", attributes, "com.microsoft");
      const off = await disagreement(layer(K, [product], [packed, scales, ...(zero ? [zero] : [])]), N, K);
      t.ok(off <= 1e-5, `${bits} bits, blocks of ${size}, K ${K}, zero points: ${kind}; off by ${off}`);
    }
  }
});

t.test("DequantizeLinear and MatMulInteger are read as ONNX Runtime computes them", async (t) => {
  const [N, K] = [6, 8];
  const ranges = { [UINT8]: [0, 255], [INT8]: [-128, 127], [UINT4]: [0, 15], [INT4]: [-8, 7] } as const;
  for (const type of [UINT8, INT8, UINT4, INT4] as const) {
    const values = (count: number): number[] => integers(count, ranges[type][0], ranges[type][1]);
    // MatMul [in, out] and Gemm [out, in]; one scale, one per row, one per column, blocks along either axis.
    for (const turned of [false, true]) {
      const [rows, columns] = turned ? [N, K] : [K, N];
      const layouts: [string, number[], Record<string, number>][] = [
        ["one scale", [], {}],
        ["a scale per row", [rows!], { axis: 0 }],
        ["a scale per column", [columns!], { axis: -1 }],
        ["blocks of rows", [rows! / 2, columns!], { axis: 0, block_size: 2 }],
        ["blocks of columns", [rows!, columns! / 2], { axis: 1, block_size: 2 }],
      ];
      for (const [what, dims, attributes] of layouts) {
        const count = dims.reduce((a, b) => a * b, 1);
        for (const zero of [false, true]) {
          const weight = tensor("W", type, [rows!, columns!], values(rows! * columns!));
          const tensors = [weight, tensor("s", FLOAT, dims, random(count, 0.01, 0.2))];
          if (zero) tensors.push(tensor("z", type, dims, values(count)));
          const inputs = ["W", "s", ...(zero ? ["z"] : [])];
          const dequantize = makeNode("DequantizeLinear", "/layer/Dequantize", inputs, "w", attributes);
          const product = turned
            ? makeNode("Gemm", "/layer/Gemm", ["x", "w"], "y", { transB: 1 })
            : makeNode("MatMul", "/layer/MatMul", ["x", "w"], "y");
          const off = await disagreement(layer(K, [dequantize, product], tensors), N, K);
          t.ok(off <= 1e-5, `type ${type}, ${what}, turned ${turned}, zero points ${zero}: off by ${off}`);
        }
      }
    }
  }
  // The unit matrix is quantised without loss.
  for (const perColumn of [false, true]) {
    const count = perColumn ? N : 1;
    const dims = perColumn ? [N] : [];
    const tensors = [
      tensor("W", INT8, [K, N], integers(K * N, -128, 127)),
      tensor("s", FLOAT, dims, random(count, 0.01, 0.2)),
      tensor("z", INT8, dims, new Array<number>(count).fill(perColumn ? 0 : 3)),
    ];
    const nodes = [
      makeNode("DynamicQuantizeLinear", "q", ["x"], ["xq", "xs", "xz"]),
      makeNode("MatMulInteger", "/layer/MatMul_quant", ["xq", "W", "xz", "z"], "i"),
      makeNode("Cast", "cast", ["i"], "f", { to: 1 }),
      makeNode("Mul", "scales", ["xs", "s"], "ss"),
      makeNode("Mul", "scaled", ["f", "ss"], "y"),
    ];
    const off = await disagreement(layer(K, nodes, tensors), N, K);
    t.ok(off <= 1e-5, `MatMulInteger, a scale per column ${perColumn}: off by ${off}`);
  }
});

/** The promises of `tfjsHost`, on any backend of TF.js. Runs in Node and in browsers. */
import { createRuntime, openPack, type Runtime, type RuntimeOptions } from "eigenlora";
import { type Tfjs, tfjsHost } from "eigenlora/tfjs";
import { webgpu } from "eigenlora/webgpu";
import { difference } from "./compare.ts";
import {
  asKernel,
  inputs,
  packFor,
  SELECTIONS,
  selections,
  trafficOf,
  type Values,
  type Weights,
  weightsOf,
} from "./frameworks.ts";
import type { SuiteTest } from "./stand-in.ts";

/** A tensor, or a variable. */
interface Tensor {
  readonly shape: number[];
  readonly dataId: object;
  data(): Promise<Float32Array>;
  dataSync(): Float32Array;
  clone(): Tensor;
  dispose(): void;
}

/** A LayersModel or a GraphModel. */
interface Model {
  readonly weights: never;
  predict(x: Tensor): Tensor;
  setWeights(weights: Tensor[]): void;
  dispose(): void;
}

/** The modules of TF.js that are used here. */
export interface Modules {
  readonly tf: Tfjs &
    Record<string, (...of: unknown[]) => never> & { memory(): { numTensors: number; numBytes: number } };
  readonly layers: { layers: Record<string, (config: object) => never>; sequential(config: object): Model };
  readonly loadGraphModel: (handler: object) => Promise<Model>;
}

const IMAGE = ["net.conv", "net.point", "net.query"];
const TEXT = ["net.tokens", "net.query"];
const GRAPH = ["net.query"];

export function tfjsSuite(t: SuiteTest, { tf, layers, loadGraphModel }: Modules): void {
  const tensor = ({ shape, data }: Values): Tensor => tf.tensor(data.slice(), shape as never) as unknown as Tensor;
  const gpu = (): RuntimeOptions =>
    tf.getBackend() === "webgpu" ? { backend: webgpu({ device: (tf.backend() as { device: never }).device }) } : {};
  const attach = async (of: readonly string[], model: never, more: RuntimeOptions = {}): Promise<Runtime> => {
    const runtime = await createRuntime(await openPack(await packFor(of)), {
      base: tfjsHost(tf, model),
      ...gpu(),
      ...more,
    });
    t.teardown(() => runtime.close());
    return runtime;
  };

  /** A network for images of 5 × 5, in Keras' form. */
  function imageModel(weights: Weights): Model {
    const { conv2d, globalAveragePooling2d, dense } = layers.layers as Record<string, (config: object) => never>;
    const labels = weights.get("net.classifier.bias")!.shape[0];
    const model = layers.sequential({
      layers: [
        conv2d!({ name: "net/conv", filters: 4, kernelSize: 3, activation: "tanh", inputShape: [5, 5, 3] }),
        conv2d!({ name: "net/point", filters: 6, kernelSize: 1 }),
        globalAveragePooling2d!({}),
        dense!({ name: "net/query", units: 5, activation: "tanh" }),
        dense!({ name: "net/classifier", units: labels }),
      ],
    });
    const names = [...IMAGE, "net.classifier"].flatMap((name) => [`${name}.weight`, `${name}.bias`]);
    const tensors = names.map((name) => tensor(asKernel(weights.get(name)!)));
    model.setWeights(tensors);
    for (const one of tensors) one.dispose();
    return model;
  }

  /** A table of tokens in one layer and a head, with variables that the caller holds. */
  function textModel(weights: Weights): { variables: Map<string, Tensor>; run(): Tensor } {
    const variables = new Map<string, Tensor>();
    for (const [name, values] of weights) {
      const table = name === "net.tokens.weight";
      const own = table ? "net.tokens.embeddings" : name.replace(/weight$/, "kernel");
      const value = tensor(table ? values : asKernel(values));
      variables.set(own, tf.variable(value as never) as never);
      value.dispose();
    }
    const run = (): Tensor =>
      tf["tidy"]!(() => {
        const of = (name: string): Tensor => variables.get(name)!;
        const rows = tf["gather"]!(of("net.tokens.embeddings"), tf["tensor1d"]!([1, 8, 4], "int32"));
        const inner = tf["tanh"]!(tf["add"]!(tf["matMul"]!(rows, of("net.query.kernel")), of("net.query.bias")));
        return tf["add"]!(tf["matMul"]!(inner, of("net.classifier.kernel")), of("net.classifier.bias"));
      });
    return { variables, run };
  }

  t.test("a LayersModel answers as one with weights folded by hand", async (t) => {
    const model = imageModel(weightsOf(IMAGE, null));
    const runtime = await attach(IMAGE, model as never);
    const x = tensor({ shape: [2, 5, 5, 3], data: inputs(150) });
    const before = model.predict(x);
    const first = await before.data();
    for (const task of [...SELECTIONS, "more", null, "same", null] as const) {
      await runtime.switchTask(task);
      const other = imageModel(weightsOf(IMAGE, task));
      const [found, expected] = [model.predict(x), other.predict(x)];
      t.strictSame(found.shape, expected.shape, `${task}: ${expected.shape}`);
      const off = difference(await found.data(), await expected.data());
      t.ok(off < 1e-5, `${task}: ${off}`);
      if (task === null) t.strictSame(await found.data(), first, "the base's own answer");
      for (const one of [found, expected]) one.dispose();
      other.dispose();
    }
    await runtime.close();
    t.ok(difference(await model.predict(x).data(), first) === 0, "the model is there when the runtime is closed");
  });

  t.test("variables, and rows of an embedding", async (t) => {
    const { variables, run } = textModel(weightsOf(TEXT, null));
    const runtime = await attach(TEXT, variables as never);
    const head = variables.get("net.classifier.kernel");
    for (const task of SELECTIONS) {
      await runtime.switchTask(task);
      const found = run();
      const expected = textModel(weightsOf(TEXT, task)).run();
      const off = difference(await found.data(), await expected.data());
      t.ok(off < 1e-5, `${task}: ${off}`);
      t.equal(variables.get("net.classifier.kernel") === head, task !== "more", `${task}: the caller's variable`);
    }
  });

  /**
   * Switches many times; every switch to a task leaves the same number of tensors and bytes, and the same weights, as
   * the first.
   */
  async function many(t: SuiteTest, of: readonly string[], model: never, count: number): Promise<void> {
    const host = tfjsHost(tf, model);
    const runtime = await createRuntime(await openPack(await packFor(of)), { base: host, ...gpu() });
    const size = (): string => `${tf.memory().numTensors} tensors, ${tf.memory().numBytes} bytes`;
    const state = async (): Promise<string> => {
      const values: string[] = [];
      for (const { name } of host.list()) values.push(`${name} ${(await host.read(name)).data}`);
      return values.join("\n");
    };
    const known = new Map([[null as string | null, { size: size(), state: await state() }]]);
    for (const task of ["plain", "same", "more"] as const) {
      await runtime.switchTask(task);
      known.set(task, { size: size(), state: await state() });
      await runtime.switchTask(null);
    }
    let wrong = 0;
    for (const [i, task] of [...selections(count), null].entries()) {
      await runtime.switchTask(task);
      if (size() !== known.get(task)!.size) wrong++;
      if (i % 50 === 0 && (await state()) !== known.get(task)!.state) wrong++;
    }
    t.equal(wrong, 0);
    t.equal(size(), known.get(null)!.size);
    t.ok((await state()) === known.get(null)!.state, "the base's bits");
    await runtime.close();
  }

  t.test("1000 switches of variables leak nothing and end at the base's bits", (t) =>
    many(t, TEXT, textModel(weightsOf(TEXT, null)).variables as never, 1000),
  );

  t.test("nor do 100 of a LayersModel", (t) => many(t, IMAGE, imageModel(weightsOf(IMAGE, null)) as never, 100));

  t.test("what was asked before a switch is answered with the weights from before", async (t) => {
    const { variables, run } = textModel(weightsOf(TEXT, null));
    const runtime = await attach(TEXT, variables as never);
    const kernel = variables.get("net.query.kernel")!;
    let expected = await run().data();
    for (const task of ["plain", "same", "more", "plain", null] as const) {
      const asked = run();
      // The weight stays in place where no copy holds it.
      const copy = task === "plain" ? kernel.clone() : undefined;
      const values = (await kernel.data()).slice();
      await runtime.switchTask(task);
      t.ok(difference(await asked.data(), expected) === 0, `before ${task}`);
      if (copy) t.ok(difference(await copy.data(), values) === 0, `a copy keeps its values at ${task}`);
      t.ok(difference(await kernel.data(), values) > 0.01, `and the weight has others at ${task}`);
      expected = await run().data();
      for (const one of [asked, copy]) one?.dispose();
    }
  });

  /** A converted graph: a layer, its bias, and a head with a transposed kernel, as other converters write it. */
  async function graphModel(weights: Weights): Promise<Model> {
    const net = "StatefulPartitionedCall/net";
    const of = (name: string): Values => weights.get(name)!;
    const constants = new Map<string, Values>([
      [`${net}/query/MatMul/ReadVariableOp`, asKernel(of("net.query.weight"))],
      [`${net}/query/BiasAdd/ReadVariableOp`, of("net.query.bias")],
      [`${net}/classifier/MatMul/ReadVariableOp`, of("net.classifier.weight")],
      [`${net}/classifier/BiasAdd/ReadVariableOp`, of("net.classifier.bias")],
    ]);
    const type = { type: "DT_FLOAT" };
    const shape = (sizes: readonly number[]): object => ({
      shape: { dim: sizes.map((size) => ({ size: String(size) })) },
    });
    const node = (name: string, op: string, input: string[], attr: object = {}): object => {
      return { name, op, input, attr: { T: type, ...attr } };
    };
    const nodes = [
      node("x", "Placeholder", [], { dtype: type, shape: shape([-1, 6]) }),
      ...[...constants].map(([name, values]) => {
        return node(name, "Const", [], {
          dtype: type,
          value: { tensor: { dtype: "DT_FLOAT", tensorShape: shape(values.shape) } },
        });
      }),
      node(`${net}/query/MatMul`, "MatMul", ["x", `${net}/query/MatMul/ReadVariableOp`], { transpose_b: { b: false } }),
      node(`${net}/query/BiasAdd`, "BiasAdd", [`${net}/query/MatMul`, `${net}/query/BiasAdd/ReadVariableOp`]),
      node(`${net}/tanh`, "Tanh", [`${net}/query/BiasAdd`]),
      node(`${net}/read`, "Identity", [`${net}/classifier/MatMul/ReadVariableOp`]),
      node(`${net}/classifier/MatMul`, "MatMul", [`${net}/tanh`, `${net}/read`], { transpose_b: { b: true } }),
      node("y", "BiasAdd", [`${net}/classifier/MatMul`, `${net}/classifier/BiasAdd/ReadVariableOp`]),
    ];
    const all = [...constants.values()].flatMap(({ data }) => [...data]);
    return loadGraphModel({
      load: async () => ({
        modelTopology: { node: nodes, library: {}, versions: { producer: 1, minConsumer: 1 } },
        weightSpecs: [...constants].map(([name, values]) => ({ name, shape: [...values.shape], dtype: "float32" })),
        weightData: Float32Array.from(all).buffer,
      }),
    });
  }

  t.test("a GraphModel", async (t) => {
    const model = await graphModel(weightsOf(GRAPH, null));
    const runtime = await attach(GRAPH, model as never);
    const x = tensor({ shape: [4, 6], data: inputs(24) });
    const answer = async (y: Tensor): Promise<Float32Array> => {
      const values = await y.data();
      y.dispose();
      return values;
    };
    const first = await answer(model.predict(x));
    const { numTensors } = tf.memory();
    for (const task of [...selections(8), null]) {
      const asked = model.predict(x);
      const expected = await answer(model.predict(x));
      await runtime.switchTask(task);
      t.ok(difference(await answer(asked), expected) === 0, `asked before ${task}`);
      const other = await graphModel(weightsOf(GRAPH, task));
      const off = difference(await answer(model.predict(x)), await answer(other.predict(x)));
      t.ok(off < 1e-5, `${task}: ${off}`);
      other.dispose();
    }
    t.equal(tf.memory().numTensors, numTensors);
    t.ok(difference(await answer(model.predict(x)), first) === 0, "the base's own answer");
  });

  t.test("on WebGPU matrices never leave the device", async (t) => {
    if (tf.getBackend() !== "webgpu") return void t.comment("not on WebGPU");
    const runtime = await attach(TEXT, textModel(weightsOf(TEXT, null)).variables as never);
    for (const task of ["plain", null, "plain", null]) await runtime.switchTask(task);
    for (const task of ["plain", null]) {
      const traffic = await trafficOf(runtime, () => runtime.switchTask(task));
      t.equal(traffic.read, 0, `${task}: bytes read`);
      t.equal(traffic.written, traffic.coefficients, `${task}: bytes written`);
    }
  });

  t.test("a model with names of its own, and what is refused", async (t) => {
    const { dense } = layers.layers as Record<string, (config: object) => never>;
    const model = layers.sequential({
      layers: [dense!({ name: "first", units: 5, inputShape: [6] }), dense!({ name: "last", units: 3 })],
    });
    const names = new Map([
      ["net.query", "first.weight"],
      ["net.classifier", "last.weight"],
    ]);
    const anyBase = { anyBase: true };
    const refusal = /"net\.query" is not in the base; candidates: .*first\.weight.*option `names`/s;
    await t.rejects(attach(GRAPH, model as never), { tag: "base", message: refusal });
    const runtime = await attach(GRAPH, model as never, { ...anyBase, names });
    await runtime.switchTask("more");
    const host = tfjsHost(tf, model as never);
    const { shape, data } = weightsOf(GRAPH, "more").get("net.classifier.weight")!;
    const last = (await host.read("last.weight")).data as Uint8Array;
    t.strictSame([...host.list()].find(({ name }) => name === "last.weight")!.shape, [5, 7]);
    const kernel = asKernel({ shape, data }).data;
    t.ok(difference(new Float32Array(last.slice().buffer), kernel) === 0, "the head is where `names` says");
    const without = await attach(GRAPH, model as never, { names: new Map([["net.query", "first.weight"]]) });
    await t.rejects(without.switchTask("same"), {
      tag: "base",
      message:
        /brings "net\.classifier\.weight", which the model does not have.*`names`.*ignore: \["net\.classifier\.weight"\]/,
    });
    const ignore = ["net.classifier.weight", "net.classifier.bias"];
    const headless = await attach(GRAPH, model as never, { names: new Map([["net.query", "first.weight"]]), ignore });
    await headless.switchTask("same");
    const wrong = layers.sequential({ layers: [dense!({ name: "net.query", units: 6, inputShape: [6] })] });
    const another =
      /"net\.query" is \[out 5, in 6\], but the base's "net\.query\.weight" is \[6, 6\] \(stored as \[in, out\]\)/;
    await t.rejects(attach(GRAPH, wrong as never), { tag: "base", message: another });
    t.throws(() => tfjsHost({} as never, model as never), {
      name: "TypeError",
      message: /the module @tensorflow\/tfjs/,
    });
    t.throws(() => tfjsHost(tf, {} as never), { name: "TypeError", message: /a LayersModel, a GraphModel or a Map/ });
  });
}

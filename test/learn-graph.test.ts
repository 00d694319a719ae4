/**
 * Training graphs: gradients against PyTorch's on plain exports of several exporters, every operator's rule against finite
 * differences, what is refused and how.
 */
import t from "tap";
import { spawnSync } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { AdamW } from "../dist/src/learn/adamw.js";
import { buildTrainingGraph, type TrainingGraph, type TrainingGraphOptions } from "../dist/src/learn/graph.js";
import { Layers } from "../dist/src/learn/layers.js";
import type { Targets } from "../dist/src/learn/targets.js";
import type { Feed } from "../dist/src/onnx/feeds.js";
import type { OnnxModel } from "../dist/src/onnx/model.js";
import { makeNode, makeValue } from "../dist/src/onnx/nodes.js";
import { ModelProtoSchema, toBinary } from "../dist/src/onnx/protobuf.js";
import { readModel, type ModelFile } from "../dist/src/onnx/read.js";
import { embedWeights } from "../dist/src/onnx/write.js";
import { turn } from "../dist/src/session/plan.js";
import { asJson, CASES, compare, golden, noise, prepare, probeOf, readCase, relative, run, sessionOf, type Case, type Differences } from "./learning.ts";
import { required } from "./required.ts";
import { model, NODE, ORTS, refusal, type Ort } from "./sessions.ts";

const TOLERANCE = 2e-5;

/** How far the loss and the gradients are off. */
async function against(ort: Ort, level: "disabled" | "all", of: Case): Promise<Differences> {
  const { file, graph, feeds } = await prepare(of);
  const session = await sessionOf(ort, file, graph, level);
  try {
    const results = await run(session, ort, feeds);
    return compare(of, graph, (output) => results[output]!.data as Float32Array);
  } finally {
    await session.release();
  }
}

t.test("loss and gradients are PyTorch's", async (t) => {
  t.ok(CASES.length >= 12, "the cases are there");
  for (const name of CASES) {
    const of = await golden(name);
    for (const { name: runtime, ort } of ORTS) {
      for (const level of ["disabled", "all"] as const) {
        const { loss, gradients, worst } = await against(ort, level, of);
        const what = `${name}, ${runtime}, optimisations ${level}`;
        t.ok(loss <= TOLERANCE, `${what}: loss off by ${loss.toExponential(1)}`);
        t.ok(gradients <= TOLERANCE, `${what}: gradients off by ${gradients.toExponential(1)} at most (${worst})`);
      }
    }
  }
});

const floats = (data: Float32Array, ...dims: number[]): Feed => ({ dataType: 1, dims, data });

/** Feeds of a case for a graph that trains terms alone. */
function feedsFor(of: Case, graph: TrainingGraph, parameters: Float32Array): Map<string, Feed> {
  return new Map([...of.feeds, [graph.targetsInput, of.targets], [graph.parametersInput!, floats(parameters, graph.size)]]);
}

/** Loss and flat gradient. */
async function learned(file: ModelFile, graph: TrainingGraph, feeds: ReadonlyMap<string, Feed>, ort: Ort = NODE): Promise<{ loss: number; gradient: Float32Array }> {
  const session = await sessionOf(ort, file, graph, "all");
  const results = await run(session, ort, feeds);
  await session.release();
  return { loss: Number(results[graph.lossOutput]!.data[0]), gradient: results[graph.gradientOutput!]!.data as Float32Array };
}

/** [rows, inner] · [inner, columns], with either turned before. */
function product(a: Float32Array, b: Float32Array, rows: number, columns: number, turn: { a?: boolean; b?: boolean } = {}): Float32Array {
  const inner = a.length / rows;
  const out = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      let sum = 0;
      for (let k = 0; k < inner; k++) sum += a[turn.a ? k * rows + r : r * inner + k]! * b[turn.b ? c * inner + k : k * columns + c]!;
      out[r * columns + c] = sum;
    }
  }
  return out;
}

t.test("a core's gradients follow from those of the factors it stands for", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const [rank, KA, KB] = [3, 5, 4];
  for (const [meanA, meanB, trainsComponents] of [[true, true, false], [true, false, false], [false, false, false], [true, true, true]] as const) {
    const what = `mean of A: ${meanA}, of B: ${meanB}${trainsComponents ? ", components trained" : ""}`;
    const files = [await readCase(of.name), await readCase(of.name)] as const;
    const [cores, factors] = files.map(({ model }) => new Layers(model)) as [Layers, Layers];
    const modules = [...of.modules.keys()].map((name, i) => {
      const layer = cores.find(name);
      const [E_A, E_B] = [noise(KA * layer.in, 100 + i), noise(KB * layer.out, 200 + i)];
      const At = turn(E_A, KA, layer.in);
      return { ...layer, E_A, E_B, core: { rank, components: { At, B: E_B, KA, KB }, mean: { A: meanA, B: meanB }, trainsComponents } };
    });
    const core = await buildTrainingGraph(files[0], { modules, heads: [] }, { probe: probeOf(NODE) });
    const plain = await buildTrainingGraph(files[1], { modules: modules.map(({ name }) => ({ ...factors.find(name), factors: rank })), heads: [] }, { probe: probeOf(NODE) });
    t.equal(core.initializers.length, trainsComponents ? 0 : 2 * modules.length, `${what}: components are constants, or trained`);

    const parameters = noise(core.size, 21);
    const part = (graph: TrainingGraph, values: Float32Array, module: string, kind: string): Float32Array => {
      const { offset, dims } = graph.parameters.find((one) => one.module === module && one.kind === kind)!;
      return values.subarray(offset, offset + dims[0] * dims[1]);
    };
    for (const { name, E_A, E_B } of trainsComponents ? modules : []) {
      part(core, parameters, name, "componentsA").set(E_A);
      part(core, parameters, name, "componentsB").set(E_B);
    }
    /** [alpha | 1] of one side. */
    const whole = (module: string, kind: "alphaA" | "alphaB", K: number, mean: boolean): Float32Array => {
      const alpha = part(core, parameters, module, kind);
      return Float32Array.from({ length: rank * K }, (_, i) => (mean && i % K === K - 1 ? 1 : alpha[Math.floor(i / K) * (K - Number(mean)) + (i % K)]!));
    };
    const expanded = new Float32Array(plain.size);
    for (const { name, in: inputs, out, E_A, E_B } of modules) {
      part(plain, expanded, name, "A").set(product(whole(name, "alphaA", KA, meanA), E_A, rank, inputs));
      part(plain, expanded, name, "B").set(product(whole(name, "alphaB", KB, meanB), E_B, rank, out));
    }
    const found = await learned(files[0], core, feedsFor(of, core, parameters));
    const { loss, gradient } = await learned(files[1], plain, feedsFor(of, plain, expanded));
    t.ok(Math.abs(found.loss - loss) < 1e-6 * loss, `${what}: one loss`);
    for (const { name, E_A, E_B } of modules) {
      for (const [side, K, E, mean] of [["A", KA, E_A, meanA], ["B", KB, E_B, meanB]] as const) {
        const factor = part(plain, gradient, name, side);
        const all = product(factor, E, rank, K, { b: true });
        const expected = all.filter((_, i) => !mean || i % K < K - 1);
        const off = relative(part(core, found.gradient, name, `alpha${side}`), expected);
        t.ok(off < TOLERANCE, `${what}: alpha${side} of ${name} off by ${off.toExponential(1)}`);
        if (!trainsComponents) continue;
        const components = product(whole(name, `alpha${side}`, K, mean), factor, K, E.length / K, { a: true });
        const offE = relative(part(core, found.gradient, name, `components${side}`), components);
        t.ok(offE < TOLERANCE, `${what}: components${side} of ${name} off by ${offE.toExponential(1)}`);
      }
    }
  }
});

t.test("core and free factors of one layer train together, a head beside them", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const file = await readCase(of.name);
  const layers = new Layers(file.model);
  const modules = [...of.modules.keys()].map((name) => {
    const layer = layers.find(name);
    const components = { At: noise(layer.in * 4, 11), B: noise(3 * layer.out, 9), KA: 4, KB: 3 };
    return { ...layer, core: { rank: 2, components, mean: { A: true, B: true } }, factors: 2 };
  });
  const graph = await buildTrainingGraph(file, { modules, heads: [layers.findHead("classifier")] }, { probe: probeOf(NODE) });
  t.same(graph.parameters.slice(0, 4).map(({ kind, dims }) => [kind, dims]), [["alphaA", [2, 3]], ["alphaB", [2, 2]], ["A", [2, 48]], ["B", [2, 48]]]);
  const session = await sessionOf(NODE, file, graph, "all");
  // Other labels than the model's.
  const labels = 3;
  const targets = floats(Float32Array.from({ length: 5 * labels }, (_, i) => Number(i % labels === (i >> 2) % labels)), 5, labels);
  const [head] = graph.heads;
  const at = new Map<string, Feed>([
    ...feedsFor(of, graph, noise(graph.size, 17)),
    ...([[graph.targetsInput, targets], [head!.weight, floats(noise(labels * 48, 37), labels, 48)], [head!.bias!, floats(noise(labels, 3), labels)]] as const),
  ]);
  const gradients = { [graph.parametersInput!]: graph.gradientOutput!, [head!.weight]: head!.weightGradient, [head!.bias!]: head!.biasGradient! };
  const results = await run(session, NODE, at);
  for (const [input, output] of Object.entries(gradients)) {
    const value = at.get(input)!;
    const direction = noise(value.data.length, 53);
    const slope = async (step: number): Promise<number> => {
      const losses = [];
      for (const by of [step, -step]) {
        const moved = Float32Array.from(value.data as Float32Array, (v, i) => v + by * direction[i]!);
        losses.push(Number((await run(session, NODE, new Map([...at, [input, { ...value, data: moved }]])))[graph.lossOutput]!.data[0]));
      }
      return (losses[0]! - losses[1]!) / (2 * step);
    };
    const expected = (4 * (await slope(0.02)) - (await slope(0.04))) / 3;
    const found = (results[output]!.data as Float32Array).reduce((sum, g, i) => sum + g * direction[i]!, 0);
    t.same(results[output]!.dims, value.dims, `${output} has the shape of its input`);
    t.ok(Math.abs(found - expected) < 2e-3 * Math.abs(expected), `${output}: ${found} along a direction, ${expected} by differences`);
  }
  await session.release();
});

t.test("layers as Gemm, as Gemm of turned weights and as MatMul behind a Transpose have one gradient", async (t) => {
  const gradients = [];
  for (const name of ["gemm", "gemm-nn", "transposed"]) {
    const file = await readModel(model(name));
    const layers = new Layers(file.model);
    const modules = ["up", "mid"].map((module) => ({ ...layers.find(module), factors: 2 }));
    const graph = await buildTrainingGraph(file, { modules, heads: [] }, { probe: probeOf(NODE) });
    const feeds = new Map([
      ["x", floats(noise(5 * 12, 8), 5, 12)],
      [graph.targetsInput, floats(noise(20, 2).map(Math.abs), 5, 4)],
      [graph.parametersInput!, floats(noise(graph.size, 19), graph.size)],
    ]);
    gradients.push((await learned(file, graph, feeds)).gradient);
  }
  t.ok(Math.hypot(...gradients[0]!) > 0.01);
  for (const gradient of gradients.slice(1)) t.ok(relative(gradient, gradients[0]!) < 1e-6);
});

t.test("a row counts by the sum of its targets; one of zeros only in the mean", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const { file, graph, feeds } = await prepare(of);
  const weighted = (weights: readonly number[]): Map<string, Feed> => {
    const data = Float32Array.from(of.targets.data as Float32Array, (v, i) => v * weights[Math.floor(i / 5)]!);
    return new Map([...feeds, [graph.targetsInput, { ...of.targets, data }]]);
  };
  const one = await learned(file, graph, weighted([1, 0, 0, 0, 0]));
  const other = await learned(file, graph, weighted([0, 0, 3, 0, 0]));
  const both = await learned(file, graph, weighted([2, 0, 1.5, 0, 0]));
  t.ok(Math.abs(both.loss - (2 * one.loss + other.loss / 2)) < 1e-5, "losses add up by weight");
  t.ok(relative(both.gradient, one.gradient.map((g, i) => 2 * g + other.gradient[i]! / 2)) < 1e-5, "so do gradients");
});

t.test("rows of attention that see nothing do not spoil gradients", async (t) => {
  // The dynamo exporter masks with the least float instead of -∞, so that such rows see everything alike.
  const of = await golden("bert-sdpa-torchscript");
  const mask = of.feeds.get("attention_mask")!;
  // A row without any token: its softmax is 0 / 0, which the export turns into 0.
  const none = BigInt64Array.from(mask.data as BigInt64Array, (value, i) => (i < mask.dims[1]! ? 0n : value));
  const { file, graph, feeds } = await prepare(of);
  const session = await sessionOf(NODE, file, graph, "all");
  const masked = new Map([...feeds, ["attention_mask", { ...mask, data: none }]]);
  const gradient = (await run(session, NODE, masked))[graph.gradientOutput!]!.data as Float32Array;
  const direction = noise(graph.size, 7);
  const parameters = feeds.get(graph.parametersInput!)!;
  const loss = async (by: number): Promise<number> => {
    const data = Float32Array.from(parameters.data as Float32Array, (v, i) => v + by * direction[i]!);
    return Number((await run(session, NODE, new Map([...masked, [graph.parametersInput!, { ...parameters, data }]])))[graph.lossOutput]!.data[0]);
  };
  const slope = async (step: number): Promise<number> => ((await loss(step)) - (await loss(-step))) / (2 * step);
  const expected = (4 * (await slope(0.01)) - (await slope(0.02))) / 3;
  const found = gradient.reduce((sum, g, i) => sum + g * direction[i]!, 0);
  t.ok(Math.abs(found - expected) < 5e-3 * Math.abs(expected), `${found} along a direction, ${expected} by differences`);
  await session.release();
});

t.test("later opsets give the same", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const gradients = [];
  for (const opset of [17, 18, 19, 20, 21]) {
    const file = await changed("bert-eager-torchscript", ({ proto }) => (proto.opsetImport[0]!.version = BigInt(opset)));
    const layers = new Layers(file.model);
    const modules = [...of.modules].map(([name, { rank }]) => ({ ...layers.find(name), factors: rank }));
    const graph = await buildTrainingGraph(file, { modules, heads: [] }, { probe: probeOf(NODE) });
    gradients.push((await learned(file, graph, feedsFor(of, graph, noise(graph.size, 17)))).gradient);
  }
  for (const gradient of gradients.slice(1)) t.ok(relative(gradient, gradients[0]!) < 1e-5);
});

/** A case's model after a change to its graph, as if it had been exported so. */
async function changed(name: string, change: (model: OnnxModel) => void): Promise<ModelFile> {
  const file = await readCase(name);
  change(file.model);
  return readModel(toBinary(ModelProtoSchema, file.model.proto));
}

t.test("one graph that learns and answers", async (t) => {
  for (const { name: runtime, ort } of ORTS) {
    for (const level of ["disabled", "all"] as const) {
      const of = await golden("bert-eager-torchscript");
      const what = `${runtime}, optimisations ${level}`;
      const { file, graph, feeds } = await prepare(of, { keepsInference: true });
      const session = await sessionOf(ort, file, graph, level);
      const [head] = graph.heads;
      const learn = (is: boolean): Map<string, Feed> =>
        new Map([...feeds, [graph.learnInput!, { dataType: 9, dims: [], data: Uint8Array.of(Number(is)) }]]);
      const [learning, answering] = [await run(session, ort, learn(true)), await run(session, ort, learn(false))];
      const single = await prepare(of);
      const reference = await sessionOf(ort, single.file, single.graph, level);
      const expected = await run(reference, ort, feeds);
      for (const output of [graph.lossOutput, graph.gradientOutput!, head!.weightGradient, head!.biasGradient!]) {
        t.ok(relative(learning[output]!.data as Float32Array, expected[output]!.data as Float32Array) < 1e-5, `${what}: ${output}`);
      }
      t.ok(relative(answering[graph.logitsOutput]!.data as Float32Array, learning[graph.logitsOutput]!.data as Float32Array) < 1e-6, `${what}: it answers alike`);
      t.equal(answering[graph.gradientOutput!]!.data.length, 0, `${what}: no gradient unless it learns`);
      // Once more, after the other branch.
      const again = await run(session, ort, learn(true));
      t.same(again[graph.gradientOutput!]!.data, learning[graph.gradientOutput!]!.data, `${what}: again`);
      await session.release();
      await reference.release();
    }
  }
});

t.test("a head alone learns its targets", async (t) => {
  const of = await golden("bert-eager-dynamo");
  const file = await readCase(of.name);
  const graph = await buildTrainingGraph(file, { modules: [], heads: [new Layers(file.model).findHead("classifier")] }, { probe: probeOf(NODE) });
  t.same([graph.parametersInput, graph.gradientOutput, graph.size], [undefined, undefined, 0]);
  const session = await sessionOf(NODE, file, graph, "all");
  const [{ weight, bias, weightGradient, biasGradient }] = graph.heads as [TrainingGraph["heads"][0]];
  const labels = 2;
  const values = [noise(labels * 48, 1), new Float32Array(labels)] as const;
  const optimizer = new AdamW(values.map((values) => ({ values, rate: 0.05 })), { steps: 40, warmup: 4 });
  const targets = floats(Float32Array.from({ length: 5 * labels }, (_, i) => Number(i % labels === (i >> 1) % labels)), 5, labels);
  const losses: number[] = [];
  for (let step = 0; step < 40; step++) {
    const feeds: Feed[] = [floats(values[0], labels, 48), floats(values[1], labels), targets];
    const results = await run(session, NODE, new Map([...of.feeds, ...[weight, bias!, graph.targetsInput].map((name, i) => [name, feeds[i]!] as const)]));
    losses.push(Number(results[graph.lossOutput]!.data[0]));
    optimizer.step([weightGradient, biasGradient!].map((name) => results[name]!.data as Float32Array));
  }
  t.ok(losses.at(-1)! < 0.2 * losses[0]!, `from ${losses[0]!.toFixed(3)} to ${losses.at(-1)!.toFixed(3)}`);
  await session.release();
});

t.test("Python's onnxruntime runs the file as well", async (t) => {
  const python = process.env["PYTHON"] ?? "python3";
  const check = spawnSync(python, ["-c", "import numpy, onnxruntime"], { encoding: "utf8" });
  if (check.status !== 0) {
    const reason = `${python} lacks onnxruntime or numpy: ${check.error?.message ?? check.stderr.trim().split("\n").at(-1)}`;
    if (required.has("onnxruntime-python")) t.fail(reason);
    else t.pass("Python runs training graphs", { skip: reason });
    return;
  }
  const of = await golden("llama-torchscript");
  const { file, graph, feeds } = await prepare(of);
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-learn-"));
  t.teardown(() => rm(folder, { recursive: true }));
  await writeFile(join(folder, "training.onnx"), embedWeights(file, graph.initializers));
  const input = JSON.stringify(Object.fromEntries([...feeds].map(([name, feed]) => [name, asJson(feed)])));
  const code = [
    "import json, sys, numpy, onnxruntime",
    "session = onnxruntime.InferenceSession('training.onnx', providers=['CPUExecutionProvider'])",
    "feeds = {k: numpy.array(v['data'], v['type']).reshape(v['dims']) for k, v in json.load(sys.stdin).items()}",
    "names = [o.name for o in session.get_outputs()]",
    "print(json.dumps({k: v.ravel().tolist() for k, v in zip(names, session.run(names, feeds))}))",
  ].join("\n");
  const ran = spawnSync(python, ["-c", code], { encoding: "utf8", cwd: folder, input, maxBuffer: 1e9 });
  t.equal(ran.status, 0, ran.stderr);
  const results = JSON.parse(ran.stdout) as Record<string, number[]>;
  const { loss, gradients } = compare(of, graph, (output) => results[output]!);
  t.ok(loss <= TOLERANCE && gradients <= TOLERANCE, `gradients off by ${gradients.toExponential(1)} at most`);
});

t.test("the graph is found out with two runs and written without the weights", async (t) => {
  const of = await golden("vit-torchscript");
  const probe = probeOf(NODE);
  const { file, graph } = await prepare(of, { probe });
  t.equal(probe.runs, 2);
  for (const { opType, name, input } of file.model.graph.proto.node) {
    if (opType === "Concat" && name.startsWith("eigenlora")) t.ok(input.length <= 6, `${name} has ${input.length} inputs`);
    if (opType === "Transpose" && name.startsWith("eigenlora/learn")) t.notOk(file.model.graph.initializers.has(input[0]!), `${name} copies no weight`);
  }
  t.equal(graph.size, of.modules.size * 4 * 2 * 48);
});

t.test("refusals", async (t) => {
  const adapted = async (file: ModelFile, names: readonly string[], head?: string): Promise<Targets> => {
    const layers = new Layers(file.model);
    return { modules: names.map((name) => ({ ...layers.find(name), factors: 2 })), heads: head ? [layers.findHead(head)] : [] };
  };
  const refused = async (file: ModelFile, targets: Targets, options: Partial<TrainingGraphOptions> = {}): Promise<string> => {
    const error = await refusal(() => buildTrainingGraph(file, targets, { probe: probeOf(NODE), ...options }));
    t.equal(error.tag, "format", error.message);
    return error.message;
  };
  const [query, later] = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"];

  await t.test("operators without a rule, of other domains, and what does not reach the loss, all at once", async (t) => {
    const file = await changed("bert-eager-dynamo", ({ proto, graph: { proto: main } }) => {
      main.node.find(({ opType }) => opType === "Tanh")!.opType = "Elu";
      const gelu = main.node.find(({ opType }) => opType === "Gelu")!;
      [gelu.opType, gelu.domain] = ["QuickGelu", "com.microsoft"];
      proto.opsetImport.push({ $typeName: "onnx.OperatorSetIdProto", domain: "com.microsoft", version: 1n });
    });
    const names = new Map([[query, "val_87"]]);
    const layers = new Layers(file.model);
    const message = await refused(file, { modules: [{ ...layers.find(query, names), factors: 2 }], heads: [] });
    t.match(message, /Elu has no rule for gradients: "[^"]+"/);
    t.match(message, /QuickGelu is an operator of com\.microsoft, fused already \(pass the unoptimised export\): "[^"]+"/);
  });

  await t.test("a trained layer that does not reach the loss", async (t) => {
    const file = await changed("bert-eager-torchscript", ({ graph: { proto: main } }) => {
      const first = main.node.find(({ opType }) => opType === "LayerNormalization")!.output[0]!;
      main.output.push(makeValue(first, 1));
    });
    const output = file.model.graph.proto.output[1]!.name;
    const message = await refused(file, await adapted(file, [query, later]), { logits: output });
    t.match(message, /what is trained does not reach the loss: "eigenlora\/bert\.encoder\.layer\.0.*query\/A".* and 1 more/);
    const both = await readCase("bert-eager-torchscript");
    t.match(await refused(both, await adapted(both, [query]), { logits: "logit" }), /has no output "logit", only "logits"/);
  });

  await t.test("quantised layers on the path", async (t) => {
    for (const [name, operator] of [["q4", "MatMulNBits"], ["int8", "MatMulInteger"], ["qdq", "QuantizeLinear"]] as const) {
      const file = await readModel(model(name));
      t.match(await refused(file, await adapted(file, [query])), new RegExp(`${operator} is quantised, which gradients do not pass \\(pass a float export\\): "`));
    }
  });

  await t.test("half precision", async (t) => {
    const half = await readModel(model("half"));
    t.match(await refused(half, await adapted(half, [query])), /MatMul computes in float16.*export in float32\): "\/bert\/encoder\/layer\.0/);
    const between = await changed("bert-eager-torchscript", ({ graph: { proto: main } }) => {
      const tanh = main.node.findIndex(({ opType }) => opType === "Tanh");
      const { input } = main.node[tanh]!;
      const [down, up] = [makeNode("Cast", "down", [input[0]!], "down", { to: 10 }), makeNode("Cast", "up", ["down"], "up", { to: 1 })];
      input[0] = "up";
      main.node.splice(tanh, 0, down, up);
    });
    t.match(await refused(between, await adapted(between, [query])), /Cast computes in float16, which is not trained in \(export in float32\): "down"/);
  });

  await t.test("control flow, an old opset", async (t) => {
    const old = await readModel(model("branches"));
    const message = await refused(old, await adapted(old, ["mid", "up"]));
    t.match(message, /its opset is 11, at least 13 is needed/);
    t.match(message, /Gemm is trained inside control flow/);
    t.match(message, /If is control flow, which gradients do not pass/);
  });

  await t.test("probe feeds that tell nothing, or lack an input", async (t) => {
    const of = await golden("bert-eager-torchscript");
    const feedsOf = (batch: number, length: number): Map<string, Feed> =>
      new Map([...of.feeds.keys()].map((name) => [name, { dataType: 7, dims: [batch, length], data: new BigInt64Array(batch * length).fill(1n) }]));
    const attempt = async (...feeds: [Map<string, Feed>, Map<string, Feed>]): Promise<string> => {
      const file = await readCase(of.name);
      return refused(file, await adapted(file, [query]), { feeds });
    };
    t.match(await attempt(feedsOf(1, 5), feedsOf(3, 7)), /dimension of the probe feeds is 1.*: "batch_size"/);
    t.match(await attempt(feedsOf(2, 5), feedsOf(3, 5)), /are equal \(5\).*: "sequence_length"/);
    t.match(await attempt(feedsOf(2, 2), feedsOf(3, 7)), /are equal \(2\)/);
    const lacking = feedsOf(3, 7);
    lacking.delete("attention_mask");
    t.match(await attempt(feedsOf(2, 5), lacking), /lack an input of the model: "attention_mask"/);
    const file = await readCase(of.name);
    const graph = await buildTrainingGraph(file, await adapted(file, [query]), { probe: probeOf(NODE), feeds: [feedsOf(4, 6), feedsOf(3, 8)] });
    t.equal(graph.size, 2 * 2 * 48, "others do");
  });

  await t.test("nothing to train, a graph made before", async (t) => {
    const file = await readCase("vit-dynamo");
    t.match(await refused(file, { modules: [], heads: [] }), /nothing is trained/);
    const twice = await readCase("bert-eager-torchscript");
    await buildTrainingGraph(twice, await adapted(twice, [query]), { probe: probeOf(NODE) });
    t.match(await refused(twice, await adapted(twice, [later])), /has task inputs already/);
  });

  await t.test("a runtime that cannot run the model says so itself", async (t) => {
    const file = await readCase("bert-eager-torchscript");
    const broken = async (): Promise<never> => {
      throw new Error("out of memory");
    };
    const error = await refusal(async () => buildTrainingGraph(file, await adapted(file, [query]), { probe: broken }));
    t.match(error.message, /out of memory/);
  });
});

/**
 * Training graphs: gradients, compared with PyTorch's on plain exports of several exporters; every operator's rule, compared with finite
 * differences; refusals and their messages.
 */
import { spawnSync } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Feed } from "eigenlora/session";
import t from "tap";
import {
  Adam,
  embedWeights,
  type ModelFile,
  ModelProtoSchema,
  makeFloats,
  makeNode,
  makeValue,
  type OnnxModel,
  readModel,
  type TaskInput,
  type TrainingGraph,
  type TrainingGraphOptions,
  toBinary,
} from "./internals.ts";
import {
  asJson,
  CASES,
  type Case,
  compare,
  type Differences,
  floats,
  golden,
  graphOf,
  headLayerOf,
  layerOf,
  learning,
  noise,
  prepare,
  probeOf,
  readCase,
  relative,
  run,
  sessionOf,
} from "./learning.ts";
import { python, pythonLacks, skip, soak } from "./required.ts";
import { model, NODE, ORTS, type Ort, refusal } from "./sessions.ts";

const TOLERANCE = 2e-5;

/** Relative differences of the loss and the gradients. */
async function against(ort: Ort, level: "disabled" | "all", of: Case, part?: number): Promise<Differences> {
  const prepared = await prepare(of, { part });
  const session = await sessionOf(ort, prepared.file, level);
  try {
    const results = await run(session, ort, prepared.feeds);
    return compare(of, prepared, (output) => results[output]!.data as Float32Array);
  } finally {
    await session.release();
  }
}

t.test("loss and gradients are PyTorch's", async (t) => {
  t.ok(CASES.length >= 12, "the cases are there");
  for (const name of CASES) {
    const of = await golden(name);
    for (const { name: runtime, ort } of ORTS) {
      // Levels change what ONNX Runtime makes of a graph, alike on both runtimes.
      for (const level of soak || name === CASES[0] ? (["disabled", "all"] as const) : (["all"] as const)) {
        const { loss, gradients, worst } = await against(ort, level, of);
        const what = `${name}, ${runtime}, optimisations ${level}`;
        t.ok(loss <= TOLERANCE, `${what}: loss off by ${loss.toExponential(1)}`);
        t.ok(gradients <= TOLERANCE, `${what}: gradients off by ${gradients.toExponential(1)} at most (${worst})`);
      }
    }
    for (const part of soak ? [1, 7] : [7]) {
      const { loss, gradients } = await against(NODE, "all", of, part);
      t.ok(Math.max(loss, gradients) <= TOLERANCE, `${name}, in parts of ${part} nodes`);
    }
  }
});

t.test("outputs and inputs that are left out, in many parts", async (t) => {
  const of = await golden("bert-all-linear");
  const gradients: Float32Array[] = [];
  for (const added of [false, true]) {
    const file = await changed(of.name, ({ graph: { proto: main } }) => {
      main.initializer.push(makeFloats("most", [1e9], []));
      main.node = main.node.flatMap((node, i) => {
        const [value] = node.output as [string];
        if (!added || node.opType !== "LayerNormalization") return [node];
        node.output = [`${value}/raw`];
        const clip = makeNode("Clip", `clip${i}`, [`${value}/raw`, "", "most"], `${value}/clipped`);
        return [node, clip, makeNode("Dropout", `dropout${i}`, [`${value}/clipped`], [value, ""])];
      });
    });
    const modules = [...of.modules.keys()].map((name) => layerOf(file, name));
    const { graph, inputs } = await graphOf(file, { modules }, { part: 9 });
    const feeds = new Map([...of.feeds, ...noisy(inputs, 2, 0, 5), ...learning(graph, of.targets)]);
    gradients.push((await learned(file, graph, feeds)).gradient);
  }
  t.ok(gradients[0]!.some((value) => value !== 0));
  t.ok(relative(gradients[1]!, gradients[0]!) < 1e-6);
});

/** Feeds of task inputs: noise, at a rank and a number of labels. */
function noisy(inputs: readonly TaskInput[], rank: number, labels: number, seed: number): [string, Feed][] {
  return inputs.map(({ name, dims: declared }, i) => {
    const sizes: Record<string, number> = { tasks: 1, q: rank, labels };
    const dims = declared.map((size) => (typeof size === "number" ? size : sizes[size]!));
    return [
      name,
      floats(
        noise(
          dims.reduce((a, b) => a * b, 1),
          seed + i,
        ),
        ...dims,
      ),
    ];
  });
}

/** Loss, and all gradients concatenated. */
async function learned(
  file: ModelFile,
  graph: TrainingGraph,
  feeds: ReadonlyMap<string, Feed>,
  ort: Ort = NODE,
): Promise<{ loss: number; gradient: Float32Array }> {
  const session = await sessionOf(ort, file, "all");
  const results = await run(session, ort, feeds);
  await session.release();
  const gradient = Float32Array.from(
    [...graph.gradients.values()].flatMap((name) => [...(results[name]!.data as Float32Array)]),
  );
  return { loss: Number(results[graph.lossOutput]!.data[0]), gradient };
}

t.test("factors and a head of another number of labels train together, of any rank, beside features", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const file = await readCase(of.name);
  const modules = [...of.modules.keys()].map((name) => layerOf(file, name));
  const { graph, inputs } = await graphOf(file, { modules, heads: [headLayerOf(file, "classifier")] });
  t.equal(graph.gradients.size, 2 * modules.length + 2);
  const session = await sessionOf(NODE, file, "all");
  for (const [rank, labels, features] of [
    [3, 3, 0],
    [1, 2, 0],
    [2, 3, 4],
  ] as const) {
    const width = labels + features;
    const wanted = Float32Array.from({ length: 5 * width }, (_, i) => {
      const [row, column] = [Math.floor(i / width), i % width];
      return column < labels ? Number(column === (4 * row) % labels) : Math.sin(i);
    });
    const squares = floats(
      Float32Array.from({ length: width }, (_, i) => Number(i >= labels)),
      1,
      width,
    );
    const targets = floats(wanted, 5, width);
    const at = new Map<string, Feed>([...of.feeds, ...noisy(inputs, rank, width, 17), ...learning(graph, targets)]);
    if (features > 0) at.set(graph.squaresInput, squares);
    const results = await run(session, NODE, at);
    const logits = results[graph.logitsOutput]!.data as Float32Array;
    let loss = 0;
    for (let row = 0; row < 5; row++) {
      const own = Array.from(logits.subarray(row * width, (row + 1) * width));
      const total = own.slice(0, labels).reduce((sum, one) => sum + Math.exp(one), 0);
      loss += (Math.log(total) - own[(4 * row) % labels]!) / 5;
      for (let i = labels; i < width; i++) loss += (own[i]! - wanted[row * width + i]!) ** 2 / 10;
    }
    const told = Number(results[graph.lossOutput]!.data[0]);
    t.ok(Math.abs(told - loss) < 1e-5 * loss, `loss ${told}, by the logits ${loss}`);
    for (const [input, output] of [...graph.gradients].filter((_, i) => i % 3 === 0 || i >= 2 * modules.length)) {
      const value = at.get(input)!;
      const direction = noise(value.data.length, 53);
      const slope = async (step: number): Promise<number> => {
        const losses = [];
        for (const by of [step, -step]) {
          const moved = Float32Array.from(value.data as Float32Array, (v, i) => v + by * direction[i]!);
          losses.push(
            Number(
              (await run(session, NODE, new Map([...at, [input, { ...value, data: moved }]])))[graph.lossOutput]!
                .data[0],
            ),
          );
        }
        return (losses[0]! - losses[1]!) / (2 * step);
      };
      const expected = (4 * (await slope(0.05)) - (await slope(0.1))) / 3;
      const found = (results[output]!.data as Float32Array).reduce((sum, g, i) => sum + g * direction[i]!, 0);
      t.same(results[output]!.dims, value.dims, `${output} has the shape of its input`);
      t.ok(
        Math.abs(found - expected) < 2e-3 * Math.abs(expected) + 2e-6,
        `${output}, rank ${rank}: ${found} along a direction, ${expected} by differences`,
      );
    }
  }
  await session.release();
});

t.test("layers as Gemm, as Gemm of turned weights and as MatMul behind a Transpose have one gradient", async (t) => {
  const gradients = [];
  for (const name of ["gemm", "gemm-nn", "transposed"]) {
    const file = await readModel(model(name));
    const { graph, inputs } = await graphOf(file, { modules: ["up", "mid"].map((module) => layerOf(file, module)) });
    const targets = floats(noise(20, 2).map(Math.abs), 5, 4);
    const feeds = new Map<string, Feed>([
      ["x", floats(noise(5 * 12, 8), 5, 12)],
      ...learning(graph, targets),
      ...noisy(inputs, 2, 0, 19),
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
  t.ok(
    relative(
      both.gradient,
      one.gradient.map((g, i) => 2 * g + other.gradient[i]! / 2),
    ) < 1e-5,
    "so do gradients",
  );
});

t.test("rows of attention that see nothing do not spoil gradients", async (t) => {
  // The dynamo exporter masks with the least float instead of -∞, so such rows see all keys equally.
  const of = await golden("bert-sdpa-torchscript");
  const mask = of.feeds.get("attention_mask")!;
  // A row without any token: its softmax is 0 / 0, which the export turns into 0.
  const none = BigInt64Array.from(mask.data as BigInt64Array, (value, i) => (i < mask.dims[1]! ? 0n : value));
  const { file, graph, feeds } = await prepare(of);
  const session = await sessionOf(NODE, file, "all");
  const masked = new Map([...feeds, ["attention_mask", { ...mask, data: none }]]);
  const learning = await run(session, NODE, masked);
  const gradient = Float32Array.from(
    [...graph.gradients.values()].flatMap((name) => [...(learning[name]!.data as Float32Array)]),
  );
  const direction = noise(gradient.length, 7);
  const loss = async (by: number): Promise<number> => {
    const moved = new Map<string, Feed>(masked);
    let at = 0;
    for (const input of graph.gradients.keys()) {
      const value = feeds.get(input)!;
      moved.set(input, {
        ...value,
        data: Float32Array.from(value.data as Float32Array, (v, i) => v + by * direction[at + i]!),
      });
      at += value.data.length;
    }
    return Number((await run(session, NODE, moved))[graph.lossOutput]!.data[0]);
  };
  const slope = async (step: number): Promise<number> => ((await loss(step)) - (await loss(-step))) / (2 * step);
  const expected = (4 * (await slope(0.04)) - (await slope(0.08))) / 3;
  const found = gradient.reduce((sum, g, i) => sum + g * direction[i]!, 0);
  t.ok(
    Math.abs(found - expected) < 5e-3 * Math.abs(expected),
    `${found} along a direction, ${expected} by differences`,
  );
  await session.release();
});

t.test("later opsets give the same", async (t) => {
  const of = await golden("bert-eager-torchscript");
  const gradients = [];
  for (const opset of [17, 18, 19, 20, 21]) {
    const file = await changed(
      "bert-eager-torchscript",
      ({ proto }) => (proto.opsetImport[0]!.version = BigInt(opset)),
    );
    const { graph, inputs } = await graphOf(file, {
      modules: [...of.modules.keys()].map((name) => layerOf(file, name)),
    });
    gradients.push(
      (await learned(file, graph, new Map([...of.feeds, ...noisy(inputs, 4, 0, 17), ...learning(graph, of.targets)])))
        .gradient,
    );
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
      const { file, graph, feeds } = await prepare(of);
      const session = await sessionOf(ort, file, level);
      const idle = new Map([...feeds, ...learning(graph, floats(new Float32Array(1), 1, 1), false)]);
      const [learnt, answered] = [await run(session, ort, feeds), await run(session, ort, idle)];
      t.ok(
        relative(answered[graph.logitsOutput]!.data as Float32Array, learnt[graph.logitsOutput]!.data as Float32Array) <
          1e-6,
        `${what}: it answers alike`,
      );
      for (const gradient of graph.gradients.values()) {
        t.ok(Math.hypot(...(learnt[gradient]!.data as Float32Array)) > 0, `${what}: ${gradient}`);
        t.equal(answered[gradient]!.data.length, 0, `${what}: no ${gradient} unless it learns`);
      }
      // Learns again after a run of the other branch.
      const again = await run(session, ort, feeds);
      for (const gradient of graph.gradients.values())
        t.same(again[gradient]!.data, learnt[gradient]!.data, `${what}: ${gradient} again`);
      await session.release();
    }
  }
});

t.test("a head alone learns its targets", async (t) => {
  const of = await golden("bert-eager-dynamo");
  const file = await readCase(of.name);
  const { graph, inputs } = await graphOf(file, { heads: [headLayerOf(file, "classifier")] });
  const session = await sessionOf(NODE, file, "all");
  const labels = 2;
  const values = new Map([...noisy(inputs, 0, labels, 1)]);
  t.same([...graph.gradients.keys()], [...values.keys()]);
  const all = [...values.values()].map(({ data }) => data as Float32Array);
  const optimizer = new Adam(
    all.map((values) => ({ values, rate: 0.05 })),
    { steps: 40, warmup: 4, clip: Infinity },
  );
  const targets = floats(
    Float32Array.from({ length: 5 * labels }, (_, i) => Number(i % labels === (i >> 1) % labels)),
    5,
    labels,
  );
  const losses: number[] = [];
  for (let step = 0; step < 40; step++) {
    const results = await run(
      session,
      NODE,
      new Map<string, Feed>([...of.feeds, ...values, ...learning(graph, targets)]),
    );
    losses.push(Number(results[graph.lossOutput]!.data[0]));
    optimizer.step([...graph.gradients.values()].map((name) => results[name]!.data as Float32Array));
  }
  t.ok(losses.at(-1)! < 0.2 * losses[0]!, `from ${losses[0]!.toFixed(3)} to ${losses.at(-1)!.toFixed(3)}`);
  await session.release();
});

t.test("Python's onnxruntime runs the file as well", async (t) => {
  const reason = pythonLacks("numpy", "onnxruntime");
  if (reason) return skip(t, "onnxruntime-python", reason);
  const of = await golden("llama-torchscript");
  const prepared = await prepare(of);
  const { file, feeds } = prepared;
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-learn-"));
  t.teardown(() => rm(folder, { recursive: true }));
  await writeFile(join(folder, "training.onnx"), embedWeights(file, []));
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
  const { loss, gradients } = compare(of, prepared, (output) => results[output]!);
  t.ok(loss <= TOLERANCE && gradients <= TOLERANCE, `gradients off by ${gradients.toExponential(1)} at most`);
});

t.test("where one position is looked at, the last layer works on that one alone", async (t) => {
  /** Names of values from which one position is taken, by the operator that makes them. */
  const positions = ({ model }: ModelFile): string[] => {
    const { node } = model.graph.proto;
    const makes = new Map(node.flatMap(({ opType, output }) => output.map((value) => [value, opType] as const)));
    return node
      .filter(({ name }) => name.startsWith("eigenlora/lift/"))
      .map(({ input }) => makes.get(input[0]!)!)
      .sort();
  };
  // Query and residual of the last layer need one position of its input; masks differ by position.
  const cases = [
    ["bert-eager-torchscript", ["LayerNormalization", "Where"]],
    ["bert-eager-dynamo", ["LayerNormalization", "Where"]],
    ["bert-sdpa-torchscript", ["LayerNormalization", "Where"]],
    ["bert-sdpa-dynamo", ["LayerNormalization", "Where"]],
    ["bert-opset13", ["Add", "Where"]],
    ["bert-left-padding", ["LayerNormalization", "Where"]],
    ["bert-all-linear", ["LayerNormalization", "Where"]],
    ["vit-dynamo", ["Add", "LayerNormalization", "Where"]],
    // Its terms are reshaped to all rows at once, so the position is taken from the parts of the sum.
    ["vit-torchscript", ["Add", "Add", "Reshape"]],
    // All positions are used.
    ["llama-torchscript", []],
  ] as const;
  for (const [name, expected] of cases)
    t.same(positions((await prepare(await golden(name), { probe: probeOf(NODE) })).file), expected, name);

  const whole = await changed("bert-eager-torchscript", ({ graph: { proto: main } }) => {
    const pooled = main.node.findLast(({ opType }) => opType === "LayerNormalization")!.output[0]!;
    main.output.push(makeValue(pooled, 1));
  });
  await graphOf(
    whole,
    { modules: [layerOf(whole, "bert.encoder.layer.0.attention.self.query")] },
    { logits: "logits" },
  );
  t.same(positions(whole), [], "somebody else looks at all of them");
});

t.test("parts are about as large as a layer", async (t) => {
  for (const name of ["bert-all-linear", "bert-sdpa-dynamo"]) {
    const { file } = await prepare(await golden(name), { probe: probeOf(NODE) });
    const learning = file.model.graph.proto.node.findLast(({ opType }) => opType === "If")!;
    const nodesOf = ({ attribute }: typeof learning) => attribute.find((one) => one.name === "then_branch")!.g!.node;
    const parts = nodesOf(learning).filter(({ opType }) => opType === "If");
    t.equal(parts.length, name === "bert-all-linear" ? 2 : 1, name);
    for (const part of parts) t.ok(nodesOf(part).length <= 450, `${name}: ${nodesOf(part).length} nodes`);
  }
});

t.test("the graph is found out with two runs, and written without the weights", async (t) => {
  const of = await golden("vit-torchscript");
  const probe = probeOf(NODE);
  const { file } = await prepare(of, { probe });
  t.equal(probe.runs, 2);
  const { node: main } = file.model.graph.proto;
  const inside = ({ attribute }: (typeof main)[number]): typeof main =>
    attribute.flatMap(({ g }) => g?.node.flatMap((node) => [node, ...inside(node)]) ?? []);
  const branches = main.flatMap(inside);
  t.ok(branches.length > 100);
  for (const { opType, name, input } of branches) {
    if (opType === "Concat" && name.startsWith("eigenlora"))
      t.ok(input.length <= 6, `${name} has ${input.length} inputs`);
    if (opType === "Transpose" && name.startsWith("eigenlora/learn"))
      t.notOk(file.model.graph.initializers.has(input[0]!), `${name} copies no weight`);
  }
});

t.test("refusals", async (t) => {
  const adapted = (file: ModelFile, names: readonly string[]): Parameters<typeof graphOf>[1] => ({
    modules: names.map((name) => layerOf(file, name)),
  });
  const refused = async (
    file: ModelFile,
    targets: Parameters<typeof graphOf>[1],
    options: Partial<TrainingGraphOptions> = {},
  ): Promise<string> => {
    const error = await refusal(() => graphOf(file, targets, options));
    t.equal(error.tag, "format", error.message);
    return error.message;
  };
  const [query, later] = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"];

  await t.test(
    "operators without a rule, of other domains, and what does not reach the loss, all at once",
    async (t) => {
      const file = await changed("bert-eager-dynamo", ({ proto, graph: { proto: main } }) => {
        main.node.find(({ opType }) => opType === "Tanh")!.opType = "Elu";
        const gelu = main.node.find(({ opType }) => opType === "Gelu")!;
        [gelu.opType, gelu.domain] = ["BiasSplitGelu", "com.microsoft"];
        proto.opsetImport.push({ $typeName: "onnx.OperatorSetIdProto", domain: "com.microsoft", version: 1n });
      });
      const names = new Map([[query, "val_87"]]);
      const message = await refused(file, { modules: [layerOf(file, query, names)] });
      t.match(message, /Elu has no rule for gradients: "[^"]+"/);
      t.match(
        message,
        /BiasSplitGelu is an operator of com\.microsoft, fused already \(pass the unoptimised export\): "[^"]+"/,
      );
    },
  );

  await t.test("a trained layer that does not reach the loss", async (t) => {
    const file = await changed("bert-eager-torchscript", ({ graph: { proto: main } }) => {
      const first = main.node.find(({ opType }) => opType === "LayerNormalization")!.output[0]!;
      main.output.push(makeValue(first, 1));
    });
    const output = file.model.graph.proto.output[1]!.name;
    const message = await refused(file, adapted(file, [query, later]), { logits: output });
    t.match(
      message,
      /what is trained does not reach the loss: "eigenlora\.bert\.encoder\.layer\.0.*query\.A".* and 1 more/,
    );
    const both = await readCase("bert-eager-torchscript");
    t.match(await refused(both, adapted(both, [query]), { logits: "logit" }), /has no output "logit", only "logits"/);
  });

  await t.test("quantised layers on the path", async (t) => {
    for (const [name, operator] of [
      ["int8", "MatMulInteger"],
      ["qdq", "QuantizeLinear"],
    ] as const) {
      const file = await readModel(model(name));
      t.match(
        await refused(file, adapted(file, [query])),
        new RegExp(`${operator} is quantised, which gradients do not pass \\(pass a float export\\): "`),
      );
    }
  });

  await t.test("half precision", async (t) => {
    const half = await readModel(model("half"));
    t.match(
      await refused(half, adapted(half, [query])),
      /MatMul computes in float16.*export in float32\): "\/bert\/encoder\/layer\.0/,
    );
    const between = await changed("bert-eager-torchscript", ({ graph: { proto: main } }) => {
      const tanh = main.node.findIndex(({ opType }) => opType === "Tanh");
      const { input } = main.node[tanh]!;
      const [down, up] = [
        makeNode("Cast", "down", [input[0]!], "down", { to: 10 }),
        makeNode("Cast", "up", ["down"], "up", { to: 1 }),
      ];
      input[0] = "up";
      main.node.splice(tanh, 0, down, up);
    });
    t.match(
      await refused(between, adapted(between, [query])),
      /Cast computes in float16, which is not trained in \(export in float32\): "down"/,
    );
  });

  await t.test("control flow, an old opset", async (t) => {
    const old = await readModel(model("branches"));
    const message = await refused(old, adapted(old, ["mid", "up"]));
    t.match(message, /its opset is 11, at least 13 is needed/);
    t.match(message, /If is control flow, which gradients do not pass/);
  });

  await t.test("nothing to train, a graph made before", async (t) => {
    const file = await readCase("vit-dynamo");
    t.match(await refused(file, {}), /nothing is trained/);
    const twice = await readCase("bert-eager-torchscript");
    await graphOf(twice, adapted(twice, [query]));
    t.match(await refused(twice, adapted(twice, [later])), /has task inputs already/);
  });

  await t.test("a runtime that cannot run the model says so itself", async (t) => {
    const file = await readCase("bert-eager-torchscript");
    const broken = async (): Promise<never> => {
      throw new Error("out of memory");
    };
    const error = await refusal(async () => graphOf(file, adapted(file, [query]), { probe: broken }));
    t.match(error.message, /out of memory/);
  });
});

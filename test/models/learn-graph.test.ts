/**
 * Training graphs: gradients, compared with PyTorch's on plain exports of several exporters; every operator's rule,
 * compared with finite differences; refusals and their messages.
 */
import type { Feed } from "eigenlora/session";
import t from "tap";
import type { TrainingGraphOptions } from "../support/internals/learn.ts";
import {
  type ModelFile,
  makeNode,
  makeValue,
  type OnnxModel,
  readModel,
  type TaskInput,
  toBinary,
} from "../support/internals/models.ts";
import {
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
} from "../support/learning.ts";
import { soak } from "../support/required.ts";
import { model, NODE, ORTS, type Ort, refusal } from "../support/sessions.ts";

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

for (const { name: runtime, ort } of ORTS) {
  t.test(`${runtime}: loss and gradients are PyTorch's`, async (t) => {
    t.ok(CASES.length >= 12, "the cases are there");
    for (const name of CASES) {
      const of = await golden(name);
      // Levels change what ONNX Runtime makes of a graph, alike on both runtimes.
      for (const level of soak || name === CASES[0] ? (["disabled", "all"] as const) : (["all"] as const)) {
        const { loss, gradients, worst } = await against(ort, level, of);
        const what = `${name}, optimisations ${level}`;
        t.ok(loss <= TOLERANCE, `${what}: loss off by ${loss.toExponential(1)}`);
        t.ok(gradients <= TOLERANCE, `${what}: gradients off by ${gradients.toExponential(1)} at most (${worst})`);
      }
      if (ort !== NODE) continue;
      // A graph in parts is one graph, whichever model it is of.
      for (const part of soak ? [1, 7] : name === CASES[0] || name === CASES.at(-1) ? [7] : []) {
        const { loss, gradients } = await against(ort, "all", of, part);
        t.ok(Math.max(loss, gradients) <= TOLERANCE, `${name}, in parts of ${part} nodes`);
      }
    }
  });
}

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

/** A case's model after a change to its graph, as if it had been exported so. */
async function changed(name: string, change: (model: OnnxModel) => void): Promise<ModelFile> {
  const file = await readCase(name);
  change(file.model);
  return readModel(toBinary("ModelProto", file.model.proto));
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`${runtime}: one graph that learns and answers`, async (t) => {
    for (const level of ["disabled", "all"] as const) {
      const of = await golden("bert-eager-torchscript");
      const what = `optimisations ${level}`;
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
  });
}

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
        proto.opsetImport.push({ domain: "com.microsoft", version: 1n });
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

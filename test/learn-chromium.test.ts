/**
 * Training graphs in a real browser: onnxruntime-web's wasm provider and both of its WebGPU providers, compared with PyTorch. A trainer
 * there, compared with one in Node.
 */
import type { Feed } from "eigenlora/session";
import t from "tap";
import { addRuntimes, answerOf, bundle, noChromium, openPage } from "./browser.ts";
import { embedWeights, uniform } from "./internals.ts";
import { asJson, type Case, compare, floats, golden, learning, type Prepared, prepare, relative } from "./learning.ts";
import { skip, soak } from "./required.ts";
import { difference, modelBytes, NODE, packBytes } from "./sessions.ts";
import { type Trained, train } from "./training.js";

/** One case of each kind, the one with most gradients among them; test/learn-graph.test.ts has all, without a GPU. */
const CASES = ["bert-all-linear", "llama-dynamo", "vit-dynamo"];
const BOTH = "bert-eager-torchscript";
/** Cases of the gate, by build and provider: software WebGPU is slow, so each runs another kind. The soak runs all on all. */
const GATE: Record<string, readonly string[]> = {
  "webgpu, wasm": ["vit-dynamo"],
  "webgpu, webgpu": [BOTH],
  "jsep, webgpu": ["llama-dynamo"],
};

/** Tolerance of gradients. The older provider leaves sine and cosine, which rotate a LLaMA's positions, to WGSL: 2⁻¹¹. */
const toleranceOf = (name: string, build: string): number =>
  build === "jsep" && name.startsWith("llama") ? 1e-3 : 2e-5;

interface Row {
  build: string;
  provider: string;
  name: string;
  why?: string;
  runs?: Record<string, (number | null)[]>[];
}

t.test(
  "training graphs × providers in Chromium",
  { skip: noChromium, timeout: soak ? 580_000 : 240_000 },
  async (t) => {
    const files = new Map<string, Uint8Array>();
    const graphs = new Map<string, { of: Case; prepared: Prepared }>();
    const plan = [];
    for (const name of soak ? [...CASES, BOTH] : Object.values(GATE).flat()) {
      const of = await golden(name);
      const prepared = await prepare(of);
      const { file, graph, feeds } = prepared;
      files.set(`${name}.onnx`, embedWeights(file, []));
      graphs.set(name, { of, prepared });
      const values = (all: Iterable<[string, Feed]>): object =>
        Object.fromEntries([...all].map(([input, feed]) => [input, asJson(feed)]));
      const idle = [...feeds, ...learning(graph, floats(new Float32Array(1), 1, 1), false)];
      const runs = name === BOTH ? [[...feeds], idle] : [[...feeds]];
      const turning = file.model.graph.proto.node
        .filter(({ opType }) => opType === "Sin" || opType === "Cos")
        .map(({ name: node }) => node);
      plan.push({ name, feeds: runs.map(values), turning });
    }
    files.set("plan.json", new TextEncoder().encode(JSON.stringify(plan)));
    files.set(
      "page.js",
      await bundle(`import { learn } from "./browser-learn.js";
    const some = ${JSON.stringify(soak ? undefined : GATE)};
    globalThis.answer = fetch("/plan.json").then((response) => response.json()).then((plan) => learn(plan, some));`),
    );
    await addRuntimes(files, ["asyncify", "jsep"]);
    const rows = (await answerOf(await openPage(t, files, ["--enable-unsafe-webgpu"]))) as Row[];
    t.ok(rows.length > 0);
    for (const { build, provider, name, why, runs } of rows) {
      const what = `${name}, ${build}, ${provider}`;
      if (why === "no adapter") {
        skip(t, "chromium", `${what}: no adapter`);
        continue;
      }
      const { of, prepared } = graphs.get(name)!;
      const { graph } = prepared;
      if (!runs) {
        t.fail(`${what}: ${why}`);
        continue;
      }
      const [learnt, answering] = runs.map(
        (run) =>
          (output: string): number[] =>
            run[output]!.map((value) => value ?? NaN),
      );
      const { loss, gradients, worst } = compare(of, prepared, learnt!);
      const most = toleranceOf(name, build);
      t.ok(
        loss <= most && gradients <= most,
        `${what}: loss off by ${loss.toExponential(1)}, gradients by ${gradients.toExponential(1)} at most (${worst})`,
      );
      if (!answering) continue;
      t.ok(relative(answering(graph.logitsOutput), learnt!(graph.logitsOutput)) < most, `${what}: it answers alike`);
      for (const gradient of graph.gradients.values())
        t.equal(answering(gradient).length, 0, `${what}: no gradient unless it learns`);
    }
  },
);

/** Tolerance of a task's logits after 16 steps. */
const LEARNED: Record<string, number> = { wasm: 1e-5, webgpu: 1e-4 };

if (soak)
  t.test(
    "a trainer in Chromium learns the task that it learns in Node",
    { skip: noChromium, timeout: soak ? 580_000 : 240_000 },
    async (t) => {
      // Its weights are f16 behind Casts: software WebGPU has no f16.
      const [model, pack] = [modelBytes("f16"), await packBytes(["adapters"], "base")];
      const next = uniform(5);
      const lines = Array.from({ length: 36 }, () => Array.from({ length: 6 }, () => 1 + Math.floor(next() * 8))).map(
        (ids) => ({ ids, label: ids[0]! % 2 ? "odd" : "even" }),
      );
      const inNode = await train(NODE, { model, pack, lines });
      const files = new Map<string, Uint8Array>([
        ["model.onnx", model],
        ["tasks.eigen", pack],
      ]);
      files.set(
        "page.js",
        await bundle(
          `import { teach } from "./browser-learn.js"; globalThis.answer = teach(${JSON.stringify(lines)});`,
        ),
      );
      await addRuntimes(files, ["asyncify"]);
      const taught = (await answerOf(await openPage(t, files, ["--enable-unsafe-webgpu"]))) as Record<
        string,
        Trained | "no adapter"
      >;
      for (const [provider, found] of Object.entries(taught)) {
        if (found === "no adapter") {
          skip(t, "chromium", `${provider}: no adapter`);
          continue;
        }
        const { losses, logits } = found;
        t.ok(losses.at(-1)! < 0.7 * losses[0]!, `${provider}: loss ${losses[0]} → ${losses.at(-1)}`);
        const off = difference(logits, inNode.logits);
        t.ok(
          off <= LEARNED[provider]!,
          `${provider}: the task's logits are off by ${off.toExponential(1)} from Node's`,
        );
      }
    },
  );

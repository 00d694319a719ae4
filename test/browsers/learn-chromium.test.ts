/**
 * Training graphs in a real browser: onnxruntime-web's wasm provider and both of its WebGPU providers, compared with
 * PyTorch. A trainer there, compared with one in Node.
 */
import type { Feed } from "eigenlora/session";
import t from "tap";
import { addRuntimes, answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { toBinary } from "../support/internals/models.ts";
import {
  asJson,
  type Case,
  compare,
  floats,
  golden,
  learning,
  type Prepared,
  prepare,
  relative,
} from "../support/learning.ts";
import { skip, soak } from "../support/required.ts";

/**
 * One case of each kind, the one with most gradients among them; test/models/learn-graph.test.ts has all, without a
 * GPU.
 */
const CASES = ["bert-all-linear", "llama-dynamo", "vit-dynamo"];
const BOTH = "bert-eager-torchscript";
/**
 * Cases of the gate, by build and provider: software WebGPU is slow, so each runs another kind. The soak runs all on
 * all.
 */
const GATE: Record<string, readonly string[]> = {
  "webgpu, wasm": ["vit-dynamo"],
  "webgpu, webgpu": [BOTH],
  "jsep, webgpu": ["llama-dynamo"],
};

/**
 * Tolerance of gradients. The older provider leaves sine and cosine, which rotate a LLaMA's positions, to WGSL: 2⁻¹¹.
 */
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
      files.set(`${name}.onnx`, toBinary("ModelProto", file.model.proto));
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

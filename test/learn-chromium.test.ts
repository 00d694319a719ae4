/**
 * Training graphs in a real browser: onnxruntime-web's wasm provider and both of its WebGPU providers, against PyTorch.
 */
import t from "tap";
import type { Feed } from "../dist/src/onnx/feeds.js";
import { embedWeights } from "../dist/src/onnx/write.js";
import { addRuntimes, answerOf, bundle, noChromium, openPage } from "./browser.ts";
import { asJson, compare, floats, golden, learning, prepare, relative, type Case, type Prepared } from "./learning.ts";
import { required } from "./required.ts";

/** One of each kind, the one with most gradients among them. */
const CASES = ["bert-all-linear", "bert-sdpa-dynamo", "bert-opset13", "llama-torchscript", "llama-dynamo", "vit-dynamo"];
const BOTH = "bert-eager-torchscript";

/** How far gradients may be off; a GPU's functions are less exact. */
const TOLERANCE: Record<string, number> = { wasm: 2e-5, webgpu: 1e-3 };

interface Row {
  build: string;
  provider: string;
  name: string;
  why?: string;
  runs?: Record<string, (number | null)[]>[];
}

t.test("training graphs × providers in Chromium", { skip: noChromium, timeout: 240_000 }, async (t) => {
  const files = new Map<string, Uint8Array>();
  const graphs = new Map<string, { of: Case; prepared: Prepared }>();
  const plan = [];
  for (const name of [...CASES, BOTH]) {
    const of = await golden(name);
    const prepared = await prepare(of);
    const { file, graph, feeds } = prepared;
    files.set(`${name}.onnx`, embedWeights(file, []));
    graphs.set(name, { of, prepared });
    const values = (all: Iterable<[string, Feed]>): object => Object.fromEntries([...all].map(([input, feed]) => [input, asJson(feed)]));
    const idle = [...feeds, ...learning(graph, floats(new Float32Array(1), 1, 1), false)];
    const runs = name === BOTH ? [[...feeds], idle] : [[...feeds]];
    plan.push({ name, feeds: runs.map(values) });
  }
  files.set("plan.json", new TextEncoder().encode(JSON.stringify(plan)));
  files.set("page.js", await bundle(`import { learn } from "./browser-learn.js";
    globalThis.answer = fetch("/plan.json").then((response) => response.json()).then(learn);`));
  await addRuntimes(files, ["asyncify", "jsep"]);
  const rows = (await answerOf(await openPage(t, files, ["--enable-unsafe-webgpu"]))) as Row[];
  for (const { build, provider, name, why, runs } of rows) {
    const what = `${name}, ${build}, ${provider}`;
    if (why === "no adapter") {
      if (required.has("chromium")) t.fail(`${what}: no adapter`);
      else t.comment(`${what}: no adapter, skipped`);
      continue;
    }
    const { of, prepared } = graphs.get(name)!;
    const { graph } = prepared;
    if (!runs) {
      t.fail(`${what}: ${why}`);
      continue;
    }
    const [learnt, answering] = runs.map((run) => (output: string): number[] => run[output]!.map((value) => value ?? NaN));
    const { loss, gradients, worst } = compare(of, prepared, learnt!);
    const most = TOLERANCE[provider]!;
    t.ok(loss <= most && gradients <= most, `${what}: loss off by ${loss.toExponential(1)}, gradients by ${gradients.toExponential(1)} at most (${worst})`);
    if (!answering) continue;
    t.ok(relative(answering(graph.logitsOutput), learnt!(graph.logitsOutput)) < most, `${what}: it answers alike`);
    for (const gradient of graph.gradients.values()) t.equal(answering(gradient).length, 0, `${what}: no gradient unless it learns`);
  }
});

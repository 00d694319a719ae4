/**
 * Sessions in a real browser: onnxruntime-web's wasm and WebGPU providers on every export, compared with the answers of
 * PyTorch and PEFT.
 */
import t, { type Test } from "tap";
import { addRuntimes, answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { skip, soak } from "../support/required.ts";
import { GOLDENS, golden, JSON_FEEDS, modelBytes, packBytes } from "../support/sessions.ts";

/** Models by kind of export, with the tolerance of a float answer. */
const MODELS: Record<string, number> = {
  torchscript: 1e-5,
  "dynamo-optimized": 1e-5,
  gemm: 1e-5,
  "gemm-nn": 1e-5,
  tied: 1e-5,
  encoder: 1e-5,
  f16: 1e-5,
  half: 5e-3,
  q4: 1e-5,
  int8: 2e-2,
  qdq: 2e-2,
};

/**
 * Models that run on software WebGPU, which is slow: one of each kind ("dynamo-optimized" equals "torchscript"). It has
 * no f16 arithmetic, so "half" does not run there, task or not.
 */
const ON_GPU = ["torchscript", "gemm", "gemm-nn", "tied", "encoder", "f16", "q4", "int8"];
const MODES = ["core", "factors", "folded"] as const;
/**
 * Modes of the gate, by provider and model: session-matrix.test.ts runs all on onnxruntime-web's wasm in Node,
 * session-gpu.test.ts more on software WebGPU. The soak runs all here too.
 */
const GATE: Record<string, Record<string, readonly (typeof MODES)[number][]>> = {
  wasm: {
    torchscript: MODES,
    encoder: ["core"],
    f16: ["folded"],
    half: ["factors"],
    q4: ["core", "folded"],
    qdq: ["core"],
  },
  webgpu: { torchscript: ["core"], gemm: ["folded"], f16: ["factors"], q4: ["core"] },
};
const modesOf = (provider: string, models: readonly string[]) =>
  models.map((model) => [model, soak ? MODES : (GATE[provider]![model] ?? [])]);

interface Row {
  provider: string;
  model: string;
  mode: string;
  result: string;
  why?: string;
  differences?: Record<string, number>;
  probe?: string;
}

/** Material of a page: models with their packs and answers. */
async function served() {
  const files = new Map<string, Uint8Array>();
  const packs = {
    main: packBytes(["adapters"], "base"),
    tied: packBytes(["adapters/two", "adapters/three"], "base-tied"),
    mlp: packBytes(["adapters-mlp"], "base-mlp"),
  };
  for (const [name, bytes] of Object.entries(packs)) files.set(`${name}.eigen`, await bytes);
  const cases = Object.keys(MODELS).map((model) => {
    files.set(`${model}.onnx`, modelBytes(model));
    const answers = GOLDENS.models[`${model}.onnx`] ?? GOLDENS.models[model]!;
    const tasks = Object.keys(GOLDENS.outputs[answers]!).filter((task) =>
      ["base", "two", "three", "five", "a", "b"].includes(task),
    );
    // The GPU runs one task: only the graph is at stake there.
    const onGpu = tasks.filter((task) => ["base", "two", "a"].includes(task));
    const pack = answers === "mlp" ? "mlp" : answers === "tied" ? "tied" : "main";
    const ignore = answers === "encoder" ? ["classifier"] : [];
    const of = (some: readonly string[]): object =>
      Object.fromEntries(some.map((task) => [task, golden(answers, task)]));
    return { model, pack, ignore, feeds: JSON_FEEDS, answers: { wasm: of(tasks), webgpu: of(onGpu) } };
  });
  return { files, cases };
}

/** Rows of a page that runs `browser-matrix.js`. */
async function rowsOf(t: Test, files: Map<string, Uint8Array>, plan: object): Promise<Row[]> {
  files.set("plan.json", new TextEncoder().encode(JSON.stringify(plan)));
  // onnxruntime-web's worker runs the same script.
  files.set(
    "page.js",
    await bundle(`import { matrix } from "./browser-matrix.js";
  if (typeof document !== "undefined") globalThis.answer = fetch("/plan.json").then((response) => response.json()).then(matrix);`),
  );
  await addRuntimes(files, ["asyncify"]);
  return (await answerOf(await openPage(t, files, ["--enable-unsafe-webgpu"]))) as Row[];
}

const options = { skip: noChromium, timeout: soak ? 580_000 : 240_000 };

t.test("modes × providers × exports in Chromium", options, async (t) => {
  const { files, cases } = await served();
  const plan = {
    cases,
    providers: {
      wasm: modesOf("wasm", Object.keys(MODELS)),
      webgpu: modesOf("webgpu", ON_GPU),
    },
  };
  const rows = await rowsOf(t, files, plan);
  t.ok(rows.some(({ provider }) => provider === "wasm") && rows.some(({ provider }) => provider === "webgpu"));
  for (const { provider, model, mode, result, why, differences, probe } of rows) {
    const name = `${provider}, ${model}, ${mode}`;
    if (result === "no adapter") {
      skip(t, "chromium", `${provider}: no adapter`);
      continue;
    }
    const worst = Math.max(...Object.values(differences ?? { none: Infinity }));
    t.comment(`${name}: ${result} ${why ?? worst.toExponential(1)} ${probe ?? ""}`);
    const quantised = ["q4", "int8", "qdq"].includes(model);
    if (mode === "folded" && quantised) {
      t.equal(result, "refused", name);
      t.match(why, /quantised.*use mode "core" or "factors"/, name);
      continue;
    }
    t.equal(result, "works", `${name}: ${why ?? ""}`);
    // WebGPU folds weights stored as f16 in f32.
    const rounded = mode === "folded" && provider === "wasm" && ["f16", "half"].includes(model) ? 5e-3 : 0;
    t.ok(worst <= Math.max(MODELS[model]!, rounded), `${name}: off by ${worst}`);
    if (mode !== "folded") t.equal(probe, "passed", name);
  }
});

t.test("models run in onnxruntime-web's own worker (env.wasm.proxy)", options, async (t) => {
  const { files, cases } = await served();
  const wasm = [
    ["torchscript", soak ? MODES : ["folded"]],
    ["q4", ["core"]],
  ];
  const rows = await rowsOf(t, files, { cases, providers: { wasm }, proxy: true });
  t.equal(rows.length, soak ? 4 : 2);
  for (const { model, mode, result, why, differences } of rows) {
    t.equal(result, "works", `${model}, ${mode}: ${why ?? ""}`);
    const worst = Math.max(...Object.values(differences ?? { none: Infinity }));
    t.ok(worst <= MODELS[model]!, `${model}, ${mode}: off by ${worst}`);
  }
});

/**
 * Packs on pipelines of transformers.js, compared with PEFT's answers. EIGENLORA_RUNTIMES names a folder in which `npm
 * install
 * @huggingface/transformers@4.3.1` was run. Without it tests are skipped by name, or fail when EIGENLORA_REQUIRE lists
 *   "transformers".
 */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { type AttachedPack, type AttachOptions, attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import { answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { fromBinary, toBinary } from "../support/internals/models.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import {
  type Answer,
  PACKAGE as folder,
  generate,
  generations,
  type Pipe,
  sameAnswers,
  skip,
  type Tensor,
  transformers,
} from "../support/pipelines.ts";
import { packages } from "../support/required.ts";
import { difference, GOLDENS, golden, goldenRow, model, modelBytes, packBytes, refusal } from "../support/sessions.ts";

const [ROLE, GAME] = ["debtags-role", "debtags-game"] as const;
const json = async (path: string): Promise<unknown> => JSON.parse(await readFile(data(path), "utf8"));
const GENERATIONS = await generations("decoder/goldens.json");
const PROMPTS = [...new Set(GENERATIONS.map(({ prompt }) => prompt))];
const ANSWERS = await generations("seq2seq/generations.json");
const QUESTIONS = [...new Set(ANSWERS.map(({ prompt }) => prompt))];
const REFERENCE = (
  (await json("reference/predictions.json")) as Record<string, Record<string, { predictions: number[] }>>
)["own-seed"]!;
interface Suite {
  labels: string[];
  test: [string, number][];
}
const SUITES = new Map([
  [ROLE, (await json(`tasks/${ROLE}.json`)) as Suite],
  [GAME, (await json(`tasks/${GAME}.json`)) as Suite],
]);
const BASE_LABELS = Array.from({ length: 8 }, (_, i) => `base ${i}`);

/** A folder in the layout of transformers.js' models, and the packs for them. */
const models = folderFor(t);
await makeModels();

async function makeModels(): Promise<void> {
  const write = async (path: string, content: string | Uint8Array): Promise<void> =>
    writeFile(join(models, path), content);
  await symlink(data("decoder"), join(models, "decoder"));
  for (const name of ["minilm", "encoder", "external"]) await mkdir(join(models, name, "onnx"), { recursive: true });
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    await symlink(data(`minilm/${file}`), join(models, "minilm", file));
  await symlink(data("minilm/model_fp16.onnx"), join(models, "minilm/onnx/model_fp16.onnx"));
  const config = { model_type: "bert" };
  await write(
    "minilm/config.json",
    JSON.stringify({
      ...config,
      id2label: { ...BASE_LABELS },
      label2id: Object.fromEntries(BASE_LABELS.map((l, i) => [l, i])),
    }),
  );
  // One word per token of the tiny models: "w5" is token 5.
  const vocab = Object.fromEntries(Array.from({ length: 64 }, (_, i) => [`w${i}`, i]));
  const special = (id: number): object => ({
    id,
    content: `w${id}`,
    special: true,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
  });
  const around = [
    { SpecialToken: { id: "w2", type_id: 0 } },
    { Sequence: { id: "A", type_id: 0 } },
    { SpecialToken: { id: "w3", type_id: 0 } },
  ];
  const named = { w2: { id: "w2", ids: [2], tokens: ["w2"] }, w3: { id: "w3", ids: [3], tokens: ["w3"] } };
  const tokenizer = {
    added_tokens: [special(0), special(2), special(3)],
    normalizer: null,
    pre_tokenizer: { type: "WhitespaceSplit" },
    post_processor: { type: "TemplateProcessing", single: around, pair: around, special_tokens: named },
    decoder: null,
    model: { type: "WordLevel", vocab, unk_token: "w1" },
  };
  for (const name of ["encoder", "external"]) {
    await write(`${name}/tokenizer.json`, JSON.stringify(tokenizer));
    await write(
      `${name}/tokenizer_config.json`,
      JSON.stringify({ tokenizer_class: "PreTrainedTokenizerFast", pad_token: "w0", model_max_length: 64 }),
    );
  }
  await write("encoder/config.json", JSON.stringify(config));
  await symlink(model("encoder"), join(models, "encoder/onnx/model.onnx"));
  await write(
    "external/config.json",
    JSON.stringify({ ...config, "transformers.js_config": { use_external_data_format: true } }),
  );
  // transformers.js prescribes the second file's name.
  const proto = fromBinary("ModelProto", modelBytes("external"));
  for (const { externalData } of proto.graph!.initializer) {
    for (const entry of externalData) if (entry.key === "location") entry.value = "model.onnx_data";
  }
  await write("external/onnx/model.onnx", toBinary("ModelProto", proto));
  await write("external/onnx/model.onnx_data", await readFile(data("sessions/external.onnx.data")));
  await write("decoder.eigen", (await packOf(["decoder/adapters/upper", "decoder/adapters/lower"], LOSSLESS)).bytes);
  const topics = [ROLE, GAME].map((task) => `adapters/own-seed/${task}`);
  await write("minilm.eigen", (await packOf(topics, LOSSLESS)).bytes);
  await write("tiny.eigen", await packBytes(["adapters"], "base"));
  await symlink(data("seq2seq"), join(models, "seq2seq"));
  const base = data("seq2seq/base.safetensors");
  await write("seq2seq.eigen", (await packOf(["seq2seq/adapters"], { ...LOSSLESS, base })).bytes);
}

const load = () => transformers(models);

const pack = async (name: string) => openPack(await readFile(join(models, `${name}.eigen`)));
async function attach(
  task: string,
  id: string,
  options: Partial<AttachOptions> = {},
): Promise<{ pipe: Pipe; tasks: AttachedPack }> {
  const { pipeline } = await load();
  const pipe = await pipeline(task, id, { dtype: id === "minilm" ? "fp16" : "fp32" });
  return {
    pipe,
    tasks: await attachPack(pipe, await pack(id === "encoder" || id === "external" ? "tiny" : id), {
      model: id,
      ...options,
    }),
  };
}
const rows = (task: typeof ROLE | typeof GAME, count: number): string[] =>
  SUITES.get(task)!
    .test.slice(0, count)
    .map(([text]) => text);
const labelsOf = (answers: readonly Answer[]): string[] => answers.map(({ label }) => label);
const expected = (task: typeof ROLE | typeof GAME, count: number): string[] =>
  REFERENCE[task]!.predictions.slice(0, count).map((label) => SUITES.get(task)!.labels[label]!);

t.test("text-classification answers as PEFT does, with each task's labels", { skip }, async (t) => {
  const { pipe, tasks } = await attach("text-classification", "minilm");
  t.same([...tasks.tasks.keys()].sort(), [GAME, ROLE]);
  t.equal(tasks.session.probe.result, "passed");
  t.equal(tasks.task, null);
  const before = (await pipe(rows(ROLE, 3), { top_k: null })) as Answer[][];
  t.ok(
    before.flat().every(({ label }) => BASE_LABELS.includes(label)),
    "the base's own names",
  );
  for (const task of [ROLE, GAME, ROLE] as const) {
    const report = await tasks.switchTask(task);
    t.equal(report.task, task);
    t.equal(tasks.task, task);
    const { labels } = SUITES.get(task)!;
    t.same(pipe.model.config, { ...pipe.model.config, id2label: { ...labels }, num_labels: labels.length });
    t.equal(pipe.model.config.label2id![labels[1]!], 1);
    const texts = rows(task, 20);
    const found = (await pipe(texts)) as Answer[];
    t.same(labelsOf(found), expected(task, 20));
    const all = (await pipe(texts, { top_k: null })) as Answer[][];
    t.same(labelsOf(all.map(([first]) => first!)), expected(task, 20));
    for (const answers of all) {
      t.same(labelsOf(answers).sort(), [...labels].sort(), "every label once");
      t.ok(Math.abs(answers.reduce((sum, { score }) => sum + score, 0) - 1) < 1e-5);
    }
  }
  t.ok(tasks.memory().total > 0);
  await tasks.switchTask(null);
  t.same(await pipe(rows(ROLE, 3), { top_k: null }), before, "the base's answers, to the bit");
  await tasks.switchTask(GAME);
  const ours = pipe.model.sessions["model"];
  await tasks.close();
  t.not(pipe.model.sessions["model"], ours);
  t.equal(pipe.model.sessions["model"]!.constructor.name, "InferenceSession");
  t.notOk(Object.hasOwn(pipe, "_call") || Object.hasOwn(pipe.model, "_call") || Object.hasOwn(pipe.model, "generate"));
  const after = (await pipe(rows(ROLE, 3), { top_k: null })) as Answer[][];
  sameAnswers(t, after, before, "the base's answers");
  t.match(await refusal(() => tasks.switchTask(ROLE)), { tag: "backend", message: /closed/ });
  await tasks.close();
  const again = await attachPack(pipe, await pack("minilm"), { model: "minilm" });
  await again.switchTask(ROLE);
  t.same(labelsOf(await pipe(rows(ROLE, 5))), expected(ROLE, 5), "attached again");
  await pipe.dispose();
  t.match(await refusal(() => again.switchTask(ROLE)), { tag: "backend", message: /closed/ });
});

t.test("an answer is wholly one task's while calls and switches overlap", { skip }, async (t) => {
  const { pipe, tasks } = await attach("text-classification", "external");
  const text = (i: number): string => `w${5 + i} w9 w${40 + i}`;
  const choices = [null, "two", "three", "five"] as const;
  const alone = new Map<string, Answer[]>();
  for (const task of choices) {
    await tasks.switchTask(task);
    for (let i = 0; i < 4; i++) alone.set(`${task} ${i}`, await pipe(text(i), { top_k: null }));
  }
  t.equal(alone.get("five 0")!.length, 5);
  t.equal(alone.get("two 0")![0]!.label.slice(0, 4), "two ");
  t.match(alone.get("null 0")![0]!.label, /^LABEL_\d$/);
  let seed = 11;
  const random = (below: number): number => ((seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) % 65536) % below;
  let active: (typeof choices)[number] = choices[3];
  const wrong: unknown[] = [];
  const work: Promise<unknown>[] = [];
  for (let step = 0; step < 400; step++) {
    const dice = random(10);
    if (dice < 3) {
      active = choices[random(choices.length)]!;
      work.push(tasks.switchTask(active));
    } else if (dice === 3) {
      // Neither of these changes anything.
      work.push(
        refusal(() => tasks.switchTask("six")),
        refusal(() => tasks.switchTask("two", { signal: AbortSignal.abort() })),
      );
    } else {
      const [task, i] = [active, random(4)];
      const answer = pipe(text(i), { top_k: null }) as Promise<Answer[]>;
      work.push(
        answer.then(
          (found) =>
            void (
              JSON.stringify(found) === JSON.stringify(alone.get(`${task} ${i}`)) || wrong.push({ task, i, found })
            ),
        ),
      );
    }
    if (dice === 9) await new Promise((resolve) => setTimeout(resolve, random(3)));
    if (dice === 8) await work[random(work.length)];
  }
  await Promise.all(work);
  t.same(wrong, []);
  t.equal(tasks.task, active);
  await pipe.dispose();
});

t.test("feature-extraction", { skip }, async (t) => {
  const { pipeline, Tensor, mean_pooling } = await load();
  const pipe = await pipeline("feature-extraction", "encoder", { dtype: "fp32" });
  const own = pipe.model.sessions["model"];
  const only = await openPack(await packBytes(["adapters/two"], "base"));
  t.match(await refusal(() => attachPack(pipe, only, { model: "encoder" })), {
    tag: "base",
    message: /"classifier\.(weight|bias)".*pass ignore: \["classifier"\]/,
  });
  t.equal(pipe.model.sessions["model"], own, "left as it was");
  t.notOk(Object.hasOwn(pipe, "_call"));
  const tasks = await attachPack(pipe, only, { model: "encoder", ignore: ["classifier"] });
  const feeds = Object.fromEntries(
    ["input_ids", "attention_mask", "token_type_ids"].map((name) => [
      name,
      new Tensor("int64", BigInt64Array.from(GOLDENS.feeds[name]!.flat(), BigInt), [3, 7]),
    ]),
  );
  for (const task of [null, "two", null]) {
    await tasks.switchTask(task);
    const { last_hidden_state: hidden } = await pipe.model(feeds);
    // Values at padded places do not matter, but PyTorch has the same.
    t.ok(difference(hidden!.data, golden("encoder", task)) < 1e-5, `${task}: all rows`);
    // Row 1 of the goldens is two words between their marks, padded to 7 tokens of 32 features.
    const row = goldenRow("encoder", task, 1).slice(0, 4 * 32);
    const found = (await pipe("w1 w58")) as Tensor;
    t.same(found.dims, [1, 4, 32]);
    t.ok(difference(found.data, row) < 1e-5, `${task}: by its tokenizer`);
    const mean = Array.from({ length: 32 }, (_, n) => (row[n]! + row[32 + n]! + row[64 + n]! + row[96 + n]!) / 4);
    const length = Math.hypot(...mean);
    const pooled = (await pipe("w1 w58", { pooling: "mean", normalize: true })) as Tensor;
    const unit = mean.map((v) => v / length);
    t.ok(difference(pooled.data, unit) < 1e-5, `${task}: pooled`);
  }
  // Sentence embeddings of one batch, each row on a task of its own, pooled as the pipeline does it.
  const texts = ["w1 w58", "w17 w5 w40 w9", "w1 w58", "w17 w5 w40 w9"];
  const inputs = pipe.tokenizer(texts, { padding: true, return_token_type_ids: true });
  const byName = Object.entries(inputs).map(([name, { ort_tensor }]) => [name, ort_tensor]);
  const rows = [null, "two", "two", null] as const;
  const { last_hidden_state: states } = await tasks.session.run(Object.fromEntries(byName), { tasks: rows });
  const pooled = mean_pooling(new Tensor("float32", states!.data, [...states!.dims]), inputs["attention_mask"]!);
  const found = pooled.normalize(2, -1).tolist() as number[][];
  for (const [i, task] of rows.entries()) {
    await tasks.switchTask(task);
    const alone = (await pipe(texts[i]!, { pooling: "mean", normalize: true })) as Tensor;
    t.ok(difference(found[i]!, alone.data) < 1e-5, `row ${i}: ${task}`);
  }
  t.equal(pipe.model.config.id2label, undefined, "an ignored head brings no names");
  await pipe.dispose();
});

t.test("the model handed over, and what becomes of the pipeline's own session", { skip }, async (t) => {
  const { pipeline } = await load();
  const answers = async (pipe: Pipe, tasks: AttachedPack): Promise<void> => {
    await tasks.switchTask("upper");
    const ids = await generate(pipe, PROMPTS[1]!);
    t.same(ids.slice(5), GENERATIONS.find((g) => g.task === "upper" && g.prompt === PROMPTS[1])!.ids);
  };
  const path = join(models, "decoder/onnx/model.onnx");
  for (const given of [path, pathToFileURL(path).href, await readFile(path), new Blob([await readFile(path)])]) {
    const pipe = await pipeline("text-generation", "decoder", { dtype: "fp32" });
    const own = pipe.model.sessions["model"]!;
    const tasks = await attachPack(pipe, await pack("decoder"), { model: given });
    await answers(pipe, tasks);
    t.match(await refusal(() => own.release()), { message: /disposed/ }, "released");
    const error = await refusal(() => tasks.close());
    t.match(error, { tag: "backend", message: /`model` was a file: dispose of the pipeline/ });
    await answers(pipe, tasks);
    await pipe.dispose();
  }
  const first = await attach("text-generation", "decoder", { mode: "factors" });
  t.equal(first.tasks.session.mode, "factors", "options pass through");
  await answers(first.pipe, first.tasks);
  await first.pipe.dispose();
  await first.tasks.close();
  t.match(
    await refusal(() => first.tasks.session.run({})),
    { message: /closed/ },
    "no model is loaded for a pipeline that is gone",
  );
});

t.test("what cannot be is refused and leaves the pipeline as it was", { skip }, async (t) => {
  const { pipeline } = await load();
  const pipe = await pipeline("text-generation", "decoder", { dtype: "fp32" });
  const own = pipe.model.sessions["model"];
  const some = await pack("decoder");
  const refused = async (options: object, given: unknown = pipe): Promise<Error> =>
    refusal(() => attachPack(given as Pipe, some, options as AttachOptions));
  t.match(await refused({}), { name: "TypeError", message: /pass { model }/ });
  t.match(await refused({ model: "decoder" }, {}), { name: "TypeError", message: /must be a pipeline/ });
  t.match(await refused({ model: "decoder", part: "encoder" }), {
    name: "TypeError",
    message: 'part: the model has the sessions "model", got "encoder"',
  });
  t.match(await refused({ model: "decoder", original: "keep" }), { name: "TypeError", message: /unknown option/ });
  t.match(await refused({ model: "decodr" }), {
    tag: "source",
    file: "decodr",
    message: /does not find the model again.*Pass \{ model \}/s,
  });
  const unfit = await refused({ model: "minilm", pretrained: { dtype: "fp16" } });
  t.match(unfit, { tag: "base" }, "a model that the adapters do not fit");
  t.match(await refused({ model: join(models, "nothing.onnx") }), { tag: "source" });
  t.match(await refused({ model: "decoder", session: { executionProviders: ["nonsense"] } }), {
    tag: "backend",
    message: /nonsense/,
  });
  const several = await pipeline("text-generation", "decoder", { dtype: "fp32" });
  several.model.sessions["other"] = several.model.sessions["model"]!;
  t.match(await refused({ model: "decoder" }, several), {
    tag: "source",
    message: /transformers\.js makes no session "other" of this model/,
  });
  delete several.model.sessions["other"];
  await several.dispose();
  const wordless = await pipeline("text-generation", "decoder", { dtype: "fp32" });
  Object.assign(wordless, { tokenizer: null });
  // Neither a tokenizer nor the model shows tensors.
  Object.assign(wordless.model, { _prepare_decoder_input_ids_for_generation: undefined });
  const nameless = /pass \{ Tensor \}, `Tensor` of "@huggingface\/transformers"$/;
  t.match(await refused({ model: "decoder" }, wordless), { name: "TypeError", message: nameless });
  class Matrix {}
  for (const [wrong, name] of [
    [Matrix, '"Matrix"'],
    [Float32Array, '"Float32Array"'],
    ["float32", '"float32"'],
  ] as const) {
    const message = `attachPack: Tensor: expected the class \`Tensor\` of "@huggingface/transformers", got ${name}`;
    t.match(await refused({ model: "decoder", Tensor: wrong }, wordless), { name: "TypeError", message });
  }
  const { Tensor } = await import("onnxruntime-common");
  for (const one of [(await load()).Tensor, Tensor]) {
    const given = await attachPack(wordless, await pack("decoder"), { model: "decoder", Tensor: one });
    t.equal(given.session.probe.result, "passed");
    await given.close();
  }
  await wordless.dispose();
  t.equal(pipe.model.sessions["model"], own);
  const answered: unknown[] = await pipe(PROMPTS[1]!, { max_new_tokens: 3, do_sample: false });
  t.equal(answered.length, 1);
  const [, second] = await Promise.all([
    attachPack(pipe, some, { model: "decoder" }),
    refused({ model: "decoder" }),
    pipe(PROMPTS[1]!, { max_new_tokens: 3, do_sample: false }),
  ]);
  t.match(second, { name: "TypeError", message: /the pipeline has the pack .*; close that first/ });
  await pipe.dispose();
  const other = await pipeline("text-classification", "external", { dtype: "fp32" });
  t.match(
    await refusal(async () =>
      attachPack(other, await openPack(await packBytes(["adapters/two"], "base")), {
        model: model("encoder"),
        ignore: ["classifier"],
      }),
    ),
    { name: "TypeError", message: /input_ids.* → last_hidden_state\) is not what the pipeline runs \(.* → logits\)/ },
  );
  await other.dispose();
});

interface Smoke {
  generated: { task: string; prompt: string; ids: number[] }[];
  /** Answers of encoder and decoder. */
  answered: { task: string; prompt: string; ids: number[] }[];
  labelled: { task: typeof ROLE | typeof GAME; text: string; label: string }[];
  probe: string;
  detached: string;
  logits: number[];
}

const TEXTS = rows(ROLE, 8);
const PLAN = { models, prompts: PROMPTS, questions: QUESTIONS, texts: TEXTS, topics: [ROLE, GAME, ROLE] };

function judge(t: Test, { generated, answered, labelled, probe, detached, logits }: Smoke): void {
  t.equal(generated.length, 15);
  for (const { task, prompt, ids } of generated)
    t.same(ids, GENERATIONS.find((g) => g.task === task && g.prompt === prompt)!.ids, `${task}: ${prompt}`);
  t.equal(answered.length, 5 * QUESTIONS.length);
  for (const { task, prompt, ids } of answered)
    t.same(ids, ANSWERS.find((g) => g.task === task && g.prompt === prompt)!.ids, `${task}: ${prompt}`);
  t.equal(labelled.length, 3 * TEXTS.length);
  for (const { task, text, label } of labelled) {
    if (task === ROLE) t.equal(label, expected(ROLE, TEXTS.length)[TEXTS.indexOf(text)], text);
    else t.ok(SUITES.get(GAME)!.labels.includes(label), `${text}: ${label}`);
  }
  t.equal(probe, "passed");
  t.ok(BASE_LABELS.includes(detached));
  t.ok(difference(logits, goldenRow("base", "three", 0)) < 1e-5, "a model with a second file");
}

t.test("Chromium", { skip: skip || noChromium, timeout: 120_000 }, async (t) => {
  const files = new Map<string, Uint8Array>();
  for (const name of ["decoder", "seq2seq", "minilm", "external"]) {
    for (const file of await readdir(join(models, name), { recursive: true })) {
      if (/\.(json|onnx|onnx_data)$/.test(file))
        files.set(`models/${name}/${file}`, await readFile(join(models, name, file)));
    }
  }
  for (const name of ["decoder", "seq2seq", "minilm", "tiny"])
    files.set(`${name}.eigen`, await readFile(join(models, `${name}.eigen`)));
  // The build that transformers.js 4 imports. Where its pinned version is not hoisted, it lies below.
  const dist = [join(folder, "node_modules"), packages()]
    .map((n) => join(n, "onnxruntime-web/dist"))
    .find((d) => existsSync(d))!;
  for (const suffix of ["mjs", "wasm"])
    files.set(
      `ort/ort-wasm-simd-threaded.asyncify.${suffix}`,
      await readFile(join(dist, `ort-wasm-simd-threaded.asyncify.${suffix}`)),
    );
  const contents = `import * as transformers from "@huggingface/transformers";
    import { openPack } from "eigenlora";
    import { attachPack } from "eigenlora/transformers";
    import { smoke } from "./transformers-smoke.js";
    const { env } = transformers;
    Object.assign(env, { localModelPath: "/models/", allowLocalModels: true, allowRemoteModels: false });
    env.backends.onnx.wasm.wasmPaths = location.origin + "/ort/";
    env.backends.onnx.wasm.numThreads = 1;
    const read = async (file) => new Uint8Array(await (await fetch("/" + file)).arrayBuffer());
    globalThis.answer = smoke(transformers, { openPack, attachPack }, { ...${JSON.stringify(PLAN)}, device: "wasm", read });`;
  files.set("page.js", await bundle(contents, { nodePaths: [packages()] }));
  judge(t, (await answerOf(await openPage(t, files))) as Smoke);
});

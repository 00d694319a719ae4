/**
 * An encoder and a decoder in two files, joined in memory: they answer as PEFT's model, gradients equal PyTorch's in f64, and learned
 * tasks serve the two files. Covers a decoder with a branch for each use of its cache, and one without caches.
 */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack, type Pack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSessions, type ModelParts } from "eigenlora/onnxruntime";
import { type BatchFeeds, createTrainer, type Encode } from "eigenlora/train";
import type { Tensor } from "onnxruntime-common";
import t, { type Test } from "tap";
import { json, run } from "./command-line.ts";
import {
  attribute,
  detachWeights,
  findParameters,
  fromBinary,
  type GraphProto,
  ModelMatcher,
  type ModelProto,
  ModelProtoSchema,
  makeFloats,
  parseModel,
  point,
  readParts,
  readWhole,
  renameValues,
  toBinary,
} from "./internals.ts";
import { goldensIn, learnedOff, noise, relative } from "./learning.ts";
import { concat, data, LOSSLESS } from "./packs.ts";
import { soak } from "./required.ts";
import { difference, type Feeds, NODE, type Ort, open, refusal, type Session, WEB } from "./sessions.ts";

const ENCODER = data("seq2seq/onnx/encoder_model.onnx");
const MERGED = data("seq2seq/onnx/decoder_model_merged.onnx");
const PLAIN = data("seq2seq/decoder.onnx");
const TASKS = ["answers", "titles"] as const;
type Task = "base" | (typeof TASKS)[number];

interface Golden {
  readonly tokens: readonly (readonly number[])[];
  readonly logits: readonly number[];
}
const GOLDENS = JSON.parse(readFileSync(data("seq2seq/goldens.json"), "utf8")) as {
  readonly rows: readonly (readonly number[])[];
} & Record<Task, Golden>;

/** @param base whether with the fingerprints of the base */
async function packOf(names: readonly string[] = TASKS, base = true): Promise<Pack> {
  const adapters = await readAdapters(names.map((name) => data(`seq2seq/adapters/${name}`)));
  const host = base ? data("seq2seq/base.safetensors") : undefined;
  const { chunks } = await buildPack(adapters, host ? { ...LOSSLESS, base: host } : LOSSLESS);
  for (const adapter of adapters) await adapter.close();
  return openPack(concat(chunks));
}

const int64 = (ort: Pick<Ort, "Tensor">, rows: readonly (readonly number[])[]): Tensor =>
  new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0]!.length]);

/** Inputs of the goldens, without their last token. */
function feedsOf(ort: Ort, task: Task): Feeds {
  const { rows } = GOLDENS;
  return {
    input_ids: int64(ort, rows),
    attention_mask: int64(
      ort,
      rows.map((row) => row.map((id) => Number(id !== 0))),
    ),
    decoder_input_ids: int64(
      ort,
      GOLDENS[task].tokens.map((row) => row.slice(0, 8)),
    ),
  };
}

/** Checks that the joined model, before any addition, has the pack's modules and answers as PEFT's. */
async function plain(test: Test, parts: ModelParts, how: string, options: object = {}): Promise<void> {
  const pack = await packOf();
  const file = await readWhole(parts, { weightsApart: true, ...options });
  const matcher = new ModelMatcher(file, {});
  const bases = await pack.bases();
  test.same(await matcher.check(pack.modules, await matcher.weights(pack.modules), bases.bytes), [], how);
  const { bytes, files, folder } = await detachWeights(file, []);
  const extra = folder === undefined ? {} : { session: { model_external_initializers_file_folder_path: folder } };
  const given = folder === undefined ? { externalData: [...files] } : { extra };
  const session = await NODE.InferenceSession.create(bytes, given);
  const { logits } = await session.run(feedsOf(NODE, "base"));
  const off = difference(logits!.data as Float32Array, GOLDENS.base.logits);
  test.ok(off < 2e-5, `${how}: off by ${off}`);
  await session.release();
  await file.close();
  await pack.close();
}

/** Checks that all tasks of the pack answer as PEFT's model. */
async function answers(test: Test, ort: Ort, session: Session, how: string): Promise<void> {
  for (const task of [null, ...session.pack.tasks.keys()]) {
    const id = (task ?? "base") as Task;
    await session.switchTask(task);
    const { logits } = await session.run(feedsOf(ort, id));
    const off = difference(logits!.data as Float32Array, GOLDENS[id].logits);
    test.ok(off < 2e-5, `${how}, ${task}: off by ${off}`);
  }
}

t.test("answers, loss and gradients are PEFT's in f64, of either decoder the same", async (t) => {
  const [adapter] = await readAdapters([data("seq2seq/adapters/answers")]);
  const expected = await goldensIn(data("seq2seq/gradients.safetensors"));
  const classes = Array.from({ length: 16 }, (_, row) => (7 * row + 3) % 97);
  const found: ReadonlyMap<string, Float32Array>[] = [];
  const bytes = (path: string): Uint8Array => new Uint8Array(readFileSync(path));
  for (const [how, ort, parts, base] of [
    ["merged", NODE, { encoder: ENCODER, decoder: MERGED }, true],
    ["plain, without fingerprints", NODE, { encoder: ENCODER, decoder: PLAIN }, false],
    // Runtimes for the web take long to load bytes, and joining is the same there: a soak (node test/soak-tests.js learn-joined).
    ...(soak
      ? ([["bytes, onnxruntime-web", WEB, { encoder: bytes(ENCODER), decoder: bytes(MERGED) }, true]] as const)
      : []),
  ] as const) {
    const pack = await packOf(["answers"], base);
    const session = await open(ort, parts, pack, { trainable: true });
    t.same(session.inputNames, ["input_ids", "attention_mask", "decoder_input_ids"]);
    t.same(session.outputNames, ["logits"], "no caches");
    t.same(session.leftOut, []);
    await answers(t, ort, session, how);
    const { off, gradients } = await learnedOff(ort, session, adapter!, feedsOf(ort, "answers"), classes, expected);
    t.equal(gradients.size, 24);
    const [worst, by] = off.reduce((a, b) => (a[1] >= b[1] ? a : b));
    t.ok(by <= 2e-5, `${how}: ${worst} is off by ${by.toExponential(1)}`);
    found.push(gradients);
    await session.close();
    await pack.close();
  }
  for (const [name, values] of found[0]!) t.ok(relative(found[1]!.get(name)!, values) < 1e-6, name);
  await adapter!.close();
});

/** The tokenizer of the folder, one token a character. */
function tokenizer(): Encode & { eos_token?: string } {
  const [rules, config] = ["tokenizer", "tokenizer_config"].map((name) =>
    JSON.parse(readFileSync(data(`seq2seq/${name}.json`), "utf8")),
  );
  const made = new Tokenizer(rules, config);
  const encode: Encode = ([text], how) => {
    const { ids } = made.encode(text!, { add_special_tokens: how.add_special_tokens });
    return { input_ids: { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) } };
  };
  return Object.assign(encode, { eos_token: "<|end|>" });
}

const EXAMPLES = ["one", "two", "three", "four", "five", "six", "seven", "eight"].map((completion, i) => ({
  prompt: `${i} + 1`,
  completion,
}));

t.test("what is learned on both serves each", async (t) => {
  const pack = await packOf();
  const session = await open(NODE, { encoder: ENCODER, decoder: MERGED }, pack, { trainable: true });
  await answers(t, NODE, session, "with a head of a task's own");
  const trainer = await createTrainer(session, { encode: tokenizer(), seed: 3, init: "mean" });
  const losses: number[] = [];
  for await (const { loss } of trainer.fit(EXAMPLES, { steps: 30, batch: 8, holdout: 0 })) losses.push(loss);
  t.ok(losses.at(-1)! < 0.7 * losses[0]!, `${losses[0]} → ${losses.at(-1)}`);
  const file = await trainer.task();
  await session.addTask("mine", file);
  await session.switchTask("mine");
  const feeds = feedsOf(NODE, "answers");
  const { logits: joined } = await session.run(feeds);
  t.ok(difference(joined!.data as Float32Array, GOLDENS.answers.logits) > 0.1);
  await session.close();

  const both = await createEigenSessions(NODE, { encoder: ENCODER, decoder: MERGED }, pack);
  await both.switchTask("mine");
  const { input_ids, attention_mask, decoder_input_ids } = feeds;
  const { logits } = await both.call(async ({ encoder, decoder }) => {
    const { last_hidden_state } = await encoder.run({ input_ids, attention_mask });
    const given: Record<string, unknown> = {
      ...{
        input_ids: decoder_input_ids,
        encoder_attention_mask: attention_mask,
        encoder_hidden_states: last_hidden_state,
      },
      use_cache_branch: new NODE.Tensor("bool", Uint8Array.of(0), [1]),
    };
    for (const name of decoder.inputNames)
      if (/past/.test(name)) given[name] = new NODE.Tensor("float32", new Float32Array(0), [2, 4, 0, 8]);
    return decoder.run(given as never);
  });
  const off = difference(logits!.data as Float32Array, joined!.data as Float32Array);
  t.ok(off < 2e-5, `the two files answer as the joined model does: off by ${off}`);
  await both.close();
  await pack.close();
});

t.test("speech: what enters is no text", async (t) => {
  const adapters = await readAdapters([data("pipelines/whisper/adapters")]);
  const { chunks } = await buildPack(adapters, LOSSLESS);
  for (const adapter of adapters) await adapter.close();
  const pack = await openPack(concat(chunks));
  const of = (name: string): string => data(`pipelines/whisper/onnx/${name}.onnx`);
  const parts = { encoder: of("encoder_model"), decoder: of("decoder_model_merged") };
  const session = await open(NODE, parts, pack, { trainable: true });
  t.same(session.inputNames, ["input_features", "decoder_input_ids"]);
  const feeds = {
    input_features: new NODE.Tensor("float32", noise(1600, 3), [1, 8, 200]),
    decoder_input_ids: int64(NODE, [[2, 5, 7]]),
  } as unknown as BatchFeeds;
  // Before the first step a trainer compares gradients with the loss, in two directions.
  const trainer = await createTrainer(session, { seed: 1, init: "random" });
  const step = trainer.fit([{ feeds, classes: [5, 7, 9] }], { steps: 1 });
  t.ok((await step.next()).value!.norm > 0);
  await session.close();
  await pack.close();
});

/** A file, changed. */
function changed(path: string, change: (graph: GraphProto, proto: ModelProto) => void): Uint8Array {
  const proto = fromBinary(ModelProtoSchema, new Uint8Array(readFileSync(path)));
  change(proto.graph!, proto);
  return toBinary(ModelProtoSchema, proto);
}

/** Values and nodes under other names of modules. */
function moved(graph: GraphProto, to: (path: string) => string): void {
  const dotted = (name: string): boolean => name.includes(".") && !/[/:]/.test(name);
  renameValues(graph, (name) => (dotted(name) ? to(name) : name));
  for (const node of graph.node) {
    if (!node.name.startsWith("/")) continue;
    const cut = node.name.lastIndexOf("/");
    const path = to(node.name.slice(1, cut).replaceAll("/", "."));
    node.name = `${path === "" ? "" : `/${path.replaceAll(".", "/")}`}${node.name.slice(cut)}`;
  }
}

/** Writes the module of each node as the dynamo exporter does. */
function scoped(graph: GraphProto): void {
  for (const [i, node] of graph.node.entries()) {
    const path = node.name.slice(1, Math.max(1, node.name.lastIndexOf("/"))).replaceAll("/", ".");
    const $typeName = "onnx.StringStringEntryProto";
    node.metadataProps.push({ $typeName, key: "pkg.torch.onnx.name_scopes", value: `['', '${path}', 'op_${i}']` });
    node.name = `node_${i}`;
  }
}

t.test("modules are found however the two files call them", async (t) => {
  const bare = (name: string): string => name.replace(/^decoder\.?/, "");
  const pairs: Record<string, ModelParts> = {
    "both without a half in front": { encoder: ENCODER, decoder: changed(PLAIN, (graph) => moved(graph, bare)) },
    "both with it": {
      encoder: changed(ENCODER, (graph) => moved(graph, (name) => `encoder${name === "" ? "" : `.${name}`}`)),
      decoder: PLAIN,
    },
    "by the dynamo exporter": { encoder: changed(ENCODER, scoped), decoder: changed(PLAIN, scoped) },
    "the other the dynamo exporter's": { encoder: changed(ENCODER, scoped), decoder: PLAIN },
    "inside another module": {
      encoder: ENCODER,
      decoder: changed(PLAIN, (graph) => moved(graph, (name) => name.replace(/^decoder/, "model.decoder"))),
    },
    "inside another module by the names of its weights": {
      encoder: ENCODER,
      decoder: changed(PLAIN, ({ initializer, node }) => {
        const names = new Map(initializer.map(({ name }) => [name, name.replace(/^decoder\./, "model.decoder.")]));
        for (const tensor of initializer) tensor.name = names.get(tensor.name)!;
        for (const one of node) one.input = one.input.map((value) => names.get(value) ?? value);
      }),
    },
    "one name for a table that is one": {
      encoder: changed(ENCODER, (graph) =>
        moved(graph, (name) => name.replace(/^embed_tokens\.weight/, "shared.weight")),
      ),
      decoder: changed(PLAIN, (graph) => moved(graph, (name) => name.replace(/^decoder\.embed_tokens\.w/, "shared.w"))),
    },
  };
  for (const [how, parts] of Object.entries(pairs)) await plain(t, parts, how);
  const { model } = await readParts(pairs["one name for a table that is one"]!, {});
  t.equal(model.graph.proto.initializer.filter(({ name }) => /shared/.test(name)).length, 1);
  for (const how of ["inside another module", "inside another module by the names of its weights"]) {
    const names = findParameters((await readParts(pairs[how]!, {})).model).map(({ name }) => name);
    for (const half of ["encoder", "decoder"])
      t.ok(names.includes(`model.${half}.block.0.layer.0.SelfAttention.q.weight`), `${how}: ${half}`);
  }
});

/** A file whose large weights lie beside it, in one called "weights". */
function apart(path: string, folder: string, location: string): string {
  const { proto } = parseModel(new Uint8Array(readFileSync(path)), path);
  const pieces: Uint8Array[] = [];
  let at = 0;
  for (const tensor of proto.graph!.initializer) {
    const { rawData } = tensor;
    if (rawData.length < 1024) continue;
    point(tensor, location, at, rawData.length);
    pieces.push(rawData);
    at += rawData.length;
  }
  mkdirSync(folder, { recursive: true });
  const written = join(folder, path.replace(/^.*\//, ""));
  writeFileSync(written, toBinary(ModelProtoSchema, proto));
  writeFileSync(join(folder, location), concat(pieces));
  return written;
}

t.test("weights beside the files", async (t) => {
  const folder = t.testdir();
  const inTwo = {
    encoder: apart(ENCODER, join(folder, "one"), "weights"),
    decoder: apart(MERGED, join(folder, "two"), "weights"),
  };
  const inOne = {
    encoder: apart(ENCODER, join(folder, "both"), "encoder.data"),
    decoder: apart(MERGED, join(folder, "both"), "decoder.data"),
  };
  const external = (location: string): string => join(folder, "both", location);
  const given = { encoder: readFileSync(inOne.encoder), decoder: readFileSync(inOne.decoder) };
  for (const [how, parts, options] of [
    ["in two folders, by one name", inTwo, {}],
    ["in one folder", inOne, {}],
    ["given", given, { external }],
    ["one beside its file, one inside", { ...inTwo, decoder: MERGED }, {}],
  ] as const)
    await plain(t, parts, how, options);
  // Runtimes for Node read the weights of files this large themselves.
  const large = (path: string, name: string): string => {
    const ballast = ({ initializer }: GraphProto): void => {
      initializer.push(makeFloats("ballast", [], [2 ** 21 + 1]));
      initializer.at(-1)!.rawData = new Uint8Array(2 ** 23 + 4);
    };
    mkdirSync(join(folder, name), { recursive: true });
    const written = join(folder, name, path.replace(/^.*\//, ""));
    writeFileSync(written, changed(path, ballast));
    return written;
  };
  const together = { encoder: large(ENCODER, "large"), decoder: large(MERGED, "large") };
  await plain(t, together, "large, in one folder");
  t.match(await readWhole(together, { weightsApart: true }), { folder: join(folder, "large") });
  await plain(t, { ...together, encoder: large(ENCODER, "other") }, "large, in two folders");
  const lost = await refusal(async () => detachWeights(await readWhole(given), []));
  t.match(lost.message, /lies? in the file "(en|de)coder\.data"; give that with the option `external`/);
  const { folder: common } = await readWhole(inOne, { weightsApart: true });
  t.equal(common, join(folder, "both"), "a runtime may read them itself");
});

t.test("what is no pair is refused, with what to do", async (t) => {
  const refused = (parts: object): Promise<Error> => refusal(() => readWhole(parts as ModelParts));
  const swapped = await refused({ encoder: MERGED, decoder: ENCODER });
  t.match(swapped, {
    tag: "format",
    message: /decoder_model_merged\.onnx, graph: expected an encoder, with the output last/,
  });
  t.match(
    swapped.message,
    /the two are swapped; pass \{ encoder: "encoder_model\.onnx", decoder: "decoder_model_merged/,
  );
  t.match(
    (await refused({ encoder: ENCODER, decoder: ENCODER })).message,
    /encoder_model\.onnx, graph: expected a decoder/,
  );
  t.match(
    (await refused({ encoder: MERGED, decoder: PLAIN })).message,
    /expected an encoder, .*found inputs .*use_cache/,
  );
  t.match((await refused({ encoder: ENCODER })).message, /expected a path, URL, Blob.*got undefined/);
  t.match((await refused({ encoder: ENCODER, decoder: PLAIN, model: "" })).message, /unknown option "model"/);
  const pack = await packOf();
  const serving = await refusal(() => open(NODE, { encoder: ENCODER, decoder: MERGED }, pack));
  t.match(serving, { name: "TypeError", message: /with `trainable: true`; to answer, make a session on each/ });
  await pack.close();
  const other = await refused({ encoder: ENCODER, decoder: data("pipelines/marian/onnx/decoder_model_merged.onnx") });
  t.match(
    other.message,
    /marian.*, input encoder_hidden_states: expected 32 numbers for each token, as .*encoder_model\.onnx gives, found 16/,
  );
  const decoder = (change: Parameters<typeof changed>[1], path = MERGED) =>
    refused({ encoder: ENCODER, decoder: changed(path, change) });
  const flag = (name: string) => (graph: GraphProto) =>
    renameValues(graph, (value) => (value === "use_cache_branch" ? name : value));
  t.match(
    (await decoder(flag("deep"))).message,
    /expected a decoder that begins without caches, or has an If on use_cache_branch, found past_.*, and an If "optimum::if" on "deep"; pass decoder_model_merged\.onnx/,
  );
  const later = (graph: GraphProto): void => {
    const branches = graph.node[0]!.attribute;
    const [one, two] = [attribute(graph.node[0]!, "then_branch")!, attribute(graph.node[0]!, "else_branch")!];
    [one.name, two.name] = [two.name, one.name];
    branches.reverse();
  };
  t.match((await decoder(later)).message, /input past_key_values\.0.*expected a decoder that begins without caches/);
  const short = (graph: GraphProto): void => void attribute(graph.node[0]!, "else_branch")!.g!.output.pop();
  t.match((await decoder(short)).message, /node optimum::if: expected a branch with 9 outputs .*found 8: damaged/);
  const opset = (_: GraphProto, { opsetImport }: ModelProto): void => void (opsetImport[0]!.version = 16n);
  t.match(
    (await decoder(opset)).message,
    /opset: expected version 17 of the standard operators, as .*encoder_model\.onnx has, found 16; export both with the same opset_version/,
  );
  const half = (graph: GraphProto): void => {
    const { value } = graph.input.find(({ name }) => name === "encoder_hidden_states")!.type!;
    if (value.case === "tensorType") value.value.elemType = 10;
  };
  t.match(
    (await decoder(half)).message,
    /encoder_hidden_states: expected f32, as .*encoder_model\.onnx has, found f16/,
  );
});

t.test("on the command line", async (t) => {
  const folder = t.testdir({ "lines.jsonl": EXAMPLES.map((one) => JSON.stringify(one)).join("\n") });
  const at = (name: string): string => join(folder, name);
  const base = ["--base", data("seq2seq/base.safetensors")];
  const adapter = data("seq2seq/adapters/answers");
  await json(0, "pack", adapter, "-o", at("p.eigen"), "--k", "2", ...base);
  const model = ["--model", ENCODER, "--decoder", MERGED];
  const learned = ["learn", at("p.eigen"), at("lines.jsonl"), "-o", at("mine.eigentask")];
  const made = await json(0, ...learned, ...model, "--epochs", "1", "--init", "mean", "--holdout", "0");
  t.match(made, { examples: 8, steps: 1, trained: { terms: Number } });
  t.same((await json(0, "add", at("p.eigen"), at("mine.eigentask")))["added"], ["mine"]);
  const lines = ["--text", at("lines.jsonl")];
  const better = ["distill", at("p.eigen"), adapter, "-o", at("q.eigen"), "--steps", "2", ...lines];
  const { tasks } = await json(0, ...better, ...model);
  t.match(tasks, [{ id: "answers", divergence: { before: Number } }]);
  const chosen = ["pack", adapter, "-o", at("r.eigen"), "--ratio", "2", "--distill", "0", ...base, ...lines];
  t.match(await json(0, ...chosen, ...model), { answers: [{ id: "answers", agreement: Number }] });
  t.match(await json(1, ...learned, "--force", "--model", ENCODER), {
    error: { tag: "base", message: /encoder_model\.onnx is the encoder of .*both files as its model/ },
  });
  const alone = await run("pack", adapter, "-o", at("s.eigen"), "--decoder", MERGED);
  t.match(alone, { status: 2, stderr: /--decoder/ });
});

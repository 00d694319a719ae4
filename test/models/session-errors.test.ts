/**
 * Impossible sessions: wrong models, packs, options and providers are each refused with advice; and the probe finds a
 * provider that ignores its inputs.
 */
import { cpSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { openPack, type Pack, type TaskMetadata } from "eigenlora";
import { type Adapter, encodeTaskFile, projectAdapters } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { folderFor } from "../support/folder.ts";
import { changed as changedBytes } from "../support/graphs.ts";
import { encodeTensor } from "../support/internals/base.ts";
import { encodeTask } from "../support/internals/format.ts";
import {
  type GraphProto,
  inject,
  type ModelProto,
  makeFloats,
  makeInts,
  makeNode,
  makeValue,
  planSession,
  readModel,
  toBinary,
} from "../support/internals/models.ts";
import { data, LOSSLESS, packed, packOf } from "../support/packs.ts";
import {
  difference,
  feeds,
  golden,
  ignoring,
  MODES,
  model,
  modelBytes,
  NODE,
  type Options,
  ORTS,
  open,
  outputOf,
  packBytes,
  packFor,
  refusal,
  WEB,
} from "../support/sessions.ts";

const QUERY = "bert.encoder.layer.0.attention.self.query";
const VALUE = "bert.encoder.layer.0.attention.self.value";

/** One of the tiny models, changed. */
const changed = (name: string, change: (graph: GraphProto, model: ModelProto) => void): Uint8Array =>
  changedBytes(modelBytes(name), change);

async function refused(
  t: Test,
  input: string | Uint8Array,
  pack: Pack,
  options: Options,
  expected: object,
  what: string,
): Promise<void> {
  const error = await refusal(() => open(NODE, input, pack, options));
  t.match(error, expected, `${what}: ${error.message}`);
}

/** Checks that a session works, and answers one task right. */
async function works(
  t: Test,
  input: string | Uint8Array,
  pack: Pack,
  options: Options,
  answers = "base",
  task = "two",
): Promise<void> {
  const session = await open(NODE, input, pack, options);
  await session.switchTask(task);
  const off = difference(await outputOf(session, feeds(NODE, session)), golden(answers, task));
  t.ok(off <= 1e-5, `${session.mode}: off by ${off}`);
  await session.close();
}

t.test("models", async (t) => {
  const pack = await packFor("base");
  const other = { tag: "base", module: QUERY, message: /is not in the base; candidates: .*`names`/ };
  await refused(t, model("gemm"), pack, {}, other, "another kind of model");
  const old = changed("torchscript", (_, { opsetImport }) => (opsetImport[0]!.version = 10n));
  for (const mode of MODES) {
    await refused(
      t,
      old,
      pack,
      { mode },
      { tag: "format", part: "opset", message: /opset 10: at least 11/ },
      "old operators",
    );
  }
});

t.test("a model with task inputs already", async (t) => {
  const pack = await packFor("base");
  const file = await readModel(model("torchscript"));
  const plan = await planSession(file, pack, (await pack.bases()).bytes, { mode: "core" });
  inject(file.model, plan.changes);
  const bytes = toBinary("ModelProto", file.model.proto);
  for (const mode of MODES) {
    await refused(
      t,
      bytes,
      pack,
      { mode },
      { tag: "format", message: /task inputs already; pass the model as it was/ },
      mode,
    );
  }
});

t.test("packs of another base", async (t) => {
  const tied = await openPack(await packBytes(["adapters/two"], "base-tied"));
  // Compared with the model that the adapters were trained on, whatever a quantiser made of it.
  for (const name of ["torchscript", "dynamo", "f16", "half", "q4", "int8", "qdq"]) {
    const least = ["q4", "int8", "qdq"].includes(name) ? "0.95" : "0.999";
    const message = new RegExp(`fingerprints correlate by -?0\\.\\d+, at least ${least} is expected.*anyBase`);
    await refused(t, model(name), tied, {}, { tag: "base", module: QUERY, expected: Number(least), message }, name);
    const session = await open(NODE, model(name), tied, { anyBase: true });
    t.equal(session.probe.result, "passed");
    await session.close();
  }
  await refused(
    t,
    model("tied"),
    await packFor("base"),
    {},
    { tag: "base", message: /fingerprints correlate/ },
    "tied",
  );
  const mute = await openPack(await packBytes(["adapters/two"]));
  await works(t, model("torchscript"), mute, {});
});

t.test("names by hand", async (t) => {
  const pack = await packFor("base");
  // Exporters may keep no names: neither of the node nor of the bias behind it.
  const nameless = changed("torchscript", (graph) => {
    for (const node of graph.node) {
      if (node.name.includes("layer.0/attention/self/query")) node.name = `node_${graph.node.indexOf(node)}`;
      node.input = node.input.map((value) => (value === `${QUERY}.bias` ? "bias_7" : value));
    }
    for (const tensor of graph.initializer) if (tensor.name === `${QUERY}.bias`) tensor.name = "bias_7";
  });
  const lost = { tag: "base", module: QUERY, candidates: /./, message: /map them with the option `names`/ };
  await refused(t, nameless, pack, {}, lost, "lost");
  const weight = "onnx::MatMul_376";
  for (const mode of MODES) {
    await works(t, nameless, pack, { mode, names: new Map([[QUERY, weight]]) });
    await works(t, model("torchscript"), pack, { mode, names: new Map([[QUERY, `${QUERY}.weight`]]) });
    await works(t, model("torchscript"), pack, { mode, names: new Map([[QUERY, weight]]) });
  }
  const by = (name: string): Options => ({ names: new Map([[QUERY, name]]) });
  await refused(t, nameless, pack, by("bert.pooler"), { tag: "base", module: QUERY }, "a name that is none");
  const wrong = by("bert.encoder.layer.0.intermediate.dense.weight");
  const misfit = { tag: "base", expected: [32, 32], found: [48, 32], message: /of another model/ };
  await refused(t, nameless, pack, wrong, misfit, "another shape");
  const unlike = { tag: "base", message: /fingerprints/ };
  await refused(t, nameless, pack, by("bert.pooler.dense.weight"), unlike, "another weight");
  const twice = by(`${VALUE}.weight`);
  const both = { tag: "base", message: /both match the weight.*`names`/, candidates: [`${VALUE}.weight`] };
  await refused(t, nameless, pack, twice, both, "two on one");
});

t.test("what tasks bring and the model lacks", async (t) => {
  const pack = await packFor("encoder");
  for (const mode of MODES) {
    const message = /"classifier\.weight" \(saved\), which is not in the model.*ignore: \["classifier"\]/;
    await refused(t, model("encoder"), pack, { mode }, { tag: "base", module: "classifier.weight", message }, mode);
    await works(t, model("encoder"), pack, { mode, ignore: ["classifier"] }, "encoder");
    await works(t, model("encoder"), pack, { mode, ignore: ["classifier.weight", "classifier.bias"] }, "encoder");
  }
  // Not only saved modules: the pooler's bias, which the encoder does not have either.
  const biased = await openPack(await packBytes(["adapters-more/bias"], "base"));
  for (const mode of MODES) {
    const message =
      /"bert\.pooler\.dense\.bias" \(bias\), which is not in the model.*ignore: \["bert\.pooler\.dense"\]/;
    const expected = { tag: "base", module: "bert.pooler.dense.bias", message };
    await refused(t, model("encoder"), biased, { mode, ignore: ["classifier"] }, expected, mode);
    await works(t, model("encoder"), biased, { mode, ignore: ["classifier", "bert.pooler.dense"] }, "encoder", "bias");
  }
});

t.test("a model that WebAssembly has no room for is refused before its weights are read", async (t) => {
  const large = changed("external", (graph) => {
    const { externalData } = graph.initializer.findLast((tensor) => tensor.externalData.length > 0)!;
    externalData.find(({ key }) => key === "offset")!.value = "5000000000";
  });
  const external = (): never => t.fail("its weights were read") as never;
  const said = { tag: "backend", message: /weights take 5\.0 GB, and WebAssembly has room for 4\.3 GB.*fewer bits/ };
  const pack = await packFor("base");
  await t.rejects(createEigenSession(WEB, large, pack, { external }), said);
  await pack.close();
});

t.test("external data", async (t) => {
  const folder = folderFor(t);
  const alone = join(folder, "external.onnx");
  cpSync(model("external"), alone);
  const bytes = modelBytes("external");
  const pack = await packFor("base");
  for (const mode of MODES) {
    const missing = { tag: "source", message: /external\.onnx\.data/ };
    await refused(t, alone, pack, { mode }, missing, "the file is not beside the model");
    const told = { tag: "source", message: /"external\.onnx\.data"; give that with the option `external`/ };
    await refused(t, bytes, pack, { mode }, told, "bytes alone");
    const stored = new Uint8Array(readFileSync(`${model("external")}.data`));
    await works(t, bytes, pack, { mode, external: () => stored });
    const external = (): Uint8Array => stored.subarray(0, 9000);
    await refused(t, bytes, pack, { mode, external }, { tag: "source" }, "a file that is too short");
  }
});

t.test("tasks that were added later", async (t) => {
  const [two] = (await readAdapters([data("sessions/adapters/two")])) as [Adapter];
  const { bytes } = await packOf(["sessions/adapters/three", "sessions/adapters/five"], LOSSLESS);
  /** The task "two" with its whole change as private factors, and its head. */
  const privately = async (pack: Pack, metadata: TaskMetadata = {}): Promise<Uint8Array> => {
    const terms = [];
    for (const [module, { name }] of pack.modules.entries()) {
      const { A, Bt } = await two.modules.get(name)!.read();
      const { rank: q, in: inputs, out } = two.modules.get(name)!;
      const [a, bt] = [encodeTensor("f32", A, q, inputs), encodeTensor("f32", Bt, q, out)];
      terms.push({ module, rank: 0, privateTerms: { rank: q, dtype: "f32" as const, A: a, Bt: bt } });
    }
    const parameters = [];
    for (const { name, role, shape, read } of two.saved) {
      const [rows, width] = shape.length === 1 ? [1, shape[0]!] : [shape[0]!, shape[1]!];
      const encoded = encodeTensor("f32", await read(), rows, width);
      parameters.push({ name, role, shape, dtype: "f32" as const, encoded });
    }
    const entry = { id: "two", adapterBytes: 0, metadata };
    return encodeTaskFile(entry, pack.basisId, encodeTask(terms, parameters));
  };
  for (const mode of MODES) {
    for (const privateTerms of [false, true]) {
      const pack = await openPack(bytes);
      const session = await open(NODE, model("torchscript"), pack, { mode, reserve: { privateTerms } });
      await session.switchTask("five");
      await session.addTask("two", await privately(pack));
      const run = feeds(NODE, session);
      if (mode === "core" && !privateTerms) {
        const message = /private.*make a new one with reserve: \{ privateTerms: true \}/;
        await t.rejects(session.switchTask("two"), { tag: "base", message });
        await t.rejects(session.run(run, { tasks: ["two", null, "five"] }), { tag: "base", message: /privateTerms/ });
        t.ok(difference(await outputOf(session, run), golden("base", "five")) <= 1e-5);
      } else {
        await session.addTask("mislabelled", await privately(pack, { labels: ["a", "b", "c"] }));
        const message = /it has 3 labels, but "\S+" has 2 rows; pack its adapter again/;
        await t.rejects(session.switchTask("mislabelled"), { tag: "task", task: "mislabelled", message });
        t.equal(session.task, "five", "before anything is switched");
        t.ok(difference(await outputOf(session, run), golden("base", "five")) <= 1e-5);
        await session.switchTask("two");
        const off = difference(await outputOf(session, run), golden("base", "two"));
        t.ok(off <= 1e-5, `${mode}, privateTerms ${privateTerms}: off by ${off}`);
      }
      await session.close();
      // Known already when the session is made.
      const again = await open(NODE, model("torchscript"), pack, { mode });
      await again.switchTask("two");
      t.ok(difference(await outputOf(again, run), golden("base", "two")) <= 1e-5, mode);
      await again.close();
    }
  }
  const brought = { dora: /magnitude/, "bias-lora": /\.bias" \(bias\)/, tokens: /word_embeddings\.weight" \(rows\)/ };
  for (const [id, message] of Object.entries(brought)) {
    const pack = await openPack(bytes);
    const [adapter] = await readAdapters([data(`sessions/adapters-more/${id}`)]);
    const [{ entry, blob }] = await projectAdapters(pack, [adapter!], LOSSLESS.dtype, { maxLoss: 1 });
    const session = await open(NODE, model("torchscript"), pack, { mode: "core" });
    await session.addTask(id, encodeTaskFile(entry, pack.basisId, blob));
    const error = await refusal(() => session.switchTask(id));
    t.match(error, { tag: "base", message }, `${id}: ${error.message}`);
    t.equal(session.task, null);
    await session.close();
    await adapter!.close();
  }
  await two.close();
});

for (const { name, ort } of ORTS) {
  t.test(`${name}: a provider that ignores inputs is found`, async (t) => {
    const pack = await packFor("base");
    const core = ignoring(ort, (input) => /\.cores?\b/.test(input));
    const all = ignoring(ort, (input) => input.startsWith("eigenlora."));
    const half = ignoring(ort, (input) => input.endsWith(".B"));
    const cases = [
      ["core", core],
      ["core", all],
      ["factors", all],
      ["factors", half],
    ] as const;
    for (const [mode, fake] of cases) {
      const session = { executionProviders: ["cpu"] };
      const error = await refusal(() => open(fake, model("torchscript"), pack, { mode, session }));
      const message = /the provider \["cpu"\].*term of "bert\.encoder\.layer\.0.*Use another provider/;
      t.match(error, { tag: "backend", backend: '["cpu"]', message }, `${mode}: ${error.message}`);
      const unseen = await open(fake, model("torchscript"), pack, { mode, probe: false });
      t.equal(unseen.probe.result, "skipped: asked not to");
      await unseen.close();
      const own = feeds(ort, unseen);
      t.match(await refusal(() => open(fake, model("torchscript"), pack, { mode, probe: own })), { tag: "backend" });
      const honest = await open(ort, model("torchscript"), pack, { mode, probe: own });
      t.match(honest.probe, { result: "passed", module: QUERY });
      t.ok(honest.probe.difference! < 1e-5, `${honest.probe.difference}`);
      await honest.close();
    }
  });
}

t.test("without an adapted layer in the main graph, the model's output tells", async (t) => {
  const adapters = await readAdapters([data("sessions/adapters-mlp/a")]);
  const some = adapters.map((one) => ({ ...one, saved: [], modules: new Map([["mid", one.modules.get("mid")!]]) }));
  const pack = await packed(some);
  for (const adapter of adapters) await adapter.close();
  const session = await open(NODE, model("branches"), pack);
  t.same(session.probe, { result: "passed" });
  await session.close();
  const fake = ignoring(NODE, (input) => input.startsWith("eigenlora."));
  const error = await refusal(() => open(fake, model("branches"), pack));
  t.match(error, { tag: "backend", message: /the same "logits" with and without a task/ });
});

for (const { name, ort } of ORTS) {
  t.test(`${name}: where the probe cannot tell, it says so, and the session works`, async (t) => {
    const pack = await packFor("mlp");
    // Takes exactly three rows.
    const three = changed("gemm", (graph) => {
      graph.initializer.push(makeInts("three", [3, 12]));
      for (const node of graph.node) node.input = node.input.map((value) => (value === "x" ? "x3" : value));
      graph.node.unshift(makeNode("Reshape", "three", ["x", "three"], "x3"));
    });
    // An input of a kind for which there is no likely value.
    const double = changed("gemm", (graph) => void graph.input.push(makeValue("temperature", 11, [])));
    // The input of the first layer is no number: 0 · ∞.
    const nothing = changed("gemm", (graph) => {
      graph.initializer.push(makeFloats("zero", [0], []));
      const nodes = [makeNode("Div", "nan", ["zero", "zero"], "nan"), makeNode("Add", "x+nan", ["x", "nan"], "x+nan")];
      for (const node of graph.node) node.input = node.input.map((value) => (value === "x" ? "x+nan" : value));
      graph.node.unshift(...nodes);
    });
    const own = (names: readonly string[]) => ({
      ...feeds(ort, { inputNames: ["x"] }),
      ...(names.includes("temperature") && { temperature: new ort.Tensor("float64", Float64Array.of(1), []) }),
    });
    const silent = [
      [three, /^skipped: the model does not run on the inputs of the probe.*`probe: feeds`$/s],
      [double, /^skipped: .*no synthetic values/],
    ] as const;
    for (const [bytes, result] of silent) {
      for (const mode of ["core", "factors"] as const) {
        const session = await open(ort, bytes, pack, { mode });
        t.match(session.probe.result, result);
        await session.switchTask("b");
        const run = own(session.inputNames);
        t.ok(difference(await outputOf(session, run), golden("mlp", "b")) <= 1e-5);
        await session.close();
        const told = await open(ort, bytes, pack, { mode, probe: run });
        t.match(told.probe, { result: "passed", module: "mid" });
        await told.close();
      }
    }
    const session = await open(ort, nothing, pack);
    t.match(session.probe.result, /^skipped: /);
    await session.close();
  });
}

/**
 * `eigenlora check`: its verdict on a model and a pack agrees with a session's behaviour, for models that fit, in some modes or in none;
 * and its advice for those that do not.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSessions } from "eigenlora/onnxruntime";
import type { SessionOptions } from "eigenlora/session";
import t from "tap";
import {
  create,
  fromBinary,
  ModelProtoSchema,
  readModel,
  runProgram,
  type Survey,
  surveyModel,
  TensorProtoSchema,
  toBinary,
} from "./internals.ts";
import { concat, data, LOSSLESS } from "./packs.ts";
import { MODES, NODE, open, refusal } from "./sessions.ts";

const folder = mkdtempSync(join(tmpdir(), "eigenlora-check-"));
t.teardown(() => rmSync(folder, { recursive: true, maxRetries: 5, retryDelay: 200 }));

/** A pack of adapters under test/data; its path. */
async function pack(name: string, adapters: readonly string[], base?: string): Promise<string> {
  const read = await readAdapters(adapters.map((path) => data(path)));
  const host = base === undefined ? undefined : data(base);
  const { chunks } = await buildPack(read, { ...LOSSLESS, base: host, anyBase: true });
  for (const adapter of read) await adapter.close();
  writeFileSync(join(folder, name), concat(chunks));
  return join(folder, name);
}

const bert = await pack("bert.eigen", ["sessions/adapters"], "sessions/base.safetensors");
const fresh = await pack(
  "fresh.eigen",
  ["exports/adapters/head", "exports/adapters/biases"],
  "exports/base.safetensors",
);
const whole = ["exports/adapters/same-head", "exports/adapters/adapted-head"];
const both = await pack("both.eigen", whole, "exports/base.safetensors");
const conv = await pack("conv.eigen", ["forms/adapters-vision-whole"], "forms/vision.safetensors");
const vision = await pack("vision.eigen", ["forms/adapters-vision"], "forms/vision.safetensors");
const dora = await pack("dora.eigen", ["sessions/adapters-more/dora"], "sessions/base.safetensors");
const minilm = await pack("minilm.eigen", ["adapters/own-seed/debtags-role", "adapters/own-seed/debtags-use"]);

interface Case {
  readonly model: string;
  readonly pack: string;
  readonly options?: Omit<SessionOptions, "probe">;
  /** Modes that must work. */
  readonly modes: readonly string[];
  readonly mode: string | null;
  /** Pattern of the advice in the last line. */
  readonly next: RegExp;
}

const CASES: Readonly<Record<string, Case>> = {
  MiniLM: { model: "minilm/model_fp16.onnx", pack: minilm, modes: MODES, mode: "core", next: /createEigenSession/ },
  "torch's default export": {
    ...{ model: "exports/classifier.onnx", pack: fresh, modes: MODES, mode: "core" },
    next: /createEigenSession/,
  },
  quantised: { model: "sessions/q4.onnx", pack: bert, modes: ["core", "factors"], mode: "core", next: /createEigen/ },
  "folded only": {
    ...{ model: "forms/vision.onnx", pack: conv, modes: ["folded"], mode: "folded" },
    next: /createEigenSession/,
  },
  "convolutions and norms": {
    ...{ model: "forms/vision-int8.onnx", pack: vision, modes: ["core", "factors"], mode: "core" },
    next: /createEigenSession/,
  },
  "quantised, and DoRA": {
    ...{ model: "sessions/q4.onnx", pack: dora, modes: [], mode: null },
    next: /pass a float export/,
  },
  "another architecture": {
    ...{ model: "sessions/gemm.onnx", pack: bert, modes: [], mode: null },
    next: /the architecture that the adapters were trained on/,
  },
  "another model": {
    ...{ model: "sessions/tied.onnx", pack: bert, modes: [], mode: null },
    next: /export the base that the adapters were trained on.*--any-base/,
  },
  "no head": { model: "sessions/encoder.onnx", pack: bert, modes: [], mode: null, next: /--ignore classifier/ },
  "no head, left out": {
    ...{ model: "sessions/encoder.onnx", pack: bert, options: { ignore: ["classifier"] }, modes: MODES, mode: "core" },
    next: /\{ ignore: \["classifier"\] \}/,
  },
  fused: {
    ...{ model: "sessions/fused.onnx", pack: bert, modes: MODES, mode: "core" },
    next: /createEigenSession/,
  },
  "fused, and quantised after that": {
    ...{ model: "QAttention", pack: bert, modes: [], mode: null },
    next: /without onnxruntime's transformer optimiser/,
  },
  "a wrong name by hand": {
    ...{ model: "sessions/torchscript.onnx", pack: bert, modes: [], mode: null },
    options: { names: new Map([["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.query.weight"]]) },
    next: /--names bert\.encoder\.layer\.0\.attention\.self\.query=/,
  },
};

/** A model of the test data; or one whose attentions are another operator. */
function pathOf(model: string): string {
  if (model.endsWith(".onnx")) return data(model);
  const path = join(folder, `${model}.onnx`);
  const proto = fromBinary(ModelProtoSchema, new Uint8Array(readFileSync(data("sessions/fused.onnx"))));
  for (const node of proto.graph!.node) if (node.opType === "Attention") node.opType = model;
  writeFileSync(path, toBinary(ModelProtoSchema, proto));
  return path;
}

async function surveyOf({ model, pack, options = {} }: Case): Promise<Survey> {
  const opened = await openPack(pack);
  const survey = await surveyModel(() => readModel(pathOf(model)), opened, options);
  await opened.close();
  return survey;
}

t.test("check and createEigenSession agree", async (t) => {
  for (const [what, one] of Object.entries(CASES)) {
    const survey = await surveyOf(one);
    t.same([survey.mode, MODES.filter((mode) => survey.modes[mode].works)], [one.mode, one.modes], what);
    for (const mode of ["auto", ...MODES] as const) {
      const opened = await openPack(one.pack);
      const create = () => open(NODE, pathOf(one.model), opened, { ...one.options, mode });
      const found = mode === "auto" ? { works: survey.mode !== null, why: survey.reason } : survey.modes[mode];
      if (!found.works) {
        t.equal((await refusal(create)).message, found.why, `${what}, ${mode}: refused in the same words`);
        await opened.close();
        continue;
      }
      const session = await create();
      if (mode === "auto") t.same([session.mode, session.reason], [survey.mode, survey.reason], what);
      else {
        const cost = survey.modes[mode];
        const [largest] = [...opened.tasks.values()].sort((a, b) => b.bytes - a.bytes);
        const { bytesFed } = await session.switchTask(largest!.id);
        t.equal(bytesFed, cost.fedBytes + cost.writtenBytes, `${what}, ${mode}: bytes of a switch`);
        t.equal(opened.residentBytes.coefficients >= survey.largestTask, true, "coefficients of the largest task");
        if (mode === "core") t.equal(session.memory().basis, cost.componentBytes, `${what}: bytes of components`);
      }
      const unconfirmed = survey.modules.filter(({ confirmed }) => confirmed !== true).map(({ module }) => module);
      t.same(session.unconfirmed, unconfirmed, `${what}, ${mode}: the same are confirmed`);
      await session.close();
      await opened.close();
    }
  }
});

t.test("every module is told, though some are missing", async (t) => {
  const survey = await surveyOf(CASES["fused, and quantised after that"]!);
  t.same(
    survey.modules.map(({ weight, why }) => [weight, /fused already/.test(why ?? "")]),
    survey.modules.map(() => [null, true]),
  );
  t.equal(survey.fused, "QAttention");
  const { modules, parameters } = await surveyOf(CASES["torch's default export"]!);
  t.match(modules[0], { initializer: "val_83", nodes: ["node_MatMul_82"], type: "f32", confirmed: true, why: null });
  t.same(
    parameters.filter(({ dropped }) => dropped).map(({ name, becomes }) => [name, becomes]),
    [
      ["bert.pooler.dense.bias", "input"],
      ["classifier.bias", "input"],
    ],
  );
});

/** Runs a command line in this process. */
async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  let [out, err] = ["", ""];
  const code = await runProgram(args, { write: (text) => (out += text) }, { write: (text) => (err += text) });
  return { code, out, err };
}

t.test("the command: exit code, verdict, next step", async (t) => {
  for (const [what, { model, pack, options = {}, mode, next }] of Object.entries(CASES)) {
    const flags = [
      ...[...(options.names ?? [])].flatMap(([module, weight]) => ["--names", `${module}=${weight}`]),
      ...(options.ignore ?? []).flatMap((name) => ["--ignore", name]),
    ];
    const { code, out, err } = await run("check", pathOf(model), pack, "--files-only", ...flags);
    t.same([code, err], [mode === null ? 1 : 0, ""], what);
    const [verdict, advice] = out.trimEnd().split("\n").slice(-2);
    t.match(verdict, mode === null ? /^It does not work: / : `It works, in mode "${mode}" (`, what);
    t.match(advice, next, what);
    t.notMatch(out, /option `names`|anyBase: true,|pass ignore: |undefined|NaN/, `${what}: in flags`);
  }
});

t.test("with onnxruntime-node it makes a session and runs it", async (t) => {
  const { code, out } = await run("check", data("exports/classifier.onnx"), fresh);
  t.equal(code, 0);
  t.match(out, /parity probe passed/);
  t.match(out, /one task per row: yes/);
  t.match(out, /learning: yes/);
  const asked = async (model: string, pack: string) =>
    JSON.parse((await run("check", pathOf(model), pack, "--json")).out) as Survey & Record<string, any>;
  const json = await asked("exports/classifier.onnx", both);
  t.match(json, {
    works: true,
    mode: "core",
    run: { session: { works: true }, probe: "passed", rows: { works: true } },
  });
  t.match(json["run"].learning, { works: false, says: /whole and others adapt it.*--ignore classifier/ });
  t.match(json.learning, { works: false });
  t.match((await asked("sessions/q4.onnx", bert))["run"].learning, { works: true });
  t.match((await asked("sessions/int8.onnx", bert))["run"].learning, { works: false, says: /pass a float export/ });
  t.match((await asked("forms/vision.onnx", conv))["run"].rows, { works: false, says: /one task at a time/ });
  const convolutions = await asked("forms/vision.onnx", vision);
  t.match(convolutions["run"], { rows: { works: true }, learning: { works: false, says: /"odd" is a convolution/ } });
  t.match(convolutions.learning, { works: false, why: /"odd" is no linear layer/ });
  t.match(await asked("sessions/gemm.onnx", bert), { works: false, mode: null, run: null });
});

t.test("an encoder and a decoder in files of their own", async (t) => {
  const names = ["seq2seq/adapters/answers", "seq2seq/adapters/titles"];
  const seq2seq = await pack("seq2seq.eigen", names, "seq2seq/base.safetensors");
  const [encoder, decoder] = [data("seq2seq/onnx/encoder_model.onnx"), data("seq2seq/onnx/decoder_model_merged.onnx")];
  const { code, out } = await run("check", encoder, seq2seq, "--beside", decoder, "--json");
  t.equal(code, 0);
  const says = JSON.parse(out) as Record<string, any>;
  t.match(says, { works: true, models: { encoder_model: encoder, decoder_model_merged: decoder } });
  t.match(says["next"], /^createEigenSessions\(ort, \{"encoder_model":/);
  t.same(says["run"].probes, { encoder_model: "passed", decoder_model_merged: "passed" });
  t.match(says["run"].learning, { works: false, says: /gradients do not pass from file to file/ });
  const opened = await openPack(seq2seq);
  const sessions = await createEigenSessions(NODE, { encoder, decoder }, opened);
  for (const [file, session] of [
    ["encoder_model", sessions.sessions.encoder],
    ["decoder_model_merged", sessions.sessions.decoder],
  ] as const) {
    const { mode, modules } = says["files"][file] as Survey;
    t.equal(mode, session.mode, `${file}: the mode of the session`);
    const here = new Set(modules.map(({ module }) => module));
    const elsewhere = opened.modules.filter(({ name }) => !here.has(name));
    t.same(
      session.leftOut,
      elsewhere.map(({ name }) => name),
      `${file}: its modules`,
    );
  }
  await sessions.close();
  await opened.close();

  const one = await run("check", encoder, seq2seq, "--files-only");
  t.match(one, { code: 1, out: /Next: give the decoder of the model, too: --beside decoder_model_merged\.onnx/ });
  const other = await run("check", decoder, seq2seq, "--files-only");
  t.match(other, { code: 1, out: /Next: give the encoder of the model, too: --beside encoder_model\.onnx/ });
  const stranger = await run("check", decoder, seq2seq, "--beside", data("sessions/encoder.onnx"));
  t.match(stranger, {
    code: 1,
    out: /encoder\..*lives in none of the files.*\nNext: give the file that has it with --beside/,
  });
  t.notMatch(stranger.out, /option `modules`/);
  const idle = await run("check", encoder, seq2seq, "--beside", decoder, "--beside", data("sessions/encoder.onnx"));
  t.match(idle, { code: 1, out: /Next: leave encoder out: the pack changes nothing there/ });
  t.match(await run("check", encoder, seq2seq, "--beside", encoder), { code: 2, err: /this file is given twice/ });
  const bare = await pack("bare.eigen", names);
  const unsure = await run("check", encoder, bare, "--beside", decoder);
  t.match(unsure, { code: 1, out: /by the end of its name only.*make the pack with its base/ });
});

t.test("a model of which half was exported in f16: onnxruntime refuses it, and check says what to do", async (t) => {
  const { model } = await readModel(data("sessions/torchscript.onnx"));
  const { node, initializer } = model.proto.graph!;
  const norms = node.filter(({ opType }) => opType === "LayerNormalization").flatMap(({ input }) => input.slice(1));
  for (const [i, { name, dims }] of initializer.entries())
    if (norms.includes(name))
      // Scale and shift in f16, zero.
      initializer[i] = create(TensorProtoSchema, {
        name,
        dims,
        dataType: 10,
        rawData: new Uint8Array(2 * Number(dims[0])),
      });
  const mixed = join(folder, "mixed.onnx");
  writeFileSync(mixed, toBinary(ModelProtoSchema, model.proto));
  const { code, out } = await run("check", mixed, bert);
  t.equal(code, 1);
  t.match(out, /It does not work: onnxruntime cannot load the model .*bound to different types/);
  t.match(out, /Next: export the model in float32: .*dtype=torch\.float32/);
});

t.test("tasks of another model are named, and no quantiser is blamed", async (t) => {
  const two = await pack("two.eigen", ["adapters/own-seed/debtags-role", "sessions/adapters-mlp/a"]);
  const { code, out } = await run("check", data("minilm/model_fp16.onnx"), two, "--files-only");
  t.equal(code, 1);
  t.match(out, /Next: pack the tasks of one model only: none of the modules of task "a" is in this model/);
  t.notMatch(out, /quantisers/);
  const small = await run("check", data("sessions/torchscript.onnx"), minilm, "--files-only");
  t.match(small.out, /Next: use the model that the adapters were trained on: in this one a layer has another shape/);
});

t.test("a pack without components has no core", async (t) => {
  const adapters = await readAdapters([data("adapters/own-seed/debtags-role")]);
  const built = await buildPack(adapters, { select: { kind: "k", k: 0 }, rank: 2 });
  for (const adapter of adapters) await adapter.close();
  const alone = join(folder, "alone.eigen");
  writeFileSync(alone, concat(built.chunks));
  const { out } = await run("check", data("minilm/model_fp16.onnx"), alone, "--files-only", "--ignore", "classifier");
  t.match(out, /^core +not here$/m);
  t.match(out, /core: mode "core": tasks share no components.*; use mode "factors"/);
  t.match(out, /It works, in mode "factors" \(tasks share no components/);
  const attached = [
    "attach",
    data("minilm/model_fp16.onnx"),
    alone,
    "-o",
    join(folder, "a.onnx"),
    "--ignore",
    "classifier",
  ];
  t.match(await run(...attached, "--mode", "core"), { code: 1, err: /tasks share no components.*use mode "factors"/ });
});

t.test("what cannot be checked is an error", async (t) => {
  const { code, err } = await run("check", join(folder, "bert.eigen"), bert);
  t.equal(code, 1);
  t.match(err, /this is an EigenLoRA pack, expected an ONNX model/);
  t.match(await run("check", data("sessions/gemm.onnx"), join(folder, "missing.eigen")), {
    code: 1,
    err: /missing\.eigen/,
  });
  const typing = await run("check", data("sessions/gemm.onnx"), bert, "--names", "bert.encodr=x");
  t.match(typing, { code: 2, err: /--names bert\.encodr=…: .* adapts no such module/ });
});

t.test("the other commands have the options that their messages name", async (t) => {
  const mlp = data("sessions/base-mlp.safetensors");
  const adapters = data("sessions/adapters");
  const target = join(folder, "out.eigen");
  const packed = await run("pack", adapters, "-o", target, "--base", mlp);
  t.match(packed, { code: 1, err: /candidates: none \(another model\?\).*map them with --names MODULE=WEIGHT/ });
  const other = await run("fold", bert, "-o", join(folder, "o.safetensors"), "--task", "two", "--base", mlp);
  t.match(other, { code: 1, err: /candidates: none \(another model\?\).*--names MODULE=WEIGHT/ });
  const base = data("sessions/base-tied.safetensors");
  const tied = ["fold", bert, "-o", join(folder, "o.safetensors"), "--task", "two", "--base", base];
  t.match(await run(...tied), { code: 1, err: /fingerprints correlate.*pass --any-base/ });
  t.match(await run(...tied, "--any-base"), { code: 0 });

  // A base with a name of its own, as a stranger's checkpoint has it.
  const QUERY = "bert.encoder.layer.0.attention.self.query";
  const file = readFileSync(data("sessions/base.safetensors"));
  const header = 8 + Number(file.readBigUInt64LE(0));
  const renamed = file
    .toString("utf8", 8, header)
    .replace(`"${QUERY}.weight"`, '"stranger"')
    .padEnd(header - 8);
  const stranger = join(folder, "stranger.safetensors");
  writeFileSync(stranger, Buffer.concat([file.subarray(0, 8), Buffer.from(renamed), file.subarray(header)]));
  const onIt = ["pack", adapters, "-o", target, "--base", stranger];
  t.match(await run(...onIt), { code: 1, err: /query" is not in the base.*--names MODULE=WEIGHT/ });
  t.match(await run(...onIt, "--names", `${QUERY}=nowhere`), { code: 1, err: /the base has no "nowhere"/ });
  t.match(await run(...onIt, "--names", `${QUERY}=stranger`), { code: 0 });
  const opened = await openPack(target);
  t.ok(opened.modules.every(({ fingerprint }) => fingerprint !== undefined));
  await opened.close();
  const onto = ["fold", target, "-o", join(folder, "p.safetensors"), "--task", "two", "--base", stranger];
  t.match(await run(...onto, "--names", `${QUERY}=stranger`), { code: 0 });
  const survey = await surveyOf({ ...CASES["quantised"]!, model: "sessions/torchscript.onnx", pack: target });
  t.ok(
    survey.modules.every(({ confirmed }) => confirmed === true),
    "and the fingerprints are the model's",
  );
  const unknown = await run("pack", adapters, "-o", target, "--force", "--base", mlp, "--names", "bert.nothing=x");
  t.match(unknown, { code: 2, err: /--names bert\.nothing=…: .* adapts no such module/ });

  const lines = join(folder, "lines.tsv");
  writeFileSync(lines, "one\ta\ntwo\tb\n");
  writeFileSync(join(folder, "tokenizer.json"), readFileSync(data("minilm/tokenizer.json")));
  const learn = ["learn", bert, lines, "--model", data("sessions/gemm.onnx"), "-o", join(folder, "x.eigentask")];
  const tokens = ["--tokenizer", join(folder, "tokenizer.json")];
  t.match(await run(...learn, ...tokens), {
    code: 1,
    err: /candidates: none \(another model\?\).*--names MODULE=WEIGHT/,
  });
  const distill = [
    "distill",
    bert,
    adapters,
    "--model",
    data("sessions/gemm.onnx"),
    "--text",
    lines,
    "-o",
    join(folder, "d.eigen"),
  ];
  t.match(await run(...distill, ...tokens), {
    code: 1,
    err: /candidates: none \(another model\?\).*--names MODULE=WEIGHT/,
  });
});

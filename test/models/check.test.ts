/**
 * `eigenlora check`: its verdict on a model and a pack agrees with a session's behaviour, for models that fit, in some
 * modes or in none; and its advice for those that do not.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import type { SessionOptions } from "eigenlora/session";
import t from "tap";
import { run } from "../support/command-line.ts";
import { folderFor } from "../support/folder.ts";
import { fromBinary, readModel, type Survey, surveyModel, toBinary } from "../support/internals/models.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { MODES, NODE, open, refusal } from "../support/sessions.ts";

const folder = folderFor(t);
const QUERY = "bert.encoder.layer.0.attention.self.query";

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
  const proto = fromBinary("ModelProto", new Uint8Array(readFileSync(data("sessions/fused.onnx"))));
  for (const node of proto.graph!.node) if (node.opType === "Attention") node.opType = model;
  writeFileSync(path, toBinary("ModelProto", proto));
  return path;
}

async function surveyOf({ model, pack, options = {} }: Case): Promise<Survey> {
  const opened = await openPack(pack);
  const survey = await surveyModel(await readModel(pathOf(model)), opened, options);
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
    parameters.filter(({ why }) => why !== null),
    [],
    "biases that the export has dropped count as found",
  );
});

t.test("the command: exit code, verdict, next step", async (t) => {
  for (const [what, { model, pack, options = {}, mode, next }] of Object.entries(CASES)) {
    const flags = [
      ...[...(options.names ?? [])].flatMap(([module, weight]) => ["--names", `${module}=${weight}`]),
      ...(options.ignore ?? []).flatMap((name) => ["--ignore", name]),
    ];
    const { status, stdout, stderr } = await run("check", pathOf(model), pack, "--files-only", ...flags);
    t.same([status, stderr], [mode === null ? 1 : 0, ""], what);
    const [verdict, advice] = stdout.trimEnd().split("\n").slice(-2);
    t.match(verdict, mode === null ? /^It does not work: / : `It works, in mode "${mode}" (`, what);
    t.match(advice, next, what);
    t.notMatch(stdout, /option `names`|anyBase: true,|pass ignore: |undefined|NaN/, `${what}: in flags`);
  }
});

t.test("names by hand that no fingerprint supports are warned of, and none are proposed", async (t) => {
  const bare = await pack("bare.eigen", ["sessions/adapters"]);
  const check = (weight: string) =>
    run("check", pathOf("sessions/torchscript.onnx"), bare, "--files-only", "--names", `${QUERY}=${weight}`);
  const mapped = await check(`${QUERY.replace("query", "value")}.weight`);
  t.match(mapped.stderr.replace(/\s+/g, " "), /warning: --names \S+query=\S+: no fingerprint confirms that weight/);
  t.match((await check("other.weight")).stdout, /Next: make the pack with --base/);
});

t.test("with onnxruntime-node it makes a session and runs it", async (t) => {
  const { status, stdout } = await run("check", data("exports/classifier.onnx"), fresh);
  t.equal(status, 0);
  t.match(stdout, /parity probe passed/);
  t.match(stdout, /learning: yes/);
  const asked = async (model: string, pack: string) =>
    JSON.parse((await run("check", pathOf(model), pack, "--json")).stdout) as Survey & Record<string, any>;
  const json = await asked("exports/classifier.onnx", both);
  t.match(json, {
    works: true,
    mode: "core",
    run: { session: { works: true }, probes: { classifier: "passed" } },
  });
  t.match(json["run"].learning, { works: false, says: /whole and others adapt it.*--ignore classifier/ });
  t.match((await asked("sessions/q4.onnx", bert))["run"].learning, { works: true });
  t.match((await asked("sessions/int8.onnx", bert))["run"].learning, { works: false, says: /pass a float export/ });
  const convolutions = await asked("forms/vision.onnx", vision);
  t.match(convolutions["run"], { learning: { works: false, says: /"odd" is a convolution/ } });
  t.match(await asked("sessions/gemm.onnx", bert), { works: false, mode: null, run: null });
});

t.test("tasks of another model are named, and no quantiser is blamed", async (t) => {
  const two = await pack("two.eigen", ["adapters/own-seed/debtags-role", "sessions/adapters-mlp/a"]);
  const { status, stdout } = await run("check", data("minilm/model_fp16.onnx"), two, "--files-only");
  t.equal(status, 1);
  t.match(stdout, /Next: pack the tasks of one model only: none of the modules of task "a" is in this model/);
  t.notMatch(stdout, /quantisers/);
  const small = await run("check", data("sessions/torchscript.onnx"), minilm, "--files-only");
  t.match(small.stdout, /Next: use the model that the adapters were trained on: in this one a layer has another shape/);
});

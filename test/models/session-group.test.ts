/**
 * Several files of one model: a tiny FLAN-T5 as encoder and decoder (test/data/seq2seq), each session with the modules
 * in its file, one switch for both; and single files that lack modules of the pack. Compared with PEFT's answers, token
 * for token.
 */
import { readFileSync } from "node:fs";
import { openPack, type Pack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";
import { createEigenSession, createEigenSessions, type EigenSessions } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { relativeDifference } from "../support/compare.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { int64, MODES, modesOn, NODE, ORTS, type Ort, refusal } from "../support/sessions.ts";

interface Golden {
  readonly encoded: number[];
  readonly logits: number[];
  readonly tokens: number[][];
}
const goldens = JSON.parse(readFileSync(data("seq2seq/goldens.json"), "utf8"));
const ROWS: number[][] = goldens.rows;
const TASKS = ["answers", "titles", null] as const;
const golden = (task: string | null): Golden => goldens[task ?? "base"];
const FILES = { encoder: data("seq2seq/onnx/encoder_model.onnx"), decoder: data("seq2seq/decoder.onnx") };
type Models = EigenSessions<Ort, keyof typeof FILES>;

/** A lossless pack of adapters; with the base's fingerprints unless told otherwise. */
async function packBytes(ids: readonly string[], fingerprints = true): Promise<Uint8Array<ArrayBuffer>> {
  const paths = ids.map((id) => `seq2seq/adapters/${id}`);
  const base = fingerprints && { base: data("seq2seq/base.safetensors") };
  return (await packOf(paths, { ...LOSSLESS, ...base })).bytes;
}
const whole = await packBytes(["answers", "titles"]);
const opened = (t: Test, bytes = whole): Promise<Pack> =>
  openPack(bytes).then((pack) => (t.teardown(() => pack.close()), pack));

const mask = (ort: Ort) =>
  int64(
    ort,
    ROWS.map((row) => row.map((id) => Number(id !== 0))),
  );

/** Results of both files together: the encoder's output, greedy tokens, and the logits of the last token. */
async function answers(ort: Ort, models: Pick<Models, "call">): Promise<Golden> {
  return models.call(async ({ encoder, decoder }) => {
    const attention_mask = mask(ort);
    const { last_hidden_state } = await encoder.run({ input_ids: int64(ort, ROWS), attention_mask });
    const steps = golden(null).tokens[0]!.length - 1;
    const tokens = ROWS.map(() => [0]);
    let logits: number[] = [];
    for (let step = 0; step < steps; step++) {
      const feeds = {
        input_ids: int64(ort, tokens),
        encoder_hidden_states: last_hidden_state!,
        encoder_attention_mask: attention_mask,
      };
      const { data, dims } = (await decoder.run(feeds))["logits"]!;
      logits = [...(data as Float32Array)];
      const [, length, width] = dims as [number, number, number];
      tokens.forEach((row, i) => {
        const last = logits.slice((i * length + length - 1) * width, (i * length + length) * width);
        row.push(last.indexOf(Math.max(...last)));
      });
    }
    return { encoded: [...(last_hidden_state!.data as Float32Array)], logits, tokens };
  });
}

async function holds(t: Test, ort: Ort, models: Pick<Models, "call">, task: string | null, how: string): Promise<void> {
  const [found, expected] = [await answers(ort, models), golden(task)];
  t.same(found.tokens, expected.tokens, `${how}, ${task}: tokens`);
  const off = Math.max(
    relativeDifference(found.encoded, expected.encoded),
    relativeDifference(found.logits, expected.logits),
  );
  t.ok(off < 1e-5, `${how}, ${task}: off by ${off}`);
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: encoder and decoder answer as PEFT's model, in every mode`, async (t) => {
    for (const mode of [...modesOn(name), "auto"] as const) {
      const models = await createEigenSessions(ort, FILES, await opened(t), { mode });
      const { encoder, decoder } = models.sessions;
      t.same([encoder.leftOut.length, decoder.leftOut.length], [8, 4], "modules that live in the other file");
      t.ok(encoder.leftOut.every((module) => module.startsWith("decoder.")));
      t.same([encoder.unconfirmed, decoder.unconfirmed], [[], []]);
      for (const task of TASKS) {
        const report = await models.switchTask(task);
        t.equal(report.task, task);
        t.same([models.task, encoder.task, decoder.task], [task, task, task]);
        await holds(t, ort, models, task, mode);
      }
      const sum = encoder.memory().active + decoder.memory().active;
      t.equal(models.memory().active, sum);
      await models.close();
      t.throws(() => models.call(async () => undefined), { message: /closed/ });
    }
  });
}

t.test("a switch that one file refuses changes none", async (t) => {
  // No task brings a head when the sessions are made: the decoder refuses one that is added later, after the encoder
  // has switched.
  for (const mode of ["factors", "folded"] as const) {
    const pack = await opened(t);
    const { bytes } = await pack.load("titles");
    pack.removeTask("titles");
    const models = await createEigenSessions(NODE, FILES, pack, { mode });
    await pack.addTask("titles", encodeTaskFile({ id: "titles", adapterBytes: 0, metadata: {} }, pack.basisId, bytes));
    await models.switchTask("answers");
    await t.rejects(models.switchTask("titles"), { name: "BaseMismatchError", message: /lm_head/ });
    t.same([models.task, models.sessions.encoder.task, models.sessions.decoder.task], Array(3).fill("answers"));
    await holds(t, NODE, models, "answers", `${mode}, after a switch that failed`);
    await t.rejects(models.switchTask("unknown"), { name: "TaskError" });
    await t.rejects(models.switchTask(null, { signal: AbortSignal.abort() }), { name: "AbortError" });
    await holds(t, NODE, models, "answers", `${mode}, after two more`);
    await models.close();
  }
});

t.test("work that belongs together is never between two tasks", async (t) => {
  const models = await createEigenSessions(NODE, FILES, await opened(t), { mode: "factors" });
  t.teardown(() => models.close());
  const order: Promise<unknown>[] = [];
  const found: [string | null, Golden][] = [];
  for (let i = 0; i < 9; i++) {
    const task = TASKS[i % 3]!;
    order.push(
      models.switchTask(task),
      answers(NODE, models).then((one) => found.push([task, one])),
    );
  }
  await Promise.all(order);
  t.equal(found.length, 9);
  for (const [task, { tokens }] of found) t.same(tokens, golden(task).tokens, String(task));
});

t.test("what lives in no file is named, with what each file says of it", async (t) => {
  const pack = await opened(t);
  const { encoder } = FILES;
  t.match(await refusal(() => createEigenSessions(NODE, { encoder }, pack)), {
    name: "BaseMismatchError",
    message: /"decoder\.block\.0.*lives in none of the files \(encoder: .*option `modules`/,
  });
  const mlp = data("sessions/base-mlp.safetensors").replace("base-mlp.safetensors", "gemm.onnx");
  t.match(await refusal(() => createEigenSessions(NODE, { ...FILES, other: mlp }, pack)), {
    name: "BaseMismatchError",
    message: /other: no module of .* lives in this file.*without the pack/,
  });
  const unconfirmed = await opened(t, await packBytes(["answers", "titles"], false));
  t.match(await refusal(() => createEigenSessions(NODE, FILES, unconfirmed)), {
    name: "BaseMismatchError",
    message: /encoder: no module.*by the end of its name only, as "block\.0.*no fingerprint/,
  });
});

t.test("options of all and of each", async (t) => {
  const pack = await opened(t);
  const models = await createEigenSessions(NODE, FILES, pack, { mode: "core", each: { decoder: { mode: "folded" } } });
  t.same([models.sessions.encoder.mode, models.sessions.decoder.mode], ["core", "folded"]);
  await models.switchTask("titles");
  await holds(t, NODE, models, "titles", "modes mixed");
  await models.close();
  const refused: [object, RegExp][] = [
    [{ each: { third: {} } }, /each: there is no session "third", only "encoder", "decoder"/],
    [{ each: { encoder: { mod: 1 } } }, /unknown option "mod"; did you mean "mode"/],
    [{ trainable: true }, /trainable: one session learns at a time; use createSession on one file/],
    [{ part: 1 }, /unknown option "part"/],
  ];
  for (const [options, message] of refused)
    t.match(await refusal(() => createEigenSessions(NODE, FILES, pack, options)), { name: "TypeError", message });
  t.match(await refusal(() => createEigenSessions(NODE, {}, pack)), {
    name: "TypeError",
    message: /expected files by name/,
  });
});

t.test("one file, with the modules that it has", async (t) => {
  const pack = await opened(t);
  const modules = (module: string): boolean => module.startsWith("encoder.");
  t.match(await refusal(() => createEigenSession(NODE, FILES.encoder, pack)), { name: "BaseMismatchError" });
  for (const mode of MODES) {
    const session = await createEigenSession(NODE, FILES.encoder, pack, { mode, modules });
    t.equal(session.leftOut.length, 8);
    for (const task of TASKS) {
      await session.switchTask(task);
      const feeds = { input_ids: int64(NODE, ROWS), attention_mask: mask(NODE) };
      const { last_hidden_state } = await session.run(feeds);
      const off = relativeDifference(last_hidden_state!.data as Float32Array, golden(task).encoded);
      t.ok(off < 1e-5, `${mode}, ${task}: off by ${off}`);
    }
    await session.close();
  }
  t.match(await refusal(() => createEigenSession(NODE, FILES.encoder, pack, { modules: () => false })), {
    name: "RangeError",
    message: /modules: keeps none of the 12 modules of .*such as "decoder\./,
  });
  t.match(await refusal(() => createEigenSession(NODE, FILES.encoder, pack, { modules: "encoder" as never })), {
    name: "TypeError",
    message: /modules: expected a function of names, got "encoder"/,
  });
});

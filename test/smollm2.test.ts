/**
 * A real language model and real adapters: a lossless pack answers token for token as PEFT does, with onnxruntime and through
 * transformers.js. Some rows of some tasks; all of them in `soak-llm.js`. EIGENLORA_SMOLLM2 names the model's folder
 * (CONTRIBUTING.md); what needs it is skipped by name without, and fails when EIGENLORA_REQUIRE lists "smollm2".
 */
import { existsSync } from "node:fs";
import * as ort from "onnxruntime-node";
import t from "tap";
import { NO_SMOLLM2, smollm2, smollm2File } from "../benchmarks/lib/skills.js";
import { createEigenSession } from "../dist/bindings/onnxruntime.js";
import { attachPack } from "../dist/bindings/transformers.js";
import { openPack } from "../dist/src/pack/pack.js";
import { data } from "./packs.ts";
import { PACKAGE } from "./pipelines.ts";
import { required } from "./required.ts";
import { losslessPack, MODEL, pipelineOn, readCases, wrongGenerated, wrongOf } from "./skills.js";

const TASKS = ["antonym", "past-tense", "time-24h"] as const;
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };

const skip = smollm2 === undefined && !required.has("smollm2") && NO_SMOLLM2;
const noTransformers =
  !existsSync(PACKAGE) && !required.has("transformers") && "transformers.js is not here; see EIGENLORA_RUNTIMES";

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
    original: "release-first",
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

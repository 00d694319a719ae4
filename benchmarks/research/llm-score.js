/**
 * Scores a pack on the twenty tasks of SmolLM2. Exact match and nats per answer token, compared with PEFT's adapters,
 * by teacher forcing in onnxruntime-node (benchmarks/lib/skills.js). A pack by its file; or adapters, each by itself,
 * as they are or cut to a rank by its own SVD and stored in a number format.
 *
 * Choices are to be made on training rows (`--rows train`); the test rows are for what was chosen.
 *
 * Needs SmolLM2 (EIGENLORA_SMOLLM2).
 */
import { stat } from "node:fs/promises";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { mean, sum } from "simple-statistics";
import { packOf, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments, text } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import {
  createEncode,
  force,
  NO_SMOLLM2,
  questionsOf,
  readAnswers,
  readSkills,
  scoreOf,
  smollm2,
  smollm2File,
} from "../lib/skills.js";
import { LOSSLESS, storeOne } from "../lib/suite.js";

const QUESTION = "How well does a pack answer the twenty tasks of SmolLM2?";
const given = readArguments(QUESTION, {
  pack: text("FILE", "the pack"),
  adapters: text("FOLDER", "instead of a pack: adapters, each by itself"),
  rank: number("cut adapters to this rank", undefined, 1),
  dtype: choice(["f32", "f16", "int8", "int4", "int3"], "number format of adapters", "f32"),
  rows: choice(["test", "train"], "which rows", "test"),
  most: number("so many rows of a task, the first", Infinity, 1),
  tasks: text("NAMES", "these alone, between commas"),
  model: text("FILE", "ONNX file in the model's folder", "onnx/model.onnx"),
  mode: choice(["auto", "core", "factors", "folded"], "of the session", "auto"),
});
if (!smollm2) stop(NO_SMOLLM2);
if ((given.pack === undefined) === (given.adapters === undefined)) stop("expected --pack or --adapters");

ort.env.logLevel = "error";
const { source, bytes } = given.pack
  ? { source: given.pack, bytes: (await stat(given.pack)).size }
  : await ofAdapters();
const pack = await openPack(source);
const session = await createEigenSession(ort, smollm2File(given.model), pack, {
  mode: given.mode,
  session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const [skills, answers, encode] = await Promise.all([readSkills(), readAnswers(), createEncode()]);
const names = given.tasks?.split(",") ?? [...skills.keys()].filter((name) => pack.tasks.has(name));
/** @type {import("../lib/report.js").Row[]} */
const rows = [];
for (const name of names) rows.push(await score(name));
await session.close();
const figures = ["exact match, %", "PEFT, %", "nats"].filter((key) => key in rows[0]);
rows.push({
  name: `mean of ${names.length}`,
  ...Object.fromEntries(figures.map((key) => [key, mean(rows.map((row) => Number(row[key])))])),
});
const notes = [`${bytes} bytes; ${given.rows} rows, mode ${session.mode}. Exact match by tokens, ended by <|im_end|>.`];
await pack.close();
print(given.json, [{ question: QUESTION, rows, notes }]);

/** @param {string} name @returns {Promise<import("../lib/report.js").Row>} */
async function score(name) {
  const skill = skills.get(name);
  if (!skill || !pack.tasks.has(name)) stop(`${name}: expected ${[...pack.tasks.keys()].join(", ")}`);
  const questions = questionsOf(skill, encode, skill[given.rows].slice(0, given.most));
  await session.switchTask(name);
  const { exact, nll } = scoreOf(await force(ort, session, questions));
  progress(`${name}: ${exact.toFixed(1)} %, ${nll.toFixed(3)} nats`);
  const told = answers.adapters[`adapters/${name}`];
  if (given.rows !== "test" || !told) return { name, "exact match, %": exact, nats: nll };
  const same = questions.filter(({ answer }, row) => String(answer) === String(told.answers[row])).length;
  return { name, "exact match, %": exact, "PEFT, %": (100 * same) / questions.length, nats: nll };
}

/** Packs adapters without further loss, and counts their own bytes. */
async function ofAdapters() {
  return withAdapters([String(given.adapters)], async (adapters) => {
    const stored = await Promise.all(adapters.map((one) => storeOne(one, { type: given.dtype, rank: given.rank })));
    const source = await packOf(
      stored.map(({ adapter }) => adapter),
      LOSSLESS,
    );
    return { source, bytes: sum(stored.map((one) => one.bytes)) };
  });
}

/** @param {string} why @returns {never} */
function stop(why) {
  process.stderr.write(`llm-score: ${why}; see --help\n`);
  process.exit(2);
}

/**
 * One adapter alone: how well does it answer from a file many times smaller than its numbers in f32? Every adapter of a suite is packed by
 * itself, as `pack --ratio` does it, entropy-coded and with few bits for all, and asked on test rows beside PEFT's own answers. Whole
 * files count, with heads and names.
 *
 * The suite `smollm2` needs SmolLM2 (EIGENLORA_SMOLLM2) and a folder with its adapters.
 */
import { openPack } from "eigenlora";
import { searchPack } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import {
  agreement,
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../../examples/minilm.js";
import { bytesOfAdapter, folderOf, withAdapters } from "../lib/adapters.js";
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

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 * @typedef {{ model: string, accuracy(session: Session, id: string): Promise<number>, reference(id: string): number }} Asking
 */

const MOST_ROWS = 240;
const QUESTION = "How well does one adapter answer from a small file of its own?";
const given = readArguments(QUESTION, {
  suite: choice(["own-seed", "hub", "smollm2"], "which adapters", "own-seed"),
  adapters: text("FOLDER", "those of the suite smollm2"),
  ratio: number("so many times fewer bytes than the numbers in f32", 25),
  tasks: number("so many of them", Infinity, 1),
});
const { suite, ratio } = given;
if (suite === "smollm2" && !smollm2) stop(NO_SMOLLM2);
if ((suite === "smollm2") !== (given.adapters !== undefined)) stop("--adapters belongs to --suite smollm2");
ort.env.logLevel = "error";

/** @type {import("eigenlora/build").Way[]} */
const WAYS = [
  { name: "coded", gauge: "balanced", grows: "steps" },
  {
    name: "few bits",
    gauge: "balanced",
    grows: "terms",
    dtype: { basis: "int4", coefficients: "int4", head: "int4" },
  },
];

const asking = suite === "smollm2" ? await askSkills() : await askTexts(suite);
const folder = suite === "smollm2" ? String(given.adapters) : folderOf(suite);
const rows = await withAdapters([folder], async (adapters) => {
  /** @type {import("../lib/report.js").Row[]} */
  const rows = [];
  for (const adapter of adapters.slice(0, given.tasks)) {
    rows.push(await measure(adapter));
    progress(JSON.stringify(rows.at(-1)));
  }
  return rows;
});
const numbers = Object.keys(rows[0]).filter((key) => key !== "name");
rows.push({
  name: `mean of ${rows.length}`,
  ...Object.fromEntries(numbers.map((key) => [key, mean(rows.map((row) => Number(row[key])))])),
});
print(given.json, [
  {
    question: `${QUESTION} ${suite}, ${ratio}× fewer bytes than in f32.`,
    rows,
    notes: ["%: right on test rows, whole answers of SmolLM2. Nothing was chosen by them. error: of ΔW."],
  },
]);

/** @param {Adapter} adapter */
async function measure(adapter) {
  const max = bytesOfAdapter(adapter) / ratio;
  /** @type {import("../lib/report.js").Row} */
  const row = { name: adapter.id, "LoRA, %": asking.reference(adapter.id) };
  for (const way of WAYS) {
    const { chunks, report } = await searchPack([adapter], { goal: { kind: "bytes", max }, ways: [way] });
    const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
    const session = await createEigenSession(ort, asking.model, pack, { session: { intraOpNumThreads: 1 } });
    await session.switchTask(adapter.id);
    row[`${way.name}, bytes`] = report.bytes;
    row[`${way.name}, error`] = report.error.mean;
    row[`${way.name}, %`] = await asking.accuracy(session, adapter.id);
    await session.close();
    await pack.close();
  }
  return row;
}

/** @param {"own-seed" | "hub"} name @returns {Promise<Asking>} */
async function askTexts(name) {
  const [reference, encode] = [await readReference(name), await createEncoder(ort)];
  const tests = new Map();
  for (const id of reference.keys()) tests.set(id, (await readTask(id)).test.slice(0, MOST_ROWS));
  /** @param {string} id @returns {number[]} */
  const labelsOf = (id) => tests.get(id).map((/** @type {[string, number]} */ [, label]) => label);
  return {
    model,
    async accuracy(session, id) {
      const texts = tests.get(id).map((/** @type {[string, number]} */ [text]) => text);
      return 100 * agreement((await runBatches(session, toBatches(encode, texts))).map(labelOf), labelsOf(id));
    },
    reference: (id) => 100 * agreement(reference.get(id)?.predictions ?? [], labelsOf(id)),
  };
}

/** @returns {Promise<Asking>} */
async function askSkills() {
  const [skills, answers, encode] = await Promise.all([readSkills(), readAnswers(), createEncode()]);
  /** @param {string} id */
  const questions = (id) => questionsOf(/** @type {any} */ (skills.get(id)), encode, skills.get(id)?.test);
  return {
    model: smollm2File("onnx/model.onnx"),
    accuracy: async (session, id) => scoreOf(await force(ort, session, questions(id))).exact,
    reference(id) {
      const all = questions(id);
      const told = answers.adapters[`adapters/${id}`].answers;
      return (100 * all.filter(({ answer }, row) => String(answer) === String(told[row])).length) / all.length;
    },
  };
}

/** @param {string} why @returns {never} */
function stop(why) {
  process.stderr.write(`alone: ${why}; see --help\n`);
  process.exit(2);
}

/**
 * What does a language model gain from a skill that it learns by coefficients alone? Skills of SmolLM2 (test/data/smollm2) are left
 * out of the pack one at a time; the components are those of the nineteen others. A LoRA of rank 8, trained by the same trainer from
 * the same rows, is beside it, PEFT's own adapter, and the model without any.
 *
 * Rows are learned from the first of the training rows, and choices (K, rows, rates, steps) are judged on the last 160 of them
 * (`--judge train`); the test rows are for what was chosen. Every run is a line of `--into`; what is there is not run again.
 *
 * Needs SmolLM2 (EIGENLORA_SMOLLM2).
 */
import { appendFile, readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { buildPack, taskAdapter } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean, sampleStandardDeviation } from "simple-statistics";
import { data } from "../../examples/minilm.js";
import { choice, number, readArguments, text } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import {
  createEncode,
  encodeForTrainer,
  examplesOf,
  NO_SMOLLM2,
  readSkills,
  smollm2,
  smollm2File,
} from "../lib/skills.js";

/** @typedef {{ skill: string, way: string, seed: number, judge: string, trained: number, nll: number, exact: number, seconds: number, settings: string }} Cell */

const QUESTION = "What does a language model gain from a skill that it learns by coefficients alone?";
const given = readArguments(QUESTION, {
  skills: text("NAMES", "skills that are left out, between commas", "past-tense,plural,antonym,supersense,spa-eng"),
  ways: text("NAMES", "coefficients, lora, or both between a comma", "coefficients,lora"),
  seeds: number("seeds", 3, 1),
  k: number("components of each side", 38, 1),
  rank: number("rows of coefficients", 4, 1),
  steps: number("steps", 80, 1),
  batch: number("rows of a step", 16, 1),
  rate: number("learning rate of coefficients", 0.02),
  "lora-rate": number("learning rate of a LoRA", 0.002),
  init: choice(["mean", "random", "auto"], "where coefficients begin", "random"),
  judge: choice(["test", "train"], "rows that judge", "test"),
  into: text("FILE", "lines of all runs", fileURLToPath(new URL("results/llm-learn.jsonl", import.meta.url))),
});
if (!smollm2) {
  process.stderr.write(`llm-learn: ${NO_SMOLLM2}\n`);
  process.exit(2);
}
/** Of the training rows, to judge choices by. */
const JUDGES = 160;

ort.env.logLevel = "error";
const [skills, tokens] = await Promise.all([readSkills(), createEncode()]);
const encode = encodeForTrainer(tokens);
const known = (await readFile(given.into, "utf8").catch(() => "")).split("\n").filter(Boolean);
/** @type {Cell[]} */
const cells = known.map((line) => JSON.parse(line));
for (const name of given.skills.split(",")) await learnAll(name);
report();

/** All runs that leave one skill out. @param {string} left */
async function learnAll(left) {
  const wanted = given.ways
    .split(",")
    .flatMap((way) => Array.from({ length: given.seeds }, (_, i) => ({ way, seed: i + 1, settings: settingsOf(way) })));
  const missing = wanted.filter((one) => !cells.some((cell) => isRun(cell, left, one)));
  if (missing.length === 0) return;
  const pack = await openPack(await donors(left));
  const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), pack, {
    trainable: true,
    session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
  });
  for (const one of missing) {
    const cell = await learn(session, left, one);
    cells.push(cell);
    await appendFile(given.into, `${JSON.stringify(cell)}\n`);
    progress(`${left}, ${one.way}, seed ${one.seed}: ${(100 * cell.exact).toFixed(1)} %, ${cell.nll.toFixed(3)} nats`);
  }
  await session.close();
  await pack.close();
}

/** @param {string} way */
function settingsOf(way) {
  const { k, rank, steps, batch, rate, init } = given;
  const common = `${steps} steps of ${batch}`;
  return way === "lora"
    ? `rank 8, ${common}, rate ${given["lora-rate"]}`
    : `K ${k}, ${rank} rows, ${common}, rate ${rate}, ${init}`;
}

/** @param {Cell} cell @param {string} left @param {{ way: string, seed: number, settings: string }} one */
function isRun(cell, left, { way, seed, settings }) {
  const same = cell.way === way && cell.seed === seed && cell.settings === settings;
  return same && cell.skill === left && cell.judge === given.judge;
}

/** A pack of all adapters but one. @param {string} left */
async function donors(left) {
  const all = await openPack(data("smollm2/twenty.eigen"));
  const adapters = await Promise.all(
    [...all.tasks.keys()].filter((id) => id !== left).map((id) => taskAdapter(all, id)),
  );
  const { chunks } = await buildPack(adapters, { select: { kind: "k", k: given.k }, gauge: "balanced" });
  await all.close();
  return new Uint8Array(Buffer.concat(chunks));
}

/**
 * @param {import("eigenlora/onnxruntime").EigenSession<typeof ort>} session
 * @param {string} left @param {{ way: string, seed: number, settings: string }} run
 * @returns {Promise<Cell>}
 */
async function learn(session, left, { way, seed, settings }) {
  const skill = skills.get(left);
  if (!skill) throw new Error(`${left}: expected ${[...skills.keys()].join(", ")}`);
  const train = given.judge === "train" ? skill.train.slice(0, -JUDGES) : skill.train;
  const judges = given.judge === "train" ? skill.train.slice(-JUDGES) : skill.test;
  const { rank, steps, batch, rate, init } = given;
  const how = way === "lora" ? { train: /** @type {const} */ ("lora"), rank: 8 } : { rank, init };
  const trainer = await createTrainer(session, { encode, seed, ...how });
  const started = performance.now();
  const learningRates = { terms: way === "lora" ? given["lora-rate"] : rate };
  for await (const { step, loss } of trainer.fit(examplesOf(skill, train), { steps, batch, learningRates }))
    if (step % 10 === 0) progress(`${left}, ${way}, seed ${seed}: step ${step}, loss ${loss.toFixed(3)}`);
  const seconds = (performance.now() - started) / 1000;
  const { loss: nll, accuracy: exact } = await trainer.score(examplesOf(skill, judges));
  return { skill: left, way, seed, judge: given.judge, trained: trainer.size.terms, nll, exact, seconds, settings };
}

/** One row for each skill and way. */
function report() {
  const names = given.skills.split(",");
  const rows = names.flatMap((name) =>
    given.ways.split(",").map((way) => {
      const settings = settingsOf(way);
      const own = cells.filter((cell) =>
        Array.from({ length: given.seeds }, (_, i) => i + 1).some((seed) => isRun(cell, name, { way, seed, settings })),
      );
      const spread = own.length > 1 ? sampleStandardDeviation(own.map(({ nll }) => nll)) : 0;
      return {
        ...{
          name: `${name}, ${way}`,
          numbers: own[0]?.trained ?? 0,
          "exact match, %": 100 * mean(own.map(({ exact }) => exact)),
        },
        ...{ nats: mean(own.map(({ nll }) => nll)), "± nats": spread, seeds: own.length },
      };
    }),
  );
  const notes = [...new Set(given.ways.split(",").map((way) => `${way}: ${settingsOf(way)}`))];
  print(given.json, [{ question: QUESTION, rows, notes }]);
}

/**
 * What does a language model gain from a skill that it learns by coefficients alone? Skills of SmolLM2 (test/data/smollm2) are left
 * out one at a time; the components are made of the adapters of all others (`--adapters`), never of a pack that has known the left-out
 * one: what a pack of all makes of the others lies in components that it helped to make. Beside coefficients, by name of `--ways`:
 *
 * - lora, lora-1: LoRAs of rank 8 and 1, trained by the same trainer from the same rows
 * - flat: coefficients of flat components, one number for a whole factor (the paper's own form)
 * - zero-shot: random coefficients of the donors' spread; analytical: the skill's own adapter projected onto the components;
 *   distilled: the same, trained to answer as that adapter does at the positions of the completions
 * - base: the model without any
 * - peft: LoRAs of rank 8 that PEFT trains in PyTorch (`PYTHON`), from the same rows in as many steps of the same schedule
 *
 * Rows are learned from the first of the training rows, and choices (K, rows, rates, steps) are judged on the last 160 of them
 * (`--judge train`); the test rows are for what was chosen. Every run is a line of `--into`; what is there is not run again.
 *
 * Needs SmolLM2 (EIGENLORA_SMOLLM2).
 */
import { appendFile, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { encodeTaskFile, projectAdapters } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer, distill, zeroShotTask } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean, sampleStandardDeviation } from "simple-statistics";
import { data } from "../../examples/minilm.js";
import { packOf, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments, text } from "../lib/arguments.js";
import { python } from "../lib/peers.js";
import { print, progress } from "../lib/report.js";
import {
  createEncode,
  encodeForTrainer,
  examplesOf,
  force,
  NO_SMOLLM2,
  questionsOf,
  readSkills,
  scoreOf,
  smollm2,
  smollm2File,
} from "../lib/skills.js";

/**
 * @typedef {"coefficients" | "lora" | "lora-1" | "flat" | "zero-shot" | "analytical" | "distilled" | "base" | "peft"} Way
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 * @typedef {{ skill: string, way: Way, seed: number, judge: string, trained: number, nll: number, exact: number, seconds: number, settings: string }} Cell
 */

const QUESTION = "What does a language model gain from a skill that it learns by coefficients alone?";
const given = readArguments(QUESTION, {
  skills: text("NAMES", "skills that are left out, between commas", "past-tense,plural,antonym,supersense,spa-eng"),
  ways: text("NAMES", "what learns, between commas", "coefficients,lora"),
  seeds: number("seeds", 3, 1),
  adapters: text("FOLDER", "PEFT adapters of all skills", data("smollm2/adapters")),
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
/** Training rows held back to judge choices by. */
const JUDGES = 160;
/** Number formats that round nothing. */
const DTYPES = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });
/** Ways that train nothing; of these, those that no seed changes. @type {ReadonlySet<Way>} */
const UNTRAINED = new Set(/** @type {const} */ (["zero-shot", "analytical", "base"]));
/** @type {ReadonlySet<Way>} */
const MADE = new Set(/** @type {const} */ ([...UNTRAINED, "distilled"]));
/** @type {ReadonlySet<Way>} */
const SEEDLESS = new Set(/** @type {const} */ (["analytical", "base"]));

ort.env.logLevel = "error";
const [skills, tokens] = await Promise.all([readSkills(), createEncode()]);
const encode = encodeForTrainer(tokens);
const adapters = await readAdapters([given.adapters]);
const known = (await readFile(given.into, "utf8").catch(() => "")).split("\n").filter(Boolean);
/** @type {Cell[]} */
const cells = known.map((line) => JSON.parse(line));
for (const name of given.skills.split(",")) await learnAll(name);
for (const adapter of adapters) await adapter.close();
report();

/** All runs that leave one skill out, a session for each kind of components. @param {string} left */
async function learnAll(left) {
  const missing = waysOf().flatMap((way) => seedsOf(way).map((seed) => ({ way, seed, settings: settingsOf(way) })));
  const open = missing.filter((one) => !cells.some((cell) => isRun(cell, left, one)));
  for (const one of open.filter(({ way }) => way === "peft")) await keep(left, one, await learnApart(left, one));
  for (const mode of /** @type {const} */ (["column", "flat"])) {
    const runs = open.filter(({ way }) => way !== "peft" && (way === "flat") === (mode === "flat"));
    if (runs.length === 0) continue;
    const pack = await openPack(await donors(left, mode));
    const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), pack, {
      trainable: runs.some(({ way }) => !UNTRAINED.has(way)),
      session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
    });
    for (const one of runs) await keep(left, one, await learn(session, left, one));
    await session.close();
    await pack.close();
  }
}

/** @param {string} left @param {{ way: Way, seed: number }} run @param {Cell} cell */
async function keep(left, { way, seed }, cell) {
  cells.push(cell);
  await appendFile(given.into, `${JSON.stringify(cell)}\n`);
  progress(`${left}, ${way}, seed ${seed}: ${(100 * cell.exact).toFixed(1)} %, ${cell.nll.toFixed(3)} nats`);
}

/** @returns {Way[]} */
function waysOf() {
  return /** @type {Way[]} */ (given.ways.split(","));
}

/** @param {Way} way */
function seedsOf(way) {
  return Array.from({ length: SEEDLESS.has(way) ? 1 : given.seeds }, (_, i) => i + 1);
}

/** @param {Way} way */
function settingsOf(way) {
  const { k, rank, steps, batch, rate, init } = given;
  const common = `${steps} steps of ${batch}`;
  const donors = adapters.length - 1;
  const column = `K ${k} of ${donors} adapters`;
  const lora = (/** @type {number} */ of) => `rank ${of}, ${common}, rate ${given["lora-rate"]}`;
  /** @type {Record<Way, string>} */
  const settings = {
    coefficients: `${column}, ${rank} rows, ${common}, rate ${rate}, ${init}`,
    lora: lora(8),
    "lora-1": lora(1),
    flat: `flat, K ${Math.min(k, donors - 1)} of ${donors} adapters, ${common}, rate ${rate}, ${init}`,
    "zero-shot": `${column}, ${rank} rows, random`,
    analytical: column,
    distilled: `${column}, ${common}`,
    base: "",
    peft: `rank 8, alpha 16, ${common}, rate ${given["lora-rate"]}`,
  };
  if (!(way in settings)) throw new Error(`--ways: expected ${Object.keys(settings).join(", ")}, got ${way}`);
  return settings[way];
}

/** @param {Cell} cell @param {string} left @param {{ way: Way, seed: number, settings: string }} one */
function isRun(cell, left, { way, seed, settings }) {
  const same = cell.way === way && cell.seed === seed && cell.settings === settings;
  return same && cell.skill === left && cell.judge === given.judge;
}

/** A pack of all adapters but one. @param {string} left @param {"column" | "flat"} mode */
async function donors(left, mode) {
  const k = mode === "flat" ? Math.min(given.k, adapters.length - 2) : given.k;
  const others = adapters.filter(({ id }) => id !== left);
  return packOf(others, { mode, select: { kind: "k", k }, gauge: "balanced", dtype: DTYPES });
}

/**
 * @param {Session} session
 * @param {string} left @param {{ way: Way, seed: number, settings: string }} run
 * @returns {Promise<Cell>}
 */
async function learn(session, left, { way, seed, settings }) {
  const { skill, train, judges } = rowsOf(left);
  const started = performance.now();
  const name = `${left}, ${way}, seed ${seed}`;
  const found = MADE.has(way)
    ? await make(session, left, way, seed, examplesOf(skill, train))
    : await fit(session, way, seed, examplesOf(skill, train), name);
  const seconds = (performance.now() - started) / 1000;
  await session.switchTask(found.task);
  const { exact, nll } = scoreOf(await force(/** @type {any} */ (ort), session, questionsOf(skill, tokens, judges)));
  const { trained } = found;
  return { skill: left, way, seed, judge: given.judge, trained, nll, exact: exact / 100, seconds, settings };
}

/** Rows to learn from, and rows to judge by. @param {string} left */
function rowsOf(left) {
  const skill = skills.get(left);
  if (!skill) throw new Error(`${left}: expected ${[...skills.keys()].join(", ")}`);
  const train = given.judge === "train" ? skill.train.slice(0, -JUDGES) : skill.train;
  return { skill, train, judges: given.judge === "train" ? skill.train.slice(-JUDGES) : skill.test };
}

/**
 * Trained by PEFT, and answered by our session.
 * @param {string} left @param {{ way: Way, seed: number, settings: string }} run
 * @returns {Promise<Cell>}
 */
async function learnApart(left, { way, seed, settings }) {
  const { skill, train, judges } = rowsOf(left);
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-llm-learn-"));
  try {
    const started = performance.now();
    const how = [seed, given.steps, given.batch, given["lora-rate"]].map(String);
    const rows = JSON.stringify(questionsOf(skill, tokens, train));
    const made = python("llm_learn.py", [smollm2File("."), join(folder, "learned"), ...how], rows);
    if ("reason" in made) throw new Error(`peft: ${made.reason}`);
    const seconds = (performance.now() - started) / 1000;
    const bytes = await withAdapters([join(folder, "learned")], (own) =>
      packOf(own, { select: { kind: "energy", share: 1 }, dtype: DTYPES }),
    );
    const pack = await openPack(bytes);
    const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), pack, {
      session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
    });
    await session.switchTask("learned");
    const { exact, nll } = scoreOf(await force(/** @type {any} */ (ort), session, questionsOf(skill, tokens, judges)));
    await session.close();
    await pack.close();
    const { trained } = made.figures;
    return { skill: left, way, seed, judge: given.judge, trained, nll, exact: exact / 100, seconds, settings };
  } finally {
    await rm(folder, { recursive: true });
  }
}

/**
 * Trains on rows.
 * @param {Session} session @param {Way} way @param {number} seed
 * @param {{ prompt: string, completion: string }[]} examples @param {string} name
 */
async function fit(session, way, seed, examples, name) {
  const { rank, steps, batch, rate, init } = given;
  const lora = way === "lora" || way === "lora-1";
  const how = lora
    ? { train: /** @type {const} */ ("lora"), rank: way === "lora" ? 8 : 1 }
    : { rank: way === "flat" ? 1 : rank, init };
  const trainer = await createTrainer(session, { encode, seed, ...how });
  const learningRates = { terms: lora ? given["lora-rate"] : rate };
  for await (const { step, loss } of trainer.fit(examples, { steps, batch, learningRates }))
    if (step % 10 === 0) progress(`${name}: step ${step}, loss ${loss.toFixed(3)}`);
  await session.addTask(name, await trainer.task({ id: name, dtype: DTYPES }));
  return { task: name, trained: trainer.size.terms };
}

/**
 * Makes a task of the skill's own adapter, of the donors, or of nothing.
 * @param {Session} session @param {string} left @param {Way} way @param {number} seed
 * @param {{ prompt: string, completion: string }[]} examples
 * @returns {Promise<{ task: string | null, trained: number }>}
 */
async function make(session, left, way, seed, examples) {
  if (way === "base") return { task: null, trained: 0 };
  const { pack } = session;
  const { rank, steps, batch } = given;
  const task = `${left}, ${way}, ${seed}`;
  if (way === "zero-shot") {
    await session.addTask(task, await zeroShotTask(pack, { init: "random", seed, rank, dtype: DTYPES }));
    return { task, trained: 0 };
  }
  const adapter = adapters.find(({ id }) => id === left);
  if (!adapter) throw new Error(`${given.adapters} has no adapter "${left}"`);
  const [{ entry, blob }] = await projectAdapters(pack, [adapter], DTYPES, { maxLoss: 1 });
  await session.addTask(task, encodeTaskFile(entry, pack.basisId, blob));
  if (way === "analytical") return { task, trained: 0 };
  const { file } = await distill(session, { adapter, task, examples, encode, seed, steps, batch });
  session.removeTask(task);
  await session.addTask(task, file);
  const { terms } = await pack.load(task);
  const count = (/** @type {{ tensor: { rows: number, width: number } } | undefined} */ side) =>
    side ? side.tensor.rows * side.tensor.width : 0;
  return { task, trained: terms.reduce((sum, { A, B }) => sum + count(A) + count(B), 0) };
}

/** One row for each skill and way. */
function report() {
  const rows = given.skills.split(",").flatMap((name) =>
    waysOf().map((way) => {
      const settings = settingsOf(way);
      const own = cells.filter((cell) => seedsOf(way).some((seed) => isRun(cell, name, { way, seed, settings })));
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
  const notes = waysOf().map((way) => `${way}: ${settingsOf(way)}`);
  print(given.json, [{ question: QUESTION, rows, notes }]);
}

/**
 * SmolLM2 with real adapters in lossless packs, on all test rows: a row counts where the greedy answer is PEFT's, token for token; at
 * least 99.5 % must be. onnxruntime-node in every mode and onnxruntime-web's WASM by teacher forcing, transformers.js by generating.
 * Skipped by name without EIGENLORA_SMOLLM2 (CONTRIBUTING.md); transformers.js without EIGENLORA_RUNTIMES.
 *
 * usage: node test/soak-llm.js [--adapters FOLDER] [--rows N] [WAY...]
 *   FOLDER   holds adapters/ and adapters-all-linear/, each a pack. Default: the six of test/data/smollm2
 *   N        rows of a task, the first. Default: all
 *   WAY      one of the ways below. Default: all
 */
import "./no-telemetry.js";
import { existsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { attachPack } from "eigenlora/transformers";
import * as node from "onnxruntime-node";
import * as web from "onnxruntime-web";
import { NO_SMOLLM2, smollm2, smollm2File } from "../benchmarks/lib/skills.js";
import { losslessPack, MODEL, pipelineOn, readCases, wrongGenerated, wrongOf } from "./skills.js";

/** @typedef {import("./skills.js").Case} Case @typedef {"core" | "factors" | "folded" | "auto"} Mode */
/** @typedef {{ switchTask(task: string): Promise<unknown>, wrong(cases: readonly Case[]): Promise<Case[]>, close(): Promise<void> }} Answerer */

/** Least share of equal rows. Sums in another order than torch's decide ties between two tokens otherwise. */
const LEAST = 0.995;
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };
const transformers = join(process.env["EIGENLORA_RUNTIMES"] ?? "", "node_modules/@huggingface/transformers");

/** @type {Record<string, (pack: import("eigenlora").Pack) => Promise<Answerer>>} */
const WAYS = {
  "node-core": (pack) => onOrt(node, pack, "core"),
  "node-factors": (pack) => onOrt(node, pack, "factors"),
  "node-folded": (pack) => onOrt(node, pack, "folded"),
  "node-q4-factors": (pack) => onOrt(node, pack, "factors", "onnx/model_q4.onnx"),
  "web-factors": (pack) => onOrt(/** @type {any} */ (web), pack, "factors"),
  "transformers-factors": onTransformers,
};

/** @param {typeof node} ort @param {import("eigenlora").Pack} pack @param {Mode} mode @param {string} [file] @returns {Promise<Answerer>} */
async function onOrt(ort, pack, mode, file = "onnx/model.onnx") {
  const session = await createEigenSession(ort, smollm2File(file), pack, { mode, session: ONE_THREAD });
  return {
    switchTask: (task) => session.switchTask(task),
    wrong: (cases) => wrongOf(ort, session, cases),
    close: () => session.close(),
  };
}

/** @param {import("eigenlora").Pack} pack @returns {Promise<Answerer>} */
async function onTransformers(pack) {
  const pipe = await pipelineOn(transformers, { session_options: ONE_THREAD });
  const options = /** @type {const} */ ({
    model: MODEL,
    mode: "factors",
    session: ONE_THREAD,
  });
  const tasks = await attachPack(pipe, pack, options);
  return {
    switchTask: (task) => tasks.switchTask(task),
    wrong: (cases) => wrongGenerated(pipe, cases),
    async close() {
      await tasks.close();
      await pipe.dispose();
    },
  };
}

/** @param {string} way @param {string} folder @param {string} kind @param {(kind: string, task: string) => Case[]} casesOf */
async function check(way, folder, kind, casesOf) {
  const pack = await openPack(await losslessPack([join(folder, kind)]));
  const answerer = await WAYS[way](pack);
  let [rows, wrong] = [0, 0];
  const started = performance.now();
  for (const task of pack.tasks.keys()) {
    await answerer.switchTask(task);
    const cases = casesOf(kind, task);
    const others = await answerer.wrong(cases);
    rows += cases.length;
    wrong += others.length;
    for (const { text, answer } of others)
      console.log(`  ${way}, ${kind}/${task}: not ${answer.join(" ")} for ${text}`);
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(0);
  const figure = `${rows - wrong} of ${rows} rows as PEFT`;
  console.log(`${way}, ${kind}: ${pack.tasks.size} adapters, ${figure} (${seconds} s)`);
  await answerer.close();
  await pack.close();
  if (!(rows - wrong >= LEAST * rows)) throw new Error(`${way}, ${kind}: ${figure}, expected ${100 * LEAST} %`);
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      adapters: { type: "string", default: fileURLToPath(new URL("data/smollm2", import.meta.url)) },
      rows: { type: "string", default: "Infinity" },
    },
  });
  const unknown = positionals.find((way) => !(way in WAYS));
  if (unknown) throw new Error(`${unknown}: expected ${Object.keys(WAYS).join(", ")}`);
  node.env.logLevel = "error";
  web.env.logLevel = "error";
  web.env.wasm.numThreads = 1;
  const casesOf = await readCases(Number(values.rows));
  const kinds = (await readdir(values.adapters)).filter((name) => /^adapters(-all-linear)?$/.test(name));
  if (kinds.length === 0) throw new Error(`${values.adapters} has no adapters and no adapters-all-linear`);
  for (const way of positionals.length > 0 ? positionals : Object.keys(WAYS)) {
    if (way.startsWith("transformers") && !existsSync(transformers)) {
      console.log(`${way}: skipped (EIGENLORA_RUNTIMES has no transformers.js)`);
      continue;
    }
    for (const kind of kinds) await check(way, values.adapters, kind, casesOf);
  }
}

if (smollm2) await main();
else if (/\bsmollm2\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "")) throw new Error(NO_SMOLLM2);
else console.log(`skipped: ${NO_SMOLLM2}`);

/**
 * The fewest bytes for the same behaviour: prints what version 0.3.0 measured of all ways to store a suite's adapters,
 * from results/size.jsonl, and of distilled packs, from results/distill.jsonl. With `--measure`, the main ways are
 * packed again and asked the test rows. Docs: docs/research/size.md.
 */
import { readFile } from "node:fs/promises";
import { buildPack, searchPack } from "eigenlora/build";
import { mean, sum } from "simple-statistics";
import { bytesOfAdapter, SUITES } from "../lib/adapters.js";
import { choice, flag, readArguments } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import { LOSSLESS, Suite } from "../lib/suite.js";

/** @typedef {import("../lib/report.js").Row} Row */

/** Main ways, named as in the results. @type {Record<string, import("eigenlora/build").BuildOptions>} */
const WAYS = {
  "lossless pack, f32": LOSSLESS,
  "column K 32, f16": column(32, "f16", {}),
  "balanced column K 32, rank 4, int4": column(32, "int4", { gauge: "balanced", rank: 4 }),
  "balanced column K 48, rank 4, int3, heads int4": column(48, "int3", { gauge: "balanced", rank: 4 }),
  "SVD-cut, coded, step 0.0283": coded(0, 0.0283),
  "coded K 48, rank 2, step 0.0421": coded(48, 0.0421, 2),
};

const QUESTION = "The fewest bytes for the same behaviour";
const given = readArguments(QUESTION, {
  suite: choice(SUITES, "this one alone"),
  measure: flag("pack the main ways again, instead of printing all that were measured"),
});
const parts = [];
for (const name of SUITES) if (!given.suite || given.suite === name) parts.push(await partOf(name));
print(given.json, parts);

/** @param {typeof SUITES[number]} name @returns {Promise<import("../lib/report.js").Part>} */
async function partOf(name) {
  const stored = (await readLines("size.jsonl")).filter((row) => row.suite === name);
  const all = Math.max(...stored.map(({ n }) => n));
  const lora = stored.find(({ n, way }) => n === all && way === "LoRA, f32");
  const question = `${name}, ${all} adapters: what do the tasks still answer, for how many bytes? (MiniLM, r 8)`;
  if (given.measure) {
    const notes = ["ΔW error: of all modules of a task together; in stored results the mean over modules."];
    return { question, rows: await measure(name), notes };
  }
  // The last of two measurements counts.
  const asked = new Map(stored.filter(({ n, accuracy }) => n === all && accuracy).map((row) => [row.way, row]));
  const rows = [...asked.values(), ...(await readDistilled(name))].sort((a, b) => a.bytes - b.bytes);
  return {
    question,
    rows: rows.map(({ way, bytes, error, accuracy }) => rowOf(way, bytes, lora.bytes, error, accuracy)),
    notes: [
      "Means over tasks, at most 240 test rows each. kB: 1 kB = 1000 B, all tasks with their heads. × fewer: than f32.",
    ],
  };
}

/**
 * @param {string} name
 * @param {number} bytes
 * @param {number} whole bytes of the adapters in f32
 * @param {number | undefined} error
 * @param {readonly number[]} accuracy of each task
 * @returns {Row}
 */
function rowOf(name, bytes, whole, error, accuracy) {
  const fewer = whole / bytes;
  return {
    name,
    kB: bytes / 1000,
    "× fewer": fewer,
    "ΔW error": error ?? null,
    "accuracy, %": 100 * mean([...accuracy]),
  };
}

/** @param {typeof SUITES[number]} name */
async function measure(name) {
  const suite = await Suite.open(name);
  const whole = sum(suite.adapters.map(bytesOfAdapter));
  /** @type {Row[]} */
  const rows = [];
  for (const way of [...Object.keys(WAYS), "default"]) {
    progress(way);
    const { chunks, report } = await (way in WAYS ? buildPack(suite.adapters, WAYS[way]) : searchPack(suite.adapters));
    const right = (await suite.answers(chunks)).map((one) => one.right);
    rows.push(rowOf(way, report.bytes, whole, mean(report.errors.map(({ total }) => total)), right));
  }
  await suite.close();
  return rows;
}

/** Packs whose tasks are all distilled. @param {string} suite */
async function readDistilled(suite) {
  const lines = (await readLines("distill.jsonl")).filter(
    ({ bytes, settings }) => bytes && JSON.parse(settings).SUITE === suite,
  );
  return [...new Set(lines.map(({ settings }) => settings))].map((settings) => {
    const { SUITE: _, ...options } = JSON.parse(settings);
    const rows = lines.filter((line) => line.settings === settings).map(({ row }) => row);
    const grown = rows.map((row) => (row["blob after, bytes"] ?? 0) - (row["blob before, bytes"] ?? 0));
    const { bytes } = lines.find((line) => line.settings === settings);
    const names = ["K", "RATIO", "RANK", "STEP", "HEAD_STEP", "STEPS"].filter((key) => options[key] !== undefined);
    const way = `distilled, ${names.map((key) => `${key.toLowerCase().replace("_", "-")} ${options[key]}`).join(", ")}`;
    return { way, bytes: bytes + sum(grown), error: undefined, accuracy: rows.map((row) => row["distilled, %"] / 100) };
  });
}

/** @param {string} name @returns {Promise<any[]>} */
async function readLines(name) {
  const text = await readFile(new URL(`results/${name}`, import.meta.url), "utf8");
  return text
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line));
}

/**
 * @param {number} k
 * @param {"f16" | "int4" | "int3"} type
 * @param {import("eigenlora/build").BuildOptions} more
 * @returns {import("eigenlora/build").BuildOptions}
 */
function column(k, type, more) {
  const head = type === "int3" ? "int4" : type;
  return { select: { kind: "k", k }, dtype: { basis: type, coefficients: type, head }, ...more };
}

/** @param {number} k @param {number} step @param {number} [rank] @returns {import("eigenlora/build").BuildOptions} */
function coded(k, step, rank) {
  const shape = rank ? { rank } : {};
  return { gauge: "balanced", select: { kind: "k", k }, ...shape, step, headStep: 0.5 };
}

/**
 * The fewest bytes for the same behaviour: real adapters of three suites, 5, 10, 20 or all of them, packed in every mode, gauge and
 * number format, beside each adapter by itself and beside PyPI's lorashare and vlora-dev (PYTHON). Bytes against ΔW error for all,
 * against accuracy on real test rows, through a live session of onnxruntime-node, for those that could be chosen. Docs: docs/research/size.md.
 *
 * Then entropy-coded packs by bytes, with and without shared components (size/curve.js): what sharing gains beside the same coder. For
 * SmolLM2's adapters (EIGENLORA_SMOLLM2, --adapters) and published ones of Stable Diffusion (EIGENLORA_WILD) too.
 *
 * What is measured is kept in results/size.jsonl and not measured again; `--minutes 0` makes tables and figures of what there is.
 * After a change of the format, `--recode --part sizes` takes the bytes of coded packs again and keeps what their tasks answered.
 * What distilling wins back is read from results/distill.jsonl, where `bench distill --into` has put it.
 */
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { mean, sum } from "simple-statistics";
import { SUITES } from "../lib/adapters.js";
import { choice, flag, number, readArguments, text } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import { Rows } from "../lib/rows.js";
import { SETTINGS } from "../lib/settings.js";
import { shapesPart } from "../lib/shapes.js";
import { NO_SMOLLM2, smollm2 } from "../lib/skills.js";
import { askCurve, CURVES, measureSizes } from "./size/curve.js";
import { curvePage, curveTables, published } from "./size/curve-tables.js";
import { drawCurves, drawFigures } from "./size/figures.js";
import { keyOf, measure } from "./size/measure.js";
import { Peers } from "./size/peers.js";
import { Skills } from "./size/skills.js";
import { Suite } from "./size/suite.js";
import { Reader, tables } from "./size/tables.js";
import { byThemselves, found, frontier, grid, nameOf, small, within } from "./size/ways.js";

/** @typedef {import("./size/measure.js").Row} Row */

const given = readArguments("The fewest bytes for the same behaviour", {
  suite: choice([...SUITES, "smollm2", "sd15"], "this one alone"),
  part: choice(["ways", "sizes", "answers"], "this part alone; the last two are of coded packs"),
  adapters: text("FOLDER", "those of the suite smollm2"),
  recode: flag(
    "measure coded packs' bytes again, since their format has changed; what the same numbers answer is kept",
  ),
  minutes: number("measure for so long", Infinity),
  shapes: flag("also pack the paper's two settings by shape"),
  rows: text("FILE", "where rows are kept. Default: benchmarks/research/results/size.jsonl"),
  figures: text("FOLDER", "where figures go. Default: docs/research/size"),
});
const until = performance.now() + 60_000 * given.minutes;
const file = given.rows ? pathToFileURL(resolve(given.rows)) : new URL("results/size.jsonl", import.meta.url);
/** @type {Rows<Row, Parameters<typeof keyOf>[0]>} */
const rows = new Rows(file, keyOf);
await rows.load();
const names = SUITES.filter((name) => given.suite === undefined || name === given.suite);
const suites = await Promise.all(names.map((name) => Suite.open(name)));
const peers = await Peers.start();
/** Missing suites. @type {{ name: string, reason: string }[]} */
const absent = [];

if (given.part === undefined || given.part === "ways") await measureWays();
if (given.part !== "ways") for (const curve of CURVES) await measureCurve(curve);
if (given.recode) await rows.save();
peers.stop();

const distilled = await readDistilled();
const reader = new Reader(rows.all(), suites, distilled);
const folder = given.figures
  ? pathToFileURL(`${resolve(given.figures)}/`)
  : new URL("../../docs/research/size/", import.meta.url);
await mkdir(folder, { recursive: true });
for (const [name, svg] of [...drawFigures(reader), ...drawCurves(rows.all(), distilled)])
  await writeFile(new URL(`${name}.svg`, folder), svg);
const page = curvePage(rows.all());
if (page) await writeFile(new URL("curves.md", folder), page);
const settings = /** @type {import("../lib/settings.js").SettingName[]} */ (given.shapes ? Object.keys(SETTINGS) : []);
const others = /** @type {const} */ (["lorashare", "vlora"]).map((name) => ({
  name,
  ...(peers.reason ? { reason: peers.reason } : { version: peers.versions[name] }),
}));
const parts = [...tables(reader), ...curveTables(rows.all()), published()];
print(given.json, [...parts, ...settings.map((name) => shapesPart(name))], [...others, ...absent]);
for (const suite of suites) await suite.close();

/** Measures every way on bundled suites, the most informative ones first, so that a run of a few minutes is useful. */
async function measureWays() {
  for (const suite of suites)
    await run(suite, suite.adapters.length, [...small(suite.adapters.length), ...byThemselves()], true);
  for (const suite of suites) for (const n of suite.sizes) await run(suite, n, grid(n), false);
  for (const suite of suites) for (const n of suite.sizes) await run(suite, n, small(n), true);
  for (const suite of suites) await run(suite, suite.adapters.length, frontier(suite.adapters.length), true);
  for (const n of [...new Set(suites.flatMap(({ sizes }) => sizes))].sort((a, b) => a - b))
    for (const suite of suites) if (suite.sizes.includes(n)) await run(suite, n, within(), false);
  for (const suite of suites) for (const n of suite.sizes) await run(suite, n, found(n), n === suite.adapters.length);
}

/** @param {import("./size/curve.js").Curve} curve */
async function measureCurve(curve) {
  const suite = suites.find(({ name }) => name === curve.suite) ?? (await openOther(curve.suite));
  if (!suite) return;
  const measuring = { suite, rows, keep, due: () => performance.now() >= until, peers, again: given.recode };
  if (given.part !== "answers") await measureSizes(curve, measuring);
  if (given.part !== "sizes") await askCurve(curve, measuring);
  if (!suites.includes(suite)) await suite.close();
}

/** @param {Suite} suite @param {number} n @param {readonly import("./size/ways.js").Way[]} ways @param {boolean} asks */
async function run(suite, n, ways, asks) {
  for (const way of ways) {
    if (performance.now() >= until) return;
    const known = rows.get({ suite: suite.name, n, way: nameOf(way) });
    if (known && (known.accuracy || !asks)) continue;
    if ((way.kind === "lorashare" || way.kind === "vlora") && peers.reason) continue;
    const most =
      way.kind === "auto" && "within" in way
        ? new Reader(rows.all(), suites).fileBytes(suite, n, nameOf(way.within))
        : undefined;
    if (Number.isNaN(most)) continue;
    await keep(await measure(suite, n, way, asks, peers, most));
  }
}

/** Opens a suite that is not bundled, or reports why it is missing. @param {string} name */
async function openOther(name) {
  if (given.suite !== undefined && given.suite !== name) return undefined;
  const wild = process.env["EIGENLORA_WILD"];
  if (name === "smollm2" && given.adapters && smollm2) return Skills.open(name, given.adapters);
  if (name === "sd15" && wild) return Suite.open(name, join(wild, name));
  if (name === "smollm2") absent.push({ name, reason: smollm2 ? "--adapters names no folder" : NO_SMOLLM2 });
  if (name === "sd15") absent.push({ name, reason: `EIGENLORA_WILD names no folder with ${name}` });
  return undefined;
}

/** @param {Row} row */
async function keep(row) {
  await rows.add(row);
  const accuracy = row.accuracy ? `accuracy ${mean(row.accuracy).toFixed(4)}, ` : "";
  progress(`${keyOf(row)}: ${row.bytes} B, error ${row.error}, ${accuracy}${row.seconds} s`);
}

/** Packs of a size, all tasks distilled. @returns {Promise<import("./size/tables.js").Distilled[]>} */
async function readDistilled() {
  const text = await readFile(new URL("results/distill.jsonl", import.meta.url), "utf8").catch(() => "");
  const lines = text
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line))
    .filter(({ bytes }) => bytes);
  return [...new Set(lines.map(({ settings }) => settings))].map((settings) => {
    const { SUITE: suite, RATIO, K, RANK, TYPES, GAUGE, STEP, HEAD_STEP } = JSON.parse(settings);
    const own = lines.filter((line) => line.settings === settings);
    const size = RATIO === undefined ? `K ${K}` : `${RATIO} times fewer bytes`;
    const types = Object.entries(TYPES ?? { basis: "f16" }).map((part) => part.join(" "));
    const way = [
      `${GAUGE} column`,
      ...(RANK ? [`rank ${RANK}`] : []),
      ...(STEP ? [`step ${STEP}`, `heads ${HEAD_STEP}`] : types),
      size,
      "distilled",
    ].join(", ");
    // Coded blobs grow or shrink.
    const grown = (/** @type {{ row: Record<string, number> }} */ { row }) =>
      (row["blob after, bytes"] ?? 0) - (row["blob before, bytes"] ?? 0);
    const share = (/** @type {string} */ what) => own.map(({ row }) => row[what] / 100);
    return {
      suite,
      way,
      bytes: own[0].bytes + sum(own.map(grown)),
      accuracy: share("distilled, %"),
      ...(STEP ? { before: { bytes: own[0].bytes, accuracy: share("projected, %") } } : {}),
    };
  });
}

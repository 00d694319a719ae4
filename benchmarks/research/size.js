/**
 * The fewest bytes for the same behaviour: real adapters of three suites, 5, 10, 20 or all of them, packed in every mode, gauge and
 * number format, beside each adapter by itself and beside PyPI's lorashare and vlora-dev (PYTHON). Bytes against ΔW error for all,
 * against accuracy on real test rows, through a live session of onnxruntime-node, for those that could be chosen. Docs: docs/size.md.
 *
 * What is measured is kept in results/size.jsonl and not measured again; `--minutes 0` makes tables and figures of what there is.
 * What distilling wins back is read from results/distill.jsonl, where `bench distill --into` has put it.
 */
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { mean } from "simple-statistics";
import { SUITES } from "../lib/adapters.js";
import { choice, flag, number, readArguments, text } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";
import { Rows } from "../lib/rows.js";
import { SETTINGS } from "../lib/settings.js";
import { shapesPart } from "../lib/shapes.js";
import { drawFigures } from "./size/figures.js";
import { keyOf, measure } from "./size/measure.js";
import { Peers } from "./size/peers.js";
import { Suite } from "./size/suite.js";
import { Reader, tables } from "./size/tables.js";
import { byThemselves, found, frontier, grid, nameOf, small, within } from "./size/ways.js";

/** @typedef {import("./size/measure.js").Row} Row */

const given = readArguments("The fewest bytes for the same behaviour", {
  suite: choice(SUITES, "this one alone"),
  minutes: number("measure for so long", Infinity),
  shapes: flag("also pack the paper's two settings by shape"),
  rows: text("FILE", "where rows are kept. Default: benchmarks/research/results/size.jsonl"),
  figures: text("FOLDER", "where figures go. Default: docs/size"),
});
const until = performance.now() + 60_000 * given.minutes;
const file = given.rows ? pathToFileURL(resolve(given.rows)) : new URL("results/size.jsonl", import.meta.url);
/** @type {Rows<Row, Parameters<typeof keyOf>[0]>} */
const rows = new Rows(file, keyOf);
await rows.load();
const names = SUITES.filter((name) => given.suite === undefined || name === given.suite);
const suites = await Promise.all(names.map((name) => Suite.open(name)));
const peers = await Peers.start();

// What says most comes first, so that a run of a few minutes says something.
for (const suite of suites)
  await run(suite, suite.adapters.length, [...small(suite.adapters.length), ...byThemselves()], true);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, grid(n), false);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, small(n), true);
for (const suite of suites) await run(suite, suite.adapters.length, frontier(suite.adapters.length), true);
for (const n of [...new Set(suites.flatMap(({ sizes }) => sizes))].sort((a, b) => a - b))
  for (const suite of suites) if (suite.sizes.includes(n)) await run(suite, n, within(), false);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, found(n), n === suite.adapters.length);
for (const suite of suites)
  await run(
    suite,
    suite.adapters.length,
    found(suite.adapters.length)
      .slice(1)
      .map((way) => ({ ...way, judged: true })),
    true,
  );
peers.stop();

const reader = new Reader(rows.all(), suites, await readDistilled());
const folder = given.figures
  ? pathToFileURL(`${resolve(given.figures)}/`)
  : new URL("../../docs/size/", import.meta.url);
await mkdir(folder, { recursive: true });
for (const [name, svg] of drawFigures(reader)) await writeFile(new URL(`${name}.svg`, folder), svg);
const settings = /** @type {import("../lib/settings.js").SettingName[]} */ (given.shapes ? Object.keys(SETTINGS) : []);
const others = /** @type {const} */ (["lorashare", "vlora"]).map((name) => ({
  name,
  ...(peers.reason ? { reason: peers.reason } : { version: peers.versions[name] }),
}));
print(given.json, [...tables(reader), ...settings.map((name) => shapesPart(name))], others);
for (const suite of suites) await suite.close();

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
    const { SUITE: suite, RATIO, K, RANK, TYPES, GAUGE } = JSON.parse(settings);
    const own = lines.filter((line) => line.settings === settings);
    const size = RATIO === undefined ? `K ${K}` : `${RATIO} times fewer bytes`;
    const way = [
      `${GAUGE} column`,
      ...(RANK ? [`rank ${RANK}`] : []),
      ...Object.entries(TYPES ?? { basis: "f16" }).map((part) => part.join(" ")),
      size,
      "distilled",
    ].join(", ");
    return { suite, way, bytes: own[0].bytes, accuracy: own.map(({ row }) => row["distilled, %"] / 100) };
  });
}

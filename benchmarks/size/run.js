/**
 * The fewest bytes for the same behaviour: real adapters of three suites, 5, 10, 20 or all of them, packed in every mode, gauge and
 * number format, beside each adapter by itself and beside PyPI's lorashare and vlora-dev (PYTHON). Bytes against ΔW error for all,
 * against accuracy on real test rows, through a live session of onnxruntime-node, for those that could be chosen. Docs: docs/size.md.
 *
 * node benchmarks/size/run.js [--suite NAME] [--minutes N] [--shapes] [--rows FILE] [--figures FOLDER] [--json]   after npm run build
 *
 * What is measured is kept in rows.jsonl and not measured again; `--minutes 0` makes tables and figures of what there is.
 * What distilling wins back is read from ../results/distill.jsonl, where `bench distill --into` has put it. `--shapes` also packs the paper's two settings by shape (shapes.js).
 */
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { option, printParts } from "../report.js";
import { Rows } from "../rows.js";
import { SETTINGS, shapesPart } from "../shapes.js";
import { keyOf, measure, Peers } from "./measure.js";
import { SUITES, Suite } from "./suite.js";
import { drawFigures, Reader, tables } from "./tables.js";
import { byThemselves, found, frontier, grid, nameOf, small, within } from "./ways.js";

/** @typedef {import("./measure.js").Row} Row */

const kept = option("rows");
const into = option("figures");
const only = option("suite");
const until = performance.now() + 60_000 * Number(option("minutes") ?? Infinity);
const late = () => performance.now() >= until;

const names = SUITES.filter((name) => only === undefined || name === only);
if (names.length === 0) throw new RangeError(`--suite ${only}: expected ${SUITES.join(", ")}`);
/** @type {Rows<Row, Parameters<typeof keyOf>[0]>} */
const rows = new Rows(kept ? pathToFileURL(resolve(kept)) : new URL("rows.jsonl", import.meta.url), keyOf);
await rows.load();
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
const folder = into ? pathToFileURL(`${resolve(into)}/`) : new URL("../../docs/size/", import.meta.url);
await mkdir(folder, { recursive: true });
for (const [name, svg] of drawFigures(reader)) await writeFile(new URL(`${name}.svg`, folder), svg);
const parts = tables(reader);
if (process.argv.includes("--shapes")) {
  parts.push(...Object.keys(SETTINGS).map((name) => shapesPart(name)));
}
const { reason, versions } = peers;
printParts(
  parts,
  /** @type {const} */ (["lorashare", "vlora"]).map((name) => ({
    name,
    ...(reason ? { reason } : { version: versions[name] }),
  })),
);
for (const suite of suites) await suite.close();

/** @param {Suite} suite @param {number} n @param {readonly import("./ways.js").Way[]} ways @param {boolean} asks */
async function run(suite, n, ways, asks) {
  for (const way of ways) {
    if (late()) return;
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
  const accuracy = row.accuracy && row.accuracy.reduce((a, b) => a + b, 0) / row.accuracy.length;
  process.stderr.write(
    `${keyOf(row)}: ${row.bytes} B, error ${row.error}, ${accuracy ? `accuracy ${accuracy.toFixed(4)}, ` : ""}${row.seconds} s\n`,
  );
}

/** Packs of a size, all tasks distilled. @returns {Promise<import("./tables.js").Distilled[]>} */
async function readDistilled() {
  const text = await readFile(new URL("../results/distill.jsonl", import.meta.url), "utf8").catch(() => "");
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

/**
 * The fewest bytes for the same behaviour: real adapters of three suites, 5, 10, 20 or all of them, packed in every mode, gauge and
 * number format, beside each adapter by itself and beside PyPI's lorashare and vlora-dev (PYTHON). Bytes against ΔW error for all,
 * against accuracy on real test rows, through a live session of onnxruntime-node, for those that could be chosen. Docs: docs/size.md.
 *
 * node benchmarks/size/run.js [--suite NAME] [--minutes N] [--distilled] [--shapes] [--rows FILE] [--figures FOLDER] [--json]   after npm run build
 *
 * What is measured is kept in rows.jsonl and not measured again; `--minutes 0` makes tables and figures of what there is.
 * `--distilled` also distils, some 25 s a task; `--shapes` also packs the paper's two settings by shape (shapes.js).
 */
import { mkdir, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { option, printParts } from "../report.js";
import { Rows } from "../rows.js";
import { SETTINGS, shapesPart } from "../shapes.js";
import { keyOf, measure, measureDistilled, Peers } from "./measure.js";
import { Suite, SUITES } from "./suite.js";
import { drawFigures, Reader, tables } from "./tables.js";
import { byThemselves, distilled, found, frontier, grid, nameOf, small, within } from "./ways.js";

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
for (const suite of suites) await run(suite, suite.adapters.length, [...small(suite.adapters.length), ...byThemselves()], true);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, grid(n), false);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, small(n), true);
for (const suite of suites) await run(suite, suite.adapters.length, frontier(suite.adapters.length), true);
for (const n of [...new Set(suites.flatMap(({ sizes }) => sizes))].sort((a, b) => a - b)) for (const suite of suites) if (suite.sizes.includes(n)) await run(suite, n, within(), false);
for (const suite of suites) for (const n of suite.sizes) await run(suite, n, found(n), n === suite.adapters.length);
for (const suite of suites) await run(suite, suite.adapters.length, found(suite.adapters.length).slice(1).map((way) => ({ ...way, judged: true })), true);
if (process.argv.includes("--distilled")) {
  for (const suite of suites) {
    const n = suite.adapters.length;
    for (const way of distilled(n)) {
      if (late()) break;
      const wanted = (/** @type {string} */ task) => !rows.get({ suite: suite.name, n, way: nameOf(way), task });
      await measureDistilled(suite, n, way, wanted, async (row) => {
        await keep(row);
        return !late();
      });
    }
  }
}
peers.stop();

const reader = new Reader(rows.all(), suites);
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
  /** @type {const} */ (["lorashare", "vlora"]).map((name) => ({ name, ...(reason ? { reason } : { version: versions[name] }) })),
);
for (const suite of suites) await suite.close();

/** @param {Suite} suite @param {number} n @param {readonly import("./ways.js").Way[]} ways @param {boolean} asks */
async function run(suite, n, ways, asks) {
  for (const way of ways) {
    if (late()) return;
    const known = rows.get({ suite: suite.name, n, way: nameOf(way) });
    if (known && (known.accuracy || !asks)) continue;
    if ((way.kind === "lorashare" || way.kind === "vlora") && peers.reason) continue;
    const most = way.kind === "auto" && "within" in way ? new Reader(rows.all(), suites).fileBytes(suite, n, nameOf(way.within)) : undefined;
    if (Number.isNaN(most)) continue;
    await keep(await measure(suite, n, way, asks, peers, most));
  }
}

/** @param {Row} row */
async function keep(row) {
  await rows.add(row);
  const accuracy = row.accuracy && row.accuracy.reduce((a, b) => a + b, 0) / row.accuracy.length;
  process.stderr.write(`${keyOf(row)}: ${row.bytes} B, error ${row.error}, ${accuracy ? `accuracy ${accuracy.toFixed(4)}, ` : ""}${row.seconds} s\n`);
}

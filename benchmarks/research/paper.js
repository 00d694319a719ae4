/**
 * The paper's experiments on real text: tasks made of Debian's package descriptions, MiniLM, adapters of PEFT. Docs: docs/research/paper.md.
 *
 * Measurements are kept in cells.jsonl and not repeated; `--minutes 0` makes tables and figures of them.
 */
import { mkdir, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { readReference } from "../../examples/minilm.js";
import { flag, number, readArguments, text } from "../lib/arguments.js";
import { environment, progress } from "../lib/report.js";
import { Bench, keyOf, Results } from "./paper/cells.js";
import { domainOf, experiments, HUB_SPLIT, HUB_TEST, readHubSplit, readTasks, searchSplit } from "./paper/data.js";
import { drawFigures } from "./paper/figures.js";
import { reasonAgainst } from "./paper/peers.js";
import { nextCells } from "./paper/plan.js";
import { claimTable, methodTable, Reader, rateTable, taskTable, toMarkdown } from "./paper/tables.js";

const given = readArguments("The paper's experiments on real text", {
  results: text("FOLDER", "where cells, tables and figures are. Default: benchmarks/research/results/paper"),
  minutes: number("measure for so long", Infinity),
  split: flag("find the hub's split again"),
});
const folder = given.results ? pathToFileURL(`${resolve(given.results)}/`) : new URL("results/paper/", import.meta.url);
const until = performance.now() + 60_000 * given.minutes;

const tasks = await readTasks();
if (given.split) {
  const found = searchSplit(new Map([...tasks].filter(([id]) => domainOf(id) === "hub")), { count: HUB_TEST });
  await writeFile(HUB_SPLIT, `${JSON.stringify(found, null, 2)}\n`);
}
await mkdir(folder, { recursive: true });
const suites = experiments(tasks, await readHubSplit());
const results = await Results.open(new URL("cells.jsonl", folder));
const bench = await Bench.create(tasks, suites);
const reason = reasonAgainst();
const next = () => nextCells(results, suites, { peers: !reason });
for (let cells = next(); cells.length > 0 && performance.now() < until; cells = next()) {
  for (const cell of cells) {
    if (performance.now() >= until) break;
    const row = await bench.run(cell);
    await results.add(row);
    progress(`${keyOf(cell)}: ${row.seconds} s, validation ${row.validation?.accuracy}`);
  }
}

if (reason && nextCells(results, suites, { peers: true }).length > 0)
  progress(`VeRA and PiSSA are not measured: ${reason}`);
const references = { "shared-seed": await readReference("shared-seed"), hub: await readReference("hub") };
const reader = new Reader(results, tasks, suites, references);
const tables = [
  claimTable(reader),
  methodTable(reader, suites.sections, "Aligned domain: sections, leave one out"),
  methodTable(reader, suites.debtags, "Diverse domain: debtags, leave one out"),
  methodTable(reader, suites.hub, "Hub: 42 adapters to extract, 11 to test"),
  ...Object.values(suites).map((experiment) => taskTable(reader, experiment)),
  rateTable(reader),
];
const json = { environment: environment(), tables };
await writeFile(
  new URL("tables.json", folder),
  `${JSON.stringify(json, (_, value) => (typeof value === "number" ? Number(value.toFixed(4)) : value), 1)}\n`,
);
const markdown = tables.map(toMarkdown).join("\n");
await writeFile(new URL("tables.md", folder), markdown);
for (const [name, svg] of await drawFigures(reader)) await writeFile(new URL(`${name}.svg`, folder), svg);
console.log(given.json ? JSON.stringify(json) : markdown);

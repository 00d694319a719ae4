/**
 * The paper's image table on real pictures: ten tasks of icons, a small ViT, adapters of PEFT. Docs: docs/research/paper.md.
 *
 * Measurements are kept in images.jsonl and not repeated; `--minutes 0` only makes the tables.
 */
import { mkdir, writeFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { number, readArguments, text } from "../lib/arguments.js";
import { inScratch } from "../lib/process.js";
import { environment, progress } from "../lib/report.js";
import { Bench, keyOf, Results } from "./paper/cells.js";
import { iconExperiment, iconSubject, readIconReference, readIconTasks, reasonAgainst } from "./paper/icons.js";
import { nextImageCells } from "./paper/image-plan.js";
import { imageMethodTable, imageRateTable, imageTaskTable } from "./paper/image-tables.js";
import { Reader, toMarkdown } from "./paper/tables.js";

const given = readArguments("The paper's image table: ten tasks of icons, a small ViT", {
  results: text("FOLDER", "where cells and tables are. Default: benchmarks/research/results/paper"),
  minutes: number("measure for so long", Infinity),
});
const folder = given.results ? pathToFileURL(`${resolve(given.results)}/`) : new URL("results/paper/", import.meta.url);
const until = performance.now() + 60_000 * given.minutes;

await mkdir(folder, { recursive: true });
const tasks = await readIconTasks();
const suites = { icons: iconExperiment(tasks) };
const results = await Results.open(new URL("images.jsonl", folder));
const reason = reasonAgainst();
const next = () => nextImageCells(results, suites.icons.test, { peers: !reason });

await inScratch(async (scratch) => {
  const subject = await iconSubject(tasks, scratch);
  const bench = new Bench(tasks, suites, subject);
  try {
    for (let cells = next(); cells.length > 0 && performance.now() < until; cells = next()) {
      for (const cell of cells) {
        if (performance.now() >= until) break;
        const row = await bench.run(cell);
        await results.add(row);
        progress(`${keyOf(cell)}: ${row.seconds} s, validation ${row.validation?.accuracy}`);
      }
    }
  } finally {
    subject.stop();
  }
});

if (reason) progress(`LoRA by PEFT and VeRA are not measured: ${reason}`);
const reader = new Reader(results, tasks, suites, { icons: await readIconReference() });
const tables = [imageMethodTable(reader), imageTaskTable(reader), imageRateTable(reader)];
const json = { environment: environment(), tables };
await writeFile(
  new URL("images.json", folder),
  `${JSON.stringify(json, (_, value) => (typeof value === "number" ? Number(value.toFixed(4)) : value), 1)}\n`,
);
const markdown = tables.map(toMarkdown).join("\n");
await writeFile(new URL("images.md", folder), markdown);
console.log(given.json ? JSON.stringify(json) : markdown);

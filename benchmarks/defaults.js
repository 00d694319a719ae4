/**
 * What does `eigenlora pack FOLDER -o FILE` give a person who names nothing else? For each folder of adapters: the default pack, the
 * one of the same adapters at a ratio where one is given, and as the peer in the same run the paper's setting (column mode, 90 % of
 * the energy, f16). Every adapter of the folders given with `--alone` is also packed by itself.
 */
import { resolve } from "node:path";
import { buildPack, searchPack } from "eigenlora/build";
import { mean } from "simple-statistics";
import { folderOf, SUITES, withAdapters } from "./lib/adapters.js";
import { flag, number, readArguments, text } from "./lib/arguments.js";
import { print, progress } from "./lib/report.js";

/** @typedef {import("eigenlora/build").Adapter} Adapter */
/** @typedef {{ built: import("eigenlora/build").Built, seconds: number }} Timed */

const QUESTION = "What does a pack cost and lose when nothing is asked for?";
const given = readArguments(QUESTION, {
  folders: text("A,B", "folders of adapters of one base each. Default: the three suites of the repository"),
  ratio: number("a second pack, so many times smaller than the adapters", undefined, 1),
  alone: flag("also pack each adapter by itself"),
});
const folders = given.folders?.split(",").map((path) => resolve(path)) ?? SUITES.map((name) => folderOf(name));

/** @type {import("./lib/report.js").Row[]} */
const rows = [];
for (const folder of folders) {
  await withAdapters([folder], async (adapters) => {
    const sets = [adapters, ...(given.alone && adapters.length > 1 ? adapters.map((adapter) => [adapter]) : [])];
    for (const set of sets) rows.push(...(await rowsOf(set, `${folder.split("/").at(-1)}, ${nameOf(set)}`)));
  });
}
print(given.json, [{ question: QUESTION, rows }]);

/** @param {readonly Adapter[]} adapters */
function nameOf(adapters) {
  return adapters.length === 1 ? adapters[0].id : `${adapters.length} adapters`;
}

/** @param {readonly Adapter[]} adapters @param {string} name */
async function rowsOf(adapters, name) {
  progress(name);
  const all = adapters.reduce((sum, { byteLength }) => sum + byteLength, 0);
  const paper = await timed(() => buildPack(adapters));
  /** @type {[string, Timed][]} */
  const ways = [
    ["default", await timed(() => searchPack(adapters))],
    ...(given.ratio
      ? [/** @type {[string, Timed]} */ ([`ratio ${given.ratio}`, await timed(() => within(adapters, all))])]
      : []),
    ["paper's setting", paper],
  ];
  return ways.map(([way, { built, seconds }]) => {
    const totals = built.report.errors.map(({ total }) => total);
    return {
      name: `${name}, ${way}`,
      "kB of adapters": all / 1e3,
      "kB of the pack": built.report.bytes / 1e3,
      "times smaller": all / built.report.bytes,
      "÷ paper's bytes": built.report.bytes / paper.built.report.bytes,
      "ΔW error, mean task": mean(totals),
      "largest task": Math.max(...totals),
      components: built.report.components.max,
      "s ÷ paper's": seconds / paper.seconds,
      s: seconds,
    };
  });
}

/** @param {readonly Adapter[]} adapters @param {number} all bytes of the adapters */
async function within(adapters, all) {
  return searchPack(adapters, { goal: { kind: "bytes", max: Math.floor(all / (given.ratio ?? 1)) } });
}

/** @param {() => Promise<import("eigenlora/build").Built>} work @returns {Promise<Timed>} */
async function timed(work) {
  const started = performance.now();
  const built = await work();
  return { built, seconds: (performance.now() - started) / 1000 };
}

/**
 * Measures the packs of `eigenlora pack FOLDER -o FILE` without any option. For each folder of adapters: the default
 * pack, the one of the same adapters at a ratio where one is given, and as the peer in the same run the paper's setting
 * (column mode, 90 % of the energy, f16). With `--alone` every adapter is also packed by itself; with `--accuracy` the
 * tasks of the repository's suites are asked their test rows, 240 of each at most, and so is a lossless pack, which
 * answers as the adapters do.
 */
import { basename, resolve } from "node:path";
import { buildPack, searchPack } from "eigenlora/build";
import { mean } from "simple-statistics";
import { folderOf, SUITES, withAdapters } from "./lib/adapters.js";
import { flag, number, readArguments, text } from "./lib/arguments.js";
import { print, progress } from "./lib/report.js";
import { LOSSLESS, Suite } from "./lib/suite.js";

/** @typedef {import("eigenlora/build").Adapter} Adapter */
/** @typedef {{ built: import("eigenlora/build").Built, seconds: number }} Timed */

const QUESTION = "What does a pack cost and lose when nothing is asked for?";
const given = readArguments(QUESTION, {
  folders: text("A,B", "folders of adapters of one base each. Default: the three suites of the repository"),
  ratio: number("a second pack, so many times smaller than the adapters", undefined, 1),
  alone: flag("also pack each adapter by itself"),
  accuracy: flag("also ask the test rows of the repository's suites"),
});
const folders = given.folders?.split(",").map((path) => resolve(path)) ?? SUITES.map((name) => folderOf(name));

/** @type {import("./lib/report.js").Row[]} */
const rows = [];
for (const folder of folders) {
  await withAdapters([folder], async (adapters) => {
    const sets = [adapters, ...(given.alone && adapters.length > 1 ? adapters.map((adapter) => [adapter]) : [])];
    const name = basename(folder);
    const known = SUITES.find((suite) => suite === name && folder === folderOf(suite));
    const suite = given.accuracy && known ? await Suite.open(known) : undefined;
    for (const set of sets) {
      const whose = set.length === 1 ? set[0].id : `${set.length} adapters`;
      rows.push(...(await rowsOf(set, `${name}, ${whose}`, set === adapters ? suite : undefined)));
    }
    await suite?.close();
  });
}
print(given.json, [{ question: QUESTION, rows }]);

/** @param {readonly Adapter[]} adapters @param {string} name @param {Suite} [suite] whose adapters these are */
async function rowsOf(adapters, name, suite) {
  progress(name);
  const all = adapters.reduce((sum, { byteLength }) => sum + byteLength, 0);
  // The first one to run pays for what is loaded.
  await buildPack(adapters.slice(0, 1));
  const paper = await timed(() => buildPack(adapters));
  /** @type {[string, Timed][]} */
  const ways = [["default", await timed(() => searchPack(adapters))]];
  if (given.ratio) ways.push([`ratio ${given.ratio}`, await timed(() => within(adapters, all))]);
  ways.push(["paper's setting", paper]);
  if (suite) ways.push(["lossless", await timed(() => buildPack(adapters, LOSSLESS))]);
  /** @type {import("./lib/report.js").Row[]} */
  const found = [];
  for (const [way, { built, seconds }] of ways) {
    const totals = built.report.errors.map(({ total }) => total);
    found.push({
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
      ...(suite ? { "accuracy, %": 100 * mean((await suite.answers(built.chunks)).map(({ right }) => right)) } : {}),
    });
  }
  return found;
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

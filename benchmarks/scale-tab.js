/**
 * What does a tab take with skills on a model of the size that people ship? Chromium, onnxruntime-web on WebAssembly, one thread.
 * Needs what benchmarks/scale.js does, and Chromium (EIGENLORA_CHROMIUM, or /usr/bin/chromium).
 */
import { readArguments } from "./lib/arguments.js";
import { inFreshProcess } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { FILES, scaleFiles } from "./lib/scale-files.js";

const given = readArguments("What does a tab take with skills on a model of the size that people ship?", FILES);
const { model, packs } = await scaleFiles(given);
const tab = new URL("lib/scale-tab.js", import.meta.url);
progress("the plain model in a tab");
const plain = inFreshProcess(tab, "holdInTab", [model, ""]);
/** @type {import("./lib/report.js").Row[]} */
const rows = [{ name: "plain", ...plain }];
for (const { what, path, packed } of packs) {
  packed();
  progress(what);
  const found = inFreshProcess(tab, "holdInTab", [model, path]);
  const keys = ["creation, s", "peak, MB", "peak of all, MB"];
  const ratios = keys.map((key) => [`${key.split(",")[0]} ÷ plain`, found[key] / plain[key]]);
  rows.push({ name: what, ...found, ...Object.fromEntries(ratios) });
}
const question = `What does a tab take, with a switch to each of 20 skills and tokens? ${given.size}, a browser each.`;
const notes = [
  "peak: resident set of the tab's process after creation, where ours has run a token, its probe. peak of all: after 20 switches and 17",
  "tokens too. Times by the clock.",
];
print(given.json, [{ question, rows, notes }]);

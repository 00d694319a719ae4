/**
 * What does a process hold of many skills, on a model of the size that people ship? Beyond 20 they are copies of the 20 under other names.
 * Needs what benchmarks/scale.js does.
 */
import { rm } from "node:fs/promises";
import { number, readArguments } from "./lib/arguments.js";
import { inFreshProcess } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { FILES, scaleFiles } from "./lib/scale-files.js";

const given = readArguments("What does a process hold of many skills, on a model of the size that people ship?", {
  ...FILES,
  skills: number("how many", 1000, 1),
});
const { model, packs } = await scaleFiles(given);
const steps = new URL("lib/scale-steps.js", import.meta.url);
/** @type {import("./lib/report.js").Row[]} */
const rows = [];
const plain = inFreshProcess(steps, "holdModel", [model, ""])["resident, MB"];
for (const { what, path, packed } of packs) {
  packed();
  progress(`${given.skills} skills: ${what}`);
  const more = `${path}, ${given.skills}`;
  const bytes = inFreshProcess(steps, "manySkills", [path, more, given.skills]);
  const [few, many] = [path, more].map((one) => inFreshProcess(steps, "holdModel", [model, one])["resident, MB"]);
  await rm(more);
  rows.push({
    name: what,
    "pack, MB": bytes / 1e6,
    "20 skills, MB": few,
    "all, MB": many,
    "with the model, ÷ 20": (plain + many) / (plain + few),
  });
}
const question = `What does a process hold of ${given.skills} skills above the plain model, after a switch to each and a token? ${given.size}.`;
print(given.json, [{ question, rows, notes: [`The plain model takes ${Math.round(plain)} MB.`] }]);

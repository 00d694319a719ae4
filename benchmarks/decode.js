/**
 * Measures a token with a task, compared with the plain model. One decoding step of a language model (batch 1, keys and
 * values of 256 tokens), one thread, in turns; the time to create a session, and the memory of a process that does.
 *
 * Neither model nor adapters are in this repository: any ONNX export with a cache and PEFT adapters of its base will
 * do.
 */
import { writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { number, readArguments, text } from "./lib/arguments.js";
import { COMPONENTS, measureSteps, packsOf, peakOfCreation } from "./lib/decode.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print, progress } from "./lib/report.js";

const { json, models, adapters, k, rounds, past } = readArguments("What does a token cost with a task?", {
  models: text("FILES", "ONNX files with keys and values as inputs, by commas"),
  adapters: text("FOLDER", "PEFT adapters of their base"),
  k: number("components per side", 32, 1),
  past: number("tokens in the cache", 256, 1),
  rounds: number("rounds of five steps", 21, 1),
});
if (models === undefined || adapters === undefined) {
  process.stderr.write("decode: --models and --adapters are needed; see --help\n");
  process.exit(2);
}

await inScratch(async (folder) => {
  const packs = new Map();
  for (const [name, bytes] of await packsOf(adapters, k)) {
    packs.set(name, join(folder, `${name}.eigen`));
    await writeFile(packs.get(name), bytes);
  }
  const module = new URL("lib/decode.js", import.meta.url);
  const [steps, creations] = [/** @type {any[]} */ ([]), /** @type {any[]} */ ([])];
  for (const model of models.split(",")) {
    progress(model);
    const name = join(basename(dirname(model)), basename(model, ".onnx"));
    steps.push(...(await measureSteps(name, model, packs, { rounds, past })));
    const [plain, ...ours] = ["", ...packs.values()].map((pack) =>
      inFreshProcess(module, peakOfCreation.name, [model, pack]),
    );
    creations.push({ name, components: "plain", ...plain });
    for (const [i, one] of ours.entries()) {
      const ratios = {
        "CPU ÷ plain": one["CPU, ms"] / plain["CPU, ms"],
        "peak ÷ plain": one["peak, MB"] / plain["peak, MB"],
      };
      creations.push({ name, components: COMPONENTS[i], ...one, ...ratios });
    }
  }
  print(json, [
    {
      question: `What does a step take? Core at K ${k}, and factors of the adapters' rank; median of ${rounds} rounds, in turns.`,
      rows: steps,
      notes: [
        "CPU: time of all threads, which others on the machine do not lengthen. Numbers and bytes: of the components ÷ of the model's",
        "file, a floor for what is limited by arithmetic and by memory.",
      ],
    },
    {
      question: "What does it take to create a session from files? A fresh process each.",
      rows: creations,
      notes: ["Peak resident set of the whole process. CPU: of creation alone, the package loaded; code is not warm."],
    },
  ]);
});

/**
 * Do second moments of the modules' inputs make better packs? Packs of the same bytes with and without them, judged by answers to text
 * that the moments were not collected from: mean KL(adapter ‖ pack).
 */

import { openPack } from "eigenlora";
import { createEngine } from "eigenlora/onnxruntime";
import { createJudge, inputMoments } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { createEncoder, model, readTask } from "../../examples/minilm.js";
import { folderOf, packOf, plainTexts, SUITES, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { print } from "../lib/report.js";

const { json, suite, tasks } = readArguments("Do second moments of the inputs make better packs?", {
  suite: choice(SUITES, "which adapters", "own-seed"),
  tasks: number("so many of them", 10, 1),
});

ort.env.logLevel = "error";
await withAdapters([folderOf(suite)], async (all) => {
  const adapters = all.slice(0, tasks);
  const texts = plainTexts(await Promise.all(adapters.map(({ id }) => readTask(id))));
  const half = texts.length >> 1;
  const encode = await createEncoder(ort);
  const moments = await inputMoments(createEngine(ort), model, { adapters, texts: texts.slice(0, half), encode });
  const { judge, close } = createJudge(createEngine(ort), model, {
    adapters,
    texts: texts.slice(half),
    encode,
    most: 48,
  });
  /** @type {import("../lib/report.js").Row[]} */
  const rows = [];
  for (const k of [8, 16, 32]) {
    for (const dtype of /** @type {const} */ (["f16", "int4"])) {
      /** @type {import("eigenlora/build").BuildOptions} */
      const options = {
        gauge: "balanced",
        rank: 4,
        select: { kind: "k", k },
        dtype: { basis: dtype, coefficients: dtype },
      };
      const plain = await packOf(adapters, options);
      const calibrated = await packOf(adapters, { ...options, moments });
      rows.push({
        name: `K ${k}, ${dtype}`,
        bytes: calibrated.length,
        "KL plain": await judge(await openPack(new Blob([plain]))),
        "KL calibrated": await judge(await openPack(new Blob([calibrated]))),
      });
    }
  }
  await close();
  const question = `Do second moments of the inputs make better packs (MiniLM, ${suite}, ${adapters.length} adapters, balanced, rank 4)?`;
  const notes = ["KL(adapter ‖ pack) in nats, mean over tasks and 48 texts; moments are of 256 other texts."];
  print(json, [{ question, rows, notes }]);
});

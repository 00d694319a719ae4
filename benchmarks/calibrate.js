/**
 * Do second moments of what enters the modules make better packs? Packs of the same bytes with and without them, judged by answers to
 * text that was not collected from: mean KL(adapter ‖ pack).
 *
 * node benchmarks/calibrate.js [--suite own-seed|shared-seed|hub] [--tasks N] [--json]      after npm run build
 */

import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { createJudge, inputMoments } from "eigenlora/distill";
import { readAdapters } from "eigenlora/node";
import * as ort from "onnxruntime-node";
import { shuffle, uniform } from "../dist/src/tensor/random.js";
import { createEncoder, model, readTask } from "../examples/minilm.js";
import { data, option, print } from "./report.js";

const SUITE = option("suite") ?? "own-seed";
const TASKS = Number(option("tasks") ?? 10);

ort.env.logLevel = "error";
const all = await readAdapters([data(`adapters/${SUITE}`)]);
const adapters = all.slice(0, TASKS);
const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
const tests = new Set(tasks.flatMap(({ test }) => test.map(([text]) => text)));
const texts = shuffle(
  [...new Set(tasks.flatMap(({ train }) => train.map(([text]) => text)))].filter((text) => !tests.has(text)),
  uniform(1),
);
const half = texts.length >> 1;
const encode = await createEncoder(ort);
const moments = await inputMoments(ort, model, { adapters, texts: texts.slice(0, half), encode });
const { judge, release } = createJudge(ort, model, { adapters, texts: texts.slice(half), encode, most: 48 });
/** @type {import("./report.js").Row[]} */
const rows = [];
for (const k of [8, 16, 32]) {
  for (const type of /** @type {const} */ (["f16", "int4"])) {
    const options = {
      gauge: /** @type {const} */ ("balanced"),
      rank: 4,
      select: { kind: /** @type {const} */ ("k"), k },
      dtype: { basis: type, coefficients: type },
    };
    /** @type {import("./report.js").Row} */
    const row = { name: `K ${k}, ${type}` };
    for (const [name, given] of /** @type {const} */ ([
      ["plain", undefined],
      ["calibrated", moments],
    ])) {
      const { chunks, report } = await buildPack(adapters, { ...options, moments: given });
      row.bytes = report.bytes;
      row[`KL ${name}`] = await judge(await openPack(new Blob(/** @type {BlobPart[]} */ (chunks))));
    }
    rows.push(row);
  }
}
await release();
for (const adapter of all) await adapter.close();
print({
  question: `Do second moments of the inputs make better packs (MiniLM, ${SUITE}, ${adapters.length} adapters, balanced, rank 4)?`,
  rows,
  peers: [],
  notes: ["KL(adapter ‖ pack) in nats, mean over tasks and 48 texts; moments are of 256 other texts."],
});

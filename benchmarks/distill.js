/**
 * What does distilling win back? Real adapters (own-seed) in a pack of few components, distilled on train texts without their
 * labels, asked on test rows through onnxruntime-node: as projected, as distilled, as the adapter itself. Texts are drawn from
 * all tasks; with `--own` a task's own come first, and others fill up.
 *
 * node benchmarks/distill.js [--k N] [--tasks N] [--texts N] [--steps N] [--rate X] [--own] [--json]
 */
import * as ort from "onnxruntime-node";
import { openPack } from "eigenlora";
import { buildPack, readAdapters } from "eigenlora/build";
import { distill } from "eigenlora/distill";
import { createEigenSession } from "eigenlora/onnxruntime";
import { shuffle, uniform } from "../dist/src/learn/random.js";
import { agreement, createEncoder, labelOf, model, readTask, runBatches, toBatches } from "../examples/minilm.js";
import { data, option, print } from "./report.js";

const K = Number(option("k") ?? 8);
const TASKS = Number(option("tasks") ?? 8);
const TEXTS = Number(option("texts") ?? 512);
const STEPS = Number(option("steps") ?? 60);
const RATE = Number(option("rate") ?? 0.02);
const OWN = process.argv.includes("--own");
const MOST_ROWS = 240;

const adapters = await readAdapters([data("adapters/own-seed")]);
const encode = await createEncoder(ort);
const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
// The tasks are about the same packages, so another one's train text may be a test text.
const tests = new Set(tasks.flatMap(({ test }) => test.map(([text]) => text)));
const pool = [...new Set(tasks.flatMap(({ train }) => train.map(([text]) => text)))].filter((text) => !tests.has(text));
shuffle(pool, uniform(1));

const { chunks } = await buildPack(adapters, { select: { kind: "k", k: K } });
const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
const session = await createEigenSession(ort, model, pack, { trainable: true });
/** @type {import("./report.js").Row[]} */
const rows = [];
for (const adapter of adapters.slice(0, TASKS)) {
  const { id } = adapter;
  const task = await readTask(id);
  const test = task.test.slice(0, MOST_ROWS);
  const own = OWN ? shuffle(task.train.map(([text]) => text).filter((text) => !tests.has(text)), uniform(2)) : [];
  const texts = [...new Set([...own, ...pool])].slice(0, TEXTS);
  const batches = toBatches(encode, test.map(([text]) => text));
  const labels = test.map(([, label]) => label);
  /** @param {import("eigenlora/onnxruntime").EigenSession<any>} of @param {string} task */
  const accuracy = async (of, task) => {
    await of.switchTask(task);
    return 100 * agreement((await runBatches(of, batches)).map(labelOf), labels);
  };
  const started = performance.now();
  const made = await distill(session, { adapter, texts, encode: /** @type {any} */ (encode), steps: STEPS, rates: { terms: RATE } });
  const seconds = (performance.now() - started) / 1000;
  await session.addTask(`${id}, distilled`, made.file);
  const lossless = await buildPack([adapter], { select: { kind: "energy", share: 1 }, types: { basis: "f32", coefficients: "f32", head: "f32" } });
  const alone = await createEigenSession(ort, model, await openPack(new Blob(/** @type {BlobPart[]} */ (lossless.chunks))));
  rows.push({
    name: id,
    "KL before": made.divergenceBefore,
    "KL after": made.divergenceAfter,
    "projected, %": await accuracy(session, id),
    "distilled, %": await accuracy(session, `${id}, distilled`),
    "LoRA, %": await accuracy(alone, id),
    s: seconds,
  });
  await alone.release();
  process.stderr.write(`${id}: ${JSON.stringify(rows.at(-1))}\n`);
}
/** @type {import("./report.js").Row} */
const mean = { name: "mean" };
for (const key of Object.keys(rows[0] ?? {})) if (key !== "name") mean[key] = rows.reduce((sum, row) => sum + Number(row[key]), 0) / rows.length;
rows.push(mean);
await session.release();
for (const adapter of adapters) await adapter.close();

print({
  question: `What does distilling win back (MiniLM, ${adapters.length} adapters of r 8, K ${K}, f16)?`,
  rows,
  peers: [],
  notes: [
    `${STEPS} steps of 32 of ${TEXTS} train texts ${OWN ? "of the task's own first" : "of all tasks"}, without labels, a quarter of them held back for KL(adapter ‖ pack), in nats.`,
    `Accuracy on ${MOST_ROWS} test rows of each task at most. The better coefficients of each task are kept. s: to distil one task.`,
  ],
});

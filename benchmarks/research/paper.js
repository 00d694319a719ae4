/**
 * The paper's experiments on real text: tasks made of Debian's package descriptions, MiniLM, adapters of PEFT. Prints
 * the tables that stand in results/paper; with `--task`, trains one left-out task again, as coefficients and head and
 * as a LoRA. Docs: docs/research/paper.md.
 */
import { readdir, readFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import { uniform } from "../../dist/src/tensor/random.js";
import { splitHoldout } from "../../dist/src/train/supervision.js";
import { createEncoder, data, labelOf, model, readTask, runBatches, toBatches } from "../../examples/minilm.js";
import { folderOf, packOf, withAdapters } from "../lib/adapters.js";
import { number, readArguments, text } from "../lib/arguments.js";
import { print } from "../lib/report.js";

/** 2048 texts, one pass over the largest tasks. */
const FIT = { steps: 256, batch: 8 };
/** Share of a task's training rows that rates were chosen on, with a maximum. Nothing is trained on these rows. */
const HELD = 0.15;
const MOST_HELD = 256;
/** Components: 2 · 15 · 8 coefficients on each of 12 modules are 25.6 times fewer than a LoRA of rank 8 has. */
const K = 15;
/** The rates that were chosen. */
const METHODS = /** @type {const} */ ({
  ours: { train: "coefficients", learningRates: { terms: 0.01, head: 0.03 } },
  "LoRA r 8": { train: "lora", learningRates: { terms: 0.002, head: 0.02 } },
});
/** Number formats that round nothing. */
const DTYPES = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });

const given = readArguments("The paper's experiments on real text", {
  task: text("NAME", "train this left-out task again, instead of printing the tables"),
  seed: number("seed of that training", 1, 1),
});
print(given.json, given.task ? [await measure(given.task)] : await stored());

/** @returns {Promise<import("../lib/report.js").Part[]>} */
async function stored() {
  const { tables } = JSON.parse(await readFile(new URL("results/paper/tables.json", import.meta.url), "utf8"));
  return tables.map((/** @type {any} */ { title, lines, notes }) => ({ question: title, rows: lines, notes }));
}

/** @param {string} id @returns {Promise<import("../lib/report.js").Part>} */
async function measure(id) {
  ort.env.logLevel = "error";
  const { suite, donors } = await donorsOf(id);
  const [task, others, encode] = await Promise.all([
    readTask(id),
    Promise.all(donors.map(readTask)),
    createEncoder(ort),
  ]);
  const bytes = await withAdapters(
    donors.map((donor) => folderOf(suite, donor)),
    (adapters) => packOf(adapters, { gauge: "balanced", select: { kind: "k", k: K }, dtype: DTYPES }),
  );
  const { train, test, labels } = task;
  const examples = train.map(([text, label]) => ({ text, label }));
  const kept = splitHoldout(examples, ({ label }) => label, Math.min(HELD, MOST_HELD / train.length), uniform(1)).train;
  // A row that a donor has trained on says nothing of the task.
  const seen = new Set([task, ...others].flatMap(({ train }) => train.map(([text]) => text)));
  const unseen = test.filter(([text]) => !seen.has(text));
  const batches = toBatches(
    encode,
    unseen.map(([text]) => text),
  );
  const rows = [];
  for (const [name, { train, learningRates }] of Object.entries(METHODS)) {
    const pack = await openPack(bytes);
    const session = await createEigenSession(ort, model, pack, {
      trainable: true,
      session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
    });
    const own = suite === "hub" ? "random" : "mean";
    const init = train === "lora" ? "fresh" : own;
    const trainer = await createTrainer(session, { labels, encode, seed: given.seed, init, rank: 8, train });
    for await (const _ of trainer.fit(kept, { ...FIT, learningRates }));
    await session.addTask("new", await trainer.task({ dtype: { coefficients: "f32", head: "f32" } }));
    await session.switchTask("new");
    const right = (await runBatches(session, batches)).map((logits, row) => Number(labelOf(logits) === unseen[row][1]));
    rows.push({ name, "trained beside the head": trainer.size.terms, "unseen rows, %": 100 * mean(right) });
    await session.close();
    await pack.close();
  }
  return { question: `${id}, left out: ${unseen.length} unseen rows of ${test.length}, seed ${given.seed}.`, rows };
}

/** Adapters that the components are made of. @param {string} id of the left-out task */
async function donorsOf(id) {
  const ids = (await readdir(data("tasks"))).flatMap((name) => (name.endsWith(".json") ? [name.slice(0, -5)] : []));
  if (!ids.includes(id)) {
    process.stderr.write(`paper: ${id}: expected ${ids.join(", ")}\n`);
    process.exit(2);
  }
  const isHub = (/** @type {string} */ one) => one.startsWith("hub-");
  const { test } = JSON.parse(await readFile(new URL("results/hub-split.json", import.meta.url), "utf8"));
  const donors = ids.filter((one) => one !== id && isHub(one) === isHub(id) && !(isHub(id) && test.includes(one)));
  /** @type {"hub" | "shared-seed"} */
  const suite = isHub(id) ? "hub" : "shared-seed";
  return { suite, donors };
}

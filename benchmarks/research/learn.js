/**
 * What does a task gain that is learned on the device from coefficients and a head, beside its head alone, and beside factors of its own in
 * a pack that is made by default? Tasks of own-seed are left out of the pack one at a time (K 16) and learned from their training lines through onnxruntime-node. Judged on test lines
 * that occur in no training set, neither the task's nor a donor's: the same package descriptions make several tasks.
 */
import { readdir } from "node:fs/promises";
import { openPack } from "eigenlora";
import { searchPack } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { max, mean, median, min } from "simple-statistics";
import { createEncoder, model, readTask } from "../../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "../lib/adapters.js";
import { flag, number, readArguments } from "../lib/arguments.js";
import { clocked } from "../lib/process.js";
import { print } from "../lib/report.js";

/**
 * @typedef {import("../../examples/minilm.js").Task} Task
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 */

/** Tasks with at least 90 lines that no adapter was trained on. */
const LEFT_OUT = [
  "sections-2",
  "debtags-role",
  "debtags-uitoolkit",
  "debtags-implemented-in",
  "sections-0",
  "sections-1",
  "sections-3",
  "debtags-use",
];
const EXAMPLES = 640;
const BATCH = 32;
const WAYS = /** @type {const} */ ([
  ["head, on the donors' mean", { terms: 0, head: 0.02 }],
  ["coefficients and head", { terms: 0.02, head: 0.02 }],
]);

const { json, all, tasks, epochs } = readArguments("What does a task gain that is learned on the device?", {
  all: flag("leave out each of eight tasks, three seeds"),
  tasks: number("so many tasks, one seed", 3, 1),
  epochs: number("passes over the lines", 5, 1),
});
const seeds = all ? [1, 2, 3] : [1];

ort.env.logLevel = "error";
const encode = await createEncoder(ort);
const ids = (await readdir(folderOf("own-seed"))).filter((name) => !name.startsWith("."));
const known = new Map(await Promise.all(ids.map(async (id) => /** @type {const} */ ([id, await readTask(id)]))));
const trained = new Set([...known.values()].flatMap(({ train }) => train.map(([text]) => text)));

/** @type {import("../lib/report.js").Row[]} */
const rows = [];
for (const left of all ? LEFT_OUT : LEFT_OUT.slice(0, tasks)) {
  const task = /** @type {Task} */ (known.get(left));
  const donors = ids.filter((id) => id !== left).map((id) => folderOf("own-seed", id));
  const pack = await openPack(await withAdapters(donors, (adapters) => packOfK(adapters, 16)));
  const session = await createEigenSession(ort, model, pack, { trainable: true });
  for (const [name, rates] of WAYS) rows.push({ name: `${left}: ${name}`, ...(await learn(session, task, rates)) });
  await session.close();
  await pack.close();
  const chunks = await withAdapters(donors, async (adapters) => (await searchPack(adapters)).chunks);
  const plain = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const whole = await createEigenSession(ort, model, plain, { trainable: true });
  rows.push({
    name: `${left}: factors and head, in a default pack`,
    ...(await learn(whole, task, { terms: 0.002, head: 0.02 })),
  });
  await whole.close();
  await plain.close();
}
const question = `What does a task gain that is learned on the device? ${EXAMPLES} lines, ${epochs} epochs of batches of ${BATCH}.`;
const notes = [
  "accuracy: of the task as it is stored, mean over seeds, on test lines that occur in no training set; spread: largest less smallest. trained: numbers that",
  "change. step ÷ forward: a step (tokens, loss, gradients, AdamW) over a run of the session on a batch as large.",
];
print(json, [{ question, rows, notes }]);

/** @param {Session} session @param {Task} task @param {{ terms: number, head: number }} rates */
async function learn(session, task, rates) {
  const test = task.test.filter(([text]) => !trained.has(text));
  const examples = task.train.slice(0, EXAMPLES).map(([text, label]) => ({ text, label }));
  const accuracies = [];
  const steps = [];
  let bytes = 0;
  let size = { terms: 0, head: 0 };
  for (const seed of seeds) {
    const init = rates.terms ? "auto" : "mean";
    const trainer = await createTrainer(session, { labels: task.labels, encode, seed, init });
    size = trainer.size;
    let before = performance.now();
    for await (const _ of trainer.fit(examples, { epochs, batch: BATCH, learningRates: rates })) {
      steps.push(performance.now() - before);
      before = performance.now();
    }
    const texts = test.map(([text]) => ({ text }));
    const file = await trainer.task();
    bytes = file.length;
    // Judged as stored.
    const id = `${JSON.stringify(rates)}, ${seed}`;
    await session.addTask(id, file);
    const judge = await createTrainer(session, { labels: task.labels, encode, init: { task: id } });
    await judge.begin(id);
    const answers = await judge.predict(texts);
    accuracies.push(mean(answers.map((p, i) => Number(p.indexOf(Math.max(...p)) === test[i][1]))));
  }
  return {
    labels: task.labels.length,
    trained: rates.terms ? size.terms + size.head : size.head,
    lines: test.length,
    accuracy: mean(accuracies),
    spread: max(accuracies) - min(accuracies),
    taskBytes: bytes,
    stepMs: median(steps),
    "step ÷ forward": median(steps) / (await timeForward(session, task)),
  };
}

/** Milliseconds of the session's own run on a batch of training lines, median of 9. @param {Session} session @param {Task} task */
async function timeForward(session, { train }) {
  const times = [];
  for (let i = -2; i < 9; i++) {
    const feeds = encode(train.slice((i + 2) * BATCH, (i + 3) * BATCH).map(([text]) => text));
    const { ms } = await clocked(() => session.run(feeds));
    if (i >= 0) times.push(ms);
  }
  return median(times);
}

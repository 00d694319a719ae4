/**
 * What does a task gain that is learned on the device from coefficients and a head, beside its head alone? Tasks of own-seed are
 * left out of the pack one at a time (K 16) and learned from their training lines through onnxruntime-node. Judged on test lines
 * that occur in no training set, neither the task's nor a donor's: the same package descriptions make several tasks.
 *
 * node benchmarks/learn.js [--json] [--all]      after npm run build; `--all` leaves out each of eight tasks, three seeds
 */
import { readdir } from "node:fs/promises";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { createTrainer } from "eigenlora/learn";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { createEncoder, model, readTask } from "../examples/minilm.js";
import { data, median, print } from "./report.js";

const ALL = process.argv.includes("--all");
/** Those with 90 lines or more that nobody was trained on. */
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
const TASKS = ALL ? LEFT_OUT : LEFT_OUT.slice(0, 3);
const SEEDS = ALL ? [1, 2, 3] : [1];
const EXAMPLES = 640;
const EPOCHS = 5;
const BATCH = 32;

ort.env.logLevel = "error";
const encode = await createEncoder(ort);
const ids = (await readdir(data("adapters/own-seed"))).filter((name) => !name.startsWith("."));
const tasks = new Map(await Promise.all(ids.map(async (id) => /** @type {const} */ ([id, await readTask(id)]))));
const trained = new Set([...tasks.values()].flatMap(({ train }) => train.map(([text]) => text)));

/** @type {import("./report.js").Row[]} */
const rows = [];
for (const left of TASKS) {
  const task = /** @type {import("../examples/minilm.js").Task} */ (tasks.get(left));
  const test = task.test.filter(([text]) => !trained.has(text));
  const adapters = await readAdapters(ids.filter((id) => id !== left).map((id) => data(`adapters/own-seed/${id}`)));
  const { chunks } = await buildPack(adapters, { select: { kind: "k", k: 16 } });
  for (const adapter of adapters) await adapter.close();
  const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
  const session = await createEigenSession(ort, model, pack, { trainable: true });
  for (const [name, rates] of /** @type {const} */ ([
    ["head, on the donors' mean", { terms: 0, head: 0.02 }],
    ["coefficients and head", { terms: 0.02, head: 0.02 }],
  ])) {
    const right = [];
    const steps = [];
    let bytes = 0;
    let size = { terms: 0, head: 0 };
    for (const seed of SEEDS) {
      const trainer = await createTrainer(session, {
        labels: task.labels,
        encode,
        seed,
        init: rates.terms ? "auto" : "mean",
      });
      size = trainer.size;
      const examples = task.train.slice(0, EXAMPLES).map(([text, label]) => ({ text, label }));
      let before = performance.now();
      for await (const _ of trainer.fit(examples, { epochs: EPOCHS, batch: BATCH, rates })) {
        steps.push(performance.now() - before);
        before = performance.now();
      }
      const answers = await trainer.predict(
        test.map(([text]) => ({ text })),
        { batch: BATCH },
      );
      right.push(answers.filter((p, i) => p.indexOf(Math.max(...p)) === test[i][1]).length / test.length);
      bytes = (await trainer.task()).length;
    }
    const forward = await timeForward(session, task);
    rows.push({
      name: `${left}: ${name}`,
      labels: task.labels.length,
      trained: rates.terms ? size.terms + size.head : size.head,
      lines: test.length,
      accuracy: right.reduce((a, b) => a + b, 0) / right.length,
      spread: Math.max(...right) - Math.min(...right),
      taskBytes: bytes,
      stepMs: median(steps) ?? null,
      "step ÷ forward": (median(steps) ?? NaN) / forward,
    });
  }
  await session.release();
  await pack.close();
}

/**
 * Milliseconds of the session's own run on a batch of training lines, median of 9.
 * @param {import("eigenlora/onnxruntime").EigenSession<typeof ort>} session
 * @param {import("../examples/minilm.js").Task} task
 */
async function timeForward(session, { train }) {
  const times = [];
  for (let i = -2; i < 9; i++) {
    const feeds = encode(train.slice((i + 2) * BATCH, (i + 3) * BATCH).map(([text]) => text));
    const started = performance.now();
    await session.run(feeds);
    if (i >= 0) times.push(performance.now() - started);
  }
  return /** @type {number} */ (median(times));
}

print({
  question: `What does a task gain that is learned on the device? ${EXAMPLES} lines, ${EPOCHS} epochs of batches of ${BATCH}.`,
  rows,
  peers: [],
  notes: [
    "accuracy: mean over seeds, on test lines that occur in no training set; spread: largest less smallest. trained: numbers that",
    "change. step ÷ forward: a step (tokens, loss, gradients, AdamW) over a run of the session on a batch as large.",
  ],
});

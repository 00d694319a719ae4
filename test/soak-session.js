/**
 * The whole of what tests sample: every row of every task of the three suites on the real model, packed without loss, compared with
 * PEFT's predictions; and 10 000 random switches while four callers run. Takes minutes; `npm run soak`.
 *
 * usage: node test/soak-session.js [SWITCHES] [SUITE...]
 */
import "./no-telemetry.js";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { createEncoder, data, readReference, readTask } from "../examples/minilm.js";

const model = data("minilm/model_fp16.onnx");
const SWITCHES = Number(process.argv[2] ?? 10_000);
const SUITES = /** @type {("own-seed" | "shared-seed" | "hub")[]} */ (process.argv.slice(3));
const BATCH = 64;
/** Least share of equal predictions without loss. Sums of f32 in another order than PEFT's may decide close calls otherwise. */
const LEAST_EQUAL = 0.998;
/** Largest difference of logits, by suite: hub's adapters are stored in f16. */
const MOST_OFF = { "own-seed": 1e-5, "shared-seed": 1e-5, hub: 5e-4 };

const encode = await createEncoder(ort);

/** @param {ort.Tensor} logits */
function labelsOf({ data: values, dims: [rows = 0, columns = 0] }) {
  return Array.from({ length: rows }, (_, row) => {
    const own = [.../** @type {Float32Array} */ (values).subarray(row * columns, (row + 1) * columns)];
    return own.indexOf(Math.max(...own));
  });
}

/** @param {ArrayLike<number>} found @param {ArrayLike<number>} expected */
function difference(found, expected) {
  if (found.length !== expected.length) return Infinity;
  let largest = 0;
  for (let i = 0; i < found.length; i++) largest = Math.max(largest, Math.abs(found[i] - expected[i]));
  return largest;
}

/** A session on the real model with every adapter of a suite. @param {string} suite */
async function openSuite(suite) {
  const adapters = await readAdapters([data(`adapters/${suite}`)]);
  const base = await openOnnxHost(model);
  const types = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });
  const { chunks } = await buildPack(adapters, { base, select: { kind: "energy", share: 1 }, dtype: types });
  for (const adapter of adapters) await adapter.close();
  return createEigenSession(ort, model, await openPack(new Uint8Array(Buffer.concat(chunks))));
}

let failed = false;
let [equal, rows] = [0, 0];
for (const suite of SUITES.length > 0 ? SUITES : /** @type {const} */ (["own-seed", "shared-seed", "hub"])) {
  const session = await openSuite(suite);
  const reference = await readReference(suite);
  const before = { equal, rows };
  let off = 0;
  for (const [task, { predictions, logits16 }] of reference) {
    const texts = (await readTask(task)).test.map(([text]) => text);
    await session.switchTask(task);
    for (let from = 0; from < texts.length; from += BATCH) {
      const { logits } = await session.run(encode(texts.slice(from, from + BATCH)));
      labelsOf(logits).forEach((label, i) => (equal += Number(label === predictions[from + i])));
      if (from > 0) continue;
      const first = logits16.flat();
      off = Math.max(off, difference(/** @type {Float32Array} */ (logits.data).subarray(0, first.length), first));
    }
    rows += texts.length;
  }
  const share = (100 * (equal - before.equal)) / (rows - before.rows);
  console.log(
    `${suite}: ${share.toFixed(3)} % of ${rows - before.rows} predictions of ${reference.size} tasks as PEFT's, ` +
      `logits within ${off.toExponential(1)} (${session.mode})`,
  );
  if (!(off <= MOST_OFF[suite])) failed = true;
  await session.close();
}
console.log(`all: ${((100 * equal) / rows).toFixed(3)} % of ${rows}`);
if (!(equal / rows >= LEAST_EQUAL)) failed = true;

const session = await openSuite("own-seed");
const choices = [...session.tasks.keys(), null];
const feeds = encode(["graphical front end for configuring network interfaces", "a game"]);
/** @type {Map<string | null, Float32Array>} */
const expected = new Map();
for (const task of choices) {
  await session.switchTask(task);
  expected.set(task, /** @type {Float32Array} */ ((await session.run(feeds)).logits.data));
}
let seed = 99;
/** @template T @param {readonly T[]} of @returns {T} */
const choose = (of) => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return of[(seed >>> 8) % of.length];
};
/** @type {string | null} */
let asked = null;
await session.switchTask(null);
let [runs, wrong, done] = [0, 0, false];
const caller = async () => {
  while (!done) {
    const task = asked;
    const { logits } = await session.run(feeds);
    runs++;
    const off = difference(/** @type {Float32Array} */ (logits.data), expected.get(task) ?? []);
    if (!(off <= 1e-5)) wrong++;
  }
};
const callers = [caller(), caller(), caller(), caller()];
const started = performance.now();
let [resident, rss] = [0, 0];
for (let i = 0; i < SWITCHES; i++) {
  asked = choose(choices);
  await session.switchTask(asked);
  // Switches would otherwise follow each other so closely that no run comes between.
  if (i % 8 === 0) await new Promise(setImmediate);
  if (i !== SWITCHES >> 2) continue;
  // Heads differ in size, so memory is compared at the base.
  asked = null;
  await session.switchTask(null);
  resident = session.memory().total;
  rss = process.memoryUsage.rss();
}
asked = null;
await session.switchTask(null);
done = true;
await Promise.all(callers);
const grown = session.memory().total - resident;
const seconds = ((performance.now() - started) / 1000).toFixed(0);
const megabytes = ((process.memoryUsage.rss() - rss) / 1e6).toFixed(1);
console.log(
  `${SWITCHES} switches, ${runs} runs of 4 callers: ${wrong} of no task or another's; over the last three quarters ` +
    `the session's memory grew by ${grown} B, the process's by ${megabytes} MB (${seconds} s)`,
);
if (wrong > 0 || grown !== 0) failed = true;
await session.close();
process.exitCode = failed ? 1 : 0;

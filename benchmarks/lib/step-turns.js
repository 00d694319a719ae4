/** Training steps of all ways on the same batches, in turns. */

import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { median } from "simple-statistics";
import { createEncoder, model } from "../../examples/minilm.js";
import { clocked } from "./process.js";
import { examplesOf, ONE_THREAD } from "./step-sessions.js";
import { TASK } from "./torch.js";

/**
 * @typedef {{ ids: number[][], mask: number[][], labels: number[] }} Batch for the peer
 * @typedef {import("../../examples/minilm.js").Encoder<import("onnxruntime-node").Tensor>} Encoder
 * @typedef {ReturnType<Encoder>} Feeds
 * @typedef {{ feeds: Feeds, texts: readonly string[] }} Asked
 */

export const STEPS_OF_A_ROUND = 3;
export const RATE = 0.02;
export const CASES = /** @type {const} */ ([
  { name: "16 rows of 32 tokens", batch: 16, joined: 6 },
  { name: "16 rows of real lengths", batch: 16, joined: 1 },
]);
const TORCH = /** @type {const} */ (["coefficients", "lora", "forward"]);

/** Milliseconds of each step, by way, by the clock and of the CPU; losses at each step, ours and torch's. */
class Measured {
  /** @type {Record<"ours" | "forward" | `torch ${typeof TORCH[number]}`, number[]>} */
  ms = { ours: [], forward: [], "torch coefficients": [], "torch lora": [], "torch forward": [] };
  /** CPU time, which others on the machine do not lengthen. @type {Record<"ours" | typeof TORCH[number], number[]>} */
  cpu = { ours: [], coefficients: [], lora: [], forward: [] };
  /** @type {[number, number][]} */
  losses = [];
}

/**
 * @param {import("eigenlora").Pack} pack
 * @param {(typeof CASES)[number]} shape
 * @param {number} rounds after the first, which warms up
 * @param {import("./peers.js").Running | undefined} torch
 * @returns {Promise<import("./report.js").Row>}
 */
export async function takeTurns(pack, { name, batch, joined }, rounds, torch) {
  const { examples, label, labels } = await examplesOf(joined);
  const { encode, asked } = await rememberingEncoder(examples.map(({ text }) => text));
  const serving = await createEigenSession(ort, model, pack, { session: ONE_THREAD });
  await serving.switchTask(TASK);
  const session = await createEigenSession(ort, model, pack, { session: ONE_THREAD, trainable: true });
  const trainer = await createTrainer(session, { labels, encode, init: { task: TASK } });
  await trainer.begin(TASK);
  await torch?.ask({ way: "begin" });
  const steps = (rounds + 1) * STEPS_OF_A_ROUND;
  const fit = trainer.fit(examples, {
    steps,
    batch,
    learningRates: { terms: RATE, head: RATE },
    warmup: 0,
    decay: "none",
  });
  const measured = new Measured();
  for (let round = 0; round <= rounds; round++) {
    /** @type {Asked[]} */
    const seen = [];
    const own = [];
    for (let i = 0; i < STEPS_OF_A_ROUND; i++) {
      const { ms, cpu, result } = await clocked(() => fit.next());
      measured.ms.ours.push(ms);
      measured.cpu.ours.push(cpu);
      own.push(/** @type {{ loss: number }} */ (result.value).loss);
      seen.push(asked());
    }
    for (const { feeds } of seen) measured.ms.forward.push((await clocked(() => serving.run(feeds))).ms);
    if (torch)
      await askTorch(
        torch,
        measured,
        seen.map((one) => toBatch(one, label)),
        own,
      );
  }
  await session.close();
  await serving.close();
  return rowOf(name, measured);
}

/**
 * Runs the same batches in torch.
 * @param {import("./peers.js").Running} torch
 * @param {Measured} measured
 * @param {Batch[]} batches
 * @param {number[]} own losses
 */
async function askTorch(torch, measured, batches, own) {
  for (const way of TORCH) {
    const answer = await torch.ask({ way, batches });
    measured.ms[`torch ${way}`].push(...answer.ms);
    measured.cpu[way].push(...answer.cpu);
    if (way === "coefficients") own.forEach((loss, i) => measured.losses.push([loss, answer.losses[i]]));
  }
}

/** @param {string} name @param {Measured} measured @returns {import("./report.js").Row} */
function rowOf(name, { ms, cpu, losses }) {
  // The first round warms up.
  const middle = (/** @type {number[]} */ times) =>
    times.length > STEPS_OF_A_ROUND ? median(times.slice(STEPS_OF_A_ROUND)) : null;
  /** @param {number[]} a @param {number[]} b */
  const ratio = (a, b) => {
    const [above, below] = [a, b].map(middle);
    return above === null || below === null ? null : above / below;
  };
  /** @param {[number, number] | undefined} both */
  const show = (both) => both?.map((loss) => loss.toFixed(4)).join(" / ") ?? null;
  return {
    name,
    "step, ms": middle(ms.ours),
    "torch, ms": middle(ms["torch coefficients"]),
    "÷ torch": ratio(ms.ours, ms["torch coefficients"]),
    "÷ torch, CPU": ratio(cpu.ours, cpu.coefficients),
    "PEFT LoRA, ms": middle(ms["torch lora"]),
    "÷ PEFT": ratio(ms.ours, ms["torch lora"]),
    "÷ PEFT, CPU": ratio(cpu.ours, cpu.lora),
    "forward, ms": middle(ms.forward),
    "step ÷ forward": ratio(ms.ours, ms.forward),
    "torch forward, ms": middle(ms["torch forward"]),
    "first loss": show(losses[0]),
    "last loss": show(losses.at(-1)),
  };
}

/**
 * Tokenises texts beforehand and remembers the last request.
 * @param {readonly string[]} texts
 * @returns {Promise<{ encode: Encoder, asked(): Asked }>} asked: the last request
 */
async function rememberingEncoder(texts) {
  const tokens = await createEncoder(ort);
  const encoded = new Map(texts.map((text) => [text, tokens([text])]));
  /** @type {Asked} */
  let last = { feeds: tokens([""]), texts: [] };
  return {
    encode(texts) {
      last = { feeds: joinRows(texts.map((text) => /** @type {Feeds} */ (encoded.get(text)))), texts };
      return last.feeds;
    },
    asked: () => last,
  };
}

/** Rows of one text each as one batch, padded behind. @param {readonly Feeds[]} rows @returns {Feeds} */
function joinRows(rows) {
  const width = Math.max(...rows.map(({ input_ids }) => input_ids.dims[1]));
  /** @param {keyof Feeds} name */
  const all = (name) => {
    const values = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => values.set(/** @type {BigInt64Array} */ (row[name].data), r * width));
    return new ort.Tensor("int64", values, [rows.length, width]);
  };
  return { input_ids: all("input_ids"), attention_mask: all("attention_mask"), token_type_ids: all("token_type_ids") };
}

/** @param {Asked} asked @param {ReadonlyMap<string, number>} label of each text @returns {Batch} */
const toBatch = ({ feeds, texts }, label) => ({
  ids: matrix(feeds.input_ids),
  mask: matrix(feeds.attention_mask),
  labels: texts.map((text) => label.get(text) ?? 0),
});

/** @param {import("onnxruntime-node").Tensor} tensor */
function matrix({ data: values, dims }) {
  const numbers = Array.from(/** @type {BigInt64Array} */ (values), Number);
  return Array.from({ length: dims[0] }, (_, r) => numbers.slice(r * dims[1], (r + 1) * dims[1]));
}

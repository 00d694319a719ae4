/** Slowdown of a run against the plain model's in the same loop, by mode, components and shape of the batch. */
import { median, min } from "simple-statistics";
import { K, MODES, openSession } from "./live-sessions.js";
import { clocked } from "./process.js";
import { progress } from "./report.js";

/**
 * @typedef {import("./live-sessions.js").Session} Session
 * @typedef {import("./report.js").Row} Row
 */

/** Shapes [texts, tokens of each]. */
const SHAPES = [
  [8, 8],
  [8, 32],
  [8, 128],
  [1, 32],
];
export const COMPONENTS = [16, 32, 64, 128];

/**
 * A row per way to run the model: its slowdown against the plain model, by shape. All sessions take turns.
 * @param {import("./live-sessions.js").Files} files
 * @param {number} runs
 */
export async function measureRuns(files, runs) {
  const { name, ort, options } = files.on;
  const plain = await ort.InferenceSession.create(files.model, options);
  /** @type {[string, Session][]} */
  const sessions = [];
  for (const k of COMPONENTS) sessions.push([`core, K ${k}`, await openSession(files, k, "core")]);
  for (const mode of MODES.slice(1)) sessions.push([mode, await openSession(files, K, mode)]);
  for (const [, session] of sessions) await session.switchTask([...session.tasks.keys()][0]);
  /** @type {Row} */
  const base = { name: `${name}, plain` };
  /** @type {Row[]} */
  const rows = sessions.map(([way]) => ({ name: `${name}, ${way}` }));
  for (const [batch, tokens] of SHAPES) {
    progress(`${name}: runs of ${batch}×${tokens}`);
    const feeds = randomFeeds(ort, batch, tokens);
    /** @type {number[]} */
    const plainTimes = [];
    const times = sessions.map(() => /** @type {number[]} */ ([]));
    const quotients = sessions.map(() => /** @type {number[]} */ ([]));
    for (let round = -2; round < runs; round++) {
      for (const [i, [, session]] of sessions.entries()) {
        // A plain run before each: other load on the machine hits both.
        const { ms: before } = await clocked(() => plain.run(feeds));
        const { ms: ours } = await clocked(() => session.run(feeds));
        if (round < 0) continue;
        plainTimes.push(before);
        times[i].push(ours);
        quotients[i].push(ours / before);
      }
    }
    base[`${batch}×${tokens}, ms`] = median(plainTimes);
    for (const [i, row] of rows.entries()) {
      row[`${batch}×${tokens}, ÷`] = median(quotients[i]);
      row[`${batch}×${tokens}, min ÷`] = min(times[i]) / min(plainTimes);
    }
  }
  for (const [, session] of sessions) await session.close();
  await plain.release();
  return [base, ...rows];
}

/**
 * Random tokens, all of them attended to.
 * @param {import("./live-sessions.js").Ort} ort
 * @param {number} batch
 * @param {number} tokens
 */
function randomFeeds(ort, batch, tokens) {
  /** @param {(i: number) => bigint} value */
  const tensor = (value) => {
    const values = BigInt64Array.from({ length: batch * tokens }, (_, i) => value(i));
    return new ort.Tensor("int64", values, [batch, tokens]);
  };
  return {
    input_ids: tensor((i) => BigInt(5 + ((i * 7919) % 8000))),
    attention_mask: tensor(() => 1n),
    token_type_ids: tensor(() => 0n),
  };
}

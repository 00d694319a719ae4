/** Sessions that serve and that train: time to create one, and the peak memory of a process. */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { median } from "simple-statistics";
import { createEncoder, model, readTask } from "../../examples/minilm.js";
import { clocked, peakMemory } from "./process.js";
import { TASK } from "./torch.js";

/** @typedef {import("eigenlora").Pack} Pack */

export const WAYS = ["serves, plain session", "serves, trainable session", "trains"];
export const HELD_RUNS = 12;

ort.env.logLevel = "error";
export const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };

/**
 * Lines of the task as examples; joined ones are cut to the longest that the model was trained on.
 * @param {number} joined
 */
export async function examplesOf(joined) {
  const { train, labels } = await readTask(TASK);
  const texts = train.map((_, i) =>
    Array.from({ length: joined }, (_, j) => train[(i + j * 37) % train.length][0]).join(" "),
  );
  const label = new Map(train.map(([, label], i) => [texts[i], label]));
  return { labels, label, examples: [...label].map(([text, label]) => ({ text, label })) };
}

/**
 * Serves or trains for a while. @returns the peak memory of this process
 * @param {string} way
 * @param {string} path of the pack
 */
export async function peakOf(way, path) {
  const encode = await createEncoder(ort);
  const pack = await openPack(path);
  const { examples, labels } = await examplesOf(6);
  const trainable = way !== WAYS[0];
  const session = await createEigenSession(ort, model, pack, { session: ONE_THREAD, trainable });
  if (way === "trains") {
    const trainer = await createTrainer(session, { labels, encode, init: { task: TASK } });
    for await (const _ of trainer.fit(examples, { steps: HELD_RUNS, batch: 16 }));
  } else {
    await session.switchTask(TASK);
    for (let i = 0; i < HELD_RUNS; i++)
      await session.run(encode(examples.slice(16 * i, 16 * i + 16).map(({ text }) => text)));
  }
  return peakMemory();
}

/**
 * Sessions of each kind, in turns.
 * @param {Pack} pack
 * @param {number} rounds
 * @returns {Promise<import("./report.js").Part>}
 */
export async function measureCreation(pack, rounds) {
  /** @type {Record<string, () => Promise<{ close(): Promise<void> } | { release(): Promise<void> }>>} */
  const ways = {
    plain: () => ort.InferenceSession.create(model, ONE_THREAD),
    "switches, factors": () => createEigenSession(ort, model, pack, { session: ONE_THREAD, mode: "factors" }),
    trainable: () => createEigenSession(ort, model, pack, { session: ONE_THREAD, trainable: true }),
  };
  const times = new Map(Object.keys(ways).map((name) => [name, /** @type {number[]} */ ([])]));
  for (let round = 0; round <= rounds; round++) {
    for (const [name, create] of Object.entries(ways)) {
      const { ms, result } = await clocked(create);
      if (round > 0) times.get(name)?.push(ms);
      await ("close" in result ? result.close() : result.release());
    }
  }
  const rows = [...times].map(([name, ms]) => ({ name, "create, ms": median(ms) }));
  return {
    question: `How long does it take to create a session? Median of ${rounds}, in turns.`,
    rows: rows.map((row) => ({ ...row, "÷ plain": row["create, ms"] / rows[0]["create, ms"] })),
    notes: ["From the path of the model. Trainable: run on tiny inputs to look at shapes, and differentiated."],
  };
}

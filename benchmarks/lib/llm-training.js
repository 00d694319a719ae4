/**
 * A training step of a language model, compared with PEFT's, and its memory, compared with serving. Each runs in a
 * process of its own.
 */
import { existsSync } from "node:fs";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import { min } from "simple-statistics";
import { ONE_THREAD } from "./llm-steps.js";
import { peerLine, python } from "./peers.js";
import { cpu, inFreshProcess, peakMemory } from "./process.js";
import { progress } from "./report.js";
import { createEncode, encodeForTrainer, examplesOf, force, readSkills, smollm2File } from "./skills.js";

/** Rows of a step. */
const BATCH = 8;
const TOKENS = 32;
const FILES = /** @type {const} */ ([
  ["f32", "onnx/model.onnx"],
  ["q4", "onnx/model_q4.onnx"],
]);
const module = new URL(import.meta.url);

/**
 * @param {string} pack path
 * @param {number} steps
 * @returns {{ part: import("./report.js").Part, peer: import("./report.js").Peer }}
 */
export function trainingPart(pack, steps) {
  /** @type {import("./report.js").Row[]} */
  const rows = [];
  let tokens = [0];
  /** @type {ReturnType<typeof python> | undefined} */
  let peer;
  for (const [name, file] of FILES) {
    if (!existsSync(smollm2File(file))) continue;
    progress(`training, ${name}`);
    const args = [smollm2File(file), pack];
    const ours = inFreshProcess(module, "train", [...args, String(steps)]);
    tokens = ours.lengths;
    peer ??= python("llm_step.py", [smollm2File(""), String(steps)], JSON.stringify(ours.rows));
    const ratio = "figures" in peer ? ours.ms / peer.figures.ms : null;
    const serving = inFreshProcess(module, "serve", args).peak;
    rows.push({
      name,
      "creation, CPU ms": ours.creation,
      "step, CPU ms": ours.ms,
      "step ÷ PEFT": ratio,
      "peak, MB": ours.peak / 1e6,
      "peak ÷ serving": ours.peak / serving,
    });
  }
  if (peer && "figures" in peer)
    rows.push({ name: "PEFT, LoRA r 8, f32", "step, CPU ms": peer.figures.ms, "peak, MB": peer.figures.peak / 1e6 });
  const range = `${Math.min(...tokens)} to ${Math.max(...tokens)}`;
  return {
    part: {
      question: `What does a training step take? ${BATCH} rows of ${range} tokens, loss on the completions alone; one thread, fastest of ${steps}.`,
      rows,
      notes: [
        "Ours trains coefficients of a task. serving: the same file with the pack, one run of the same rows. PEFT computes logits at all positions.",
      ],
    },
    peer: peerLine("PEFT", peer && "figures" in peer ? peer : { reason: peer?.reason ?? "no file of the model" }),
  };
}

/** @param {string} model @param {string} pack @param {boolean} trainable */
async function open(model, pack, trainable) {
  const ort = await import("onnxruntime-node");
  ort.env.logLevel = "error";
  return {
    ort,
    session: await createEigenSession(ort, model, await openPack(pack), { trainable, session: ONE_THREAD }),
  };
}

/** Makes rows of about `TOKENS` tokens: a few rows of a task one behind the other, the last one to be learned. */
async function batch() {
  const [skills, encode] = await Promise.all([readSkills(), createEncode()]);
  const skill = /** @type {import("./skills.js").Skill} */ (skills.get("past-tense"));
  const all = examplesOf(skill, skill.train).values();
  const examples = Array.from({ length: BATCH }, () => {
    let row = next(all);
    for (;;) {
      const more = next(all);
      const longer = { prompt: `${row.prompt}${row.completion}\n${more.prompt}`, completion: more.completion };
      if (encode(longer.prompt).length + encode(longer.completion).length > TOKENS) return row;
      row = longer;
    }
  });
  return { encode, examples };
}

/** @template T @param {IterableIterator<T>} all @returns {T} */
function next(all) {
  return all.next().value;
}

/** Trains steps of one file, in a fresh process. @param {string} model @param {string} pack @param {string} steps */
export async function train(model, pack, steps) {
  const begun = cpu();
  const { session } = await open(model, pack, true);
  const creation = cpu() - begun;
  const { encode, examples } = await batch();
  const trainer = await createTrainer(session, { encode: /** @type {any} */ (encodeForTrainer(encode)), seed: 1 });
  const times = [];
  let before = cpu();
  for await (const _ of trainer.fit(examples, { steps: Number(steps) + 1, batch: BATCH })) {
    times.push(cpu() - before);
    before = cpu();
  }
  const rows = examples.map(({ prompt, completion }) => ({ prompt: encode(prompt), answer: encode(completion) }));
  const lengths = rows.map((row) => row.prompt.length + row.answer.length);
  // The first step includes the self-test.
  const ms = min(times.slice(1));
  const peak = await peakMemory();
  await session.close();
  return { creation, ms, peak, rows, lengths };
}

/** Runs one file once, in a fresh process. @param {string} model @param {string} pack */
export async function serve(model, pack) {
  const { ort, session } = await open(model, pack, false);
  const { encode, examples } = await batch();
  await session.switchTask("past-tense");
  const rows = examples.map(({ prompt, completion }) => ({ prompt: encode(prompt), answer: encode(completion) }));
  await force(ort, session, rows);
  const peak = await peakMemory();
  await session.close();
  return { peak };
}

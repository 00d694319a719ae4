/**
 * Cost in answers and gain in time of a kept cache: the cache of a prompt made by the base or by another skill and
 * kept, compared with one that the skill itself made.
 */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { mean, median } from "simple-statistics";
import { feedsOf, ONE_THREAD } from "./llm-steps.js";
import { clocked } from "./process.js";
import { createEncode, END, readSkills, scoreOf, smollm2File } from "./skills.js";

/**
 * @typedef {import("./skills.js").Question} Question
 * @typedef {import("eigenlora/onnxruntime").EigenSession<any>} Session
 */

const VOCABULARY = 49152;

/** Reader of the prompt's cache, and how much of the prompt it reads. */
const WAYS = /** @type {const} */ ([
  "all by the skill",
  "the instruction by the base",
  "all but the last token by the base",
  "all but the last token by another skill",
]);

/**
 * @param {string} pack path
 * @param {number} count rows of a task
 * @param {number} most tasks
 */
export async function judgeCaches(pack, count, most) {
  const opened = await openPack(pack);
  const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), opened, { session: ONE_THREAD });
  const [skills, encode] = [await readSkills(), await createEncode()];
  const names = [...skills.keys()].filter((name) => opened.tasks.has(name)).slice(0, most);
  /** @type {Map<string, { exact: number, nll: number }[]>} */
  const scores = new Map(WAYS.map((way) => [way, []]));
  for (const [i, name] of names.entries()) {
    const { prompt, test } = /** @type {import("./skills.js").Skill} */ (skills.get(name));
    const instruction = encode(`${prompt}:`).length;
    const questions = test.slice(0, count).map(([input, output]) => ({
      prompt: encode(`${prompt}: ${input} →`),
      answer: [...encode(` ${output}`), END],
    }));
    const other = names[(i + 1) % names.length];
    for (const way of WAYS) {
      const maker = way === WAYS[0] ? name : way === WAYS[3] ? other : null;
      const read = (/** @type {number} */ length) => (way === WAYS[1] ? instruction : length - 1);
      scores.get(way)?.push(scoreOf(await answer(session, questions, { name, maker, read })));
    }
  }
  await session.close();
  await opened.close();
  return WAYS.map((way) => {
    const found = scores.get(way) ?? [];
    return {
      name: way,
      "exact match, %": mean(found.map(({ exact }) => exact)),
      "nats per token": mean(found.map(({ nll }) => nll)),
    };
  });
}

/**
 * Answers by teacher forcing, as skills.js. Rows with prompts of equal length run together.
 * @param {Session} session
 * @param {readonly Question[]} questions
 * @param {{ name: string, maker: string | null, read(length: number): number }} how who answers, who reads first, and
 *   how much of it
 */
async function answer(session, questions, { name, maker, read }) {
  const lengths = [...new Set(questions.map(({ prompt }) => prompt.length))];
  const forced = [];
  for (const length of lengths) {
    const batch = questions.filter(({ prompt }) => prompt.length === length);
    const past = read(length);
    await session.switchTask(maker);
    const prefix = batch.map(({ prompt }) => prompt.slice(0, past));
    const cache = await session.run(feedsOf(ort, session, prefix, past));
    await session.switchTask(name, { keepCache: maker !== name });
    const width = length - past + Math.max(...batch.map(({ answer }) => answer.length)) - 1;
    const rest = batch.map(({ prompt, answer }) => [...prompt.slice(past), ...answer.slice(0, -1)]);
    const { logits } = await session.run(feedsOf(ort, session, rest, width, cache), ["logits"]);
    const data = /** @type {Float32Array} */ (logits.data);
    for (const [row, { answer }] of batch.entries())
      forced.push(likelihood(data, row * width + length - past - 1, answer));
  }
  return forced;
}

/**
 * @param {Float32Array} logits
 * @param {number} at the position that says the first token
 * @param {readonly number[]} answer
 */
function likelihood(logits, at, answer) {
  let [exact, nll] = [true, 0];
  for (const [i, token] of answer.entries()) {
    const scores = logits.subarray((at + i) * VOCABULARY, (at + i + 1) * VOCABULARY);
    let largest = 0;
    for (let j = 1; j < VOCABULARY; j++) if (scores[j] > scores[largest]) largest = j;
    let sum = 0;
    for (const score of scores) sum += Math.exp(score - scores[largest]);
    exact &&= largest === token;
    nll += Math.log(sum) + scores[largest] - scores[token];
  }
  return { exact, nll, tokens: answer.length };
}

/**
 * Time to the first token of a skill behind a text that the base has read, with its cache kept and with the text read
 * again.
 * @param {string} pack path
 * @param {readonly number[]} lengths of the text
 * @param {number} rounds
 */
export async function timeCaches(pack, lengths, rounds) {
  const opened = await openPack(pack);
  const session = await createEigenSession(ort, smollm2File("onnx/model.onnx"), opened, { session: ONE_THREAD });
  const [skill] = opened.tasks.keys();
  await opened.prefetch([skill]);
  const rows = [];
  for (const length of lengths) {
    const text = Array.from({ length }, (_, i) => 500 + ((i * 37) % 4000));
    await session.switchTask(null);
    const cache = await session.run(feedsOf(ort, session, [text.slice(0, -1)], length - 1));
    /** @type {[again: number[], kept: number[]]} */
    const times = [[], []];
    for (let round = 0; round <= rounds; round++) {
      const again = await clocked(async () => {
        await session.switchTask(skill);
        await session.run(feedsOf(ort, session, [text], length));
      });
      await session.switchTask(null);
      const kept = await clocked(async () => {
        await session.switchTask(skill, { keepCache: true });
        await session.run(feedsOf(ort, session, [text.slice(-1)], 1, cache));
      });
      await session.switchTask(null);
      if (round > 0) times.forEach((all, i) => all.push([again, kept][i].cpu));
    }
    const [again, kept] = times.map(median);
    rows.push({ name: `${length} tokens`, "read again, ms": again, "kept, ms": kept, "kept ÷ again": kept / again });
  }
  await session.close();
  await opened.close();
  return rows;
}

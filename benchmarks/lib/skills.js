/**
 * The twenty tasks of SmolLM2 (test/data/smollm2), and a session's answers to them by teacher forcing, many rows a run.
 * A greedy answer equals the expected one exactly if each of its tokens is the most likely one after those before it,
 * so one run without a loop is enough. Any session with `run` and `inputNames` works.
 *
 * EIGENLORA_SMOLLM2 names the model's folder (CONTRIBUTING.md).
 */
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { data } from "../../examples/minilm.js";

/**
 * @typedef {[input: string, output: string]} Row
 * @typedef {{ name: string, prompt: string, train: Row[], test: Row[] }} Skill
 * @typedef {{ prompt: number[], answer: number[] }} Question tokens; the answer with its end
 * @typedef {{ exact: boolean, nll: number, tokens: number }} Forced whether greedy decoding gives the answer; its nats,
 *   all tokens together
 * @typedef {{ answers: number[][], right: number[], top: { ids: number[], logits: number[] }[] }} Told by test row;
 *   `right` counts other tokens of the same text too; `top` of the first token of eight rows
 * @typedef {{ tasks: Record<string, { prompts: number[][] }>, adapters: Record<string, Told> }} Reference
 * @typedef {{ inputNames: readonly string[], run(feeds: any, fetches: any): Promise<any> }} Session
 * @typedef {{ Tensor: new (type: any, data: any, dims: number[]) => unknown }} Ort
 */

/** Folder of the model, if there is one. */
export const smollm2 = process.env["EIGENLORA_SMOLLM2"];

/** Message where the model is missing. */
export const NO_SMOLLM2 = "EIGENLORA_SMOLLM2 names no folder; npm run smollm2 -- FOLDER makes it";

/** A file of the model. @param {string} path in its folder */
export function smollm2File(path) {
  if (!smollm2) throw new Error(NO_SMOLLM2);
  return join(smollm2, path);
}

/** Ends an answer. */
export const END = 2;
const VOCABULARY = 49152;

/** Rows of a run: more would take memory for logits, 200 kB a token. */
const BATCH = 32;

/** @param {string} path under test/data/smollm2 */
const readJson = async (path) => JSON.parse(await readFile(data(`smollm2/${path}`), "utf8"));

/** All tasks by name. @returns {Promise<Map<string, Skill>>} */
export async function readSkills() {
  const files = (await readdir(data("smollm2/tasks"))).sort();
  const skills = await Promise.all(files.map((file) => readJson(`tasks/${file}`)));
  return new Map(skills.map((skill) => [skill.name, skill]));
}

/** PEFT's answers, by "adapters/TASK" or "adapters-all-linear/TASK". @returns {Promise<Reference>} */
export const readAnswers = () => readJson("reference.json");

/** The model's tokenizer. @returns {Promise<(text: string) => number[]>} */
export async function createEncode() {
  const [rules, config] = await Promise.all(
    ["tokenizer.json", "tokenizer_config.json"].map(async (name) =>
      JSON.parse(await readFile(smollm2File(name), "utf8")),
    ),
  );
  const tokenizer = new Tokenizer(rules, config);
  return (text) => tokenizer.encode(text, { add_special_tokens: false }).ids;
}

/** The tokenizer in a trainer's form. @param {(text: string) => number[]} encode */
export const encodeForTrainer = (encode) =>
  Object.assign(
    (/** @type {string[]} */ [one]) => {
      const ids = encode(/** @type {string} */ (one));
      return { input_ids: { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) } };
    },
    { eos_token: "<|im_end|>" },
  );

/** Rows in a trainer's form. @param {Skill} skill @param {readonly Row[]} rows */
export const examplesOf = ({ prompt }, rows) =>
  rows.map(([input, output]) => ({ prompt: `${prompt}: ${input} →`, completion: ` ${output}` }));

/**
 * @param {Skill} skill
 * @param {(text: string) => number[]} encode
 * @param {readonly Row[]} [rows] Default: all test rows
 * @returns {Question[]}
 */
export function questionsOf(skill, encode, rows = skill.test) {
  return examplesOf(skill, rows).map(({ prompt, completion }) => ({
    prompt: encode(prompt),
    answer: [...encode(completion), END],
  }));
}

/**
 * Judges each question's answer under the session's active task, in the order of the questions. The common start of all
 * prompts is computed once: it is a third of all tokens.
 * @param {Ort} ort makes tensors
 * @param {Session} session on a file of the model
 * @param {readonly Question[]} questions
 * @returns {Promise<Forced[]>}
 */
export async function force(ort, session, questions) {
  const past = await pastOf(ort, session, questions);
  const length = (/** @type {Question} */ { prompt, answer }) => prompt.length + answer.length;
  // A batch is padded to its longest.
  const order = [...questions.keys()].sort((a, b) => length(questions[a]) - length(questions[b]));
  /** @type {Forced[]} */
  const forced = new Array(questions.length);
  for (let at = 0; at < order.length; at += BATCH) {
    const rows = order.slice(at, at + BATCH);
    const batch = rows.map((row) => questions[row]);
    const found = await forceBatch(ort, session, batch, past);
    rows.forEach((row, i) => (forced[row] = found[i]));
  }
  return forced;
}

/**
 * @typedef {{ length: number, values: Map<string, Float32Array> }} Past keys and values [1, 3, length, 64] by name of
 *   the input
 */

/**
 * Cache of the common start of all prompts; each keeps a token of its own. @param {Ort} ort @param {Session} session
 * @param {readonly Question[]} questions @returns {Promise<Past>}
 */
async function pastOf(ort, session, questions) {
  const [{ prompt }, ...others] = questions;
  let length = 0;
  while (
    length < prompt.length - 1 &&
    others.every((one) => one.prompt.length > length + 1 && one.prompt[length] === prompt[length])
  )
    length++;
  const names = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  const none = { length: 0, values: new Map(names.map((name) => [name, new Float32Array(0)])) };
  if (length === 0) return none;
  const present = (/** @type {string} */ name) => name.replace("past_key_values", "present");
  const found = await session.run(feedsOf(ort, [prompt.slice(0, length)], length, none), names.map(present));
  return { length, values: new Map(names.map((name) => [name, found[present(name)].data.slice()])) };
}

/**
 * @param {Ort} ort
 * @param {Session} session
 * @param {readonly Question[]} questions
 * @param {Past} past
 * @returns {Promise<Forced[]>}
 */
async function forceBatch(ort, session, questions, past) {
  const tokens = questions.map(({ prompt, answer }) => [...prompt, ...answer.slice(0, -1)].slice(past.length));
  const width = Math.max(...tokens.map(({ length }) => length));
  const { logits } = await session.run(feedsOf(ort, tokens, width, past), ["logits"]);
  const found = questions.map(({ prompt, answer }, row) => {
    let [exact, nll] = [true, 0];
    answer.forEach((token, i) => {
      const from = (row * width + prompt.length - past.length - 1 + i) * VOCABULARY;
      const told = likelihood(logits.data.subarray(from, from + VOCABULARY), token);
      exact &&= told.first;
      nll += told.nats;
    });
    return { exact, nll, tokens: answer.length };
  });
  logits.dispose?.();
  return found;
}

/**
 * Inputs of rows that continue a cache, padded on the right: causal attention does not see later tokens.
 * @param {Ort} ort @param {readonly number[][]} rows @param {number} width @param {Past} past
 */
function feedsOf(ort, rows, width, past) {
  const total = past.length + width;
  const [ids, places] = [0, 1].map(() => new BigInt64Array(rows.length * width));
  const mask = new BigInt64Array(rows.length * total);
  rows.forEach((row, r) => {
    ids.set(row.map(BigInt), r * width);
    mask.fill(1n, r * total, r * total + past.length + row.length);
    for (let i = 0; i < width; i++) places[r * width + i] = BigInt(past.length + i);
  });
  const values = [...past.values].map(([name, one]) => {
    const all = new Float32Array(rows.length * one.length);
    for (let r = 0; r < rows.length; r++) all.set(one, r * one.length);
    return [name, new ort.Tensor("float32", all, [rows.length, 3, past.length, 64])];
  });
  return {
    input_ids: new ort.Tensor("int64", ids, [rows.length, width]),
    attention_mask: new ort.Tensor("int64", mask, [rows.length, total]),
    position_ids: new ort.Tensor("int64", places, [rows.length, width]),
    ...Object.fromEntries(values),
  };
}

/**
 * Finds out if a token is the first of the largest, and its nats.
 * @param {Float32Array} scores
 * @param {number} token
 */
function likelihood(scores, token) {
  let largest = 0;
  for (let i = 1; i < scores.length; i++) if (scores[i] > scores[largest]) largest = i;
  let sum = 0;
  for (let i = 0; i < scores.length; i++) sum += Math.exp(scores[i] - scores[largest]);
  return { first: largest === token, nats: Math.log(sum) + scores[largest] - scores[token] };
}

/** Exact match in %, and nats per token of answers. @param {readonly Forced[]} forced */
export function scoreOf(forced) {
  const sum = (/** @type {(one: Forced) => number} */ of) => forced.reduce((total, one) => total + of(one), 0);
  return {
    exact: (100 * sum(({ exact }) => Number(exact))) / forced.length,
    nll: sum(({ nll }) => nll) / sum(({ tokens }) => tokens),
  };
}

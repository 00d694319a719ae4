/**
 * Code that the demo and the benchmarks share about the bundled model and its tasks (test/data/README.md): the
 * tokenizer, test rows as inputs, labels from outputs, PEFT's answers, and a pack. It does not use this package: any
 * session with `run` works.
 */
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { Tokenizer } from "@huggingface/tokenizers";

/**
 * @typedef {[text: string, label: number]} Row
 * @typedef {{ task: string, labels: string[], train: Row[], test: Row[] }} Task
 * @typedef {{ accuracy: number, predictions: number[], logits16: number[][] }} Reference
 *   predictions of all rows of `test`, logits of the first 16
 * @typedef {{ run(feeds: any): Promise<unknown> }} Session
 * @typedef {{ logits: { dims: readonly number[], data: Float32Array } }} Outputs
 */

/**
 * @template T
 * @typedef {(texts: readonly string[]) => Record<"input_ids" | "attention_mask" | "token_type_ids", T>} Encoder
 */

/**
 * @template T
 * @typedef {{ rows: number[], feeds: ReturnType<Encoder<T>> }} Batch which texts, and their inputs
 */

/** Most tokens of a text, special tokens included: the limit that the adapters were trained and measured with. */
const MAX_TOKENS = 32;

/**
 * Absolute path of something under test/data.
 * @param {string} path
 */
export const data = (path) => fileURLToPath(new URL(`../test/data/${path}`, import.meta.url));

export const model = data("minilm/model_fp16.onnx");

/** The 20 adapters of own-seed, packed with the model (demo.js says by which command). */
export const packed = fileURLToPath(new URL("tasks.eigen", import.meta.url));

/** @param {string} path under test/data */
const readJson = async (path) => JSON.parse(await readFile(data(path), "utf8"));

/** @param {string} id @returns {Promise<Task>} */
export const readTask = (id) => readJson(`tasks/${id}.json`);

/**
 * Reads PEFT's answers with each adapter of a suite, by task, in f32.
 * @param {"own-seed" | "shared-seed" | "hub"} suite
 * @returns {Promise<Map<string, Reference>>}
 */
export async function readReference(suite) {
  return new Map(Object.entries((await readJson("reference/predictions.json"))[suite]));
}

/**
 * Makes the function from texts to inputs [texts, longest of them in tokens]. It also has the tokenizer's words, from
 * which texts are made.
 * @template T
 * @param {{ Tensor: new (type: "int64", data: BigInt64Array, dims: number[]) => T }} ort onnxruntime-web or -node
 * @returns {Promise<Encoder<T> & Pick<Tokenizer, "get_vocab" | "decode">>}
 */
export async function createEncoder(ort) {
  const [rules, config] = [await readJson("minilm/tokenizer.json"), await readJson("minilm/tokenizer_config.json")];
  const tokenizer = new Tokenizer(rules, config);
  /** @type {Encoder<T>} */
  const encode = (texts) => {
    const tokens = texts.map((text) => {
      const { ids } = tokenizer.encode(text);
      // The last token closes the sentence, wherever it is cut.
      return ids.length > MAX_TOKENS ? [...ids.slice(0, MAX_TOKENS - 1), ids[ids.length - 1]] : ids;
    });
    const width = Math.max(...tokens.map(({ length }) => length));
    const dims = [texts.length, width];
    const ids = new BigInt64Array(texts.length * width);
    const mask = new BigInt64Array(texts.length * width);
    tokens.forEach((row, r) => {
      ids.set(row.map(BigInt), r * width);
      mask.fill(1n, r * width, r * width + row.length);
    });
    return {
      input_ids: new ort.Tensor("int64", ids, dims),
      attention_mask: new ort.Tensor("int64", mask, dims),
      token_type_ids: new ort.Tensor("int64", new BigInt64Array(ids.length), dims),
    };
  };
  return Object.assign(encode, {
    get_vocab: tokenizer.get_vocab.bind(tokenizer),
    decode: tokenizer.decode.bind(tokenizer),
  });
}

/**
 * Texts in batches of similar length, since a batch is padded to its longest.
 * @template T
 * @param {Encoder<T>} encode
 * @param {readonly string[]} texts
 * @param {number} [size] of a batch
 * @returns {Batch<T>[]}
 */
export function toBatches(encode, texts, size = 32) {
  const order = [...texts.keys()].sort((a, b) => texts[a].length - texts[b].length);
  /** @type {Batch<T>[]} */
  const batches = [];
  for (let at = 0; at < order.length; at += size) {
    const rows = order.slice(at, at + size);
    batches.push({ rows, feeds: encode(rows.map((row) => texts[row])) });
  }
  return batches;
}

/**
 * Logits of each text, in the order of the texts.
 * @param {Session} session
 * @param {readonly Batch<unknown>[]} batches
 */
export async function runBatches(session, batches) {
  /** @type {Float32Array[]} */
  const logits = [];
  for (const { rows, feeds } of batches) {
    const { dims, data } = /** @type {Outputs} */ (await session.run(feeds)).logits;
    rows.forEach((row, i) => (logits[row] = data.slice(i * dims[1], (i + 1) * dims[1])));
  }
  return logits;
}

/**
 * The label with the largest logit.
 * @param {Float32Array} logits of one text
 */
export const labelOf = (logits) => logits.indexOf(Math.max(...logits));

/**
 * Share of positions at which two lists are equal, up to the length of the shorter.
 * @param {readonly number[]} found
 * @param {readonly number[]} expected
 */
export function agreement(found, expected) {
  const length = Math.min(found.length, expected.length);
  let equal = 0;
  for (let i = 0; i < length; i++) if (found[i] === expected[i]) equal++;
  return equal / length;
}

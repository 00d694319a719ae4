/**
 * What the demo and the benchmarks share of the bundled model (test/data/README.md): its tokenizer, its inputs, the tasks
 * with their test rows, and what PEFT makes of them. Knows no pack and no session beyond `run`.
 */
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { Tokenizer } from "@huggingface/tokenizers";

/**
 * @typedef {{ task: string, labels: string[], train: [string, number][], test: [string, number][] }} Task
 *   texts with the index of their label
 * @typedef {{ accuracy: number, predictions: number[], logits16: number[][] }} Reference predictions for all of `test`
 */

/** As the adapters were trained and PEFT's answers were made. */
const MAX_TOKENS = 32;

/**
 * Absolute path of something under test/data.
 * @param {string} path
 */
export const data = (path) => fileURLToPath(new URL(`../test/data/${path}`, import.meta.url));

/** @param {string} path under test/data */
const readJson = async (path) => JSON.parse(await readFile(data(path), "utf8"));

export const model = data("minilm/model_fp16.onnx");

/** @param {string} id @returns {Promise<Task>} */
export const readTask = (id) => readJson(`tasks/${id}.json`);

/**
 * What PEFT answers with each adapter of a suite, by id.
 * @param {"own-seed" | "shared-seed" | "hub"} suite
 * @returns {Promise<Map<string, Reference>>}
 */
export async function readReference(suite) {
  return new Map(Object.entries((await readJson("reference/predictions.json"))[suite]));
}

/**
 * Texts to inputs: cut at 32 tokens with the two special ones, padded to the longest of the batch.
 * @template T
 * @param {{ Tensor: new (type: "int64", data: BigInt64Array, dims: number[]) => T }} ort
 * @returns {Promise<(texts: readonly string[]) => { input_ids: T, attention_mask: T, token_type_ids: T }>}
 */
export async function createEncoder(ort) {
  const tokenizer = new Tokenizer(await readJson("minilm/tokenizer.json"), await readJson("minilm/tokenizer_config.json"));
  return (texts) => {
    const rows = texts.map((text) => {
      const { ids } = tokenizer.encode(text);
      // The last one ends the sentence, wherever it is cut.
      return ids.length > MAX_TOKENS ? [...ids.slice(0, MAX_TOKENS - 1), ids[ids.length - 1]] : ids;
    });
    const dims = [rows.length, Math.max(...rows.map(({ length }) => length))];
    const [ids, mask] = [new BigInt64Array(dims[0] * dims[1]), new BigInt64Array(dims[0] * dims[1])];
    rows.forEach((row, r) => {
      ids.set(row.map(BigInt), r * dims[1]);
      mask.fill(1n, r * dims[1], r * dims[1] + row.length);
    });
    /** @param {BigInt64Array} values */
    const tensor = (values) => new ort.Tensor("int64", values, dims);
    return { input_ids: tensor(ids), attention_mask: tensor(mask), token_type_ids: tensor(new BigInt64Array(ids.length)) };
  };
}

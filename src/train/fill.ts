/**
 * Token ids as the inputs of a model that answers at every position. What else such models take follows from the ids: masks,
 * positions, a cache that is empty.
 */
import type { Feed } from "../onnx/feeds.ts";
import type { BatchFeeds } from "./batch.ts";
import type { Tokens } from "./examples.ts";

/** What a token is to an input, by its place; 0 behind the last. */
const OF_TOKENS = new Map<string, (id: number, place: number) => number>([
  ["input_ids", (id) => id],
  ["decoder_input_ids", (id) => id],
  ["attention_mask", () => 1],
  ["decoder_attention_mask", () => 1],
  ["position_ids", (_, place) => place],
  ["token_type_ids", () => 0],
]);

/** Inputs that are the same in every run: no cache, logits of all positions. */
const ZERO = /^(use_cache_branch|num_logits_to_keep|logits_to_keep)$/;

/**
 * @param example made-up values of the model's inputs, for types and dimensions
 * @param names of the model's inputs
 * @throws TypeError for an input that ids do not tell
 */
export function fillInputs(
  example: ReadonlyMap<string, Feed> | undefined,
  names: readonly string[],
  all: readonly Pick<Tokens, "ids" | "source">[],
): BatchFeeds {
  const decodes = names.includes("decoder_input_ids");
  const feeds: Record<string, BatchFeeds[string]> = {};
  for (const name of names) {
    const of = OF_TOKENS.get(name);
    const given = example?.get(name);
    if (of) {
      const side = decodes && !name.startsWith("decoder_") ? "source" : "ids";
      feeds[name] = rowsOf(
        all.map((one) => one[side]!.map(of)),
        given?.data instanceof Int32Array,
      );
    } else if (given && (given.data.length === 0 || ZERO.test(name))) {
      const dims =
        given.data.length === 0 ? given.dims.map((size, axis) => (axis === 0 ? all.length : size)) : given.dims;
      feeds[name] = { dims, data: given.data.slice().fill(0 as never) };
    } else {
      throw new TypeError(
        `the model takes "${name}", which tokens do not tell: give examples as \`feeds\` and \`classes\`, with all inputs`,
      );
    }
  }
  return feeds;
}

/** Whether an input follows from the tokens, or is the same in every run. */
export function followsFromTokens(name: string): boolean {
  return OF_TOKENS.has(name) || ZERO.test(name) || /past/.test(name);
}

/**
 * What a tokenizer gave, with what the model takes beside it.
 * @param feeds "input_ids" [batch, length] at least, where something is missing
 * @throws TypeError as `fillInputs`
 */
export function completeInputs(
  example: ReadonlyMap<string, Feed> | undefined,
  names: readonly string[],
  feeds: BatchFeeds,
): BatchFeeds {
  const missing = names.filter((name) => !(name in feeds));
  const { dims, data } = feeds["input_ids"] ?? {};
  if (missing.length === 0 || !dims || !data) return feeds;
  const [rows, width] = dims as [number, number];
  const ids = Array.from(data as ArrayLike<bigint | number>, Number);
  const all = Array.from({ length: rows }, (_, row) => ({ ids: ids.slice(row * width, (row + 1) * width) }));
  return { ...fillInputs(example, missing, all), ...feeds };
}

/** Rows of numbers, filled up with 0 to the longest; the type is that of the array. */
function rowsOf(rows: readonly (readonly number[])[], short: boolean): BatchFeeds[string] {
  const width = Math.max(...rows.map(({ length }) => length));
  const filled = rows.flatMap((row) => [...row, ...Array<number>(width - row.length).fill(0)]);
  return { dims: [rows.length, width], data: short ? Int32Array.from(filled) : BigInt64Array.from(filled, BigInt) };
}

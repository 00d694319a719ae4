/**
 * A model's inputs for a batch: converted to an engine's tensors, joined, and completed from token ids. Whatever else models with
 * one answer per position take follows from the ids: masks, positions, an empty cache.
 */

import type { Feed } from "../onnx/feeds.ts";
import type { Engine, EngineTensor } from "../session/engine.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import type { Tokens } from "./examples.ts";

/** @throws TypeError naming the input that is no tensor */
export function batchTensors(engine: Engine, batch: BatchFeeds): Record<string, EngineTensor> {
  const entries = Object.entries(batch).map(([name, { type, dims, data }]) => {
    if (ArrayBuffer.isView(data) && Array.isArray(dims)) return [name, engine.tensor(data as Float32Array, dims, type)];
    throw new TypeError(`the input "${name}" of a batch is no tensor: expected { dims, data }`);
  });
  return Object.fromEntries(entries);
}

/** Dimensions of each input behind the first, as a string: feeds of one batch must agree in them. */
export function shapesOf(feeds: BatchFeeds): string {
  return JSON.stringify(Object.entries(feeds).map(([name, { dims }]) => [name, ...dims.slice(1)]));
}

/**
 * Checks that inputs of one shape within an example are of one shape in all. Lengths may differ between examples.
 * @throws TypeError naming the input that differs
 */
export function checkShapes(all: readonly BatchFeeds[]): void {
  const shape = (feeds: BatchFeeds, name: string): string | undefined => feeds[name]?.dims.slice(1).join(", ");
  const [first] = all;
  const names = Object.keys(first ?? {});
  for (const [i, feeds] of all.entries()) {
    for (const name of names) {
      const other = names.find((one) => shape(first!, one) === shape(first!, name))!;
      if (shape(feeds, name) === shape(feeds, other) && feeds[name]) continue;
      const changed = shape(feeds, other) === shape(first!, other) ? name : other;
      throw new TypeError(
        `the input "${changed}" of example ${i} is [${feeds[changed]?.dims.join(", ") ?? "missing"}], another one's [${first![changed]!.dims.join(", ")}], but not all of its inputs differ: give each example inputs that belong together`,
      );
    }
  }
}

/**
 * Joins the feeds of several examples along the first dimension.
 * @throws TypeError when their other dimensions differ
 */
export function joinFeeds(all: readonly BatchFeeds[]): BatchFeeds {
  const [first] = all;
  if (all.length === 1) return first!;
  const joined: Record<string, BatchFeeds[string]> = {};
  for (const [name, { type, dims }] of Object.entries(first!)) {
    const parts = all.map((feeds, i) => {
      const part = feeds[name];
      if (part && part.dims.slice(1).join() === dims.slice(1).join()) return part;
      throw new TypeError(
        `the input "${name}" of example ${i} is [${part?.dims.join(", ") ?? "missing"}], another one's [${dims.join(", ")}]: pad them alike, or take batches of 1`,
      );
    });
    const arrays = parts.map(({ data }) => data as Float32Array);
    const data = new (arrays[0]!.constructor as Float32ArrayConstructor)(
      arrays.reduce((sum, { length }) => sum + length, 0),
    );
    let at = 0;
    for (const array of arrays) {
      data.set(array, at);
      at += array.length;
    }
    joined[name] = {
      ...(type === undefined ? {} : { type }),
      dims: [parts.reduce((sum, part) => sum + part.dims[0]!, 0), ...dims.slice(1)],
      data,
    };
  }
  return joined;
}

/** Value of an input at a token, by the token's id and place. Padding is 0. */
const OF_TOKENS = new Map<string, (id: number, place: number) => number>([
  ["input_ids", (id) => id],
  ["decoder_input_ids", (id) => id],
  ["attention_mask", () => 1],
  ["decoder_attention_mask", () => 1],
  ["position_ids", (_, place) => place],
  ["token_type_ids", () => 0],
]);

/** Inputs with one value in every run: no cache, logits of all positions. */
const ZERO = /^(use_cache_branch|num_logits_to_keep|logits_to_keep)$/;

/**
 * Makes a model's inputs from token ids.
 * @param example made-up values of the model's inputs, for types and dimensions
 * @param names of the model's inputs
 * @throws TypeError for an input that does not follow from ids
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
 * Adds inputs that the tokenizer did not give, and drops what the model does not take.
 * @param feeds hold at least "input_ids" [batch, length] where something is missing
 * @throws TypeError as `fillInputs`
 */
export function completeInputs(
  example: ReadonlyMap<string, Feed> | undefined,
  names: readonly string[],
  feeds: BatchFeeds,
): BatchFeeds {
  const missing = names.filter((name) => !(name in feeds));
  const taken = Object.fromEntries(Object.entries(feeds).filter(([name]) => names.includes(name)));
  const { dims, data } = feeds["input_ids"] ?? {};
  if (missing.length === 0 || !dims || !data) return taken;
  const [rows, width] = dims as [number, number];
  const ids = Array.from(data as ArrayLike<bigint | number>, Number);
  const all = Array.from({ length: rows }, (_, row) => ({ ids: ids.slice(row * width, (row + 1) * width) }));
  return { ...fillInputs(example, missing, all), ...taken };
}

/** Pads rows with 0 to the longest. @param short whether the model takes int32 instead of int64 */
function rowsOf(rows: readonly (readonly number[])[], short: boolean): BatchFeeds[string] {
  const width = Math.max(...rows.map(({ length }) => length));
  const filled = rows.flatMap((row) => [...row, ...Array<number>(width - row.length).fill(0)]);
  return { dims: [rows.length, width], data: short ? Int32Array.from(filled) : BigInt64Array.from(filled, BigInt) };
}

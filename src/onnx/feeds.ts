/**
 * Made-up inputs for any model, from its declared inputs: token ids 1, masks 1, no past. Their values mean nothing;
 * they only make the model run.
 */
import { elementsOf } from "../tensor/dtypes.ts";
import { BOOL, FLOAT, FLOAT16, INT64 } from "./linear.ts";
import { dimsOf, intOf, type OnnxModel } from "./model.ts";
import { makeValue } from "./nodes.ts";
import type { ValueInfoProto } from "./protobuf.ts";

/** A value in a runtime's form, by `TensorProto.DataType`. */
export interface Feed {
  readonly dataType: number;
  readonly dims: readonly number[];
  readonly data: Float32Array | Uint16Array | BigInt64Array | Int32Array | Uint8Array;
}

const INT32 = 6;

/** Most elements of all inputs together: enough for a few images. A file may declare any size. */
const MOST_ELEMENTS = 2 ** 23;

type Feeds = ReadonlyMap<string, Feed> | undefined;

/**
 * Synthetic values of inputs: the smallest, and others whose rows differ, made when they are needed. Undefined as by
 * `tinyFeeds`.
 */
export function syntheticFeeds(
  model: OnnxModel,
  inputs: readonly ValueInfoProto[],
): { readonly feeds: Feeds; readonly feedsOfRows: () => Feeds } {
  const known = knownSizes(model, inputs);
  const tables = tableRows(model, inputs);
  // Copies with names, types and dimensions only, so that nothing else of the file stays in memory.
  const plain = inputs.map((input) => makeValue(input.name, input.type?.tensorType?.elemType ?? 0, dimsOf(input)));
  return { feeds: tinyFeeds(inputs, known), feedsOfRows: () => feedsOfRows(plain, tables, known) };
}

/** Rows of the tables that inputs are indices into, by input. */
function tableRows({ graph }: OnnxModel, inputs: readonly ValueInfoProto[]): Map<string, number> {
  const found = new Map<string, number>();
  for (const { name } of inputs) {
    for (const { node, input } of graph.consumers.get(name) ?? []) {
      const rows =
        /^Gather(BlockQuantized)?$/.test(node.opType) && input === 1
          ? graph.initializers.get(node.input[0]!)?.dims[0]
          : undefined;
      if (rows !== undefined) found.set(name, Math.min(Number(rows), found.get(name) ?? Infinity));
    }
  }
  return found;
}

/** Indices of the inputs of GroupQueryAttention that hold a cache [batch, heads, past, width]. */
const CACHES: ReadonlySet<number> = new Set([3, 4]);

/** Sizes of free dimensions that the graph implies, by name: the width of a head in a cache. */
export function knownSizes({ graph }: OnnxModel, inputs: readonly ValueInfoProto[]): Map<string, number> {
  const found = new Map<string, number>();
  for (const cache of inputs) {
    const width = dimsOf(cache)?.[3];
    if (typeof width !== "string") continue;
    for (const { node, input } of graph.consumers.get(cache.name) ?? []) {
      if (node.opType !== "GroupQueryAttention" || !CACHES.has(input)) continue;
      // The result, all heads side by side, enters a linear layer.
      const after = graph.consumers.get(node.output[0]!)?.[0]?.node;
      const packed = after?.opType === "MatMulNBits" ? intOf(after, "K") : undefined;
      const all = packed ?? graph.initializers.get(after?.input[1] ?? "")?.dims[0];
      const size = Number(all ?? 0) / intOf(node, "num_heads");
      if (Number.isInteger(size) && size > 0) found.set(width, size);
    }
  }
  return found;
}

/**
 * Names of free dimensions. Without a past, the present and the sum of past and present are equally long and get one
 * name.
 */
export function presentNames(inputs: readonly ValueInfoProto[]): (dimension: string) => string {
  const plain = inputs.flatMap((input) =>
    (dimsOf(input) ?? [])
      .filter((name) => typeof name === "string")
      .filter((name) => /seq/.test(name) && !/past|total|\+/.test(name)),
  );
  return (dimension) => {
    const parts = dimension.split("+").map((part) => part.trim());
    const present = parts.filter((part) => !/past/.test(part));
    if (parts.length > 1 && present.length === 1) return present[0]!;
    // "total_sequence_length" next to "sequence_length": the longest name that it ends with.
    const ends = plain.filter((name) => dimension.endsWith(name)).sort((a, b) => b.length - a.length);
    return /total/.test(dimension) ? (ends[0] ?? dimension) : dimension;
  };
}

/** Rows of a batch, all different as far as made-up ones can be. */
const ROWS = 3;
const LENGTH = 6;

/** Makes feeds whose rows differ, with results of `tableRows` and `knownSizes`. */
function feedsOfRows(
  inputs: readonly ValueInfoProto[],
  tables: ReadonlyMap<string, number>,
  known: ReadonlyMap<string, number>,
): Feeds {
  const leading = new Set(inputs.map((input) => dimsOf(input)?.[0] || "dimension 0"));
  const feeds = tinyFeeds(inputs, known, (dimension) => (leading.has(dimension) ? ROWS : LENGTH));
  for (const [name, rows] of tables) {
    const { data } = feeds?.get(name) ?? {};
    // Squares, so that no row is another one shifted.
    if (data instanceof BigInt64Array) data.forEach((_, i) => (data[i] = BigInt((7 * i * i + i + 1) % rows)));
    else if (data instanceof Int32Array) data.forEach((_, i) => (data[i] = (7 * i * i + i + 1) % rows));
  }
  return feeds;
}

/**
 * Makes the smallest feeds of a model.
 * @param size of free dimensions that are not `known`, by name, or by place where one has none. Default: 2
 * @returns undefined for an input of an unknown kind, an impossible dimension, or too many elements
 */
export function tinyFeeds(
  inputs: readonly ValueInfoProto[],
  known: ReadonlyMap<string, number> = new Map(),
  size: (dimension: string) => number = () => 2,
): Map<string, Feed> | undefined {
  const feeds = new Map<string, Feed>();
  let left = MOST_ELEMENTS;
  for (const input of inputs) {
    const { name } = input;
    const dims = dimsOf(input)?.map((dim, axis) => {
      if (typeof dim === "number") return dim;
      // Caches begin empty; a dimension for past and present together is as long as the present.
      if (/past/.test(dim) && !/\+|total/.test(dim)) return 0;
      const dimension = dim || `dimension ${axis}`;
      return known.get(dimension) ?? size(dimension);
    });
    if (!dims) return undefined;
    const count = elementsOf(dims);
    left -= count;
    if (dims.some((size) => size < 0) || !(left >= 0)) return undefined;
    const ones: Record<number, () => Feed["data"]> = {
      [FLOAT]: () => Float32Array.from({ length: count }, (_, i) => Math.sin(i + 1)),
      [FLOAT16]: () => new Uint16Array(count).fill(0x3800),
      [INT64]: () => new BigInt64Array(count).fill(/position/.test(name) ? 0n : 1n),
      [INT32]: () => new Int32Array(count).fill(/position/.test(name) ? 0 : 1),
      [BOOL]: () => new Uint8Array(count),
    };
    const { elemType: dataType } = input.type!.tensorType!;
    const data = ones[dataType]?.();
    if (!data) return undefined;
    feeds.set(name, { dataType, dims, data });
  }
  return feeds;
}

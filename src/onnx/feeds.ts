/**
 * Made-up inputs for any model, as far as its declared inputs tell: token ids 1, masks 1, no past. Their values mean
 * nothing; what is wanted is that the model runs.
 */
import { FLOAT, FLOAT16, INT64 } from "./linear.ts";
import type { ValueInfoProto } from "./onnx_pb.ts";

/** A value as a runtime takes it, by `TensorProto.DataType`. */
export interface Feed {
  readonly dataType: number;
  readonly dims: readonly number[];
  readonly data: Float32Array | Uint16Array | BigInt64Array | Int32Array | Uint8Array;
}

const BOOL = 9;
const INT32 = 6;

/** Elements of all inputs together. A few images have so many; a file may ask for anything. */
const MOST_ELEMENTS = 2 ** 23;

/**
 * @param size of a free dimension, by its name, or by its place where it has none. Default: 2
 * @returns undefined when an input is of a kind that cannot be guessed, has an impossible dimension, or all of them have very
 *   many elements
 */
export function tinyFeeds(
  inputs: readonly ValueInfoProto[],
  size: (dimension: string) => number = () => 2,
): Map<string, Feed> | undefined {
  const feeds = new Map<string, Feed>();
  let left = MOST_ELEMENTS;
  for (const { name, type } of inputs) {
    if (type?.value.case !== "tensorType" || !type.value.value.shape) return undefined;
    const { elemType, shape } = type.value.value;
    const dims = shape.dim.map(({ value }, axis) => {
      if (value.case === "dimValue") return Number(value.value);
      // A cache begins empty; what is as long as past and present together is as long as the present.
      if (value.case === "dimParam" && /past/.test(value.value) && !/\+|total/.test(value.value)) return 0;
      return size(value.case === "dimParam" && value.value !== "" ? value.value : `dimension ${axis}`);
    });
    const count = dims.reduce((a, b) => a * b, 1);
    left -= count;
    if (dims.some((size) => size < 0) || !(left >= 0)) return undefined;
    const ones: Record<number, () => Feed["data"]> = {
      [FLOAT]: () => Float32Array.from({ length: count }, (_, i) => Math.sin(i + 1)),
      [FLOAT16]: () => new Uint16Array(count).fill(0x3800),
      [INT64]: () => new BigInt64Array(count).fill(/position/.test(name) ? 0n : 1n),
      [INT32]: () => new Int32Array(count).fill(/position/.test(name) ? 0 : 1),
      [BOOL]: () => new Uint8Array(count),
    };
    const data = ones[elemType]?.();
    if (!data) return undefined;
    feeds.set(name, { dataType: elemType, dims, data });
  }
  return feeds;
}

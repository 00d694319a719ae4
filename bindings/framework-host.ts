/**
 * The common part of hosts for frameworks: names as adapters use them, and changes that take effect together. Values
 * are the framework's tensors.
 */
import type { DeviceBuffer } from "../src/backends/backend.ts";
import type { CpuView, Parameter, WeightHost } from "../src/core/base.ts";
import { BaseMismatchError, nearest } from "../src/errors.ts";
import type { Layout } from "../src/format/format.ts";

/** A weight of a model, and the ways to it. */
export interface Weight<Value> extends Pick<Parameter, "dtype" | "shape"> {
  readonly layout: Layout | undefined;
  /** A copy of its bytes, as listed. */
  read(): Promise<Uint8Array>;
  /** A value for it, perhaps of another shape than it has now. Copies the view. */
  make(view: CpuView): Value;
  /** Puts a value in its place and frees the one before. */
  put(value: Value): void;
  /** Place of its bytes on a WebGPU device, as listed. */
  readonly place?: WeightPlace | undefined;
}

export interface WeightPlace {
  buffer(): DeviceBuffer;
  /** Moves the weight to its own buffer if tensors or pending work share it; `buffer()` may change. */
  flush(): void | Promise<void>;
}

/**
 * @param weights by the names that adapters use
 * @param free frees a value that `make` made
 */
export function frameworkHost<Value>(
  weights: ReadonlyMap<string, Weight<Value>>,
  free: (value: Value) => void,
): WeightHost {
  const find = (name: string): Weight<Value> => {
    const weight = weights.get(name);
    if (weight) return weight;
    throw new RangeError(`the model has no "${name}"; nearest: ${nearest(name, weights.keys()).join(", ")}`);
  };
  return {
    *list() {
      for (const [name, { dtype, shape, layout }] of weights) yield { name, dtype, shape, ...(layout && { layout }) };
    },
    async read(name) {
      const { dtype, shape, read } = find(name);
      return { dtype, shape, data: await read(), byteOffset: 0 };
    },
    view(name) {
      const { dtype, shape, place } = find(name);
      return place && { dtype, shape, data: place.buffer(), byteOffset: 0 };
    },
    async flush(names) {
      for (const name of names) await find(name).place!.flush();
    },
    begin(names = []) {
      for (const name of names) {
        if (weights.has(name)) continue;
        throw new BaseMismatchError(
          `a task brings "${name}", which the model does not have. If the model calls it otherwise, map its layer with the option ` +
            `\`names\`; to use the tasks without it, pass ignore: ["${name}"]`,
          { module: name },
        );
      }
      const staged = new Map<string, Value>();
      return {
        write(name, view) {
          const old = staged.get(name);
          if (old) free(old);
          staged.set(name, weights.get(name)!.make(view as CpuView));
        },
        commit() {
          for (const [name, value] of staged) weights.get(name)!.put(value);
        },
        rollback() {
          for (const value of staged.values()) free(value);
          staged.clear();
        },
      };
    },
  };
}

/** A weight as adapters know it. */
export interface Called {
  readonly name: string;
  /** Its orientation, where the name tells; else as in the checkpoint. */
  readonly layout: Layout | undefined;
}

/** Name in checkpoints and layout of matrices, by the last segment of a name in Keras, TF.js, flax and haiku. */
const LEAVES = new Map<string, { readonly leaf: string; readonly layout?: Layout }>([
  ["kernel", { leaf: "weight", layout: "in-out" }],
  ["embeddings", { leaf: "weight", layout: "embedding" }],
  ["embedding", { leaf: "weight", layout: "embedding" }],
  ["w", { leaf: "weight", layout: "in-out" }],
  ["gamma", { leaf: "weight" }],
  ["scale", { leaf: "weight" }],
  ["beta", { leaf: "bias" }],
  ["b", { leaf: "bias" }],
]);

/**
 * A framework's name of a weight, as adapters know it: "encoder/layer_._0/query/kernel" is
 * "encoder.layer.0.query.weight", stored as [in, out]. Models of transformers have "_._" where TensorFlow allows no
 * dot.
 */
export function calledByAdapters(path: string): Called {
  const segments = path.replaceAll("_._", ".").replaceAll("/", ".").split(".");
  const last = segments.pop()!;
  const { leaf = last, layout } = LEAVES.get(last) ?? {};
  return { name: [...segments, leaf].join("."), layout };
}

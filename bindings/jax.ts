/**
 * Parameters of jax-js models as bases. Arrays of jax-js are values: a switch puts new ones in their places in the
 * tree. On WebGPU they are folded where they are made, in jax-js's own buffers.
 */

import type { DeviceBuffer } from "../src/backends/backend.ts";
import { viewValues, type WeightHost } from "../src/core/base.ts";
import { described } from "../src/errors.ts";
import type { Layout } from "../src/format/format.ts";
import { encodeFloats, type FloatDtype } from "../src/tensor/dtypes.ts";
import { calledByAdapters, frameworkHost, type Weight, type WeightPlace } from "./framework-host.ts";

/** An array of jax-js, as far as hosts need it. */
export interface JaxArray {
  readonly shape: number[];
  readonly dtype: string;
  readonly device: string;
  readonly ref: this;
  data(): Promise<unknown>;
  gpuBuffer(): Promise<object>;
  gpuBufferSync(): object;
  astype(dtype: never): JaxArray;
  dispose(): void;
}

/** The module `@jax-js/jax`. */
export interface Jax {
  readonly numpy: {
    array(values: never, options: never): JaxArray;
    zeros(shape: number[], options: never): JaxArray;
  };
}

/** Arrays in objects and lists. */
export type JaxTree = JaxArray | { [name: string]: JaxTree } | JaxTree[];

interface Leaf {
  readonly path: string;
  readonly holder: Record<string, JaxArray>;
  readonly key: string;
}

/** Number formats of jax-js that can be folded. */
const DTYPES = new Map<string, FloatDtype>([
  ["float32", "f32"],
  ["float16", "f16"],
]);

/**
 * The parameters of a jax-js model, as a base for `createRuntime`. A parameter goes by its path in the tree, with dots.
 * A switch puts new arrays into the tree and frees the ones before: take them from the tree for each run, by `.ref`.
 * @param jax the module `@jax-js/jax`
 * @param params objects and lists of arrays
 * @throws TypeError when one of them is not that
 * @example
 * const runtime = await createRuntime(pack, { base: jaxHost(jax, params) });
 * await runtime.switchTask("sst2");
 */
export function jaxHost(jax: Jax, params: JaxTree): WeightHost {
  if (typeof jax?.numpy?.array !== "function") {
    throw new TypeError(`jaxHost: expected the module @jax-js/jax, got ${described(jax)}`);
  }
  const leaves = [...leavesOf(params as Record<string, JaxTree>)];
  if (leaves.length === 0) throw new TypeError(`jaxHost: expected a tree of arrays, got ${described(params)}`);
  const weights = new Map<string, Weight<JaxArray>>();
  for (const leaf of leaves) {
    const { name, layout } = calledByAdapters(leaf.path);
    const like = leaf.holder[leaf.key]!;
    // The second of two equal names is replaced by its path. Layouts are those of matrices.
    const own = weights.has(name) ? leaf.path : name;
    if (DTYPES.has(like.dtype))
      weights.set(own, weightOf(jax, leaf, like, like.shape.length === 2 ? layout : undefined));
  }
  return frameworkHost(weights, (array) => array.dispose());
}

/** @param path of the container, with a dot at the end */
function* leavesOf(container: Record<string, JaxTree>, path = ""): Iterable<Leaf> {
  for (const [key, value] of Object.entries(container ?? {})) {
    if (typeof (value as JaxArray | null)?.gpuBufferSync === "function") {
      yield { path: path + key, holder: container as Record<string, JaxArray>, key };
    } else if (typeof value === "object") yield* leavesOf(value as Record<string, JaxTree>, `${path}${key}.`);
  }
}

function weightOf({ numpy }: Jax, { holder, key }: Leaf, like: JaxArray, layout?: Layout): Weight<JaxArray> {
  const { device, dtype } = like;
  const shape = [...like.shape];
  const put = (value: JaxArray): void => {
    holder[key]!.dispose();
    holder[key] = value;
  };
  const place: WeightPlace = {
    buffer: () => holder[key]!.ref.gpuBufferSync() as DeviceBuffer,
    async flush() {
      const next = numpy.zeros(shape, { dtype, device } as never);
      await next.ref.gpuBuffer();
      put(next);
    },
  };
  return {
    ...{ dtype: DTYPES.get(dtype)!, shape, layout, put },
    async read() {
      const values = (await holder[key]!.ref.astype("float32" as never).data()) as Float32Array<ArrayBuffer>;
      return dtype === "float32" ? new Uint8Array(values.slice().buffer) : encodeFloats("f16", values);
    },
    make(view) {
      const values = numpy.array(viewValues(view) as never, { shape: [...view.shape], device } as never);
      return view.dtype === "f32" ? values : values.astype("float16" as never);
    },
    place: device === "webgpu" ? place : undefined,
  };
}

/**
 * Batches of a model's inputs as callers give them: made into tensors of an engine, and joined.
 */
import type { Engine, EngineTensor } from "../session/engine.ts";

/** Inputs of a batch by name: tensors of the runtime, or what has the fields of one (transformers.js). */
export type BatchFeeds = Readonly<
  Record<string, { readonly type?: string; readonly dims: readonly number[]; readonly data: unknown }>
>;

/** @throws TypeError naming what is no tensor */
export function batchTensors(engine: Engine, batch: BatchFeeds): Record<string, EngineTensor> {
  const entries = Object.entries(batch).map(([name, { type, dims, data }]) => {
    if (ArrayBuffer.isView(data) && Array.isArray(dims)) return [name, engine.tensor(data as Float32Array, dims, type)];
    throw new TypeError(`the input "${name}" of a batch is no tensor: expected { dims, data }`);
  });
  return Object.fromEntries(entries);
}

/** What feeds of one batch have alike: the dimensions of each input behind the first, as a string. */
export function shapesOf(feeds: BatchFeeds): string {
  return JSON.stringify(Object.entries(feeds).map(([name, { dims }]) => [name, ...dims.slice(1)]));
}

/**
 * Examples may be of several lengths, but inputs that are of one shape in one of them are so in all.
 * @throws TypeError naming the input that is not
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
 * One batch of several examples' feeds, joined along the first dimension.
 * @throws TypeError when they cannot be
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

/**
 * Second moments of the inputs of a model's adapted modules, over plain text. An error of ΔW matters only where inputs are; packs made
 * with these moments minimise the error of the modules' outputs instead of the error of ΔW.
 */

import type { Adapter, AdapterModule } from "../adapters/adapter.ts";
import { checkAdapters } from "../adapters/adapter.ts";
import { checkArgument, checkOptions } from "../arguments.ts";
import { Locator } from "../core/base.ts";
import { AliasMatcher, locate } from "../core/mismatch.ts";
import { BaseMismatchError } from "../errors.ts";
import { knownSizes, tinyFeeds } from "../onnx/feeds.ts";
import { onnxHost } from "../onnx/host.ts";
import { FLOAT, linearsOf, NotLinear } from "../onnx/linear.ts";
import { findParameters } from "../onnx/modules.ts";
import { makeValue } from "../onnx/nodes.ts";
import { readModel } from "../onnx/read.ts";
import { detachWeights } from "../onnx/write.ts";
import { throwIfAborted } from "../pace.ts";
import { dataOf, type Engine } from "../session/engine.ts";
import { checkTokenizer, encoderOf, type Tokenizer } from "../session/tokens.ts";
import type { AbortOptions, SourceInput } from "../source.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import { batchTensors, completeInputs } from "./batch-feeds.ts";

/** Options of `inputMoments`. */
export interface MomentsOptions extends AbortOptions {
  readonly adapters: readonly Adapter[];
  readonly texts: readonly string[];
  /** Turns texts into the model's inputs, which are named, one row each: a tokenizer. */
  readonly encode: Tokenizer;
  /** Names of weights in the model, by module name, for weights that are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /** Input that marks padding, which is left out of the moments. Default: "attention_mask". */
  readonly mask?: string | undefined;
  /** Largest number of texts. Default: 256. */
  readonly most?: number | undefined;
  /** Texts per run. Default: 16. */
  readonly batch?: number | undefined;
}

/**
 * Computes second moments E[x·xᵀ] [in, in], row-major, of the inputs x of each module that the adapters change, on the model without
 * adapters.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model
 * @throws BaseMismatchError when a module is not in the model, or no float linear layer of its main graph
 * @throws RangeError when there is no text
 */
export async function inputMoments(
  engine: Engine,
  model: SourceInput,
  options: MomentsOptions,
): Promise<Map<string, Float64Array>> {
  checkArgument("inputMoments", engine, "an engine (createEngine(ort))", "load");
  checkOptions("inputMoments", options, ["adapters", "texts", "encode", "names", "mask", "most", "batch", "signal"]);
  const { adapters, texts, encode, names, mask = "attention_mask", most = 256, batch = 16, signal } = options;
  checkAdapters("inputMoments: adapters", adapters);
  checkTokenizer("inputMoments: encode", encode);
  if (texts.length === 0) throw new RangeError("inputMoments: no texts");
  const file = await readModel(model, { signal });
  try {
    const main = file.model.graph.proto;
    const own = main.input.filter(({ name }) => !file.model.graph.initializers.has(name));
    const example = tinyFeeds(own, knownSizes(file.model, own));
    const locator = new Locator(onnxHost(file), names);
    locator.names = new AliasMatcher(locator.parameters.keys());
    const entering = inputsOf(file.model, locator, modulesOf(adapters));
    const there = new Set([...main.output, ...main.input].map(({ name }) => name));
    // Query, key and value have one input, whose moments are computed once.
    const sums = new Map(
      [...entering.values()].map(({ x, width }) => [x, { width, sum: new Float64Array(width * width), rows: 0 }]),
    );
    for (const x of sums.keys()) if (!there.has(x)) main.output.push(makeValue(x, FLOAT));
    const loaded = await engine.load(await detachWeights(file, [], { signal }));
    try {
      const encodeTexts = encoderOf(encode, loaded.inputNames);
      const some = shuffle([...texts], uniform(0)).slice(0, most);
      for (let at = 0; at < some.length; at += batch) {
        throwIfAborted(signal);
        const given = await encodeTexts(some.slice(at, at + batch));
        const feeds = completeInputs(example, loaded.inputNames, given);
        const found = await engine.run(loaded, batchTensors(engine, feeds), loaded.outputNames);
        const kept = feeds[mask] && Array.from(feeds[mask].data as ArrayLike<bigint | number>, Number);
        for (const [x, one] of sums)
          one.rows += add(one.sum, (await dataOf(found[x]!)) as Float32Array, one.width, kept);
      }
      for (const { sum, rows } of sums.values()) sum.forEach((value, i) => (sum[i] = value / rows));
      return new Map([...entering].map(([name, { x }]) => [name, sums.get(x)!.sum]));
    } finally {
      await engine.release(loaded);
    }
  } finally {
    await file.close();
  }
}
function modulesOf(adapters: readonly Adapter[]): Map<string, AdapterModule> {
  return new Map(adapters.flatMap(({ modules }) => [...modules]));
}

/** The value that enters each module. */
function inputsOf(
  model: Parameters<typeof findParameters>[0],
  locator: Locator,
  modules: ReadonlyMap<string, AdapterModule>,
): Map<string, { x: string; width: number }> {
  const parameters = new Map(findParameters(model).map((parameter) => [parameter.name, parameter]));
  const entering = new Map<string, { x: string; width: number }>();
  for (const [name, module] of modules) {
    const refuse = (why: string): BaseMismatchError =>
      new BaseMismatchError(`the input of "${name}" cannot be observed: ${why}`, { module: name });
    const linears = linearsOf(model, parameters.get(locate(locator, module).name)!);
    if (linears instanceof NotLinear) throw refuse(linears.reason);
    const linear = linears.find(({ graph, type }) => graph === model.graph.proto && type === FLOAT);
    if (!linear) throw refuse("it is no f32 linear layer of the main graph");
    entering.set(name, { x: linear.x, width: module.in });
  }
  return entering;
}

/** Adds Σ x·xᵀ over rows [n, width]; skips padding where there are as many rows as tokens. @returns how many rows were added */
function add(sum: Float64Array, rows: Float32Array, width: number, kept: readonly number[] | undefined): number {
  const count = rows.length / width;
  let added = 0;
  for (let row = 0; row < count; row++) {
    if (kept?.length === count && !kept[row]) continue;
    added++;
    for (let i = 0; i < width; i++) {
      const x = rows[row * width + i]!;
      for (let j = 0; j <= i; j++) sum[i * width + j]! += x * rows[row * width + j]!;
    }
  }
  for (let i = 0; i < width; i++) for (let j = 0; j < i; j++) sum[j * width + i] = sum[i * width + j]!;
  return added;
}

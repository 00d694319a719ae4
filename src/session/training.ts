/**
 * Learning on a session: a training graph in the same model, and a way for a trainer to run it. Loaded
 * when a session is made `trainable`.
 */

import { buildTrainingGraph, logitsOf, type TrainingGraph } from "../autodiff/graph.ts";
import { LARGEST_CONSTANT, type ShapeProbe } from "../autodiff/shapes.ts";
import type { Pack } from "../core/pack.ts";
import type { ModuleFilter } from "../core/part.ts";
import { BaseMismatchError } from "../errors.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { TaskInput } from "../onnx/inject.ts";
import { dimsOf, nestedGraphs } from "../onnx/model.ts";
import type { GraphProto, NodeProto } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { dataOf, type Engine, type LoadOptions, type Tensors, toTensors } from "./engine.ts";
import type { SessionOptions } from "./options.ts";
import type { PreparedModel } from "./prepare.ts";
import type { InputValues } from "./values.ts";

/** Parts that a session that can learn lends to a trainer. */
export interface Trainable {
  readonly engine: Engine;
  readonly graph: TrainingGraph;
  readonly inputs: readonly TaskInput[];
  /**
   * Made-up values of the model's own inputs, for their types and what is fixed of their dimensions; undefined where
   * none fit.
   */
  readonly example: ReadonlyMap<string, Feed> | undefined;
  /** Their values on the base. */
  base(): Promise<InputValues>;
  /** Runs the model on inputs that are all given, between the session's own runs. */
  run(feeds: Tensors, fetches: readonly string[]): Promise<Tensors>;
}

/**
 * Which half of an encoder-decoder a file may be, by its inputs and outputs; encoders that are whole models look like
 * one, too.
 */
export function halfOf({ model }: ModelFile): "encoder" | "decoder" | undefined {
  const { input, output } = model.graph.proto;
  const names = new Set(input.map(({ name }) => name));
  if (names.has("encoder_hidden_states")) return "decoder";
  const writes = !names.has("decoder_input_ids") && output.some(({ name }) => name === "last_hidden_state");
  return writes ? "encoder" : undefined;
}

/**
 * A file of an encoder or a decoder alone does not learn what the other's tasks need.
 * @throws BaseMismatchError for such a file, where the other is adapted too, or where it has a branch for each use of
 *   its cache
 */
export function refuseParts(
  file: ModelFile,
  { modules }: Pick<Pack, "modules">,
  keep: ModuleFilter = () => true,
): void {
  const { model } = file;
  const half = halfOf(file);
  if (half === undefined) return;
  const other = half === "decoder" ? "encoder" : "decoder";
  const elsewhere = modules.find(({ name }) => keep(name) && name.split(".").includes(other))?.name;
  const merged = half === "decoder" && model.graph.proto.node.some(({ opType }) => opType === "If");
  if (elsewhere === undefined && !merged) return;
  const why =
    elsewhere === undefined
      ? "it has a branch for each use of its cache, which gradients do not pass"
      : `tasks adapt "${elsewhere}" in the other, and gradients do not pass from file to file`;
  const alone = elsewhere === undefined ? "" : ", or train this file's layers alone, with the option `modules`";
  const message = `${model.name} is the ${half} of a model in two files, which cannot be trained by itself: ${why}. To learn, export encoder and decoder as one graph${alone}; the task then serves the separate files`;
  throw new BaseMismatchError(message, { module: elsewhere ?? "" });
}

/**
 * Adds loss and gradients to a prepared model, in place.
 * @returns the graph, how to load the model, and what every run is fed with that does not learn
 * @throws FormatError naming every node that gradients do not pass
 * @throws BaseMismatchError where a layer that a task may bring whole is adapted too, or one that is not linear is
 *   adapted
 */
export async function addTraining(
  engine: Engine,
  file: ModelFile,
  prepared: PreparedModel,
  trainable: Exclude<SessionOptions["trainable"], undefined>,
): Promise<{ graph: TrainingGraph; load: LoadOptions; idle: Tensors }> {
  const both = [...prepared.base.heads].find(([, { adapted }]) => adapted)?.[0];
  if (both !== undefined) {
    const message = `tasks bring "${both}" whole and others adapt it, which cannot be trained; pass ignore: ["${both}"], or a pack without`;
    throw new BaseMismatchError(message, { module: both });
  }
  for (const { name, kind } of prepared.modules) {
    if (kind === "linear") continue;
    const what = `${kind === "embedding" ? "an" : "a"} ${kind}`;
    const message = `"${name}" is ${what}, whose term cannot be trained; pass \`modules\` without it`;
    throw new BaseMismatchError(message, { module: name });
  }
  fixInnerHeads(file.model.graph.proto, prepared.inputs, (module) => prepared.base.heads.get(module)?.labels);
  const logits = typeof trainable === "object" ? trainable.logits : undefined;
  const name = logitsOf(file.model, prepared, logits);
  const output = file.model.graph.proto.output.find((one) => one.name === name);
  const tokens = output && dimsOf(output)?.length === 3;
  const graph = await buildTrainingGraph(file, prepared, {
    probe: probeOf(engine),
    logits,
    tokens,
    gathers: engine.gpu !== undefined,
  });
  const idle = {
    [graph.learnInput]: engine.tensor(Uint8Array.of(0), []),
    [graph.targetsInput]: engine.tensor(new Float32Array(1), [1, 1]),
    ...(graph.tokens
      ? {
          [graph.tokens.positions]: engine.tensor(new BigInt64Array(0), [0]),
          [graph.tokens.classes]: engine.tensor(new BigInt64Array(1), [1, 1]),
        }
      : { [graph.squaresInput]: engine.tensor(new Float32Array(1), [1, 1]) }),
  };
  // WGSL promises sine and cosine to 2⁻¹¹, too little for gradients. They turn positions: a few numbers.
  const exactNodes = file.model.graph.proto.node.flatMap(({ opType, name }) =>
    (opType === "Sin" || opType === "Cos") && name !== "" ? [name] : [],
  );
  return { graph, load: { purpose: "train", exactNodes }, idle };
}

/**
 * Looks at shapes, unoptimised, which is sooner done, and on the CPU: WebGPU would compile shaders for each operator
 * and may lack f16.
 */
function probeOf(engine: Engine): ShapeProbe {
  return async (detached, feeds) => {
    const model = await engine.load(detached, { purpose: "inspect" });
    try {
      const results = [];
      for (const feed of feeds) {
        const found = await engine.run(model, toTensors(engine, feed), model.outputNames);
        const entries = Object.entries(found).map(async ([name, tensor]) => {
          const { type, dims } = tensor;
          // The values of a whole run, twice, would be the most that this process ever holds.
          const small = elementsOf(dims) <= LARGEST_CONSTANT;
          return [name, { type, dims, data: small ? await dataOf(tensor) : undefined }] as const;
        });
        results.push(Object.fromEntries(await Promise.all(entries)));
      }
      return results;
    } finally {
      await engine.release(model);
    }
  };
}

// Layers that tasks bring whole are trained with any number of outputs, one for each label. In a head of several layers
// that holds for the last one only; the layers in front of it keep the model's number of outputs. Uses graphs and names
// only.

/**
 * Fixes the outputs of inner layers of heads, those with another product behind them, in the inputs' dimensions, in
 * place.
 */
export function fixInnerHeads(
  main: GraphProto,
  inputs: readonly TaskInput[],
  outputsOf: (module: string) => number | undefined,
): void {
  for (const { name, of, kind } of inputs) {
    const out = outputsOf(of);
    if (kind !== "headWeight" || out === undefined || !isMultiplied(main, name)) continue;
    for (const input of inputs)
      if (input.of === of && /^head/.test(input.kind)) (input.dims as (number | string)[])[2] = out;
  }
}

/** True if another product follows the one with `weight`. */
function isMultiplied(main: GraphProto, weight: string): boolean {
  const reached = new Set<string>();
  const passes = (node: NodeProto): boolean => {
    const inside = nestedGraphs(node).flatMap((graph) => graph.node);
    const found = inside.some(passes);
    const own = node.input.includes(weight);
    const entering = [...node.input, ...inside.flatMap(({ output }) => output)];
    // Shape reads only how many outputs the weight has.
    if (node.opType === "Shape" || !(own || entering.some((value) => reached.has(value)))) return found;
    for (const value of node.output) reached.add(value);
    return found || (!own && /MatMul|Gemm|Conv/.test(node.opType));
  };
  return main.node.some(passes);
}

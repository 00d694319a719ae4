/**
 * The training graph: a model that answers with any task, extended to learn one too. Inputs that `graft` has added (factors of layers,
 * heads) get gradients in a branch that runs only on demand. It uses standard operators, and for weights in blocks the
 * runtime's own, so that every build of ONNX Runtime runs it, including those for the web, which have no training of their own. Runtime and optimiser are the caller's: it runs the probes and takes
 * the steps.
 */
import { FormatError } from "../errors.ts";
import type { Grafted, TaskInput } from "../onnx/adapted.ts";
import { type Feed, knownSizes, presentNames, tinyFeeds } from "../onnx/feeds.ts";
import { BOOL, FLOAT, INT64 } from "../onnx/linear.ts";
import { indexGraph, type OnnxModel } from "../onnx/model.ts";
import { makeValue, PREFIX } from "../onnx/nodes.ts";
import type { ValueInfoProto } from "../onnx/onnx_pb.ts";
import type { ModelFile } from "../onnx/read.ts";
import { flattenScales, unpackProducts } from "./block-weights.ts";
import { branch } from "./branch.ts";
import { Emitter } from "./emit.ts";
import { crossEntropy, sparseCrossEntropy } from "./loss.ts";
import { probePath } from "./path.ts";
import { POSITIONS, pickPositions } from "./positions.ts";
import { Problems } from "./problems.ts";
import { recompute } from "./recompute.ts";
import { differentiate } from "./reverse.ts";
import { checkFeeds, type ShapeProbe, type Shapes } from "./shapes.ts";
import { takeUntransposed } from "./transposed.ts";

export interface TrainingGraphOptions {
  /** The output that holds the logits, [… , classes]. Default: "logits", or the only output. */
  readonly logits?: string | undefined;
  /**
   * Whether the model answers at every position, [batch, length, classes], and learns from some of them. Targets then name a few classes
   * of each. Default: false.
   */
  readonly tokens?: boolean | undefined;
  /** Runs the model while the graph is made, on two tiny feeds. */
  readonly probe: ShapeProbe;
  /**
   * Two feeds of the model's own inputs, for models that reject made-up ones. Free dimensions must be larger than 1 and differ within a
   * feed and between the two: 2×5 and 3×7. Sizes that are equal in both, such as that of an empty cache, count as fixed.
   */
  readonly feeds?: readonly [ReadonlyMap<string, Feed>, ReadonlyMap<string, Feed>] | undefined;
  /**
   * Whether the backward pass unpacks weights of 4 bits with onnxruntime's `GatherBlockQuantized`, since WebGPU lacks other operators on
   * bytes. Default: false.
   */
  readonly gathers?: boolean | undefined;
  /** Nodes of each part of the branch that learns, about. Default: those of a layer. */
  readonly part?: number | undefined;
}

/** Names of a training graph's additional inputs and outputs. */
export interface TrainingGraph {
  /** bool scalar: whether this run learns. Otherwise loss and gradients are empty. */
  readonly learnInput: string;
  /** f32 [N, C]: N rows of logits, all leading dimensions flattened. Ignored in a run that does not learn. */
  readonly targetsInput: string;
  /** f32 [1, C]: 1 for columns of the logits that are features, compared by squares. Not for a model that answers at every position. */
  readonly squaresInput: string;
  /** Inputs of a model that answers at every position. */
  readonly tokens: TokenInputs | undefined;
  readonly logitsOutput: string;
  /** Dimensions of the logits: numbers, and names of free ones; the rows of the inputs are "batch". */
  readonly logitsDims: readonly (number | string)[];
  /** f32 scalar. */
  readonly lossOutput: string;
  /** Output of the gradient for each trained input, in its shape. */
  readonly gradients: ReadonlyMap<string, string>;
}

/** Additional inputs of a model that answers at every position. */
export interface TokenInputs {
  /**
   * int64 [N]: the rows of logits to compute, numbered across all texts: text · length + position. The logits are then [1, N, C].
   * Empty: all rows, and the logits are [batch, length, C].
   */
  readonly positions: string;
  /** int64 [N, k]: the classes of the targets [N, k]; those of a row all differ. */
  readonly classes: string;
}

/** The oldest opset in which the added operators mean what is meant here. */
const LEAST_OPSET = 13;

const TARGETS = `${PREFIX}.targets`;
const SQUARES = `${PREFIX}.squares`;
const LEARN = `${PREFIX}.learn`;
const LOSS = `${PREFIX}.loss`;
const CLASSES = `${PREFIX}.classes`;
const NAMES = { learnInput: LEARN, targetsInput: TARGETS, squaresInput: SQUARES, lossOutput: LOSS } as const;

/** Sizes of free dimensions in the two feeds: all differ. Most models have two. */
const SIZES = [
  [2, 5, 31, 41, 47, 59],
  [3, 7, 37, 43, 53, 61],
] as const;

/** The same for task inputs: labels, rank of factors, rows of tables. Factors of many layers are most of the fed numbers. */
const TASK_SIZES = [
  { labels: 23, q: 11, rows: 67 },
  { labels: 29, q: 13, rows: 71 },
] as const;

/** Numbers of positions in the two feeds, each with a whole vocabulary; equal to no other size. */
const POSITION_COUNTS = [17, 19] as const;

/** Task inputs that are trained. The others are constant while a task is learned. */
const TRAINED: ReadonlySet<TaskInput["kind"]> = new Set(["A", "B", "headWeight", "headBias"]);

/**
 * Adds loss and gradients to a grafted model, in place. Gradients belong to one task: trained inputs must have 1 as `tasks`.
 *
 * @param grafted result of `graft` on `file.model`
 * @example
 * const file = await readModel("model.onnx");
 * const grafted = graft(file.model, { modules, biases: [], rows: [], vectors: [], heads });
 * const graph = await buildTrainingGraph(file, grafted, { probe });
 * const { bytes, files } = await detachWeights(file, grafted.initializers);
 *
 * @throws FormatError with every reason at once: operators that gradients do not pass (with the names of their nodes),
 *   trained layers that do not reach the loss, half-precision values, probe feeds that tell nothing, an old opset
 */
export async function buildTrainingGraph(
  file: ModelFile,
  grafted: Grafted,
  options: TrainingGraphOptions,
): Promise<TrainingGraph> {
  const { model } = file;
  const main = model.graph.proto;
  const problems = new Problems();
  checkOpset(model, problems);
  const logits = logitsOf(model, grafted, options.logits);
  const ofTasks = new Set(grafted.inputs.map(({ name }) => name));
  const own = main.input.filter(({ name }) => !ofTasks.has(name) && !model.graph.initializers.has(name));
  const trained = grafted.inputs.filter(({ kind }) => TRAINED.has(kind));
  if (trained.length === 0) problems.add("nothing is trained: neither terms nor heads are asked for");
  if (!options.gathers) flattenScales(indexGraph(main, model.name));
  // Declared shapes need not hold for other heads.
  main.valueInfo.length = 0;
  const picked = options.tokens ? pickPositions(indexGraph(main, model.name), logits) : undefined;
  const indexed: ModelFile = { ...file, model: { ...model, graph: indexGraph(main, model.name) } };
  const feeds = probeFeeds(indexed.model, own, grafted, picked !== undefined, options.feeds, problems);
  const path = await probePath(
    indexed,
    trained.map(({ name }) => name),
    logits,
    problems,
    { probe: options.probe, feeds, initializers: grafted.initializers },
  );
  const emit = new Emitter(main, model.opset);
  emit.gathers = options.gathers ?? false;
  let loss = "";
  const seed = (): string => {
    const made = picked
      ? sparseCrossEntropy(emit, logits, CLASSES, TARGETS)
      : crossEntropy(emit, logits, TARGETS, SQUARES);
    loss = made.loss;
    return made.gradient;
  };
  const found = differentiate(path, logits, seed, emit, problems);
  problems.throwIfAny(model.name);

  const gradients = new Map(trained.map(({ name }) => [name, `${name}.gradient`]));
  const results = [
    { value: loss, as: LOSS, rank: 0 },
    ...trained.map(({ name, dims }) => ({ value: found.get(name)!, as: gradients.get(name)!, rank: dims.length })),
  ];
  main.input.push(makeValue(TARGETS, FLOAT, ["", ""]), makeValue(LEARN, BOOL, []));
  main.input.push(picked ? makeValue(CLASSES, INT64, ["", ""]) : makeValue(SQUARES, FLOAT, ["", ""]));
  const nodes = recompute(path, main, emit);
  const constants = new Map(main.initializer.map(({ name, dataType }) => [name, dataType]));
  const typeOf = (value: string): number | undefined => constants.get(value) ?? path.shapes.dataType(value);
  const learning = branch(LEARN, nodes, results, typeOf, options.part);
  picked?.choose();
  main.node.push(learning);
  main.output.push(...results.map(({ as }) => makeValue(as, FLOAT)));
  takeUntransposed(indexGraph(main, model.name), model.opset);
  if (!emit.gathers) unpackProducts(indexGraph(main, model.name), model.opset, (value) => path.shapes.rank(value));
  const tokens = picked && { positions: POSITIONS, classes: CLASSES };
  return { ...NAMES, logitsOutput: logits, tokens, logitsDims: namedDims(path.shapes, logits, ofTasks), gradients };
}

function checkOpset({ opset }: OnnxModel, problems: Problems): void {
  if (opset >= LEAST_OPSET) return;
  problems.add(`its opset is ${opset}, at least ${LEAST_OPSET} is needed (export it again with opset_version=17)`);
}

/** Feeds for the runs that find shapes: two, with the model's own inputs and those of a task. */
function probeFeeds(
  model: OnnxModel,
  own: readonly ValueInfoProto[],
  { inputs }: Grafted,
  picks: boolean,
  given: TrainingGraphOptions["feeds"],
  problems: Problems,
): readonly ReadonlyMap<string, Feed>[] | undefined {
  const fixed = knownSizes(model, own);
  const feeds = given ?? madeUp(own, fixed, problems);
  if (feeds) checkFeeds(feeds, own, problems, fixed);
  return feeds?.map((feed, i) => {
    const all = new Map([...feed, ...taskFeeds(inputs, TASK_SIZES[i]!)]);
    return picks ? all.set(POSITIONS, somePositions(POSITION_COUNTS[i]!)) : all;
  });
}

/** The first position, which every feed has: only shapes are wanted. */
function somePositions(count: number): Feed {
  return { dataType: INT64, dims: [count], data: new BigInt64Array(count) };
}

/** Names the dimensions of a value by the inputs they come from. */
function namedDims(shapes: Shapes, value: string, ofTasks: ReadonlySet<string>): (number | string)[] {
  const factor = ({ input, axis }: { input: string; axis: number }): string =>
    ofTasks.has(input) ? "labels" : axis === 0 ? "batch" : `${input}[${axis}]`;
  const known = shapes.dimensions(value);
  return shapes.dims(value).map((size, axis) => {
    const dimension = known?.[axis];
    return size ?? (typeof dimension === "object" ? dimension.map(factor).join(" · ") : "?");
  });
}

/** Name of the output that holds the logits. @throws FormatError when there is none */
export function logitsOf(
  { name: file, graph }: OnnxModel,
  { probe, formProbes }: Grafted,
  wanted: string | undefined,
): string {
  const outputs = graph.proto.output
    .map(({ name }) => name)
    .filter((name) => ![probe, ...formProbes].some((one) => name === one?.x || name === one?.term));
  const found =
    wanted === undefined && outputs.length === 1 ? outputs[0] : outputs.find((name) => name === (wanted ?? "logits"));
  if (found !== undefined) return found;
  const message = `has no output "${wanted ?? "logits"}", only ${outputs.map((name) => `"${name}"`).join(", ")}; name the one that holds the logits`;
  throw new FormatError(message, { file, part: "graph" });
}

function madeUp(
  inputs: readonly ValueInfoProto[],
  fixed: ReadonlyMap<string, number>,
  problems: Problems,
): readonly ReadonlyMap<string, Feed>[] | undefined {
  const present = presentNames(inputs);
  const feeds = SIZES.map((sizes) => {
    const known = new Map<string, number>();
    return tinyFeeds(inputs, fixed, (name) => {
      const dimension = present(name);
      const size = known.get(dimension) ?? sizes[known.size] ?? sizes.at(-1)! + 10 * known.size;
      known.set(dimension, size);
      return size;
    });
  });
  const [first, second] = feeds;
  if (first && second) return [first, second];
  const names = inputs.map(({ name }) => `"${name}"`).join(", ");
  problems.add(
    `values cannot be made up for all of its inputs (${names}): they must be tensors of floats, integers or bools, of few numbers`,
  );
  return undefined;
}

/** Makes values of the inputs of one task: numbers for what is trained, no change for the rest. */
function taskFeeds(inputs: readonly TaskInput[], sizes: Readonly<Record<string, number>>): [string, Feed][] {
  return inputs.map(({ name, kind, dims: declared }) => {
    const dims = declared.map((size) => (typeof size === "number" ? size : (sizes[size] ?? 1)));
    const count = dims.reduce((a, b) => a * b, 1);
    if (kind === "indices") return [name, { dataType: INT64, dims, data: new BigInt64Array(count).fill(-1n) }];
    const data = new Float32Array(count).fill(Number(kind === "scale"));
    for (let i = 0; i < (TRAINED.has(kind) ? count : 0); i++) data[i] = 0.1 * (((7 * i + 1) % 11) / 5 - 1);
    return [name, { dataType: FLOAT, dims, data }];
  });
}

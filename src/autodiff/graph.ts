/**
 * The training graph: a model that answers with any task, extended to learn one too. Inputs that `inject` has added
 * (factors of layers, heads) get gradients in a branch that runs only on demand. Every build of ONNX Runtime has its
 * operators, those for the web too, which have no training of their own. The caller runs the probes and takes the
 * steps.
 */

import { FormatError } from "../errors.ts";
import { type Feed, knownSizes, presentNames, tinyFeeds } from "../onnx/feeds.ts";
import type { Injected, TaskInput } from "../onnx/inject.ts";
import { BOOL, FLOAT, INT64 } from "../onnx/linear.ts";
import { type Graph, indexGraph, inOrder, intOf, type OnnxModel } from "../onnx/model.ts";
import { makeNode, makeValue, NodeEdits, PREFIX } from "../onnx/nodes.ts";
import { create, type GraphProto, type NodeProto, type ValueInfoProto } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { flattenScales, unpackProducts } from "./block-weights.ts";
import { operatorOf } from "./definitions.ts";
import { Emitter, type Moment } from "./emit.ts";
import { type ProbedPath, probePath } from "./path.ts";
import { NodeGradient, RULES, untransposed, type Walk } from "./rules.ts";
import { Problems, type ShapeProbe, type Shapes } from "./shapes.ts";

export interface TrainingGraphOptions {
  /** The output that holds the logits, [… , classes]. Default: "logits", or the only output. */
  readonly logits?: string | undefined;
  /**
   * The model answers at every position, [batch, length, classes], and learns from a few classes of some. Default:
   * false.
   */
  readonly tokens?: boolean | undefined;
  /** Runs the model while the graph is made, on two tiny feeds. */
  readonly probe: ShapeProbe;
  /** Unpacks 4-bit weights with `GatherBlockQuantized`, since WebGPU lacks other operators on bytes. Default: false. */
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
  /**
   * f32 [1, C]: 1 for columns of the logits that are features, compared by squares. Not for a model that answers at
   * every position.
   */
  readonly squaresInput: string;
  /** Inputs of a model that answers at every position. */
  readonly tokens: TokenInputs | undefined;
  readonly logitsOutput: string;
  /** Dimensions of the logits: numbers, and names of free ones; the rows of the inputs are "batch". */
  readonly logitsDims: readonly (number | string)[];
  readonly lossOutput: string;
  /** Output of the gradient for each trained input, in its shape. */
  readonly gradients: ReadonlyMap<string, string>;
}

/** Additional inputs of a model that answers at every position. */
interface TokenInputs {
  /**
   * int64 [N]: the rows of logits to compute, numbered across all texts: text · length + position. The logits are then
   * [1, N, C]. Empty: all rows, and the logits are [batch, length, C].
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

/**
 * The same for task inputs: labels, rank of factors, rows of tables. Factors of many layers are most of the fed
 * numbers.
 */
const TASK_SIZES = [
  { labels: 23, q: 11, rows: 67 },
  { labels: 29, q: 13, rows: 71 },
] as const;

/** Numbers of positions in the two feeds, each with a whole vocabulary; equal to no other size. */
const POSITION_COUNTS = [17, 19] as const;

/** Task inputs that are trained. The others are constant while a task is learned. */
const TRAINED: ReadonlySet<TaskInput["kind"]> = new Set(["A", "B", "headWeight", "headBias"]);

/**
 * Adds loss and gradients to a model with task inputs, in place. Gradients belong to one task: trained inputs must have
 * 1 as `tasks`.
 *
 * @param injected result of `inject` on `file.model`
 * @example
 * const file = await readModel("model.onnx");
 * const injected = inject(file.model, { modules, biases: [], rows: [], vectors: [], heads });
 * const graph = await buildTrainingGraph(file, injected, { probe });
 * const { bytes, files } = await detachWeights(file);
 *
 * @throws FormatError with every reason at once: operators that gradients do not pass (with the names of their nodes),
 *   trained layers that do not reach the loss, half-precision values, probe feeds that tell nothing, an old opset
 */
export async function buildTrainingGraph(
  file: ModelFile,
  injected: Injected,
  options: TrainingGraphOptions,
): Promise<TrainingGraph> {
  const { model } = file;
  const main = model.graph.proto;
  const problems = new Problems();
  if (model.opset < LEAST_OPSET) {
    const why = `its opset is ${model.opset}, at least ${LEAST_OPSET} is needed (export it again with opset_version=17)`;
    problems.add(why);
  }
  const logits = logitsOf(model, injected, options.logits);
  const ofTasks = new Set(injected.inputs.map(({ name }) => name));
  const own = main.input.filter(({ name }) => !ofTasks.has(name) && !model.graph.initializers.has(name));
  const trained = injected.inputs.filter(({ kind }) => TRAINED.has(kind));
  if (trained.length === 0) problems.add("nothing is trained: neither terms nor heads are asked for");
  if (!options.gathers) flattenScales(indexGraph(main, model.name));
  // Declared shapes need not hold for other heads.
  main.valueInfo.length = 0;
  const picked = options.tokens ? pickPositions(indexGraph(main, model.name), model.opset, logits) : undefined;
  const indexed: ModelFile = { ...file, model: { ...model, graph: indexGraph(main, model.name) } };
  const feeds = probeFeeds(indexed.model, own, injected, picked !== undefined, problems);
  const sources = trained.map(({ name }) => name);
  const path = await probePath(indexed, sources, logits, problems, options.probe, feeds);
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

/** Feeds for the runs that find shapes: two, with the model's own inputs and those of a task. */
function probeFeeds(
  model: OnnxModel,
  own: readonly ValueInfoProto[],
  { inputs }: Injected,
  picks: boolean,
  problems: Problems,
): readonly ReadonlyMap<string, Feed>[] | undefined {
  const fixed = knownSizes(model, own);
  const present = presentNames(own);
  const feeds = SIZES.map((sizes, i) => {
    const known = new Map<string, number>();
    const feed = tinyFeeds(own, fixed, (name) => {
      const dimension = present(name);
      const size = known.get(dimension) ?? sizes[known.size] ?? sizes.at(-1)! + 10 * known.size;
      known.set(dimension, size);
      return size;
    });
    for (const [name, value] of taskFeeds(inputs, TASK_SIZES[i]!)) feed?.set(name, value);
    // The first position, which every text has: only shapes are wanted.
    const count = POSITION_COUNTS[i]!;
    if (picks) feed?.set(POSITIONS, { dataType: INT64, dims: [count], data: new BigInt64Array(count) });
    return feed;
  });
  const made = feeds.filter((feed) => feed !== undefined);
  if (made.length === feeds.length) return made;
  const names = own.map(({ name }) => `"${name}"`).join(", ");
  problems.add(
    `values cannot be made up for all of its inputs (${names}): they must be tensors of floats, integers or bools, of few numbers`,
  );
  return undefined;
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
export function logitsOf({ name: file, graph }: OnnxModel, { probe }: Injected, wanted: string | undefined): string {
  const outputs = graph.proto.output
    .map(({ name }) => name)
    .filter((name) => name !== probe?.x && name !== probe?.term);
  const found =
    wanted === undefined && outputs.length === 1 ? outputs[0] : outputs.find((name) => name === (wanted ?? "logits"));
  if (found !== undefined) return found;
  const message = `has no output "${wanted ?? "logits"}", only ${outputs.map((name) => `"${name}"`).join(", ")}; name the one that holds the logits`;
  throw new FormatError(message, { file, part: "graph" });
}

/** Makes values of the inputs of one task: numbers for what is trained, no change for the rest. */
function taskFeeds(inputs: readonly TaskInput[], sizes: Readonly<Record<string, number>>): [string, Feed][] {
  return inputs.map(({ name, kind, dims: declared }) => {
    const dims = declared.map((size) => (typeof size === "number" ? size : (sizes[size] ?? 1)));
    const count = elementsOf(dims);
    if (kind === "indices") return [name, { dataType: INT64, dims, data: new BigInt64Array(count).fill(-1n) }];
    const data = new Float32Array(count).fill(Number(kind === "scale"));
    for (let i = 0; i < (TRAINED.has(kind) ? count : 0); i++) data[i] = 0.1 * (((7 * i + 1) % 11) / 5 - 1);
    return [name, { dataType: FLOAT, dims, data }];
  });
}

// The nodes that only learning runs: a branch of the graph, in parts that are graphs of their own. onnxruntime takes a
// time to plan a graph's memory that grows with the square of its nodes, and a language model has thousands of them
// here.

/** Nodes of a part, give or take half of them: about those of one layer. */
const PART = 300;

/** A result of the branch: f32 of some rank, or an element of no dimensions. */
interface BranchResult {
  readonly value: string;
  readonly as: string;
  readonly rank: number;
}

interface Output {
  readonly name: string;
  readonly type: number;
  /** Dimensions where nothing is learned. */
  readonly none: readonly number[];
}

/**
 * If(learn): nodes with their results; else empty results of the same types. Without a branch every run would learn.
 * @param nodes in an order in which they can run; they are changed
 * @param typeOf type of a value from outside; undefined where it is not known
 */
function branch(
  learn: string,
  nodes: readonly NodeProto[],
  results: readonly BranchResult[],
  typeOf: (value: string) => number | undefined,
  size: number = PART,
): NodeProto {
  const types = typesOf(nodes, typeOf);
  for (const { value } of results) types.set(value, FLOAT);
  const needed = new Set(results.map(({ value }) => value));
  const parts: NodeProto[] = [];
  for (const [i, own] of [...partsOf(nodes, types, size).entries()].reverse()) {
    const leaving = own.flatMap(outputsOf).filter((value) => needed.has(value));
    if (leaving.length === 0) continue;
    for (const { input } of own) for (const value of input) needed.add(value);
    const outputs = leaving.map((name) => ({ name, type: types.get(name)!, none: [0] }));
    parts.unshift(choice(learn, `${PREFIX}/learn/${i}`, renamed(own, leaving), outputs));
  }
  const made = results.map(({ value, as }) => makeNode("Identity", inner("then", as), [value], inner("then", as)));
  const outputs = results.map(({ as, rank }): Output => ({ name: as, type: FLOAT, none: Array(rank).fill(0) }));
  return choice(learn, `${PREFIX}/learn`, [...parts, ...made], outputs);
}

function outputsOf({ output }: NodeProto): string[] {
  return output.filter((value) => value !== "");
}

/** Name of an output inside a graph that makes it: no two values of nested graphs may have the same name. */
function inner(graph: "then" | "else", output: string): string {
  return `${PREFIX}/${graph}/${output}`;
}

/** If(learn): nodes that make the inner names of outputs; else constants. */
function choice(learn: string, name: string, nodes: NodeProto[], outputs: readonly Output[]): NodeProto {
  const graph = (of: "then" | "else", node: NodeProto[], more: Partial<GraphProto> = {}): GraphProto => {
    const output = outputs.map((one) => makeValue(inner(of, one.name), one.type));
    return create("GraphProto", { ...more, name: `${name}/${of}`, node, output });
  };
  const none = ({ type, none }: Output): string => `${name}/none/${[type, ...none].join("/")}`;
  const constants = new Map(outputs.map((one) => [none(one), one]));
  const initializer = [...constants].map(([name, { type, none }]) =>
    create("TensorProto", {
      ...{ name, dataType: type, dims: none.map(BigInt), rawData: new Uint8Array(none.length === 0 ? 4 : 0) },
    }),
  );
  const others = outputs.map((one) =>
    makeNode("Identity", inner("else", one.name), [none(one)], inner("else", one.name)),
  );
  const names = outputs.map(({ name }) => name);
  const branches = { then_branch: graph("then", nodes), else_branch: graph("else", others, { initializer }) };
  return makeNode("If", name, [learn], names, branches);
}

/** Weight of a value of unknown type, which must not leave a part: the output of a graph declares its type. */
const UNKNOWN = 1e6;

/** Divides nodes where the fewest values are still needed, since these stay in memory until the next part has run. */
function partsOf(
  nodes: readonly NodeProto[],
  types: ReadonlyMap<string, number | undefined>,
  size: number,
): NodeProto[][] {
  const last = new Map(nodes.flatMap(({ input }, i) => input.map((value) => [value, i] as const)));
  const needed = new Float64Array(nodes.length);
  for (const [i, node] of nodes.entries())
    for (const value of outputsOf(node)) {
      const weight = types.get(value) === undefined ? UNKNOWN : 1;
      needed[i]! += weight;
      needed[last.get(value) ?? i]! -= weight;
    }
  for (let i = 1; i < nodes.length; i++) needed[i]! += needed[i - 1]!;
  const parts: NodeProto[][] = [];
  let from = 0;
  while (nodes.length - from > 1.5 * size) {
    let best = from + (size >> 1);
    for (let i = best + 1; i < nodes.length && (i < from + 1.5 * size || needed[best]! >= UNKNOWN); i++)
      if (needed[i]! < needed[best]!) best = i;
    parts.push(nodes.slice(from, best + 1));
    from = best + 1;
  }
  return [...parts, nodes.slice(from)];
}

function renamed(nodes: NodeProto[], leaving: readonly string[]): NodeProto[] {
  const names = new Map(leaving.map((value) => [value, inner("then", value)]));
  const rename = (value: string): string => names.get(value) ?? value;
  for (const node of nodes) [node.input, node.output] = [node.input.map(rename), node.output.map(rename)];
  return nodes;
}

function typesOf(
  nodes: readonly NodeProto[],
  typeOf: (value: string) => number | undefined,
): Map<string, number | undefined> {
  const types = new Map<string, number | undefined>();
  const at = (value = ""): number | undefined => (types.has(value) ? types.get(value) : typeOf(value));
  for (const node of nodes) {
    // The model's own operators are of any kind, and what they make was probed; others are the emitter's.
    for (const value of outputsOf(node))
      types.set(value, value.startsWith(AGAIN) ? typeOf(value.slice(AGAIN.length)) : typeOfResult(node, at));
  }
  return types;
}

function typeOfResult(node: NodeProto, at: (value?: string) => number | undefined): number | undefined {
  const { opType, input } = node;
  if (opType === "Cast") return intOf(node, "to");
  if (/^(Shape|Size)$/.test(opType)) return INT64;
  if (/^(Equal|Less|Greater|LessOrEqual|And)$/.test(opType)) return BOOL;
  if (opType === "GatherBlockQuantized") return at(input[2]);
  return at(input[Number(/^(Where|DequantizeLinear)$/.test(opType))]);
}

// Restricts the last product of a model that answers at every position to some of them. Only positions of an answer
// meet a target, not those of its prompt, and the last product, with a vocabulary of tens of thousands, is by far the
// widest.

/** int64 [N]: positions among all rows of all texts, batch · length. Empty: every position is answered. */
const POSITIONS: string = `${PREFIX}.positions`;

const PICKED = `${PREFIX}/positions`;

/** Operators on each element by itself that may follow the product of the logits. */
const BEHIND = /^(Add|Sub|Mul|Div|Tanh|Identity|Cast)$/;

const PRODUCTS = /^(MatMul|Gemm|FusedMatMul|MatMulNBits)$/;

/**
 * Restricts the product that gives the logits to rows at the positions, in place: always, so that the graph can be
 * differentiated.
 * @returns `choose`, which makes it a choice: all rows where no positions are given. Undefined where no product gives
 *   the logits
 */
function pickPositions(graph: Graph, opset: number, logits: string): { readonly choose: () => void } | undefined {
  const main = graph.proto;
  const x = rowsBefore(graph, logits);
  if (x === undefined) return undefined;
  const before = ancestors(graph, logits);
  const uses = graph.consumers.get(x)!.filter(({ node }) => before.has(node));
  const read = (value: string): void => {
    for (const { node, input } of uses) node.input[input] = value;
  };
  const emit = new Emitter(main, opset, PICKED);
  const picked = emit.unsqueeze(emit.gather(emit.rows(x), POSITIONS), [0]);
  main.input.push(makeValue(POSITIONS, INT64, [`${PICKED}/count`]));
  const at = Math.min(...uses.map(({ node }) => main.node.indexOf(node)));
  main.node.splice(at, 0, ...emit.nodes);
  read(picked);
  const choose = (): void => {
    const written = emit.nodes.length;
    const any = emit.op("Greater", emit.op("Size", POSITIONS), emit.int(0));
    const rows = `${PICKED}/rows`;
    const branches = { then_branch: only(picked, "some"), else_branch: only(x, "all") };
    const choice = makeNode("If", rows, [any], rows, branches);
    main.node.splice(main.node.indexOf(emit.nodes[written - 1]!) + 1, 0, ...emit.nodes.slice(written), choice);
    read(rows);
  };
  return { choose };
}

function only(value: string, name: string): GraphProto {
  const output = `${PICKED}/${name}/rows`;
  return create("GraphProto", {
    name: `${PICKED}/${name}`,
    node: [makeNode("Identity", output, [value], output)],
    output: [makeValue(output, FLOAT)],
  });
}

/**
 * Input of the product that gives the logits; undefined where there is no such product, or several with different rows.
 */
function rowsBefore({ producers }: Graph, logits: string): string | undefined {
  const found = new Set<string>();
  const pending = [logits];
  for (const value of pending) {
    const node = producers.get(value);
    if (!node) continue;
    if (PRODUCTS.test(node.opType)) found.add(beforeOwn(producers, node.input[0]!));
    else if (BEHIND.test(node.opType)) pending.push(...node.input);
    else if (node.opType === "Reshape" && isOwn(node)) pending.push(node.input[0]!);
  }
  return found.size === 1 ? [...found][0] : undefined;
}

/** The rows from which terms and heads of tasks have made a value. */
function beforeOwn(producers: Graph["producers"], value: string): string {
  const node = producers.get(value);
  return node && isOwn(node) && /^(MatMul|Reshape|Flatten)$/.test(node.opType)
    ? beforeOwn(producers, node.input[0]!)
    : value;
}

function isOwn({ name }: NodeProto): boolean {
  return name.startsWith(`${PREFIX}/`);
}

function ancestors({ producers }: Graph, value: string): ReadonlySet<NodeProto> {
  const found = new Set<NodeProto>();
  const pending = [value];
  for (const one of pending) {
    const node = producers.get(one);
    if (!node || found.has(node)) continue;
    found.add(node);
    pending.push(...node.input);
  }
  return found;
}

// Removes Transposes of weights in front of products, as with an embedding that is the last layer too. Runtimes
// transpose constant weights at load time and hold both copies. The backward pass uses the weight as it is; after this
// the product does too.

function takeUntransposed(graph: Graph, opset: number): void {
  const { proto: main, consumers, outputs } = graph;
  const emit = new Emitter(main, opset, `${PREFIX}/untransposed`);
  const edits = new NodeEdits();
  for (const node of main.node) {
    const turned = node.output[0] ?? "";
    const weight = transposedWeight(graph, node);
    const uses = consumers.get(turned) ?? [];
    if (weight === undefined || outputs.has(turned)) continue;
    if (!uses.every((use) => use.node.opType === "MatMul" && use.input === 1 && use.graph === main)) continue;
    edits.remove(main, node);
    for (const { node: product } of uses) {
      const [x] = product.input as [string];
      const rows = (): string => emit.op("Gemm", emit.rows(x), weight.name, { transB: 1 });
      emit.replace(edits, main, product, () => emit.unrows(rows(), x, [weight.rows]));
    }
  }
  edits.apply();
}

/** The f32 weight [rows, columns] that a Transpose takes, also behind a Cast; undefined for other nodes. */
function transposedWeight(graph: Graph, node: NodeProto): { readonly name: string; readonly rows: number } | undefined {
  const name = untransposed(graph, node.output[0] ?? "");
  if (name === undefined) return undefined;
  const { initializers, producers } = graph;
  const cast = producers.get(name);
  const tensor = initializers.get(cast?.opType === "Cast" ? cast.input[0]! : name);
  const type = cast ? intOf(cast, "to") : tensor?.dataType;
  return tensor?.dims.length === 2 && type === FLOAT ? { name, rows: Number(tensor.dims[0]) } : undefined;
}

// Cross entropy between the softmax of the logits and numeric targets: labels, smoothed or weighted ones, rows of zeros
// for padding, answers of another model. N rows, C classes:
// loss = −1/N · Σ targets · log softmax(logits)
// dloss/dlogits = (softmax(logits) · Σ_C targets − targets) / N
// A row counts by the sum of its targets; a row of zeros counts only in N.

interface Loss {
  readonly loss: string;
  readonly gradient: string;
}

function entropyOf(emit: Emitter, targets: string, logs: string, count: string): string {
  return emit.neg(emit.div(emit.sum(emit.mul(targets, logs), [0, 1], false), count));
}

/** exp(rows − maximum) and its sum over classes: no exponential overflows. */
function powersOf(emit: Emitter, rows: string): { shifted: string; powers: string; total: string } {
  const shifted = emit.sub(rows, emit.max(rows, [1]));
  const powers = emit.op("Exp", shifted);
  return { shifted, powers, total: emit.sum(powers, [1], true) };
}

/** Takes a column out of a softmax. */
const NEVER = 1e30;

/**
 * Targets for all classes. Columns that are marked hold features instead, which are compared by squares:
 * loss + 1/2N · Σ (features − targets)², with the gradient (features − targets) / N.
 * @param logits [… , C + features], all leading dimensions are rows
 * @param targets f32 [N, C + features]
 * @param squares f32 [1, C + features]: 1 for features, 0 for classes; [1, 1] where all are alike
 */
function crossEntropy(emit: Emitter, logits: string, targets: string, squares: string): Loss {
  const rows = emit.rows(logits);
  const classes = emit.sub(1, squares);
  const wanted = emit.mul(targets, classes);
  const among = emit.sub(emit.mul(rows, classes), emit.mul(squares, NEVER));
  const { shifted, powers, total } = powersOf(emit, among);
  const count = emit.toFloat(emit.size(rows, 0));
  const off = emit.mul(emit.sub(rows, targets), squares);
  const entropy = entropyOf(emit, wanted, emit.sub(shifted, emit.op("Log", total)), count);
  const halves = emit.div(emit.sum(emit.mul(off, off), [0, 1], false), emit.mul(count, 2));
  const expected = emit.mul(emit.div(powers, total), emit.sum(wanted, [1], true));
  const beyond = emit.add(emit.sub(expected, wanted), off);
  return { loss: emit.add(entropy, halves), gradient: emit.reshapeAs(emit.div(beyond, count), logits) };
}

/**
 * Targets for a few of many classes, such as a vocabulary: a table of all logarithms would be as large as the logits.
 * @param classes int64 [N, k], the classes of the targets; those of a row all differ
 * @param targets f32 [N, k]
 */
function sparseCrossEntropy(emit: Emitter, logits: string, classes: string, targets: string): Loss {
  const rows = emit.rows(logits);
  const { shifted, powers, total } = powersOf(emit, rows);
  const at = (values: string): string => emit.op("GatherElements", values, classes, { axis: 1 });
  const count = emit.toFloat(emit.size(rows, 0));
  const loss = entropyOf(emit, targets, emit.sub(at(shifted), emit.op("Log", total)), count);
  const expected = emit.mul(powers, emit.div(emit.sum(targets, [1], true), emit.mul(total, count)));
  const wanted = emit.sub(at(expected), emit.div(targets, count));
  const rest = emit.op("ScatterElements", expected, classes, wanted, { axis: 1 });
  return { loss, gradient: emit.reshapeAs(rest, logits) };
}

// Reverse-mode differentiation of a graph: from the gradient of one value, with one rule per operator, to those of the
// trained values.

/** Emits the nodes that compute gradients, from that of `end`, which `seed` emits. @returns the gradients by value */
export function differentiate(
  { graph, nodes, active, shapes }: ProbedPath,
  end: string,
  seed: () => string,
  emit: Emitter,
  problems: Problems,
): ReadonlyMap<string, string> {
  for (const node of nodes) {
    const half = node.output.filter((value) => active.has(value)).find((value) => shapes.type(value) !== "float32");
    if (half !== undefined)
      problems.node(node, `computes in ${shapes.type(half)}, which is not trained in (export in float32)`);
  }
  emit.dimensions = (value) => shapes.dimensions(value);
  const gradients = new Map([[end, seed()]]);
  const walk: Walk = { graph, active, shapes, emit, problems, gradients };
  const far = farUsed({ graph, active });
  for (const node of nodes.toReversed()) {
    const came = node.output.map((value) => gradients.has(value));
    if (!came.includes(true)) continue;
    const rule = RULES.get(operatorOf(node))!;
    if (!rule.manyOutputs && came.lastIndexOf(true) > 0) {
      problems.node(node, "is used by more than its first output, which gradients do not come back from");
    } else {
      const at = new NodeGradient(node, walk);
      // One moment per layer is enough: values made again within a layer are made about when they are needed anyway.
      if (emit.moment === undefined || node.output.some((value) => far.has(value))) emit.moment = at.moment();
      rule.backward(at);
    }
  }
  emit.moment = undefined;
  return gradients;
}

// Chooses which values of the forward run the backward nodes find kept, and makes the others again. Kept values are
// memory that an answering run does not need, so few are kept; but no product with a weight is computed twice. What is
// made again waits for the gradient that needs it: runtimes order nodes by their inputs alone, and would recompute all
// layers first.

/** First letters of the names of values that are made again. */
const AGAIN: string = `${PREFIX}/again/`;

/**
 * Adds the nodes that make values again, and to the model shapes of its values and constants of definitions.
 * @returns the backward nodes, each behind the nodes that make its values again
 */
function recompute(path: ProbedPath, main: GraphProto, emit: Emitter): NodeProto[] {
  const { graph, active, shapes } = path;
  const backward = [...emit.nodes];
  const constants = new Set(main.initializer.map(({ name }) => name));
  /** Values of the model itself, rather than of definitions. */
  const real = new Set([
    ...main.node.flatMap(({ output }) => output),
    ...main.input.map(({ name }) => name),
    ...constants,
  ]);
  const makers = new Map(graph.producers);
  for (const node of emit.shapes) {
    const [shape] = node.output as [string];
    if (real.has(node.input[0]!)) {
      main.node.push(node);
      real.add(shape);
    } else makers.set(shape, node);
  }
  const kept = valuesToKeep(path);
  const isCaptured = (value: string): boolean =>
    !makers.has(value) || (real.has(value) && (!active.has(value) || kept.has(value)));
  /** Names in the branch, by value. */
  const made = new Map<string, string>();
  const waiting = new Emitter(main, emit.constants.opset, `${PREFIX}/late`);
  const nodes: NodeProto[] = [];

  /** Re-emits an existing value so that it becomes available only after `moment`. Reshape reuses its buffer. */
  const late = (value: string, moment: Moment | undefined): string => {
    const constant = graph.initializers.get(value);
    if (constant && !constants.has(value)) {
      main.initializer.push(constant);
      constants.add(value);
    }
    const rank = moment && active.has(value) && makers.has(value) ? shapes.dims(value).length : 0;
    if (rank === 0) return value;
    const written = waiting.nodes.length;
    const zeros = waiting.late(Array<number>(rank).fill(0), moment!.value, moment!.axis);
    const again = waiting.reshape(value, zeros);
    nodes.push(...waiting.nodes.slice(written));
    return again;
  };
  const make = (node: NodeProto, moment: Moment | undefined): void => {
    const inputs = node.input.map((value) => (value === "" ? "" : (made.get(value) ?? late(value, moment))));
    for (const value of node.output) if (value !== "") made.set(value, AGAIN + value);
    const outputs = node.output.map((value) => made.get(value) ?? "");
    const copy = makeNode(node.opType, AGAIN + node.output[0]!, inputs, outputs, {}, node.domain);
    copy.attribute = node.attribute;
    nodes.push(copy);
  };
  const done = { has: (value: string): boolean => isCaptured(value) || made.has(value) };
  /** Name under which a value is available in the branch, not before `moment`. */
  const available = (value: string, moment: Moment | undefined): string => {
    const needs = (name: string): string[] => makers.get(name)!.input.filter((input) => input !== "");
    inOrder(value, done, needs, (name) => make(makers.get(name)!, moment));
    return made.get(value) ?? late(value, moment);
  };

  const own = new Set(backward.flatMap(({ output }) => output));
  for (const node of backward) {
    const moment = emit.moments.get(node);
    node.input = node.input.map((value) => (own.has(value) || value === "" ? value : available(value, moment)));
    nodes.push(node);
  }
  return nodes;
}

/** Product operators; with a weight or a factor they are expensive. */
const PRODUCT = /^(MatMul|Gemm|MatMulNBits|Conv|MatMulInteger.*)$/;

/** Products between a value and its use that make the use far: farther than within one layer. */
const FAR = 2;

/**
 * Values to keep: products with weights, sums in the place of their terms, and what is used far behind. All others can
 * be made from them and from what depends on nothing trained. The cheapest set of values, a minimum cut, takes the same
 * memory and the same time.
 */
function valuesToKeep(path: ProbedPath): ReadonlySet<string> {
  const kept = new Set(farUsed(path));
  for (const node of path.graph.proto.node) {
    const isSum = node.opType === "Add" && node.input.some((value) => kept.has(value));
    if (isSum || isDear(node, path.graph)) for (const value of node.output) kept.add(value);
  }
  return kept;
}

/** Tells whether one factor of a product is a weight or a factor of a task. */
function isDear({ opType, input }: NodeProto, { producers }: Graph): boolean {
  // An f16 embedding that is the last layer too passes two of these. Damaged files may contain circles.
  const isFactor = (value = "", steps = 4): boolean => {
    const maker = producers.get(value);
    if (!maker || steps === 0) return steps > 0;
    const passes = /^(Transpose|Cast|Squeeze|Reshape|Constant|Identity)$/.test(maker.opType);
    return passes && isFactor(maker.input[0], steps - 1);
  };
  return PRODUCT.test(opType) && input.slice(0, 2).some((value) => isFactor(value));
}

/**
 * Values that bypass a layer, such as residuals. Each could be made from the one before and the layer's result, but
 * then the last one would need all of them at once.
 */
function farUsed({ graph, active }: Pick<ProbedPath, "graph" | "active">): ReadonlySet<string> {
  const depths = new Map<string, number>();
  const found = new Set<string>();
  for (const node of graph.proto.node) {
    const before = node.input.filter((value) => active.has(value));
    if (before.length === 0) continue;
    const depth = Math.max(...before.map((value) => depths.get(value) ?? 0)) + Number(isDear(node, graph));
    for (const value of node.output) depths.set(value, depth);
    for (const value of before) if (depth >= (depths.get(value) ?? 0) + FAR) found.add(value);
  }
  return found;
}

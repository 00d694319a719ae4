/**
 * The training graph: from an inference model, one that also gives the loss and the gradients of what is trained. It is
 * made of standard operators, so that every build of ONNX Runtime runs it, those for the web too, which have no training
 * of their own. No runtime and no optimiser in here: the caller lends the one to look at shapes, and takes the steps.
 */
import { FormatError } from "../errors.ts";
import { tinyFeeds, type Feed } from "../onnx/feeds.ts";
import { checkGraftable, type Added } from "../onnx/graft.ts";
import { FLOAT } from "../onnx/linear.ts";
import { indexGraph, type OnnxModel } from "../onnx/model.ts";
import { dropUnused, makeFloats, makeNode, makeValue, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, ValueInfoProto } from "../onnx/onnx_pb.ts";
import { create, GraphProtoSchema } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { Emitter } from "./emit.ts";
import { crossEntropy } from "./loss.ts";
import { Problems } from "./problems.ts";
import { differentiate } from "./reverse.ts";
import { checkFeeds, type Probe } from "./shapes.ts";
import { addTargets, PARAMETERS, type AddedTargets, type HeadNames, type Targets, type TrainedParameter } from "./targets.ts";

export interface TrainingGraphOptions {
  /** The output that holds the logits, [… , classes]. "logits" unless given, or the only output. */
  readonly logits?: string | undefined;
  /** Runs the model while the graph is made, on two tiny feeds. */
  readonly probe: Probe;
  /**
   * Two feeds of the model's own inputs, for models that made-up ones do not fit. Free dimensions must differ within a feed
   * and between the two, and be larger than 1: 2×5 and 3×7. What is equal in both, an empty cache say, is taken as fixed.
   */
  readonly feeds?: readonly [ReadonlyMap<string, Feed>, ReadonlyMap<string, Feed>] | undefined;
  /**
   * Keeps all outputs of the model, and puts loss and gradients into a branch that runs only where the input `learn` is
   * true: one session learns and answers. Without it the graph has the logits only, and every run is a step.
   */
  readonly keepsInference?: boolean | undefined;
}

/** Names of what a training graph takes beside the model's own inputs, and of what it gives. */
export interface TrainingGraph {
  /** f32 [size], all parameters of terms; undefined where only heads are trained. */
  readonly parametersInput: string | undefined;
  /** f32 [N, C]: N rows of logits, all leading dimensions flattened. */
  readonly targetsInput: string;
  /** bool scalar, with `keepsInference`. */
  readonly learnInput: string | undefined;
  readonly logitsOutput: string;
  /** f32 scalar. */
  readonly lossOutput: string;
  /** f32 [size], in the order of the flat input. */
  readonly gradientOutput: string | undefined;
  readonly parameters: readonly TrainedParameter[];
  readonly size: number;
  readonly heads: readonly (HeadNames & { readonly weightGradient: string; readonly biasGradient: string | undefined })[];
  /** To be written with the model: by `detachWeights` or `embedWeights`. */
  readonly initializers: readonly Added[];
}

/** The least opset in which the operators that are added mean what is meant here. */
const LEAST_OPSET = 13;

const TARGETS = `${PREFIX}.targets`;
const LEARN = `${PREFIX}.learn`;
const LOSS = `${PREFIX}.loss`;
const GRADIENT = `${PREFIX}.gradient`;
const BOOL = 9;

/** Sizes of free dimensions in the two feeds: all differ. */
const SIZES = [
  [2, 5, 11, 17, 23, 31],
  [3, 7, 13, 19, 29, 37],
] as const;

/**
 * Makes a training graph of a model, in place: `file.model` is spent, whether this succeeds or not. Read it again for
 * another.
 *
 * @example
 * const file = await readModel("model.onnx");
 * const graph = await buildTrainingGraph(file, { modules, heads }, { probe });
 * const { bytes, files } = await detachWeights(file, graph.initializers);
 *
 * @throws FormatError with every reason at once: operators that gradients do not pass (with the names of their nodes),
 *   trained layers that do not reach the loss, half-precision values, probe feeds that tell nothing, an old opset
 */
export async function buildTrainingGraph(file: ModelFile, targets: Targets, options: TrainingGraphOptions): Promise<TrainingGraph> {
  const { model } = file;
  checkGraftable(model);
  const main = model.graph.proto;
  const problems = new Problems();
  if (model.opset < LEAST_OPSET) {
    problems.add(`its opset is ${model.opset}, at least ${LEAST_OPSET} is needed (export it again with opset_version=17)`);
  }
  const logits = logitsOf(model, options.logits);
  const own = main.input.filter(({ name }) => !model.graph.initializers.has(name));

  const added = addTargets(model, targets, problems);
  if (added.sources.length === 0 && !problems.any) problems.add("nothing is trained: neither terms nor heads are asked for");
  if (!options.keepsInference) main.output.splice(0, Infinity, main.output.find(({ name }) => name === logits)!);
  if (targets.heads.length > 0) freeShapes(main.output);
  dropUnused(model);
  const grown: ModelFile = { ...file, model: { ...model, graph: indexGraph(main, model.name) } };
  const feeds = options.feeds ?? madeUp(own, problems);
  if (feeds) checkFeeds(feeds, own, problems);
  const emit = new Emitter(main, model.opset);
  let loss = "";
  const seed = (): string => {
    const made = crossEntropy(emit, logits, TARGETS);
    loss = made.loss;
    return made.gradient;
  };
  const extended = feeds?.map((feed, i) => withTrained(feed, added, i));
  const gradients = await differentiate(grown, added.sources, logits, seed, emit, problems, { ...options, ...added, feeds: extended });

  const of = (source: string): string => gradients.get(source)!;
  const flat = added.sources.slice(0, added.parameters.length).map((source) => emit.op("Reshape", [of(source), emit.ints([-1])]));
  const results = [{ value: loss, as: LOSS, dims: [] as (number | string)[] }];
  if (flat.length > 0) results.push({ value: emit.concat(flat, 0), as: GRADIENT, dims: [added.size] });
  for (const { weight, bias, in: inputs } of added.heads) {
    results.push({ value: of(weight), as: gradientName(weight), dims: ["", inputs] });
    if (bias !== undefined) results.push({ value: of(bias), as: gradientName(bias), dims: [""] });
  }
  main.input.push(makeValue(TARGETS, FLOAT, ["", ""]));
  if (options.keepsInference) putInBranch(main, emit, results);
  else {
    main.node.push(...emit.nodes, ...results.map(({ value, as }) => makeNode("Identity", as, [value], as)));
  }
  main.output.push(...results.map(({ as, dims }) => makeValue(as, FLOAT, options.keepsInference ? undefined : dims)));
  return {
    parametersInput: added.size > 0 ? PARAMETERS : undefined,
    targetsInput: TARGETS,
    learnInput: options.keepsInference ? LEARN : undefined,
    logitsOutput: logits,
    lossOutput: LOSS,
    gradientOutput: added.size > 0 ? GRADIENT : undefined,
    parameters: added.parameters,
    size: added.size,
    heads: added.heads.map((head) => ({
      ...head,
      weightGradient: gradientName(head.weight),
      biasGradient: head.bias === undefined ? undefined : gradientName(head.bias),
    })),
    initializers: added.initializers,
  };
}

function gradientName(input: string): string {
  return `${input}.gradient`;
}

interface Result {
  value: string;
  as: string;
  dims: readonly (number | string)[];
}

/** If(learn): the nodes and what they give; otherwise nothing of the same types. */
function putInBranch(main: GraphProto, emit: Emitter, results: readonly Result[]): void {
  const inner = (branch: string, as: string): string => `${as}/${branch}`;
  const given = (branch: string): ValueInfoProto[] => results.map(({ as }) => makeValue(inner(branch, as), FLOAT));
  const learning = create(GraphProtoSchema, {
    name: `${PREFIX}/learning`,
    node: [...emit.nodes, ...results.map(({ value, as }) => makeNode("Identity", inner("then", as), [value], inner("then", as)))],
    output: given("then"),
  });
  const answering = create(GraphProtoSchema, {
    name: `${PREFIX}/answering`,
    node: results.map(({ as }) => makeNode("Identity", inner("else", as), [inner("empty", as)], inner("else", as))),
    initializer: results.map(({ as, dims }) => makeFloats(inner("empty", as), dims.length === 0 ? [0] : [], dims.map((d, i) => (i === 0 ? 0 : Number(d))))),
    output: given("else"),
  });
  main.input.push(makeValue(LEARN, BOOL, []));
  const outputs = results.map(({ as }) => as);
  main.node.push(makeNode("If", `${PREFIX}/learn`, [LEARN], outputs, { then_branch: learning, else_branch: answering }));
}

function logitsOf({ name: file, graph }: OnnxModel, wanted: string | undefined): string {
  const outputs = graph.proto.output.map(({ name }) => name);
  const found = wanted === undefined && outputs.length === 1 ? outputs[0] : outputs.find((name) => name === (wanted ?? "logits"));
  if (found !== undefined) return found;
  const message = `has no output "${wanted ?? "logits"}", only ${outputs.map((name) => `"${name}"`).join(", ")}; name the one that holds the logits`;
  throw new FormatError(message, { file, part: "graph" });
}

/** Shapes that the file declares for outputs may hold the number of labels of a head that is replaced. */
function freeShapes(outputs: readonly ValueInfoProto[]): void {
  for (const { type } of outputs) if (type?.value.case === "tensorType") delete type.value.value.shape;
}

function madeUp(inputs: readonly ValueInfoProto[], problems: Problems): readonly ReadonlyMap<string, Feed>[] | undefined {
  const feeds = SIZES.map((sizes) => {
    const known = new Map<string, number>();
    return tinyFeeds(inputs, (dimension) => {
      const size = known.get(dimension) ?? sizes[known.size] ?? sizes.at(-1)! + 10 * known.size;
      known.set(dimension, size);
      return size;
    });
  });
  const [first, second] = feeds;
  if (first && second) return [first, second];
  problems.add("its inputs are of kinds that cannot be made up: pass two probe `feeds`");
  return undefined;
}

/** A feed with values for what is trained; heads of some other number of labels in each feed. */
function withTrained(feed: ReadonlyMap<string, Feed>, { size, heads }: AddedTargets, which: number): Map<string, Feed> {
  const all = new Map(feed);
  const floats = (...dims: number[]): Feed => {
    const count = dims.reduce((a, b) => a * b, 1);
    return { dataType: FLOAT, dims, data: Float32Array.from({ length: count }, (_, i) => 0.1 * Math.sin(1 + 1.7 * i)) };
  };
  if (size > 0) all.set(PARAMETERS, floats(size));
  const labels = [41, 43][which]!;
  for (const { weight, bias, in: inputs } of heads) {
    all.set(weight, floats(labels, inputs));
    if (bias !== undefined) all.set(bias, floats(labels));
  }
  return all;
}

/** Shared by the tests of learning: a runtime that finds shapes, and PyTorch's gradients. */
import { readdirSync, readFileSync } from "node:fs";
import { isAbsolute } from "node:path";
import type { Adapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import type { Feed } from "eigenlora/session";
import type { BatchFeeds, Example, Trainer } from "eigenlora/train";
import type * as common from "onnxruntime-common";
import type { Test } from "tap";
import { transpose, uniform } from "./internals/base.ts";
import {
  buildTrainingGraph,
  type ShapeProbe,
  type TrainingGraph,
  type TrainingGraphOptions,
} from "./internals/learn.ts";
import {
  type AdaptedHead,
  type AdaptedLayer,
  checkInjectable,
  detachWeights,
  endOf,
  findParameters,
  fixInnerHeads,
  inject,
  linearsOf,
  type ModelFile,
  matrixShape,
  readLinearWeight,
  readModel,
  readVector,
  type TaskInput,
  type Trainable,
} from "./internals/models.ts";
import { NameMatcher } from "./internals/runtime.ts";
import { data } from "./packs.ts";
import {
  difference,
  feedsIn,
  feeds as feedsOf,
  GOLDENS,
  model,
  NODE,
  type Ort,
  open,
  outputOf,
  packFor,
  type Session,
} from "./sessions.ts";

export type Level = "disabled" | "basic" | "all";
export type Tensors = Record<string, common.Tensor>;

const TYPES: Record<number, string> = { 1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16" };

export function tensor(ort: Ort, { dataType, dims, data: values }: Feed): common.Tensor {
  return new ort.Tensor(TYPES[dataType] as "float32", values as Float32Array, [...dims]);
}

/** A feed as JSON for other programs. */
export function asJson({ dataType, dims, data }: Feed): object {
  return { type: TYPES[dataType], dims, data: Array.from(data as ArrayLike<number | bigint>, Number) };
}

/** A probe that counts its runs. */
export function probeOf(ort: Ort): ShapeProbe & { runs: number } {
  const probe = async (
    ...[{ bytes, files }, feeds]: Parameters<ShapeProbe>
  ): Promise<Awaited<ReturnType<ShapeProbe>>> => {
    const session = await ort.InferenceSession.create(bytes, {
      externalData: [...files],
      graphOptimizationLevel: "disabled",
    });
    try {
      const results = [];
      for (const feed of feeds) {
        const tensors: Tensors = {};
        for (const name of session.inputNames) tensors[name] = tensor(ort, feed.get(name)!);
        results.push(await session.run(tensors));
        counted.runs++;
      }
      return results;
    } finally {
      await session.release();
    }
  };
  const counted = Object.assign(probe, { runs: 0 });
  return counted;
}

/** A session of the training graph, the weights beside it. */
export async function sessionOf(ort: Ort, file: ModelFile, level: Level): Promise<common.InferenceSession> {
  const { bytes, files } = await detachWeights(file);
  return ort.InferenceSession.create(bytes, { externalData: [...files], graphOptimizationLevel: level });
}

/** One case of test/data/goldens/gradients. */
export interface Case {
  readonly name: string;
  readonly loss: number;
  /** Layers of the head, by name. */
  readonly heads: readonly string[];
  /** Inputs without targets and logits. */
  readonly feeds: ReadonlyMap<string, Feed>;
  /** Targets [N, C]. */
  readonly targets: Feed;
  /** Rank of every module. */
  readonly modules: ReadonlyMap<string, { rank: number; A: Float32Array; B: Float32Array; scale: number }>;
  /** Gradients of lora_A [r, in] and lora_B [out, r], and of the head, by parameter name. */
  readonly gradients: ReadonlyMap<string, Float32Array>;
}

const FOLDER = "goldens/gradients";

export const CASES: readonly string[] = readdirSync(data(FOLDER)).sort();

/** @param name of a golden case, or the absolute path of one that a test has made */
function folderOf(name: string): string {
  return isAbsolute(name) ? name : data(`${FOLDER}/${name}`);
}

export function readCase(name: string): Promise<ModelFile> {
  return readModel(`${folderOf(name)}/model.onnx`);
}

async function tensorsIn(path: string): Promise<Map<string, Feed>> {
  const tensors = Object.entries(await feedsIn(path));
  return new Map(
    tensors.map(([name, { type, dims, data }]) => [
      name,
      { dataType: type === "int64" ? 7 : 1, dims, data: data as Float32Array },
    ]),
  );
}

export async function golden(name: string): Promise<Case> {
  const folder = folderOf(name);
  const { loss, gradients } = JSON.parse(readFileSync(`${folder}/case.json`, "utf8"));
  const { lora_alpha, r } = JSON.parse(readFileSync(`${folder}/adapter/adapter_config.json`, "utf8"));
  const feeds = await tensorsIn(`${folder}/feeds.safetensors`);
  const targets = feeds.get("targets")!;
  const classes = targets.dims.at(-1)!;
  for (const other of ["targets", "logits"]) feeds.delete(other);
  const [adapter] = await readAdapters([`${folder}/adapter`]);
  const modules = new Map();
  for (const [module, one] of adapter!.modules) {
    const { A, Bt } = await one.read();
    modules.set(module, { rank: one.rank, A, B: Bt, scale: lora_alpha / r });
  }
  await adapter!.close();
  const read = await tensorsIn(`${folder}/gradients.safetensors`);
  if ([...read.keys()].sort().join() !== gradients.join())
    throw new Error(`${name}: case.json and gradients.safetensors differ`);
  const weights = [...read.keys()].filter((key) => key.endsWith(".weight") && !key.includes(".lora_"));
  const heads = weights.map((key) => key.slice(0, -".weight".length));
  return {
    ...{ name, loss, heads, feeds, modules },
    targets: { ...targets, dims: [targets.data.length / classes, classes] },
    gradients: new Map([...read].map(([key, { data }]) => [key, data as Float32Array])),
  };
}

/** Weight [out, in] and bias of a linear layer; zeros where the exporter has dropped those. */
async function headOf(
  file: ModelFile,
  module: string,
): Promise<{ weight: Float32Array; bias: Float32Array; out: number; in: number }> {
  const parameters = new Map(findParameters(file.model).map((parameter) => [parameter.name, parameter]));
  const names = new NameMatcher(parameters.keys());
  const [weight, bias] = ["weight", "bias"].map((role) => {
    const found = names.find(`${module}.${role}`);
    return "name" in found ? parameters.get(found.name) : undefined;
  });
  if (!weight) throw new Error(`${module} is not in the model`);
  const [rows, columns] = weight.shape as [number, number];
  const [out, inputs] = weight.layout === "in-out" ? [columns, rows] : [rows, columns];
  const at = await readLinearWeight(file, weight);
  const values = Float32Array.from({ length: out * inputs }, (_, i) => at(Math.floor(i / inputs), i % inputs));
  return { weight: values, bias: bias ? await readVector(file, bias) : new Float32Array(out), out, in: inputs };
}

/**
 * Names of weights by order. The goldens' dynamo exports have lost the names of their weights, and the metadata that
 * would tell them; layers multiply in a known order: query, key, value, output, then the two or three of the
 * feed-forward part.
 */
function namesByOrder(file: ModelFile, modules: Iterable<string>): Map<string, string> {
  const { nodes, initializers } = { nodes: file.model.graph.proto.node, initializers: file.model.graph.initializers };
  const weights = nodes
    .filter(({ opType, input }) => opType === "MatMul" && initializers.has(input[1]!))
    .map(({ input }) => input[1]!);
  const names = new Map<string, string>();
  for (const module of modules) {
    const layer = Number(/\.(\d+)\./.exec(module)![1]);
    const place = [
      /query|q_proj/,
      /key|k_proj/,
      /value|v_proj/,
      /o_proj/,
      /gate_proj/,
      /up_proj/,
      /down_proj/,
    ].findIndex((one) => one.test(module));
    const each = module.startsWith("model.layers") ? 7 : 6;
    names.set(module, weights[layer * each + place]!);
  }
  return names;
}

/** A layer of a model by the name that adapters give it, as the session's planner finds it. */
export function layerOf({ model }: ModelFile, module: string, byHand?: ReadonlyMap<string, string>): AdaptedLayer {
  const parameters = new Map(findParameters(model).map((parameter) => [parameter.name, parameter]));
  const found = new NameMatcher(parameters.keys()).find(byHand?.get(module) ?? `${module}.weight`);
  const parameter = "name" in found && parameters.get(found.name);
  if (!parameter) throw new Error(`no layer is called ${module}`);
  const [out, inputs] = matrixShape(parameter)!;
  const sites = linearsOf(model, parameter);
  if (typeof sites === "string") throw new Error(sites);
  return { name: module, in: inputs, out, kind: "linear", sites, factors: true, rowScale: false };
}

/** A layer as a head, always with a bias: exporters drop zeros. */
export function headLayerOf(file: ModelFile, module: string): AdaptedHead {
  const { name, in: inputs, out, sites } = layerOf(file, module);
  return {
    name,
    in: inputs,
    out,
    bias: true,
    places: sites.map((site) => ({ site, end: endOf(file.model, site) })),
  };
}

/** A training graph with factors of some layers, and with heads. */
export async function graphOf(
  file: ModelFile,
  { modules = [], heads = [] }: { modules?: readonly AdaptedLayer[]; heads?: readonly AdaptedHead[] },
  options: Partial<TrainingGraphOptions> = {},
): Promise<{ graph: TrainingGraph; inputs: readonly TaskInput[] }> {
  checkInjectable(file.model);
  const injected = inject(file.model, { modules, biases: [], rows: [], vectors: [], heads }, { probeOutputs: false });
  const outputsOf = (module: string) => heads.find(({ name }) => name === module)?.out;
  fixInnerHeads(file.model.graph.proto, injected.inputs, outputsOf);
  return {
    graph: await buildTrainingGraph(file, injected, { probe: probeOf(NODE), ...options }),
    inputs: injected.inputs,
  };
}

export const floats = (data: Float32Array, ...dims: number[]): Feed => ({ dataType: 1, dims, data });

/** Feeds of a graph's own inputs. */
export function learning(
  { learnInput, targetsInput, squaresInput, tokens }: TrainingGraph,
  targets: Feed,
  learns = true,
): [string, Feed][] {
  return [
    ...(tokens ? [] : [[squaresInput, floats(new Float32Array(1), 1, 1)] satisfies [string, Feed]]),
    [targetsInput, targets],
    [learnInput, { dataType: 9, dims: [], data: Uint8Array.of(Number(learns)) }],
  ];
}

/** A graph that learns a case, and feeds that give the goldens. */
export interface Prepared {
  readonly file: ModelFile;
  readonly graph: TrainingGraph;
  readonly inputs: readonly TaskInput[];
  readonly feeds: ReadonlyMap<string, Feed>;
}

/** A training graph of a case: PEFT's LoRA as factors, and the head. */
export async function prepare(of: Case, options: Partial<TrainingGraphOptions> = {}): Promise<Prepared> {
  const file = await readCase(of.name);
  const names = of.name.endsWith("dynamo") ? namesByOrder(file, of.modules.keys()) : undefined;
  const modules = [...of.modules.keys()].map((module) => layerOf(file, module, names));
  const own = new Map<string, Awaited<ReturnType<typeof headOf>>>();
  for (const name of of.heads) own.set(name, await headOf(file, name));
  const heads = of.heads.map((name) => headLayerOf(file, name));
  const { graph, inputs } = await graphOf(file, { modules, heads }, options);
  const values = new Map<string, Feed>();
  for (const { name, kind, of: module, dims } of inputs) {
    const width = Math.max(...dims.filter((size) => typeof size === "number"));
    const head = own.get(module);
    const { rank, A, B } = of.modules.get(module) ?? { rank: 0, A: undefined, B: undefined };
    if (kind === "A") values.set(name, floats(transpose(A!, rank, width), 1, width, rank));
    else if (kind === "B") values.set(name, floats(B!, 1, rank, width));
    else if (kind === "headWeight")
      values.set(name, floats(transpose(head!.weight, head!.out, head!.in), 1, head!.in, head!.out));
    else values.set(name, floats(head!.bias, 1, 1, head!.out));
  }
  return { file, graph, inputs, feeds: new Map([...of.feeds, ...values, ...learning(graph, of.targets)]) };
}

/** Relative differences from PyTorch: of the loss, and the largest of those of the gradients. */
export interface Differences {
  loss: number;
  gradients: number;
  /** The parameter whose gradient is off most. */
  worst: string;
}

/** @param values of the graph's outputs */
export function compare(
  of: Case,
  { graph, inputs }: Prepared,
  values: (output: string) => ArrayLike<number>,
): Differences {
  const found = new Map<string, ArrayLike<number>>();
  for (const { name, kind, of: module, dims } of inputs) {
    const gradient = Float32Array.from(values(graph.gradients.get(name)!));
    const width = Math.max(...dims.filter((size) => typeof size === "number"));
    const turned = transpose(
      gradient,
      kind === "B" ? gradient.length / width : width,
      kind === "B" ? width : gradient.length / width,
    );
    // lora_B is [out, r], and the graph's B is its transpose times the scale.
    if (kind === "A") found.set(`${module}.lora_A.weight`, turned);
    else if (kind === "B")
      found.set(
        `${module}.lora_B.weight`,
        turned.map((g) => of.modules.get(module)!.scale * g),
      );
    else if (kind === "headWeight") found.set(`${module}.weight`, turned);
    else found.set(`${module}.bias`, gradient);
  }
  let [largest, worst] = [0, ""];
  for (const [name, expected] of of.gradients) {
    const off = relative(found.get(name) ?? [], expected);
    if (!(off <= largest)) [largest, worst] = [off, name];
  }
  const loss = Math.abs(values(graph.lossOutput)[0]! - of.loss) / of.loss;
  return { loss: Number.isNaN(loss) ? Infinity : loss, gradients: largest, worst };
}

/** A session's results for values by input name. */
export async function run(
  session: common.InferenceSession,
  ort: Ort,
  feeds: ReadonlyMap<string, Feed>,
): Promise<Tensors> {
  const tensors: Tensors = {};
  for (const name of session.inputNames) tensors[name] = tensor(ort, feeds.get(name)!);
  return (await session.run(tensors)) as Tensors;
}

/** Difference relative to the expected values' norm; infinite where lengths differ or a number is not finite. */
export function relative(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (found.length !== expected.length) return Infinity;
  let [off, norm] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    off += (found[i]! - expected[i]!) ** 2;
    norm += expected[i]! ** 2;
  }
  const result = Math.sqrt(off / norm);
  return Number.isNaN(result) ? Infinity : result;
}

/**
 * Relative differences of a session's loss and gradients from PEFT's. The loss is the mean cross entropy at every
 * position, with one class for each.
 * @param own feeds of the model's own inputs
 * @param expected `loss` and `MODULE.lora_A`, `MODULE.lora_B`
 */
export async function learnedOff(
  ort: Ort,
  session: Session,
  adapter: Adapter,
  own: Tensors,
  classes: readonly number[],
  expected: ReadonlyMap<string, Float32Array>,
): Promise<{ off: [string, number][]; gradients: Map<string, Float32Array> }> {
  // Internal: trainers use it.
  const { graph, inputs, run } = (session as unknown as { readonly trainable: Trainable }).trainable;
  const int64 = (values: readonly number[], ...dims: number[]): Feed => {
    return { dataType: 7, dims, data: BigInt64Array.from(values, BigInt) };
  };
  const made = new Map<string, Feed>([
    [graph.learnInput, { dataType: 9, dims: [], data: Uint8Array.of(1) }],
    [graph.tokens!.positions, int64([...classes.keys()], classes.length)],
    [graph.tokens!.classes, int64(classes, classes.length, 1)],
    [graph.targetsInput, floats(new Float32Array(classes.length).fill(1), classes.length, 1)],
  ]);
  let rank = 0;
  for (const { name, of, kind, dims } of inputs) {
    const one = adapter.modules.get(of);
    rank = one?.rank ?? rank;
    const sizes = dims.map((size) => (typeof size === "number" ? size : size === "q" ? rank : 1));
    const { A, Bt } = (await one?.read()) ?? {};
    if (kind === "A") made.set(name, floats(transpose(A!, rank, sizes[1]!), ...sizes));
    else if (kind === "B") made.set(name, floats(Bt!, ...sizes));
    else made.set(name, floats(new Float32Array(sizes.reduce((a, b) => a * b, 1)).fill(1), ...sizes));
  }
  const feeds = { ...own, ...Object.fromEntries([...made].map(([name, feed]) => [name, tensor(ort, feed)])) };
  const results = await run(feeds as never, [graph.lossOutput, ...graph.gradients.values()]);
  const values = (output: string): Float32Array => results[output]!.data as Float32Array;
  const off: [string, number][] = [["loss", Math.abs(values(graph.lossOutput)[0]! / expected.get("loss")![0]! - 1)]];
  const gradients = new Map<string, Float32Array>();
  for (const { name, of, kind, dims } of inputs) {
    const output = graph.gradients.get(name);
    if (output === undefined) continue;
    const width = Math.max(...dims.filter((size) => typeof size === "number"));
    const found = values(output);
    // The graph's A is the transpose of lora_A, its B that of lora_B times the scale, 2.
    const turned = kind === "A" ? transpose(found, width, rank) : transpose(found, rank, width).map((g) => 2 * g);
    gradients.set(`${of}.lora_${kind}`, turned);
    off.push([name, relative(turned, expected.get(`${of}.lora_${kind}`)!)]);
  }
  return { off, gradients };
}

/** Tensors of a safetensors file whose names begin with `front`, without it. */
export async function goldensIn(path: string, front = ""): Promise<Map<string, Float32Array>> {
  const all = await tensorsIn(path);
  const own = [...all].filter(([name]) => name.startsWith(front));
  return new Map(own.map(([name, { data }]) => [name.slice(front.length), data as Float32Array]));
}

/** Seeded numbers of either sign. */
export function noise(many: number, seed: number): Float32Array {
  const next = uniform(seed);
  return Float32Array.from({ length: many }, () => 0.6 * next() - 0.3);
}

export const LABELS = ["odd", "even", "neither"];

/** Number formats that lose nothing. */
export const F32 = { coefficients: "f32", head: "f32" } as const;

/** Rows of the tiny model's inputs: random ids; the label follows from the first. */
export function examples(ort: Ort, session: Session, count: number, seed: number): Example[] {
  const random = uniform(seed);
  const like = feedsOf(ort, session, [0]);
  const length = GOLDENS.feeds["input_ids"]![0]!.length;
  return Array.from({ length: count }, () => {
    const ids = Array.from({ length }, () => 1 + Math.floor(random() * 8));
    const own = { ...like, input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, length]) };
    if ("attention_mask" in own)
      own["attention_mask"] = new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]);
    return { feeds: own as BatchFeeds, label: ids[0]! % 2 };
  });
}

export async function tiny(ort: Ort, more: Parameters<typeof open>[3] = {}): Promise<Session> {
  return open(ort, model("torchscript"), await packFor("base"), { trainable: true, ...more });
}

/** Trains on examples. @returns the loss of each step */
export async function fitted(
  trainer: Trainer,
  ...how: Parameters<Trainer["fit"]>
): Promise<[first: number, last: number, all: number[]]> {
  const losses: number[] = [];
  for await (const { loss } of trainer.fit(...how)) losses.push(loss);
  return [losses[0]!, losses.at(-1)!, losses];
}

/** Checks that softmaxed logits of the session equal the trainer's probabilities. */
export async function answersAlike(
  t: Test,
  session: Session,
  trainer: Trainer,
  rows: readonly Example[],
): Promise<void> {
  const probabilities = await trainer.predict(rows);
  for (const [i, { feeds }] of rows.entries()) {
    const exps = Array.from(await outputOf(session, feeds as never), Math.exp);
    const total = exps.reduce((a, b) => a + b, 0);
    const answer = exps.map((v) => v / total);
    t.ok(difference(answer, probabilities[i]!) < 1e-5, `row ${i}: ${probabilities[i]}`);
  }
}

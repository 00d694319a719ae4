/**
 * `eigenlora/learn`: a new task on the model of an onnxruntime session, by training coefficients only. The training graph is made
 * of the session's own model and runs beside it until the trainer is disposed: the model's weights are then in memory twice.
 */
import { decodeTensor } from "../src/dtypes.ts";
import { BaseMismatchError } from "../src/errors.ts";
import { buildTrainingGraph, type TrainingGraph } from "../src/learn/graph.ts";
import { Layers } from "../src/learn/layers.ts";
import type { Probe } from "../src/learn/shapes.ts";
import type { TrainedModule } from "../src/learn/targets.ts";
import { Trainer, type Machine, type TrainerOptions } from "../src/learn/trainer.ts";
import type { Components } from "../src/onnx/graft.ts";
import { readModel } from "../src/onnx/read.ts";
import { detachWeights, type DetachedModel } from "../src/onnx/write.ts";
import type { PackModule, Side } from "../src/pack/format.ts";
import { turn } from "../src/session/plan.ts";
import type { EigenSession, Trainable } from "./onnxruntime.ts";
import { call, inTurn, makeTensor, type Ort, type OrtTensor, type Session } from "./ort.ts";
import { joinFeeds, toTensors, type BatchFeeds } from "./ort-batch.ts";
import { createSession } from "./ort-carrier.ts";

export { Trainer, type FitOptions, type TrainerOptions, type TrainingStep } from "../src/learn/trainer.ts";
export type { Example } from "../src/learn/examples.ts";
export type { Start } from "../src/learn/start.ts";
export type { BatchFeeds } from "./ort-batch.ts";

export interface CreateTrainerOptions extends TrainerOptions {
  /** Texts as the model's inputs, one row each: a tokenizer. Examples with feeds of their own do without. */
  readonly encode?: ((texts: string[]) => BatchFeeds | Promise<BatchFeeds>) | undefined;
  /** "coefficients" over the pack's components, unless given; "lora": factors of every module, as without a pack. */
  readonly train?: "coefficients" | "lora" | undefined;
  /** Rows of coefficients of each side, or rank of the factors; as the task to start from, or most of the pack's first tasks, unless given. */
  readonly rank?: number | undefined;
  /** Free rank-1 terms of each module beside the coefficients, for what the components lack; 0 unless given. */
  readonly terms?: number | undefined;
  /** The modules that are trained; all of the pack unless given. */
  readonly modules?: readonly string[] | undefined;
  /** The layer that is trained whole; the one that the pack's tasks bring, unless given. `false`: none. */
  readonly head?: string | false | undefined;
  /** The model's output that holds the logits; "logits", or the only one. */
  readonly logits?: string | undefined;
}

/**
 * Makes the training graph of a session's model and loads it.
 * @param session made with `trainable: true`
 * @throws TypeError for a session that is not trainable; RangeError for labels or ranks that cannot be
 * @throws FormatError naming every node that gradients do not pass, BaseMismatchError when a layer cannot be trained
 * @example
 * const trainer = await createTrainer(session, { labels: ["spam", "fine"], encode: (texts) => tokenizer(texts) });
 * for await (const { loss } of trainer.fit(examples)) console.log(loss);
 * await session.addTask("mine", await trainer.task());
 */
export async function createTrainer<O extends Ort>(session: EigenSession<O>, options: CreateTrainerOptions): Promise<Trainer<BatchFeeds>> {
  const source = session.trainable;
  if (!source) throw new TypeError("createTrainer: this session cannot be trained; create it with trainable: true");
  const { train = "coefficients", rank = await usualRank(session), terms = 0, head = headOf(session), init } = options;
  if (train !== "coefficients" && train !== "lora") throw new RangeError(`train: expected "coefficients" or "lora", got ${JSON.stringify(train)}`);
  if (!(Number.isInteger(rank) && rank >= 1)) throw new RangeError(`rank: expected a whole number ≥ 1, got ${rank}`);
  if (!(Number.isInteger(terms) && terms >= 0)) throw new RangeError(`terms: expected a whole number ≥ 0, got ${terms}`);
  const unknown = options.modules?.find((name) => !session.pack.modules.some((module) => module.name === name));
  if (unknown !== undefined) throw new RangeError(`modules: the pack has no "${unknown}"`);
  const file = await readModel(source.model, source.options);
  try {
    const layers = new Layers(file.model);
    const bases = await session.pack.takeBases();
    const { pack } = session;
    const first = typeof init === "object" && options.rank === undefined && pack.tasks.has(init.task) ? await pack.load(init.task) : undefined;
    const modules = pack.modules.flatMap((module, index): TrainedModule[] => {
      if (options.modules?.includes(module.name) === false) return [];
      const components = train === "lora" ? undefined : componentsOf(module, bases);
      const own = first?.terms.find((term) => term.module === index && term.A);
      const core = components && { rank: own?.rank ?? rank, components, mean: { A: module.A!.mean, B: module.B!.mean } };
      return [{ ...layers.find(module.name, source.options.names), core, factors: core ? terms : Math.max(terms, rank) }];
    });
    const heads = head === false ? [] : [layers.findHead(head, source.options.names)];
    const feeds = { probe: probeOf(source), logits: options.logits };
    const graph = await buildTrainingGraph(file, { modules, heads }, feeds);
    const detached = await detachWeights(file, graph.initializers, source.options);
    await file.close();
    return new Trainer(session.pack, await createMachine(source, graph, detached, options), options);
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** The rank that most of the first tasks have. */
async function usualRank({ pack }: EigenSession): Promise<number> {
  const counts = new Map<number, number>();
  for (const id of [...pack.tasks.keys()].slice(0, 8)) {
    for (const { A, rank } of (await pack.load(id)).terms) if (A) counts.set(rank, (counts.get(rank) ?? 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 8;
}

/** The layer that tasks bring whole. */
function headOf({ pack }: EigenSession): string | false {
  for (const { brings = [] } of pack.tasks.values()) {
    const weight = brings.find((one) => /^saved .*\.weight$/.test(one));
    if (weight) return weight.slice("saved ".length, -".weight".length);
  }
  return false;
}

/** In column mode, where there are components on both sides. */
function componentsOf({ A, B, in: inputs, out }: PackModule, bases: Uint8Array): Components | undefined {
  if (A?.kind !== "column" || B?.kind !== "column" || A.K === 0 || B.K === 0) return undefined;
  const decode = ({ tensor: { type, rows, width, byteOffset, byteLength } }: Side): Float32Array =>
    decodeTensor(type, bases.subarray(byteOffset, byteOffset + byteLength), rows, width);
  const [KA, KB] = [A.tensor.rows, B.tensor.rows];
  return { At: turn(decode(A), KA, inputs), B: decode(B).subarray(0, KB * out), KA, KB };
}

/** Looks at shapes with the caller's runtime, without the optimiser, which needs longer than two tiny runs. */
function probeOf<O extends Ort>({ ort, options }: Trainable<O>): Probe {
  return async (model, feeds) => {
    const asked = { ...(options.session as object | undefined), graphOptimizationLevel: "disabled" };
    const session = await createSession({ ort, options: { ...options, session: asked as never } }, model);
    try {
      const results = [];
      for (const feed of feeds) {
        const tensors: Record<string, OrtTensor> = {};
        for (const name of session.inputNames) tensors[name] = makeTensor(ort, feed.get(name)!.data, feed.get(name)!.dims);
        const found = (await inTurn(ort, () => call(session, tensors, session.outputNames, {}))) as Record<string, OrtTensor>;
        const entries = Object.entries(found).map(async ([name, tensor]) => [name, { type: tensor.type, dims: tensor.dims, data: await dataOf(tensor) }] as const);
        results.push(Object.fromEntries(await Promise.all(entries)));
      }
      return results;
    } finally {
      await inTurn(ort, () => session.release());
    }
  };
}

async function dataOf(tensor: OrtTensor): Promise<unknown> {
  return tensor.getData ? tensor.getData() : tensor.data;
}

async function createMachine<O extends Ort>(
  source: Trainable<O>,
  graph: TrainingGraph,
  detached: DetachedModel,
  { encode, labels }: CreateTrainerOptions,
): Promise<Machine<BatchFeeds>> {
  const { ort } = source;
  const session: Session<O> = await createSession(source, detached);
  const head = graph.heads[0];
  const outputs = [graph.lossOutput, graph.logitsOutput, graph.gradientOutput, head?.weightGradient, head?.biasGradient];
  const fetches = outputs.filter((name) => name !== undefined);
  const floats = (data: Float32Array<ArrayBuffer>, ...dims: number[]): OrtTensor => makeTensor(ort, data, dims);
  return {
    layout: graph.parameters,
    head: head && { module: head.module, in: head.in },
    encodes: encode !== undefined,

    async batch(rows) {
      const texts = rows.flatMap(({ text }) => (text === undefined ? [] : [text]));
      if (texts.length > 0 && texts.length < rows.length) throw new TypeError("a batch of texts and feeds together; give all examples in one way");
      return texts.length > 0 ? encode!(texts) : joinFeeds(rows.map(({ feeds }) => feeds!));
    },

    async step(batch, { parameters, weight, bias }, targets) {
      const feeds = toTensors(ort, batch);
      if (graph.parametersInput !== undefined) feeds[graph.parametersInput] = floats(parameters, parameters.length);
      if (head) {
        feeds[head.weight] = floats(weight, labels.length, head.in);
        if (head.bias !== undefined) feeds[head.bias] = floats(bias, labels.length);
      }
      feeds[graph.targetsInput] = floats(targets, targets.length / labels.length, labels.length);
      const results = (await inTurn(ort, () => call(session, feeds, fetches, {}))) as Record<string, OrtTensor>;
      const take = async (name: string | undefined): Promise<Float32Array<ArrayBuffer>> =>
        name === undefined ? new Float32Array(0) : (((await dataOf(results[name]!)) as Float32Array).slice() as Float32Array<ArrayBuffer>);
      const logits = await take(graph.logitsOutput);
      if (logits.length !== targets.length) {
        const message = `the model gives ${logits.length} logits for ${targets.length / labels.length} rows of ${labels.length} labels`;
        throw new BaseMismatchError(message, { module: graph.logitsOutput, expected: targets.length, found: logits.length });
      }
      const gradients = {
        parameters: await take(graph.gradientOutput),
        weight: await take(head?.weightGradient),
        bias: await take(head?.biasGradient),
      };
      return { loss: (await take(graph.lossOutput))[0]!, logits, gradients };
    },

    dispose: () => inTurn(ort, () => session.release()),
  };
}

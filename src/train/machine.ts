/**
 * A session that can learn, as the machine that a trainer trains with: factors and a head in; logits, loss and gradients out.
 */
import type { TrainingGraph } from "../autodiff/graph.ts";
import { BaseMismatchError } from "../errors.ts";
import { dataOf, type EngineTensor, type Tensors } from "../session/engine.ts";
import type { Trainable } from "../session/training.ts";
import { transpose } from "../tensor/derived.ts";
import { type BatchFeeds, batchTensors } from "./batch.ts";
import { type HeadLayer, layersOf, zerosOf } from "./head.ts";
import type { Targets } from "./lessons.ts";
import type { Machine, MachineStep, Point } from "./subject.ts";
import type { Terms, TrainedModule } from "./terms.ts";

type Floats = Float32Array<ArrayBuffer>;

/** The inputs of a layer of a head: its weight [1, in, out], its bias [1, 1, out]. */
export interface HeadInputs {
  readonly module: string;
  readonly in: number;
  /** Undefined where a task has as many as it has labels. */
  readonly out: number | undefined;
  readonly weight: string;
  readonly bias: string | undefined;
}

/**
 * The layers of a head, that with the labels last.
 * @param wanted names of layers, or of a module that holds some. Default: all that there are
 * @throws RangeError when the session was not made to train a layer, or several have labels of their own
 */
export function headInputs(
  { inputs }: Trainable,
  wanted: string | readonly string[] | false | undefined,
): readonly HeadInputs[] {
  if (wanted === false) return [];
  const all = inputs.filter(({ kind }) => kind === "headWeight").map((weight) => layerInputs(inputs, weight));
  const chosen = wanted === undefined ? all : [wanted].flat().flatMap((name) => layersCalled(all, name));
  const last = chosen.filter(({ out }) => out === undefined);
  if (last.length > 1) {
    const several = last.map(({ module }) => `"${module}"`).join(", ");
    throw new RangeError(`head: expected one layer with a row for each label, the session has ${several}; name one`);
  }
  return [...new Set([...chosen.filter(({ out }) => out !== undefined), ...last])];
}

function layerInputs(inputs: Trainable["inputs"], { of, name, dims }: Trainable["inputs"][number]): HeadInputs {
  const bias = inputs.find((one) => one.kind === "headBias" && one.of === of);
  const [, width, out] = dims;
  return {
    ...{ module: of, in: width as number, out: typeof out === "number" ? out : undefined },
    ...{ weight: name, bias: bias?.name },
  };
}

/** @throws RangeError when there is none */
function layersCalled(all: readonly HeadInputs[], name: string): HeadInputs[] {
  const exact = all.filter(({ module }) => module === name);
  const found = exact.length > 0 ? exact : all.filter(({ module }) => module.startsWith(`${name}.`));
  if (found.length > 0) return found;
  const there = all.map(({ module }) => `"${module}"`).join(", ") || "none";
  throw new RangeError(
    `head: the session trains ${there}, not "${name}"; create it with reserve: { head: "${name}" }, or a list of the head's layers`,
  );
}

/** Outputs of models that give no logits, as exporters call them. */
const NO_LOGITS = /^(last_hidden_state|hidden_states|pooler_output|token_embeddings|sentence_embedding|.*_embeds)$/;

/**
 * Training and judging take one row of logits for each text, or for each token. Of anything else a softmax would mix tokens and
 * padding, or features.
 * @throws BaseMismatchError when the model gives something else
 */
function refuseOtherOutputs({ logitsOutput: name, logitsDims: dims, tokens }: TrainingGraph, head: boolean): void {
  const [rows] = dims;
  if (!head && NO_LOGITS.test(name)) throw notLogits(name, dims);
  if (tokens) return;
  if (dims.length !== 2 || (rows !== "batch" && rows !== "?")) throw notLogits(name, dims);
}

function notLogits(name: string, found: readonly (number | string)[]): BaseMismatchError {
  const message =
    `the model's output "${name}" is [${found.join(", ")}]: training and judging take logits [batch, labels], one row for ` +
    "each text, or [batch, length, classes] that one product makes of each token; of embeddings they cannot be done yet";
  return new BaseMismatchError(message, { module: name, expected: ["batch", "labels"], found });
}

/**
 * @param head the layers that are trained whole; empty where the model's own outputs are the logits
 * @throws BaseMismatchError when the model's output is not [batch, labels]
 */
export async function createMachine(
  source: Trainable,
  terms: Terms,
  head: readonly HeadInputs[],
  labels: readonly string[],
): Promise<Machine<BatchFeeds>> {
  refuseOtherOutputs(
    source.graph,
    head.some(({ out }) => out === undefined),
  );
  const idle: Record<string, EngineTensor> = {};
  const base = await source.base();
  for (const [name, { data, dims }] of base) idle[name] = source.engine.tensor(data, [1, ...dims]);
  const layers = head.map(({ module, in: inputs, out: fixed, weight, bias }): FedLayer => {
    const out = fixed ?? labels.length;
    const valuesOf = (name: string | undefined): Floats =>
      name === undefined ? new Float32Array(out) : Float32Array.from(base.get(name)!.data as Float32Array);
    const own = fixed ? { weight: transpose(valuesOf(weight), inputs, out), bias: valuesOf(bias) } : undefined;
    const last = fixed === undefined;
    return { module, in: inputs, out, bias: bias !== undefined, last, own, weightInput: weight, biasInput: bias };
  });
  return new SessionMachine(source, terms.modules, layers, labels.length, idle);
}

/** A layer of the head, and the inputs that it is fed by. */
interface FedLayer extends HeadLayer {
  readonly weightInput: string;
  readonly biasInput: string | undefined;
}

class SessionMachine implements Machine<BatchFeeds> {
  readonly head: readonly FedLayer[];
  readonly #source: Trainable;
  readonly #modules: readonly (TrainedModule & { readonly inputA: string; readonly inputB: string })[];
  readonly #labels: number;
  /** Inputs that carry what is not trained. */
  readonly #idle: Tensors;

  constructor(
    source: Trainable,
    modules: readonly TrainedModule[],
    head: readonly FedLayer[],
    labels: number,
    idle: Tensors,
  ) {
    const input = (of: string, kind: "A" | "B"): string =>
      source.inputs.find((one) => one.of === of && one.kind === kind)!.name;
    this.head = head;
    this.#source = source;
    this.#modules = modules.map((one) => ({ ...one, inputA: input(one.name, "A"), inputB: input(one.name, "B") }));
    this.#labels = labels;
    this.#idle = idle;
  }

  async answer(batch: BatchFeeds, point: Point): Promise<Float32Array> {
    const { logitsOutput } = this.#source.graph;
    const results = await this.#source.run(this.#feeds(batch, point), [logitsOutput]);
    return floatsOf(this.#logits(results, this.#rowsOf(batch)));
  }

  /** Rows of logits: one for each position that is asked for, or for each text. */
  #rowsOf(batch: BatchFeeds): number {
    const { tokens } = this.#source.graph;
    return tokens ? batch[tokens.positions]!.dims[0]! : rowsOf(batch);
  }

  async step(batch: BatchFeeds, point: Point, { values, rows, classes }: Targets): Promise<MachineStep> {
    const { engine, graph, run } = this.#source;
    const dims = [rows, values.length / rows];
    const learn = {
      [graph.learnInput]: engine.tensor(Uint8Array.of(1), []),
      [graph.targetsInput]: engine.tensor(values, dims),
      ...(classes && { [graph.tokens!.classes]: engine.tensor(classes, dims) }),
    };
    const trained = [
      ...this.#modules.flatMap(({ inputA, inputB }) => [inputA, inputB]),
      ...this.head.flatMap(({ weightInput, biasInput }) => [weightInput, biasInput ?? []].flat()),
    ];
    // Of a vocabulary, logits are more than all the rest.
    const logits = graph.tokens ? [] : [graph.logitsOutput];
    const outputs = [graph.lossOutput, ...logits, ...trained.map((name) => graph.gradients.get(name)!)];
    const results = await run({ ...this.#feeds(batch, point), ...learn }, outputs);
    if (!graph.tokens) this.#checkLabels(results, rows, values.length);
    const loss = (await floatsOf(results[graph.lossOutput]!))[0]!;
    return { loss, gradients: await this.#gradients(results) };
  }

  /** @throws BaseMismatchError when the model has other labels than the trainer */
  #checkLabels(results: Tensors, rows: number, expected: number): void {
    const found = this.#logits(results, rows).dims.reduce((a, b) => a * b, 1);
    if (found === expected) return;
    const message = `the model gives ${found} logits for ${rows} rows of ${this.#labels} labels`;
    throw new BaseMismatchError(message, { module: this.#source.graph.logitsOutput, expected, found });
  }

  /** @throws BaseMismatchError when there is not one row for each of the batch */
  #logits(results: Tensors, rows: number): EngineTensor {
    const { logitsOutput: name, tokens } = this.#source.graph;
    const { dims } = results[name]!;
    if (dims.length !== (tokens ? 3 : 2) || dims.at(-2) !== rows) throw notLogits(name, dims);
    return results[name]!;
  }

  /** Inputs of a batch and a task. */
  #feeds(batch: BatchFeeds, { terms, ...numbers }: Point): Tensors {
    const { engine } = this.#source;
    const feeds = { ...batchTensors(engine, batch), ...this.#idle };
    for (const { name, in: inputs, out, inputA, inputB } of this.#modules) {
      const { rank, A, Bt } = terms.get(name)!;
      feeds[inputA] = engine.tensor(transpose(A, rank, inputs), [1, inputs, rank]);
      feeds[inputB] = engine.tensor(Bt, [1, rank, out]);
    }
    for (const [i, { weight, bias }] of layersOf(this.head, numbers).entries()) {
      const { in: inputs, out, weightInput, biasInput } = this.head[i]!;
      feeds[weightInput] = engine.tensor(transpose(weight, out, inputs), [1, inputs, out]);
      // In memory of its own: an engine may take all that a view looks into.
      if (biasInput !== undefined) feeds[biasInput] = engine.tensor(bias.slice(), [1, 1, out]);
    }
    return feeds;
  }

  async #gradients(results: Tensors): Promise<Point> {
    const of = (input: string): Promise<Floats> => floatsOf(results[this.#source.graph.gradients.get(input)!]!);
    const terms = await Promise.all(
      this.#modules.map(async ({ name, in: inputs, inputA, inputB }) => {
        const A = await of(inputA);
        const rank = A.length / inputs;
        return [name, { rank, A: transpose(A, inputs, rank), Bt: await of(inputB) }] as const;
      }),
    );
    const numbers = zerosOf(this.head);
    for (const [i, own] of layersOf(this.head, numbers).entries()) {
      const { in: inputs, out, weightInput, biasInput } = this.head[i]!;
      own.weight.set(transpose(await of(weightInput), inputs, out));
      if (biasInput !== undefined) own.bias.set(await of(biasInput));
    }
    return { terms: new Map(terms), ...numbers };
  }
}

function rowsOf(batch: BatchFeeds): number {
  return Object.values(batch).find(({ dims }) => dims.length > 0)?.dims[0] ?? 1;
}

/** In memory of their own: the runtime may use the tensor's again. */
async function floatsOf(tensor: EngineTensor): Promise<Floats> {
  return Float32Array.from((await dataOf(tensor)) as Float32Array);
}

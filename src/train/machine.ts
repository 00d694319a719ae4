/**
 * A session that can learn, as the machine that a trainer trains with: factors and a head in; logits, loss and gradients out.
 */
import type { TrainingGraph } from "../autodiff/graph.ts";
import { BaseMismatchError } from "../errors.ts";
import { dataOf, type EngineTensor, type Tensors } from "../session/engine.ts";
import type { Trainable } from "../session/training.ts";
import { transpose } from "../tensor/transpose.ts";
import { type BatchFeeds, batchTensors } from "./batch.ts";
import type { Targets } from "./lessons.ts";
import type { Machine, MachineStep, Point } from "./subject.ts";
import type { Terms, TrainedModule } from "./terms.ts";

type Floats = Float32Array<ArrayBuffer>;

/** The inputs of a head: its weight [1, in, labels], its bias [1, 1, labels]. */
export interface HeadInputs {
  readonly module: string;
  readonly in: number;
  readonly weight: string;
  readonly bias: string | undefined;
}

/** @throws RangeError when the session was not made to train the layer */
export function headInputs({ inputs }: Trainable, wanted: string | false | undefined): HeadInputs | undefined {
  const weights = inputs.filter(({ kind }) => kind === "headWeight");
  if (wanted === false || (wanted === undefined && weights.length === 0)) return undefined;
  const weight = weights.find(({ of }) => of === (wanted ?? of));
  if (!weight) {
    const there = weights.map(({ of }) => `"${of}"`).join(", ") || "none";
    const message = `head: the session trains ${there}, not "${wanted}"; create it with reserve: { head: "${wanted}" }`;
    throw new RangeError(message);
  }
  const bias = inputs.find(({ kind, of }) => kind === "headBias" && of === weight.of);
  return { module: weight.of, in: weight.dims[1] as number, weight: weight.name, bias: bias?.name };
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
 * @param head the layer that is trained whole; undefined where the model's own outputs are the logits
 * @throws BaseMismatchError when the model's output is not [batch, labels]
 */
export async function createMachine(
  source: Trainable,
  terms: Terms,
  head: HeadInputs | undefined,
  labels: readonly string[],
): Promise<Machine<BatchFeeds>> {
  refuseOtherOutputs(source.graph, head !== undefined);
  const idle: Record<string, EngineTensor> = {};
  for (const [name, { data, dims }] of await source.base()) idle[name] = source.engine.tensor(data, [1, ...dims]);
  return new SessionMachine(source, terms.modules, head, labels.length, idle);
}

class SessionMachine implements Machine<BatchFeeds> {
  readonly head: Machine<BatchFeeds>["head"];
  readonly #source: Trainable;
  readonly #modules: readonly (TrainedModule & { readonly inputA: string; readonly inputB: string })[];
  readonly #head: HeadInputs | undefined;
  readonly #labels: number;
  /** Inputs that carry what is not trained. */
  readonly #idle: Tensors;

  constructor(
    source: Trainable,
    modules: readonly TrainedModule[],
    head: HeadInputs | undefined,
    labels: number,
    idle: Tensors,
  ) {
    const input = (of: string, kind: "A" | "B"): string =>
      source.inputs.find((one) => one.of === of && one.kind === kind)!.name;
    this.head = head && { module: head.module, in: head.in, bias: head.bias !== undefined };
    this.#source = source;
    this.#modules = modules.map((one) => ({ ...one, inputA: input(one.name, "A"), inputB: input(one.name, "B") }));
    this.#head = head;
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
      ...(this.#head ? [this.#head.weight] : []),
      ...(this.#head?.bias === undefined ? [] : [this.#head.bias]),
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
  #feeds(batch: BatchFeeds, { terms, weight, bias }: Point): Tensors {
    const { engine } = this.#source;
    const feeds = { ...batchTensors(engine, batch), ...this.#idle };
    for (const { name, in: inputs, out, inputA, inputB } of this.#modules) {
      const { rank, A, Bt } = terms.get(name)!;
      feeds[inputA] = engine.tensor(transpose(A, rank, inputs), [1, inputs, rank]);
      feeds[inputB] = engine.tensor(Bt, [1, rank, out]);
    }
    if (!this.#head) return feeds;
    const { in: inputs, weight: weightInput, bias: biasInput } = this.#head;
    feeds[weightInput] = engine.tensor(transpose(weight, this.#labels, inputs), [1, inputs, this.#labels]);
    if (biasInput !== undefined) feeds[biasInput] = engine.tensor(bias, [1, 1, this.#labels]);
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
    const head = this.#head;
    return {
      terms: new Map(terms),
      weight: head ? transpose(await of(head.weight), head.in, this.#labels) : new Float32Array(0),
      bias: head?.bias === undefined ? new Float32Array(head ? this.#labels : 0) : await of(head.bias),
    };
  }
}

function rowsOf(batch: BatchFeeds): number {
  return Object.values(batch).find(({ dims }) => dims.length > 0)?.dims[0] ?? 1;
}

/** In memory of their own: the runtime may use the tensor's again. */
async function floatsOf(tensor: EngineTensor): Promise<Floats> {
  return Float32Array.from((await dataOf(tensor)) as Float32Array);
}

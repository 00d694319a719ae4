/**
 * A model that a trainer can train, and a session as such a model: factors and a head in; logits, loss and gradients
 * out.
 */

import type { TrainingGraph } from "../autodiff/graph.ts";
import { BaseMismatchError, checkArgument } from "../errors.ts";
import { dataOf, type EngineTensor, type Tensors } from "../session/engine.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import type { Trainable } from "../session/training.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { type Term, transpose } from "../tensor/term.ts";
import { featuresOf, type HeadLayer, layersOf, zerosOf } from "./state.ts";
import { batchTensors, type Targets } from "./supervision.ts";
import type { TrainedTerms } from "./trained-terms.ts";

/**
 * The numbers of a task that a model is fed with: terms by module name, weights and biases of the head's layers as in a
 * `State`.
 */
export interface TaskWeights {
  readonly terms: ReadonlyMap<string, Term>;
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** A model that can be trained. `Feeds` are one batch of its inputs. */
export interface TrainableModel {
  /**
   * Layers that are trained whole, the one with the labels last; empty where the model's own outputs are the logits.
   */
  readonly head: readonly HeadLayer[];
  /**
   * Computes logits [rows, classes] only: a row for each text, or for each position that the batch asks for.
   * @param features true: `featuresOf` the head follow the logits of each row
   */
  answer(batch: BatchFeeds, weights: TaskWeights, features?: boolean): Promise<Float32Array>;
  /** Gradients are in the shapes of the weights. */
  step(
    batch: BatchFeeds,
    weights: TaskWeights,
    targets: Targets,
  ): Promise<{ readonly loss: number; readonly gradients: TaskWeights }>;
}

type Floats = Float32Array<ArrayBuffer>;

type HeadInputs = Pick<HeadLayer, "module" | "in" | "weight" | "bias"> & {
  /** Undefined for the layer with a row for each label. */
  readonly out: number | undefined;
};

/**
 * Finds the layers of a head, the one with the labels last.
 * @param wanted names of layers, or of a module that holds some. Default: all layers
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

/** @throws RangeError when no layer has the name */
function layersCalled(all: readonly HeadInputs[], name: string): HeadInputs[] {
  const exact = all.filter(({ module }) => module === name);
  const found = exact.length > 0 ? exact : all.filter(({ module }) => module.startsWith(`${name}.`));
  if (found.length > 0) return found;
  const there = all.map(({ module }) => `"${module}"`).join(", ") || "none";
  throw new RangeError(
    `head: the session trains ${there}, not "${name}"; create it with reserve: { head: "${name}" }, or a list of the head's layers`,
  );
}

/** Outputs that are no logits, under exporters' names. */
const NO_LOGITS = /^(last_hidden_state|hidden_states|pooler_output|token_embeddings|sentence_embedding|.*_embeds)$/;

/**
 * Refuses models without logits. Training and judging take one row of logits for each text, or for each token. In other
 * outputs a softmax would mix tokens and padding, or features.
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
    "each text, or [batch, length, classes] that one product makes of each token; models of embeddings cannot be trained or judged yet";
  return new BaseMismatchError(message, { module: name, expected: ["batch", "labels"], found });
}

/**
 * Makes a trainable model of a session.
 * @param head layers that are trained whole; empty where the model's own outputs are the logits
 * @throws BaseMismatchError when the model's output is not [batch, labels]; from `step` when it has other labels than
 *   the trainer, and from both functions when its rows are not as many as the batch asks for
 */
export async function sessionModel(
  { engine, graph, inputs, run, base: readBase }: Trainable,
  terms: TrainedTerms,
  head: readonly HeadInputs[],
  labels: readonly string[],
): Promise<TrainableModel> {
  const { tokens, logitsOutput } = graph;
  const isLabelled = head.some(({ out }) => out === undefined);
  refuseOtherOutputs(graph, isLabelled);
  /** Values of the task inputs that are not trained. */
  const idle: Record<string, EngineTensor> = {};
  const base = await readBase();
  for (const [name, { data, dims }] of base) idle[name] = engine.tensor(data, [1, ...dims]);
  const layers = head.map((layer): HeadLayer => {
    const { in: inputs, out: fixed, weight, bias } = layer;
    const out = fixed ?? labels.length;
    const valuesOf = (name: string | undefined): Floats =>
      name === undefined ? new Float32Array(out) : Float32Array.from(base.get(name)!.data as Float32Array);
    const own = fixed ? { weight: transpose(valuesOf(weight), inputs, out), bias: valuesOf(bias) } : undefined;
    return { ...layer, out, last: fixed === undefined, own };
  });
  const input = (of: string, kind: "A" | "B"): string =>
    inputs.find((known) => known.of === of && known.kind === kind)!.name;
  const modules = terms.modules.map(({ name, in: inputs, out }) => {
    return { name, in: inputs, out, A: input(name, "A"), B: input(name, "B") };
  });

  /**
   * Tensors of all inputs, for a batch and a task.
   * @param features factor of the last layer's inputs, which follow the logits; 0: they do not
   */
  function feedsOf(batch: BatchFeeds, { terms, ...numbers }: TaskWeights, features: number): Tensors {
    const feeds = { ...batchTensors(engine, batch), ...idle };
    for (const { name, in: inputs, out, A: inputA, B: inputB } of modules) {
      const { rank, A, Bt } = terms.get(name)!;
      feeds[inputA] = engine.tensor(transpose(A, rank, inputs), [1, inputs, rank]);
      feeds[inputB] = engine.tensor(Bt, [1, rank, out]);
    }
    for (const { layer, weight, bias } of layersOf(layers, numbers)) {
      const { in: inputs, out, last } = layer;
      const all = last && features > 0 ? out + featuresOf(layers) : out;
      // Copied: an engine may take the whole buffer behind a view.
      const rows = new Float32Array(all * inputs);
      rows.set(weight);
      for (let j = 0; out + j < all; j++) rows[(out + j) * inputs + j] = features;
      feeds[layer.weight] = engine.tensor(transpose(rows, all, inputs), [1, inputs, all]);
      const biases = new Float32Array(all);
      biases.set(bias);
      if (layer.bias !== undefined) feeds[layer.bias] = engine.tensor(biases, [1, 1, all]);
    }
    return feeds;
  }

  function logitsOf(results: Tensors, rows: number): EngineTensor {
    const { dims } = results[logitsOutput]!;
    if (dims.length !== (tokens ? 3 : 2) || dims.at(-2) !== rows) throw notLogits(logitsOutput, dims);
    return results[logitsOutput]!;
  }

  async function gradientsOf(results: Tensors): Promise<TaskWeights> {
    const of = (input: string): Promise<Floats> => floatsOf(results[graph.gradients.get(input)!]!);
    const terms = new Map<string, Term>();
    for (const { name, in: inputs, A: inputA, B: inputB } of modules) {
      const A = await of(inputA);
      const rank = A.length / inputs;
      terms.set(name, { rank, A: transpose(A, inputs, rank), Bt: await of(inputB) });
    }
    const numbers = zerosOf(layers);
    for (const { layer, ...gradients } of layersOf(layers, numbers)) {
      const { in: inputs, out } = layer;
      const weight = await of(layer.weight);
      // Rows of features are behind those of labels, and stay as they are.
      gradients.weight.set(transpose(weight, inputs, weight.length / inputs).subarray(0, out * inputs));
      if (layer.bias !== undefined) gradients.bias.set((await of(layer.bias)).subarray(0, out));
    }
    return { terms, ...numbers };
  }

  return {
    head: layers,
    async answer(batch, weights, features = false) {
      const results = await run(feedsOf(batch, weights, Number(features)), [logitsOutput]);
      const rows = tokens ? batch[tokens.positions]!.dims[0]! : rowsOf(batch);
      return floatsOf(logitsOf(results, rows));
    },
    async step(batch, weights, targets) {
      const { rows, classes, features } = targets;
      const scale = Math.sqrt(features?.weight ?? 0);
      const { values, squares } = withFeatures(targets, scale);
      const dims = [rows, values.length / rows];
      const learn = {
        [graph.learnInput]: engine.tensor(Uint8Array.of(1), []),
        [graph.targetsInput]: engine.tensor(values, dims),
        ...(tokens
          ? { [tokens.classes]: engine.tensor(classes!, dims) }
          : { [graph.squaresInput]: engine.tensor(squares, [1, squares.length]) }),
      };
      const trained = [
        ...modules.flatMap(({ A, B }) => [A, B]),
        ...layers.flatMap(({ weight, bias }) => [weight, bias ?? []].flat()),
      ];
      // Logits over a vocabulary are larger than all other results, so they are not fetched.
      const logits = tokens ? [] : [logitsOutput];
      const outputs = [graph.lossOutput, ...logits, ...trained.map((name) => graph.gradients.get(name)!)];
      const results = await run({ ...feedsOf(batch, weights, scale), ...learn }, outputs);
      const found = tokens ? values.length : elementsOf(logitsOf(results, rows).dims);
      if (found !== values.length) {
        const message = `the model gives ${found} logits for ${rows} rows of ${labels.length} labels`;
        throw new BaseMismatchError(message, { module: logitsOutput, expected: values.length, found });
      }
      return { loss: (await floatsOf(results[graph.lossOutput]!))[0]!, gradients: await gradientsOf(results) };
    },
  };
}

/** Targets [rows, classes + features] with the marks of features [classes + features]. */
function withFeatures({ values, rows, features }: Targets, scale: number) {
  if (!features) return { values, squares: new Float32Array(1) };
  const classes = values.length / rows;
  const all = classes + features.values[0]!.length;
  const both = new Float32Array(rows * all);
  for (const [row, own] of features.values.entries()) {
    both.set(values.subarray(row * classes, (row + 1) * classes), row * all);
    const scaled = own.map((value) => scale * value);
    both.set(scaled, row * all + classes);
  }
  return { values: both, squares: new Float32Array(all).fill(1, classes) };
}

function rowsOf(batch: BatchFeeds): number {
  return Object.values(batch).find(({ dims }) => dims.length > 0)?.dims[0] ?? 1;
}

// Copied, since the runtime may reuse the tensor's memory.
async function floatsOf(tensor: EngineTensor): Promise<Floats> {
  return Float32Array.from((await dataOf(tensor)) as Float32Array);
}

// Checks of options and sessions that training functions take.

type Kind = "whole" | "count" | "share" | "between" | "positive" | "unlimited" | "rate";

const LIMITS: Readonly<Record<Kind, readonly [expected: string, valid: (value: number) => boolean]>> = {
  whole: ["a whole number ≥ 1", (value) => Number.isInteger(value) && value >= 1],
  count: ["a whole number ≥ 0", (value) => Number.isInteger(value) && value >= 0],
  share: ["a number from 0 to less than 1", (value) => value >= 0 && value < 1],
  between: ["a number between 0 and 1", (value) => value > 0 && value < 1],
  positive: ["a number above 0", (value) => value > 0 && value < Infinity],
  unlimited: ["a number above 0, or Infinity", (value) => value > 0],
  rate: ["a number ≥ 0", (value) => value >= 0 && value < Infinity],
};

/**
 * @param where the public function, for the message
 * @param options undefined values are skipped; their defaults apply
 * @throws RangeError naming the option, what is expected and what was found
 */
export function checkNumbers<Options extends object>(
  where: string,
  options: Options,
  limits: { readonly [Name in keyof Options]?: Kind },
): void {
  for (const [name, kind] of Object.entries<Kind>(limits as Record<string, Kind>)) {
    const [expected, valid] = LIMITS[kind];
    const value: unknown = options[name as keyof Options];
    if (value !== undefined && !(typeof value === "number" && valid(value)))
      throw new RangeError(`${where}: ${name}: expected ${expected}, got ${String(value)}`);
  }
}

/** @throws TypeError when `session` is not a session, or was made without `trainable: true` */
export function checkSession(where: string, session: Session): void {
  checkArgument(where, session, "a session (await createEigenSession(…))", "trainable");
  if (session.trainable) return;
  throw new TypeError(`${where}: this session cannot be trained; create it with trainable: true`);
}

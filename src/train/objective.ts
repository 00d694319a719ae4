/**
 * The objective of training: the loss of a batch at a state, its gradient, and a check of that gradient. Some providers
 * compute wrong numbers without an error, so the gradient is compared with the loss before the first step.
 */

import type { Pack } from "../core/pack.ts";
import { BackendError, type EigenLoraError } from "../errors.ts";
import { dot } from "../extract/linalg.ts";
import { throwIfAborted } from "../pace.ts";
import type { AbortOptions } from "../source.ts";
import { sum, type TaskDtypes } from "../tensor/dtypes.ts";
import { normal, uniform } from "../tensor/random.ts";
import { copyOf, featuresOf, type HeadLayer, type LayerNumbers, mapLayers, type State, stateLike } from "./state.ts";
import { type Stepped, type TaskSteps, toSteps } from "./stored-task.ts";
import { crossEntropy, largest, likeliest, type Row, type Score, type Supervision } from "./supervision.ts";
import type { TaskWeights, TrainableModel } from "./trainable-model.ts";
import { asStored, storingTrained, type TrainedTerms } from "./trained-terms.ts";

/** The parts of a training: a model that runs with a task's numbers, and the pack that gives these a meaning. */
export interface TrainingSetup {
  readonly pack: Pack;
  readonly model: TrainableModel;
  readonly supervision: Supervision;
  readonly terms: TrainedTerms;
  /** Terms over the pack's components that a LoRA can begin from; equal to `terms` where coefficients are trained. */
  readonly origin: TrainedTerms;
  /** Empty for language models. */
  readonly labels: readonly string[];
}

/** Options of the loss: the targets, and the numbers that logits are computed from. */
export interface ObjectiveOptions {
  /**
   * Divides the logits where they are compared with targets. Default: 1. Needs a head, since the division happens in
   * its last layer.
   */
  readonly temperature?: number | undefined;
  /**
   * Number formats that the task will be stored in. Every step computes with the rounded numbers and changes the exact
   * ones behind them (straight-through). Useful with int8, int4 and int3. Default: exact numbers.
   */
  readonly dtype?: Partial<TaskDtypes> | undefined;
}

/** Options of rows with features. */
export interface Featured {
  /** Weight in the loss of half the squared distance of a row's features. */
  readonly featureWeight?: number | undefined;
}

interface Evaluated {
  readonly loss: number;
  readonly gradients: State;
}

/** Computes the loss and its gradient over a batch, in micro-batches where it is large. */
export async function evaluate(
  setup: TrainingSetup,
  rows: readonly Row[],
  state: State,
  { temperature = 1, dtype = {}, stored, featureWeight = 0 }: ObjectiveOptions & Stepped & Featured,
): Promise<Evaluated> {
  const { model, supervision, terms } = setup;
  const divide = dividedBy(model.head, temperature);
  const weights = weightsOf(setup, rounded(setup, state, dtype, stored), temperature);
  const gradients = stateLike(state);
  let loss = 0;
  for (const { rows: run, targets, share } of supervision.microBatches(rows)) {
    const values = run.flatMap(({ features }) => features ?? []);
    const features = values.length > 0 && featureWeight > 0 ? { values, weight: featureWeight } : undefined;
    const made = await model.step(await supervision.feeds(run), weights, { ...targets, features });
    loss += share * made.loss;
    const { weight, bias } = divide(made.gradients);
    add(gradients.parameters, terms.pullBack(made.gradients.terms), share);
    add(gradients.weight, weight, share);
    add(gradients.bias, bias, share);
  }
  return { loss, gradients };
}

/** Scores the answers to some rows. Every row has the same weight. */
export async function score(
  setup: TrainingSetup,
  rows: readonly Row[],
  state: State,
  { temperature = 1, dtype = {}, stored, signal }: ObjectiveOptions & Stepped & AbortOptions,
): Promise<Score> {
  const weights = weightsOf(setup, rounded(setup, state, dtype, stored), temperature);
  let loss = 0;
  let count = 0;
  let right = 0;
  for await (const { row, logits } of answers(setup, rows, weights, { signal })) {
    const { wanted } = row;
    for (const [i, answer] of wanted.entries()) loss += crossEntropy(answer, logits[i]!);
    count += wanted.length;
    if (wanted.every((answer, i) => likeliest(answer) === largest(logits[i]!))) right++;
  }
  return { loss: loss / count, accuracy: right / rows.length };
}

interface AnsweredRow {
  readonly row: Row;
  readonly logits: Float32Array[];
  /** `featuresOf` the head, if they were asked for and there is a head. */
  readonly features: Float32Array | undefined;
}

/** Runs rows, those of similar lengths together, and yields answers in that order. */
export async function* answers(
  { model, supervision }: Pick<TrainingSetup, "model" | "supervision">,
  rows: readonly Row[],
  weights: TaskWeights,
  { signal, features = false }: AbortOptions & { readonly features?: boolean | undefined } = {},
): AsyncGenerator<AnsweredRow> {
  // A model that answers at every position has them everywhere, and tells more by its answers.
  const width = features && !supervision.tokens ? featuresOf(model.head) : 0;
  const lengths = await supervision.lengths(rows);
  const order = [...rows].sort((a, b) => lengths.get(a)! - lengths.get(b)!);
  for (const { rows: run, targets } of supervision.microBatches(order)) {
    throwIfAborted(signal);
    const values = await model.answer(await supervision.feeds(run), weights, width > 0);
    const each = values.length / targets.rows;
    let at = 0;
    for (const row of run) {
      const outputs = row.wanted.map(() => values.subarray(at * each, ++at * each));
      const logits = outputs.map((output) => output.subarray(0, each - width));
      yield { row, logits, features: width > 0 ? outputs[0]!.slice(each - width) : undefined };
    }
  }
}

function add(sum: Float32Array, part: Float32Array, share: number): void {
  for (let i = 0; i < sum.length; i++) sum[i]! += share * part[i]!;
}

/** Divides the weights and bias of the last layer, which makes the logits; divides their gradients too. */
function dividedBy(head: readonly HeadLayer[], temperature: number): (numbers: LayerNumbers) => LayerNumbers {
  const divided = (part: LayerNumbers["weight"]): LayerNumbers["weight"] => part.map((v) => v / temperature);
  return (numbers) =>
    mapLayers(head, numbers, ({ last }, { weight, bias }) =>
      last ? { weight: divided(weight), bias: divided(bias) } : {},
    );
}

/** Weights that the model is fed with; the head's last layer is divided by the temperature. */
export function weightsOf({ terms, model }: TrainingSetup, numbers: Omit<State, "all">, temperature = 1): TaskWeights {
  return { terms: terms.expand(numbers.parameters), ...dividedBy(model.head, temperature)(numbers) };
}

/** Rounds a state to the numbers that a task file would hold. */
export function rounded(
  { terms, model }: TrainingSetup,
  state: State,
  { coefficients, head }: Partial<TaskDtypes>,
  stored: TaskSteps | undefined,
): Omit<State, "all"> {
  const { parameters } = state;
  const numbers = mapLayers(model.head, state, ({ in: inputs, out }, { weight }, i) => {
    const steps = stored?.head[i];
    if (steps) return { weight: toSteps(weight, steps.weight, steps.largest) };
    return head ? { weight: storingTrained("the head", () => asStored(weight, head, out, inputs)) } : {};
  });
  if (stored) return { ...numbers, parameters: toSteps(parameters, stored.parameters) };
  return { ...numbers, parameters: coefficients ? terms.rounded(parameters, coefficients) : parameters };
}

/** Error of training that cannot go on. */
export function stopped(message: string): EigenLoraError {
  return new BackendError(`fit: ${message}`, { backend: "train" });
}

/**
 * Compares the slope of the loss with the gradient in two directions: along the gradient, and off it.
 * @throws BackendError when they differ, or a number is not finite
 */
export async function checkGradients(
  state: State,
  evaluate: (state: State) => Promise<Pick<Evaluated, "loss" | "gradients">>,
): Promise<void> {
  const { loss, gradients } = await evaluate(state);
  const gradient = gradients.all;
  const norm = Math.sqrt(sum(gradient, (g) => g * g));
  if (norm === 0 && Number.isFinite(loss)) return;
  if (!(norm > 0)) {
    throw stopped(
      `the loss is ${loss} and its gradient ${norm} before the first step: the model or the examples give no numbers`,
    );
  }
  const noise = uniform(7);
  const along = gradient.map((g) => g / norm);
  const off = along.map((d) => d + (0.5 * normal(noise)) / Math.sqrt(along.length));
  // Long enough for the loss to move well above the noise of f32, short enough for it to stay almost straight.
  const step = Math.min(0.05, 0.01 / norm);
  for (const direction of [along, off]) {
    const lossAt = async (by: number): Promise<number> => {
      const moved = copyOf(state);
      direction.forEach((d, i) => (moved.all[i]! += by * d));
      return (await evaluate(moved)).loss;
    };
    const slope = dot(gradient, 0, direction, 0, gradient.length);
    let found = 0;
    const agrees = async (by: number): Promise<boolean> => {
      const up = ((await lossAt(by)) - loss) / by;
      const down = (loss - (await lossAt(-by))) / by;
      found = (up + down) / 2;
      // Near a minimum the gradient is almost zero, so that curvature dominates the difference.
      const bend = Math.abs(up - down) / 2;
      return Math.abs(found - slope) <= 0.1 * Math.abs(slope) + bend + (1e-6 * (1 + loss)) / by;
    };
    // Where the loss bends a lot, a shorter step tells.
    if ((await agrees(step)) || (await agrees(step / 4))) continue;
    throw stopped(
      `the loss changes by ${found.toPrecision(3)} where its gradient says ${slope.toPrecision(3)}: this provider computes gradients wrongly. Use another`,
    );
  }
}

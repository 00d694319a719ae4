/**
 * What training makes smaller: the loss of a batch at a state, and its gradient.
 */
import type { TaskDtypes } from "../tensor/dtypes.ts";
import { storing } from "../tensor/encode.ts";
import type { Row } from "./examples.ts";
import { type Lessons, logitsOf, type Score } from "./lessons.ts";
import { crossEntropy, largest, likeliest } from "./probabilities.ts";
import { type State, stateLike } from "./state.ts";
import { type Stepped, type TaskSteps, toSteps } from "./steps.ts";
import type { Point, Subject } from "./subject.ts";
import { asStored } from "./terms.ts";

/** What training brings the loss of down: targets, and the numbers that logits come from. */
export interface ObjectiveOptions {
  /** Share of every target that is spread over all labels. Default: 0. */
  readonly smoothing?: number | undefined;
  /** What logits are divided by where they meet targets. Default: 1. Needs a head, which is where they are divided. */
  readonly temperature?: number | undefined;
  /**
   * The number formats that the task will be stored in: every step sees the numbers as they will be read, and changes those behind
   * them (straight-through). Of use with int8, int4 and int3. Default: exact numbers.
   */
  readonly dtype?: Partial<TaskDtypes> | undefined;
}

export interface Evaluated {
  readonly loss: number;
  readonly gradients: State;
}

/** The parts of a state. */
interface Numbers {
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly weight: Float32Array;
  readonly bias: Float32Array;
}

/** Loss and gradients of a batch, which runs in parts where it is large. */
export async function evaluate<Feeds>(
  subject: Subject<Feeds>,
  rows: readonly Row<Feeds>[],
  state: State,
  { smoothing = 0, temperature = 1, dtype = {}, stored }: ObjectiveOptions & Stepped,
): Promise<Evaluated> {
  const { machine, lessons, terms } = subject;
  const point = pointOf(subject, rounded(subject, state, dtype, stored), temperature);
  const gradients = stateLike(state);
  let loss = 0;
  for (const { rows: some, targets, share } of lessons.parts(rows, smoothing)) {
    const made = await machine.step(await lessons.batch(some), point, targets);
    loss += share * made.loss;
    add(gradients.parameters, terms.pullBack(state.parameters, made.gradients.terms), share, 1);
    add(gradients.weight, made.gradients.weight, share, temperature);
    add(gradients.bias, made.gradients.bias, share, temperature);
  }
  return { loss, gradients };
}

/** How good the answers to some rows are, each of the same weight. */
export async function score<Feeds>(
  subject: Subject<Feeds>,
  rows: readonly Row<Feeds>[],
  state: State,
  { temperature = 1, dtype = {}, stored }: ObjectiveOptions & Stepped,
): Promise<Score> {
  const point = pointOf(subject, rounded(subject, state, dtype, stored), temperature);
  let [loss, count, right] = [0, 0, 0];
  for await (const { row, logits } of answers(subject, rows, point)) {
    const wanted = subject.lessons.wanted(row);
    for (const [i, one] of wanted.entries()) loss += crossEntropy(one, logits[i]!);
    count += wanted.length;
    if (wanted.every((one, i) => likeliest(one) === largest(logits[i]!))) right++;
  }
  return { loss: loss / count, accuracy: right / rows.length };
}

/** The logits of each row, in the order in which they run: those of like lengths together. */
export async function* answers<Feeds>(
  { machine, lessons }: { readonly machine: Subject<Feeds>["machine"]; readonly lessons: Lessons<Feeds> },
  rows: readonly Row<Feeds>[],
  point: Point,
  signal?: AbortSignal,
): AsyncGenerator<{ readonly row: Row<Feeds>; readonly logits: Float32Array[] }> {
  const lengths = await lessons.lengths(rows);
  const order = [...rows].sort((a, b) => lengths.get(a)! - lengths.get(b)!);
  for (const { rows: some } of lessons.parts(order, 0)) {
    signal?.throwIfAborted();
    const logits = logitsOf(lessons, some, await machine.answer(await lessons.batch(some), point));
    for (const [i, row] of some.entries()) yield { row, logits: logits[i]! };
  }
}

function add(sum: Float32Array, part: Float32Array, share: number, temperature: number): void {
  for (let i = 0; i < sum.length; i++) sum[i]! += share * Math.fround(part[i]! / temperature);
}

/** What a model is fed with, the logits divided. */
export function pointOf<Feeds>(
  { terms }: Subject<Feeds>,
  { parameters, weight, bias }: Numbers,
  temperature = 1,
): Point {
  const divided = (part: Float32Array): Float32Array<ArrayBuffer> => Float32Array.from(part, (v) => v / temperature);
  return { terms: terms.expand(parameters), weight: divided(weight), bias: divided(bias) };
}

/** As they would be read from a task file. */
function rounded<Feeds>(
  { terms, labels }: Subject<Feeds>,
  { parameters, weight, bias }: State,
  { coefficients, head }: Partial<TaskDtypes>,
  stored: TaskSteps | undefined,
): Numbers {
  const width = weight.length / labels.length;
  const roundedHead = (): Float32Array => {
    if (stored?.weight) return toSteps(weight, stored.weight, stored.largest);
    return head && width > 0
      ? storing("the head", undefined, () => asStored(weight, head, labels.length, width))
      : weight;
  };
  if (stored) return { parameters: toSteps(parameters, stored.parameters), weight: roundedHead(), bias };
  return {
    parameters: coefficients ? terms.rounded(parameters, coefficients) : parameters,
    weight: roundedHead(),
    bias,
  };
}

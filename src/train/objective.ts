/**
 * What training makes smaller: the loss of a batch at a state, and its gradient.
 */
import type { TaskDtypes } from "../tensor/dtypes.ts";
import type { Row } from "./examples.ts";
import { type HeadLayer, type LayerNumbers, mapLayers } from "./head.ts";
import { type Lessons, logitsOf, type Score } from "./lessons.ts";
import { crossEntropy, largest, likeliest } from "./probabilities.ts";
import { type State, stateLike } from "./state.ts";
import { type Stepped, type TaskSteps, toSteps } from "./steps.ts";
import type { Point, Subject } from "./subject.ts";
import { asStored, storingTrained } from "./terms.ts";

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
interface Numbers extends LayerNumbers {
  readonly parameters: Float32Array<ArrayBuffer>;
}

/** Loss and gradients of a batch, which runs in parts where it is large. */
export async function evaluate<Feeds>(
  subject: Subject<Feeds>,
  rows: readonly Row<Feeds>[],
  state: State,
  { smoothing = 0, temperature = 1, dtype = {}, stored }: ObjectiveOptions & Stepped,
): Promise<Evaluated> {
  const { machine, lessons, terms } = subject;
  const divide = dividedBy(machine.head, temperature);
  const point = pointOf(subject, rounded(subject, state, dtype, stored), temperature);
  const gradients = stateLike(state);
  let loss = 0;
  for (const { rows: some, targets, share } of lessons.parts(rows, smoothing)) {
    const made = await machine.step(await lessons.batch(some), point, targets);
    loss += share * made.loss;
    const { weight, bias } = divide(made.gradients);
    add(gradients.parameters, terms.pullBack(state.parameters, made.gradients.terms), share);
    add(gradients.weight, weight, share);
    add(gradients.bias, bias, share);
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

function add(sum: Float32Array, part: Float32Array, share: number): void {
  for (let i = 0; i < sum.length; i++) sum[i]! += share * part[i]!;
}

/** Logits are divided where they are made: in the last layer of a head, and so are its gradients. */
function dividedBy(head: readonly HeadLayer[], temperature: number): (numbers: LayerNumbers) => LayerNumbers {
  const divided = (part: LayerNumbers["weight"]): LayerNumbers["weight"] => part.map((v) => v / temperature);
  return (numbers) =>
    mapLayers(head, numbers, ({ last }, { weight, bias }) =>
      last ? { weight: divided(weight), bias: divided(bias) } : {},
    );
}

/** What a model is fed with, the logits divided. */
export function pointOf<Feeds>({ terms, machine }: Subject<Feeds>, numbers: Numbers, temperature = 1): Point {
  return { terms: terms.expand(numbers.parameters), ...dividedBy(machine.head, temperature)(numbers) };
}

/** As they would be read from a task file. */
function rounded<Feeds>(
  { terms, machine }: Subject<Feeds>,
  state: State,
  { coefficients, head }: Partial<TaskDtypes>,
  stored: TaskSteps | undefined,
): Numbers {
  const { parameters } = state;
  const numbers = mapLayers(machine.head, state, ({ in: inputs, out }, { weight }, i) => {
    const steps = stored?.head[i];
    if (steps) return { weight: toSteps(weight, steps.weight, steps.largest) };
    return head ? { weight: storingTrained("the head", () => asStored(weight, head, out, inputs)) } : {};
  });
  if (stored) return { ...numbers, parameters: toSteps(parameters, stored.parameters) };
  return { ...numbers, parameters: coefficients ? terms.rounded(parameters, coefficients) : parameters };
}

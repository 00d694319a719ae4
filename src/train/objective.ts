/**
 * What training makes smaller: the loss of a batch at a state, and its gradient.
 */
import type { TaskDtypes } from "../tensor/dtypes.ts";
import { storing } from "../tensor/encode.ts";
import { type Row, targetsOf } from "./examples.ts";
import { type State, stateLike } from "./state.ts";
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
  /** [rows, labels] */
  readonly logits: Float32Array;
  readonly gradients: State;
}

/** The parts of a state. */
interface Numbers {
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly weight: Float32Array;
  readonly bias: Float32Array;
}

/** Rows that run together at most: gradients need values that are kept of all of them, so that memory grows with their number. */
const MOST_ROWS = 16;

/** Loss and gradients of a batch, which runs in parts where it is large. */
export async function evaluate<Feeds>(
  subject: Subject<Feeds>,
  rows: readonly Row<Feeds>[],
  state: State,
  { smoothing = 0, temperature = 1, dtype = {} }: ObjectiveOptions,
): Promise<Evaluated> {
  const { machine, inputs, terms } = subject;
  const labels = subject.labels.length;
  const targets = targetsOf(rows, labels, smoothing);
  const point = pointOf(subject, rounded(subject, state, dtype), temperature);
  const logits = new Float32Array(targets.length);
  const gradients = stateLike(state);
  let loss = 0;
  for (let at = 0; at < rows.length; at += MOST_ROWS) {
    const some = rows.slice(at, at + MOST_ROWS);
    const wanted = targets.slice(at * labels, (at + some.length) * labels);
    const made = await machine.step(await inputs.batch(some), point, wanted);
    // Each part is a mean over its own rows.
    const share = some.length / rows.length;
    loss += share * made.loss;
    logits.set(made.logits, at * labels);
    add(gradients.parameters, terms.pullBack(state.parameters, made.gradients.terms), share, 1);
    add(gradients.weight, made.gradients.weight, share, temperature);
    add(gradients.bias, made.gradients.bias, share, temperature);
  }
  return { loss, logits, gradients };
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
): Numbers {
  const width = weight.length / labels.length;
  return {
    parameters: coefficients ? terms.rounded(parameters, coefficients) : parameters,
    weight:
      head && width > 0 ? storing("the head", undefined, () => asStored(weight, head, labels.length, width)) : weight,
    bias,
  };
}

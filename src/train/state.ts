/**
 * The trained numbers as one vector, and its optimizer.
 */

import { checkChoice } from "../arguments.ts";
import { checkNumbers } from "./checks.ts";
import { type HeadLayer, layersOf } from "./head.ts";
import type { TrainedTerms } from "./trained-terms.ts";

/** All trained numbers, and views of its parts: parameters of terms, then weights [out, in], then biases [out] of the head's layers. */
export interface State {
  readonly all: Float32Array<ArrayBuffer>;
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** Makes a state with the part sizes of another. @param all Default: zeros */
export function stateLike(
  { parameters, weight, bias }: Readonly<Record<"parameters" | "weight" | "bias", { readonly length: number }>>,
  all: Float32Array<ArrayBuffer> = new Float32Array(parameters.length + weight.length + bias.length),
): State {
  const [first, second] = [parameters.length, parameters.length + weight.length];
  return { all, parameters: all.subarray(0, first), weight: all.subarray(first, second), bias: all.subarray(second) };
}

export function copyOf(state: State): State {
  return stateLike(state, state.all.slice());
}

/** Options of AdamW (Loshchilov and Hutter, 2019). */
export interface OptimizerOptions {
  /**
   * Learning rates. Default for terms, and for the head's layer with the labels: 0.02. Private terms, which make up a LoRA: `terms`, or
   * 0.002 where that is not given. Layers of a head in front of the one with the labels (`inner`): `head` divided by
   * the number of inputs of the layer. Numbers with a rate of 0 stay as they are.
   */
  readonly learningRates?:
    | {
        readonly terms?: number;
        readonly privateTerms?: number;
        readonly head?: number;
        readonly inner?: number;
      }
    | undefined;
  /** Weight decay of terms and of the head's weight. Default: 0. */
  readonly weightDecay?: number | undefined;
  /** Largest norm of the gradient. Default: 1. */
  readonly clip?: number | undefined;
  /** Steps until the full rate is reached. Default: a tenth of all steps. */
  readonly warmup?: number | undefined;
  /** How the rate falls to 0 over all steps. Default: "linear". */
  readonly decay?: "linear" | "cosine" | "none" | undefined;
}

/**
 * Makes an optimizer of a state.
 * @param trained meaning of the parameters
 * @param layers of the head in the state
 */
export function optimizerOf(
  state: State,
  trained: TrainedTerms,
  layers: readonly HeadLayer[],
  steps: number,
  { learningRates = {}, weightDecay = 0, clip = 1, warmup = Math.floor(steps / 10), decay }: OptimizerOptions,
): { step(gradients: State): { readonly norm: number; readonly applied: boolean } } {
  const { terms = 0.02, privateTerms = learningRates.terms ?? 0.002, head = 0.02, inner } = learningRates;
  // Adam moves each number by the rate, and the inputs of an inner layer add up: the rate of a wide matrix must fall with 1 / inputs
  // (Yang et al., "Tensor Programs V", 2022). With MiniLM's pooler (384) that beat training the last layer alone on three tasks of three;
  // a tenth of the head's rate was best on one and overfitted on two.
  const ofHead = layers.flatMap(({ last, in: inputs }, i) => {
    const rate = last ? head : (inner ?? head / inputs);
    return [
      { of: (state: State) => layersOf(layers, state)[i]!.weight, rate, weightDecay },
      { of: (state: State) => layersOf(layers, state)[i]!.bias, rate },
    ];
  });
  const ofTerms = trained.parameters.map(({ kind, offset, dims: [rows, columns] }) => ({
    of: ({ parameters }: State) => parameters.subarray(offset, offset + rows * columns),
    rate: kind.startsWith("alpha") ? terms : privateTerms,
    weightDecay,
  }));
  const groups = [
    ...ofTerms,
    ...ofHead,
    // Numbers that are not trained must not count in the norm that is clipped.
  ].filter(({ rate }) => rate !== 0);
  const optimizer = new AdamW(
    groups.map(({ of, ...group }) => ({ values: of(state), ...group })),
    { steps, clip, warmup, decay },
  );
  return { step: (gradients) => optimizer.step(groups.map(({ of }) => of(gradients))) };
}

// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) over plain vectors, with a schedule of the
// learning rate and clipping of the gradient. Knows neither graphs nor what the numbers mean.
// With g the gradient after clipping, t = 1, 2, …, and the rate r = rate · schedule(t):
// p ← p · (1 − r · weightDecay)
// m ← β₁·m + (1 − β₁)·g      v ← β₂·v + (1 − β₂)·g²
// p ← p − r · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
// The schedule rises from 1/warmup to 1 over `warmup` steps, then falls to 0 at `steps`.

/** Numbers with one learning rate and one weight decay. Parts of one vector become groups by `subarray`. */
interface ParameterGroup {
  /** Changed by each step. */
  readonly values: Float32Array;
  /** Learning rate at the top of the schedule. */
  readonly rate: number;
  /** Default: 0. */
  readonly weightDecay?: number | undefined;
}

interface AdamWOptions {
  /** Default: 0.9. */
  readonly beta1?: number | undefined;
  /** Default: 0.999. */
  readonly beta2?: number | undefined;
  /** Default: 1e-8. */
  readonly epsilon?: number | undefined;
  /** Largest norm of the gradients of all groups together; a longer gradient is scaled down to it. Default: no limit. */
  readonly clip?: number | undefined;
  /** Steps until the rate is reached. Default: 0. */
  readonly warmup?: number | undefined;
  /** Steps in all, for `decay`; needed unless that is "none". */
  readonly steps?: number | undefined;
  /** How the rate falls after the warm-up. Default: "linear"; "none" where there are no `steps`. */
  readonly decay?: "none" | "linear" | "cosine" | undefined;
}

/** Every option with a value. */
type Filled<T> = { readonly [K in keyof T]-?: NonNullable<T[K]> };

/** Result of a step. */
interface StepReport {
  /** Norm of the gradient before clipping. */
  readonly norm: number;
  /** Fraction of the groups' rates that was applied, 0 to 1. */
  readonly schedule: number;
  /** False when the gradient was not finite. Then nothing has changed, not even the count of steps. */
  readonly applied: boolean;
}

/**
 * @example
 * const optimizer = new AdamW([{ values: parameters, rate: 0.02 }, { values: head, rate: 0.02 }], { steps: 100, clip: 1 });
 * const { norm } = optimizer.step([gradient, headGradient]);
 */
export class AdamW {
  readonly #groups: readonly (Filled<ParameterGroup> & { m: Float32Array; v: Float32Array })[];
  readonly #options: Filled<AdamWOptions>;
  #count = 0;

  /** @throws RangeError when an option is out of its range, naming it */
  constructor(groups: readonly ParameterGroup[], options: AdamWOptions = {}) {
    const { beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, clip = Infinity, warmup = 0, steps = Infinity } = options;
    const { decay = steps === Infinity ? "none" : "linear" } = options;
    this.#options = { beta1, beta2, epsilon, clip, warmup, steps, decay };
    const limits = { beta1: "share", beta2: "share", epsilon: "positive", warmup: "count", clip: "unlimited" } as const;
    checkNumbers("AdamW", this.#options, limits);
    checkChoice("decay", decay, ["none", "linear", "cosine"]);
    if (decay !== "none" && !(Number.isInteger(steps) && steps > warmup))
      throw new RangeError(`AdamW: steps: expected a whole number above \`warmup\`, got ${steps}`);
    this.#groups = groups.map(({ values, rate, weightDecay = 0 }) => {
      checkNumbers("AdamW", { rate, weightDecay }, { rate: "rate", weightDecay: "rate" });
      return { values, rate, weightDecay, m: new Float32Array(values.length), v: new Float32Array(values.length) };
    });
  }

  /** Steps taken. */
  get count(): number {
    return this.#count;
  }

  /**
   * @param gradients one for each group, in order; not changed
   * @throws RangeError when their number or lengths differ from the groups'
   */
  step(gradients: readonly Float32Array[]): StepReport {
    const expected = this.#groups.map(({ values }) => values.length);
    if (gradients.map(({ length }) => length).join() !== expected.join()) {
      const lengths = gradients.map(({ length }) => length).join(", ");
      throw new RangeError(`AdamW: gradients: expected the lengths ${expected.join(", ")}, got ${lengths}`);
    }
    let squares = 0;
    for (const gradient of gradients) for (const g of gradient) squares += g * g;
    const norm = Math.sqrt(squares);
    const schedule = this.#schedule(this.#count + 1);
    if (!Number.isFinite(norm)) return { norm, schedule, applied: false };
    this.#count++;
    const { beta1, beta2, epsilon, clip } = this.#options;
    const scale = norm > clip ? clip / norm : 1;
    const [unbias1, unbias2] = [1 - beta1 ** this.#count, 1 - beta2 ** this.#count];
    for (const [i, { values, rate, weightDecay, m, v }] of this.#groups.entries()) {
      const gradient = gradients[i]!;
      const now = rate * schedule;
      const [kept, by] = [1 - now * weightDecay, now / unbias1];
      for (let at = 0; at < values.length; at++) {
        const g = gradient[at]! * scale;
        const mean = beta1 * m[at]! + (1 - beta1) * g;
        const square = beta2 * v[at]! + (1 - beta2) * g * g;
        m[at] = mean;
        v[at] = square;
        values[at] = values[at]! * kept - (by * mean) / (Math.sqrt(square / unbias2) + epsilon);
      }
    }
    return { norm, schedule, applied: true };
  }

  /** @param t from 1 */
  #schedule(t: number): number {
    const { warmup, steps, decay } = this.#options;
    if (t <= warmup) return t / warmup;
    if (decay === "none") return 1;
    // The schedule reaches 0 one step after the last, so that the last step still moves something.
    const gone = Math.min(1, (t - 1 - warmup) / (steps - warmup));
    return decay === "linear" ? 1 - gone : (1 + Math.cos(Math.PI * gone)) / 2;
  }
}

/**
 * The trained numbers as one vector, and its optimizer.
 */
import { AdamW } from "./adamw.ts";
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
   * 0.002 where that is not given. Components: 0.001. Layers of a head in front of the one with the labels (`inner`): `head` divided by
   * the number of inputs of the layer. Numbers with a rate of 0 stay as they are.
   */
  readonly learningRates?:
    | {
        readonly terms?: number;
        readonly privateTerms?: number;
        readonly head?: number;
        readonly inner?: number;
        readonly components?: number;
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
  const {
    terms = 0.02,
    privateTerms = learningRates.terms ?? 0.002,
    head = 0.02,
    inner,
    components = 0.001,
  } = learningRates;
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
  const ofTerms = trained.parameters
    .filter(({ offset }) => offset < trained.ofTasks)
    .map(({ kind, offset, dims: [rows, columns] }) => ({
      of: ({ parameters }: State) => parameters.subarray(offset, offset + rows * columns),
      rate: kind.startsWith("alpha") ? terms : privateTerms,
      weightDecay,
    }));
  const groups = [
    ...ofTerms,
    { of: ({ parameters }: State) => parameters.subarray(trained.ofTasks), rate: components },
    ...ofHead,
    // Numbers that are not trained must not count in the norm that is clipped.
  ].filter(({ rate }) => rate !== 0);
  const optimizer = new AdamW(
    groups.map(({ of, ...group }) => ({ values: of(state), ...group })),
    { steps, clip, warmup, decay },
  );
  return { step: (gradients) => optimizer.step(groups.map(({ of }) => of(gradients))) };
}

/**
 * The numbers that are trained, in one vector, and how its parts are stepped.
 */
import { AdamW } from "./adamw.ts";
import { type HeadLayer, layersOf } from "./head.ts";
import type { Terms } from "./terms.ts";

/**
 * All numbers that are trained, and its parts: parameters of terms, weights [out, in] and biases [out] of the head's layers, one
 * behind the other.
 */
export interface State {
  readonly all: Float32Array<ArrayBuffer>;
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** A state with as many numbers in each part as another. @param all Default: zeros */
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

/** How AdamW moves what is trained (Loshchilov and Hutter, 2019). */
export interface OptimizerOptions {
  /**
   * Of terms and of the head's layer with the labels. Default: 0.02 each; of private terms, which a LoRA is made of: `terms`, or 0.002
   * where that is not given; of components: 0.001; of a head's layers in front of that with the labels (`inner`): `head` divided by how
   * many numbers enter the layer. What has a rate of 0 stays as it is.
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
  /** Largest norm of a gradient. Default: 1. */
  readonly clip?: number | undefined;
  /** Steps until the full rate is reached. Default: a tenth of all. */
  readonly warmup?: number | undefined;
  /** Of the rate, to 0 over all steps. Default: "linear". */
  readonly decay?: "linear" | "cosine" | "none" | undefined;
}

/**
 * @param trained what the parameters are
 * @param layers of the head that the state has
 */
export function optimizerOf(
  state: State,
  trained: Terms,
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
  // Adam moves each number by the rate, and what enters an inner layer moves with all of them: so the rate of a wide matrix goes with
  // 1 / inputs (Yang et al., "Tensor Programs V", 2022). With MiniLM's pooler (384) that beat the last layer alone on three tasks of
  // three; a tenth of the head's rate was best on one and overfitted on two.
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
      rate: kind.startsWith("private") ? privateTerms : terms,
      weightDecay,
    }));
  const groups = [
    ...ofTerms,
    { of: ({ parameters }: State) => parameters.subarray(trained.ofTasks), rate: components },
    ...ofHead,
    // What is not trained has no say in the clipping.
  ].filter(({ rate }) => rate !== 0);
  const optimizer = new AdamW(
    groups.map(({ of, ...group }) => ({ values: of(state), ...group })),
    { steps, clip, warmup, decay },
  );
  return { step: (gradients) => optimizer.step(groups.map(({ of }) => of(gradients))) };
}

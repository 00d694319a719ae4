/** The trained numbers as one vector, and its optimizer. */

import type { TrainedTerms } from "./trained-terms.ts";

/**
 * All trained numbers, and views of its parts: parameters of terms, then weights [out, in], then biases [out] of the
 * head's layers.
 */
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
  const first = parameters.length;
  const second = first + weight.length;
  return { all, parameters: all.subarray(0, first), weight: all.subarray(first, second), bias: all.subarray(second) };
}

export function copyOf(state: State): State {
  return stateLike(state, state.all.slice());
}

/** Options of Adam. */
export interface OptimizerOptions {
  /**
   * Learning rates. Default for terms, and for the head's layer with the labels: 0.02. Private terms, which make up a
   * LoRA: `terms`, or 0.002 where that is not given. Layers of a head in front of the one with the labels (`inner`):
   * `head` divided by the number of inputs of the layer. Numbers with a rate of 0 stay as they are.
   */
  readonly learningRates?:
    | {
        readonly terms?: number;
        readonly privateTerms?: number;
        readonly head?: number;
        readonly inner?: number;
      }
    | undefined;
  /** Largest norm of the gradient. Default: 1. */
  readonly clip?: number | undefined;
  /** Steps until the full rate is reached. Default: a tenth of all steps. */
  readonly warmup?: number | undefined;
  /** "linear": the rate falls to 0 over all steps. Default: "linear". */
  readonly decay?: "linear" | "none" | undefined;
}

/** Makes an optimizer of a state. @param layers of the head in the state */
export function optimizerOf(
  state: State,
  trained: TrainedTerms,
  layers: readonly HeadLayer[],
  steps: number,
  { learningRates = {}, clip = 1, warmup = Math.floor(steps / 10), decay }: OptimizerOptions,
): { step(gradients: State): StepReport } {
  const { terms = 0.02, privateTerms = learningRates.terms ?? 0.002, head = 0.02, inner } = learningRates;
  // Adam moves each number by the rate, and the inputs of an inner layer add up: the rate of a wide matrix must fall
  // with 1 / inputs (Yang et al., "Tensor Programs V", 2022). With MiniLM's pooler (384) that beat training the last
  // layer alone on three tasks of three; a tenth of the head's rate was best on one and overfitted on two.
  const ofHead = layers.flatMap(({ last, in: inputs }, i) => {
    const rate = last ? head : (inner ?? head / inputs);
    const parts = ["weight", "bias"] as const;
    return parts.map((part) => ({ of: (state: State) => layersOf(layers, state)[i]![part], rate }));
  });
  const ofTerms = trained.parameters.map(({ kind, offset, dims: [rows, columns] }) => ({
    of: ({ parameters }: State) => parameters.subarray(offset, offset + rows * columns),
    rate: kind.startsWith("alpha") ? terms : privateTerms,
  }));
  // Numbers that are not trained must not count in the norm that is clipped.
  const groups = [...ofTerms, ...ofHead].filter(({ rate }) => rate !== 0);
  const parts = groups.map(({ of, ...group }) => ({ values: of(state), ...group }));
  const optimizer = new Adam(parts, { steps, clip, warmup, decay });
  return { step: (gradients) => optimizer.step(groups.map(({ of }) => of(gradients))) };
}

// Adam (Kingma and Ba, 2015) over plain vectors, with a schedule of the learning rate and clipping of the gradient. It
// knows no graphs. The update in step t = 1, 2, … takes the clipped gradient g and the rate r = rate · schedule(t): m ←
// β₁·m + (1 − β₁)·g      v ← β₂·v + (1 − β₂)·g²
// p ← p − r · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
// The schedule rises from 1/warmup to 1 over `warmup` steps, then falls to 0 at `steps`.

const BETA1 = 0.9;
const BETA2 = 0.999;
const EPSILON = 1e-8;

interface ParameterGroup {
  readonly values: Float32Array;
  /** Learning rate at the top of the schedule. */
  readonly rate: number;
}

interface StepReport {
  readonly norm: number;
  /** False when the gradient was not finite. Then nothing has changed, not even the count of steps. */
  readonly applied: boolean;
}

interface Schedule extends Pick<OptimizerOptions, "decay"> {
  readonly steps: number;
  readonly clip: number;
  readonly warmup: number;
}

export class Adam {
  readonly #groups: readonly (ParameterGroup & { m: Float32Array; v: Float32Array })[];
  readonly #options: Schedule;
  #count = 0;

  /** @throws RangeError where the warm-up takes all steps */
  constructor(groups: readonly ParameterGroup[], options: Schedule) {
    if (options.decay !== "none" && options.steps <= options.warmup)
      throw new RangeError(`fit: steps: expected a whole number above \`warmup\`, got ${options.steps}`);
    this.#options = options;
    this.#groups = groups.map((group) => ({
      ...group,
      m: new Float32Array(group.values.length),
      v: new Float32Array(group.values.length),
    }));
  }

  /** @param gradients one for each group, in order; not changed */
  step(gradients: readonly Float32Array[]): StepReport {
    let squares = 0;
    for (const gradient of gradients) for (const g of gradient) squares += g * g;
    const norm = Math.sqrt(squares);
    if (!Number.isFinite(norm)) return { norm, applied: false };
    this.#count++;
    const { clip } = this.#options;
    const scale = norm > clip ? clip / norm : 1;
    const unbias1 = 1 - BETA1 ** this.#count;
    const unbias2 = 1 - BETA2 ** this.#count;
    for (const [i, { values, rate, m, v }] of this.#groups.entries()) {
      const gradient = gradients[i]!;
      const now = rate * this.#schedule();
      const by = now / unbias1;
      for (let at = 0; at < values.length; at++) {
        const g = gradient[at]! * scale;
        const mean = BETA1 * m[at]! + (1 - BETA1) * g;
        const square = BETA2 * v[at]! + (1 - BETA2) * g * g;
        m[at] = mean;
        v[at] = square;
        values[at]! -= (by * mean) / (Math.sqrt(square / unbias2) + EPSILON);
      }
    }
    return { norm, applied: true };
  }

  #schedule(): number {
    const t = this.#count;
    const { steps, warmup, decay = "linear" } = this.#options;
    if (t <= warmup) return t / warmup;
    if (decay === "none") return 1;
    // The schedule reaches 0 one step after the last, so that the last step still moves something.
    return Math.max(0, 1 - (t - 1 - warmup) / (steps - warmup));
  }
}

// The head of a task: the layers that are trained whole. Most heads are one layer with a row of weights for each label.
// In heads of several (RoBERTa's `classifier.dense` and `classifier.out_proj`, DistilBERT's `pre_classifier` and
// `classifier`) only the last layer has such rows; the layers in front of it keep the model's shape.

/** One layer of a head, with the names of its inputs of the graph. */
export interface HeadLayer {
  readonly module: string;
  readonly in: number;
  /** Rows of the weight; in the last layer the labels. */
  readonly out: number;
  /** Names of the weight [1, in, out], and of the bias [1, 1, out], where there is one. */
  readonly weight: string;
  readonly bias: string | undefined;
  /** True for the layer whose rows are the labels: its outputs are the logits. */
  readonly last: boolean;
  /** The model's own weight [out, in] and bias [out], where they can be a start. */
  readonly own: LayerNumbers | undefined;
}

/**
 * Most features, the inputs of the last layer, that are asked for. Wide heads have thousands, and each step would carry
 * their square.
 */
const MOST_FEATURES = 1024;

/** Number of the last layer's inputs that can follow the logits. */
export function featuresOf(head: readonly HeadLayer[]): number {
  return Math.min(head.find(({ last }) => last)?.in ?? 0, MOST_FEATURES);
}

/** Weight [out, in] and bias [out] of one layer. A layer without a bias has one here that is never read. */
export interface LayerNumbers {
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** Zeros for the weights and the biases of all layers. */
export function zerosOf(head: readonly HeadLayer[]): LayerNumbers {
  const sum = (of: (layer: HeadLayer) => number): number => head.reduce((total, layer) => total + of(layer), 0);
  const weights = sum(({ in: inputs, out }) => inputs * out);
  return { weight: new Float32Array(weights), bias: new Float32Array(sum(({ out }) => out)) };
}

/** Splits the concatenated numbers of all layers into views, one for each layer. */
export function layersOf(
  head: readonly HeadLayer[],
  { weight, bias }: LayerNumbers,
): ({ readonly layer: HeadLayer } & LayerNumbers)[] {
  let w = 0;
  let b = 0;
  return head.map((layer) => ({
    layer,
    weight: weight.subarray(w, (w += layer.in * layer.out)),
    bias: bias.subarray(b, (b += layer.out)),
  }));
}

/** Replaces numbers layer by layer. @param made the new numbers of a layer; those that it leaves out stay */
export function mapLayers(
  head: readonly HeadLayer[],
  numbers: LayerNumbers,
  made: (
    layer: HeadLayer,
    own: LayerNumbers,
    index: number,
  ) => { readonly weight?: Float32Array; readonly bias?: Float32Array },
): LayerNumbers {
  const all = { weight: numbers.weight.slice(), bias: numbers.bias.slice() };
  for (const [i, { layer, ...own }] of layersOf(head, all).entries()) {
    const { weight, bias } = made(layer, own, i);
    if (weight) own.weight.set(weight);
    if (bias) own.bias.set(bias);
  }
  return all;
}

/**
 * The head of a task: the layers that are trained whole. Most heads are one layer with a row of weights for each label. In heads of
 * several (RoBERTa's `classifier.dense` and `classifier.out_proj`, DistilBERT's `pre_classifier` and `classifier`) only the last layer
 * has such rows; the layers in front of it keep the model's shape.
 */

/** One layer of a head. */
export interface HeadLayer {
  readonly module: string;
  readonly in: number;
  /** Rows of the weight; in the last layer the labels. */
  readonly out: number;
  readonly bias: boolean;
  /** Whether its rows are the labels, so that its outputs are the logits. */
  readonly last: boolean;
  /** The model's own weight [out, in] and bias [out], where they can be a start. */
  readonly own: LayerNumbers | undefined;
}

/** Most features, the inputs of the last layer, that are asked for. Wide heads have thousands, and each step would carry their square. */
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
  let [w, b] = [0, 0];
  return head.map((layer) => {
    const [weights, biases] = [layer.in * layer.out, layer.out];
    const of = { weight: weight.subarray(w, w + weights), bias: bias.subarray(b, b + biases) };
    [w, b] = [w + weights, b + biases];
    return { layer, ...of };
  });
}

/** Replaces numbers layer by layer. @param made the new ones of a layer; what it leaves out stays */
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

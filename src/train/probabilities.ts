/**
 * Probabilities of labels: from logits, sharpened, compared.
 */

/** Probabilities at one position: of all classes in order, or of the likeliest ones, given in `classes`. */
export interface Distribution {
  readonly probabilities: ArrayLike<number>;
  readonly classes?: ArrayLike<number> | undefined;
}

/** log Σ exp(logits). */
export function logSumExp(logits: Float32Array): number {
  let top = -Infinity;
  for (let i = 0; i < logits.length; i++) top = Math.max(top, logits[i]!);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - top);
  return top + Math.log(sum);
}

export function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

/** Index of the largest value; the first one of equals. */
export function largest(values: ArrayLike<number>): number {
  let at = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[at]!) at = i;
  return at;
}

/** The probabilities of the same logits divided by a temperature. */
export function tempered(probabilities: ArrayLike<number>, temperature: number): Float32Array {
  const values = Array.from(probabilities);
  const top = Math.max(...values);
  const powers = values.map((p) => (p / top) ** (1 / temperature));
  const total = powers.reduce((a, b) => a + b, 0);
  return Float32Array.from(powers, (value) => value / total);
}

const SURE = 0.9;
const COLDEST = 0.05;

/** The temperature at which the mean of the largest probabilities is 0.9; from 0.05 to 1. */
export function sureTemperature(answers: readonly Float32Array[]): number {
  const sure = (temperature: number): boolean =>
    answers.reduce((sum, one) => sum + Math.max(...tempered(one, temperature)), 0) >= SURE * answers.length;
  if (sure(1)) return 1;
  let [low, high] = [COLDEST, 1];
  // Halved on a scale of logarithms, to a hundredth of a percent.
  for (let i = 0; i < 15; i++) {
    const middle = Math.sqrt(low * high);
    if (sure(middle)) low = middle;
    else high = middle;
  }
  return low;
}

/** −Σ p · log softmax(logits), in nats. */
export function crossEntropy({ probabilities, classes }: Distribution, logits: Float32Array): number {
  const total = logSumExp(logits);
  let sum = 0;
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    if (p > 0) sum += p * (total - logits[classes ? classes[i]! : i]!);
  }
  return sum;
}

/** KL(distribution ‖ softmax(logits)), in nats. Classes that the distribution leaves out count as one: a lower bound of the whole. */
export function divergence({ probabilities, classes }: Distribution, logits: Float32Array): number {
  const total = logSumExp(logits);
  let [sum, restP, restQ] = [0, 1, 1];
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    const log = logits[classes ? classes[i]! : i]! - total;
    if (p > 0) sum += p * (Math.log(p) - log);
    restP -= p;
    restQ -= Math.exp(log);
  }
  if (classes && restP > 1e-6) sum += restP * Math.log(restP / Math.max(restQ, 1e-12));
  return sum;
}

/** The largest probability less the second. */
function marginOf(probabilities: ArrayLike<number>): number {
  let [first, second] = [0, 0];
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    if (p > first) [first, second] = [p, first];
    else if (p > second) second = p;
  }
  return first - second;
}

/** Class with the largest probability. */
export function likeliest({ probabilities, classes }: Distribution): number {
  let best = 0;
  for (let i = 1; i < probabilities.length; i++) if (probabilities[i]! > probabilities[best]!) best = i;
  return classes ? classes[best]! : best;
}

/** Draws one class with its probability. */
export function drawnFrom({ probabilities, classes }: Distribution, random: () => number): Distribution {
  const total = Array.from(probabilities).reduce((sum, p) => sum + p, 0);
  let [left, at] = [random() * total, 0];
  while (at < probabilities.length - 1 && (left -= probabilities[at]!) > 0) at++;
  if (classes) return { probabilities: [1], classes: [classes[at]!] };
  return { probabilities: Array.from(probabilities, (_, i) => Number(i === at)) };
}

/**
 * How far answers are from those wanted, over all that is added: the mean KL(distribution ‖ softmax(logits)) in nats, and the share with
 * the same likeliest class, each counted by how much likelier that is than the second. It keeps no logits, which are too large over a
 * vocabulary.
 */
export class MeanDivergence {
  #sum = 0;
  #count = 0;
  #same = 0;
  #sure = 0;

  add(wanted: readonly Distribution[], logits: readonly Float32Array[]): void {
    for (const [i, one] of wanted.entries()) {
      this.#sum += divergence(one, logits[i]!);
      const margin = marginOf(one.probabilities);
      this.#sure += margin;
      if (likeliest(one) === largest(logits[i]!)) this.#same += margin;
    }
    this.#count += wanted.length;
  }

  get agreement(): number {
    return this.#sure > 0 ? this.#same / this.#sure : 1;
  }

  get mean(): number {
    // Rounding can make the mean of equal probabilities slightly negative.
    return Math.max(0, this.#sum / this.#count);
  }
}

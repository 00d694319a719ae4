/**
 * Probabilities of labels: from logits, made sharper, compared.
 */

export function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

/** Rows of values [rows, width], as views. */
export function rowsOf(values: Float32Array, width: number): Float32Array[] {
  return Array.from({ length: values.length / width }, (_, row) => values.subarray(row * width, (row + 1) * width));
}

/** Where the largest value is. */
export function largest(values: ArrayLike<number>): number {
  const all = Array.from(values);
  return all.indexOf(Math.max(...all));
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

/** The smallest normal f32, in place of probabilities that are too small for one. */
const TINY = 2 ** -126;

/** Mean KL(targets ‖ answers), in nats. */
export function meanDivergence(targets: readonly ArrayLike<number>[], answers: readonly ArrayLike<number>[]): number {
  let sum = 0;
  for (const [i, target] of targets.entries()) {
    for (const [c, p] of Array.from(target).entries())
      if (p > 0) sum += p * Math.log(p / Math.max(answers[i]![c]!, TINY));
  }
  // Of rounded probabilities that are alike it can be a little less than 0.
  return Math.max(0, sum / targets.length);
}

/**
 * Steps of integers that are trained with the coefficients, a step for each row (Esser et al., "Learned Step Size Quantization", 2020).
 */

/**
 * @typedef {import("./students.js").Student} Student
 * @typedef {import("../../../dist/src/train/state.js").State} State
 */

/** Steps between one power of 2 and the next, as in files. */
const STEPS_OF_POWER = 4;
/** Decay of Adam's moments. */
const [MEAN, SQUARE] = [0.9, 0.99];

/** A student with steps of its own. @param {Student} student @returns {Student} */
export function withOwnSteps(student) {
  const { stored } = student;
  return { ...student, stored: { ...stored, parameters: stored.parameters.slice() } };
}

/**
 * Moves the steps of a student's rows where the loss falls. Finer steps always lessen it, for more bytes: the part of the movement that
 * would change the total bits of the integers, by log2(1 + |integer|), is removed.
 * @param {Student} student whose steps are changed
 * @param {{ rounds: number, rate: number }} how rate: of a step's logarithm
 */
export function stepMover({ terms, stored }, { rounds, rate }) {
  const steps = stored.parameters;
  const rows = terms.parameters
    .filter(({ kind }) => !kind.startsWith("components"))
    .flatMap(({ offset, dims: [count, width] }) => Array.from({ length: count }, (_, i) => offset + i * width))
    .filter((at) => steps[at] > 0);
  const widths = new Map(
    terms.parameters.flatMap(({ offset, dims: [count, width] }) =>
      Array.from({ length: count }, (_, i) => [offset + i * width, width]),
    ),
  );
  const logs = rows.map((at) => Math.log2(steps[at]));
  const [m, v] = [rows.map(() => 0), rows.map(() => 0)];
  return (/** @type {State} */ gradients, /** @type {State} */ state, /** @type {number} */ round) => {
    const bits = rows.map(() => 0);
    const moves = rows.map((at, i) => {
      let slope = 0;
      for (let n = at; n < at + /** @type {number} */ (widths.get(at)); n++) {
        const integer = state.parameters[n] / steps[at];
        slope += gradients.parameters[n] * steps[at] * (Math.round(integer) - integer);
        bits[i] += Math.abs(integer) / (1 + Math.abs(integer));
      }
      m[i] += (1 - MEAN) * (slope - m[i]);
      v[i] += (1 - SQUARE) * (slope * slope - v[i]);
      return m[i] / (1 - MEAN ** round) / (Math.sqrt(v[i] / (1 - SQUARE ** round)) + Number.EPSILON);
    });
    const dot = (/** @type {number[]} */ a) => a.reduce((sum, value, i) => sum + value * bits[i], 0);
    const along = dot(moves) / dot(bits);
    const now = rate * (1 - (round - 1) / rounds);
    for (const [i, at] of rows.entries()) {
      logs[i] -= now * (moves[i] - along * bits[i]);
      const power = 2 ** Math.floor(logs[i]);
      const step = (Math.round((2 ** logs[i] / power) * STEPS_OF_POWER) / STEPS_OF_POWER) * power;
      steps.fill(step, at, at + /** @type {number} */ (widths.get(at)));
    }
  };
}

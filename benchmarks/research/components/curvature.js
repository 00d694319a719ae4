/**
 * Dependence of answers on each direction of a module's rows, and its uses: coefficients that change the answers least, and integers of
 * components whose rounding errors cancel where answers depend on them.
 *
 * With labels drawn from a task's own answers, gradients g of its rows have the second moments E[gᵀ·g] of the curvature of KL
 * (Fisher's information). One matrix for each side of a module, of all tasks and all their rows (as in K-FAC).
 */
import { alignSigns, balance, leadingRows } from "../../../dist/src/extract/gauge.js";
import {
  backwardSolve,
  cholesky,
  forwardSolve,
  gram,
  multiply,
  multiplyTransposed,
} from "../../../dist/src/extract/linalg.js";
import { toPairs } from "../../../dist/src/extract/project.js";
import { toInteger } from "../../../dist/src/tensor/encode.js";
import { uniform } from "../../../dist/src/tensor/random.js";
import { toBatches } from "../../../dist/src/train/examples.js";
import { answers } from "../../../dist/src/train/objective.js";
import { softmax } from "../../../dist/src/train/probabilities.js";
import { numbersOf, weightsOf } from "./students.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("./students.js").Student} Student
 * @typedef {import("./students.js").Row} Row
 * @typedef {"A" | "B"} Side
 * @typedef {Map<string, Float64Array>} Curvatures by "module side": [d, d] of mean diagonal 1
 */

/**
 * @param {readonly Student[]} students at their starts
 * @param {Float32Array<ArrayBuffer>} components
 * @param {{ batches: number, batch: number }} texts of each task
 * @returns {Promise<Curvatures>}
 */
export async function curvatures(students, components, { batches, batch }) {
  /** @type {Curvatures} */
  const sums = new Map();
  for (const student of students) {
    const numbers = numbersOf(student, student.start, components);
    const weights = weightsOf(student, numbers);
    for await (const gradients of drawn(student, weights, batches, batch)) {
      for (const [module, { rank, A, Bt }] of gradients.terms)
        for (const [side, rows] of /** @type {const} */ ([
          ["A", A],
          ["B", Bt],
        ])) {
          const alpha = student.terms.part(numbers.parameters, module, `alpha${side}`);
          const key = `${module} ${side}`;
          const d = rows.length / rank;
          const sum = sums.get(key) ?? new Float64Array(d * d);
          sums.set(key, addSquares(sum, rows, /** @type {any} */ (alpha), rank));
        }
    }
  }
  for (const sum of sums.values()) {
    const d = Math.sqrt(sum.length);
    let trace = 0;
    for (let i = 0; i < d; i++) trace += sum[i * d + i];
    for (let i = 0; i < sum.length; i++) sum[i] *= d / trace;
  }
  return sums;
}

/**
 * Gradients of batches whose labels are drawn from the task's answers.
 * @param {Student} student @param {ReturnType<typeof weightsOf>} weights @param {number} count @param {number} batch
 */
async function* drawn({ setup, model, supervision, lengths, trainRows }, weights, count, batch) {
  const random = uniform(7);
  const all = toBatches(trainRows, batch, lengths, random);
  /** @type {Map<Row, Float32Array>} */
  const said = new Map();
  for (let at = 0; at < count; at++) {
    const some = all[at % all.length].filter((row) => !said.has(row));
    for await (const { row, logits } of answers(setup, some, weights)) said.set(row, softmax(logits[0]));
    const rows = all[at % all.length].map((row) => {
      const probabilities = /** @type {Float32Array} */ (said.get(row));
      let [left, label] = [random(), 0];
      while (label < probabilities.length - 1 && (left -= probabilities[label]) > 0) label++;
      return { ...row, label, target: probabilities.map((_, i) => Number(i === label)) };
    });
    for (const { rows: run, targets } of supervision.microBatches(rows, 0))
      yield (await model.step(await supervision.feeds(run), weights, targets)).gradients;
  }
}

/**
 * sum += Σ rowᵀ·row; components move more with rows of large coefficients.
 * @param {Float64Array} sum [d, d] @param {Float32Array} rows [rank, d] @param {Float32Array} alpha [rank, K] @param {number} rank
 */
function addSquares(sum, rows, alpha, rank) {
  const [d, K] = [rows.length / rank, alpha.length / rank];
  for (let r = 0; r < rank; r++) {
    const weight = alpha.subarray(r * K, (r + 1) * K).reduce((all, value) => all + value * value, 0);
    const row = rows.subarray(r * d, (r + 1) * d);
    for (let i = 0; i < d; i++) {
      const by = weight * row[i];
      for (let j = 0; j < d; j++) sum[i * d + j] += by * row[j];
    }
  }
  return sum;
}

/**
 * Adds a share of the identity: sample texts never cover all that a model will see. @param {Float64Array} curvature @param {number}
 * damping
 */
function damped(curvature, damping) {
  const d = Math.sqrt(curvature.length);
  return curvature.map((value, i) => value + (i % (d + 1) === 0 ? damping : 0));
}

/**
 * Target rows of coefficients, by adapter: balanced, the strongest, as packs have them.
 * @param {readonly Adapter[]} adapters all that have the module @param {string} name @param {number} rank
 * @returns {Promise<Record<Side, Float64Array>[]>}
 */
export async function rowsOf(adapters, name, rank) {
  const members = await Promise.all(
    adapters.map(async ({ id, modules }) => ({ id, .../** @type {any} */ (await modules.get(name)?.read()) })),
  );
  const { out, in: inputs } = /** @type {any} */ (adapters[0].modules.get(name));
  const kept = toPairs(members, out, inputs).map((pair) => leadingRows(balance(pair, out, inputs), rank));
  alignSigns(kept, out, inputs);
  return kept.map(({ A, Bt }) => ({ A, B: Bt }));
}

/**
 * Coefficients [rows, K] of the rows, with errors weighted by the answers' dependence on them.
 * @param {Float64Array} rows [_, d] @param {Float32Array} components [K (and the mean), d] @param {number} K
 * @param {Float64Array} curvature @param {number} damping
 */
export function coefficientsOf(rows, components, K, curvature, damping) {
  const d = Math.sqrt(curvature.length);
  const count = rows.length / d;
  const metric = cholesky(damped(curvature, damping), d);
  const mean = components.subarray(K * d, (K + 1) * d);
  const x = multiply(
    rows.map((value, i) => value - (mean[i % d] ?? 0)),
    metric,
    count,
    d,
    d,
  );
  const E = multiply(Float64Array.from(components.subarray(0, K * d)), metric, K, d, d);
  const factor = cholesky(gram(E, K, d), K);
  const alpha = multiplyTransposed(x, E, count, K, d);
  forwardSolve(factor, K, alpha, count);
  backwardSolve(factor, K, K, alpha, count);
  return alpha;
}

/**
 * Rounds rows to multiples of their steps; later numbers compensate for the error of earlier ones, in order of the answers' dependence on
 * them (E. Frantar and others, "GPTQ", 2022).
 * @param {Float32Array} values [rows, d] @param {Float32Array} steps of each number @param {number} largest
 * @param {Float64Array} curvature @param {number} damping
 */
export function withFeedback(values, steps, largest, curvature, damping) {
  const d = Math.sqrt(curvature.length);
  const order = Array.from({ length: d }, (_, i) => i).sort((a, b) => curvature[b * d + b] - curvature[a * d + a]);
  const whole = damped(curvature, damping);
  // Factor of the inverse, in the order in which numbers are rounded: its columns tell how later numbers make up for earlier ones.
  const factor = cholesky(
    inverse(
      Float64Array.from(whole, (_, i) => whole[order[Math.floor(i / d)] * d + order[i % d]]),
      d,
    ),
    d,
  );
  const made = new Float32Array(values.length);
  for (let at = 0; at < values.length; at += d) {
    if (!(steps[at] > 0)) continue;
    const left = order.map((column) => values[at + column] / steps[at]);
    for (let j = 0; j < d; j++) {
      const integer = toInteger(left[j], largest);
      made[at + order[j]] = integer * steps[at];
      const lost = (left[j] - integer) / factor[j * d + j];
      for (let k = j + 1; k < d; k++) left[k] -= lost * factor[k * d + j];
    }
  }
  return made;
}

/** @param {Float64Array} matrix symmetric, positive @param {number} d */
function inverse(matrix, d) {
  const made = new Float64Array(d * d).map((_, i) => Number(i % (d + 1) === 0));
  const factor = cholesky(matrix, d);
  forwardSolve(factor, d, made, d);
  backwardSolve(factor, d, d, made, d);
  return made;
}

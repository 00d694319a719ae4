/** Spread over seeds, right answers, and the paired bootstrap. Plain numbers in and out. */
import { mean, sampleStandardDeviation } from "simple-statistics";
import { uniform } from "../../../dist/src/tensor/random.js";

/** Standard deviation of a sample; 0 of a single value. @param {number[]} values */
export const deviation = (values) => (values.length > 1 ? sampleStandardDeviation(values) : 0);

/**
 * Whether each answer is right.
 * @param {string} answers a digit each
 * @param {readonly (readonly [string, number])[]} rows
 */
export const rightOf = (answers, rows) => rows.map(([, label], i) => Number(Number(answers[i]) === label));

/**
 * Interval of the mean of differences: rows are resampled with replacement within each group, and the mean over all rows is taken each
 * time.
 * @param {readonly (readonly number[])[]} groups differences of rows, by group
 * @param {{ resamples?: number, seed?: number, level?: number }} [options] level: share of resamples inside the interval
 * @returns {{ centre: number, low: number, high: number }} NaN without rows
 */
export function pairedBootstrap(groups, { resamples = 10_000, seed = 1, level = 0.95 } = {}) {
  const random = uniform(seed);
  const count = groups.reduce((sum, { length }) => sum + length, 0);
  const means = new Float64Array(resamples);
  for (let i = 0; i < resamples; i++) {
    let sum = 0;
    for (const group of groups)
      for (let n = 0; n < group.length; n++) sum += group[Math.floor(random() * group.length)];
    means[i] = sum / count;
  }
  means.sort();
  const at = (/** @type {number} */ share) => means[Math.round(share * (resamples - 1))];
  return { centre: count > 0 ? mean(groups.flat()) : NaN, low: at((1 - level) / 2), high: at((1 + level) / 2) };
}

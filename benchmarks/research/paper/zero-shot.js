/**
 * Tasks without training (the paper's zero-shot): random coefficients with the spread of those of a pack's tasks. They bring no head.
 */

import { uniform } from "../../../dist/src/tensor/random.js";
import { learnedTask, taskFile } from "../../../dist/src/train/stored-task.js";
import { sharedRows, TrainedTerms } from "../../../dist/src/train/trained-terms.js";
import { fillStart } from "../../../dist/src/train/trainer.js";

/**
 * Makes the file of such a task.
 * @param {import("eigenlora").Pack} opened
 * @param {{ seed: number, rank: number }} options rank: rows of coefficients; flat components have a rank of their own
 */
export async function zeroShotTask(opened, { seed, rank }) {
  const pack = /** @type {any} */ (opened);
  const bases = await pack.bases();
  const terms = new TrainedTerms(
    opened.modules.flatMap((module) => {
      const shared = sharedRows(module, bases.bytes, rank);
      return shared ? [{ name: module.name, in: module.in, out: module.out, privateRank: 0, shared }] : [];
    }),
  );
  bases.close();
  const parameters = new Float32Array(terms.size);
  await fillStart(pack, terms, "random", parameters, uniform(seed));
  const none = new Float32Array(0);
  const numbers = { parameters, weight: none, bias: none };
  return taskFile(pack, learnedTask(pack, terms, numbers, [], { id: "zero-shot", dtype: { coefficients: "f32" } }));
}

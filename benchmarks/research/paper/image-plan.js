/** Methods that learn the icons, and missing cells. Rates are chosen on validation rows, so later cells follow from results. */
import { PEERS } from "./cells.js";
import { cellOf, chosenRates, SEEDS, tuningCells } from "./plan.js";

/**
 * @typedef {import("./cells.js").Cell} Cell
 * @typedef {import("./plan.js").MethodPlan} MethodPlan
 */

/** Tasks on whose validation rows rates are chosen, for all. */
export const TUNED = ["icons-0", "icons-1"];

const HEAD_RATES = [0.01, 0.03].map((head) => ({ terms: 0, head }));
/** @param {number[]} terms */
const beside = (...terms) => terms.map((one) => ({ terms: one, head: 0.02 }));

const OURS = beside(0.005, 0.01, 0.02, 0.04);

/** @param {Omit<MethodPlan, "domains">} plan @returns {MethodPlan} */
const planOf = (plan) => ({ ...plan, domains: ["icons"], tuned: TUNED });
/** @param {number} k components of each side and module; nine donors of rank 8 have 72 @param {Partial<MethodPlan>} choice */
const ours = (k, choice) => planOf({ name: `ours, K ${k}`, method: "coefficients", k, ...choice });

const head = planOf({ name: "head alone", method: "head", rates: HEAD_RATES });
const lora = planOf({ name: "LoRA r 8", method: "lora", rates: beside(0.003, 0.006, 0.012) });
const [few, many] = [ours(2, { rates: OURS }), ours(16, { rates: OURS })];

/** @type {readonly MethodPlan[]} */
export const IMAGE_METHODS = [
  head,
  planOf({ name: "mean adapter", method: "mean adapter", like: head }),
  planOf({ name: "zero-shot, K 16", method: "zero-shot", k: 16, like: head }),
  lora,
  planOf({ name: "LoRA r 8 by PEFT", method: "LoRA", like: lora }),
  planOf({ name: "LoRA r 1", method: "lora r 1", rates: beside(0.01, 0.03) }),
  planOf({ name: "VeRA r 256", method: "VeRA", rates: beside(0.03, 0.1) }),
  planOf({ name: "ours flat, K 2", method: "flat", k: 2, rates: beside(0.03, 0.1) }),
  few,
  ours(4, { like: few }),
  ours(8, { like: many }),
  many,
];

/** @param {string} name */
export const imageMethod = (name) => /** @type {MethodPlan} */ (IMAGE_METHODS.find((one) => one.name === name));

/**
 * Rates first, then one seed after another.
 * @param {import("./cells.js").Results} results
 * @param {readonly string[]} tasks
 * @param {{ peers: boolean }} options peers: whether Python can run those
 * @returns {Cell[]} the cells of the first stage that is not complete; none when all is done
 */
export function nextImageCells(results, tasks, { peers }) {
  const plans = IMAGE_METHODS.filter(({ method }) => peers || !PEERS.has(method));
  const tune = () => plans.flatMap((plan) => (plan.rates ?? []).flatMap((rates) => tuningCells(plan, rates)));
  const measure = (/** @type {number} */ seed) => () =>
    tasks.flatMap((task) =>
      plans.map((plan) =>
        cellOf(plan, task, /** @type {import("./cells.js").Rates} */ (chosenRates(results, plan)), seed),
      ),
    );
  for (const stage of [tune, ...SEEDS.map(measure)]) {
    const missing = stage().filter((one) => !results.get(one));
    if (missing.length > 0) return missing;
  }
  return [];
}

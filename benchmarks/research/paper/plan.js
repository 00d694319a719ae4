/** Methods to compare, and the cells to measure in order. Rates are chosen on validation, so later cells follow from results. */
import { mean } from "simple-statistics";
import { PEERS } from "./cells.js";

/**
 * @typedef {import("./cells.js").Cell} Cell
 * @typedef {import("./cells.js").Method} Method
 * @typedef {import("./cells.js").Rates} Rates
 * @typedef {import("./cells.js").Results} Results
 * @typedef {import("./data.js").Experiment} Experiment
 * @typedef {import("./data.js").Domain} Domain
 * @typedef {import("./data.js").TextDomain} TextDomain
 */

/**
 * @typedef {object} MethodPlan
 * @property {string} name
 * @property {Method} method
 * @property {number} [k] components
 * @property {boolean} [within] only tasks of the same domain are donors
 * @property {readonly Rates[]} [rates] to choose from
 * @property {string | MethodPlan} [like] the method whose rate it takes, instead
 * @property {Domain[]} domains
 * @property {readonly string[]} [tuned] tasks on whose validation rows rates are chosen. Default: `TUNED`
 */

export const SEEDS = [1, 2, 3];

/** Components of the claim: 2 · 15 · 8 coefficients on each of 12 modules are 25.6 times fewer than a LoRA of rank 8 has. */
export const K = 15;

/** Tasks on whose validation rows rates are chosen, for all. */
export const TUNED = ["sections-0", "debtags-role"];

const HEAD_RATES = [0.03, 0.1].map((head) => ({ terms: 0, head }));
const OURS = [0.01, 0.02].map((terms) => ({ terms, head: 0.03 }));
const LORA = [0.002, 0.003, 0.005].map((terms) => ({ terms, head: 0.02 }));
/** @type {TextDomain[]} */
const ALL = ["sections", "debtags", "hub"];

/** @type {readonly MethodPlan[]} */
export const METHODS = [
  { name: "head alone", method: "head", rates: HEAD_RATES, domains: ALL },
  { name: "mean adapter", method: "mean adapter", rates: HEAD_RATES, domains: ALL },
  { name: `zero-shot, K ${K}`, method: "zero-shot", k: K, rates: HEAD_RATES, domains: ALL },
  { name: `zero-shot flat, K ${K}`, method: "zero-shot flat", k: K, rates: HEAD_RATES, domains: ALL },
  { name: "LoRA r 8", method: "lora", rates: LORA, domains: ALL },
  { name: `LoRA r 8, init K ${K}`, method: "lora init", k: K, like: "LoRA r 8", domains: ["debtags"] },
  { name: "LoRA r 1", method: "lora r 1", like: "LoRA r 8", domains: ALL },
  { name: "ours, K 2", method: "coefficients", k: 2, like: "ours", domains: ["sections"] },
  { name: "ours, K 8", method: "coefficients", k: 8, like: "ours", domains: ["sections"] },
  { name: "ours", method: "coefficients", k: K, rates: OURS, domains: ALL },
  {
    name: "ours, donors of its domain",
    method: "coefficients",
    k: K,
    within: true,
    like: "ours",
    domains: ["sections"],
  },
  { name: `ours flat, K ${K}`, method: "flat", k: K, like: "ours", domains: ALL },
  { name: `analytical, K ${K}`, method: "analytical", k: K, rates: [{ terms: 0, head: 0 }], domains: ALL },
  { name: `distilled, K ${K}`, method: "distilled", k: K, rates: [{ terms: 0.02, head: 0.02 }], domains: ["hub"] },
  { name: "VeRA r 256", method: "VeRA", rates: [{ terms: 0.02, head: 0.05 }], domains: ["debtags"] },
  { name: "PiSSA r 8", method: "PiSSA", rates: [{ terms: 0.002, head: 0.05 }], domains: ["debtags"] },
];

/** @param {string} name */
export const methodOf = (name) => /** @type {MethodPlan} */ (METHODS.find((one) => one.name === name));

/**
 * Each rate of a method with its validation, mean over the tuned tasks.
 * @param {Results} results
 * @param {MethodPlan} plan
 */
export function tried(results, plan) {
  return (plan.rates ?? []).flatMap((rates) => {
    const cells = tuningCells(plan, rates);
    const rows = cells.flatMap((cell) => results.get(cell)?.validation ?? []);
    return rows.length < cells.length
      ? []
      : [{ rates, accuracy: mean(rows.map(({ accuracy }) => accuracy)), loss: mean(rows.map(({ loss }) => loss)) }];
  });
}

/**
 * The rates with the best accuracy on validation rows; of two alike the smaller loss.
 * @param {Results} results
 * @param {MethodPlan} plan
 * @returns {Rates | undefined} undefined while some are missing; the only one without a choice
 */
export function chosenRates(results, plan) {
  const { like } = plan;
  if (like) return chosenRates(results, typeof like === "string" ? methodOf(like) : like);
  const found = tried(results, plan);
  if (plan.rates?.length === 1) return plan.rates[0];
  if (found.length < (plan.rates ?? []).length) return undefined;
  return found.sort((a, b) => b.accuracy - a.accuracy || a.loss - b.loss)[0]?.rates;
}

/** @param {MethodPlan} plan @param {Rates} rates @returns {Cell[]} */
export const tuningCells = (plan, rates) => (plan.tuned ?? TUNED).map((task) => cellOf(plan, task, rates, 1));

/** @param {MethodPlan} plan @param {string} task @param {Rates} rates @param {number} seed @returns {Cell} */
export const cellOf = ({ method, k, within }, task, rates, seed) => ({ task, method, k, within, rates, seed });

/**
 * The cells of the first stage that is not complete.
 * @param {Results} results
 * @param {Record<TextDomain, Experiment>} experiments
 * @param {{ peers?: boolean }} [options] peers: whether Python can run those
 * @returns {Cell[]} none when all is done
 */
export function nextCells(results, experiments, { peers = false } = {}) {
  /** @param {string[]} names */
  const tune =
    (...names) =>
    () =>
      names.map(methodOf).flatMap((plan) => (plan.rates ?? []).flatMap((rates) => tuningCells(plan, rates)));
  /** @param {TextDomain[]} domains @param {string[]} names @param {readonly number[]} seeds */
  const measure = (domains, names, seeds) => () =>
    domains.flatMap((domain) =>
      experiments[domain].test.flatMap((task) =>
        names
          .map(methodOf)
          .filter((plan) => plan.domains.includes(domain))
          .flatMap((plan) =>
            seeds.map((seed) => cellOf(plan, task, /** @type {Rates} */ (chosenRates(results, plan)), seed)),
          ),
      ),
    );
  const claim = ["ours", "LoRA r 8"];
  const frozen = METHODS.filter(({ method, rates }) => rates === HEAD_RATES && method !== "zero-shot flat").map(
    ({ name }) => name,
  );
  const flat = METHODS.filter(({ method }) => method === "zero-shot flat").map(({ name }) => name);
  /** Methods whose result does not depend on a seed. */
  const certain = METHODS.filter(({ method }) => method === "analytical").map(({ name }) => name);
  const rest = METHODS.filter(({ name, method }) => (peers || !PEERS.has(method)) && !certain.includes(name)).map(
    ({ name }) => name,
  );
  const leftOut = /** @type {TextDomain[]} */ (["sections", "debtags"]);
  for (const stage of [
    tune(...claim),
    measure(leftOut, claim, [1]),
    measure(ALL, certain, [1]),
    tune(...frozen),
    measure(leftOut, frozen, [1]),
    ...SEEDS.map((seed) => measure(leftOut, claim, [seed])),
    tune(...flat),
    ...SEEDS.map((seed) => measure(ALL, rest, [seed])),
  ]) {
    const missing = stage().filter((one) => !results.get(one));
    if (missing.length > 0) return missing;
  }
  return [];
}

/** Tables of the image tasks: methods, tasks, and tried rates. A method is in a table when every task of it has a cell. */
import { mean } from "simple-statistics";
import { IMAGE_METHODS, imageMethod, TUNED } from "./image-plan.js";
import { SEEDS } from "./plan.js";
import { deviation, pairedBootstrap, rightOf } from "./statistics.js";
import { ratesOf, triedLines } from "./tables.js";

/**
 * @typedef {import("./tables.js").Reader} Reader
 * @typedef {import("./tables.js").Table} Table
 * @typedef {import("./cells.js").Row} Row
 */

/** The method that others are compared with. */
const PEER = "LoRA r 8";

/**
 * A method's right answers by seed, task and row; only seeds that all tasks have.
 * @param {Reader} reader
 * @param {import("./plan.js").MethodPlan} plan
 */
function rightBySeed(reader, plan) {
  const tasks = reader.experiments.icons.test.map((task) => reader.cells(plan, task));
  const seeds = SEEDS.filter((seed) => tasks.every((of) => of.some((one) => one.seed === seed)));
  const cells = seeds.map((seed) => tasks.map((of) => /** @type {Row} */ (of.find((one) => one.seed === seed))));
  const right = cells.map((of) => of.map(({ task, answers }) => reader.right(task, answers, "all")));
  return { first: cells[0]?.[0], peer: cells[0]?.[0].peer, right };
}

/** Each row's mean over seeds, by task. @param {ReturnType<typeof rightOf>[][]} right by seed and task */
const overSeeds = (right) => right[0].map((rows, task) => rows.map((_, row) => mean(right.map((of) => of[task][row]))));

/**
 * All methods: numbers, accuracy over the rows of all tasks (mean over seeds), and the difference from LoRA, paired by row.
 * @param {Reader} reader
 * @returns {Table}
 */
export function imageMethodTable(reader) {
  const lora = rightBySeed(reader, imageMethod(PEER));
  /** @type {string[]} */
  const missing = [];
  /** @type {Set<string>} */
  const notes = new Set();
  /** @type {import("./tables.js").Line[]} */
  const lines = IMAGE_METHODS.flatMap((plan) => {
    const { first, peer, right } = rightBySeed(reader, plan);
    if (!first) {
      missing.push(plan.name);
      return [];
    }
    if (peer) notes.add(`By Python: ${peer}.`);
    const all = right.map((of) => 100 * mean(of.flat()));
    const [own, theirs] = [right, lora.right].map((of) => (of.length > 0 ? overSeeds(of) : []));
    const between = pairedBootstrap(theirs.map((rows, t) => rows.map((value, row) => 100 * (own[t][row] - value))));
    const fewer = first.trained > 0 && lora.first ? lora.first.trained / first.trained : null;
    return [
      {
        method: plan.name,
        "trained beside the head": first.trained,
        "times fewer than LoRA r 8": fewer,
        rates: ratesOf(first),
        "test rows, %": mean(all),
        "±": all.length > 1 ? deviation(all) : null,
        "minus LoRA r 8": plan.name === PEER ? null : between.centre,
        low: plan.name === PEER ? null : between.low,
        high: plan.name === PEER ? null : between.high,
        seeds: all.length,
      },
    ];
  });
  const given = reader.experiments.icons.test.flatMap((task) =>
    reader.right(task, reader.given(reader.experiments.icons, task), "all"),
  );
  lines.push({
    method: "the given adapters (LoRA r 8 by PEFT, other steps and rates)",
    "test rows, %": 100 * mean(given),
  });
  if (missing.length > 0) notes.add(`Not measured on all tasks yet: ${missing.join(", ")}.`);
  return { id: "images", title: "Ten tasks of icons, leave one out", lines, notes: [...notes] };
}

/** Test rows by task, mean over seeds. @param {Reader} reader @returns {Table} */
export function imageTaskTable(reader) {
  const experiment = reader.experiments.icons;
  const lines = experiment.test.map((task) => {
    /** @type {import("./tables.js").Line} */
    const line = { task, rows: reader.tasks.get(task)?.test.length ?? 0 };
    for (const plan of IMAGE_METHODS) {
      const cells = reader.cells(plan, task);
      if (cells.length > 0)
        line[plan.name] = 100 * mean(cells.flatMap(({ answers }) => reader.right(task, answers, "all")));
    }
    return { ...line, given: 100 * mean(reader.right(task, reader.given(experiment, task), "all")) };
  });
  return { id: "images-tasks", title: "Test rows by task, %", lines, notes: [] };
}

/** Rates tried on validation rows. @param {Reader} reader @returns {Table} */
export function imageRateTable({ results }) {
  const notes = [`Rows of the training sets of ${TUNED.join(", ")} that nothing was trained on, seed 1.`];
  return {
    id: "images-rates",
    title: "Rates, chosen on validation rows",
    lines: triedLines(results, IMAGE_METHODS),
    notes,
  };
}

/**
 * Tables of measurements, as numbers and as Markdown. A method is in a table when every task of it has a cell; missing cells are
 * reported.
 */

import { mean, sum } from "simple-statistics";
import { remaining } from "./data.js";
import { cellOf, chosenRates, METHODS, methodOf, SEEDS, TUNED, tried } from "./plan.js";
import { deviation, pairedBootstrap, rightOf } from "./statistics.js";

/**
 * @typedef {Record<string, string | number | null>} Line
 * @typedef {{ id: string, title: string, lines: Line[], notes: string[] }} Table
 * @typedef {import("./plan.js").MethodPlan} MethodPlan
 * @typedef {import("./data.js").Experiment} Experiment
 * @typedef {import("./data.js").Task} Task
 * @typedef {import("./cells.js").Results} Results
 * @typedef {import("./cells.js").Row} Row
 */

/** Limits of the claim: points that coefficients and head may lie below LoRA, and the ratio of their numbers. */
export const CLAIM = { centre: 1.5, end: 3, ratio: 25 };

/** Reads results for the tables. */
export class Reader {
  /**
   * @param {Results} results
   * @param {ReadonlyMap<string, Task>} tasks
   * @param {Record<string, Experiment>} experiments
   * @param {Record<string, Map<string, { predictions: number[] }>>} references what PEFT answers with the given adapters, by suite
   */
  constructor(results, tasks, experiments, references) {
    this.results = results;
    this.tasks = tasks;
    this.experiments = experiments;
    this.references = references;
    /** @type {Map<string, boolean[]>} */
    this.kept = new Map();
    for (const { test, donors } of Object.values(experiments))
      for (const id of test) this.kept.set(id, remaining(tasks, id, donors(id)));
  }

  /** A method's cells on one task at the chosen rates, by seed. @param {MethodPlan} plan @param {string} task @returns {Row[]} */
  cells(plan, task) {
    const rates = chosenRates(this.results, plan);
    return rates ? SEEDS.flatMap((seed) => this.results.get(cellOf(plan, task, rates, seed)) ?? []) : [];
  }

  /** 1 for each right answer to a test row, else 0. @param {string} task @param {string} answers @param {"kept" | "all"} which */
  right(task, answers, which) {
    const right = rightOf(answers, /** @type {Task} */ (this.tasks.get(task)).test);
    return which === "all" ? right : right.filter((_, i) => this.kept.get(task)?.[i]);
  }

  /** The given adapter's answers. @param {Experiment} experiment @param {string} task */
  given({ suite }, task) {
    return /** @type {{ predictions: number[] }} */ (this.references[suite].get(task)).predictions.join("");
  }
}

/**
 * The claim: coefficients and head against LoRA, on rows that no donor has seen, pooled over tasks.
 * @param {Reader} reader
 * @returns {Table & { verdict: Record<string, number | boolean> }}
 */
export function claimTable(reader) {
  const { sections, debtags } = reader.experiments;
  const tasks = [...sections.test, ...debtags.test].map((task) => claimOf(reader, task));
  const found = tasks.filter(({ seeds }) => seeds.length > 0);
  const missing = tasks.filter(({ seeds }) => seeds.length < SEEDS.length);
  const groups = found.map(({ differences }) => differences);
  const rows = sum(groups.map(({ length }) => length));
  const pooled = interval(groups);
  const weighted = (/** @type {"ours" | "lora"} */ of) =>
    sum(found.map((one) => one[of] * one.differences.length)) / rows;
  const lines = [
    ...found.map(({ task, ours, lora, differences }) =>
      claimLine(task, differences.length, lora, ours, interval([differences])),
    ),
    claimLine("pooled", rows, weighted("lora"), weighted("ours"), pooled),
  ];
  const complete = found.length > 0 && missing.length === 0;
  const bySeed = SEEDS.map((seed) => found.flatMap((one) => one.bySeed.get(seed) ?? []));
  const seeds = bySeed.filter((all) => all.length > 0 && all.length === rows).map(mean);
  const sizes = found.at(-1)?.trained ?? { ours: NaN, lora: NaN };
  const ratio = sizes.lora / sizes.ours;
  const holds = complete && pooled.difference >= -CLAIM.centre && pooled.low >= -CLAIM.end && ratio >= CLAIM.ratio;
  const soFar = missing.map(({ task, seeds }) => `${task} ${seeds.length}`).join(", ");
  const notes = [
    `Trained beside the head: LoRA ${sizes.lora}, ours ${sizes.ours} (${ratio.toFixed(1)} times fewer).`,
    `Pooled difference by seed: ${seeds.map((value) => value.toFixed(2)).join(", ")} points.`,
    `At most ${CLAIM.centre} points below LoRA, the interval's end at most ${CLAIM.end}, at least ${CLAIM.ratio} times fewer numbers: ${complete ? (holds ? "holds" : "does not hold") : "not judged before all seeds are there"}.`,
    ...(soFar ? [`Not all ${SEEDS.length} seeds are measured yet, so far: ${soFar}.`] : []),
  ];
  const { difference: centre, low, high } = pooled;
  const verdict = { centre, low, high, ratio, rows, seeds: seeds.length, holds };
  return { id: "claim", title: "Coefficients and head against LoRA", lines, notes, verdict };
}

/** @param {string} task @param {number} rows @param {number} lora @param {number} ours @param {ReturnType<typeof interval>} between @returns {Line} */
const claimLine = (task, rows, lora, ours, between) => ({
  task,
  rows,
  "LoRA r 8, %": lora,
  "ours, %": ours,
  ...between,
});

/**
 * One task, over the seeds that both methods have: percent, differences of its rows in points, and the same by seed.
 * @param {Reader} reader
 * @param {string} task
 */
function claimOf(reader, task) {
  const [own, theirs] = ["ours", "LoRA r 8"].map((name) => reader.cells(methodOf(name), task));
  const seeds = SEEDS.filter((seed) => [own, theirs].every((cells) => cells.some((one) => one.seed === seed)));
  if (seeds.length === 0)
    return { task, seeds, ours: NaN, lora: NaN, differences: [], bySeed: new Map(), trained: undefined };
  const [a, b] = [own, theirs].map((cells) =>
    seeds.map((seed) =>
      reader.right(task, /** @type {Row} */ (cells.find((one) => one.seed === seed)).answers, "kept"),
    ),
  );
  return {
    task,
    seeds,
    ours: 100 * mean(a.flat()),
    lora: 100 * mean(b.flat()),
    differences: a[0].map((_, row) => 100 * mean(seeds.map((_, s) => a[s][row] - b[s][row]))),
    bySeed: new Map(seeds.map((seed, s) => [seed, a[s].map((right, row) => 100 * (right - b[s][row]))])),
    trained: { ours: own[0].trained, lora: theirs[0].trained },
  };
}

/** @param {number[][]} groups */
function interval(groups) {
  const { centre, low, high } = pairedBootstrap(groups);
  return { difference: centre, low, high };
}

/**
 * All methods of an experiment: accuracy over the rows of all tasks, mean over seeds.
 * @param {Reader} reader
 * @param {Experiment} experiment
 * @param {string} title
 * @returns {Table}
 */
export function methodTable(reader, experiment, title) {
  /** @type {string[]} */
  const missing = [];
  /** Methods by what trained them. @type {Map<string, Set<string>>} */
  const peers = new Map();
  /** @type {Line[]} */
  const lines = [];
  for (const plan of METHODS.filter(({ domains }) => domains.includes(experiment.domain))) {
    const cells = experiment.test.map((task) => reader.cells(plan, task));
    const seeds = SEEDS.filter((seed) => cells.every((of) => of.some((one) => one.seed === seed)));
    if (seeds.length === 0) {
      missing.push(`${plan.name} (${cells.filter((of) => of.length > 0).length})`);
      continue;
    }
    const chosen = seeds.map((seed) => cells.map((of) => /** @type {Row} */ (of.find((one) => one.seed === seed))));
    for (const { peer } of chosen.flat()) if (peer) peers.set(peer, (peers.get(peer) ?? new Set()).add(plan.name));
    lines.push({
      method: plan.name,
      "trained beside the head": chosen[0][0].trained,
      rates: ratesOf(chosen[0][0]),
      ...accuracies(
        reader,
        chosen.map((of) => of.map(({ task, answers }) => ({ task, answers }))),
      ),
    });
  }
  const given = experiment.test.map((task) => ({ task, answers: reader.given(experiment, task) }));
  lines.push({
    method: "the given adapters (LoRA r 8 by PEFT)",
    "trained beside the head": 73728,
    rates: "",
    ...accuracies(reader, [given]),
  });
  const notes = [...peers].map(([peer, names]) => `${[...names].join(" and ")}: ${peer}.`);
  if (missing.length > 0)
    notes.push(`Not measured on all ${experiment.test.length} tasks yet (so far on): ${missing.join(", ")}.`);
  return { id: experiment.domain, title, lines, notes };
}

/**
 * Percent over the rows of all tasks: those no donor has seen, and all.
 * @param {Reader} reader
 * @param {{ task: string, answers: string }[][]} seeds by seed and task
 * @returns {Line}
 */
function accuracies(reader, seeds) {
  const of = (/** @type {"kept" | "all"} */ which) =>
    seeds.map((tasks) => 100 * mean(tasks.flatMap(({ task, answers }) => reader.right(task, answers, which))));
  const [kept, all] = [of("kept"), of("all")];
  return {
    "unseen rows, %": mean(kept),
    "±": spread(kept),
    "all rows, %": mean(all),
    "± ": spread(all),
    seeds: seeds.length,
  };
}

/** Deviation between seeds, where there are several. @param {number[]} values */
const spread = (values) => (values.length > 1 ? deviation(values) : null);

/**
 * Unseen rows by task, mean over seeds.
 * @param {Reader} reader
 * @param {Experiment} experiment
 * @returns {Table}
 */
export function taskTable(reader, experiment) {
  const lines = experiment.test.map((task) => {
    /** @type {Line} */
    const line = {
      task,
      rows: reader.kept.get(task)?.filter(Boolean).length ?? 0,
      of: reader.tasks.get(task)?.test.length ?? 0,
    };
    for (const plan of METHODS.filter(({ domains }) => domains.includes(experiment.domain))) {
      const cells = reader.cells(plan, task);
      if (cells.length > 0)
        line[plan.name] = 100 * mean(cells.flatMap(({ answers }) => reader.right(task, answers, "kept")));
    }
    return { ...line, given: 100 * mean(reader.right(task, reader.given(experiment, task), "kept")) };
  });
  return { id: `${experiment.domain}-tasks`, title: `${experiment.domain}: unseen rows by task, %`, lines, notes: [] };
}

/**
 * Rates tried on validation rows.
 * @param {Reader} reader
 * @returns {Table}
 */
export function rateTable({ results }) {
  const lines = triedLines(results, METHODS);
  const notes = [`Rows of the training sets of ${TUNED.join(" and ")} that nothing was trained on, seed 1.`];
  return { id: "rates", title: "Rates, chosen on validation rows", lines, notes };
}

/**
 * A line for each pair of tried rates.
 * @param {Results} results
 * @param {readonly MethodPlan[]} plans
 */
export const triedLines = (results, plans) =>
  plans.flatMap((plan) => {
    const chosen = chosenRates(results, plan);
    return tried(results, plan).map(({ rates, accuracy, loss }) => ({
      method: plan.name,
      rates: ratesOf({ rates }),
      "validation, %": 100 * accuracy,
      loss,
      chosen: rates === chosen ? "yes" : "",
    }));
  });

/** @param {Pick<import("./cells.js").Cell, "rates">} cell */
export const ratesOf = ({ rates: { terms, head } }) => `${terms}, head ${head}`;

/** @param {Table} table */
export function toMarkdown({ title, lines, notes }) {
  const names = [...new Set(lines.flatMap((line) => Object.keys(line)))];
  const row = (/** @type {string[]} */ cells) => `| ${cells.join(" | ")} |`;
  const body = lines.map((line) => row(names.map((name) => format(line[name]))));
  return [
    `## ${title}`,
    "",
    row(names.map((name) => name.trim())),
    row(names.map(() => "---")),
    ...body,
    "",
    ...notes.flatMap((note) => [note, ""]),
  ].join("\n");
}

/** @param {string | number | null | undefined} value */
function format(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "string" || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1 ? value.toFixed(2) : value.toFixed(1);
}

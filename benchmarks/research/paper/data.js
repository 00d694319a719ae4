/**
 * Tasks that are left out, adapters that the basis is made of, and test rows that count. The tasks share package descriptions, so a test
 * text of one is often a training text of another; if that one is a donor, its adapter has seen the text. Such rows are kept apart.
 * Nothing is trained here.
 */
import { readdir, readFile } from "node:fs/promises";
import { shuffle, uniform } from "../../../dist/src/tensor/random.js";
import { data, readTask } from "../../../examples/minilm.js";

/** @typedef {import("../../../examples/minilm.js").Task} Task */
/** @typedef {"sections" | "debtags" | "hub"} TextDomain */
/** @typedef {TextDomain} Domain */
/**
 * @typedef {{ domain: Domain, suite: "shared-seed" | "hub", start: "mean" | "random", test: string[], donors: (id: string) => string[] }} Experiment
 *   the tasks that are left out, and the donors of each; start: where coefficients begin, since rows of adapters that were
 *   trained from one seed correspond, and a mean of others says nothing
 */

/** Least number of rows unseen by donors for a statement about a task. */
export const LEAST_ROWS = 40;

/** Tasks of the hub that are kept for testing. */
export const HUB_TEST = 11;

/** The hub's adapters that are left out of the basis; `bench paper --split` finds them again. */
export const HUB_SPLIT = new URL("../results/hub-split.json", import.meta.url);

/** @returns {Promise<Map<string, Task>>} all tasks, by name */
export async function readTasks() {
  const ids = (await readdir(data("tasks")))
    .filter((name) => name.endsWith(".json"))
    .map((name) => name.slice(0, -".json".length));
  return new Map(await Promise.all(ids.sort().map(async (id) => /** @type {const} */ ([id, await readTask(id)]))));
}

/** @param {string} id @returns {Domain} */
export const domainOf = (id) => /** @type {Domain} */ (id.split("-")[0]);

/**
 * Leave one out of the twenty tasks of shared-seed (the paper too trains all from one seed), and the split of the hub.
 * @param {ReadonlyMap<string, Task>} tasks
 * @param {readonly string[]} hubTest
 * @returns {Record<TextDomain, Experiment>} `test`: those with enough rows
 */
export function experiments(tasks, hubTest) {
  const of = (/** @type {Domain[]} */ ...domains) => [...tasks.keys()].filter((id) => domains.includes(domainOf(id)));
  const all = of("sections", "debtags");
  const donors = (/** @type {string} */ id) => all.filter((other) => other !== id);
  const enough = (/** @type {string} */ id) => remaining(tasks, id, donors(id)).filter(Boolean).length >= LEAST_ROWS;
  /** @param {Domain} domain @returns {Experiment} */
  const leaveOneOut = (domain) => ({
    domain,
    suite: "shared-seed",
    start: "mean",
    test: of(domain).filter(enough),
    donors,
  });
  const hubDonors = of("hub").filter((id) => !hubTest.includes(id));
  return {
    sections: leaveOneOut("sections"),
    debtags: leaveOneOut("debtags"),
    hub: { domain: "hub", suite: "hub", start: "random", test: [...hubTest], donors: () => hubDonors },
  };
}

/**
 * Whether each test row's text is in no training set: neither a donor's nor the task's own.
 * @param {ReadonlyMap<string, Task>} tasks
 * @param {string} id
 * @param {readonly string[]} donors
 * @returns {boolean[]}
 */
export function remaining(tasks, id, donors) {
  const trained = new Set([id, ...donors].flatMap((one) => taskOf(tasks, one).train.map(([text]) => text)));
  return taskOf(tasks, id).test.map(([text]) => !trained.has(text));
}

/** @param {ReadonlyMap<string, Task>} tasks @param {string} id */
function taskOf(tasks, id) {
  const task = tasks.get(id);
  if (!task) throw new RangeError(`there is no task "${id}"`);
  return task;
}

/** @returns {Promise<string[]>} */
export async function readHubSplit() {
  return JSON.parse(await readFile(HUB_SPLIT, "utf8")).test;
}

/**
 * Searches for the `count` tasks that keep most test rows when all others are donors: from seeded random ones, exchanging the pair that
 * gains most until none does; the best of several starts.
 * @param {ReadonlyMap<string, Task>} tasks those to choose from
 * @param {{ count: number, seed?: number, starts?: number }} options
 * @returns {{ test: string[], rows: number }} names in order
 */
export function searchSplit(tasks, { count, seed = 1, starts = 5 }) {
  const ids = [...tasks.keys()];
  /** Tasks that train on a text, by text. @type {Map<string, number[]>} */
  const trainers = new Map();
  for (const [i, id] of ids.entries()) {
    for (const text of new Set(taskOf(tasks, id).train.map(([text]) => text)))
      trainers.set(text, [...(trainers.get(text) ?? []), i]);
  }
  const owners = ids.map((id, i) =>
    taskOf(tasks, id)
      .test.map(([text]) => trainers.get(text) ?? [])
      .filter((who) => !who.includes(i)),
  );
  const random = uniform(seed);
  let best = { rows: -1, test: /** @type {number[]} */ ([]) };
  for (let start = 0; start < starts; start++) {
    const order = shuffle([...ids.keys()], random);
    let [test, donors] = [order.slice(0, count), order.slice(count)];
    let rows = countRows(owners, test);
    for (;;) {
      let gain = { rows, out: -1, in: -1 };
      for (let a = 0; a < test.length; a++) {
        for (let b = 0; b < donors.length; b++) {
          const found = countRows(owners, test.with(a, donors[b]));
          if (found > gain.rows) gain = { rows: found, out: a, in: b };
        }
      }
      if (gain.out < 0) break;
      const leaving = test[gain.out];
      test = test.with(gain.out, donors[gain.in]);
      donors = donors.with(gain.in, leaving);
      rows = gain.rows;
    }
    if (rows > best.rows) best = { rows, test };
  }
  return { rows: best.rows, test: best.test.map((i) => ids[i]).sort() };
}

/**
 * Test rows whose text only tasks of `test` train on.
 * @param {readonly (readonly number[])[][]} owners by task and row
 * @param {readonly number[]} test
 */
function countRows(owners, test) {
  const kept = new Set(test);
  return test.reduce((sum, i) => sum + owners[i].filter((who) => who.every((one) => kept.has(one))).length, 0);
}

/**
 * The paper's experiments: rows that count, tasks that are left out, and the statistics. Nothing is trained.
 */

import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { mean } from "simple-statistics";
import t from "tap";
import { Results, type Row } from "../benchmarks/research/paper/cells.js";
import {
  domainOf,
  experiments,
  HUB_SPLIT,
  HUB_TEST,
  LEAST_ROWS,
  readHubSplit,
  readTasks,
  remaining,
  searchSplit,
} from "../benchmarks/research/paper/data.js";
import { headModel } from "../benchmarks/research/paper/frozen.js";
import { chosenRates, methodOf, nextCells, TUNED } from "../benchmarks/research/paper/plan.js";
import { deviation, pairedBootstrap, rightOf } from "../benchmarks/research/paper/statistics.js";
import type { Task } from "../examples/minilm.js";

function task(name: string, train: string[], test: string[]): Task {
  return { task: name, labels: ["a", "b"], train: train.map((text) => [text, 0]), test: test.map((text) => [text, 1]) };
}

t.test("a test text that a donor or the task itself trains on is left out", (t) => {
  const tasks = new Map([
    ["one", task("one", ["own"], ["own", "new", "seen", "far"])],
    ["two", task("two", ["seen"], ["x"])],
    ["three", task("three", ["far"], ["y"])],
  ]);
  t.same(remaining(tasks, "one", ["two"]), [false, true, false, true]);
  t.same(remaining(tasks, "one", ["two", "three"]), [false, true, false, false]);
  t.throws(() => remaining(tasks, "one", ["four"]), new RangeError('there is no task "four"'));
  t.end();
});

t.test("every task is left out of its own donors, and those tested have enough rows", async (t) => {
  const tasks = await readTasks();
  const { sections, debtags, hub } = experiments(tasks, await readHubSplit());
  t.same(sections!.test, ["sections-0", "sections-1", "sections-2", "sections-3"]);
  for (const { test, donors } of [sections!, debtags!]) {
    for (const id of test) {
      t.equal(donors(id).length, 19, id);
      t.notOk(donors(id).includes(id), id);
      t.ok(remaining(tasks, id, donors(id)).filter(Boolean).length >= LEAST_ROWS, id);
    }
  }
  t.notOk(debtags!.test.includes("debtags-scope"), "15 rows are too few");
  t.equal(hub!.test.length, HUB_TEST);
  t.same(
    hub!.test.filter((id) => hub!.donors(id).includes(id)),
    [],
  );
  t.equal(hub!.donors("").length, 42);
});

t.test("the split of the hub is found again", async (t) => {
  const tasks = await readTasks();
  const hub = new Map([...tasks].filter(([id]) => domainOf(id) === "hub"));
  const stored = JSON.parse(await readFile(HUB_SPLIT, "utf8"));
  t.same(searchSplit(hub, { count: HUB_TEST }), stored);
  const donors = [...hub.keys()].filter((id) => !stored.test.includes(id));
  const rows = stored.test.reduce(
    (sum: number, id: string) => sum + remaining(hub, id, donors).filter(Boolean).length,
    0,
  );
  t.equal(rows, stored.rows, "the search counts as the filter does");
});

t.test("the bootstrap agrees with the normal approximation, and draws within groups", (t) => {
  const group = Array.from({ length: 400 }, (_, i) => (i % 4 === 0 ? 100 : 0));
  const { centre, low, high } = pairedBootstrap([group]);
  // 25 ± 1.96 · √(25 · 75 / 400)
  t.equal(centre, 25);
  t.ok(Math.abs(low - (25 - 4.24)) < 0.4, `${low}`);
  t.ok(Math.abs(high - (25 + 4.24)) < 0.4, `${high}`);
  t.same(pairedBootstrap([group]), { centre, low, high }, "the same seed gives the same interval");
  t.same(
    pairedBootstrap([Array(30).fill(2), Array(10).fill(-2)]),
    { centre: 1, low: 1, high: 1 },
    "groups keep their sizes",
  );
  t.equal(mean([1, 2, 6]), 3);
  t.equal(deviation([1, 3]), Math.SQRT2);
  t.equal(deviation([5]), 0);
  t.same(
    rightOf("0110", [
      ["", 0],
      ["", 1],
      ["", 0],
      ["", 1],
    ]),
    [1, 1, 0, 0],
  );
  t.end();
});

t.test("a head on given features: loss and gradients", async (t) => {
  const model = headModel(2, 2);
  const batch = [Float32Array.of(1, 2), Float32Array.of(-1, 0.5)];
  const targets = { values: Float32Array.of(1, 0, 0.25, 0.75), rows: 2 };
  const weightsOf = (weight: Float32Array<ArrayBuffer>) => ({
    terms: new Map(),
    weight,
    bias: Float32Array.of(0.1, -0.1),
  });
  const at = (weight: Float32Array<ArrayBuffer>) => model.step(batch, weightsOf(weight), targets);
  const weight = Float32Array.of(0.3, -0.2, 0.5, 0.4);
  const { loss, gradients } = await at(weight);
  const logits = await model.answer(batch, weightsOf(weight));
  t.ok(Math.abs(logits[0]! - (0.3 - 0.4 + 0.1)) < 1e-6);
  const chance = (z: number[], wanted: number[]): number =>
    wanted.reduce((sum, p, c) => sum - p * (z[c]! - Math.log(z.reduce((a, v) => a + Math.exp(v), 0))), 0);
  const rows = [
    [logits[0]!, logits[1]!],
    [logits[2]!, logits[3]!],
  ];
  t.ok(Math.abs(loss - (chance(rows[0]!, [1, 0]) + chance(rows[1]!, [0.25, 0.75])) / 2) < 1e-6);
  for (const i of weight.keys()) {
    const moved = (by: number): Promise<number> =>
      at(weight.map((value, j) => value + (i === j ? by : 0))).then((step) => step.loss);
    const slope = ((await moved(1e-2)) - (await moved(-1e-2))) / 2e-2;
    t.ok(Math.abs(slope - gradients.weight[i]!) < 1e-4, `weight ${i}: ${slope}, ${gradients.weight[i]}`);
  }
});

t.test("cells are kept, and what follows depends on them", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "paper-"));
  t.teardown(() => rm(folder, { recursive: true }));
  const file = join(folder, "cells.jsonl");
  const results = await Results.open(file);
  const suites = experiments(await readTasks(), await readHubSplit());
  const plan = methodOf("LoRA r 8");
  const row = (task: string, rates: { terms: number; head: number }, accuracy: number): Row => ({
    ...{ task, method: plan.method, rates, seed: 1, trained: 1, head: 1, loss: [1], answers: "0", seconds: 1 },
    validation: { loss: 1, accuracy },
  });
  t.equal(chosenRates(results, plan), undefined);
  for (const [i, rates] of plan.rates!.entries())
    for (const id of TUNED) await results.add(row(id, rates, i === 1 ? 0.9 : 0.8));
  t.same(chosenRates(results, plan), plan.rates![1]);
  t.notOk(
    nextCells(results, suites).some(({ method }) => method === plan.method),
    "what is there is not run again",
  );
  await writeFile(file, '{"task":"cut', { flag: "a" });
  const again = await Results.open(file);
  t.same(again.all(), results.all(), "half a line is no cell");
});

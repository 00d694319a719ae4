/**
 * The paper's image tasks: their rows, adapters that agree with PEFT, and a method that learns. benchmarks/research/results/paper has the
 * measurements.
 */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { packOf, withAdapters } from "../benchmarks/lib/adapters.js";
import { Bench, type Cell, Results, type Row } from "../benchmarks/research/paper/cells.js";
import { iconExperiment, iconSubject, readIconReference, readIconTasks } from "../benchmarks/research/paper/icons.js";
import { IMAGE_METHODS, imageMethod, nextImageCells, TUNED } from "../benchmarks/research/paper/image-plan.js";
import { imageMethodTable } from "../benchmarks/research/paper/image-tables.js";
import { chosenRates } from "../benchmarks/research/paper/plan.js";
import { Reader } from "../benchmarks/research/paper/tables.js";
import { data, LOSSLESS } from "./packs.ts";
import { difference, NODE, open, outputOf } from "./sessions.ts";

const tasks = await readIconTasks();
const experiment = iconExperiment(tasks);
const scratch = await mkdtemp(join(tmpdir(), "icons-"));
t.teardown(() => rm(scratch, { recursive: true }));
const subject = await iconSubject(tasks, scratch);

t.test(
  "labels of tasks are disjoint, icons for tests come from other sets, and every set's licence lets them be here",
  async (t) => {
    const labels = [...tasks.values()].flatMap((task) => task.labels);
    t.equal(new Set(labels).size, 80);
    const sets: Record<string, { licence: string; author: string }> = JSON.parse(
      await readFile(data("icons/sets.json"), "utf8"),
    );
    const prefixes = (split: "train" | "test"): Set<string> =>
      new Set([...tasks.values()].flatMap((task) => task[split].map(([name]) => name.split(":")[0]!)));
    const [train, test] = [prefixes("train"), prefixes("test")];
    t.same(
      [...test].filter((set) => train.has(set)),
      [],
    );
    t.same(Object.keys(sets).sort(), [...train, ...test].sort());
    const free = ["Apache-2.0", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "Unlicense"];
    for (const [set, { licence, author }] of Object.entries(sets)) t.ok(free.includes(licence) && author, set);
    for (const [id, { train, test }] of tasks) {
      t.ok(train.length > 500 && test.length > 100, id);
      t.notOk(experiment.donors(id).includes(id), id);
      t.equal(experiment.donors(id).length, 9);
    }
  },
);

t.test("a pack of the ten answers as PEFT does", async (t) => {
  const reference = await readIconReference();
  const folders = [...tasks.keys()].map((id) => data(`icons/adapters/${id}`));
  const pack = await openPack(await withAdapters(folders, (adapters) => packOf(adapters, LOSSLESS)));
  const session = await open(NODE, data("icons/model_fp16.onnx"), pack);
  for (const [id, { test, labels }] of tasks) {
    await session.switchTask(id);
    const rows = test.slice(0, 16).map(([name]) => name);
    const logits = await outputOf(session, subject.encode(rows));
    t.equal(logits.length, 16 * labels.length);
    const expected = Float32Array.from(reference.get(id)!.logits16.flat());
    t.ok(difference(logits, expected) < 1e-3, `${id}: ${difference(logits, expected)}`);
  }
  await session.close();
  await pack.close();
});

t.test("a cell: 2 · 2 · 8 coefficients for each of 8 modules, and the head", async (t) => {
  const bench = new Bench(tasks, { icons: experiment }, { ...subject, steps: 16 });
  const row = await bench.run({
    task: "icons-3",
    method: "coefficients",
    k: 2,
    rates: { terms: 0.03, head: 0.02 },
    seed: 1,
  });
  t.equal(row.trained, 256);
  t.equal(row.head, 8 * 97);
  t.equal(row.answers.length, tasks.get("icons-3")!.test.length);
  t.ok(row.loss.at(-1)! < row.loss[0]!, row.loss.join());
});

t.test("rates come first, then seeds; the table compares with LoRA", async (t) => {
  const results = await Results.open(join(scratch, "cells.jsonl"));
  const first = nextImageCells(results, experiment.test, { peers: true });
  t.same([...new Set(first.map(({ task }) => task))], TUNED);
  const made = (cell: Cell, right: boolean): Row => ({
    ...{ ...cell, trained: cell.method === "lora" ? 12288 : 2048, head: 776, loss: [1], seconds: 1 },
    validation: { loss: 1, accuracy: 0.5 + cell.rates.terms },
    answers: tasks
      .get(cell.task)!
      .test.map(([, label]) => (right ? label : (label + 1) % 8))
      .join(""),
  });
  for (const cell of first) await results.add(made(cell, cell.method !== "head"));
  t.equal(chosenRates(results, imageMethod("ours, K 16"))?.terms, 0.04);
  t.equal(chosenRates(results, imageMethod("ours, K 8"))?.terms, 0.04, "as K 16");
  const next = nextImageCells(results, experiment.test, { peers: false });
  t.notOk(next.some(({ method }) => method === "VeRA" || method === "LoRA"));
  for (const cell of next) await results.add(made(cell, cell.method !== "head"));
  const reader = new Reader(results, tasks, { icons: experiment }, { icons: await readIconReference() });
  const { lines, notes } = imageMethodTable(reader);
  const by = (name: string) => lines.find(({ method }) => method === name)!;
  t.match(by("ours, K 16"), { "test rows, %": 100, "minus LoRA r 8": 0, "times fewer than LoRA r 8": 6, seeds: 1 });
  t.match(by("head alone"), { "test rows, %": 0, "minus LoRA r 8": -100 });
  t.match(notes, ["Not measured on all tasks yet: LoRA r 8 by PEFT, VeRA r 256."]);
  t.equal(lines.length, IMAGE_METHODS.length - 2 + 1, "and the given adapters");
});

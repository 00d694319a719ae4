/**
 * Choosing by behaviour: the smallest pack that keeps the caller's scores. Real adapters and the real model.
 */
import { openPack, type Pack } from "eigenlora";
import { type Judge, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import {
  agreement,
  createEncoder,
  labelOf,
  model as minilm,
  readTask,
  runBatches,
  toBatches,
} from "../../examples/minilm.js";
import { firstModules } from "../support/adapters.ts";
import { concat, data, lossOf } from "../support/packs.ts";
import { NODE, open } from "../support/sessions.ts";

const FEW = ["debtags-role", "debtags-suite", "sections-0", "sections-1"].map((id) => data(`adapters/own-seed/${id}`));
const whole = await readAdapters(FEW);
/** Two modules of each are enough where no model runs. */
const adapters = whole.map((adapter) => firstModules(adapter, 2));
const ids = adapters.map(({ id }) => id);
t.teardown(async () => {
  for (const adapter of whole) await adapter.close();
});

const evenly = (score: number): Map<string, number> => new Map(ids.map((id) => [id, score]));

t.test("the smallest pack that keeps scores: finer steps lose less, and what is chosen passed", async (t) => {
  // A score without a model: how little of ΔW is lost, by the judge's own reading of the pack.
  const judge: Judge = async (pack, asked) => {
    t.same(asked, ids);
    const losses = await Promise.all(adapters.map((adapter) => lossOf(pack, adapter)));
    return new Map(ids.map((id, i) => [id, 1 - losses[i]!.total]));
  };
  let before = 0;
  for (const tolerance of [0.5, 0.2, 0.05]) {
    let asked = 0;
    const goal = { kind: "score", tolerance, reference: evenly(1) } as const;
    const counting: Judge = (pack, ids) => {
      asked++;
      return judge(pack, ids);
    };
    const { chunks, report } = await searchPack(adapters, { goal, judge: counting });
    t.ok(report.passes && report.loss! <= tolerance, `${report.loss}`);
    t.ok(report.loss! > 0.4 * tolerance, `${report.loss} of ${tolerance}`);
    t.equal(concat(chunks).length, report.bytes);
    t.equal(report.tried.length, asked);
    t.ok(asked <= 10, `${asked} packs asked`);
    t.ok(report.bytes > before, "a smaller loss takes more bytes");
    before = report.bytes;
  }
});

t.test("scores that integers do not keep are kept by other numbers, or by none", async (t) => {
  const coded = (pack: Pack): boolean => pack.directory.basis.step !== undefined;
  const goal = { kind: "score", tolerance: 0 } as const;
  const { report } = await searchPack(adapters, { goal, judge: async (pack) => evenly(coded(pack) ? 0 : 1) });
  t.match(report.name, /f16/);
  t.same(report.reference, evenly(1), "the reference is asked of a pack of everything");
  const mean = await searchPack(adapters, {
    goal: { ...goal, tolerance: 0.26, keep: "mean" },
    judge: async (pack) => Object.fromEntries(ids.map((id, i) => [id, i === 0 && coded(pack) ? 0 : 1])),
  });
  t.match(mean.report.name, /coded/, "one task of four may lose all where the mean is kept");
});

t.test("what it refuses", async (t) => {
  const judge: Judge = async () => evenly(0.5);
  const goal = { kind: "score", tolerance: 0.1 } as const;
  const options = { goal, judge };
  const compared = { ...goal, reference: evenly(1) };
  await t.rejects(searchPack(adapters, { ...options, goal: compared }), {
    name: "RangeError",
    message: /no pack keeps the score of every task within 0.1; .* is 0.500/,
  });
  await t.rejects(searchPack([], options), { message: /no adapters/ });
  await t.rejects(searchPack(adapters, { ...options, goal: { ...goal, tolerance: NaN } }), {
    message: /tolerance must be 0 or more, got NaN/,
  });
  await t.rejects(searchPack(adapters, { goal }), { message: /needs a judge/ });
  await t.rejects(searchPack(adapters, { ...options, goal: { ...goal, reference: { "debtags-role": 1 } } }), {
    name: "TypeError",
    message: /reference gives undefined for task "debtags-suite"/,
  });
  for (const [judge, message] of [
    [async () => evenly(NaN), /judge gives NaN for task "debtags-role"/],
    [() => ({}), /judge gives undefined for task "debtags-role"/],
  ] as const)
    await t.rejects(searchPack(adapters, { ...options, judge }), { name: "TypeError", message });
  for (const error of [new Error("mine"), new RangeError("mine")])
    await t.rejects(searchPack(adapters, { ...options, judge: () => Promise.reject(error) }), { message: "mine" });
  const stop = new AbortController();
  const stopping = (): Map<string, number> => {
    stop.abort();
    return evenly(1);
  };
  const stopped = searchPack(adapters, { ...options, signal: stop.signal, judge: stopping });
  await t.rejects(stopped, { name: "AbortError" });
});

t.test("through a live session: the pack keeps the accuracy it was chosen by", async (t) => {
  const encode = await createEncoder(NODE as never);
  const questions = new Map<string, { batches: ReturnType<typeof toBatches>; labels: number[] }>();
  for (const id of ids) {
    const test = (await readTask(id)).test.slice(0, 24);
    questions.set(id, {
      batches: toBatches(
        encode,
        test.map(([text]) => text),
      ),
      labels: test.map(([, label]) => label),
    });
  }
  const judge = async (pack: Pack, asked: readonly string[]) => {
    const session = await open(NODE, minilm, pack);
    const scores = new Map<string, number>();
    for (const id of asked) {
      const { batches, labels } = questions.get(id)!;
      await session.switchTask(id);
      scores.set(id, agreement((await runBatches(session, batches)).map(labelOf), labels));
    }
    await session.close();
    return scores;
  };
  const { chunks, report } = await searchPack(whole, {
    goal: { kind: "score", tolerance: 0.03, keep: "mean" },
    judge,
  });
  const again = await judge(await openPack(concat(chunks)), ids);
  t.same(again, report.scores);
  const mean = (scores: ReadonlyMap<string, number>) => [...scores.values()].reduce((a, b) => a + b, 0) / ids.length;
  t.ok(mean(report.reference!) > 0.6, `adapters: ${mean(report.reference!)}`);
  t.ok(mean(report.reference!) - mean(report.scores!) <= 0.03 + 1e-12);
  const smaller = report.tried.filter(({ passes, bytes }) => passes && bytes! < report.bytes);
  t.same(smaller, [], "no smaller pack that was asked passed");
  t.ok(report.ratio > 4, `${report.ratio.toFixed(1)} times fewer bytes`);
});

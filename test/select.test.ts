import { openPack, type Pack } from "eigenlora";
import { buildPack, type Judge, type SearchOptions, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import fc from "fast-check";
import t from "tap";
import {
  agreement,
  createEncoder,
  labelOf,
  model as minilm,
  readTask,
  runBatches,
  toBatches,
} from "../examples/minilm.js";
import { lowestPassing } from "./internals.ts";
import { concat, data } from "./packs.ts";
import { NODE, open } from "./sessions.ts";

const FEW = ["debtags-role", "debtags-suite", "sections-0", "sections-1"].map((id) => data(`adapters/own-seed/${id}`));
const whole = await readAdapters(FEW);
const INT4 = { basis: "int4", coefficients: "int4", head: "int4" } as const;
/** Two modules of each are enough where no model runs. */
const adapters = whole.map((adapter) => ({ ...adapter, modules: new Map([...adapter.modules].slice(0, 2)) }));
const ids = adapters.map(({ id }) => id);
t.teardown(async () => {
  for (const adapter of whole) await adapter.close();
});

const evenly = (score: number): Map<string, number> => new Map(ids.map((id) => [id, score]));

t.test("the lowest rung that passes with the one above it", async (_t) => {
  const search = async (rungs: readonly boolean[], limit: number) => {
    const asked: number[] = [];
    const found = await lowestPassing(rungs.length, limit, async (rung) => {
      asked.push(rung);
      return rungs[rung]!;
    });
    return { found, asked: new Set(asked).size };
  };
  await fc.assert(
    fc.asyncProperty(fc.nat(60), fc.nat(60), fc.nat(60), async (a, b, c) => {
      const count = Math.max(a, b, 1);
      const [first, limit] = [Math.min(a, b), Math.min(c, count)];
      const { found, asked } = await search(
        Array.from({ length: count }, (_, i) => i >= first),
        limit,
      );
      const least = first < limit ? first : undefined;
      if (found !== least) throw new Error(`${found} instead of ${least}`);
      if (asked > Math.ceil(Math.log2(count + 1)) + 2) throw new Error(`${asked} of ${count} asked`);
    }),
  );
  await fc.assert(
    fc.asyncProperty(fc.array(fc.boolean(), { minLength: 1, maxLength: 40 }), fc.nat(40), async (rungs, l) => {
      const limit = Math.min(l, rungs.length);
      const { found } = await search(rungs, limit);
      if (found !== undefined) return found < limit && rungs[found]! && rungs[found + 1] !== false;
      const stable = rungs.findIndex((passes, i) => passes && rungs[i + 1] !== false);
      // None only where the last rung fails, or where no pass below the limit is followed by another among the rungs looked at.
      return limit === 0 || !rungs[limit - 1] || stable < 0 || stable >= limit || rungs[limit] === false;
    }),
  );
});

t.test(
  "scores that rise with the components: the smallest pack on the ladder, as trying all of them finds",
  async (t) => {
    // A score without a model: how little of ΔW is lost.
    const score = async (k: number) => {
      const { report } = await buildPack(adapters, { select: { kind: "k", k } });
      return new Map(report.errors.map(({ id, mean }) => [id, 1 - mean]));
    };
    const ladder = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32].map((k) => ({ kind: "k" as const, k }));
    const all = await Promise.all(ladder.map(({ k }) => score(k)));
    const within = (tolerance: number) =>
      all.findIndex((scores) => [...scores.values()].every((value) => 1 - value <= tolerance));
    for (const tolerance of [0.05, 0.3, 0.6]) {
      const seen: number[] = [];
      const options: SearchOptions = {
        goal: { kind: "score", tolerance, reference: evenly(1) },
        ladder,
        ways: [{}],
        judge: async (pack, asked) => {
          t.same(asked, ids);
          return all[ladder.findIndex(({ k }) => k >= Math.max(...pack.modules.map(({ A: [A] }) => A!.K)))]!;
        },
        onTry: ({ select }) => seen.push((select as { k: number }).k),
      };
      const { chunks, report } = await searchPack(adapters, options);
      const { select, bytes, loss, passes, tried } = report;
      t.same(select, ladder[within(tolerance)], `tolerance ${tolerance}`);
      t.ok(passes && loss! <= tolerance);
      t.equal(concat(chunks).length, bytes);
      t.equal(tried.find((one) => one.select === select)!.bytes, bytes);
      t.same(
        seen,
        tried.map(({ select }) => (select as { k: number }).k),
      );
      t.equal(new Set(seen).size, seen.length, "no pack is asked twice");
      t.ok(seen.length <= 6, `${seen.length} of ${ladder.length} packs asked`);
      t.same([...(await openPack(concat(chunks))).tasks.keys()], ids);
    }
  },
);

t.test("of several ways the smallest pack; of one that cannot win the largest alone is asked", async (t) => {
  const types = (type: "f16" | "int4") => ({ basis: type, coefficients: type, head: "int4" as const });
  const judge: Judge = async (pack) => evenly(pack.modules[0]!.A[0]!.K >= 8 ? 1 : 0);
  const ways = [{ dtype: types("int4") }, { dtype: types("f16") }];
  const goal = { kind: "score", tolerance: 0 } as const;
  const { way, tried, reference, judgedBy } = (await searchPack(adapters, { goal, judge, ways })).report;
  t.same(way, ways[0]);
  t.equal(judgedBy, "score");
  t.equal(tried.filter(({ way }) => way === ways[1]).length, 1);
  t.same(reference, evenly(1), "the reference is asked of a pack of everything");
  const other = (await searchPack(adapters, { goal, judge, ways: [...ways].reverse() })).report;
  t.same(
    [other.way, other.select, other.bytes],
    [
      ways[0],
      { kind: "k", k: 8 },
      tried.find(({ passes, select }) => passes && (select as { k: number }).k === 8)!.bytes,
    ],
  );
  const flat = await searchPack(adapters, { goal, judge: async () => evenly(1), ways: [{ mode: "flat" }] });
  t.same(flat.report.select, { kind: "k", k: 1 });
  const mean = await searchPack(adapters, {
    goal: { ...goal, tolerance: 0.26, keep: "mean" },
    ways: [{}],
    judge: async (pack) =>
      Object.fromEntries(ids.map((id, i) => [id, i === 0 && pack.modules[0]!.A[0]!.K < 32 ? 0 : 1])),
  });
  t.same(mean.report.select, { kind: "k", k: 1 }, "one task of four may lose all where the mean is kept");
  const alone = await searchPack(adapters, {
    goal: { ...goal, reference: evenly(1) },
    judge: async (pack) => {
      const found = await Promise.all(ids.map(async (id) => (await pack.load(id)).terms[0]!.privateRank));
      return evenly(Math.min(...found) >= 3 ? 1 : 0);
    },
    ways: [{ gauge: "balanced", grows: "terms" }],
  });
  t.match(alone.report.select, { kind: "error" }, "private terms, as many as an error asks for");
  const passed = alone.report.tried.filter(({ passes }) => passes);
  t.equal(alone.report.bytes, Math.min(...passed.map(({ bytes }) => bytes!)), "the smallest that passes");
  t.equal(alone.report.name, "private terms alone");
});

t.test("what it refuses", async (t) => {
  const judge: Judge = async () => evenly(0.5);
  const goal = { kind: "score", tolerance: 0.1 } as const;
  const options = { goal, ways: [{}], judge };
  const compared = { ...goal, reference: evenly(1) };
  await t.rejects(searchPack(adapters, { ...options, goal: compared }), {
    name: "RangeError",
    message: /no pack keeps the score of every task within 0.1 .* is 0.500/,
  });
  await t.rejects(searchPack([], options), { message: /no adapters/ });
  await t.rejects(searchPack(adapters, { ...options, goal: { ...goal, tolerance: NaN } }), {
    message: /tolerance must be 0 or more, got NaN/,
  });
  await t.rejects(searchPack(adapters, { ...options, ladder: [] }), { message: /must not be empty/ });
  await t.rejects(searchPack(adapters, { ...options, ways: [] }), { message: /must not be empty/ });
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
  await t.rejects(searchPack(adapters, { ...options, families: [{}] } as never), {
    name: "TypeError",
    message: /searchPack: unknown option "families"/,
  });
  await t.rejects(buildPack(adapters, { privateTerm: 1 } as never), {
    name: "TypeError",
    message: /unknown option "privateTerm"; did you mean "privateTerms"/,
  });
  await t.rejects(searchPack(adapters, { ...options, ways: [{ gaug: "balanced" } as never] }), { name: "TypeError" });
  const stop = new AbortController();
  const stopped = searchPack(adapters, { ...options, signal: stop.signal, onTry: () => stop.abort() });
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
    ways: [{ gauge: "balanced", dtype: INT4 }],
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

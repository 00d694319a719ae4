/** Threads that extract: the same pack, the same errors, and no thread is left behind. */
import { type Adapter, type BuildOptions, buildPack, type WorkProgress } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { withTerms } from "../support/adapters.ts";
import { openThread } from "../support/internals/pack.ts";
import { concat, data } from "../support/packs.ts";
import { checkWork } from "../support/work.ts";

const names = ["debtags-role", "debtags-use", "debtags-interface"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
const [first, second] = adapters as [Adapter, Adapter];
const module = [...first.modules.keys()][1]!;

/** Ports of threads that run. */
const running = (): number => process.getActiveResourcesInfo().filter((name) => name === "MessagePort").length;

/** The adapter with other values in one module. */
const changed = (adapter: Adapter, change: (value: number) => number): Adapter =>
  withTerms(adapter, (term, name) => (name === module ? { ...term, A: term.A.map(change) } : term));

const gone = (): never => {
  throw new Error("gone");
};

t.test("a pack is the same, whoever extracts", async (t) => {
  const ways: Record<string, BuildOptions> = {
    "as trained": { select: { kind: "k", k: 3 } },
    "balanced, int4": {
      gauge: "balanced",
      select: { kind: "k", k: 2 },
      dtype: { basis: "int4", coefficients: "int4" },
    },
    "each task by itself": { select: { kind: "k", k: 0 }, rank: 2 },
  };
  for (const [name, options] of Object.entries(ways)) {
    const alone = await buildPack(adapters, options);
    const told: WorkProgress[] = [];
    const beside = await buildPack(adapters, { ...options, workers: 2, onProgress: (at) => told.push(at) });
    t.ok(Buffer.from(concat(beside.chunks)).equals(concat(alone.chunks)), name);
    t.strictSame(beside.report, alone.report, `${name}: the report`);
    checkWork(t, told, "packing");
  }
  t.equal(running(), 0, "threads have ended");
});

t.test("an error says the same, wherever it happens", async (t) => {
  const cases: [string, readonly Adapter[], BuildOptions, object][] = [
    [
      "a value that cannot be stored",
      [first, changed(second, (value) => value * 1e9)],
      { select: { kind: "k", k: 3 }, centering: "none" },
      { name: "AdapterError", file: second.file, field: module },
    ],
    [
      "a value that is no number",
      [first, changed(second, () => NaN)],
      { select: { kind: "k", k: 3 } },
      { name: "RangeError", message: new RegExp(`adapter ${second.id}: value 0 of A is NaN`) },
    ],
    ["a reader's error", [first, withTerms(second, gone)], {}, { message: "gone" }],
  ];
  for (const [name, all, options, expected] of cases) {
    const said = (workers: number): Promise<Error> =>
      buildPack(all, { ...options, workers }).then(
        () => t.fail(name) as never,
        (error) => error,
      );
    const [alone, beside] = [await said(1), await said(2)];
    t.match(beside, expected, name);
    t.equal(beside.message, alone.message);
    t.equal(beside.constructor, alone.constructor);
    t.equal(running(), 0, "threads have ended");
  }
});

t.test("an abort ends the threads, and nothing more is read", async (t) => {
  let reads = 0;
  const counted = adapters.map((adapter) => withTerms(adapter, (term) => (reads++, term)));
  const stop = new AbortController();
  const stopped = buildPack(counted, {
    select: { kind: "k", k: 3 },
    workers: 2,
    signal: stop.signal,
    onProgress: () => stop.abort(new Error("enough")),
  });
  await t.rejects(stopped, { message: "enough" });
  t.ok(reads <= 4 * adapters.length, `${reads} reads, of ${first.modules.size * adapters.length}`);
  t.equal(running(), 0, "threads have ended");
  const before = reads;
  const signal = AbortSignal.abort(new Error("before"));
  await t.rejects(buildPack(counted, { select: { kind: "k", k: 3 }, workers: 2, signal }), { message: "before" });
  t.equal(reads, before);
});

t.test("a number of workers that is none, and a thread that has ended", async (t) => {
  for (const workers of [0, 1.5, NaN])
    await t.rejects(buildPack(adapters, { workers }), {
      name: "RangeError",
      message: `buildPack: workers: expected a whole number from 1, got ${workers}`,
    });
  const thread = await openThread!();
  const asked = thread.ask({ kind: "spectra", stack: { name: "", out: 1, in: 1, members: [] } }, []);
  await thread.close();
  await t.rejects(asked, { message: /a thread that extracts modules has ended/ });
  await t.rejects(thread.ask({}, []), { message: /a thread that extracts modules has ended/ });
});

/**
 * Shared components are found factor by factor and group by group: synthetic adapters with a known answer, and real
 * ones of one script.
 */
import { createRuntime, openPack, type Pack } from "eigenlora";
import {
  type Adapter,
  encodeTaskFile,
  projectAdapters,
  type SearchReport,
  searchPack,
  taskAdapter,
} from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t, { type Test } from "tap";
import { adapterOf, withTerms } from "../support/adapters.ts";
import { normal as draw, uniform } from "../support/internals/base.ts";
import { completeDtypes } from "../support/internals/pack.ts";
import { concat, data, lossOf } from "../support/packs.ts";
import { difference, feeds, model, open, outputOf, RUNTIMES } from "../support/sessions.ts";

const [INPUTS, OUT] = [160, 120];
const MAX = 0.15;

/** Normally distributed numbers, the same for a seed. */
function normal(seed: number, count: number): Float32Array {
  const random = uniform(Math.imul(seed + 1, 0x9e3779b1));
  return Float32Array.from({ length: count }, () => draw(random));
}

const sum = (a: Float32Array, b: Float32Array, factor = 1): Float32Array => a.map((value, i) => value + factor * b[i]!);
const product = (coefficients: Float32Array, rows: Float32Array, width: number): Float32Array => {
  const K = rows.length / width;
  return Float32Array.from({ length: (coefficients.length / K) * width }, (_, at) => {
    let value = 0;
    const [i, j] = [Math.floor(at / width), at % width];
    for (let k = 0; k < K; k++) value += coefficients[i * K + k]! * rows[k * width + j]!;
    return value;
  });
};

/** A factor of a module: rows [rank, width] of an adapter and a module, by their numbers. */
type Rows = (task: number, module: number) => Float32Array;

/** Adapters of two modules. Rank follows from the rows. */
function made(count: number, A: Rows, Bt: Rows, magnitude?: Rows): Adapter[] {
  return Array.from({ length: count }, (_, task) => {
    const modules = ["first", "second"].map((name, module) => {
      const rank = A(task, module).length / INPUTS;
      const read = async () => {
        return { rank, A: A(task, module), Bt: Bt(task, module), magnitude: magnitude?.(task, module) };
      };
      return { name, in: INPUTS, out: OUT, rank, layout: "out-in" as const, read };
    });
    return adapterOf(`task ${task}`, modules, { byteLength: 10_000 });
  });
}

const RANK = 8;
const ownA: Rows = (task, module) => normal(1000 + 2 * task + module, RANK * INPUTS);
const ownB: Rows = (task, module) => normal(5000 + 2 * task + module, RANK * OUT).map((v) => v / 10);
const sameA: Rows = (_, module) => normal(module, RANK * INPUTS);

interface Packed {
  readonly pack: Pack;
  readonly report: SearchReport;
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Bytes of the tasks, each packed alone. */
  readonly alone: number;
}

/** Packs adapters as one who asks for nothing, and checks what each task has lost, as a reader sees it. */
async function packed(t: Test, adapters: readonly Adapter[]): Promise<Packed> {
  const { chunks, report } = await searchPack(adapters);
  const bytes = concat(chunks);
  const pack = await openPack(bytes);
  for (const [i, adapter] of adapters.entries()) {
    const { total: loss } = await lossOf(pack, adapter);
    t.ok(loss <= MAX, `${adapter.id}: ${loss}`);
    t.ok(Math.abs(loss - report.errors[i]!.total) < 1e-5, "the report says so");
  }
  let alone = 0;
  for (const adapter of adapters) alone += await blobBytes(await searchPack([adapter]));
  return { pack, report, bytes, alone };
}

async function blobBytes({ chunks }: { chunks: readonly Uint8Array[] }): Promise<number> {
  const { directory } = await openPack(concat(chunks));
  return directory.tasks.reduce((all, { section }) => all + section.length, 0);
}

/** Components and tasks, without headers and directory. */
const stored = ({ directory }: Pack): number =>
  directory.bases.length + directory.tasks.reduce((all, { section }) => all + section.length, 0);

/** Number of bases of each factor of a module. */
const counts = ({ modules }: Pack): string[] => modules.map(({ A, B }) => `${A.length} ${B.length}`);

t.test("A equal in all: one seed and a large start, or frozen", async (t) => {
  const { pack, report, alone } = await packed(t, made(8, sameA, ownB));
  t.same(counts(pack), ["1 0", "1 0"]);
  t.same(report.shared && [report.shared.A, report.shared.B], [
    { tasks: 8, modules: 2 },
    { tasks: 0, modules: 0 },
  ]);
  t.ok(report.shared!.saved > 0);
  for (const id of pack.tasks.keys())
    for (const term of (await pack.load(id)).terms)
      t.ok(
        term.A && !term.ownA && !term.B && term.ownBt && term.privateRank === 0,
        "B is the task's own, A all tasks'",
      );
  // A row has 280 numbers, 120 of them its own.
  t.ok(stored(pack) < 0.62 * alone, `${stored(pack)} of ${alone}`);
});

t.test("A equal within groups, in any order", async (t) => {
  const group = (task: number): number => [0, 1, 0, 2, 1, 0, 1, 1, 0][task]!;
  const inGroups: Rows = (task, module) => (group(task) === 2 ? ownA : sameA)(task, module + 10 * group(task));
  const { pack, report, alone } = await packed(t, made(9, inGroups, ownB));
  t.same(counts(pack), ["2 0", "2 0"]);
  t.equal(report.shared!.A.tasks, 8, "one is alone");
  const basisOf = async (task: number): Promise<unknown> => (await pack.load(`task ${task}`)).terms[0]!.A?.basis;
  const [first, second] = [await basisOf(0), await basisOf(1)];
  t.not(first, second);
  for (let task = 0; task < 9; task++) t.equal(await basisOf(task), [first, second, undefined][group(task)]);
  t.ok((await pack.load("task 3")).terms[0]!.privateRank > 0, "which has its rows to itself");
  t.ok(stored(pack) < 0.75 * alone, `${stored(pack)} of ${alone}`);
});

t.test("A that has moved: what differs is stored, in fewer bits", async (t) => {
  const moved: Rows = (task, module) => sum(sameA(task, module), ownA(task, module), 0.25);
  const { pack, alone } = await packed(t, made(8, moved, ownB));
  t.same(counts(pack), ["1 0", "1 0"]);
  for (const { A, ownA } of (await pack.load("task 0")).terms) t.ok(A && ownA, "components, and what they lack");
  t.ok(stored(pack) < 0.85 * alone, `${stored(pack)} of ${alone}`);
});

t.test("B shared by many tasks, and A by none", async (t) => {
  const inSpan: Rows = (task, module) =>
    product(ownB(task, module).subarray(0, RANK * 6), normal(module, 6 * OUT), OUT);
  const { pack, report, alone } = await packed(t, made(24, ownA, inSpan));
  t.same(counts(pack), ["0 1", "0 1"]);
  t.equal(report.shared!.B.tasks, 24);
  t.ok(stored(pack) < 0.75 * alone, `${stored(pack)} of ${alone}`);
});

t.test("near copies: two checkpoints of one run", async (t) => {
  const near: Rows = (task, module) => sum(sameA(0, module), ownA(task, module), 0.02);
  const nearB: Rows = (task, module) => sum(ownB(0, module), ownB(task, module), 0.03);
  const { pack, alone } = await packed(t, made(2, near, nearB));
  t.same(counts(pack), ["1 1", "1 1"]);
  t.ok(stored(pack) < 0.65 * alone, `${stored(pack)} of ${alone}`);
});

t.test("DoRA, blends and a switch on such a pack", async (t) => {
  const magnitude: Rows = (task) => normal(task, OUT).map((v) => 2 + 0.1 * v);
  const adapters = made(4, sameA, ownB, magnitude);
  const { pack } = await packed(t, adapters);
  const weights = () =>
    new Map(
      ["first", "second"].map((name, module) => {
        const weight = normal(77 + module, OUT * INPUTS);
        return [`${name}.weight`, { dtype: "f32" as const, shape: [OUT, INPUTS], data: weight }];
      }),
    );
  const base = weights();
  const runtime = await createRuntime(pack, { base });
  await runtime.switchTask("task 1");
  const [term, m] = [await taskAdapter(pack, "task 1"), magnitude(1, 0)];
  const { rank, A, Bt } = await term.modules.get("first")!.read();
  const [pristine, found] = [weights().get("first.weight")!.data, base.get("first.weight")!.data];
  for (const o of [0, 7, OUT - 1]) {
    const row = pristine.slice(o * INPUTS, (o + 1) * INPUTS);
    for (let i = 0; i < INPUTS; i++) for (let k = 0; k < rank; k++) row[i]! += Bt[k * OUT + o]! * A[k * INPUTS + i]!;
    const norm = Math.hypot(...row);
    for (let i = 0; i < INPUTS; i++)
      if (!(Math.abs((row[i]! * m[o]!) / norm - found[o * INPUTS + i]!) < 1e-3)) t.fail(`row ${o}, ${i}`);
  }
  await runtime.switchTask(null);
  for (const [name, { data }] of weights()) t.same(base.get(name)!.data, data, "back to the bit");
  await runtime.close();
});

/** One real adapter, and others with its A. */
async function kinOf(path: string, count: number): Promise<Adapter[]> {
  const [adapter] = await readAdapters([data(path)]);
  t.teardown(() => adapter!.close());
  return Array.from({ length: count }, (_, i) => {
    if (i === 0) return adapter!;
    const kin = withTerms(adapter!, ({ Bt, ...term }, _, index) => {
      const factors = normal(100 * i + index, Bt.length);
      return { ...term, Bt: Bt.map((value, j) => value * factors[j]!) };
    });
    return { ...kin, id: `kin ${i}` };
  });
}

for (const { name, ort } of RUNTIMES) {
  t.test(`${name}: a session holds what is shared once, and is handed the rest`, async (t) => {
    const kin = await kinOf("sessions/adapters/three", 3);
    const { pack, bytes } = await packed(t, kin);
    t.ok(counts(pack).every((one) => one === "1 0"));
    const session = await open(ort, model("torchscript"), pack);
    t.equal(session.mode, "factors");
    t.match(session.reason, /tasks share no components on both factors of a layer: a switch hands over the rest/);
    t.equal(session.probe.result, "passed");
    const other = await openPack(bytes);
    const [whole, folded] = [
      await open(ort, model("torchscript"), other, { reserve: { privateTerms: true } }),
      await open(ort, model("torchscript"), other, { mode: "folded" }),
    ];
    for (const task of [...pack.tasks.keys(), { "kin 1": 0.5, "kin 2": -0.7 }, null]) {
      const how = typeof task === "object" && task ? { head: "kin 1" } : {};
      const answers = [];
      for (const one of [session, whole, folded]) {
        await one.switchTask(task, how);
        answers.push(await outputOf(one, feeds(ort, one)));
      }
      const [found, expected, merged] = answers as [Float32Array, Float32Array, Float32Array];
      t.ok(difference(found, expected) < 1e-5, `${JSON.stringify(task)}: off by ${difference(found, expected)}`);
      t.ok(difference(found, merged) < 2e-5, `${JSON.stringify(task)}, folded: off by ${difference(found, merged)}`);
    }
    await session.switchTask("kin 1");
    await whole.switchTask("kin 1");
    const fed = (one: typeof session): number => one.memory().scratch;
    t.ok(fed(session) < 0.8 * fed(whole), `${fed(session)} of ${fed(whole)} bytes`);

    // One that comes later and has rows of A to itself needs room for them.
    const late = withTerms({ ...kin[0]!, id: "late" }, ({ rank, A, Bt }, _, index) => ({
      rank,
      A: normal(index, A.length),
      Bt: normal(50 + index, Bt.length).map((value) => value / 50),
    }));
    const [task] = await projectAdapters(pack, [late], completeDtypes({ head: "int8" }));
    const file = encodeTaskFile(task!.entry, pack.basisId, task!.blob);
    await session.addTask("late", file);
    await t.rejects(session.switchTask("late"), /no task did when this session was made; make a new one with reserve/);
    await whole.addTask("late", file);
    await whole.switchTask("late");
    await folded.switchTask("late");
    const off = difference(await outputOf(whole, feeds(ort, whole)), await outputOf(folded, feeds(ort, folded)));
    t.ok(off < 2e-5, `off by ${off}`);
    for (const one of [session, whole, folded]) await one.close();
  });
}

t.test("real adapters of one script, whose A starts large and moves", async (t) => {
  const folder = "adapters/same-script";
  const names = ["debtags-game", "debtags-hardware", "debtags-protocol", "debtags-security", "debtags-suite"];
  const adapters = await readAdapters(names.map((name) => data(`${folder}/${name}`)));
  const { pack, report, alone } = await packed(t, adapters);
  t.ok(report.shared!.A.tasks > 0 && stored(pack) < 0.9 * alone, `${stored(pack)} of ${alone}`);
  for (const adapter of adapters) await adapter.close();
});

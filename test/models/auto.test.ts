/**
 * Packs that trade bytes for behaviour: less rank, tasks by themselves, a budget, an error. Errors are
 * compared with ΔW from the adapters' own files, and with numpy's singular values.
 */
import { openPack } from "eigenlora";
import { type Adapter, buildPack, projectAdapters, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { firstModules, withTerms } from "../support/adapters.ts";
import { completeDtypes, DEFAULT_ERROR, isCodedPack } from "../support/internals/pack.ts";
import { concat, data, LOSSLESS, lossOf, packOf } from "../support/packs.ts";
import {
  difference,
  feeds,
  folders,
  golden,
  MODES,
  NODE,
  open,
  outputOf,
  packBytes,
  model as tinyModel,
} from "../support/sessions.ts";

const IDS = ["debtags-admin", "debtags-devel", "debtags-role", "debtags-use", "sections-0", "sections-1"];
const whole = await readAdapters(IDS.map((id) => data(`adapters/own-seed/${id}`)));
t.teardown(() => Promise.all(whole.map((adapter) => adapter.close())));
/** Keeps four modules of twelve, which are enough for a search. */
const cut = (adapter: Adapter): Adapter => firstModules(adapter, 4);
const adapters = whole.map(cut);

const meanTotal = ({ errors }: { errors: readonly { total: number }[] }): number =>
  errors.reduce((sum, { total }) => sum + total, 0) / errors.length;

const F32 = { basis: "f32", coefficients: "f32", head: "f32" } as const;

t.test("a task by itself is the adapter cut by its own SVD", async (t) => {
  const module = "bert.encoder.layer.0.attention.self.query";
  // numpy.linalg.svd of B·A in f64: √(Σ_{i>q} s_i² / Σ s_i²).
  const expected = new Map([
    ["debtags-admin", [0.43784138626247726, 0.25239891810717796]],
    ["debtags-devel", [0.2686171385660351, 0.1371905276697539]],
    ["sections-0", [0.47383673165907775, 0.20136184816496516]],
  ]);
  for (const [i, q] of [2, 4].entries()) {
    const { report } = await packOf(
      [...expected.keys()].map((id) => `adapters/own-seed/${id}`),
      { rank: q, select: { kind: "k", k: 0 }, dtype: F32 },
      (name) => name === module,
    );
    for (const { id, max } of report.errors) t.ok(Math.abs(max - expected.get(id)![i]!) < 1e-6, `${id}, ${q}: ${max}`);
  }
});

t.test("tasks by themselves: sessions answer as with the adapters themselves", async (t) => {
  const bytes = await packBytes(["adapters"], "base", { select: { kind: "k", k: 0 }, dtype: LOSSLESS.dtype });
  for (const mode of MODES) {
    const opened = open(NODE, tinyModel("dynamo"), await openPack(bytes), { mode });
    if (mode === "core") {
      await t.rejects(opened, { tag: "base", message: /share no components.*use mode "factors"/ });
      continue;
    }
    const session = await opened;
    for (const task of folders("adapters")) {
      await session.switchTask(task);
      const off = difference(await outputOf(session, feeds(NODE, session)), golden("base", task));
      t.ok(off < 1e-4, `${mode}, ${task}: ${off}`);
    }
    await session.close();
  }
});

t.test("a budget of bytes is filled, never broken", async (t) => {
  for (const max of [30_000, 45_000]) {
    const { report, chunks } = await searchPack(adapters, { goal: { kind: "bytes", max } });
    t.ok(report.bytes <= max && report.bytes > 0.94 * max, `${report.bytes} of ${max}`);
    t.equal(concat(chunks).length, report.bytes);
  }
  const { report } = await searchPack(adapters, { goal: { kind: "bytes", max: 10_000_000 } });
  t.ok(meanTotal(report) < 1e-6, "all that there is");
  t.match(report.name, /f32/);
  await t.rejects(searchPack(adapters, { goal: { kind: "bytes", max: 3_000 } }), /3000 bytes are too few/);
});

t.test("nobody says what is wanted: every task keeps within a share of its ΔW, large or small", async (t) => {
  const small = (adapter: Adapter): Adapter =>
    withTerms(adapter, ({ Bt, ...term }) => ({ ...term, Bt: Bt.map((value) => value / 1e4) }));
  const mixed = [small(adapters[0]!), ...adapters.slice(1)];
  const { chunks, report } = await searchPack(mixed);
  for (const { id, total } of report.errors)
    t.ok(total <= DEFAULT_ERROR && total > 0.5 * DEFAULT_ERROR, `${id}: ${total}`);
  const pack = await openPack(concat(chunks).buffer);
  for (const [i, adapter] of mixed.entries()) {
    const { total } = await lossOf(pack, adapter);
    t.ok(Math.abs(total - report.errors[i]!.total) < 1e-4, `${total}, ${report.errors[i]!.total}`);
  }
  const { report: plain } = await buildPack(mixed);
  const [least, ...others] = plain.errors.map(({ total }) => total);
  t.ok(least! > 0.8 && others.every((total) => total < 0.3), "the energy of all together is that of the large ones");
  t.match(plain.warnings.join("\n"), /task "debtags-admin" loses \d+ % of its ΔW, half of the tasks \d+ % at most/);
  t.notMatch(report.warnings.join("\n"), /loses/);
  const later = await projectAdapters(
    await openPack(concat(chunks).buffer),
    whole.slice(1, 2).map(cut),
    completeDtypes(),
  );
  t.ok(later[0]!.residual.total <= DEFAULT_ERROR, `added later: ${later[0]!.residual.total}`);
  t.ok(report.tried.every(({ bytes }) => bytes! >= report.bytes));
});

t.test("int8 costs next to no error, a quarter of the bytes, and one more task under 7 kB", async (t) => {
  const all = await readAdapters([data("adapters/own-seed")]);
  t.teardown(() => Promise.all(all.map((adapter) => adapter.close())));
  const of = async (type: "f32" | "int8", k: number) => {
    const { chunks, report } = await buildPack(all, {
      select: { kind: "k", k },
      dtype: { basis: type, coefficients: type, head: type },
    });
    const pack = await openPack(concat(chunks).buffer);
    const blobs = await Promise.all(all.map(({ id }) => pack.load(id)));
    return {
      error: report.error.mean,
      bytes: pack.residentBytes.coefficients + (await pack.bases()).bytes.length,
      blobs,
    };
  };
  const [f32, int8, more] = [await of("f32", 16), await of("int8", 16), await of("int8", 32)];
  t.ok(int8.error <= 1.02 * f32.error, `${f32.error} → ${int8.error}`);
  t.ok(int8.bytes <= 0.28 * f32.bytes, `${f32.bytes} → ${int8.bytes} resident bytes`);
  for (const { bytes, parameters } of more.blobs) {
    const head = parameters.reduce((sum, { tensor }) => sum + tensor.byteLength, 0);
    t.ok(bytes.length - head <= 7000, `${bytes.length} bytes, ${head} of them its head`);
  }
});

t.test("what cannot be done is refused, with what can", async (t) => {
  const goal = { kind: "bytes", max: 5_000 } as const;
  await t.rejects(searchPack(adapters, { goal }), /5000 bytes are too few/);
  await t.rejects(
    searchPack(adapters, { goal: { kind: "error", max: 1e-9 } }),
    /task "debtags-admin" loses more than 1e-9 of its ΔW/,
  );
  await t.rejects(searchPack([], { goal }), /no adapters/);
  await t.rejects(searchPack(adapters, { goal, judge: () => new Map() }), /a judge is for a goal of scores/);
  await t.rejects(searchPack(adapters, { goal: { kind: "bytes", max: NaN } }), /above 0/);
  await t.rejects(buildPack(adapters, { rank: 4, gauge: "as-trained" }), /gauge balanced/);
  await t.rejects(buildPack(adapters, { rank: 0.5, gauge: "balanced" }), /whole number/);
  await t.rejects(buildPack(adapters, { select: { kind: "k", k: 0 }, gauge: "as-trained" }), /gauge balanced/);
  await t.rejects(buildPack(adapters, { select: { kind: "k", k: -1 } }), /whole number from 1/);
  const select = { kind: "error", max: 0.3 } as never;
  await t.rejects(
    buildPack(adapters, { select }),
    /"k" or "energy", got "error"; for an error or a size take searchPack/,
  );
});

/** Packs whose tasks are entropy-coded as coarsely as an error allows. */
t.test("no task loses more than was asked, nor much less", async (t) => {
  for (const max of [0.3, 0.15, 0.05]) {
    const goal = { kind: "error", max } as const;
    const { chunks, report } = await searchPack(adapters, { goal });
    const pack = await openPack(concat(chunks).buffer);
    const { step, error } = pack.directory.basis;
    t.ok(isCodedPack(pack) && error === max && step! > 0);
    for (const adapter of adapters) {
      const { total: loss } = await lossOf(pack, adapter);
      t.ok(loss <= max && loss > 0.95 * max, `${adapter.id}: ${loss}`);
      t.ok(Math.abs(loss - report.errors.find(({ id }) => id === adapter.id)!.total) < 1e-6, "the report says so");
    }
    t.equal(report.tried.length, 1, "one strategy is enough");
    await pack.close();
  }
});

t.test("an error that integers do not reach is kept to by other numbers", async (t) => {
  const { chunks, report } = await searchPack(adapters.slice(0, 2), { goal: { kind: "error", max: 0.001 } });
  const pack = await openPack(concat(chunks).buffer);
  for (const adapter of adapters.slice(0, 2)) t.ok((await lossOf(pack, adapter)).total <= 0.001);
  t.match(report.tried[0]!.reason, /loses more than 0.001 of its ΔW/);
  t.match(report.name, /each task by itself, f(16|32)/);
  t.notOk(isCodedPack(pack));
});

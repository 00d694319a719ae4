/** Packs whose tasks are entropy-coded as coarsely as an error allows. */
import { openPack, type Pack } from "eigenlora";
import { type Adapter, searchPack, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { deltaOf } from "../support/compare.ts";
import { isCodedPack } from "../support/internals/pack.ts";
import { concat, data } from "../support/packs.ts";

const names = ["debtags-role", "debtags-use", "sections-0", "sections-1", "debtags-interface"];
const whole = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(whole.map((adapter) => adapter.close())));
/** Adapters with four modules of twelve. */
const adapters = whole.map((adapter) => ({ ...adapter, modules: new Map([...adapter.modules].slice(0, 4)) }));

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ from the matrices themselves. */
async function lossOf(pack: Pack, { id, modules }: Adapter): Promise<number> {
  const task = await taskAdapter(pack, id);
  let [lost, all] = [0, 0];
  for (const [name, module] of modules) {
    const given = await module.read();
    const exact = deltaOf(given);
    const stored = await task.modules.get(name)?.read();
    const found = stored && deltaOf(stored);
    for (const [i, value] of exact.entries()) {
      lost += (value - (found?.[i] ?? 0)) ** 2;
      all += value ** 2;
    }
  }
  return Math.sqrt(lost / all);
}

t.test("no task loses more than was asked, nor much less", async (t) => {
  for (const max of [0.3, 0.15, 0.05]) {
    const goal = { kind: "error", max } as const;
    const { chunks, report } = await searchPack(adapters, { goal });
    const pack = await openPack(concat(chunks).buffer);
    const { step, error } = pack.directory.basis;
    t.ok(isCodedPack(pack) && error === max && step! > 0);
    for (const adapter of adapters) {
      const loss = await lossOf(pack, adapter);
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
  for (const adapter of adapters.slice(0, 2)) t.ok((await lossOf(pack, adapter)) <= 0.001);
  t.match(report.tried[0]!.reason, /loses more than 0.001 of its ΔW/);
  t.match(report.name, /each task by itself, f(16|32)/);
  t.notOk(isCodedPack(pack));
});

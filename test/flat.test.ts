/**
 * Flat mode, compared with numpy's f64 values and with ΔW formed here, on every backend, and in a session of the real model.
 */
import { readFileSync } from "node:fs";
import { type Dtype, openPack } from "eigenlora";
import { buildPack, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import fc from "fast-check";
import t from "tap";
import { backends } from "./backend-list.ts";
import { values } from "./backend-suite.ts";
import { checkGolden, deltaOf } from "./compare.ts";
import { type ExtractOptions, extractModule, type ModuleMember, type ModuleStack, uniform } from "./internals.ts";
import { concat, data, goldenPacks, LOSSLESS } from "./packs.ts";
import { runs } from "./required.ts";

const F32: ExtractOptions = {
  mode: "flat",
  gauge: "as-trained",
  centering: "keep",
  select: { kind: "energy", share: 1 },
  basisDtype: "f32",
  coefficientDtype: "f32",
};
const own = (ids: readonly string[]): string[] => ids.map((id) => data(`adapters/own-seed/${id}`));

/** Stacks of all modules of some adapters. */
async function stacksOf(ids: readonly string[]): Promise<ModuleStack[]> {
  const found = await readAdapters(own(ids));
  const adapters = ids.map((id) => found.find((adapter) => adapter.id === id)!);
  const stacks = [];
  for (const { name, out, in: inputs } of adapters[0]!.modules.values()) {
    const members: ModuleMember[] = [];
    for (const { id, modules } of adapters) {
      const { rank, read } = modules.get(name)!;
      const { A, Bt } = await read();
      members.push({ id, rank, A, Bt });
    }
    stacks.push({ name, out, in: inputs, members });
  }
  for (const adapter of adapters) await adapter.close();
  return stacks;
}

function norm(x: Float64Array): number {
  return Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ with both matrices formed. */
function formedError(member: Pick<ModuleMember, "A" | "Bt" | "rank">, stored: typeof member): number {
  const exact = deltaOf(member);
  const found = deltaOf(stored);
  return norm(exact.map((value, i) => value - found[i]!)) / (norm(exact) || 1);
}

/** A small adapter of random factors. */
function adapterOf(
  id: string,
  rank: number,
  seed: number,
  [out, inputs]: readonly [number, number] = [10, 14],
): Awaited<ReturnType<typeof readAdapters>>[number] {
  const random = uniform(seed);
  const [A, Bt] = [values(rank * inputs, random), values(rank * out, random)];
  const module = {
    name: "layer",
    out,
    in: inputs,
    rank,
    layout: "out-in" as const,
    read: async () => ({ rank, A, Bt }),
  };
  const modules = new Map([["layer", module]]);
  return {
    id,
    file: id,
    byteLength: 4 * (A.length + Bt.length),
    baseModel: undefined,
    modules,
    saved: [],
    metadata: {},
    warnings: [],
    close: async () => undefined,
  };
}

t.test("golden: flat keep K=4", async (t) => {
  const golden = JSON.parse(readFileSync(data("goldens/extract/golden.json"), "utf8"));
  const { error } = golden.settings["flat keep K=4"];
  const stacks = await stacksOf(golden.tasks);
  t.same(stacks.map(({ name }) => name).sort(), golden.modules);
  for (const stack of stacks) {
    const result = extractModule(stack, { ...F32, select: { kind: "k", k: 4 } });
    t.match(result.A, { components: 4, rank: 8, width: 8 * 384, mean: true });
    for (const task of result.tasks) {
      const expected = error[task.id][stack.name];
      t.ok(Math.abs(task.error - expected) <= 1e-5, `${stack.name} ${task.id}: ${task.error}, numpy ${expected}`);
      t.equal(task.rank, 8);
    }
  }
});

t.test("what is reported is what is stored; all components together lose nothing", async (t) => {
  const types = fc.constantFrom<Dtype>("f32", "f16", "bf16", "int8", "int4", "int3");
  const cases = fc.record({
    ranks: fc.array(fc.integer({ min: 1, max: 4 }), { minLength: 1, maxLength: 5 }),
    seed: fc.nat(),
    gauge: fc.constantFrom("as-trained" as const, "balanced" as const),
    centering: fc.constantFrom("keep" as const, "none" as const),
    basis: types,
    coefficients: types,
    k: fc.integer({ min: 1, max: 5 }),
  });
  await fc.assert(
    fc.asyncProperty(cases, async ({ ranks, seed, gauge, centering, basis, coefficients, k }) => {
      const adapters = ranks.map((rank, i) => adapterOf(`task ${i}`, rank, seed + i));
      const most = ranks.length - (centering === "keep" ? 1 : 0);
      const lossless = await buildPack(adapters, { mode: "flat", gauge, centering, ...LOSSLESS });
      if (lossless.report.error.max > 1e-6 || lossless.report.components.max > most) return false;
      if (most === 0) return true;
      const dtype = { basis, coefficients };
      const { chunks, report } = await buildPack(adapters, {
        mode: "flat",
        gauge,
        centering,
        dtype,
        select: { kind: "k", k: Math.min(k, most) },
      });
      const pack = await openPack(concat(chunks));
      for (const [i, adapter] of adapters.entries()) {
        const factors = await adapter.modules.get("layer")!.read();
        const stored = (await taskAdapter(pack, adapter.id)).modules.get("layer")!;
        const measured = formedError(factors, await stored.read());
        if (Math.abs(measured - report.errors[i]!.max) > 1e-5 * (1 + measured)) return false;
      }
      return true;
    }),
    { seed: 6, numRuns: runs(150) },
  );
  t.pass("150 packs");
});

t.test("PEFT's goldens through flat packs and every backend", async (t) => {
  for (const centering of ["keep", "none"] as const) {
    const goldens = await goldenPacks({ mode: "flat", centering });
    t.ok(goldens.length >= 22, `${goldens.length} goldens`);
    for (const golden of goldens) for (const options of await backends()) await checkGolden(t, golden, options);
  }
});

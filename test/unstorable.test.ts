/** Values that a number format cannot hold: the error says of which adapter and which tensor they are, and what to do. */
import t from "tap";
import type { Adapter } from "../dist/src/adapters/adapter.js";
import { readAdapters } from "../dist/src/adapters/folder.js";
import { type BuildOptions, buildPack } from "../dist/src/pack/build.js";
import { openPack } from "../dist/src/pack/pack.js";
import { projectAdapters } from "../dist/src/pack/project.js";
import { completeDtypes } from "../dist/src/pack/report.js";
import { buildBasis } from "../dist/src/pack/shard/basis.js";
import { adapterStatistics } from "../dist/src/pack/shard/statistics.js";
import { concat, data } from "./packs.ts";

const names = ["debtags-role", "debtags-use"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
const [role, use] = adapters as [Adapter, Adapter];
const module = [...role.modules.keys()][1]!;

/** The adapter with one factor of one module so many times as large. */
function scaled(adapter: Adapter, which: "A" | "Bt", by: number): Adapter {
  const source = adapter.modules.get(module)!;
  const read: typeof source.read = async () => {
    const term = await source.read();
    return { ...term, [which]: term[which].map((value) => value * by) };
  };
  return { ...adapter, modules: new Map([...adapter.modules, [module, { ...source, read }]]) };
}

t.test("of a basis, of coefficients, of private terms, on the way in and later", async (t) => {
  const { file } = use;
  const refuse = (all: Adapter[], what: string, of: string, options: BuildOptions = {}): Promise<unknown> =>
    t.rejects(
      buildPack(all, { select: { kind: "k", k: 4 }, ...options }),
      {
        name: "AdapterError",
        file: of,
        field: module,
        message: new RegExp(`^${of}: ${what} "${module}" cannot be stored: .* too large for f16; use f32`),
      },
      what,
    );
  const large = scaled(use, "A", 1e9);
  // Components have length 1, so what is large is the mean, which is of all.
  await refuse([role, large], "basis A of", role.file);
  await refuse([role, large], "coefficients of", file, { centering: "none" });
  await refuse([role, large], "coefficients of", file, { centering: "none", dtype: { coefficients: "int8" } });
  const own = { gauge: "balanced", privateTerms: 2, select: { kind: "k", k: 0 } } as const;
  await refuse([role, scaled(large, "Bt", 1e9)], "a private term of", file, own);
  // What is multiplied by others has a limit of its own, so that no ΔW leaves binary32.
  const f32 = { select: { kind: "k", k: 4 }, dtype: { basis: "f32", coefficients: "f32" } } as const;
  await t.rejects(buildPack([role, large], f32), { message: /has a value of 65536 or more, which no pack can hold/ });
  await t.rejects(buildPack([role, large], { ...f32, centering: "none" }), {
    ...{ name: "AdapterError", file, message: new RegExp(`coefficients of "${module}" has a value of 65536 or more`) },
  });

  const { chunks } = await buildPack([role], { select: { kind: "k", k: 4 }, centering: "none" });
  const pack = await openPack(concat(chunks));
  await t.rejects(projectAdapters(pack, [large], completeDtypes()), {
    name: "AdapterError",
    file,
    message: new RegExp(`^${file}: ${module} cannot be stored: .* too large for f16; use f32`),
  });
  const statistics = await adapterStatistics([role, large], { gauge: "as-trained" });
  await t.rejects(buildBasis(statistics, { select: { kind: "k", k: 4 } }), {
    name: "RangeError",
    message: new RegExp(`^basis A of "${module}" cannot be stored: .*use f32`),
  });
});

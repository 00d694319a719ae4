/** Values that a number format cannot hold: the error names adapter and tensor, and says what to do. */
import { openPack } from "eigenlora";
import { type Adapter, type BuildOptions, buildPack, projectAdapters, type SavedTensor } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { adapterStatistics, buildBasis, completeDtypes } from "../support/internals/pack.ts";
import { concat, data } from "../support/packs.ts";

const names = ["debtags-role", "debtags-use"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
const [role, use] = adapters as [Adapter, Adapter];
const module = [...role.modules.keys()][1]!;

/** The adapter with one factor of one module multiplied. */
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
        message: new RegExp(
          `^${of}: ${what} "${module}" cannot be stored: .* too large for f16; scale the adapter down`,
        ),
      },
      what,
    );
  const large = scaled(use, "A", 1e9);
  // Components have length 1, so the large part is the mean where all are large, because of the largest adapter.
  const larger = [scaled(role, "A", 4e8), large];
  const largest = larger.map((adapter) => scaled(adapter, "Bt", 1e9));
  await refuse(larger, "basis A of", file);
  await refuse(largest, "basis A of", file, { gauge: "balanced" });
  await refuse(larger, "basis A of", file, { workers: 2 });
  // The mean stays short beside a task that is not: coefficients hold the large part.
  await refuse([role, large], "coefficients of", file);
  await refuse([scaled(large, "Bt", 1e9), role], "coefficients of", file, { gauge: "balanced" });
  await refuse([role, large], "coefficients of", file, { workers: 2 });
  await refuse([role, large], "coefficients of", file, { centering: "none" });
  await refuse([role, large], "coefficients of", file, { centering: "none", dtype: { coefficients: "int8" } });
  await refuse([role, scaled(large, "Bt", 1e9)], "a row of", file, { select: { kind: "k", k: 0 } });
  // Factors that are multiplied by others have a limit of their own, so that no ΔW leaves binary32.
  const f32 = { select: { kind: "k", k: 4 }, dtype: { basis: "f32", coefficients: "f32" } } as const;
  for (const [gauge, all] of [
    ["as-trained", larger],
    ["balanced", largest],
  ] as const) {
    const message = new RegExp(`^${file}: basis A of "${module}" has a value of 65536 or more, which no pack can hold`);
    await t.rejects(buildPack(all, { ...f32, gauge }), {
      name: "AdapterError",
      file,
      field: module,
      message,
    });
  }
  await t.rejects(buildPack([role, large], { ...f32, centering: "none" }), {
    ...{ name: "AdapterError", file, field: module },
    message: new RegExp(`coefficients of "${module}" has a value of 65536 or more`),
  });

  const { chunks } = await buildPack([role], { select: { kind: "k", k: 4 }, centering: "none" });
  const pack = await openPack(concat(chunks));
  await t.rejects(projectAdapters(pack, [large], completeDtypes()), {
    name: "AdapterError",
    file,
    message: new RegExp(`^${file}: ${module} cannot be stored: .* too large for f16; scale the adapter down`),
  });
  const statistics = await adapterStatistics(larger, { gauge: "as-trained" });
  for (const [dtype, what] of [
    ["f16", "cannot be stored: .*scale the adapter down"],
    ["f32", "has a value of 65536 or more, which no pack can hold: scale the adapter down"],
  ] as const)
    await t.rejects(buildBasis(statistics, { select: { kind: "k", k: 4 }, dtype }), {
      ...{ name: "AdapterError", file: statistics.file, field: module },
      message: new RegExp(`: basis A of "${module}" ${what}; the largest rows are those of "${use.id}"$`),
    });
});

t.test("of heads, of vectors, and what is no number", async (t) => {
  const { file } = use;
  const [head, bias] = ["classifier.weight", "classifier.bias"].map(
    (name) => use.saved.find((one) => one.name === name)!,
  );
  const with_ = (saved: SavedTensor, read: (value: number) => number): Adapter => ({
    ...use,
    saved: use.saved.map((one) => (one === saved ? { ...one, read: async () => (await one.read()).map(read) } : one)),
  });
  const refuse = (adapter: Adapter, name: string, message: string): Promise<unknown> =>
    t.rejects(buildPack([adapter], { select: { kind: "k", k: 4 } }), {
      ...{ name: "AdapterError", file, field: name },
      message: new RegExp(`cannot be stored: value .*, ${message}$`),
    });
  await refuse(
    with_(head!, (value) => 1e9 * value),
    head!.name,
    "too large for f16; use f32",
  );
  await refuse(
    with_(bias!, (value) => 1e9 * value),
    bias!.name,
    "too large for f16; use f32",
  );
  await refuse(
    with_(head!, () => NaN),
    head!.name,
    "not a finite number",
  );
});

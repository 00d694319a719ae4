/** Values that a number format cannot hold: the error names adapter and tensor, and says what to do. */
import { type Adapter, type BuildOptions, buildPack, projectAdapters, type SavedTensor } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { adapterOf, lora, withTerms } from "../support/adapters.ts";
import { uniform } from "../support/internals/base.ts";
import { readDonor, sharedRows, startState, TrainedTerms } from "../support/internals/learn.ts";
import { adapterStatistics, buildBasis, completeDtypes } from "../support/internals/pack.ts";
import { data, packed } from "../support/packs.ts";

const names = ["debtags-role", "debtags-use"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
const [role, use] = adapters as [Adapter, Adapter];
const module = [...role.modules.keys()][1]!;

/** The adapter with one factor of one module multiplied. */
const scaled = (adapter: Adapter, which: "A" | "Bt", by: number): Adapter =>
  withTerms(adapter, (term, name) =>
    name === module ? { ...term, [which]: term[which].map((value) => value * by) } : term,
  );

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

  const pack = await packed([role], { select: { kind: "k", k: 4 }, centering: "none" });
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

const [OUT, IN] = [32, 24];

/** Makes an adapter of rank 2. */
function adapter(id: string, seed: number, names: readonly string[], saved: readonly SavedTensor[] = []): Adapter {
  const next = uniform(seed);
  const values = (length: number): Float32Array => Float32Array.from({ length }, () => next() - 0.5);
  const modules = names.map((name) => lora(values, name, OUT, IN));
  return adapterOf(id, modules, { saved });
}

t.test("training begins with the task itself, and loses nothing of it", async (t) => {
  const bias = { name: "a.bias", role: "bias" as const, shape: [OUT], read: async () => new Float32Array(OUT).fill(1) };
  const all = [
    adapter("x", 1, ["a", "b"]),
    adapter("y", 2, ["a", "b"]),
    adapter("only a", 3, ["a"]),
    adapter("biased", 4, ["a"], [bias]),
  ];
  const pack = await packed(all, { gauge: "balanced", centering: "none", select: { kind: "k", k: 4 } });
  const bases = await pack.bases();
  const termsFor = (names: readonly string[]): TrainedTerms =>
    new TrainedTerms(
      pack.modules
        .filter(({ name }) => names.includes(name))
        .map((one) => ({
          name: one.name,
          in: one.in,
          out: one.out,
          privateRank: 0,
          shared: sharedRows(one, bases.bytes, 2),
        })),
    );
  const factors = new TrainedTerms(
    pack.modules.map(({ name, in: inputs, out }) => ({ name, in: inputs, out, privateRank: 2, shared: undefined })),
  );
  const start = async (names: readonly string[], task: string) => {
    const terms = termsFor(names);
    const setup = { pack, terms, origin: terms, model: { head: [] }, labels: [] } as never;
    return terms.expand((await startState(setup, await readDonor(pack, task), uniform(5))).parameters);
  };
  const norm = ({ A, Bt }: { A: Float32Array; Bt: Float32Array }): number => Math.hypot(...A) * Math.hypot(...Bt);
  const found = await start(["a", "b"], "only a");
  t.ok(norm(found.get("a")!) > 0.1);
  t.equal(norm(found.get("b")!), 0, "a module that the task leaves alone");
  const setup = { pack, terms: factors, origin: termsFor(["a", "b"]), model: { head: [] }, labels: [] } as never;
  const lora = factors.expand((await startState(setup, await readDonor(pack, "only a"), uniform(5))).parameters);
  t.ok(norm(lora.get("a")!) > 0.1 && norm(lora.get("b")!) === 0, "as a LoRA too");
  await t.rejects(start(["a"], "x"), /task "x" has terms of "b", which this trainer does not have/);
  await t.rejects(start(["a"], "biased"), /task "biased" has "a.bias" \(bias\), which this trainer does not have/);
  bases.close();
});

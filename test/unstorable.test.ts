/** Values that a number format cannot hold: the error names adapter and tensor, and says what to do. */
import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack } from "eigenlora";
import {
  type Adapter,
  type BuildOptions,
  buildPack,
  projectAdapters,
  type SavedTensor,
  searchPack,
} from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { json } from "./command-line.ts";
import { adapterStatistics, buildBasis, completeDtypes, openSafetensors, openSource } from "./internals.ts";
import { concat, data } from "./packs.ts";

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

t.test("in a search", async (t) => {
  const { file } = use;
  const only = (one: Adapter): Adapter => ({ ...one, modules: new Map([[module, one.modules.get(module)!]]) });
  const [first, second] = [only(role), only(use)];
  // Whether sharing pays is computed first, which these values make impossible.
  for (const by of [1e12, 1e35])
    for (const options of [{}, { workers: 2 }, { goal: { kind: "bytes", max: 20_000 } }] as const)
      await t.rejects(searchPack([first, scaled(second, "A", by)], options), {
        ...{ name: "AdapterError", tag: "adapter", file, field: module },
        message: new RegExp(`(a row|a private term) of "${module}" .*scale the adapter down$`),
      });
});

t.test("the command line says whose values they are", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-large-"));
  t.teardown(() => rm(folder, { recursive: true }));
  const path = join(folder, "large");
  await cp(use.file, path, { recursive: true });
  const weights = join(path, "adapter_model.safetensors");
  const bytes = await readFile(weights);
  const opened = await openSafetensors(await openSource(bytes));
  const tensor = opened.tensors.get([...opened.tensors.keys()].find((name) => name.includes(`${module}.lora_A`))!)!;
  t.equal(tensor.dtype, "F32");
  for (let at = tensor.byteOffset; at < tensor.byteOffset + tensor.byteLength; at += 4)
    bytes.writeFloatLE(1e20 * bytes.readFloatLE(at), at);
  await writeFile(weights, bytes);
  await json(0, "pack", role.file, "-o", join(folder, "p.eigen"));
  await json(0, "pack", role.file, "-o", join(folder, "k.eigen"), "--k", "2");
  await json(0, "hub", "shard", path, "-o", join(folder, "s.part"));
  await json(0, "hub", "shard", role.file, "-o", join(folder, "t.part"));
  await json(0, "hub", "merge", join(folder, "t.part"), "--k", "2", "-o", join(folder, "b.eigen"));
  const pack = ["pack", role.file, path, "-o", join(folder, "q.eigen")];
  const commands: string[][] = [
    pack,
    ...[
      ["--error", "0.01"],
      ["--bytes", "80kB"],
      ["--k", "2"],
      ["--energy", "1"],
    ].map((more) => [...pack, ...more]),
    [...pack, "--energy", "1", "--dtype", "f32"],
    [...pack, "--workers", "2"],
    ["add", join(folder, "p.eigen"), path],
    ["add", join(folder, "k.eigen"), path],
    ["hub", "project", join(folder, "b.eigen"), path, "-o", join(folder, "t.tasks")],
    ["hub", "merge", join(folder, "s.part"), "--k", "2", "-o", join(folder, "c.eigen")],
  ];
  for (const command of commands) {
    const { error } = await json(1, ...command);
    const at = { tag: "adapter", field: module, file: command[1] === "merge" ? join(folder, "s.part") : path };
    t.match(error, { ...at, message: /scale the adapter down/ }, command.join(" "));
  }
});

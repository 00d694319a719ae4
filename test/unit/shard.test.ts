/**
 * Packs from parts: the same basis and the same pack however the adapters are spread, on real adapters, with a side
 * kept as rows (own-seed: 160 rows of width 384) or as a Gram matrix (hub: 424); damaged, mixed or hostile parts;
 * restarts.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { cp, readdir, readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { type Adapter, type BuildOptions, buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { firstModules, withTerms } from "../support/adapters.ts";
import { json, words } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { type SafetensorsEntry, shuffle, uniform } from "../support/internals/base.ts";
import {
  adapterStatistics,
  allOf,
  assemblePack,
  type BasisOptions,
  buildBasis,
  type Gauge,
  mergeStatistics,
  openStatistics,
  openTasks,
  projectTasks,
  type Statistics,
  type StatisticsPart,
  summaryKind,
  toBytes,
  writePart,
  writeStatistics,
} from "../support/internals/pack.ts";
import { concat, data, packDifference, packed } from "../support/packs.ts";
import { soak } from "../support/required.ts";

const F32 = { basis: "f32", coefficients: "f32", head: "f32" } as const;
const K16 = { kind: "k", k: 16 } as const;

const own = (await readAdapters([data("adapters/own-seed")])).map((adapter) => firstModules(adapter, 3));
const hub = (await readAdapters([data("adapters/hub")])).map((adapter) => firstModules(adapter, 2));
t.teardown(() => Promise.all([...own, ...hub].map((adapter) => adapter.close())));

async function collect(chunks: AsyncIterable<Uint8Array>): Promise<Uint8Array<ArrayBuffer>> {
  return concat(await allOf(chunks));
}

/** Statistics read back from a part. */
async function part(statistics: Statistics, made = "test"): Promise<StatisticsPart> {
  return openStatistics(await collect(writeStatistics(statistics, made)));
}

const shard = async (
  adapters: readonly Adapter[],
  options: Pick<BuildOptions, "gauge" | "rank" | "normalize"> = {},
): Promise<StatisticsPart> => part(await adapterStatistics(adapters, options));

const shuffled = <T>(items: readonly T[], seed: number): T[] => shuffle([...items], uniform(seed));

function split<T>(items: readonly T[], count: number): T[][] {
  return Array.from({ length: count }, (_, i) => items.filter((__, at) => at % count === i));
}

/** Merges two by two, written and read again at every level. */
async function tree(parts: StatisticsPart[]): Promise<StatisticsPart> {
  while (parts.length > 1) {
    const next: StatisticsPart[] = [];
    for (let i = 0; i < parts.length; i += 2) next.push(await part(await mergeStatistics(parts.slice(i, i + 2))));
    parts = next;
  }
  return parts[0]!;
}

const basisOf = async (statistics: Statistics, options: BasisOptions): Promise<Pack> =>
  openPack(concat(await allOf((await buildBasis(statistics, options)).chunks)));

/** Makes a pack from parts: tasks spread over `count` of them, in any order. */
async function assembled(
  basis: Pack,
  adapters: readonly Adapter[],
  count: number,
  dtype: BuildOptions["dtype"],
): Promise<Uint8Array> {
  const parts = [];
  for (const few of split(shuffled(adapters, count), count)) {
    const chunks = await projectTasks(basis, few, "test", dtype ? { dtype } : {});
    parts.push(await openTasks(await collect(chunks)));
  }
  return collect((await assemblePack(basis, shuffled(parts, 7))).chunks);
}

t.test("rows kept: 1, 3 and 7 shards, any order, a tree: the bytes of one machine's pack", async (t) => {
  const settings: (BuildOptions & { gauge: Gauge; centering: "keep" | "none" })[] = [
    { gauge: "as-trained", centering: "keep", select: K16, dtype: F32 },
    { gauge: "as-trained", centering: "none", normalize: true, select: { kind: "energy", share: 0.7 } },
    {
      gauge: "balanced",
      centering: "none",
      select: { kind: "energy", share: 1 },
      dtype: { basis: "int8", coefficients: "f16", head: "f32" },
    },
    {
      gauge: "balanced",
      centering: "none",
      rank: 3,
      select: K16,
      dtype: { basis: "int4", coefficients: "int4", head: "f16" },
    },
  ];
  for (const options of settings) {
    const { gauge, centering, rank, normalize, select, dtype } = options;
    const { chunks } = await buildPack(own, options);
    for (const count of soak || options === settings[0] ? [1, 3, 7] : [3]) {
      const parts = await Promise.all(
        split(shuffled(own, count), count).map((few) => shard(few, { gauge, rank, normalize })),
      );
      for (const statistics of [await mergeStatistics(shuffled(parts, 3)), await tree(parts)]) {
        const basis = await basisOf(statistics, {
          centering,
          select: select!,
          ...(dtype?.basis ? { dtype: dtype.basis } : {}),
        });
        const pack = await assembled(basis, own, count, dtype);
        t.ok(Buffer.from(pack).equals(concat(chunks)), `${gauge}, ${centering}, ${count} shards`);
      }
    }
  }
});

t.test("Gram matrices kept: the same basis and tasks up to 1e-6", async (t) => {
  const loud = [
    withTerms(hub[0]!, ({ Bt, ...term }) => ({ ...term, Bt: Bt.map((value) => value * 1000) })),
    ...hub.slice(1),
  ];
  const select = { kind: "k", k: 32 } as const;
  const packs: Pack[] = [];
  for (const [adapters, normalize] of [
    [hub, false],
    [loud, true],
  ] as const) {
    const one = await packed(adapters, { select, normalize, dtype: F32 });
    for (const count of [1, 3, 7]) {
      const parts = await Promise.all(split(shuffled(adapters, count), count).map((few) => shard(few, { normalize })));
      const merged = await mergeStatistics(shuffled(parts, 3));
      t.equal((await merged.side(merged.modules.keys().next().value!, "A")).kind, "gram");
      for (const statistics of [merged, await tree(parts)]) {
        const basis = await basisOf(statistics, { select, dtype: "f32" });
        const pack = await openPack(await assembled(basis, adapters, count, F32));
        t.same([...pack.tasks.keys()], [...one.tasks.keys()]);
        const off = await packDifference(pack, one);
        t.ok(
          off.bases < 1e-6 && off.coefficients < 1e-6,
          `${normalize ? "normalized, " : ""}${count} shards: ${off.bases}, ${off.coefficients}`,
        );
      }
    }
    packs.push(one);
  }
  const apart = await packDifference(packs[0]!, packs[1]!);
  t.ok(
    apart.bases > 1e-3 && apart.coefficients > 1e-3,
    `another setting, another pack: ${apart.bases}, ${apart.coefficients}`,
  );
});

t.test("what needs all adapters at once is refused by name", async (t) => {
  const balanced = await shard(own.slice(0, 2), { gauge: "balanced" });
  await t.rejects(buildBasis(balanced, { centering: "keep" }), { name: "RangeError", message: /centering "none"/ });
  await t.rejects(buildBasis(balanced, { centering: "none", select: { kind: "k", k: 0 } }), RangeError);
});

t.test("parts that do not belong together are refused by file and reason", async (t) => {
  const [a, b] = [await shard(own.slice(0, 3)), await shard(own.slice(3, 5))];
  await t.rejects(mergeStatistics([a, b, await shard(own.slice(2, 3))]), {
    tag: "task",
    task: own[2]!.id,
    message: /counts once/,
  });
  await t.rejects(adapterStatistics([own[0]!, own[0]!]), { tag: "task", task: own[0]!.id, message: /counts once/ });
  await t.rejects(mergeStatistics([a, await shard(own.slice(3, 5), { gauge: "balanced" })]), {
    tag: "adapter",
    field: "gauge",
    message: /balanced.*as-trained/,
  });
  const other = own.slice(5, 6).map((adapter) => ({ ...adapter, baseModel: "another/model" }));
  await t.rejects(mergeStatistics([a, await shard(other)]), { tag: "adapter", message: /another\/model.*anyBase/ });
  t.equal((await mergeStatistics([a, await shard(other)], { anyBase: true })).adapters.length, 4);
  const [name, module] = [...own[5]!.modules][0]!;
  const wider = { ...own[5]!, modules: new Map([[name, { ...module, out: 96, rank: 32 }]]) };
  await t.rejects(mergeStatistics([a, await shard([wider])]), { tag: "adapter", field: name, message: /\[96, 384\]/ });

  const basis = await basisOf(await mergeStatistics([a, b]), { select: K16 });
  const another = await basisOf(a, { select: K16 });
  const tasks = async (on: Pack, adapters: Adapter[], types = {}) =>
    openTasks(await collect(await projectTasks(on, adapters, "test", { dtype: types })));
  const [first, second] = [await tasks(basis, own.slice(0, 2)), await tasks(basis, own.slice(2, 3))];
  await t.rejects(assemblePack(another, [first]), { tag: "adapter", field: "basis", message: /project it again/ });
  await t.rejects(assemblePack(basis, [first, second, first]), {
    tag: "task",
    task: own[0]!.id,
    message: /both hold the task/,
  });
  await t.rejects(assemblePack(basis, [first, await tasks(basis, own.slice(3, 4), { coefficients: "int8" })]), {
    tag: "adapter",
    field: "coefficients",
    message: /int8.*f16/,
  });
  const [whole, cut] = [
    await shard(own.slice(0, 2), { gauge: "balanced" }),
    await shard(own.slice(2, 4), { gauge: "balanced", rank: 3 }),
  ];
  await t.rejects(mergeStatistics([whole, cut]), {
    tag: "adapter",
    field: "rank",
    message: /rank is .*make one of them again/,
  });
  await t.rejects(adapterStatistics(own, { rank: 3 }), { name: "RangeError", message: /balanced/ });

  await t.rejects(projectTasks(basis, [own[0]!, own[0]!], "test"), { tag: "task", message: /counts once/ });
  await t.rejects(projectTasks(basis, [wider], "test"), { tag: "adapter", field: name, message: /another model/ });
  // A pack with tasks serves as a basis too: they stay.
  const begun = await openPack(await collect((await assemblePack(basis, [first])).chunks));
  const grown = await openPack(await collect((await assemblePack(begun, [second])).chunks));
  t.same(
    [...grown.tasks.keys()],
    own.slice(0, 3).map(({ id }) => id),
  );
  await t.rejects(assemblePack(begun, [first]), { tag: "task", task: own[0]!.id, message: /both hold the task/ });
});

t.test("every damage of a part is found: each byte of the header, samples of the rest, every length", async (t) => {
  const few = [firstModules(own[0]!, 1)];
  const statistics = await shard(few);
  const basis = await basisOf(statistics, { select: K16 });
  const parts: [string, Uint8Array, (bytes: Uint8Array) => Promise<unknown>][] = [
    [
      "statistics",
      await collect(writeStatistics(statistics, "test")),
      async (bytes) => {
        const opened = await openStatistics(bytes);
        for (const name of opened.modules.keys()) {
          await opened.ranks(name);
          for (const side of ["A", "B"] as const) await opened.side(name, side);
        }
      },
    ],
    [
      "tasks",
      await collect(await projectTasks(basis, few, "test")),
      async (bytes) => collect((await assemblePack(basis, [await openTasks(bytes)])).chunks),
    ],
  ];
  for (const [kind, bytes, use] of parts) {
    await use(bytes);
    const header = 8 + new DataView(bytes.buffer).getUint32(0, true);
    const random = uniform(1);
    const places = [
      ...Array(header).keys(),
      ...Array.from({ length: 200 }, () => header + Math.floor(random() * (bytes.length - header))),
    ];
    for (const at of places) {
      const damaged = bytes.slice();
      damaged[at]! ^= 1 << (at % 8);
      const found = await use(damaged).then(
        () => "nothing",
        (error: { tag?: string }) => error.tag ?? "untagged",
      );
      if (found !== "format") t.fail(`${kind}, byte ${at}: ${found}`);
    }
    for (let i = 0; i < 100; i++) {
      const found = await use(bytes.slice(0, Math.floor((bytes.length * i) / 100))).then(
        () => "nothing",
        (error: { tag?: string }) => error.tag ?? "untagged",
      );
      if (found !== "format" && found !== "source") t.fail(`${kind}, cut at ${i} %: ${found}`);
    }
    await t.rejects(use(concat([bytes, new Uint8Array(1)])), { tag: "format", message: /byte/ });
    t.pass(`${kind}: ${places.length} bytes`);
  }
  await t.rejects(openStatistics(parts[1]![1]), { tag: "format", message: /holds tasks.*shard/ });
  await t.rejects(openTasks(parts[0]![1]), { tag: "format", message: /holds statistics.*project/ });
  await t.rejects(openStatistics(concat(await allOf((await buildBasis(statistics)).chunks))), {
    tag: "format",
    message: /this is an EigenLoRA pack, not a part/,
  });
  await t.rejects(openStatistics(await readFile(data("adapters/own-seed/debtags-game/adapter_model.safetensors"))), {
    tag: "format",
    message: /not a part/,
  });
  await t.rejects(openStatistics(new Uint8Array(0)), { tag: "format", message: /0 bytes/ });
});

t.test("parts that lie with good checksums are refused", async (t) => {
  const adapters = [{ id: "a" }, { id: "b" }];
  const module = { name: "m", out: 2, in: 3, layout: "out-in", rows: 2 };
  const f64 = (name: string, shape: number[], values: number[]): SafetensorsEntry => ({
    name,
    dtype: "F64",
    shape,
    read: () => toBytes(Float64Array.from(values)),
  });
  const ranks: SafetensorsEntry = {
    name: "m.ranks",
    dtype: "U32",
    shape: [2],
    read: () => toBytes(Uint32Array.of(1, 1)),
  };
  const rows = f64("m.A.rows", [2, 3], [1, 2, 3, 4, 5, 6]);
  const gram = [f64("m.B.gram", [3], [1, 0, 1]), f64("m.B.sums", [3], [1, 1, 2])];
  const good = { gauge: "as-trained", adapters, modules: [module] };
  const lie = async (about: object, entries: SafetensorsEntry[]): Promise<StatisticsPart> =>
    openStatistics(await collect(writePart("statistics", "x", about as never, entries)));
  t.equal(summaryKind(2, 3), "rows");
  t.equal(summaryKind(2, 2), "gram");
  t.equal((await lie(good, [rows, ...gram, ranks])).modules.size, 1, "the honest one opens");
  const cases: [string, object, SafetensorsEntry[], RegExp][] = [
    ["another gauge", { ...good, gauge: "loose" }, [rows, ...gram, ranks], /"loose" is unknown/],
    ["no adapters", { ...good, adapters: [] }, [rows, ...gram, ranks], /no adapters/],
    [
      "an adapter twice",
      { ...good, adapters: [{ id: "a" }, { id: "a" }] },
      [rows, ...gram, ranks],
      /not sorted, or one is there twice/,
    ],
    [
      "a control character",
      { ...good, adapters: [{ id: "a" }, { id: "b\n" }] },
      [rows, ...gram, ranks],
      /cannot name a task/,
    ],
    ["a module twice", { ...good, modules: [module, module] }, [rows, ...gram, ranks], /two modules/],
    ["a tensor missing", good, [rows, gram[0]!, ranks], /m\.B\.sums is missing/],
    ["another shape", { ...good, modules: [{ ...module, rows: 1 }] }, [rows, ...gram, ranks], /expected F64 \[1,3\]/],
    [
      "rows beyond memory",
      { ...good, modules: [{ ...module, in: 2 ** 31 - 1, out: 2 ** 31 - 1 }] },
      [rows, ...gram, ranks],
      /expected F64/,
    ],
    [
      "another layout",
      { ...good, modules: [{ ...module, layout: "__proto__" }] },
      [rows, ...gram, ranks],
      /is unknown here/,
    ],
  ];
  for (const [name, about, entries, message] of cases)
    await t.rejects(lie(about, entries), { tag: "format", message }, name);
  const nan = await lie(good, [f64("m.A.rows", [2, 3], [1, 2, NaN, 4, 5, 6]), ...gram, ranks]);
  await t.rejects(nan.side("m", "A"), { tag: "format", part: "tensor m.A.rows", message: /value 2 is NaN/ });
  const more = await lie(good, [rows, ...gram, { ...ranks, read: () => toBytes(Uint32Array.of(1, 7)) }]);
  await t.rejects(more.ranks("m"), { tag: "format", message: /add up to 8, expected 2/ });
});

t.test("the commands: restarts, interruptions, refusals, the keys of the contract", async (t) => {
  const folder = workIn(t);
  const main = fromRoot("dist/src/cli/main.js");
  for (const name of ["debtags-game", "debtags-role", "sections-0"])
    await cp(data(`adapters/own-seed/${name}`), join(folder, name), { recursive: true });
  const bytes = (name: string): Promise<Buffer> => readFile(join(folder, name));

  const first = await json(0, "hub", "shard", "debtags-game", "debtags-role", "-o", "a.part");
  t.match(first, {
    file: "a.part",
    adapters: 2,
    modules: 12,
    gauge: "as-trained",
    present: false,
    bytes: (await stat(join(folder, "a.part"))).size,
  });
  const before = await bytes("a.part");
  t.equal(
    (await json(0, "hub", "shard", "debtags-role", "debtags-game", "-o", "a.part"))["present"],
    true,
    "the same again is there already",
  );
  t.equal((await json(0, "hub", "shard", "debtags-game", "debtags-role", "-o", "again.part"))["present"], false);
  t.ok(before.equals(await bytes("again.part")), "the same input, the same bytes");
  t.equal(
    (await json(0, ...words`hub shard debtags-game debtags-role --gauge balanced -o again.part --force`))["present"],
    false,
    "another setting",
  );
  t.equal(
    (await json(0, ...words`hub shard debtags-game debtags-role --as debtags-game=games -o a.part --force`))["present"],
    false,
    "another name",
  );
  const damaged = Buffer.from(before);
  damaged[damaged.length - 500]! ^= 1;
  await writeFile(join(folder, "a.part"), damaged);
  const again = ["hub", "shard", "debtags-game", "debtags-role", "-o", "a.part"];
  t.match(
    (await json(2, ...again))["error"].message,
    /a\.part: already exists; .*--force/,
    "a damaged part is another file",
  );
  t.equal((await json(0, ...again, "--force"))["present"], false, "which is made again");
  t.ok(before.equals(await bytes("a.part")));

  // Killed at any moment, it leaves no part or a whole one.
  for (const delay of [40, 120, 180, 240]) {
    const child = spawn(process.execPath, [main, "hub", "shard", data("adapters/hub"), "-o", "killed.part"], {
      cwd: folder,
      stdio: "ignore",
    });
    await new Promise((resolve) => setTimeout(resolve, delay));
    child.kill("SIGKILL");
    await once(child, "exit");
    if ((await readdir(folder)).includes("killed.part"))
      await openStatistics(join(folder, "killed.part")).then((found) => found.close());
  }
  t.equal(
    (await json(0, "hub", "shard", "sections-0", "-o", "killed.part", "--force"))["adapters"],
    1,
    "a rerun is not in the way of what was left",
  );

  await json(0, "hub", "shard", "sections-0", "-o", "b.part");
  const merged = await json(0, "hub", "merge", "b.part", "a.part", "--part", "-o", "ab.part");
  t.match(merged, { adapters: 3, modules: 12, present: false });
  t.equal((await json(0, "hub", "merge", "a.part", "b.part", "--part", "-o", "ab.part"))["present"], true);
  await json(0, "hub", "merge", "ab.part", "--k", "8", "-o", "tree.eigen");
  const found = await json(0, "hub", "merge", "a.part", "b.part", "--k", "8", "-o", "basis.eigen");
  t.match(found, {
    file: "basis.eigen",
    adapters: 3,
    modules: 12,
    gauge: "as-trained",
    centering: "keep",
    dtype: "f16",
    components: { min: 8, max: 8 },
  });
  t.ok((await bytes("tree.eigen")).equals(await bytes("basis.eigen")));
  t.match(await json(0, "inspect", "basis.eigen"), { tasks: [], breakEvenTasks: null });
  t.equal((await json(0, "verify", "basis.eigen"))["ok"], true);
  t.match(await json(0, "hub", "project", "basis.eigen", "debtags-game", "-o", "1.part"), {
    adapters: 1,
    present: false,
    residual: [{ id: "debtags-game" }],
  });
  t.match(await json(0, "hub", "project", "basis.eigen", "debtags-game", "-o", "1.part"), {
    present: true,
    residual: [{ id: "debtags-game" }],
  });
  await json(0, "hub", "project", "basis.eigen", "debtags-role", "sections-0", "-o", "2.part");
  const done = await json(0, "hub", "assemble", "basis.eigen", "2.part", "1.part", "-o", "tasks.eigen");
  const one = await json(0, "pack", "debtags-game", "debtags-role", "sections-0", "--k", "8", "-o", "one.eigen");
  for (const key of ["tasks", "modules", "bytes", "adapterBytes", "ratio", "breakEvenTasks"])
    t.same(done[key], one[key], key);
  t.ok(Math.abs(done["error"].mean - one["error"].mean) < 1e-9 && done["error"].max === one["error"].max);
  t.ok((await bytes("tasks.eigen")).equals(await bytes("one.eigen")));
  await json(0, "add", "basis.eigen", "sections-0");
  t.equal((await json(0, "inspect", "basis.eigen"))["tasks"].length, 1, "a basis takes tasks like any pack");

  // A retrained adapter is a different one, whatever its name and size.
  const weights = join(folder, "sections-0", "adapter_model.safetensors");
  const values = await readFile(weights);
  values[values.length - 1]! ^= 1;
  await writeFile(weights, values);
  t.equal((await json(0, "hub", "shard", "sections-0", "-o", "b.part", "--force"))["present"], false);

  const refusals: [number, RegExp, ...string[]][] = [
    [2, /unknown option '--mode'/, "hub", "shard", "sections-0", "--mode", "joint", "-o", "x"],
    [2, /would overwrite/, "hub", "merge", "a.part", "-o", "a.part"],
    [2, /--part and --k exclude each other/, "hub", "merge", "a.part", "--part", "--k", "3", "-o", "x"],
    [2, /unknown option '--error'/, "hub", "merge", "a.part", "--error", "0.3", "-o", "x"],
    [2, /"basis" is not one of coeff/, "hub", "project", "b", "x", "--dtype", "basis=f32", "-o", "x"],
    [2, /--names needs --base/, "hub", "merge", "a.part", "--names", "q=w", "-o", "x"],
    [1, /both hold/, "hub", "merge", "a.part", "ab.part", "-o", "x"],
    [1, /holds tasks/, "hub", "merge", "1.part", "-o", "x"],
    [1, /holds statistics/, "hub", "assemble", "basis.eigen", "a.part", "-o", "x"],
    [1, /projected onto the basis/, "hub", "assemble", "basis.eigen", "1.part", "3.part", "-o", "x"],
  ];
  await json(0, "hub", "shard", "debtags-role", "-o", "r.part");
  await json(0, "hub", "merge", "r.part", "--k", "3", "-o", "r.eigen");
  await json(0, "hub", "project", "r.eigen", "debtags-role", "-o", "3.part");
  for (const [status, message, ...args] of refusals)
    t.match((await json(status, ...args))["error"].message, message, args.join(" "));
  t.notOk((await readdir(folder)).includes("x"), "a refusal writes nothing");
});

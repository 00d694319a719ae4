/**
 * The benchmark of sizes: measurements agree with the packer's report and with other numbers of adapters, and tables with measurements.
 * No model runs.
 */
import { readdirSync, readFileSync } from "node:fs";
import { buildPack } from "eigenlora/build";
import t from "tap";
import { bytesOfAdapter, SUITES } from "../benchmarks/lib/adapters.js";
import { Rows } from "../benchmarks/lib/rows.js";
import { CURVES, type Curve, measureSizes, pairsOf } from "../benchmarks/research/size/curve.js";
import { curvePage, curveTables, published } from "../benchmarks/research/size/curve-tables.js";
import { drawCurves, drawFigures } from "../benchmarks/research/size/figures.js";
import { keyOf, measure, type Row } from "../benchmarks/research/size/measure.js";
import { Peers } from "../benchmarks/research/size/peers.js";
import { Suite } from "../benchmarks/research/size/suite.js";
import { Reader, tables } from "../benchmarks/research/size/tables.js";
import {
  byThemselves,
  codedSeries,
  found,
  frontier,
  grid,
  nameOf,
  small,
  type Way,
  within,
} from "../benchmarks/research/size/ways.js";
import { data } from "./packs.ts";

const none = new Peers(undefined, "not in tests");
const suite = await Suite.open("own-seed");
t.teardown(() => suite.close());

t.test("sizes and sets of adapters", async (t) => {
  // Curves leave out same-script: docs/inside.md has its sizes.
  t.same([...SUITES, "same-script"].sort(), readdirSync(data("adapters")).sort());
  t.same(suite.sizes, [5, 10, 20]);
  const ids = (n: number) => suite.take(n).map(({ id }) => id);
  t.equal(ids(5).length, 5);
  t.same(
    ids(10).filter((id) => ids(5).includes(id)),
    ids(5),
    "a larger set holds the smaller ones",
  );
  t.same(
    ids(20),
    suite.adapters.map(({ id }) => id),
  );
  for (const adapter of suite.adapters) {
    const headers = adapter.byteLength - bytesOfAdapter(adapter);
    t.ok(headers > 0 && headers < 4096, `${adapter.id}: f32 files are their numbers and a header of ${headers} bytes`);
  }
});

t.test("every way has a name of its own, and no more components than there are", (t) => {
  for (const n of [5, 10, 20, 53]) {
    const ways: Way[] = [...byThemselves(), ...frontier(n), ...small(n), ...grid(n), ...found(n), ...within()];
    const names = new Map(ways.map((way) => [JSON.stringify(way), nameOf(way)]));
    t.equal(new Set(names.values()).size, names.size, `${n}: ${names.size} names`);
    for (const way of grid(n)) {
      if (way.kind !== "pack" || way.options.select?.kind !== "k") continue;
      t.ok(way.options.select.k < (way.options.mode === "flat" ? n : 8 * n), nameOf(way));
    }
  }
  t.equal(nameOf(small(20)[2]!), "balanced column K 48, rank 4, int3, heads int4");
  for (const { suite, series } of CURVES) {
    const ways = series.flat();
    t.equal(new Set(ways.map(nameOf)).size, ways.length, `${suite}: ${ways.length} coded packs`);
  }
  t.same(
    codedSeries(0.08, 2, [{ k: 0 }, { k: 8, rank: 3, privateTerms: 2 }]).map(([, way]) => nameOf(way!)),
    ["SVD-cut, coded, step 0.0566", "coded K 8, rank 3, private 2, step 0.0566"],
  );
  t.end();
});

t.test("bytes and errors as the packer reports them", async (t) => {
  for (const name of ["column K 16, f32", "balanced column K 16, int4", "balanced flat K 4, int8"]) {
    const way = grid(5).find((one) => nameOf(one) === name)!;
    if (way.kind !== "pack") throw new Error(name);
    const row = await measure(suite, 5, way, false, none);
    const { report } = await buildPack(suite.take(5), way.options);
    t.match(row, { suite: "own-seed", n: 5, way: name, bytes: report.bytes });
    t.ok(Math.abs(row.error! - report.error.mean) < 1e-4, `${name}: ${row.error} and ${report.error.mean}`);
  }
});

t.test("a search keeps to the bytes of another way, and tables show both", async (t) => {
  const theirs = byThemselves().find((way) => nameOf(way) === "cut to rank 2, int4")!;
  const way = within().find((one) => nameOf(one.within) === nameOf(theirs))!;
  const rows = [await measure(suite, 20, theirs, false, none)];
  const reader = new Reader(rows, [suite]);
  const most = reader.fileBytes(suite, 5, nameOf(theirs));
  const headers = suite.take(5).reduce((sum, adapter) => sum + adapter.byteLength - bytesOfAdapter(adapter), 0);
  t.equal(most, reader.points(suite, 5)[0]!.bytes + headers);
  t.ok(Number.isNaN(reader.fileBytes(suite, 5, "lorashare K 32")), "what was not measured");
  rows.push(await measure(suite, 5, way, false, none, most));
  const [row] = tables(reader).find(({ question }) =>
    /own-seed, 5 adapters: .* within the bytes of others/.test(question),
  )!.rows;
  t.match(row, {
    name: "cut to rank 2, int4",
    kB: most / 1000,
    "auto, kB": rows[1]!.bytes / 1000,
    "auto, ΔW error": rows[1]!.error,
  });
  t.ok(rows[1]!.bytes <= most && rows[1]!.error! < Number(row!["ΔW error"]), `${rows[1]!.bytes} B, ${rows[1]!.error}`);
});

t.test("ways by themselves: fewer adapters give what they give alone", async (t) => {
  const rows: Row[] = [];
  const ways = grid(20).filter((way) => way.kind === "each");
  for (const way of [...ways, byThemselves().find(({ kind }) => kind === "heads")!])
    rows.push(await measure(suite, 20, way, false, none));
  const points = new Reader(rows, [suite]).points(suite, 5);
  t.equal(points.length, rows.length);
  for (const way of ways.filter((_, i) => i % 5 === 0)) {
    const { bytes, error } = await measure(suite, 5, way, false, none);
    const point = points.find((one) => one.way === nameOf(way))!;
    t.equal(point.bytes, bytes, nameOf(way));
    t.ok(Math.abs(point.error! - error!) < 1e-4, `${point.error} and ${error}`);
  }
  const whole = points.find(({ way }) => way === "LoRA, f32")!;
  t.equal(
    whole.bytes,
    suite.take(5).reduce((sum, adapter) => sum + bytesOfAdapter(adapter), 0),
  );
  t.equal(whole.error, 0);
  const cut = (rank: number) => points.find(({ way }) => way === `cut to rank ${rank}, f32`)!.error!;
  t.ok(cut(1) > cut(2) && cut(2) > cut(4) && cut(4) > 0);
});

t.test("coded and shared by nobody: what each adapter is by itself", async (t) => {
  const [[way]] = codedSeries(0.02, 2, [{ k: 0, privateTerms: 16 }]) as [[Way]];
  const { error } = await measure(suite, 5, way, false, none);
  const alone = [];
  for (const adapter of suite.take(5)) {
    const single = new Suite("own-seed", [adapter]);
    alone.push((await measure(single, 1, way, false, none)).error!);
  }
  const mean = alone.reduce((a, b) => a + b, 0) / 5;
  t.ok(error! > 0.2 && Math.abs(error! - mean) < 1e-4, `${error} and ${mean}`);
});

t.test("a curve: choices by ΔW error and text within equal bytes; bytes alone are measured again", async (t) => {
  const curve: Curve = {
    ...{ suite: "own-seed", n: 5, most: 30_000, judges: true, answers: true },
    series: [
      ...codedSeries(0.04, 2, [{ k: 0, privateTerms: 16 }]),
      ...codedSeries(
        0.04,
        2,
        [4, 8].map((k) => ({ k, rank: 2 })),
      ),
    ],
  };
  const rows = await new Rows<Row>(new URL(`file://${t.testdir()}/rows.jsonl`), keyOf).load();
  const measuring = { suite, rows, due: () => false, peers: none, again: false, keep: (row: Row) => rows.add(row) };
  await measureSizes(curve, measuring);
  const first = rows.all();
  t.ok(first.length > 6 && first[0]!.way === "LoRA, f32", `${first.length} rows`);
  const pairs = pairsOf(curve, first);
  t.ok(pairs.length > 1 && pairs.some(({ ours }) => ours));
  const shared = first.filter(({ way }) => way.startsWith("coded "));
  for (const { theirs, ours, judged } of pairs) {
    const fitting = shared.filter(({ bytes }) => bytes <= theirs.bytes).map(({ error }) => error!);
    t.equal(ours?.error, fitting.length > 0 ? Math.min(...fitting) : undefined, `${theirs.bytes} B`);
    t.equal(judged, undefined, "nothing was judged");
  }
  const { theirs, ours } = pairs.at(-1)!;
  await rows.add({ ...ours!, bytes: ours!.bytes - 1, accuracy: [0.5, 0.5], divergence: 0.25 });
  await rows.add({ ...theirs, error: 0.5, accuracy: [0.5, 0.5] });
  t.equal(pairsOf(curve, rows.all()).at(-1)!.judged?.way, ours!.way);
  await measureSizes(curve, { ...measuring, again: true });
  t.match(
    rows.get(ours!),
    { bytes: ours!.bytes, accuracy: [0.5, 0.5], divergence: 0.25 },
    "the same numbers in other bytes",
  );
  t.equal(rows.get(theirs)!.accuracy, undefined, "other numbers are to be asked again");
  await rows.save();
  t.same((await new Rows<Row>(rows.file, keyOf).load()).all(), rows.all());
});

t.test("tables and figures of curves", (t) => {
  const [curve] = CURVES as [Curve];
  const [svd, , shared] = curve.series as [Way[], Way[], Way[]];
  const row = (way: Way, bytes: number, error: number, accuracy?: number, divergence?: number): Row => ({
    ...{ suite: "own-seed", n: 20, way: nameOf(way), bytes, error, seconds: 1 },
    ...(accuracy ? { accuracy: Array.from({ length: 20 }, (_, i) => accuracy + (i % 2) / 100) } : {}),
    ...(divergence ? { divergence } : {}),
  });
  const rows = [
    row(byThemselves()[0]!, 6_000_000, 0, 0.8),
    row(svd[2]!, 100_000, 0.5, 0.7, 0.2),
    row(svd[3]!, 200_000, 0.3, 0.78),
    row(shared[1]!, 90_000, 0.6, 0.74, 0.1),
    row(shared[2]!, 95_000, 0.7, 0.75, 0.05),
    row(shared[3]!, 190_000, 0.4, 0.76),
  ];
  const [part, ...rest] = curveTables(rows);
  t.same(rest, []);
  const near = (found: unknown, expected: number) => t.ok(Math.abs(Number(found) - expected) < 1e-9, `${found}`);
  t.match(part!.rows[0], { name: "100 kB", "× fewer": 60, "shared: error": 0.6 });
  near(part!.rows[0]!["difference"], 4);
  near(part!.rows[0]!["±"], 0);
  near(part!.rows[0]!["by text: %"], 75.5);
  near(part!.rows[1]!["difference"], -2);
  t.match(part!.notes!.at(-1), /ahead in accuracy at: 100 kB; not at: 200 kB/);
  t.ok(
    published().rows.every(({ source }) => source),
    "each with its source",
  );
  const distilled = { suite: "own-seed", way: "distilled", bytes: 98_000, accuracy: [0.77] };
  t.notMatch(drawCurves(rows, [distilled]).get("own-seed-curve"), />shared, distilled</, "which is not entropy-coded");
  const figures = drawCurves(rows, [{ ...distilled, before: { bytes: 97_000, accuracy: [0.74] } }]);
  t.same([...figures.keys()], ["own-seed-curve"]);
  for (const name of [/>cut by SVD</, />shared, by text</, />shared, distilled</, />before distilling</])
    t.match(figures.get("own-seed-curve"), name);
  t.end();
});

t.test("docs/research/size/curves.md is what was measured", async (t) => {
  const kept = new URL("../benchmarks/research/results/size.jsonl", import.meta.url);
  const page = readFileSync(new URL("../docs/research/size/curves.md", import.meta.url), "utf8");
  const { length } = readFileSync(kept);
  const rows = await new Rows<Row>(kept, keyOf).load();
  t.equal(readFileSync(kept).length, length, "no half a line");
  t.equal(page, curvePage(rows.all()), "run npm run bench size -- --minutes 0");
});

t.test("tables and figures of what there is", (t) => {
  const way = (name: string, bytes: number, error: number, accuracy?: number[]): Row => ({
    ...{ suite: "own-seed", n: 20, way: name, bytes, error, seconds: 1 },
    ...(accuracy ? { accuracy, same: accuracy } : {}),
  });
  const twenty = (value: number) => Array.from({ length: 20 }, () => value);
  const lora: Row = { ...way("LoRA, f32", 6000, 0, twenty(0.8)), sizes: twenty(300), errors: twenty(0) };
  const distilled = { suite: "own-seed", way: "column, int8, K 8, distilled", bytes: 500, accuracy: [0.7, 0.8] };
  const rows = [
    lora,
    way("column K 8, f32", 3000, 0.5, twenty(0.6)),
    way("column K 16, f32", 5000, 0.35),
    way("joint K 8, f32", 3500, 0.4),
  ];
  const reader = new Reader(rows, [suite], [distilled]);
  const parts = tables(reader);
  const behaviour = parts.find(({ question }) => /own-seed, 20 adapters: what/.test(question))!.rows;
  t.same(
    behaviour.map(({ name }) => name),
    ["column, int8, K 8, distilled (2 of 20 tasks)", "column K 8, f32", "LoRA, f32"],
  );
  t.match(behaviour[1], { kB: 3, "ΔW error": 0.5 });
  for (const [column, value] of [
    ["accuracy, %", 60],
    ["PEFT's answer, %", 60],
    ["to LoRA", -20],
  ] as const) {
    t.ok(Math.abs(Number(behaviour[1]![column]) - value) < 1e-9, `${column}: ${behaviour[1]![column]}`);
  }
  t.equal(behaviour[0]!["to LoRA"], null, "two tasks are not compared with twenty");
  const errors = parts.find(({ question }) => /own-seed, 20 adapters: fewest/.test(question))!.rows;
  t.match(
    errors.find(({ name }) => name === "column"),
    { "≤ 0.5": 3, "≤ 0.4": 5, "≤ 0.3": null },
  );
  t.match(
    errors.find(({ name }) => name === "joint"),
    { "≤ 0.8": 3.5, "≤ 0.4": 3.5, "≤ 0.3": null },
  );
  const five = parts.find(({ question }) => /own-seed, 5 adapters: what/.test(question))!.rows;
  t.same(
    five.map(({ name, kB }) => [name, kB]),
    [["LoRA, f32", 1.5]],
  );
  const figures = drawFigures(reader);
  t.same([...figures.keys()], ["own-seed-accuracy", "own-seed-error"]);
  for (const svg of figures.values()) t.match(svg, /^<svg [\s\S]*<\/svg>\n$/);
  for (const name of [/>packs, the best</, />paper: column, f32</, />LoRA</])
    t.match(figures.get("own-seed-accuracy"), name);
  t.same(drawFigures(new Reader([], [suite])), new Map());
  t.end();
});

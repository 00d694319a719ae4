import { readFile } from "node:fs/promises";
import { EigenLoraError, FormatError, openPack, type Pack } from "eigenlora";
import { buildPack, encodeTaskFile, type TaskEntry } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { crc32c, layoutAppend } from "../support/internals/format.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { applied, concat, data, LOSSLESS, packOf, vector } from "../support/packs.ts";
import { soak } from "../support/required.ts";
import { packBytes } from "../support/sessions.ts";

/** Tasks of the vector. */
const ids = ["terms", "whole", "head", "same head", "same again"];
const golden = new Uint8Array(await readFile(vector("every-kind.eigen")));
const goldenTask = new Uint8Array(await readFile(vector("whole.eigentask")));

t.test("task files", async (t) => {
  const pack = await openPack(golden);
  await t.rejects(pack.addTask("whole", goldenTask), /already/);
  await pack.addTask("again", goldenTask);
  t.same((await pack.load("again")).bytes, (await pack.load("whole")).bytes);
  t.equal(pack.tasks.get("again")!.resident, true);
  const other = goldenTask.slice();
  other[20]! ^= 1;
  new DataView(other.buffer).setUint32(60, crc32c(other.subarray(0, 60)), true);
  await t.rejects(pack.addTask("x", other), { tag: "task", message: /belongs to the basis/ });
  for (let at = 0; at < goldenTask.length; at++) {
    const broken = goldenTask.slice();
    broken[at]! ^= 0x10;
    const result = await pack.addTask(`bit ${at}`, broken).catch((e: unknown) => e);
    if (at !== 10 && at !== 11 && !(result instanceof EigenLoraError)) t.fail(`byte ${at} changed unnoticed`);
  }
  for (let cut = 0; cut < goldenTask.length; cut += 7) {
    await t.rejects(pack.addTask("cut", goldenTask.slice(0, cut)), { tag: "format", message: /./ });
  }
});

/** Opens a pack and reads everything, to catch what a reader could be made to believe. */
async function readAll(bytes: Uint8Array): Promise<Pack> {
  const pack = await openPack(bytes);
  (await pack.bases()).close();
  for (const id of pack.tasks.keys()) await pack.load(id);
  return pack;
}

t.test("the packer's files are read back, and say what they say", async (t) => {
  const { bytes, report } = await packOf(["adapters/own-seed/debtags-role", "adapters/own-seed/sections-0"]);
  const pack = await readAll(bytes);
  t.equal(bytes.length, report.bytes);
  t.equal(pack.window.superblock.committed, bytes.length);
  t.same([...pack.tasks.keys()], ["debtags-role", "sections-0"]);
  t.equal(pack.modules.length, 12);
  t.equal(pack.tasks.get("debtags-role")!.metadata.labels?.length, 8);
});

t.test("the same adapters give the same bytes", async (t) => {
  const paths = ["adapters/own-seed/debtags-role", "adapters/own-seed/sections-0"];
  for (const options of [{}, { gauge: "balanced", select: { kind: "k", k: 4 } }] as const) {
    t.ok(Buffer.from((await packOf(paths, options)).bytes).equals((await packOf([...paths].reverse(), options)).bytes));
  }
});

t.test("truncation at every length is refused", async (t) => {
  // Structure is at the beginning; the rest are numbers.
  const step = soak ? 1 : 3;
  for (let length = 0; length < golden.length; length += length < 2000 ? 1 : step) {
    const result = await readAll(golden.slice(0, length)).catch((e: unknown) => e);
    if (!(result instanceof FormatError)) t.fail(`${length} bytes: ${String(result)}`);
  }
  t.match(await openPack(golden.slice(0, 5000)).catch((e: Error) => e.message), /truncated/);
});

t.test("an append leaves a readable pack at every byte of the way", async (t) => {
  const pack = await openPack(golden);
  const blob = (await pack.load("terms")).bytes;
  const tasks = ["one", "two"].map((id) => ({ entry: { id, adapterBytes: 7, metadata: { labels: [id] } }, blob }));
  const plan = await layoutAppend(pack, tasks);
  const body = concat(plan.body);
  const grown = concat([golden, body]);
  for (let written = 0; written <= body.length; written += written % 64 === 0 ? 1 : 13) {
    t.same([...(await readAll(grown.slice(0, golden.length + written))).tasks.keys()], ids);
  }
  for (let written = 0; written < 64; written++) {
    const torn = grown.slice();
    torn.set(plan.superblock.subarray(0, written), plan.superblockOffset);
    t.same([...(await readAll(torn)).tasks.keys()], ids, `superblock torn at ${written}`);
  }
  grown.set(plan.superblock, plan.superblockOffset);
  const after = await readAll(grown);
  t.same([...after.tasks.keys()], [...ids, "one", "two"]);
  t.equal(after.basisId, pack.basisId);
  t.same(after.tasks.get("two")!.metadata, { labels: ["two"] });
  for (const id of pack.tasks.keys())
    t.same((await after.load(id)).bytes, (await pack.load(id)).bytes, `${id} is untouched`);
  const cold = await openPack(grown);
  (await cold.bases()).close();
  await cold.load("two");
  t.equal(cold.reads.requests, 4, "after an append directory and bases are two reads");
  const again = await layoutAppend(after, [{ ...tasks[0]!, entry: { ...tasks[0]!.entry, id: "three" } }]);
  t.not(again.superblockOffset, plan.superblockOffset, "superblocks take turns");
  t.equal((await readAll(applied(grown, again))).tasks.size, 8);
});

t.test("metadata is checked where a pack is opened, and where a task is written", async (t) => {
  const pack = await openPack(golden);
  const blob = (await pack.load("terms")).bytes;
  const [adapter] = await readAdapters([data("sessions/adapters/two")]);
  const open = async (entry: TaskEntry): Promise<Pack> =>
    openPack(applied(golden, await layoutAppend(pack, [{ entry, blob }])));
  let deep: unknown = 1;
  for (let i = 0; i < 13; i++) deep = [deep];
  const long = { labels: ["é".repeat(512), ...Array(65_535).fill("a")], license: "x".repeat(4096), origin: "y", deep };
  for (const metadata of [{}, { labels: ["one"] }, long]) {
    const entry = { id: "four", adapterBytes: 0, metadata };
    t.same((await open(entry)).tasks.get("four")!.metadata, metadata);
    t.same(parseTaskFile(encodeTaskFile(entry, pack.basisId, blob), "four").metadata, metadata);
  }
  const bad: [metadata: TaskEntry["metadata"], where: RegExp][] = [
    ...[5, "yes", {}, [], [1], ["yes", null], ["yes", ""], ["é".repeat(513)], Array(65_537).fill("a")].map(
      (labels): [TaskEntry["metadata"], RegExp] => [{ labels: labels as string[] }, /\.metadata\.labels(\[\d+\])?: /],
    ),
    [{ license: 1 as unknown as string }, /\.metadata\.license: expected a string, found 1/],
    [{ license: "x".repeat(4097) }, /\.metadata\.license: a string of 4097 bytes, expected 1 to 4096/],
    [{ origin: "" }, /\.metadata\.origin: a string of 0 bytes/],
    [{ deep: [deep] }, /deeper than 16 levels/],
  ];
  for (const [metadata, where] of bad) {
    const entry: TaskEntry = { id: "four", adapterBytes: 0, metadata };
    await t.rejects(open(entry), { tag: "format", part: "task list", message: where });
    t.throws(() => encodeTaskFile(entry, pack.basisId, blob), { tag: "format", file: "four", message: where });
    const message = new RegExp(`two: metadata cannot be stored: .*${where.source}`);
    await t.rejects(buildPack([{ ...adapter!, metadata }], LOSSLESS), { tag: "adapter", file: adapter!.file, message });
  }
  await t.rejects(buildPack([{ ...adapter!, metadata: { labels: ["a", "b", "c"] } }], LOSSLESS), {
    tag: "adapter",
    file: adapter!.file,
    message: /it has 3 labels, but ".*" has 2 rows/,
  });
  await adapter!.close();
});

t.test("what tasks bring is in the directory, equal lists once", async (t) => {
  const bytes = await packBytes(["adapters/two", "adapters/three", "adapters-more/dora", "adapters-more/bias-lora"]);
  const pack = await openPack(bytes);
  const head = ["saved classifier.bias", "saved classifier.weight"];
  const brings = (id: string): readonly string[] =>
    pack.tasks.get(id)!.brings!.map((b) => b.replace(/ base_model\.model\./, " "));
  t.same(brings("two"), head);
  t.equal(pack.tasks.get("two")!.brings, pack.tasks.get("three")!.brings, "the same list, stored once");
  t.equal(brings("dora").filter((b) => /^magnitude .*layer\.[01]\.attention\.self\.(query|value)$/.test(b)).length, 4);
  t.ok(brings("bias-lora").some((b) => /^bias .*query\.bias$/.test(b)));
  t.equal(pack.reads.requests, 2, "known before any blob is read");

  const blob = (await pack.load("two")).bytes;
  const grow = async (entry: object): Promise<Pack> =>
    openPack(applied(bytes, await layoutAppend(pack, [{ entry: entry as TaskEntry, blob }])));
  const grown = await grow({ id: "four", adapterBytes: 0, metadata: {}, brings: head });
  t.same(grown.tasks.get("dora")!.brings, pack.tasks.get("dora")!.brings, "an append keeps it");
  t.same(grown.tasks.get("four")!.brings, head);
  t.equal((await grow({ id: "four", adapterBytes: 0, metadata: {} })).tasks.get("four")!.brings, undefined, "optional");
  for (const bad of [4, -1, 0.5, "x", [7]]) {
    await t.rejects(
      grow({ id: "four", adapterBytes: 0, metadata: {}, brings: bad }),
      /task list: tasks.4..brings.*expected/,
      String(bad),
    );
  }
});

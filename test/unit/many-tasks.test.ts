/**
 * Two thousand tasks, and a part of 40 000, in the soak ten and 200 000: time must grow with tasks, not with pairs of
 * tasks. The limits are wide, since quadratic work takes several times as long.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";
import t, { type Test } from "tap";
import { json } from "../support/command-line.ts";
import { folderFor } from "../support/folder.ts";
import { encodeTensor, toHex } from "../support/internals/base.ts";
import { lossTable, writeWhole } from "../support/internals/cli.ts";
import { encodeBasis, encodeTask, sha256, streamFresh } from "../support/internals/format.ts";
import { lossesOf, openTasks, writePart } from "../support/internals/pack.ts";
import { freshChunks } from "../support/packs.ts";
import { soak } from "../support/required.ts";

const COUNT = soak ? 10_000 : 2000;
const folder = folderFor(t);
const path = join(folder, "many.eigen");

const encoded = encodeTensor("f32", Float32Array.of(1, 2), 1, 2);
const side = { K: 1, mean: false, dtype: "f32", explained: 1, encoded } as const;
const modules = [{ name: "m", out: 2, in: 2, layout: "out-in", A: [side], B: [side] } as const];
const about = { producer: "test", gauge: "as-trained", centering: "none" };
const { description, bases } = encodeBasis({ ...about, modules });
const basisId = toHex(await sha256(description, bases));
const coefficients = {
  mean: false,
  dtype: "f32",
  encoded: encodeTensor("f32", Float32Array.of(1), 1, 1),
} as const;
const blob = encodeTask([{ module: 0, rank: 1, A: coefficients, B: coefficients }], []);
const entry = (i: number) => ({ id: `task ${i}`, adapterBytes: 100, metadata: {} });
const tasks = Array.from({ length: COUNT }, (_, i) => ({ entry: entry(i), blob }));
await writeFile(path, Buffer.concat(await freshChunks({ description, bases, basisId, tasks })));
const taskFile = (i: number): Uint8Array<ArrayBuffer> => encodeTaskFile(entry(i), basisId, blob);

/**
 * Limits processor time, so that a machine shared with others does not fail it.
 * @param most seconds for ten thousand tasks; fewer have less for each, so that quadratic work shows
 */
async function within(t: Test, most: number, what: string, work: () => Promise<unknown>): Promise<void> {
  const seconds = most * (COUNT / 10_000) * (soak ? 1 : 0.5);
  const before = process.cpuUsage();
  await work();
  const { user, system } = process.cpuUsage(before);
  const took = (user + system) / 1e6;
  t.ok(took < seconds, `${what}: ${took.toFixed(1)} s`);
}

t.test("more tasks than a pack has are refused before anything is written", async (t) => {
  const place = {
    entry: entry(0),
    length: blob.length,
    crc: 0,
    integrity: undefined,
    coded: false,
    read: async () => blob,
  };
  const places = new Array(262_145).fill(place);
  await t.rejects(streamFresh({ description, bases, basisId }, places), /262145 tasks, a pack has at most 262144/);
});

t.test("verify, inspect, add and remove", async (t) => {
  await writeFile(join(folder, "one.eigentask"), taskFile(COUNT));
  await within(t, 20, "verify", async () => t.equal((await json(0, "verify", path))["tasks"].length, COUNT));
  await within(t, 20, "inspect", async () => t.equal((await json(0, "inspect", path))["tasks"].length, COUNT));
  await within(t, 20, "add", () => json(0, "add", path, join(folder, "one.eigentask")));
  const some = Array.from({ length: 500 }, (_, i) => `task ${2 * i}`);
  await within(t, 20, "remove", () => json(0, "remove", path, ...some));
  const pack = await openPack(path);
  t.teardown(() => pack.close());
  t.equal(pack.tasks.size, COUNT - 499);
});

t.test("an open pack: asking, loading within a limit, adding", async (t) => {
  const limit = 1000 * blob.length;
  const pack = await openPack(await readFile(path), { maxResidentBytes: limit });
  await within(t, 20, "load each, and ask for its entry", async () => {
    for (const id of pack.tasks.keys()) {
      await pack.load(id);
      if (!pack.tasks.get(id)!.resident) throw new Error(`${id} is not resident`);
    }
  });
  t.ok(pack.residentBytes.coefficients <= limit && pack.residentBytes.coefficients > limit - blob.length);
  await within(t, 40, "add as many", async () => {
    for (let i = 0; i < COUNT; i++) await pack.addTask(`new ${i}`, taskFile(i));
  });
  const before = pack.tasks;
  pack.removeTask("new 0");
  t.ok(before.has("new 0") && !pack.tasks.has("new 0"), "a snapshot stays as it was");
});

t.test("a part of twenty times as many, and tables of as many rows", async (t) => {
  const many = 20 * COUNT;
  const file = taskFile(0);
  const entries = Array.from({ length: many }, (_, i) => ({
    name: `task task ${i}`,
    dtype: "U8",
    shape: [file.length],
    read: () => file,
  }));
  const types = { coefficients: "f32", head: "f32" };
  const listed = entries.map((_, i) => ({ id: `task ${i}`, total: 0, mean: 0, max: 0 }));
  const name = join(folder, "many.part");
  await writeWhole(name, writePart("tasks", "made", { basisId, types, tasks: listed }, entries));
  const part = await openTasks(name);
  t.equal(part.tasks.length, many);
  t.same(await part.read("task 7"), file);
  await part.close();
  await within(t, 20, "a table of losses", async () => t.equal(lossTable(listed).length, many + 2));
  const errors = listed.map(({ id }) => ({ task: id, module: "m", error: 0.5, norm: 2 }));
  const ids = listed.map(({ id }) => id);
  await within(t, 20, "losses by task", async () =>
    t.match(lossesOf(errors, ids)[many - 1], { total: 0.5, mean: 0.5 }),
  );
});

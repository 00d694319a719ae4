/**
 * Files that are made to fill the memory or to stop the event loop of what reads them, in small: what is made and read
 * is counted.
 */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { createRuntime, type OpenOptions, openPack, type Pack, type RuntimeOptions } from "eigenlora";
import { readTaskFile, taskAdapter } from "eigenlora/build";
import t from "tap";
import { blobOf, packFile, Raw, taskFile, tensor } from "../vectors/format.js";
import { ranked as rankedModel } from "../vectors/valid.js";

/** Writers whose other options have defaults. */
const writePack = packFile as unknown as (parts: object) => Uint8Array<ArrayBuffer>;
const writeTask = taskFile as unknown as (parts: object) => Uint8Array<ArrayBuffer>;
const side = { kind: 1, K: 1, mean: false, type: 0 };
const about = { producer: "test", mode: "column", gauge: "as-trained", centering: "keep" };
const modules = [{ name: "m", out: 1, in: 1, layout: 0, A: side, B: side }];
const f32 = (value: number): Uint8Array => tensor("f32", 1, 1, [value]).bytes;
const task = (id: string, more: object = {}) => ({
  entry: { id, adapterBytes: 0, ...more },
  header: [[[0, 1, 1, 1, 0, 0, null]], []],
  tensors: [f32(1), f32(1)],
});
const pack = (more: object, ...tasks: ReturnType<typeof task>[]): Uint8Array<ArrayBuffer> =>
  writePack({ basis: { ...about, ...more, modules }, tensors: [f32(1), f32(1)], tasks });

/** MessagePack of `count` pieces; `code` is that of an array, a map or a string of 32 bits. */
function many(code: number, count: number, pieces: Iterable<readonly number[]>): object {
  const raw = new Raw(code, count >>> 24, (count >> 16) & 255, (count >> 8) & 255, count & 255);
  for (const piece of pieces) for (const byte of piece) raw.bytes.push(byte);
  return raw;
}
const times = (count: number, piece: readonly number[]) => Array.from({ length: count }, () => piece);
const refused = (bytes: Uint8Array<ArrayBuffer>, message: RegExp) =>
  t.rejects(openPack(bytes), { tag: "format", message });

/** Counts the texts that are made while something is done. */
async function texts(work: () => Promise<unknown>): Promise<number> {
  const { fromCharCode } = String;
  let count = 0;
  String.fromCharCode = (...codes) => {
    count++;
    return fromCharCode(...codes);
  };
  try {
    await work();
  } finally {
    String.fromCharCode = fromCharCode;
  }
  return count;
}

t.test("maps, values and keys have absolute limits", async () => {
  await refused(pack({ header: many(0xdd, 1_100_000, times(1_100_000, [0x81, 0xa0, 0x80])) }), /maps and arrays than/);
  await refused(pack({ "x-more": many(0xdd, 2_000_001, times(2_000_001, [0xc0])) }), /more than 2000000 values/);
  const keys = Array.from({ length: 65_537 }, (_, i) => [
    0xa3,
    48 + (i >> 12),
    48 + ((i >> 6) & 63),
    48 + (i & 63),
    0xc0,
  ]);
  await refused(pack({ "x-more": many(0xdf, 65_537, keys) }), /a map has more than 65536 keys/);
  await refused(
    pack(
      {},
      task("a", { metadata: { x: "x".repeat(60_000) } }),
      task("b", { metadata: { x: many(0xdb, 2 ** 20, [new Array(2 ** 20).fill(97)]) } }),
    ),
    /tasks\[1\]\.metadata: 10485\d\d bytes, at most 1048576/,
  );
});

t.test("`header` and keys that are not known are looked through, and never made", async (t) => {
  const open = (more: object) => texts(async () => (await openPack(pack(more))).close());
  await open({});
  const none = await open({ header: many(0xdd, 0, []), "x-more": 1 });
  const strings = many(0xdd, 20_000, times(20_000, [0xa2, 0xc3, 0xa4]));
  t.equal(await open({ header: strings, "x-more": strings }), none);
});

t.test("metadata is made when it is asked for, once", async (t) => {
  const labels = Array.from({ length: 100 }, (_, i) => `label ${i}`);
  const note = Array.from({ length: 5000 }, (_, i) => `note ${i}`);
  const bytes = pack({}, task("a", { metadata: { labels, note } }));
  const opened = await openPack(bytes);
  const info = opened.tasks.get("a")!;
  t.ok((await texts(async () => info.metadata)) > 5000);
  t.equal(await texts(async () => t.same(info.metadata, { labels, note })), 0);
  t.equal(info.metadata, opened.directory.tasks[0]!.metadata);
});

t.test("lists of `brings` are held against a blob by their count first", async (t) => {
  const names = Array.from({ length: 2000 }, (_, i) => `saved x${i}`);
  const opened = await openPack(pack({}, task("a", { brings: names }), task("b", { brings: 0 })));
  const { has, add } = Set.prototype;
  let asked = 0;
  Set.prototype.add = function (value) {
    asked++;
    return add.call(this, value);
  };
  t.teardown(() => Object.assign(Set.prototype, { has, add }));
  await t.rejects(opened.load("b"), {
    tag: "format",
    message: /it brings 0 parameters and modules, the directory says 2000/,
  });
  t.ok(asked < 100, `${asked} names`);
});

t.test("a coded directory that becomes too large is not decoded", async () => {
  const codeDirectory = () => {
    const bytes = new Uint8Array(2 ** 21 + 12);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, 0x33444f43, true);
    view.setUint32(4, 2 ** 25 + 1, true);
    return bytes;
  };
  await refused(
    writePack({ basis: { ...about, modules }, tensors: [f32(1), f32(1)], tasks: [], codeDirectory }),
    /becomes 33554433 bytes, at most 33554432/,
  );
});

t.test("an answer without end is left where its first bytes say that a task file ends", async (t) => {
  const whole: Uint8Array = writeTask({ entry: task("a").entry, basisId: new Uint8Array(32), blob: blobOf(task("a")) });
  let sent = 0;
  const server = createServer(({ url }, response) => {
    response.write(url === "/task" ? whole : "<p>");
    const more = Buffer.alloc(2 ** 14, 32);
    const go = (): void => {
      while (response.write(more)) sent += more.length;
      response.once("drain", go);
    };
    go();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.teardown(() => (server.closeAllConnections(), server.close()));
  const address = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  await t.rejects(readTaskFile(new URL(`${address}/task`)), { tag: "format", message: /expected \d+; fetch it again/ });
  await t.rejects(readTaskFile(new URL(`${address}/page`)), {
    tag: "format",
    message: /this is HTML, expected an EigenLoRA task file/,
  });
  t.ok(sent < 2 ** 24, `${sent} bytes`);
  const counted: number[] = [];
  const large = {
    name: "large",
    byteLength: 10 ** 9,
    read: async (at: number, length: number) => {
      counted.push(length);
      const bytes = new Uint8Array(length);
      bytes.set(whole.subarray(at, at + length));
      return bytes;
    },
  };
  await t.rejects(readTaskFile(large), { tag: "format", message: /large, task file: / });
  t.ok(Math.max(...counted) < 1000, `${counted}`);
});

/** Limits of expansion, and the pieces in which it works. */
/** Fields are written over at will. */
const ranked = (rank: number): { pack: any } => rankedModel(rank);

/** A module [width, width] whose rows are a mean alone, which takes 3/8 byte a column, and none a row. */
function bomb(width: number, rank: number): Uint8Array {
  const { pack } = ranked(rank);
  Object.assign(pack.basis.modules[0], { in: width, out: width });
  const mean = new Uint8Array(4 + Math.ceil((3 * width) / 32) * 4);
  return packFile({ ...pack, tensors: [mean, mean] });
}

const open = (bytes: Uint8Array, options: OpenOptions = {}): Promise<Pack> => openPack(bytes, options);
const refusal = { name: "TaskError", message: /task "task" expands from \d+ bytes to 131072000; .*maxExpansion: \d+$/ };

t.test("a task that would become many times its bytes is refused before memory is taken", async (t) => {
  const bytes = bomb(8000, 2048);
  const modes: RuntimeOptions[] = [
    { mode: "factors", backend: "js" },
    { mode: "factors", backend: "wasm" },
  ];
  for (const options of modes) {
    const runtime = await createRuntime(await open(bytes), options);
    const before = runtime.memory();
    await t.rejects(runtime.switchTask("task"), refusal);
    t.same(runtime.memory().scratch, before.scratch, "no memory was taken");
    await runtime.close();
  }
  await t.rejects(taskAdapter(await open(bytes), "task"), refusal);
  const core = await createRuntime(await open(bytes), { mode: "core" });
  t.equal((await core.switchTask("task")).modules, 1, "a core of a mean alone is one number");
  const view = { dtype: "f32", shape: [1, 8000], data: new Uint8Array(32_000), byteOffset: 0 } as const;
  await core.apply("layer", view, { ...view, data: new Uint8Array(32_000) }, { tasks: ["task"] });
});

t.test("a core larger than its pack allows is refused", async (t) => {
  const { pack } = ranked(1);
  const side = { kind: 1, K: 6000, mean: false, type: 5, explained: 0 };
  Object.assign(pack.basis.modules[0], { in: 1, out: 1, A: side, B: side });
  const components = new Uint8Array(18_000);
  const alpha = new Uint8Array(4 + 2252);
  const [task] = pack.tasks;
  task.header[0][0] = [0, 1, 41, 41, 0, 0, null];
  task.tensors = [alpha, alpha];
  const bytes = packFile({ ...pack, tensors: [components, components] });
  const core = await createRuntime(await open(bytes), { mode: "core" });
  await t.rejects(core.switchTask("task"), { name: "TaskError", message: /to 144000000; / });
  const factors = await createRuntime(await open(bytes), { mode: "factors" });
  t.equal((await factors.switchTask("task")).modules, 1);
});

t.test("what is asked for, a base, and 16 MiB are allowed", async (t) => {
  const options = { mode: "factors", backend: "js" } as const;
  const small = await createRuntime(await open(bomb(8000, 256)), options);
  t.equal((await small.switchTask("task")).modules, 1, "16 384 000 bytes");
  const larger = bomb(9000, 256);
  await t.rejects((await createRuntime(await open(larger), options)).switchTask("task"), { name: "TaskError" });
  const asked = await createRuntime(await open(larger, { maxExpansion: 3000 }), options);
  t.equal((await asked.switchTask("task")).modules, 1);
  t.equal(asked.term("layer")!.A.length, 256 * 9000);
  const wide = bomb(300, 600);
  const base = new Map([
    ["layer.weight", { dtype: "f32", shape: [300, 300], data: new Float32Array(90_000) } as const],
  ]);
  const strict = await open(wide, { maxExpansion: 0.001 });
  t.equal((await (await createRuntime(strict, { ...options, base })).switchTask("task")).modules, 1);
});

t.test("an abort is heard within a module", async (t) => {
  const pack = await open(bomb(9000, 2000), { maxExpansion: Number.POSITIVE_INFINITY });
  for (const backend of ["js", "wasm"] as const) {
    const runtime = await createRuntime(pack, { mode: "factors", backend });
    const controller = new AbortController();
    const work = runtime.switchTask("task", { signal: controller.signal });
    setImmediate(() => controller.abort());
    await t.rejects(work, { name: "AbortError" }, backend);
    t.equal(runtime.task, null);
    await runtime.close();
  }
  const controller = new AbortController();
  const { modules } = await taskAdapter(pack, "task", { signal: controller.signal });
  const reading = [...modules.values()][0]!.read();
  setImmediate(() => controller.abort());
  await t.rejects(reading, { name: "AbortError" });
});

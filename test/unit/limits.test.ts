/** Files that are made to fill the memory or to stop the event loop of what reads them, in small: what is made and read is counted. */
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { openPack } from "eigenlora";
import { readTaskFile } from "eigenlora/build";
import t from "tap";
import { blobOf, packFile, Raw, taskFile, tensor } from "../vectors/format.js";

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

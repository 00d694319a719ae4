// @ts-nocheck: it writes what no type allows
/**
 * Files that are made to fill the memory or to stop the event loop of what reads them: directories, task files, headers
 * of safetensors, answers without end. Each is read in a process of its own, with a `signal`. SECURITY.md lists the
 * limits that they meet.
 *
 * usage: node test/soak/attacks/read.js [--dist FOLDER] [NAME...]      FOLDER of another build, to compare with
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { isMainThread, Worker } from "node:worker_threads";
import { align, blobOf, crc32c, joined, msgpack, packFile, taskFile, tensor } from "../../vectors/format.js";
import { mainThread } from "./clock.js";

// What makes files takes memory that is not the reader's.
const isMaker = isMainThread && !process.argv.includes("--child");
if (isMaker) await import("../../support/load-typescript.js");
const { code, Encoder } = isMaker ? await import("../../support/internals/format.ts") : {};

/** Seconds of CPU, megabytes of the whole process, and milliseconds without a turn for others. */
const MOST = { cpu: 1, memory: 256, block: 16 };
/** Runs of a case: the best counts, since other programs on the machine make times longer, never shorter. */
const RUNS = 4;

const ascii = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
const u32 = (n) => [n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255];
const head = (code, n, ...rest) => Uint8Array.from([code, ...u32(n), ...rest]);
const bytesOf = (...parts) => new Uint8Array(Buffer.concat(parts.map((part) => Uint8Array.from(part))));
/** A piece, so many times. */
const times = (piece, count) => new Uint8Array(Buffer.alloc(piece.length * count, Buffer.from(piece)));
/** Makes an array of an item that is repeated, or of items from different strings. */
const array = (count, item) =>
  bytesOf(head(0xdd, count), typeof item === "function" ? numbered(count, item) : times(item, count));
/** So many different strings of three letters and more. */
const numbered = (count, make) =>
  new Uint8Array(
    Buffer.concat(Array.from({ length: count }, (_, i) => Buffer.from(make(i.toString(36).padStart(4, "0"))))),
  );
const short = (text) => bytesOf([0xa0 + text.length], ascii(text));
/** Bytes that no coder makes smaller. */
function noise(length) {
  const bytes = new Uint8Array(length);
  for (let i = 0, x = 1; i < length; i++) bytes[i] = (x = Math.imul(x, 0x9e3779b1) ^ (x >>> 15)) & 127;
  return bytes;
}

/** Pieces, `[bytes, times]`, as bytes. */
const plain = (pieces) => bytesOf(...pieces.map(([bytes, count = 1]) => times(bytes, count)));
/** A coded section of pieces. Repetitions are one copy. */
function codedOf(pieces) {
  const section = plain(pieces);
  const repeated = [];
  let at = 0;
  for (const [bytes, count = 1] of pieces) {
    if (count > 1) repeated.push({ at: at + bytes.length, end: at + bytes.length * count, distance: bytes.length });
    at += bytes.length * count;
  }
  const encoder = new Encoder(section.length);
  const copyAt = (place) => {
    const copy = repeated.find((one) => one.at === place);
    return copy && copy.end - place >= 4 ? { length: copy.end - place, distance: copy.distance } : undefined;
  };
  for (const _ of code(encoder, section, () => {}, new Uint8Array(0), { runs: [], copyAt }));
  const stored = encoder.finish(section.length);
  if (section.length > 16 * stored.length + 4096) throw new Error(`${section.length} bytes of ${stored.length}`);
  return stored;
}

const f32 = (...values) => tensor("f32", 1, values.length, values).bytes;
const one = f32(1, 2);
const side = { kind: 1, K: 1, mean: false, type: 0 };
const basis = {
  producer: "attack",
  mode: "column",
  gauge: "as-trained",
  centering: "keep",
  modules: [{ name: "m", out: 2, in: 2, layout: 0, A: side, B: side }],
};
const task = (id, more = {}) => ({
  entry: { id, adapterBytes: 0, ...more },
  header: [[[0, 1, 1, 1, 0, 0, null]], []],
  tensors: [f32(1), f32(1)],
});

/**
 * A pack of parts as they are.
 * @param description, list MessagePack, in pieces
 * @param blobs of the tasks; @param free sections of 64 bytes in front of them
 * @param coded whether the directory is
 */
function packOf({ description = [[msgpack(basis)]], list = [[msgpack([])]], blobs = [], free = 0, coded = true }) {
  const size = (pieces) => pieces.reduce((sum, [bytes, count = 1]) => sum + bytes.length * count, 0);
  const bases = joined([one, one], 16);
  const n = 1 + free + blobs.length;
  const start = new Uint8Array(16);
  const startView = new DataView(start.buffer);
  [n, size(description), size(list), 0].forEach((value, i) => startView.setUint32(4 * i, value, true));
  const entry = (kind, offset, length, crc) => {
    const bytes = new Uint8Array(32);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, kind, true);
    view.setUint32(4, kind === 3 ? 0 : 1, true);
    view.setBigUint64(8, BigInt(offset), true);
    view.setBigUint64(16, BigInt(length), true);
    view.setUint32(24, crc, true);
    return bytes;
  };
  const pieces = (places) => [
    [start],
    ...(places.free ? [[entry(3, 0, 64, 0), free]] : []),
    [
      Buffer.concat([
        entry(1, places.bases, bases.length, crc32c(bases)),
        ...blobs.map((b, i) => entry(2, places.blobs[i], b.length, crc32c(b))),
      ]),
    ],
    ...description,
    ...list,
  ];
  const places = { free: free > 0, bases: 0, blobs: blobs.map(() => 0) };
  if (free > 0 && !coded) throw new Error("free sections need a coded directory");
  const make = () => (coded ? codedOf(pieces(places)) : plain(pieces(places)));
  let directory = coded ? make() : new Uint8Array(16 + 32 * n + size(description) + size(list));
  // Free sections lie in front of the directory, the others behind it.
  const at = 1536 + 64 * free;
  let end = at + directory.length;
  const offsets = [bases, ...blobs].map((bytes) => {
    const offset = align(end, 64);
    end = offset + bytes.length;
    return offset;
  });
  if (!coded) {
    places.bases = offsets[0];
    places.blobs = offsets.slice(1);
    directory = make();
  }
  const file = new Uint8Array(end);
  const view = new DataView(file.buffer);
  file.set([0x89, 0x45, 0x49, 0x47, 0x45, 0x4e, 0x0d, 0x0a]);
  view.setUint32(8, 1, true);
  view.setUint32(12, 1536, true);
  view.setUint32(48, crc32c(file.subarray(0, 48)), true);
  [1, end, at, directory.length, offsets[0], bases.length].forEach((value, i) =>
    view.setBigUint64(1024 + 8 * i, BigInt(value), true),
  );
  view.setUint32(1024 + 48, crc32c(directory), true);
  view.setUint32(1024 + 60, crc32c(file.subarray(1024, 1084)), true);
  file.set(directory, at);
  [bases, ...blobs].forEach((bytes, i) => file.set(bytes, offsets[i]));
  return file;
}

/**
 * A map that begins at a byte and ends the bytes, with one key more, of a value in pieces.
 * @param padded bytes of noise, so that it may be coded
 */
function withKey(bytes, at, key, pieces, padded) {
  bytes[at] += padded ? 2 : 1;
  const pad = padded ? [[bytesOf(short("x-pad"), head(0xdb, padded), noise(padded))]] : [];
  return [[bytes], ...pad, [short(key)], ...pieces];
}
const described = (key, pieces, padded) => withKey(msgpack(basis), 0, key, pieces, padded);
/** Metadata with pieces under an empty key. */
const inKey = (pieces) => inMetadata([[Uint8Array.of(0x81, 0xa0)], ...pieces]);
const inHeader = (pieces, padded = 0) =>
  packOf({ description: described("header", pieces, padded), coded: padded > 0 });
/** A task list of one task with metadata in pieces. */
function inMetadata(pieces, padded = 0) {
  const list = withKey(msgpack([task("a").entry]), 1, "metadata", pieces, padded);
  return packOf({ list, blobs: [blobOf(task("a"))], coded: padded > 0 });
}
/** A map that is said to have one key more than it has. */
const open = (value) => msgpack(value).map((byte, i) => (i === 0 ? byte + 1 : byte));
const EMPTY_MAPS = Uint8Array.of(0x81, 0xa0, 0x80);
const TWO_BYTES = Uint8Array.of(0xa2, 0xc3, 0xa4);
const nested = (inner, count) => [[head(0xdd, count)], [inner, count]];

function safetensors(header) {
  const text = typeof header === "string" ? ascii(header) : header;
  const bytes = new Uint8Array(8 + text.length);
  new DataView(bytes.buffer).setUint32(0, text.length, true);
  bytes.set(text, 8);
  return bytes;
}
const empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}';
/** A header of tensors of four bytes in an order of its own. @param gap bytes in front of the last */
function shuffled(count, gap = 0) {
  const entries = Array.from({ length: count }, (_, i) => {
    const place = (i * 7919) % count;
    const at = 4 * place + (place === count - 1 ? gap : 0);
    return `"${i.toString(36)}":{"dtype":"F32","shape":[1],"data_offsets":[${at},${at + 4}]}`;
  });
  return bytesOf(safetensors(`{${entries.join(",")}}`), new Uint8Array(4 * count + gap));
}

/** What is read, and how: `open` a pack, `load` its tasks, `add` a task file to it, `weights` of a safetensors file. */
const CASES = {
  "coded: 62 MB of small maps in `header`": () => [inHeader(nested(EMPTY_MAPS, 19_000_000), 5_600_000)],
  "coded: 32 MB of small maps in `header`": () => [inHeader(nested(EMPTY_MAPS, 10_000_000), 2_400_000)],
  "coded: 32 MB of small maps in metadata": () => [inMetadata(nested(EMPTY_MAPS, 10_000_000), 2_400_000)],
  "62 MB of small maps in `header`": () => [inHeader(nested(EMPTY_MAPS, 20_000_000))],
  "62 MB of small maps in metadata": () => [inMetadata(nested(EMPTY_MAPS, 20_000_000))],
  "coded: as many maps as are allowed": () => [
    inHeader(nested(Uint8Array.of(0x82, 0xa0, 0x01, 0xa1, 0x61, 0x80), 499_000), 300_000),
  ],
  "coded: as many values as are allowed": () => [inHeader(nested(TWO_BYTES, 1_999_000), 700_000)],
  "as many maps in metadata as are allowed": () => [inKey(nested(EMPTY_MAPS, 349_000))],
  "maps of different keys in metadata": () => [inKey([[array(149_000, (key) => bytesOf([0x81], short(key), [0xc0]))]])],
  "60 MB of one string in `header`": () => [inHeader([[head(0xdb, 60_000_000)], [Uint8Array.of(97), 60_000_000]])],
  "60 MB of a string of two bytes a letter": () => [
    inHeader([[head(0xdb, 60_000_000)], [Uint8Array.of(0xc3, 0xa4), 30_000_000]]),
  ],
  "20 000 000 strings in `header`": () => [inHeader(nested(TWO_BYTES, 20_000_000))],
  "60 000 000 nils in metadata": () => [inKey(nested(Uint8Array.of(0xc0), 60_000_000))],
  "1 400 000 keys of a map": () => [
    inHeader([
      [
        bytesOf(
          head(0xdf, 1_400_000),
          numbered(1_400_000, (key) => bytesOf(short(key), [0xc0])),
        ),
      ],
    ]),
  ],
  "60 MB of a name": () => {
    const { producer, ...others } = basis;
    const bytes = open(others);
    return [
      packOf({
        description: [[bytes], [short("producer")], [head(0xdb, 60_000_000)], [Uint8Array.of(97), 60_000_000]],
        coded: false,
      }),
    ];
  },
  "lists of `brings` of 1 900 000 names": () => {
    const tasks = Array.from({ length: 29 }, (_, i) => task(`task ${i}`));
    const names = numbered(64_000, (key) => short(`rows ${key}`));
    const entries = tasks.map(({ entry }) => {
      return bytesOf(open(entry), short("brings"), head(0xdd, 64_000), names);
    });
    return [packOf({ list: [[bytesOf([0xdc, 0, 29], ...entries)]], blobs: tasks.map(blobOf), coded: false })];
  },
  "2 000 tasks that share 65 536 names": () => {
    const tasks = Array.from({ length: 2000 }, (_, i) => task(`task ${i}`, i > 0 ? { brings: 0 } : {}));
    const bytes = open(tasks[0].entry);
    const names = numbered(65_536, (key) => short(`rows ${key}`));
    const entries = [
      bytesOf(bytes, short("brings"), head(0xdd, 65_536), names),
      ...tasks.slice(1).map(({ entry }) => msgpack(entry)),
    ];
    return [
      packOf({ list: [[bytesOf([0xdc, 2000 >> 8, 2000 & 255], ...entries)]], blobs: tasks.map(blobOf), coded: false }),
      "load",
    ];
  },
  "65 536 modules of long names": () => {
    const modules = Array.from({ length: 65_536 }, (_, i) =>
      msgpack({ name: `${"x".repeat(200)}${i}`, out: 2, in: 2, layout: 0, "x-more": [1, 2, 3] }),
    );
    const bytes = open({ ...basis, modules: undefined });
    return [
      packOf({ description: [[bytesOf(bytes, short("modules"), head(0xdd, 65_536), ...modules)]], coded: false }),
    ];
  },
  "900 000 bases": () => {
    const sides = array(65_536, msgpack({ kind: 1, K: 1, type: 0 }));
    const module = (i) => bytesOf(open({ name: `m${i}`, out: 1, in: 1, layout: 0 }), short("A"), sides);
    const bytes = open({ ...basis, modules: undefined });
    return [
      packOf({
        description: [[bytesOf(bytes, short("modules"), [0x9d], ...Array.from({ length: 13 }, (_, i) => module(i)))]],
        coded: false,
      }),
    ];
  },
  "920 000 free sections": () => [
    packOf({ free: 920_000, description: described("x", [[Uint8Array.of(1)]], 2_500_000) }),
  ],
  "262 144 tasks": () => [packOfTasks(262_144)],
  "390 000 tasks": () => [packOfTasks(390_000)],
  "60 MB of bases": () => [bigPack(), "bases"],
  "header of 60 MB in a task file": () => [
    fileOf([
      [head(0xdd, 2)],
      [head(0xdd, 20_000_000)],
      [Uint8Array.of(0xa2, 0xc3, 0xa4), 20_000_000],
      [Uint8Array.of(0x90)],
    ]),
    "add",
  ],
  "header of 2 000 000 numbers in a task file": () => [
    fileOf([
      [Uint8Array.of(0x92, 0x90, 0x91, 0x95)],
      [short("w")],
      [Uint8Array.of(3, 0, 0x92)],
      [Uint8Array.of(0xce, ...u32(1_999_000), 1)],
      [head(0xdd, 1_999_000)],
      [Uint8Array.of(1), 1_999_000],
    ]),
    "add",
  ],
  "60 MB of maps in an entry": () => {
    const bytes = open({ id: "a", adapterBytes: 0 });
    return [taskBytes(bytesOf(bytes, short("x"), plain(nested(EMPTY_MAPS, 19_000_000))), blobOf(task("a"))), "add"];
  },
  "safetensors: 60 MB of header": () => [
    safetensors(`{${Array.from({ length: 1_000_000 }, (_, i) => `"${i}":${empty}`).join(",")}}`),
    "weights",
  ],
  "safetensors: 10 MB of tensors": () => [
    safetensors(`{${Array.from({ length: 170_000 }, (_, i) => `"${i}":${empty}`).join(",")}}`),
    "weights",
  ],
  "safetensors: 10 MB of tensors, shuffled": () => [shuffled(145_000), "weights"],
  "safetensors: 10 MB of tensors, shuffled, with a hole": () => [shuffled(144_000, 4), "weights"],
  "safetensors: 10 MB of one shape": () => [
    safetensors(`{"a":{"dtype":"F32","shape":[${"0,".repeat(4_900_000)}0],"data_offsets":[0,0]}}`),
    "weights",
  ],
  "safetensors: 10 MB of objects": () => [safetensors(`{"a":[${"{},".repeat(3_300_000)}{}]}`), "weights"],
  "safetensors: 10 MB of metadata": () => [
    safetensors(`{"__metadata__":{"a":"${"\\u00e4".repeat(1_650_000)}"}}`),
    "weights",
  ],
  "safetensors: 10 MB of short metadata": () => [
    safetensors(`{"__metadata__":{${Array.from({ length: 800_000 }, (_, i) => `"${i}":"a"`).join(",")}}}`),
    "weights",
  ],
  "a task file without end": () => [undefined, "endless-task"],
  "a task file that is none, without end": () => [undefined, "endless-bytes"],
  "a listing of the Hub without end": () => [undefined, "endless-listing"],
};

function packOfTasks(count) {
  const blob = blobOf(task(""));
  const list = array(count, (key) => bytesOf([0x82], short("id"), short(key), short("adapterBytes"), [0]));
  return packOf({ list: [[list]], blobs: Array.from({ length: count }, () => blob), coded: false });
}

/** A task file of an entry as it is. */
const taskBytes = (entry, blob, basisId = packOf({ coded: false }).slice(16, 48)) => taskFile({ entry, basisId, blob });

function fileOf(header) {
  const bytes = plain(header);
  const start = new Uint8Array(8);
  new DataView(start.buffer).setUint32(0, 0x4b534154, true);
  new DataView(start.buffer).setUint32(4, bytes.length, true);
  return taskBytes(msgpack({ id: "a", adapterBytes: 0 }), bytesOf(start, bytes, new Uint8Array(4)));
}

/** A pack with one basis of 60 MB. */
function bigPack() {
  const width = 15_000_000;
  const wide = { ...basis, modules: [{ name: "m", out: 2, in: width, layout: 0, A: side, B: side }] };
  const bases = bytesOf(new Uint8Array(Float32Array.from({ length: width }, () => 1).buffer), one);
  return packFile({ basis: wide, tensors: [bases], tasks: [task("a")] });
}

/** The most megabytes that this process has held. On Linux `maxRSS` counts what its parent held too. */
function peak() {
  if (process.platform !== "linux") return process.resourceUsage().maxRSS / 1e3;
  return /VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1] / 1e3;
}

/** Reads in a process of its own, and prints what that took. */
async function child(mode, path, dist, first) {
  const load = (file) => import(pathToFileURL(join(dist, file)).href);
  const [{ openPack }, build] = [await load("src/index.js"), await load("src/build.js")];
  const { openSafetensors } = build.openSafetensors ? build : await load("src/adapters/adapter.js");
  const { signal } = new AbortController();
  // What is loaded late is loaded: files take no part in that.
  await openPack(first).then((pack) => pack.close());
  if (mode.startsWith("endless")) await fetch(`${path}/first`).then((response) => response.text());
  let said = "taken";
  let counted = false;
  const before = process.cpuUsage();
  let [last, block] = [mainThread(), 0];
  const tick = () => {
    const now = mainThread();
    block = Math.max(block, now - last);
    last = mainThread();
  };
  const ticks = setInterval(tick, 1);
  try {
    if (mode === "weights") await openSafetensors(path, { signal });
    else if (mode.startsWith("endless")) {
      const what = mode.slice(8);
      if (what === "listing") {
        process.env.HF_ENDPOINT = path;
        const { openSnapshot } = await load("src/http/hub.js");
        await openSnapshot({ repository: "a/b", revision: "main", path: "" }, { signal });
      } else await build.readTaskFile(new URL(`${path}/${what}`), { signal });
    } else if (mode === "add") {
      const pack = await openPack(packOf({ coded: false }), { signal });
      await pack.addTask("b", path, { signal });
    } else {
      const pack = await openPack(path, { signal });
      if (mode === "bases") (await pack.bases({ signal })).close();
      for (const id of mode === "load" ? pack.tasks.keys() : [])
        await pack.load(id, { signal }).catch((error) => (said = error.message));
      tick();
      clearInterval(ticks);
      counted = true;
      // Metadata is made when it is asked for, without a signal.
      const [first] = mode === "open" ? pack.tasks.values() : [];
      if (first) said += `, ${Object.keys(first.metadata).length} keys of metadata`;
    }
  } catch (error) {
    said = `${error.name}: ${error.message}`;
  }
  await new Promise((resolve) => setTimeout(resolve, 5));
  if (!counted) tick();
  const { user, system } = process.cpuUsage(before);
  const memory = peak();
  console.log(JSON.stringify({ cpu: (user + system) / 1e6, memory, block, said: said.slice(0, 160) }));
  process.exit();
}

/** A server whose answers never end, in a thread of its own. @returns its address */
function endless() {
  const thread = new Worker(fileURLToPath(import.meta.url));
  return new Promise((resolve) =>
    thread.once("message", (port) => resolve({ thread, address: `http://127.0.0.1:${port}` })),
  );
}

async function serveEndless() {
  const { parentPort } = await import("node:worker_threads");
  const file = taskBytes(msgpack({ id: "a", adapterBytes: 0 }), blobOf(task("a")), new Uint8Array(32));
  const server = createServer((request, response) => {
    response.writeHead(200, { etag: '"1"' });
    if (request.url === "/first") return response.end();
    if (request.url.endsWith("/task")) response.write(file);
    else if (request.url.startsWith("/api")) response.write('{"sha":"');
    const more = Buffer.alloc(2 ** 16, 97);
    const go = () => {
      while (response.write(more));
      response.once("drain", go);
    };
    go();
    response.on("close", () => response.removeAllListeners("drain"));
  });
  server.listen(0, "127.0.0.1", () => parentPort.postMessage(server.address().port));
}

if (!isMainThread) await serveEndless();
else {
  const { values, positionals } = parseArgs({
    options: {
      keep: { type: "boolean", default: false },
      child: { type: "string" },
      first: { type: "string" },
      dist: { type: "string", default: fileURLToPath(new URL("../../../dist", import.meta.url)) },
    },
    allowPositionals: true,
  });
  if (values.child) await child(values.child, positionals[0], values.dist, values.first);
  const folder = mkdtempSync(join(tmpdir(), "eigenlora-attacks-"));
  const { thread, address } = await endless();
  const first = join(folder, "first");
  writeFileSync(first, packOf({ description: described("x", [[Uint8Array.of(1)]], 1000) }));
  let failed = 0;
  try {
    for (const [name, make] of Object.entries(CASES)) {
      if (positionals.length > 0 && !positionals.some((part) => name.includes(part))) continue;
      const [bytes, mode = "open"] = make();
      const path = bytes ? join(folder, "attack") : address;
      if (bytes) writeFileSync(path, bytes);
      let best;
      for (let run = 0; run < RUNS; run++) {
        const args = [fileURLToPath(import.meta.url), "--child", mode, "--dist", values.dist, "--first", first, path];
        const { stdout, stderr, status, signal } = spawnSync(process.execPath, args, {
          encoding: "utf8",
          timeout: 120_000,
        });
        if (status !== 0) {
          best = {
            cpu: Infinity,
            memory: Infinity,
            block: Infinity,
            said: `ended: ${signal ?? status}, ${stderr.slice(0, 100)}`,
          };
          break;
        }
        const found = JSON.parse(stdout);
        best ??= found;
        for (const key of ["cpu", "memory", "block"]) best[key] = Math.min(best[key], found[key]);
        if (Object.entries(MOST).every(([key, most]) => best[key] <= most)) break;
      }
      const good = Object.entries(MOST).every(([key, most]) => best[key] <= most);
      if (!good) failed++;
      const size = bytes ? `${(bytes.length / 1e6).toFixed(1)} MB` : "no end";
      const figures = `${best.cpu.toFixed(2)} s, ${best.memory.toFixed(0)} MB, ${best.block.toFixed(0)} ms`;
      console.log(`${good ? "ok    " : "FAILED"} ${name} (${size}): ${figures}; ${best.said}`);
    }
  } finally {
    if (values.keep) console.log(folder);
    else rmSync(folder, { recursive: true });
    await thread.terminate();
  }
  if (failed > 0) {
    console.error(`${failed} take more than ${MOST.cpu} s of CPU, ${MOST.memory} MB or ${MOST.block} ms in one piece`);
    process.exitCode = 1;
  }
}

import { getEventListeners } from "node:events";
import { open, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { folderFor } from "../support/folder.ts";
import { openSource } from "../support/internals/base.ts";
import { vector } from "../support/packs.ts";
import { serve } from "../support/range-server.ts";

const path = vector("every-kind.eigen");
const golden = new Uint8Array(await readFile(path));

t.test("every kind of source gives the same pack, and counts its requests", async (t) => {
  const server = await serve(new Map([["a.eigen", golden]]));
  t.teardown(() => server.close());
  const sources = {
    path,
    "file URL": new URL(`file://${path}`),
    Blob: new Blob([golden]),
    ArrayBuffer: golden.slice().buffer,
    Uint8Array: golden,
    Buffer: Buffer.from(golden),
    "http string": server.url("a.eigen"),
    "http URL": new URL(server.url("a.eigen")),
  };
  for (const [name, source] of Object.entries(sources)) {
    const pack = await openPack(source);
    t.equal(pack.reads.requests, 2, `${name}: opened in two requests`);
    (await pack.bases()).close();
    await pack.load("whole");
    t.equal(pack.reads.requests, 3, `${name}: three to the first task`);
    await pack.load("terms");
    t.equal(pack.reads.requests, 4, `${name}: one per further task`);
    await pack.load("whole");
    await pack.prefetch(["terms", "whole"]);
    t.equal(pack.reads.requests, 4, `${name}: none when resident`);
    await pack.close();
  }
  t.same(server.ranges.slice(0, 1), [[0, 1536]], "the window is what SPEC.md says");
});

t.test("callers of one task share one request; an abort ends only its own wait", async (t) => {
  const server = await serve(new Map([["a.eigen", golden]]));
  t.teardown(() => server.close());
  const pack = await openPack(server.url("a.eigen"));
  const before = server.ranges.length;
  const aborted = new AbortController();
  server.faults = ["slow"];
  const first = pack.load("whole", { signal: aborted.signal });
  const second = pack.load("whole");
  setTimeout(() => aborted.abort(new Error("changed my mind")), 15);
  await t.rejects(first, { message: "changed my mind" });
  t.ok((await second).bytes.length > 0);
  t.equal(server.ranges.length - before, 1);
  await t.rejects(pack.load("terms", { signal: AbortSignal.abort(new Error("before")) }), { message: "before" });
});

t.test("a signal has one listener, however many reads and loads wait for it", async (t) => {
  const server = await serve(new Map([["a.eigen", golden]]));
  t.teardown(() => server.close());
  const pack = await openPack(server.url("a.eigen"));
  const source = await openSource(server.url("a.eigen"));
  const controller = new AbortController();
  const { signal } = controller;
  const listeners = () => getEventListeners(signal, "abort").length;
  const work = () => [
    ...Array.from({ length: 12 }, (_, i) => source.read(i, 8, { signal })),
    ...["whole", "terms", "whole", "terms"].map((task) => pack.load(task, { signal })),
  ];
  const done = work();
  t.equal(listeners(), 1);
  await Promise.all(done);
  t.equal(listeners(), 0, "none is left");
  server.faults = Array.from({ length: 12 }, () => "slow");
  const reads = Array.from({ length: 12 }, (_, i) => source.read(i, 1000, { signal }));
  setTimeout(() => controller.abort(new Error("enough")), 15);
  await Promise.all(reads.map((read) => t.rejects(read, { message: "enough" })));
  t.equal(listeners(), 0);
});

t.test("no server, no file, no bytes", async (t) => {
  const server = await serve(new Map());
  const url = server.url("a.eigen");
  await server.close();
  await t.rejects(openPack(url, { retries: 0 }), { tag: "source", message: /cannot be fetched/ });
  await t.rejects(openPack("/nowhere/at/all.eigen"), { tag: "source", message: /cannot be opened/ });
  await t.rejects(openPack("/"), { tag: "source", message: /is a folder, expected a file/ });
  await t.rejects(openPack(new ArrayBuffer(0)), { tag: "format", message: /it is empty/ });
  await t.rejects(openSource(5 as never), TypeError);
  const options = {
    headers: { authorization: "me" },
    retries: 0,
    fetch: (async (_: unknown, init: RequestInit) => {
      t.equal((init.headers as Record<string, string>)["authorization"], "me");
      throw new TypeError("no network");
    }) as typeof fetch,
  };
  await t.rejects(openPack("http://127.0.0.1:1/x", options), { tag: "source", message: /no network/ });
});

t.test("a closed pack says so, and its resident tasks stay", async (t) => {
  const pack = await openPack(path);
  await pack.load("whole");
  await pack.close();
  t.ok((await pack.load("whole")).bytes.length > 0);
  await t.rejects(pack.load("terms"), {
    tag: "source",
    message: /every-kind\.eigen: cannot be read: it was closed; open it again/,
  });
});

t.test("a file that shrinks under us is an error, not a hang", async (t) => {
  const folder = folderFor(t);
  const file = join(folder, "a.eigen");
  await writeFile(file, golden);
  const pack = await openPack(file);
  const handle = await open(file, "r+");
  await handle.truncate(2000);
  await handle.close();
  await t.rejects(pack.load("terms"), { tag: "source", message: /truncated/ });
  await pack.close();
});

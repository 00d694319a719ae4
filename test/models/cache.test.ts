/**
 * Ranges kept longer than a page or process: in folders in Node, in the Cache API and OPFS in Chromium. Versions are
 * never mixed.
 */
import { createHash } from "node:crypto";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { type CachedSource, cachedSource, type RangeStore } from "eigenlora/cache";
import { folderStore } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { answerOf, bundle, noChromium, openPage } from "../support/browser.ts";
import { folderFor } from "../support/folder.ts";
import { data, packOf } from "../support/packs.ts";
import { type RangeServer, serve } from "../support/range-server.ts";
import { difference, feeds, golden, NODE, packFor } from "../support/sessions.ts";

const TASKS = ["debtags-role", "debtags-use", "sections-0"];
const paths = TASKS.map((id) => `adapters/own-seed/${id}`);
const { bytes: content } = await packOf(paths, { select: { kind: "k", k: 2 } });

async function server(
  t: Test,
  bytes = content,
): Promise<{ server: RangeServer; files: Map<string, Uint8Array>; url: string }> {
  const files = new Map([["a.eigen", bytes]]);
  const server = await serve(files);
  t.teardown(() => server.close());
  return { server, files, url: server.url("a.eigen") };
}

/** Opens, reads all tasks and closes. @returns bytes of the tasks */
async function use(source: ReturnType<typeof cachedSource>, integrity?: string): Promise<Uint8Array[]> {
  const pack = await openPack(source, integrity === undefined ? {} : { integrity });
  const blobs = await blobsOf(pack);
  await pack.close();
  return blobs;
}

async function blobsOf(pack: Pack): Promise<Uint8Array[]> {
  const blobs: Uint8Array[] = [];
  for (const id of TASKS) blobs.push((await pack.load(id)).bytes);
  return blobs;
}

const opened = await openPack(content);
const expected = await blobsOf(opened);
const root = await opened.integrity();

t.test("a second opening reads no bytes", async (t) => {
  const { server: origin, url } = await server(t);
  const folder = folderFor(t);
  const first = cachedSource(url, folderStore(folder));
  t.same(await use(first), expected);
  t.match(first.counts, { hits: 0, misses: 5, damaged: 0, failures: 0 });
  t.same(
    { ...first.reads },
    { requests: 6, bytes: origin.ranges.slice(1).reduce((sum, [a, b]) => sum + b - a, 0), whole: false },
  );
  t.same(origin.methods, ["GET", "GET", "GET", "GET", "GET", "GET"]);
  origin.methods.length = 0;

  const second = cachedSource(new URL(url), folderStore(folder));
  const pack = await openPack(second);
  t.same(await blobsOf(pack), expected);
  t.same(origin.methods, ["GET"], "it asks for the version, and for nothing else");
  t.same({ ...pack.reads }, { requests: 1, bytes: 0, whole: false });
  t.match(second.counts, { hits: 5, misses: 0 });
  t.same(await second.read(100, 20), content.slice(100, 120), "a part of what is kept");
  t.equal(second.byteLength, content.length);
  await pack.close();

  await second.clear();
  t.same(await readdir(folder), []);
  origin.methods.length = 0;
  t.same(await use(cachedSource(url, folderStore(folder))), expected);
  t.equal(origin.methods.length, 6, "cleared");
});

t.test("a file that changed is read anew, and nothing is mixed", async (t) => {
  const { server: origin, files, url } = await server(t);
  const folder = folderFor(t);
  const kept = cachedSource(url, folderStore(folder));
  const pack = await openPack(kept);
  await pack.load(TASKS[0]!);
  const other = content.slice();
  files.set("a.eigen", other);
  origin.etag = '"second"';
  await t.rejects(pack.load(TASKS[1]!), { tag: "source", message: /changed between two reads/ });
  t.same((await pack.load(TASKS[0]!)).bytes, expected[0], "what was read stays");
  await pack.close();
  origin.ranges.length = 0;
  t.same(await use(cachedSource(url, folderStore(folder))), expected);
  t.equal(origin.ranges.length, 6, "all of it is read again");
  t.equal((await readdir(folder)).length, 5, "the old version is gone");
  const names = await readdir(folder);
  origin.etag = undefined;
  await t.rejects(use(cachedSource(url, folderStore(folder))), {
    tag: "source",
    message: /nothing tells its version.*integrity/,
  });
  t.same(await readdir(folder), names);
});

t.test("integrity in place of a version: offline, and at any address", async (t) => {
  const { server: origin, url } = await server(t);
  const store = folderStore(folderFor(t));
  t.same(await use(cachedSource(url, store, { integrity: root }), root), expected);
  t.equal(origin.methods.length, 5);
  await origin.close();
  const offline = cachedSource("http://127.0.0.1:1/moved.eigen?signature=1", store, { integrity: root });
  t.same(await use(offline, root), expected);
  t.equal(offline.reads.requests, 0);
  const another = cachedSource(url, store, { integrity: `sha256-${"A".repeat(43)}=`, retries: 0 });
  await t.rejects(use(another), { tag: "source", message: /refuses the connection/ });
});

t.test("a model is kept whole, and opens offline by a hash that names it", async (t) => {
  const model = await readFile(data("sessions/torchscript.onnx"));
  const origin = await serve(new Map([["model.onnx", model]]));
  const folder = folderFor(t);
  const pack = await packFor("base");
  const integrity = `sha256-${createHash("sha256").update(model).digest("base64")}`;
  const url = origin.url("model.onnx");
  const answer = async (source: CachedSource): Promise<unknown> => {
    const session = await createEigenSession(NODE, source, pack);
    await session.switchTask("two");
    const { data } = (await session.run(feeds(NODE, session)))["logits"]!;
    await session.close();
    return [...(data as Float32Array)];
  };
  const first = cachedSource(url, folderStore(folder), { integrity });
  const logits = await answer(first);
  t.ok(difference(logits as number[], golden("base", "two")) < 1e-5);
  t.equal((await readdir(folder)).length, 2, "the bytes, and their number");
  t.same(await answer(cachedSource(url, folderStore(folder))), logits, "by its version, it is another entry");
  await origin.close();
  const offline = cachedSource(url, folderStore(folder), { integrity });
  t.same(await answer(offline), logits);
  t.equal(offline.byteLength, model.length);
  t.equal(offline.reads.requests, 0);
  await offline.clear();
  t.equal((await readdir(folder)).length, 2, "those of the other");
  await pack.close();
});

t.test("damaged, cut and lost entries are read again", async (t) => {
  const { server: origin, url } = await server(t);
  const folder = folderFor(t);
  await use(cachedSource(url, folderStore(folder)));
  const harm: [string, (path: string, bytes: Uint8Array) => Promise<void>, object][] = [
    ["a bit", (path, bytes) => writeFile(path, bytes.with(7, bytes[7]! ^ 1)), { damaged: 5, misses: 5 }],
    [
      "a bit of the checksum",
      (path, bytes) => writeFile(path, bytes.with(bytes.length - 1, bytes.at(-1)! ^ 1)),
      { damaged: 5 },
    ],
    ["half written", (path, bytes) => writeFile(path, bytes.subarray(0, bytes.length >> 1)), { damaged: 5 }],
    ["empty", (path) => writeFile(path, ""), { damaged: 5 }],
    ["longer", (path, bytes) => writeFile(path, Buffer.concat([bytes, bytes])), { damaged: 5 }],
    ["lost", (path) => rm(path), { damaged: 0, misses: 5 }],
  ];
  for (const [name, damage, counts] of harm) {
    for (const file of await readdir(folder)) await damage(join(folder, file), await readFile(join(folder, file)));
    const source = cachedSource(url, folderStore(folder));
    t.same(await use(source), expected, name);
    t.match(source.counts, { failures: 0, ...counts }, name);
  }
  origin.ranges.length = 0;
  await writeFile(join(folder, "x.tmp"), "");
  t.same(await use(cachedSource(url, folderStore(folder))), expected);
  t.equal(origin.ranges.length, 1, "other files do no harm");
});

t.test("a long read that was broken off goes on where it was", async (t) => {
  const large = new Uint8Array(10 * 2 ** 20 + 5).map((_, i) => (i * 7) % 253);
  const { server: origin, url } = await server(t, large);
  const store = folderStore(folderFor(t));
  origin.faults = [undefined, undefined, undefined, "cut"];
  await t.rejects(cachedSource(url, store, { retries: 0 }).read(3, large.length - 3), { tag: "source", message: /./ });
  origin.ranges.length = 0;
  const source = cachedSource(url, store);
  t.ok(Buffer.from(large.buffer, 3).equals(await source.read(3, large.length - 3)));
  t.match(source.counts, { hits: 2, misses: 1 });
  t.equal(origin.ranges.length, 2);
});

t.test("a store that fails costs requests, and nothing else", async (t) => {
  const { url } = await server(t);
  const full = new Error("QuotaExceededError");
  for (const member of ["get", "put", "keys"] as const) {
    const good = folderStore(folderFor(t));
    const store: RangeStore = { ...good, [member]: () => Promise.reject(full) };
    for (const round of [1, 2]) {
      const source = cachedSource(url, store);
      t.same(await use(source), expected, `${member}, round ${round}`);
      t.equal(source.counts.misses, 5);
      // Nothing is kept yet that could be got.
      if (member === "get" && round === 1) continue;
      t.ok(source.counts.failures > 0);
      t.equal(source.counts.lastFailure, full);
    }
  }
});

t.test("in Chromium, after a reload", { skip: noChromium }, async (t) => {
  const script = `
    import { cachedSource, cacheStore } from "eigenlora/cache";
    import { openPack } from "eigenlora";
    async function use(store) {
      const source = cachedSource("/a.eigen", store);
      const pack = await openPack(source);
      const blobs = [];
      for (const id of ${JSON.stringify(TASKS)}) blobs.push([...(await pack.load(id)).bytes]);
      const { hits, misses, damaged, failures, lastFailure } = source.counts;
      const { requests, bytes } = pack.reads;
      await pack.close();
      return { hits, misses, damaged, failures, error: String(lastFailure), requests, bytes, blobs };
    }
    globalThis.answer = (async () => {
      const answers = {};
      for (const [name, store] of Object.entries({ cache: cacheStore("packs") })) {
        answers[name] = await use(store);
        if (location.hash === "#clear") await cachedSource("/a.eigen", store).clear();
        answers[name].keys = [...(await store.keys())].length;
      }
      return answers;
    })();`;
  const files = new Map([
    ["a.eigen", content],
    ["page.js", await bundle(script)],
  ]);
  const page = await openPage(t, files);
  const blobs = expected.map((bytes) => [...bytes]);
  const good = { damaged: 0, failures: 0, blobs };
  type Answers = Record<string, Record<string, unknown>>;
  const check = async (wanted: object, message: string): Promise<void> => {
    const answers = (await answerOf(page)) as Answers;
    t.match(answers["cache"], { ...good, ...wanted }, message);
  };
  await check({ hits: 0, misses: 5, requests: 6, keys: 5 }, "read");
  await page.reload();
  await check({ hits: 5, misses: 0, requests: 1, bytes: 0, keys: 5 }, "kept");
  await page.goto(`${page.url()}#clear`);
  await page.reload();
  await check({ hits: 5, keys: 0 }, "cleared");
});

t.test("what a browser hides is said", { skip: noChromium }, async (t) => {
  const { url } = await server(t);
  const script = `
    import { openPack } from "eigenlora";
    globalThis.answer = openPack(${JSON.stringify(`${url}?key=secret`)}, { retries: 0 }).catch(({ message, transient }) => ({ message, transient }));`;
  const page = await openPage(t, new Map([["page.js", await bundle(script)]]));
  const { message, transient } = (await answerOf(page)) as { message: string; transient: boolean };
  t.match(
    message,
    /Failed to fetch.*127\.0\.0\.1:\d+ does not let http:\/\/127\.0\.0\.1:\d+ read it.*Access-Control-Allow-Origin/,
  );
  t.notMatch(message, /secret/);
  t.equal(transient, true);
});

/**
 * The engine table of docs/engines.md: one small case (test/support/engine-case.js) in every engine on this machine;
 * folded weights must equal those of Node's js backend to the bit. Chromium, Firefox and WebKitGTK are in
 * test/browsers/engines-browsers.test.ts. A missing engine is skipped by name, and fails where EIGENLORA_REQUIRE lists
 * it.
 */
import { copyFile, mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import t from "tap";
import type { Outcome } from "../support/engine-case.js";
import { caseCode, outcomesOf, prepareCase, WASM } from "../support/engine-material.ts";
import { bundleWorker, metro, noProgram, outputOf, type Program, scriptOf, workerd } from "../support/engines.ts";
import { serve } from "../support/range-server.ts";

const { project, given, engineCase, check } = await prepareCase(t);
const server = await serve(new Map([["tasks.eigen", new Uint8Array(Buffer.from(given.pack, "hex"))]]));
t.teardown(() => server.close());

t.test("node, every build of wasm", async (t) => {
  const variants = ["scalar", "simd"] as const;
  const found = [];
  for (const variant of variants) found.push(await engineCase(given, { backend: "wasm", wasm: { variant } }));
  found.push(await engineCase(given, {}, 2, server.url("tasks.eigen")));
  check(t, found, ["wasm (scalar)", "wasm (simd)", /^wasm/]);
});

const RUNTIMES: readonly [Program, args: string[]][] = [
  ["node22", []],
  ["deno", ["run", "--allow-all", "--node-modules-dir=manual"]],
  ["bun", ["run"]],
];
for (const [program, args] of RUNTIMES) {
  t.test(`${program}, by HTTP ranges`, { skip: noProgram(program) }, async (t) => {
    const file = join(project, "main.js");
    await writeFile(file, caseCode([{ backend: "js" }, {}], "console.log", server.url("tasks.eigen")));
    check(t, outcomesOf(await outputOf(program, ...args, file)), ["js", /^wasm/]);
  });
}

const ALL = ["js", "wasm (relaxed-simd)", "wasm (scalar)", "wasm (simd)", "wasm (relaxed-simd)"];
/**
 * Shells, and backends there: js, the default, then each build that the shell compiles. gjs has no relaxed
 * instructions.
 */
const SHELLS: readonly [Program, args: string[], backends: string[]][] = [
  ["quickjs", ["--script", "--no-unhandled-rejection"], ["js", "js"]],
  ["jsc", [], ALL],
  ["gjs", [], ["js", "wasm (simd)", "wasm (scalar)", "wasm (simd)"]],
];
/** Code in a main loop, which gjs needs for timers and every app has. */
const IN_A_LOOP = (options: readonly object[]): string => `
const loop = new imports.gi.GLib.MainLoop(null, false);
${caseCode(options, "(text) => (globalThis.print(text), loop.quit())")}
loop.run();
`;
for (const [program, args, backends] of SHELLS) {
  t.test(program, { skip: noProgram(program) }, async (t) => {
    const file = join(project, `${program}.js`);
    const options = [{ backend: "js" }, {}, ...WASM].slice(0, backends.length);
    const code = program === "gjs" ? IN_A_LOOP(options) : caseCode(options, "globalThis.print");
    await writeFile(file, await scriptOf(project, code));
    check(t, outcomesOf(await outputOf(program, ...args, file)), backends);
  });
}

for (const exports of [true, false]) {
  const how = exports ? "with package exports" : "without package exports";
  t.test(`hermes, bundled by Metro ${how}`, { skip: noProgram("hermes", "hermesc", "metro") }, async (t) => {
    await writeFile(join(project, "app.js"), caseCode(exports ? [{ backend: "js" }, {}] : [{}], "globalThis.print"));
    const bundle = await metro(project, "app.js", { exports });
    const found = outcomesOf(await outputOf("hermes", "-w", bundle));
    check(t, found, exports ? ["js", "js"] : ["js"]);
    await outputOf("hermesc", "-w", "-emit-binary", "-out", join(project, "app.hbc"), bundle);
    t.pass("the newest compiler takes the same bundle");
  });
}

/**
 * A worker with the case, and with `eigenlora/workerd` on an object with the documented interface of a bucket: R2
 * itself runs at Cloudflare only.
 */
const WORKER = `
import { createRuntime, openPack } from "eigenlora";
import { keptPack, r2Source } from "eigenlora/workerd";
import relaxed from "eigenlora/wasm/relaxed.wasm";
import scalar from "eigenlora/wasm/scalar.wasm";
import simd from "eigenlora/wasm/simd.wasm";
import { engineCase } from "./engine-case.js";
import material from "./material.js";
import bytes from "./tasks.bin";

function bucketOf(objects) {
  const log = [];
  const told = (key) => objects.get(key) && { key, size: objects.get(key).bytes.byteLength, etag: objects.get(key).etag };
  return {
    log,
    head: async (key) => told(key) ?? null,
    async get(key, { range, onlyIf } = {}) {
      log.push({ ...range, etag: onlyIf?.etagMatches ?? null });
      const object = told(key);
      if (!object) return null;
      if (onlyIf && onlyIf.etagMatches !== object.etag) return object;
      const { offset, length } = range ?? { offset: 0, length: object.size };
      const part = objects.get(key).bytes.slice(offset, offset + length);
      return { ...object, arrayBuffer: async () => part };
    },
  };
}
const failure = (promise) => promise.then(() => "", (error) => error.name + ": " + error.message);

export default {
  async test() {
    const found = [];
    for (const options of [{ backend: "js" }, {}])
      found.push(await engineCase(material, options, options.backend ? 500 : 2));
    for (const module of [scalar, simd, relaxed])
      found.push(await engineCase(material, { backend: "wasm", wasm: { module } }));
    console.log(JSON.stringify(found));

    const error = await createRuntime(await openPack(bytes), { backend: "wasm" }).catch((error) => error);
    const objects = new Map([["tasks.eigen", { bytes, etag: "one" }]]);
    const bucket = bucketOf(objects);
    const source = r2Source(bucket, "tasks.eigen");
    const pack = await openPack(source);
    await pack.load("two");
    const ranges = bucket.log.map((one, i) => (i === 0 ? one : { ...one, offset: one.offset > 0, length: one.length > 0 }));
    const beyond = (await failure(source.read(bytes.byteLength, 1))).slice(0, 38);
    objects.set("tasks.eigen", { bytes, etag: "two" });
    const replaced = await failure(pack.load("three"));
    const missing = await failure(openPack(r2Source(bucket, "no.eigen")));
    bucket.log.length = 0;
    const [first, second] = [await keptPack(bucket, "tasks.eigen"), await keptPack(bucket, "tasks.eigen")];
    await first.load("three");
    console.log(JSON.stringify({
      refused: error.name,
      reason: /WebAssembly|Wasm/.test(error.message),
      ranges,
      byteLength: source.byteLength,
      replaced,
      missing,
      beyond,
      kept: first === second,
      whole: bucket.log.length,
      identity: await r2Source(bucket, "tasks.eigen").identify(),
    }));
  },
};
`;

t.test("workerd: js, modules of wasm, a bucket", { skip: noProgram("workerd") }, async (t) => {
  const folder = join(project, "worker");
  await mkdir(folder);
  for (const name of ["scalar", "simd", "relaxed"])
    await copyFile(join(project, `node_modules/eigenlora/dist/wasm/${name}.wasm`), join(folder, `${name}.wasm`));
  await writeFile(join(project, "worker-main.js"), WORKER);
  await bundleWorker(project, "worker-main.js", folder);
  await writeFile(join(folder, "tasks.bin"), Buffer.from(given.pack, "hex"));
  const text = await workerd(folder, ["worker.bundle.js", "scalar.wasm", "simd.wasm", "relaxed.wasm", "tasks.bin"]);
  const lines = text.split("\n").filter((line) => /^[[{]/.test(line));
  if (lines.length < 2) throw new Error(text.slice(0, 4000));
  check(t, JSON.parse(lines[0]!) as Outcome[], [
    ...["js", "js", "wasm (scalar)", "wasm (simd)", "wasm (relaxed-simd)"],
  ]);
  t.same(JSON.parse(lines[1]!), {
    refused: "BackendError",
    reason: true,
    ranges: [
      { offset: 0, length: 1536, etag: null },
      { offset: true, length: true, etag: "one" },
      { offset: true, length: true, etag: "one" },
    ],
    byteLength: given.pack.length / 2,
    replaced: "SourceError: tasks.eigen: the object was replaced between two reads; open it again",
    missing: "SourceError: no.eigen: there is no such object in the bucket; check the key",
    beyond: "SourceError: tasks.eigen: ends at byte",
    kept: true,
    whole: 1,
    identity: "two",
  });
});

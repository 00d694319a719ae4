/** What tasks may become, and the pieces in which they do. */
import { createRuntime, type OpenOptions, openPack, type Pack, type RuntimeOptions } from "eigenlora";
import { taskAdapter } from "eigenlora/build";
import t from "tap";
import { createJsBackend, createWasmBackend, uniform } from "./internals.ts";
import { packFile } from "./vectors/format.js";
import { ranked as rankedModel } from "./vectors/valid.js";

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

t.test("pieces of an operation are small, and together are the whole", async (t) => {
  const random = uniform(3);
  const floats = (count: number): Uint8Array =>
    new Uint8Array(Float32Array.from({ length: count }, () => random() - 0.5).buffer);
  const [rows, columns, rank] = [10, 701, 4000];
  const inputs = [floats(rows * columns), floats(rank * rows), floats(rank * columns)];
  const found: Record<string, Uint8Array[]> = {};
  for (const backend of [createJsBackend(), await createWasmBackend({ variant: "simd" })]) {
    const [base, left, right] = inputs.map((bytes) => {
      const at = { block: backend.allocate(bytes.length, "scratch"), byteOffset: 0 };
      backend.upload(at, bytes);
      return at;
    });
    const make = (count: number) => ({ block: backend.allocate(4 * count, "scratch"), byteOffset: 0 });
    const [out, scale, expanded] = [make(rows * columns), make(columns), make(rows * columns)];
    const shape = {
      base: base!,
      left: left!,
      right: right!,
      dtype: "f32",
      rows,
      columns,
      stride: columns,
      rank,
    } as const;
    const fold = { ...shape, out };
    const norms = { ...shape, out: scale, magnitude: right!, axis: "columns" } as const;
    // Right is a basis too: [rank, columns].
    const expand = {
      out: expanded,
      coefficients: left!,
      basis: right!,
      dtype: "f32",
      rank: rows,
      rows: rank,
      width: columns,
    } as const;
    const pieces = [backend.folding!(fold), backend.scaling!(norms), backend.expanding!(expand)].map(
      (work) => [...work].length,
    );
    t.ok(
      pieces.every((count) => count >= 6),
      `${backend.name}: ${pieces} pieces`,
    );
    found[backend.name] = [
      [out, rows * columns],
      [scale, columns],
      [expanded, rows * columns],
    ].map(([at, count]) => backend.view!(at as typeof out, 4 * (count as number)).slice());
    backend.close();
  }
  for (const [i, name] of ["fold", "scale", "expand"].entries()) {
    const [js, wasm] = [found["js"]![i]!, found["wasm"]![i]!].map((bytes) => new Float32Array(bytes.buffer));
    const off = js!.reduce((most, value, at) => Math.max(most, Math.abs(value - wasm![at]!)), 0);
    t.ok(off < 1e-2, `${name}: ${off}`);
  }
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

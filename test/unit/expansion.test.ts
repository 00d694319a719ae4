/** Limits of expansion, and the pieces in which it works. */
import { createRuntime, type OpenOptions, openPack, type Pack, type RuntimeOptions } from "eigenlora";
import { taskAdapter } from "eigenlora/build";
import t from "tap";
import { packFile } from "../vectors/format.js";
import { ranked as rankedModel } from "../vectors/valid.js";

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

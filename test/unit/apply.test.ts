/**
 * runtime.apply: the unfolded term of a batch, compared with x·ΔWᵀ in f64 with the ΔW of an independent implementation,
 * on every backend, for every kind of term, one task or one per row, from arrays and from buffers of a device.
 */
import { createRuntime, openPack, type View } from "eigenlora";
import { webgpu } from "eigenlora/webgpu";
import t from "tap";
import { backends, dawnMissing, labelOf } from "../support/backend-list.ts";
import { values } from "../support/backend-suite.ts";
import { deltaOf, relativeDifference, tensorsOf } from "../support/compare.ts";
import { countingDevice } from "../support/counting-device.js";
import { uniform } from "../support/internals/base.ts";
import { packOf, vector } from "../support/packs.ts";

/** ΔW of the vector. */
const goldens = await tensorsOf(vector("every-kind.safetensors"));

function view(data: Float32Array, ...shape: number[]): View {
  return { dtype: "f32", shape, data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength), byteOffset: 0 };
}

/** Adds x·ΔWᵀ to y for the rows of a task. */
function addTerm(
  y: Float64Array,
  x: Float32Array,
  delta: ArrayLike<number> | undefined,
  out: number,
  inputs: number,
  from: number,
  to: number,
): void {
  if (!delta) return;
  for (let row = from; row < to; row++) {
    for (let o = 0; o < out; o++)
      for (let i = 0; i < inputs; i++) y[row * out + o]! += x[row * inputs + i]! * delta[o * inputs + i]!;
  }
}

for (const options of await backends()) {
  const name = labelOf(options);
  t.test(`${name}: every kind of term, one task and one per row`, async (t) => {
    const pack = await openPack(vector("every-kind.eigen"));
    const runtime = await createRuntime(pack, { ...options, mode: "core" });
    t.teardown(() => runtime.close());
    const random = uniform(31);
    let applied = 0;
    for (const { name, out, in: inputs, layout } of pack.modules) {
      if (layout === "conv" || layout === "embedding") {
        const of = [view(new Float32Array(inputs), 1, inputs), view(new Float32Array(out), 1, out)] as const;
        await t.rejects(runtime.apply(name, ...of, { tasks: ["terms"] }), {
          name: "TypeError",
          message: /no linear layer/,
        });
        continue;
      }
      for (const [rows, length, tasks] of [
        [3, 5, ["terms", null, "whole"]],
        [4, 1, ["whole", "whole", "head", "terms"]],
        [1, 9, ["whole"]],
        [2, 1, [null, null]],
      ] as const) {
        const dora = tasks.some((task) => goldens.has(`${task}/${name}/magnitude`));
        const x = values(rows * length * inputs, random);
        const before = values(rows * length * out, random);
        const y = before.slice();
        const run = runtime.apply(name, view(x, rows, length, inputs), view(y, rows, length, out), { tasks });
        if (dora) {
          await t.rejects(run, { tag: "task", message: new RegExp(`"${name}": it is no addition`) });
          t.same(y, before, "y is left alone");
          continue;
        }
        await run;
        const expected = Float64Array.from(before);
        for (const [i, task] of tasks.entries())
          addTerm(expected, x, goldens.get(`${task}/${name}/delta`)?.data, out, inputs, i * length, (i + 1) * length);
        const off = relativeDifference(y, expected);
        if (!(off <= 2e-6)) t.fail(`${name}, ${tasks}: off by ${off}`);
        applied++;
      }
    }
    t.ok(applied >= 12, `${applied} batches`);
  });
}

const TASKS = ["debtags-role", "debtags-game", "sections-1"];
const { bytes } = await packOf(
  TASKS.map((n) => `adapters/own-seed/${n}`),
  { dtype: { basis: "int8", coefficients: "f16", head: "f16" } },
  (m) => m.includes("layer.0.attention.self"),
);

t.test("the active task, a blend and strengths: what the terms say", async (t) => {
  const pack = await openPack(bytes);
  const runtime = await createRuntime(pack, { mode: "factors" });
  t.teardown(() => runtime.close());
  const { name, out, in: inputs } = pack.modules[0]!;
  const random = uniform(8);
  for (const selection of ["debtags-role", { "debtags-role": 0.5, "sections-1": -2 }, "sections-1", null] as const) {
    await runtime.switchTask(selection, typeof selection === "object" && selection ? { head: "sections-1" } : {});
    const x = values(6 * inputs, random);
    const y = new Float32Array(6 * out);
    await runtime.apply(name, view(x, 6, inputs), view(y, 6, out));
    const term = runtime.term(name);
    const expected = new Float64Array(6 * out);
    if (term) {
      const { rank, A, Bt } = term;
      addTerm(expected, x, deltaOf({ rank, A, Bt }), out, inputs, 0, 6);
    }
    t.ok(relativeDifference(y, expected) <= 2e-6, JSON.stringify(selection));
  }
});

t.test("shapes and types that do not fit are refused", async (t) => {
  const pack = await openPack(bytes);
  const runtime = await createRuntime(pack, { mode: "core" });
  t.teardown(() => runtime.close());
  const { name, out, in: inputs } = pack.modules[0]!;
  const [x, y] = [view(new Float32Array(2 * inputs), 2, inputs), view(new Float32Array(2 * out), 2, out)];
  await t.rejects(runtime.apply("nothing", x, y), { name: "RangeError", message: /no module "nothing"; nearest: / });
  await t.rejects(runtime.apply(name, { ...x, shape: [2, inputs - 1] }, y), {
    message: new RegExp(`x is \\[2, ${inputs - 1}\\], expected \\[rows, …, ${inputs}\\]`),
  });
  await t.rejects(runtime.apply(name, x, { ...y, dtype: "f16" }), {
    name: "TypeError",
    message: /y is f16, expected f32/,
  });
  await t.rejects(runtime.apply(name, { ...x, shape: [1, 2, inputs] }, y), { message: /x has rows \[1, 2\], y \[2\]/ });
  await t.rejects(runtime.apply(name, x, y, { tasks: TASKS }), { message: /3 tasks for 2 rows/ });
  // A user without a task must not get the active one.
  await t.rejects(runtime.apply(name, x, y, { tasks: [null, undefined as unknown as null] }), {
    name: "TypeError",
    message: /task: expected an id, null for the base/,
  });
  await t.rejects(runtime.apply(name, x, y, { tasks: ["debtags-rule", null] }), {
    tag: "task",
    message: /debtags-role/,
  });
  await t.rejects(runtime.apply(name, { ...x, data: { size: 4, label: "", destroy() {} } }, y), {
    name: "TypeError",
    message: /x lies on a device, and the backend is wasm/,
  });
  const folded = await createRuntime(await openPack(bytes), {
    base: new Map(
      pack.modules.map((m) => [
        `${m.name}.weight`,
        { dtype: "f32", shape: [m.out, m.in], data: new Float32Array(m.out * m.in) },
      ]),
    ),
  });
  t.teardown(() => folded.close());
  await t.rejects(folded.apply(name, x, y), { name: "TypeError", message: /mode "folded"/ });
});

t.test(
  "buffers of a device: a few dispatches whatever the tasks, nothing but coefficients over the bus",
  { skip: (await dawnMissing()) ?? false },
  async (t) => {
    const { device, counts, close } = await countingDevice();
    t.teardown(close);
    const runtime = await createRuntime(await openPack(bytes), { mode: "core", backend: webgpu({ device }) });
    t.teardown(() => runtime.close());
    const oracle = await createRuntime(await openPack(bytes), { mode: "core", backend: "js" });
    const { modules } = runtime.pack;
    const random = uniform(5);
    const [rows, length] = [5, 7];
    const tasks = ["sections-1", null, "debtags-role", "debtags-game", "sections-1"];
    const usage = 128 | 4 | 8;
    for (const { name, out, in: inputs } of modules) {
      const x = values(rows * length * inputs, random);
      const y = values(rows * length * out, random);
      const [bufferX, bufferY] = [x, y].map((array) => {
        const buffer = device.createBuffer({ size: array.byteLength + 16, usage });
        device.queue.writeBuffer(buffer, 16, array as Float32Array<ArrayBuffer>);
        return buffer;
      }) as [GPUBuffer, GPUBuffer];
      Object.assign(counts, { submits: 0, dispatches: 0, written: 0 });
      const on = (buffer: GPUBuffer, width: number): View => ({
        dtype: "f32",
        shape: [rows, length, width],
        data: buffer,
        byteOffset: 16,
      });
      await runtime.apply(name, on(bufferX, inputs), on(bufferY, out), { tasks });
      t.equal(counts.submits, 1, name);
      t.equal(counts.dispatches, 3, "factors, x·Aᵀ, and that times Bt");
      t.ok(counts.written <= 16_384, `${counts.written} bytes: coefficients of the module`);
      await oracle.apply(name, view(x, rows, length, inputs), view(y, rows, length, out), { tasks });
      const staging = device.createBuffer({ size: y.byteLength, usage: 1 | 8 });
      const encoder = device.createCommandEncoder();
      encoder.copyBufferToBuffer(bufferY, 16, staging, 0, y.byteLength);
      device.queue.submit([encoder.finish()]);
      await staging.mapAsync(1);
      t.ok(relativeDifference(new Float32Array(staging.getMappedRange().slice(0)), y) <= 2e-6, "the oracle's");
      staging.destroy();
    }
    await oracle.close();
  },
);

/**
 * A runtime on a WebGPU device: weights in the caller's buffers, devices that are lost or do not answer, and the behaviour of `auto` on
 * them. Skipped by name where Dawn does not start.
 */
import { createRuntime, type DeviceTensor, openPack, type Runtime, type Tensor } from "eigenlora";
import t from "tap";
import { dawnMissing } from "../support/backend-list.ts";
import { seededBase, seededTensors } from "../support/bases.ts";
import { countingDevice } from "../support/counting-device.js";
import { uniform } from "../support/internals/base.ts";
import { packOf } from "../support/packs.ts";

const skip = (await dawnMissing()) ?? false;

/** STORAGE | COPY_SRC | COPY_DST, the usage that a base's buffer needs. */
const USAGE = 128 | 4 | 8;
const TASKS = ["debtags-role", "debtags-game", "sections-1"];
const { bytes: packBytes } = await packOf(
  TASKS.map((n) => `adapters/own-seed/${n}`),
  {},
  (m) => m.includes("layer.0.attention.self"),
);
const { modules } = await openPack(packBytes);

async function weights(runtime: Runtime): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for (const { name } of modules) parts.push((await runtime.readWeight(name)).data);
  return Buffer.concat(parts);
}

function rawBytes({ buffer, byteOffset, byteLength }: Tensor["data"]): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

function bufferOf(device: GPUDevice, bytes: Uint8Array, before = 0): GPUBuffer {
  const buffer = device.createBuffer({ size: Math.ceil((before + bytes.length) / 4) * 4, usage: USAGE });
  const padded = new Uint8Array(buffer.size);
  padded.set(bytes, before);
  device.queue.writeBuffer(buffer, 0, padded);
  return buffer;
}

async function bytesOf(device: GPUDevice, buffer: GPUBuffer): Promise<Buffer> {
  const staging = device.createBuffer({ size: buffer.size, usage: 1 | 8 });
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(buffer, 0, staging, 0, buffer.size);
  device.queue.submit([encoder.finish()]);
  await staging.mapAsync(1);
  const bytes = Buffer.from(staging.getMappedRange().slice(0));
  staging.destroy();
  return bytes;
}

for (const dtype of ["f32", "f16"] as const) {
  t.test(`${dtype} weights in the caller's buffers are folded in place, heads too`, { skip }, async (t) => {
    const { device, counts, close } = await countingDevice();
    t.teardown(close);
    const plain = seededTensors(modules, dtype);
    const head = {
      dtype: "f32",
      shape: [8, 384],
      data: Float32Array.from({ length: 8 * 384 }, (_, i) => i / 1000),
    } as const;
    const bias = { dtype: "f32", shape: [8], data: Float32Array.from({ length: 8 }, (_, i) => i) } as const;
    plain.set("classifier.weight", { ...head, data: head.data.slice() });
    plain.set("classifier.bias", { ...bias, data: bias.data.slice() });
    // All weights in one buffer, from an odd element on; each parameter of the head in one of its own.
    const size = dtype === "f32" ? 4 : 2;
    const all = [...plain].filter(([name]) => !name.startsWith("classifier"));
    const tensors = new Map<string, Tensor | DeviceTensor>();
    const chunks = all.map(([, { data }]) => rawBytes(data));
    const buffer = bufferOf(device, Buffer.concat(chunks), 3 * size);
    let at = 3 * size;
    for (const [i, [name, { shape }]] of all.entries()) {
      tensors.set(name, { dtype, shape, buffer, byteOffset: at });
      at += chunks[i]!.length;
    }
    const headBuffer = bufferOf(device, rawBytes(head.data));
    tensors.set("classifier.weight", { dtype: "f32", shape: head.shape, buffer: headBuffer });
    tensors.set("classifier.bias", { dtype: "f32", shape: bias.shape, buffer: bufferOf(device, rawBytes(bias.data)) });
    const before = await bytesOf(device, buffer);
    const headBefore = await bytesOf(device, headBuffer);

    const runtime = await createRuntime(await openPack(packBytes), { base: tensors, webgpu: { device } });
    t.match(runtime.backend, /^webgpu \(/);
    t.equal(runtime.device, device);
    t.equal(runtime.weight(modules[0]!.name).data, buffer, "a view is the caller's buffer");
    const oracle = await createRuntime(await openPack(packBytes), { backend: "js", base: plain });
    let live = 0;
    for (const task of [...TASKS, null, "debtags-role", "debtags-game", null]) {
      await runtime.switchTask(task);
      await oracle.switchTask(task);
      const found = (await bytesOf(device, buffer)).subarray(3 * size);
      const expected = Buffer.concat(all.map(([name]) => rawBytes(plain.get(name)!.data)));
      t.ok(found.subarray(0, expected.length).equals(expected), `${task}: the oracle's bits`);
      for (const name of ["classifier.weight", "classifier.bias"]) {
        const ours = await runtime.readWeight(name);
        const { shape, data } = plain.get(name)!;
        t.same(ours.shape, shape, `${task}: ${name}`);
        t.ok(Buffer.from(ours.data).equals(rawBytes(data)), `${task}: ${name}`);
      }
      if (task === null) {
        t.equal(counts.live, live || counts.live, "what other heads took is free again, scratch memory is used again");
        live = counts.live;
      }
    }
    t.ok((await bytesOf(device, buffer)).equals(before), "the base's bits at null, around the weights too");
    t.equal((tensors.get("classifier.weight") as DeviceTensor).buffer, headBuffer, "the head's buffer is back");
    t.ok((await bytesOf(device, headBuffer)).equals(headBefore));
    await runtime.close();
    t.doesNotThrow(() => device.queue.writeBuffer(buffer, 0, new Uint8Array(4)), "the caller's buffers stay");
    await oracle.close();
  });
}

t.test("what a base on a device needs is said before anything is done", { skip }, async (t) => {
  const { device, close } = await countingDevice();
  t.teardown(close);
  const { name, out, in: inputs } = modules[0]!;
  const shape = [out, inputs];
  const of = (buffer: GPUBuffer, more = {}): Map<string, Tensor | DeviceTensor> => {
    const tensors: Map<string, Tensor | DeviceTensor> = seededTensors(modules, "f32");
    return tensors.set(`${name.replace("bert.", "")}.weight`, { dtype: "f32", shape, buffer, ...more });
  };
  const pack = await openPack(packBytes);
  const bytes = 4 * out * inputs;
  const good = device.createBuffer({ size: bytes, usage: USAGE });
  await t.rejects(createRuntime(pack, { base: of(good) }), {
    name: "TypeError",
    message: /lies on a device: pass that device/,
  });
  await t.rejects(createRuntime(pack, { base: of(good), backend: "wasm", webgpu: { device } }), {
    name: "TypeError",
    message: /lies on a device: pass that device/,
  });
  await t.rejects(createRuntime(pack, { base: of(good, { byteOffset: 4 }), webgpu: { device } }), {
    tag: "base",
    message: new RegExp(`needs ${bytes} bytes, its data has ${bytes - 4}`),
  });
  const bare = device.createBuffer({ size: bytes, usage: 128, label: "mine" });
  await t.rejects(createRuntime(pack, { base: of(bare), backend: "webgpu", webgpu: { device } }), {
    name: "TypeError",
    message: /"mine".*usage 128; expected .*STORAGE \| COPY_SRC \| COPY_DST/,
  });
  await t.rejects(createRuntime(pack, { base: of(good), policy: "reload", webgpu: { device } }), /read from a file/);
});

t.test("auto: a GPU that is one, where results stay there", { skip }, async (t) => {
  const base = await seededBase(modules);
  const open = async (options: Parameters<typeof createRuntime>[1]): Promise<Runtime> => {
    const runtime = await createRuntime(await openPack(packBytes), options);
    t.teardown(() => runtime.close());
    return runtime;
  };
  // The test does not depend on a GPU in this machine; it checks that a software adapter is passed over.
  const { device: probe, close } = await countingDevice();
  t.teardown(close);
  if (probe.adapterInfo.isFallbackAdapter) {
    const runtime = await open({ base });
    t.match(runtime.backend, /^wasm/);
    t.match(runtime.passedOver, [/^webgpu: the adapter is software \(.+\); ask for it with backend: "webgpu"$/]);
  }
  t.match((await open({ base, webgpu: false })).passedOver, ["webgpu: left out"]);
  t.match((await open({ mode: "core" })).passedOver, ["webgpu: terms are wanted on the CPU"]);
  t.match((await open({ base: seededTensors(modules, "f32") })).passedOver, ["webgpu: weights are wanted on the CPU"]);
  t.match((await open({ base, backend: "webgpu" })).backend, /^webgpu/);
});

/** Makes work on a device's queue never end. */
function hang(device: GPUDevice): void {
  device.queue.onSubmittedWorkDone = () => new Promise(() => undefined);
}

t.test("a lost device is told of once, and fails the switches that wait", { skip }, async (t) => {
  const { device, close } = await countingDevice();
  t.teardown(close);
  const base = await seededBase(modules);
  const runtime = await createRuntime(await openPack(packBytes), { base, webgpu: { device } });
  await runtime.switchTask("debtags-role");
  let losses = 0;
  runtime.addEventListener("devicelost", () => losses++);
  const lost = runtime.switchTask("debtags-game");
  const waiting = runtime.switchTask("sections-1");
  device.destroy();
  for (const each of [lost, waiting]) await t.rejects(each, { tag: "backend", message: /device was lost/ });
  t.equal(runtime.task, "debtags-role", "the previous task");
  t.equal(losses, 1);
  await t.rejects(runtime.switchTask("debtags-game"), { tag: "backend", message: /device was lost/ });
  await runtime.close();
  const next = await createRuntime(await openPack(packBytes), { backend: "webgpu", base });
  await next.switchTask("debtags-role");
  t.equal(next.task, "debtags-role", "a new runtime goes on");
  await next.close();
});

t.test("a device that does not answer counts as lost", { skip }, async (t) => {
  const { device, close } = await countingDevice();
  t.teardown(close);
  const base = await seededBase(modules);
  const runtime = await createRuntime(await openPack(packBytes), { base, webgpu: { device, timeout: 300 } });
  t.teardown(() => runtime.close());
  await runtime.switchTask("debtags-role");
  hang(device);
  await t.rejects(runtime.switchTask("debtags-game"), {
    tag: "backend",
    message: /the device did not answer within 300 ms/,
  });
  t.equal(runtime.task, "debtags-role");
  await t.rejects(runtime.switchTask(null), { tag: "backend", message: /did not answer/ }, "and stays so");
});

t.test(
  "random switches of several callers: each report is one task's, the last is what is there",
  { skip },
  async (t) => {
    const base = await seededBase(modules);
    const runtime = await createRuntime(await openPack(packBytes), { base, backend: "webgpu" });
    t.teardown(() => runtime.close());
    const random = uniform(4);
    const seen = new Map<string | null, Buffer>();
    for (const task of [...TASKS, null]) {
      await runtime.switchTask(task);
      seen.set(task, await weights(runtime));
    }
    t.equal(new Set([...seen.values()].map((bytes) => bytes.toString("base64"))).size, seen.size, "each is its own");
    for (let round = 0; round < 20; round++) {
      const choices = Array.from({ length: 4 }, () => [...TASKS, null][Math.floor(random() * 4)]!);
      const reports = await Promise.all(choices.map((task) => runtime.switchTask(task)));
      t.same(
        reports.map(({ task }) => task),
        choices,
      );
      const last = choices.at(-1)!;
      t.equal(runtime.task, last);
      const now = await weights(runtime);
      t.ok(seen.get(last)!.equals(now), String(last));
    }
  },
);

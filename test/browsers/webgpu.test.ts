/**
 * Tests of the WebGPU backend only: cost per switch, weights in parts and in the caller's buffers, faults, devices that
 * are lost or do not answer, and the behaviour of `auto` on them. backends.test.ts has the suite of all backends.
 * Skipped by name where Dawn does not start.
 */
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import {
  createRuntime,
  type DeviceTensor,
  type Dtype,
  type FloatDtype,
  openPack,
  type Runtime,
  type Tensor,
} from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { webgpu } from "eigenlora/webgpu";
import t from "tap";
import { dawnMissing } from "../support/backend-list.ts";
import { values } from "../support/backend-suite.ts";
import { seededBase, seededTensors } from "../support/bases.ts";
import { countingDevice } from "../support/counting-device.js";
import { encodeTensor, uniform } from "../support/internals/base.ts";
import { whileAlive } from "../support/internals/models.ts";
import { type Backend, createBackend, createWebgpuBackend, Faults, type Slice } from "../support/internals/runtime.ts";
import { data, packOf } from "../support/packs.ts";

const skip = (await dawnMissing()) ?? false;

/** STORAGE | COPY_SRC | COPY_DST, the usage that a base's buffer needs. */
const USAGE = 128 | 4 | 8;
const TASKS = ["debtags-role", "debtags-game", "sections-1"];
const paths = TASKS.map((name) => `adapters/own-seed/${name}`);
const { bytes: packBytes } = await packOf(paths, {}, (module) => module.includes("layer.0.attention.self"));
const { modules } = await openPack(packBytes);

// The flag gives new contexts the function, and no others.
setFlagsFromString("--expose-gc");
const collectGarbage = runInNewContext("gc") as () => void;
setFlagsFromString("--no-expose-gc");

async function weights(runtime: Runtime): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for (const { name } of modules) parts.push((await runtime.readWeight(name)).data);
  return Buffer.concat(parts);
}

t.test("a device keeps nothing of what was waited for, and ends all waits when it is lost", async (t) => {
  type Loss = Awaited<GPUDevice["lost"]>;
  let lose!: (loss: Loss) => void;
  // Stands for a device: what is waited for here needs none.
  const device = { lost: new Promise<Loss>((resolve) => (lose = resolve)) } as GPUDevice;
  const run = whileAlive(device);
  const faults = new Faults(device);
  const results: WeakRef<Uint8Array>[] = [];
  const one = async (): Promise<void> => {
    const result = await run(async () => new Uint8Array(1e5));
    results.push(new WeakRef(result));
    await faults.wait(Promise.resolve());
  };
  for (let i = 0; i < 50; i++) await one();
  await t.rejects(
    run(() => {
      throw new Error("at once");
    }),
    { message: "at once" },
  );
  for (let round = 0; round < 20 && results.some((result) => result.deref()); round++) {
    collectGarbage();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const kept = results.filter((result) => result.deref()).length;
  t.ok(kept <= 1, `${kept} of ${results.length} are kept`);

  const never = new Promise<never>(() => {});
  const waits = [run(() => never), faults.wait(never)];
  lose({ reason: "destroyed", message: "gone." } as Loss);
  for (const wait of waits) await t.rejects(wait, { tag: "backend", message: /lost \(destroyed\): gone\. / });
  await t.rejects(
    run(async () => 1),
    { message: /lost/ },
  );
  t.equal((await faults.lost).tag, "backend");
});

function put(backend: Backend, bytes: Uint8Array, byteOffset: number): Slice {
  const block = backend.allocate(byteOffset + bytes.byteLength, "scratch");
  backend.upload({ block, byteOffset }, bytes);
  return { block, byteOffset };
}

async function take(backend: Backend, at: Slice, byteLength: number): Promise<Uint8Array> {
  return backend.read ? backend.read(at, byteLength) : backend.view!(at, byteLength).slice();
}

function bytesOf({ buffer, byteOffset, byteLength }: ArrayBufferView): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

interface Case {
  basis: Dtype;
  type: FloatDtype;
  rank: number;
  /** Rows of the basis. */
  K: number;
  rows: number;
  columns: number;
  /** Elements between two rows. */
  gap: number;
  /** First elements of tensors in their blocks. */
  skew: number;
  seed: number;
}

/** One expansion and one fold with it, seeded. @returns the weight */
async function compute(backend: Backend, job: Case): Promise<Uint8Array> {
  const { basis, type, rank, K, rows, columns, gap, skew, seed } = job;
  const random = uniform(seed);
  const stride = columns + gap;
  const size = type === "f32" ? 4 : 2;
  const length = (rows - 1) * stride + columns;
  const right = put(backend, new Uint8Array(4 * rank * columns), 4 * skew);
  const base = put(
    backend,
    encodeTensor(type, values(length, random), 1, length).subarray(0, length * size),
    size * skew,
  );
  const out = put(backend, new Uint8Array(length * size), size * ((skew + 1) % 4));
  const inputs = {
    coefficients: put(backend, bytesOf(values(rank * K, random)), 4 * skew),
    basis: put(backend, encodeTensor(basis, values(K * columns, random), K, columns), 4 * skew),
    left: put(backend, bytesOf(values(rank * rows, random)), 4),
  };
  const { left, ...expansion } = inputs;
  backend.expand({ out: right, ...expansion, dtype: basis, rank, rows: K, width: columns });
  backend.fold({ out, base, dtype: type, rows, columns, stride, left, right, rank });
  const weight = await take(backend, out, length * size);
  for (const { block } of [right, base, out, ...Object.values(inputs)]) backend.free(block);
  return weight;
}

t.test("weights larger than a binding are folded in parts, to the same bits", { skip }, async (t) => {
  const whole = await createWebgpuBackend();
  const parts = await createWebgpuBackend({ bindingBytes: 1536 });
  t.teardown(() => (whole.close(), parts.close()));
  for (const type of ["f32", "f16", "bf16"] as const) {
    for (const [rows, columns, gap] of [
      [37, 31, 0],
      [64, 16, 3],
      [5, 100, 0],
      [33, 7, 1],
    ] as const) {
      for (const skew of [0, 1, 3]) {
        const job = { basis: "f32", type, rank: 3, K: 2, rows, columns, gap, skew, seed: 5 } as const;
        t.same(await compute(parts, job), await compute(whole, job), `${type} [${rows}, ${columns}] from ${skew}`);
      }
    }
  }
  t.throws(() => parts.expand({ ...expansionOf(parts, 1000), dtype: "f32", rank: 1, rows: 1, width: 1000 }), {
    tag: "backend",
    message: /out has 4000 bytes.*at most 1536.*maxStorageBufferBindingSize/s,
  });
});

function expansionOf(backend: Backend, width: number): { out: Slice; coefficients: Slice; basis: Slice } {
  const [out, basis] = [put(backend, new Uint8Array(4 * width), 0), put(backend, new Uint8Array(4 * width), 0)];
  return { out, basis, coefficients: put(backend, new Uint8Array(4), 0) };
}

t.test("halves at any offset: copies and uploads, shared memory too", { skip }, async (t) => {
  const backend = await createWebgpuBackend();
  t.teardown(() => backend.close());
  const source = Uint8Array.from({ length: 62 }, (_, i) => i + 1);
  for (const [from, to, length] of [
    [0, 0, 62],
    [2, 0, 6],
    [2, 4, 50],
    [4, 2, 2],
    [6, 8, 4],
    [4, 2, 58],
  ] as const) {
    const block = backend.allocate(64, "scratch");
    backend.upload({ block, byteOffset: 0 }, new Uint8Array(64).fill(0xa5));
    const expected = new Uint8Array(64).fill(0xa5);
    expected.set(source.subarray(from, from + length), to);
    backend.copy({ block: put(backend, source, 0).block, byteOffset: from }, { block, byteOffset: to }, length);
    t.same(await take(backend, { block, byteOffset: 0 }, 64), expected, `copy of ${length} bytes, ${from} → ${to}`);
    const shared = new Uint8Array(new SharedArrayBuffer(length));
    shared.set(source.subarray(from, from + length));
    backend.upload({ block, byteOffset: 0 }, new Uint8Array(64).fill(0xa5));
    backend.upload({ block, byteOffset: to }, shared);
    t.same(await take(backend, { block, byteOffset: 0 }, 64), expected, `upload of ${length} bytes to ${to}`);
    t.same(await take(backend, { block, byteOffset: to }, length), source.subarray(from, from + length), "read");
  }
});

t.test(
  "a device of the user's: 500 switches, one submit each, nothing but coefficients over the bus",
  { skip },
  async (t) => {
    const { device, counts, close } = await countingDevice();
    t.teardown(close);
    const pack = await openPack(packBytes);
    const base = await seededBase(modules);
    const runtime = await createRuntime(pack, { backend: webgpu({ device }), base });
    t.match(runtime.backend, /^webgpu \(/, "on the device that is given");
    const name = pack.modules[0]!.name;
    const view = runtime.weight(name);
    t.ok((view.data as { size: number }).size >= 4 * view.shape[0]! * view.shape[1]!, "a view is the device's buffer");
    const read = (): Promise<Buffer> => weights(runtime);
    const seen = new Map<string | null, Buffer>([[null, await read()]]);
    const oracle = await createRuntime(await openPack(packBytes), { backend: "js", base });
    for (const task of TASKS) {
      await runtime.switchTask(task);
      await oracle.switchTask(task);
      seen.set(task, await read());
      for (const module of pack.modules) {
        const [a, b] = [await runtime.readWeight(module.name), await oracle.readWeight(module.name)].map(
          ({ data }) => new Float32Array(data.slice().buffer),
        );
        const largest = b!.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
        if (!a!.every((x, i) => Math.abs(x - b![i]!) <= 1e-6 * largest))
          t.fail(`${task}, ${module.name}: not the oracle's`);
      }
    }
    const adapters = await readAdapters(paths.map(data));
    /** f32 coefficients of a task: rank × (components and mean of both sides), for every module. */
    const coefficientBytes = (task: string | null): number => {
      const adapter = adapters.find(({ id }) => id === task);
      const rows = ({ name, A: [A], B: [B] }: (typeof pack.modules)[0]): number =>
        (adapter?.modules.get(name)?.rank ?? 0) * (A!.tensor.rows + B!.tensor.rows);
      return pack.modules.reduce((bytes, module) => bytes + 4 * rows(module), 0);
    };
    const live = counts.live;
    const random = uniform(12);
    for (let i = 0; i < 500; i++) {
      const task = i === 499 ? null : [...TASKS, null][Math.floor(random() * 4)]!;
      Object.assign(counts, { submits: 0, dispatches: 0, written: 0 });
      const report = await runtime.switchTask(task);
      if (counts.submits > 1) throw new Error(`switch ${i} took ${counts.submits} submits`);
      if (counts.written > coefficientBytes(task) + 4096) throw new Error(`switch ${i} sent ${counts.written} bytes`);
      if (counts.live !== live) throw new Error(`switch ${i}: ${counts.live} bytes are live, ${live} were`);
      const expected = task === null ? 0 : pack.modules.length + 1;
      if (counts.dispatches !== expected)
        throw new Error(`switch ${i} took ${counts.dispatches} dispatches, expected ${expected}`);
      // Until then, heads of different tasks take turns in a few arrays of the CPU's.
      if (i > 100 && report.allocated !== 0) throw new Error(`switch ${i} allocated ${report.allocated} bytes`);
      if (i % 50 === 0 || (task === null && i % 5 === 0) || i === 499) {
        if (!seen.get(task)!.equals(await read())) throw new Error(`switch ${i}: ${task} is not what it was`);
      }
    }
    t.ok(seen.get(null)!.equals(await read()), "pristine at the end");
    counts.written = 0;
    await runtime.switchTask("sections-1");
    t.equal(counts.written, coefficientBytes("sections-1"), "a warm switch sends the coefficients");
    t.comment(`${counts.written} bytes written, ${live} live`);
    const { total, basis, coefficients, pristine, active, scratch, reserved } = runtime.memory();
    t.equal(total, basis + coefficients + pristine + active + scratch + reserved);
    for (const adapter of adapters) await adapter.close();
    await oracle.close();
    await runtime.close();
    t.equal(counts.live, 0, "every buffer is destroyed");
    t.doesNotThrow(() => device.createCommandEncoder(), "a device that was given is left alone");
  },
);

t.test("backends are tried in order, the last one's error is thrown, and what is none is refused first", async (t) => {
  const none = webgpu({ device: { label: "", limits: {}, queue: {}, createBuffer: () => ({}) } as never });
  const { backend, passedOver } = await createBackend({ backend: [none, "js", "wasm"] });
  t.equal(backend.name, "js");
  t.match(passedOver, [/^webgpu: device: expected a WebGPU device$/]);
  await t.rejects(createBackend({ backend: ["gpu" as "js", none] }), {
    name: "RangeError",
    message: /^backend: expected "wasm", "js" or webgpu\(\) of "eigenlora\/webgpu", got "gpu"$/,
  });
  for (const backend of [none, [none]])
    await t.rejects(createBackend({ backend }), { message: /^webgpu: device: expected/ });
  await t.rejects(createBackend({ backend: [] }), { message: /^backend: expected at least one/ });
  t.throws(() => webgpu({ gpu: 1 } as object), { message: /^webgpu: unknown option "gpu"/ });
});

t.test(
  "more memory than a buffer may have is refused, what the device refuses later is reported",
  { skip },
  async (t) => {
    const { device, close } = await countingDevice();
    t.teardown(close);
    const { backend } = await createBackend({ backend: webgpu({ device }) });
    t.throws(() => backend.allocate(2 ** 40, "pristine"), {
      tag: "backend",
      message: /1099511627776 bytes \(pristine\).*at most/s,
    });
    const block = backend.allocate(64, "scratch");
    (block.device as GPUBuffer).destroy();
    backend.copy({ block, byteOffset: 0 }, { block: backend.allocate(64, "scratch"), byteOffset: 0 }, 64);
    await t.rejects(async () => backend.finish(), {
      tag: "backend",
      message: /submit, validation: .*eigenlora scratch/s,
    });
    await t.resolves(async () => backend.finish(), "reported once");
    backend.close();
  },
);

function bufferOf(device: GPUDevice, bytes: Uint8Array, before = 0): GPUBuffer {
  const buffer = device.createBuffer({ size: Math.ceil((before + bytes.length) / 4) * 4, usage: USAGE });
  const padded = new Uint8Array(buffer.size);
  padded.set(bytes, before);
  device.queue.writeBuffer(buffer, 0, padded);
  return buffer;
}

async function bytesIn(device: GPUDevice, buffer: GPUBuffer): Promise<Buffer> {
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
    const chunks = all.map(([, { data }]) => bytesOf(data));
    const buffer = bufferOf(device, Buffer.concat(chunks), 3 * size);
    let at = 3 * size;
    for (const [i, [name, { shape }]] of all.entries()) {
      tensors.set(name, { dtype, shape, buffer, byteOffset: at });
      at += chunks[i]!.length;
    }
    const headBuffer = bufferOf(device, bytesOf(head.data));
    tensors.set("classifier.weight", { dtype: "f32", shape: head.shape, buffer: headBuffer });
    tensors.set("classifier.bias", { dtype: "f32", shape: bias.shape, buffer: bufferOf(device, bytesOf(bias.data)) });
    const before = await bytesIn(device, buffer);
    const headBefore = await bytesIn(device, headBuffer);

    const runtime = await createRuntime(await openPack(packBytes), { base: tensors, backend: webgpu({ device }) });
    t.match(runtime.backend, /^webgpu \(/);
    t.equal(runtime.device, device);
    t.equal(runtime.weight(modules[0]!.name).data, buffer, "a view is the caller's buffer");
    const oracle = await createRuntime(await openPack(packBytes), { backend: "js", base: plain });
    let live = 0;
    for (const task of [...TASKS, null, "debtags-role", "debtags-game", null]) {
      await runtime.switchTask(task);
      await oracle.switchTask(task);
      const found = (await bytesIn(device, buffer)).subarray(3 * size);
      const expected = Buffer.concat(all.map(([name]) => bytesOf(plain.get(name)!.data)));
      t.ok(found.subarray(0, expected.length).equals(expected), `${task}: the oracle's bits`);
      for (const name of ["classifier.weight", "classifier.bias"]) {
        const ours = await runtime.readWeight(name);
        const { shape, data } = plain.get(name)!;
        t.same(ours.shape, shape, `${task}: ${name}`);
        t.ok(Buffer.from(ours.data).equals(bytesOf(data)), `${task}: ${name}`);
      }
      if (task === null) {
        t.equal(counts.live, live || counts.live, "what other heads took is free again, scratch memory is used again");
        live = counts.live;
      }
    }
    t.ok((await bytesIn(device, buffer)).equals(before), "the base's bits at null, around the weights too");
    t.equal((tensors.get("classifier.weight") as DeviceTensor).buffer, headBuffer, "the head's buffer is back");
    t.ok((await bytesIn(device, headBuffer)).equals(headBefore));
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
  await t.rejects(createRuntime(pack, { base: of(good), backend: ["wasm", webgpu()] }), {
    name: "TypeError",
    message: /lies on a device: pass that device/,
  });
  await t.rejects(createRuntime(pack, { base: of(good, { byteOffset: 4 }), backend: webgpu({ device }) }), {
    tag: "base",
    message: new RegExp(`needs ${bytes} bytes, its data has ${bytes - 4}`),
  });
  const bare = device.createBuffer({ size: bytes, usage: 128, label: "mine" });
  await t.rejects(createRuntime(pack, { base: of(bare), backend: ["wasm", webgpu({ device })] }), {
    name: "TypeError",
    message: /"mine".*usage 128; expected .*STORAGE \| COPY_SRC \| COPY_DST/,
  });
  await t.rejects(
    createRuntime(pack, { base: of(good), policy: "reload", backend: webgpu({ device }) }),
    /read from a file/,
  );
});

/** Makes work on a device's queue never end. */
function hang(device: GPUDevice): void {
  device.queue.onSubmittedWorkDone = () => new Promise(() => undefined);
}

t.test("a lost device is told of once, and fails the switches that wait", { skip }, async (t) => {
  const { device, close } = await countingDevice();
  t.teardown(close);
  const base = await seededBase(modules);
  const runtime = await createRuntime(await openPack(packBytes), { base, backend: webgpu({ device }) });
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
  const next = await createRuntime(await openPack(packBytes), { backend: webgpu(), base });
  await next.switchTask("debtags-role");
  t.equal(next.task, "debtags-role", "a new runtime goes on");
  await next.close();
});

t.test("a device that does not answer counts as lost", { skip }, async (t) => {
  const { device, close } = await countingDevice();
  t.teardown(close);
  const base = await seededBase(modules);
  const runtime = await createRuntime(await openPack(packBytes), { base, backend: webgpu({ device, timeout: 300 }) });
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
    const runtime = await createRuntime(await openPack(packBytes), { base, backend: webgpu() });
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

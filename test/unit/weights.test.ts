/**
 * After any sequence of switches and failures, the weights are those of the last switch that succeeded: bit for bit
 * those of a runtime that has done nothing else. On every backend, for every kind of host, folded and not.
 */
import {
  type BackendOptions,
  type CpuView,
  createRuntime,
  type DeviceTensor,
  openPack,
  type Runtime,
  type RuntimeOptions,
  type Tensor,
  type View,
  type WeightHost,
} from "eigenlora";
import { webgpu } from "eigenlora/webgpu";
import t from "tap";
import { backends, dawnMissing, labelOf } from "../support/backend-list.ts";
import { countingDevice } from "../support/counting-device.js";
import { writeSafetensors } from "../support/internals/base.ts";
import { allOf, renamedHost } from "../support/internals/pack.ts";
import { memoryHost } from "../support/internals/runtime.ts";
import { concat } from "../support/packs.ts";
import { chance, randomBase, randomPack, randomSelection, type Wanted } from "../support/random-packs.ts";
import { soak } from "../support/required.ts";

/** Bytes of all parameters of the model, by name, with shapes. */
type State = ReadonlyMap<string, string>;

/** A runtime on a base of its own. */
interface Rig {
  readonly runtime: Runtime;
  /** Parameters that a model would read. */
  state(): Promise<State>;
  /**
   * Makes a write fail, counted from now; `lasting`: nothing can be put back afterwards either. Only hosts that can be
   * made to fail have it.
   */
  fail?(write: number, lasting: boolean): void;
}

type Make = (pack: Uint8Array, base: Map<string, Tensor>, options: BackendOptions) => Promise<Rig>;

function print({ dtype, shape, data, byteOffset }: View): string {
  const bytes = data as Uint8Array;
  const size = shape.reduce((a, b) => a * b, dtype === "f32" ? 4 : 2);
  return `${dtype} [${shape}] ${Buffer.from(bytes.buffer, bytes.byteOffset + byteOffset, size).toString("hex")}`;
}

function printTensor({ dtype, shape, data }: Tensor): string {
  return print({ dtype, shape, data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength), byteOffset: 0 });
}

async function fileOf(base: Map<string, Tensor>): Promise<Uint8Array> {
  const names = { f32: "F32", f16: "F16", bf16: "BF16" } as const;
  const entries = [...base].map(([name, { dtype, shape, data }]) => {
    return { name, dtype: names[dtype], shape, read: () => data as Uint8Array };
  });
  return concat(await allOf(writeSafetensors(entries)));
}

/** The base's file with the runtime's changes. */
async function overlaid(runtime: Runtime, base: Map<string, Tensor>): Promise<State> {
  const state = new Map([...base].map(([name, tensor]) => [name, printTensor(tensor)]));
  for (const [name] of runtime.changes()) state.set(name, print(await runtime.readWeight(name)));
  return state;
}

function copyOf(base: Map<string, Tensor>): Map<string, Tensor> {
  return new Map([...base].map(([name, tensor]) => [name, { ...tensor, data: tensor.data.slice() }]));
}

const fromFile =
  (more: RuntimeOptions): Make =>
  async (pack, base, options) => {
    const runtime = await createRuntime(await openPack(pack), { ...options, base: await fileOf(base), ...more });
    return { runtime, state: () => overlaid(runtime, base) };
  };

const inMemory: Make = async (pack, base, options) => {
  const tensors = copyOf(base);
  const runtime = await createRuntime(await openPack(pack), { ...options, base: tensors });
  return { runtime, state: async () => new Map([...tensors].map(([name, tensor]) => [name, printTensor(tensor)])) };
};

/** A host that shows nothing until it commits, as a database would. */
const staging: Make = async (pack, base, options) => {
  const live = new Map(
    [...base].map(([name, t]) => [name, { ...t, data: new Uint8Array(t.data.slice().buffer), byteOffset: 0 }]),
  );
  let [failAt, rollbackFails, writes] = [Infinity, false, 0];
  const host: WeightHost = {
    *list() {
      for (const [name, { dtype, shape }] of live) yield { name, dtype, shape };
    },
    read: async (name) => live.get(name)!,
    begin() {
      const staged = new Map<string, CpuView | null>();
      return {
        write(name, view) {
          if (writes++ === failAt) {
            // Half of the writes have happened, as where a disk fills up.
            if (rollbackFails)
              for (const [one, value] of staged)
                if (value) live.set(one, { ...value, data: value.data as Uint8Array<ArrayBuffer>, byteOffset: 0 });
            throw new Error("disk full");
          }
          const data = view && (view.data as Uint8Array<ArrayBuffer>).slice(view.byteOffset);
          staged.set(name, view && { ...view, data: data!, byteOffset: 0 });
        },
        commit() {
          for (const [name, value] of staged)
            value
              ? live.set(name, { ...value, data: value.data as Uint8Array<ArrayBuffer>, byteOffset: 0 })
              : live.delete(name);
        },
        rollback() {
          if (rollbackFails) throw new Error("the disk is gone");
        },
      };
    },
  };
  const runtime = await createRuntime(await openPack(pack), { ...options, base: host });
  return {
    runtime,
    state: async () => new Map([...live].map(([name, view]) => [name, print(view)])),
    fail(write, rollback) {
      [failAt, rollbackFails, writes] = [write, rollback, 0];
    },
  };
};

/** Arrays of the caller, one with a failing write: once, so that the old values can be put back, or from then on. */
const inMemoryFailing: Make = async (pack, base, options) => {
  const tensors = copyOf(base);
  const inner = memoryHost(tensors);
  let [failAt, always, writes] = [Infinity, false, 0];
  const host: WeightHost = {
    ...inner,
    begin(names) {
      const transaction = inner.begin!(names);
      return {
        ...transaction,
        write(name, view) {
          const at = writes++;
          if (at === failAt || (always && at > failAt)) throw new Error("disk full");
          return transaction.write(name, view);
        },
      };
    },
  };
  const runtime = await createRuntime(await openPack(pack), { ...options, base: host });
  return {
    runtime,
    state: async () => new Map([...tensors].map(([name, tensor]) => [name, printTensor(tensor as Tensor)])),
    fail(write, lasting) {
      [failAt, always, writes] = [write, lasting, 0];
    },
  };
};

const gpu = (await dawnMissing()) === undefined ? await countingDevice() : undefined;
t.teardown(() => gpu?.close());

/** STORAGE | COPY_SRC | COPY_DST. */
const USAGE = 128 | 4 | 8;

const onDevice: Make = async (pack, base, options) => {
  const { device } = gpu!;
  const tensors = new Map<string, Tensor | DeviceTensor>();
  for (const [name, { dtype, shape, data }] of base) {
    const padded = new Uint8Array(Math.ceil(data.byteLength / 4) * 4);
    padded.set(data as Uint8Array);
    const buffer = device.createBuffer({ size: padded.length, usage: USAGE });
    device.queue.writeBuffer(buffer, 0, padded);
    tensors.set(name, { dtype, shape, buffer });
  }
  const runtime = await createRuntime(await openPack(pack), { ...options, base: tensors, backend: webgpu({ device }) });
  return {
    runtime,
    async state() {
      const state = new Map<string, string>();
      for (const name of tensors.keys()) state.set(name, print(await runtime.readWeight(name)));
      return state;
    },
  };
};

/**
 * A framework whose matrices lie on the device, and move each time before they are folded; other parameters go through
 * the CPU's memory.
 */
const moving: Make = async (pack, base, options) => {
  const { device } = gpu!;
  const rest = copyOf(base);
  const bufferOf = (bytes: Uint8Array): GPUBuffer => {
    const buffer = device.createBuffer({ size: Math.ceil(bytes.length / 4) * 4, usage: USAGE });
    const padded = new Uint8Array(buffer.size);
    padded.set(bytes);
    device.queue.writeBuffer(buffer, 0, padded);
    return buffer;
  };
  const placed = new Map<string, { readonly of: Tensor; buffer: GPUBuffer }>();
  for (const [name, of] of rest) {
    if (of.shape.length > 1) placed.set(name, { of, buffer: bufferOf(of.data as Uint8Array) });
  }
  const inner = memoryHost(rest);
  const host: WeightHost = {
    ...inner,
    view(name) {
      const found = placed.get(name);
      return found && { dtype: found.of.dtype, shape: found.of.shape, data: found.buffer, byteOffset: 0 };
    },
    flush(names) {
      for (const name of names) {
        const found = placed.get(name)!;
        found.buffer.destroy();
        found.buffer = bufferOf(new Uint8Array(found.buffer.size).fill(7));
      }
    },
  };
  const runtime = await createRuntime(await openPack(pack), { ...options, base: host, backend: webgpu({ device }) });
  return {
    runtime,
    async state() {
      const state = new Map([...rest].map(([name, tensor]) => [name, printTensor(tensor)]));
      for (const [name, { buffer }] of placed) {
        state.set(name, print(await runtime.readWeight(name)));
        if (runtime.weight(name).data !== buffer) throw new Error(`${name} is where it no longer lies`);
      }
      return state;
    },
  };
};

/** Terms and what else changes. */
const unfolded =
  (mode: "core" | "factors", based = true): Make =>
  async (pack, base, options) => {
    const runtime = await createRuntime(await openPack(pack), {
      ...options,
      mode,
      ...(based && { base: await fileOf(base) }),
    });
    return {
      runtime,
      async state() {
        const state = new Map([...runtime.changes()].map(([name, view]) => [name, print(view)]));
        for (const { name } of runtime.pack.modules) {
          for (const [part, value] of Object.entries(runtime.term(name) ?? {})) {
            const bytes =
              value instanceof Float32Array ? Buffer.from(value.slice().buffer).toString("hex") : String(value);
            state.set(`term ${name} ${part}`, bytes);
          }
        }
        return state;
      },
    };
  };

const HOSTS: Record<string, Make> = {
  "a file": fromFile({}),
  "a file that is read again": fromFile({ policy: "reload" }),
  "arrays in memory": inMemory,
  "arrays that cannot all be written": inMemoryFailing,
  "a host that commits": staging,
  core: unfolded("core"),
  factors: unfolded("factors"),
  "core without a base": unfolded("core", false),
};

interface Outcome {
  readonly state: State | undefined;
  readonly error: string | undefined;
}

async function outcomeOf(rig: Rig, { selection, head }: Wanted): Promise<Outcome> {
  try {
    await rig.runtime.switchTask(selection, head === undefined ? {} : { head });
  } catch (error) {
    return { state: undefined, error: (error as Error).message };
  }
  return { state: await rig.state(), error: undefined };
}

/** Outcome of a selection on a runtime that has done nothing else. */
async function alone(
  make: Make,
  pack: Uint8Array,
  base: Map<string, Tensor>,
  options: BackendOptions,
  wanted: Wanted,
): Promise<Outcome> {
  const rig = await make(pack, base, options);
  const outcome = await outcomeOf(rig, wanted);
  await rig.runtime.close();
  return outcome;
}

/** The differences, in short. */
function differing(found: State, expected: State): string[] {
  return [...new Set([...found.keys(), ...expected.keys()])].filter((name) => found.get(name) !== expected.get(name));
}

const packs = new Map<number, ReturnType<typeof randomPack>>();

/** Random switches. @returns how many succeeded, and how many were refused by name */
async function walk(make: Make, options: BackendOptions, seed: number, steps: number): Promise<Record<string, number>> {
  const random = chance(seed);
  if (!packs.has(seed)) packs.set(seed, randomPack(seed));
  const { bytes, ids } = await packs.get(seed)!;
  const base = randomBase(seed, random.of(["f32", "f32", "f16", "bf16"] as const));
  const rig = await make(bytes, base, options);
  const known = new Map<string, Outcome>();
  const fresh = async (wanted: Wanted): Promise<Outcome> => {
    const key = JSON.stringify(wanted);
    const outcome = known.get(key) ?? (await alone(make, bytes, base, options, wanted));
    known.set(key, outcome);
    return outcome;
  };
  const counts = { made: 0, refused: 0, failed: 0, torn: 0 };
  let last: Wanted = { selection: null };
  const check = async (state: State, what: string): Promise<void> => {
    t.strictSame(rig.runtime.task, last.selection);
    const off = differing(state, (await fresh(last)).state!);
    if (off.length > 0) throw new Error(`seed ${seed}, ${what}, at ${JSON.stringify(last)}: ${off.join(", ")} differ`);
  };
  await check(await rig.state(), "at the start");
  for (let step = 0; step < steps; step++) {
    const wanted = randomSelection(ids, random);
    const what = `step ${step}, ${JSON.stringify(wanted)}`;
    const fails = rig.fail && random() < 0.3;
    const rollback = random() < 0.5;
    if (fails) rig.fail!(random.of([0, 1, 3]), rollback);
    const { state, error } = await outcomeOf(rig, wanted);
    rig.fail?.(Infinity, false);
    if (state) {
      counts.made++;
      last = wanted;
      await check(state, what);
    } else if (error!.startsWith("disk full")) {
      counts.failed++;
      if (rollback) {
        counts.torn++;
        if (!/could not be put back: (the disk is gone|disk full)/.test(error!)) throw new Error(`${what}: ${error}`);
        for (const read of [() => rig.runtime.changes(), () => rig.runtime.weight("enc.q.weight")]) {
          let said = "";
          try {
            read();
          } catch (refusal) {
            said = (refusal as Error).message;
          }
          if (said !== error) throw new Error(`${what}: it was read all the same`);
        }
        last = random.of([{ selection: null }, { selection: random.of(ids) }]);
        const repaired = await outcomeOf(rig, last);
        if (!repaired.state) throw new Error(`${what}, repaired by ${JSON.stringify(last)}: ${repaired.error}`);
        await check(repaired.state, `${what}, repaired`);
      } else await check(await rig.state(), `${what}, rolled back`);
    } else {
      counts.refused++;
      const alone = await fresh(wanted);
      if (alone.error !== error) throw new Error(`${what}: ${error}; alone ${alone.error ?? "it works"}`);
      await check(await rig.state(), `${what}, refused`);
    }
  }
  await rig.runtime.switchTask(null);
  last = { selection: null };
  await check(await rig.state(), "null at the end");
  await rig.runtime.close();
  return counts;
}

for (const options of await backends()) {
  const label = labelOf(options);
  t.test(`${label}: any sequence ends as its last switch alone`, async (t) => {
    const hosts = {
      ...HOSTS,
      ...(typeof options.backend === "object" && { "buffers of a device": onDevice, "buffers that move": moving }),
    };
    for (const [host, make] of Object.entries(hosts)) {
      const total = { made: 0, refused: 0, failed: 0, torn: 0 };
      const runs = label === "js" ? (soak ? 16 : 6) : options.backend === "wasm" ? (soak ? 4 : 2) : 2;
      for (let seed = 1; seed <= runs; seed++) {
        const counts = await walk(make, options, seed, typeof options.backend === "object" ? 8 : 16);
        for (const [what, count] of Object.entries(counts)) total[what as keyof typeof total] += count;
      }
      t.ok(total.made > runs && total.refused > 0, `${host}: ${JSON.stringify(total)}`);
      if (options.backend === "js" && /commits|cannot/.test(host)) t.ok(total.failed > total.torn && total.torn > 0);
    }
  });
}

for (const [host, make] of Object.entries({ ...HOSTS, ...(gpu && { "buffers of a device": onDevice }) }))
  t.test(
    `${host}: a switch that takes long has pauses, in which nobody sees half of it and it can be aborted`,
    async (t) => {
      // Every look at the clock finds that much time has passed, so that there is a pause after each module.
      const { now } = performance;
      let time = 0;
      performance.now = () => (time += 50);
      t.teardown(() => (performance.now = now));
      const counts = { made: 0, aborted: 0, seen: 0, refused: 0 };
      for (let seed = 1; seed <= (make === onDevice ? (soak ? 3 : 2) : soak ? 8 : 4); seed++) {
        const random = chance(seed);
        const { bytes, ids } = await (packs.get(seed) ?? randomPack(seed));
        const base = randomBase(seed, "f32");
        const options: BackendOptions = { backend: make === onDevice ? webgpu() : "js" };
        const rig = await make(bytes, base, options);
        let last: Wanted = { selection: null };
        for (let step = 0; step < 6; step++) {
          const wanted = { selection: random.of([...ids, null]) };
          const before = await rig.state();
          const controller = new AbortController();
          let over = false;
          const abortAfter = random.of([0, 1, 2, 100, Infinity, Infinity, Infinity]);
          const looking = (async () => {
            for (let turn = 0; ; turn++) {
              await new Promise(setImmediate);
              if (over) return;
              if (turn === abortAfter) controller.abort();
              try {
                rig.runtime.changes();
                if (rig.runtime.mode !== "folded" && differing(await rig.state(), before).length > 0)
                  throw new Error("half a switch");
                counts.seen++;
              } catch (error) {
                if (!/between two tasks: wait for a switch/.test((error as Error).message)) throw error;
                counts.refused++;
              }
            }
          })();
          const result = await rig.runtime.switchTask(wanted.selection, { signal: controller.signal }).then(
            () => "made",
            (error: Error) => (error.name === "AbortError" ? "aborted" : error.message),
          );
          over = true;
          await looking;
          if (result === "made") last = wanted;
          else if (result !== "aborted") {
            // Some tasks need a base.
            if (!/pass `base`/.test(result)) throw new Error(`${host}, seed ${seed}: ${result}`);
            continue;
          }
          counts[result as "made" | "aborted"]++;
          if (rig.runtime.task !== last.selection) throw new Error(`${host}: the task is ${rig.runtime.task}`);
          const { state: expected } = await alone(make, bytes, base, options, last);
          const off = differing(await rig.state(), expected!);
          if (off.length > 0)
            throw new Error(`${host}, seed ${seed}, step ${step}, ${result}: ${off.join(", ")} differ`);
        }
        await rig.runtime.close();
      }
      t.ok(counts.made > 0 && counts.aborted > 0, `${host}: ${JSON.stringify(counts)}`);
      if (/array|file/.test(host)) t.ok(counts.refused > 0, "weights between two tasks are not handed out");
      if (/^core$|factors/.test(host))
        t.ok(counts.seen > 0, "the terms from before are there until all of the new ones are");
    },
  );

t.test("one weight under the names of two modules", async (t) => {
  const host = memoryHost(new Map([["w", { dtype: "f32", shape: [1, 1], data: Float32Array.of(1) }]]));
  const listed = renamedHost(host, new Map(["a", "b"].map((name) => [name, "w"]))).list();
  t.same(
    Array.from(listed, ({ name }) => name),
    ["a.weight", "b.weight"],
  );
});

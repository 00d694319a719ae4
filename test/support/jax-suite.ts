/** The promises of `jaxHost`, on any device of jax-js. Runs in Node and in browsers. */
import { createRuntime, openPack, type Runtime, type RuntimeOptions } from "eigenlora";
import { type Jax, type JaxTree, jaxHost } from "eigenlora/jax";
import { webgpu } from "eigenlora/webgpu";
import { difference } from "./compare.ts";
import { asKernel, packFor, SELECTIONS, selections, trafficOf, type Weights, weightsOf } from "./frameworks.ts";
import type { SuiteTest } from "./stand-in.ts";

/** An array of jax-js. */
interface Arr {
  readonly ref: Arr;
  readonly refCount: number;
  readonly shape: number[];
  add(other: Arr): Arr;
  astype(dtype: string): Arr;
  reshape(shape: number[]): Arr;
  data(): Promise<Float32Array>;
  dispose(): void;
  _putSync(backend: Memory): Arr;
}

/** Memory of a device, in counted slots. */
interface Memory {
  malloc(size: number, data?: Uint8Array): number;
  incRef(slot: number): void;
  decRef(slot: number): void;
}

type Layer = { kernel: Arr; bias: Arr };
type Params = { net: { tokens: { embedding: Arr }; query: Layer; classifier: Layer } };

/** The parts of the module that are used here. */
export type Module = Jax & {
  readonly Array: { readonly prototype: Arr };
  readonly numpy: {
    array(values: Float32Array, options: object): Arr;
    matmul(a: Arr, b: Arr): Arr;
    tanh(a: Arr): Arr;
  };
  readonly tree: { dispose(tree: unknown): void };
  init(device: string): Promise<string[]>;
  getWebGPUDevice(): never;
};

const TEXT = ["net.tokens", "net.query"];
/** Tokens 1, 8 and 4 of 9. */
const ROWS = Float32Array.from({ length: 27 }, (_, i) => Number(i === 1 || i === 17 || i === 22));

export function jaxSuite(t: SuiteTest, jax: Module, device: string): void {
  const { numpy: np } = jax;
  const gpu = (): RuntimeOptions => (device === "webgpu" ? { backend: webgpu({ device: jax.getWebGPUDevice() }) } : {});
  const rows = np.array(ROWS, { shape: [3, 9], device });

  function paramsOf(weights: Weights): Params {
    const of = (name: string): Arr => {
      const { shape, data } = name === "net.tokens.weight" ? weights.get(name)! : asKernel(weights.get(name)!);
      return np.array(data.slice(), { shape: [...shape], device });
    };
    const layer = (name: string): Layer => ({ kernel: of(`${name}.weight`), bias: of(`${name}.bias`) });
    const net = {
      tokens: { embedding: of("net.tokens.weight") },
      query: layer("net.query"),
      classifier: layer("net.classifier"),
    };
    return { net };
  }

  function run({ net: { tokens, query, classifier } }: Params): Arr {
    const inner = np.matmul(np.matmul(rows.ref, tokens.embedding.ref), query.kernel.ref).add(query.bias.ref);
    return np.matmul(np.tanh(inner), classifier.kernel.ref).add(classifier.bias.ref);
  }

  const attach = async (params: unknown, more: RuntimeOptions = {}): Promise<Runtime> => {
    const base = jaxHost(jax, params as JaxTree);
    const runtime = await createRuntime(await openPack(await packFor(TEXT)), { base, ...gpu(), ...more });
    t.teardown(() => runtime.close());
    return runtime;
  };

  t.test("a model answers as one with weights folded by hand", async (t) => {
    const params = paramsOf(weightsOf(TEXT, null));
    const first = await run(params).data();
    const runtime = await attach(params);
    for (const task of [...SELECTIONS, "more", null, "same", null] as const) {
      await runtime.switchTask(task);
      const other = paramsOf(weightsOf(TEXT, task));
      const [found, expected] = [run(params), run(other)];
      t.strictSame(found.shape, expected.shape, `${task}: ${expected.shape}`);
      const values = await found.data();
      const off = difference(values, await expected.data());
      t.ok(off < 1e-5, `${task}: ${off}`);
      if (task === null) t.ok(difference(values, first) === 0, "the base's own answer");
      jax.tree.dispose(other);
    }
    await runtime.close();
    t.ok(difference(await run(params).data(), first) === 0, "the parameters are there when the runtime is closed");
  });

  t.test("1000 switches leak nothing and end at the base's bits", async (t) => {
    const memory = memoryOf(jax, device);
    const params = paramsOf(weightsOf(TEXT, null));
    const host = jaxHost(jax, params as never);
    const runtime = await createRuntime(await openPack(await packFor(TEXT)), { base: host, ...gpu() });
    const look = async (): Promise<string> => {
      const values: string[] = [];
      for (const { name } of host.list()) values.push(`${name} ${(await host.read(name)).data}`);
      return values.join("\n");
    };
    const known = new Map<string | null, string>();
    for (const task of SELECTIONS) {
      await runtime.switchTask(task);
      known.set(task, await look());
    }
    const slots = memory.live;
    let wrong = 0;
    for (const [i, task] of [...selections(1000)].entries()) {
      await runtime.switchTask(task);
      if (memory.live !== slots) wrong++;
      if (i % 50 === 0 && (await look()) !== known.get(task)) wrong++;
    }
    t.equal(wrong, 0);
    await runtime.switchTask(null);
    t.ok((await look()) === known.get(null), "the base's bits");
    const { tokens, query, classifier } = params.net;
    for (const array of [tokens.embedding, query.kernel, query.bias, classifier.kernel, classifier.bias])
      t.equal(array.refCount, 1, "each array has one owner");
    await runtime.close();
    jax.tree.dispose(params);
    t.equal(memory.live, slots - 5, "and with them all memory is free");
    memory.stop();
  });

  t.test("what was asked before a switch is answered with the weights from before", async (t) => {
    const params = paramsOf(weightsOf(TEXT, null));
    const runtime = await attach(params);
    let expected = await run(params).data();
    for (const task of ["plain", "same", "more", "plain"] as const) {
      const asked = run(params);
      const turned = params.net.query.kernel.ref.reshape([30]);
      const values = await params.net.query.kernel.ref.data();
      await runtime.switchTask(task);
      t.ok(difference(await asked.data(), expected) === 0, `before ${task}`);
      t.ok(difference(await turned.data(), values) === 0, `another array of the same memory keeps it at ${task}`);
      const now = await params.net.query.kernel.ref.data();
      t.ok(difference(now, values) > 0.01, `and the weight has others at ${task}`);
      expected = await run(params).data();
    }
  });

  t.test("on WebGPU matrices never leave the device", async (t) => {
    if (device !== "webgpu") return void t.comment("not on WebGPU");
    const runtime = await attach(paramsOf(weightsOf(TEXT, null)));
    for (const task of ["plain", null, "plain", null]) await runtime.switchTask(task);
    // The zeros of new arrays with fewer than 128 numbers, and the positions of the new arrays for the kernels.
    const fresh = 4 * (9 * 6 + 6 * 5) + 2 * 4 * 13;
    for (const task of ["plain", null]) {
      const traffic = await trafficOf(runtime, () => runtime.switchTask(task));
      t.equal(traffic.read, 0, `${task}: bytes read`);
      t.equal(
        traffic.written,
        traffic.coefficients + (task === null ? fresh - 2 * 4 * 13 : fresh),
        `${task}: bytes written`,
      );
    }
  });

  t.test("float16", async (t) => {
    if (!("Float16Array" in globalThis)) return void t.comment("this engine has no Float16Array, which jax-js needs");
    await jax.init("cpu");
    const halves = (name: string): Arr => {
      const { shape, data } = weightsOf(TEXT, null).get(name)!;
      return np.array(data.slice(), { shape: [...shape], device: "cpu" }).astype("float16");
    };
    const flat = { "net.tokens.weight": halves("net.tokens.weight"), "net.query.weight": halves("net.query.weight") };
    const read = (): Promise<Float32Array> => flat["net.query.weight"].ref.astype("float32").data();
    const first = (await read()).slice();
    const runtime = await createRuntime(await openPack(await packFor(TEXT)), { base: jaxHost(jax, flat as never) });
    await runtime.switchTask("plain");
    const expected = weightsOf(TEXT, "plain").get("net.query.weight")!.data;
    const off = difference(await read(), expected);
    t.ok(off > 0 && off < 0.004, `${off}: folded, and rounded to half precision`);
    await runtime.switchTask(null);
    t.ok(difference(await read(), first) === 0, "the base's own values");
    await runtime.close();
  });

  t.test("a flat tree with names of its own, and what is refused", async (t) => {
    const weights = weightsOf(TEXT, null);
    const flat: Record<string, Arr> = {};
    for (const [name, { shape, data }] of weights) {
      if (!name.startsWith("net.classifier"))
        flat[name.replace("net.query", "first")] = np.array(data.slice(), { shape: [...shape], device });
    }
    const refusal = /"net\.query" is not in the base; candidates: .*first\.weight\. .*option `names`/;
    await t.rejects(attach(flat), { tag: "base", message: refusal });
    const runtime = await attach(flat, { names: new Map([["net.query", "first.weight"]]) });
    await t.rejects(runtime.switchTask("more"), { tag: "base", message: /brings "net\.classifier\.weight"/ });
    const { tokens, query } = paramsOf(weights).net;
    const headless = await attach({ net: { tokens, query } });
    await t.rejects(headless.switchTask("same"), {
      tag: "base",
      message: /brings "net\.classifier\.weight", which the model does not have.*ignore: \["net\.classifier\.weight"\]/,
    });
    t.throws(() => jaxHost({} as never, flat as never), { name: "TypeError", message: /the module @jax-js\/jax/ });
    t.throws(() => jaxHost(jax, {}), { name: "TypeError", message: /a tree of arrays/ });
  });
}

/** Counts the slots in use of a device's memory, among those made from now on. */
function memoryOf(jax: Module, device: string): { readonly live: number; stop(): void } {
  const { prototype } = jax.Array;
  const { _putSync } = prototype;
  let backend: Memory | undefined;
  prototype._putSync = function (memory) {
    backend = memory;
    return _putSync.call(this, memory);
  };
  const two = [1, 2].map((value) => jax.numpy.array(Float32Array.of(value), { shape: [1], device }));
  two[0]!.add(two[1]!).dispose();
  prototype._putSync = _putSync;
  const memory = backend!;
  const { malloc, incRef, decRef } = memory;
  const slots = new Map<number, number>();
  const count = (slot: number, more: number): void => {
    const refs = (slots.get(slot) ?? NaN) + more;
    if (refs === 0) slots.delete(slot);
    else if (refs > 0) slots.set(slot, refs);
  };
  memory.malloc = (...of) => {
    const slot = malloc.apply(memory, of);
    slots.set(slot, 1);
    return slot;
  };
  memory.incRef = (slot) => (count(slot, 1), incRef.call(memory, slot));
  memory.decRef = (slot) => (count(slot, -1), decRef.call(memory, slot));
  return {
    get live() {
      return slots.size;
    },
    stop: () => void Object.assign(memory, { malloc, incRef, decRef }),
  };
}

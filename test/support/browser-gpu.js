/**
 * Runs in a browser: sessions of mode "folded" on WebGPU, the work that switches give to the device, and devices that
 * are not the one given or are lost. Only reports; the test judges.
 */
/// <reference types="@webgpu/types" />
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as plain from "onnxruntime-web";
import * as native from "onnxruntime-web/webgpu";
import { tensorsOf } from "./tensors.js";

/** The builds of onnxruntime-web that have WebGPU. */
const BUILDS = { "onnxruntime-web/webgpu": native, "onnxruntime-web": /** @type {typeof native} */ (plain) };
for (const { env } of Object.values(BUILDS)) {
  Object.assign(env.wasm, { wasmPaths: "/ort/", numThreads: 1 });
  env.logLevel = "error";
}

/** @typedef {string | null | Record<string, number>} Selection */
/** @typedef {Record<string, { type: "int64", dims: number[], data: number[] }>} Feeds */
/** @typedef {Awaited<ReturnType<typeof open>>} Session */

/** Bytes of live buffers with our labels, on all devices. */
let live = 0;
/**
 * Work that devices are given now; `sent`: bytes that others than us send. @type {{ submits: number, written: number,
 * coefficients: number, sent: number } | undefined}
 */
let counts;
watchDevices();

function watchDevices() {
  const { createBuffer } = GPUDevice.prototype;
  const { destroy } = GPUBuffer.prototype;
  const { submit, writeBuffer } = GPUQueue.prototype;
  /** @type {WeakSet<GPUBuffer>} */
  const ours = new WeakSet();
  GPUDevice.prototype.createBuffer = function (/** @type {GPUBufferDescriptor} */ descriptor) {
    const buffer = createBuffer.call(this, descriptor);
    if (descriptor.label?.startsWith("eigenlora")) {
      live += buffer.size;
      ours.add(buffer);
    } else if (counts && descriptor.mappedAtCreation) counts.sent += buffer.size;
    return buffer;
  };
  GPUBuffer.prototype.destroy = function () {
    if (ours.delete(this)) live -= this.size;
    return destroy.call(this);
  };
  GPUQueue.prototype.submit = function (/** @type {Iterable<GPUCommandBuffer>} */ commands) {
    if (counts) counts.submits++;
    return submit.call(this, commands);
  };
  /** @type {(this: GPUQueue, ...args: Parameters<GPUQueue["writeBuffer"]>) => undefined} */
  const counted = function (buffer, at, source, start = 0, size) {
    if (counts) {
      // Start and size are in elements of a typed array, in bytes of others.
      const element = "BYTES_PER_ELEMENT" in source ? Number(source.BYTES_PER_ELEMENT) : 1;
      const bytes = size === undefined ? source.byteLength - start * element : size * element;
      counts.written += bytes;
      if (!ours.has(buffer)) counts.sent += bytes;
      if (buffer.label === "eigenlora scratch") counts.coefficients++;
    }
    return writeBuffer.call(this, buffer, at, source, start, size);
  };
  GPUQueue.prototype.writeBuffer = /** @type {GPUQueue["writeBuffer"]} */ (counted);
}

/**
 * @param {typeof native} ort
 * @param {GPUDevice} [device]
 * @param {"core" | "folded"} [mode]
 * @param {string} [model]
 */
async function open(ort, device, mode = "folded", model = "torchscript") {
  const executionProviders = /** @type {any} */ ([device ? { name: "webgpu", device } : "webgpu"]);
  return createEigenSession(ort, `/${model}.onnx`, await openPack("/tasks.eigen"), {
    mode,
    session: { executionProviders },
  });
}

/**
 * @param {typeof native} ort
 * @param {Session} session
 * @param {Feeds} feeds
 * @returns {Promise<number[]>} the first output
 */
async function answer(ort, session, feeds) {
  const results = await session.run(tensorsOf(ort, session.inputNames, feeds));
  return [.../** @type {Float32Array} */ (results[session.outputNames[0]].data)];
}

/**
 * @param {() => Promise<unknown>} work
 * @returns {Promise<{ tag?: string, name: string, message: string } | "fulfilled">}
 */
async function failure(work) {
  try {
    await work();
    return "fulfilled";
  } catch (error) {
    const { tag, name, message } = /** @type {Error & { tag?: string }} */ (error);
    return { ...(tag !== undefined && { tag }), name, message };
  }
}

/**
 * Switches one session many times.
 * @param {Feeds} feeds
 * @param {Selection[]} selections null first
 * @param {number} switches
 * @param {string} model
 */
export async function switching(feeds, selections, switches, model) {
  const ort = native;
  const { create } = ort.InferenceSession;
  let created = 0;
  ort.InferenceSession.create = /** @type {typeof create} */ (
    (...args) => (created++, /** @type {any} */ (create)(...args))
  );
  const session = await open(ort, undefined, "folded", model);
  const { pack } = session;
  const ask = () => answer(ort, session, feeds);
  /** @param {Selection} selection */
  const change = async (selection) => {
    counts = { submits: 0, written: 0, coefficients: 0, sent: 0 };
    const { bytesFed } = await session.switchTask(selection, headOf(selection));
    const asked = counts;
    counts = undefined;
    let values = 0;
    for (const id of selection === null ? [] : typeof selection === "string" ? [selection] : Object.keys(selection)) {
      for (const { A, B } of (await pack.load(id)).terms)
        for (const side of [A, B]) values += side ? side.tensor.rows * side.tensor.width : 0;
    }
    return { ...asked, bytesFed, bytesOfCoefficients: 4 * values };
  };

  const before = await ask();
  // After one round all arrays exist: those that grew for one selection are prepared again for the earlier ones.
  for (const selection of selections) await change(selection);
  /** @type {number[][]} */
  const known = [];
  for (const selection of selections) {
    await change(selection);
    known.push(await ask());
  }
  const warm = live;
  let state = 1;
  const random = () => (state = (state * 48271) % 2147483647) % selections.length;
  /** @type {Awaited<ReturnType<typeof change>>[]} */
  const costs = [];
  /** @type {string[]} */
  const wrong = [];
  const levels = new Set([warm]);
  /** @param {number[]} found @param {number} at @param {string} when */
  const check = (found, at, when) => {
    if (!same(found, known[at])) wrong.push(`${when}: ${JSON.stringify(selections[at])}`);
  };
  for (let i = 0; i < switches; i++) {
    const at = random();
    costs.push(await change(selections[at]));
    levels.add(live);
    check(await ask(), at, `switch ${i}`);
  }

  // Nothing is awaited: each run answers for the last switch asked for before it.
  await change(selections[1]);
  let last = 1;
  const all = [];
  for (let i = 0; i < switches; i++) {
    for (let caller = 0; caller < 3; caller++) {
      const at = last;
      all.push(ask().then((found) => check(found, at, `run ${caller} before switch ${i}`)));
    }
    all.push(session.switchTask(selections[(last = random())], headOf(selections[last])));
  }
  all.push(ask().then((found) => check(found, last, "run after the last switch")));
  await Promise.all(all);

  await change("two");
  const two = await ask();
  const aborting = new AbortController();
  const failures = {
    unknown: await failure(() => session.switchTask("too")),
    aborted: await failure(() => session.switchTask("three", { signal: AbortSignal.abort() })),
    abortedLater: await failure(() => {
      const switched = session.switchTask("three", { signal: aborting.signal });
      queueMicrotask(() => aborting.abort());
      return switched;
    }),
    rows: await failure(() => session.run({}, { tasks: ["two"] })),
  };
  const afterFailures = { same: same(await ask(), two), task: session.task };
  await change(null);
  const { mode, reason, probe } = session;
  const report = {
    ...{ mode, reason, probe, before, known, costs, wrong, created, failures, afterFailures },
    ...{ levels: [...levels], back: same(await ask(), before), memory: session.memory(), live },
  };
  await session.close();
  ort.InferenceSession.create = create;
  return { ...report, afterRelease: live, released: await failure(ask) };
}

/**
 * Uses a device of the caller's in the provider's options.
 * @param {Feeds} feeds
 * @param {keyof typeof BUILDS} build
 */
export async function given(feeds, build) {
  const ort = BUILDS[build];
  const adapter = /** @type {GPUAdapter} */ (await navigator.gpu.requestAdapter());
  const device = await adapter.requestDevice();
  // A session on onnxruntime's own device, which it then names as the one in use.
  const other = await open(ort);
  const session = await open(ort, device);
  /** @type {Record<string, number[]>} */
  const answers = {};
  for (const task of ["base", "two"]) {
    for (const one of [session, other]) await one.switchTask(task === "base" ? null : task);
    answers[task] = await answer(ort, session, feeds);
    answers[`${task}, other`] = await answer(ort, other, feeds);
  }
  const { reason, probe } = session;
  await session.close();
  // The given device still belongs to the caller.
  device.pushErrorScope("validation");
  device.createBuffer({ size: 16, usage: GPUBufferUsage.STORAGE }).destroy();
  const usable = (await device.popErrorScope()) === null;
  await other.close();
  device.destroy();
  return { answers, reason, otherReason: other.reason, probe, usable, live };
}

/**
 * Loses the device during a run and a switch.
 * @param {Feeds} feeds
 * @param {keyof typeof BUILDS} build
 * @param {"core" | "folded"} [mode]
 */
export async function lost(feeds, build, mode = "folded") {
  const ort = BUILDS[build];
  // onnxruntime-web does not handle a download that fails then.
  addEventListener("unhandledrejection", (event) => event.reason.name === "AbortError" && event.preventDefault());
  const session = await open(ort, undefined, mode);
  const device = /** @type {GPUDevice} */ (await ort.env.webgpu.device);
  await session.switchTask("two");
  await answer(ort, session, feeds);
  const told = new Promise((resolve) => session.addEventListener("devicelost", ({ detail }) => resolve(detail)));
  const ask = () => answer(ort, session, feeds);
  const under = [failure(ask), failure(() => session.switchTask("three")), failure(ask)];
  device.destroy();
  const [run, change, next] = await Promise.all(under);
  const after = {
    run: await failure(ask),
    again: await failure(ask),
    switch: await failure(() => session.switchTask("three")),
  };
  return { run, change, next, after, told: await told, release: await failure(() => session.close()), live };
}

/**
 * Compares components as the pack stores them with floats, in mode "core".
 * @param {Feeds} feeds
 * @param {keyof typeof BUILDS} build
 * @param {string} basis number format of the pack's components
 */
export async function small(feeds, build, basis) {
  const ort = BUILDS[build];
  const pack = await openPack(`/${basis}.eigen`);
  /** @type {Record<string, { bytes: number, probe: string, answers: number[][] }>} */
  const found = {};
  for (const components of /** @type {const} */ (["stored", "f32"])) {
    const session = await createEigenSession(ort, "/torchscript.onnx", pack, {
      mode: "core",
      components,
      session: { executionProviders: ["webgpu"] },
    });
    const answers = [];
    for (const task of [...pack.tasks.keys(), null]) {
      await session.switchTask(task);
      answers.push(await answer(ort, session, feeds));
    }
    found[components] = { bytes: session.memory().basis, probe: session.probe.result, answers };
    await session.close();
  }
  await pack.close();
  return found;
}

/**
 * What a switch writes to the device, and what runs send, beside a model without tasks.
 * @param {Feeds} feeds
 * @param {keyof typeof BUILDS} build
 * @param {"core" | "factors"} mode
 */
export async function placed(feeds, build, mode) {
  const ort = BUILDS[build];
  const executionProviders = ["webgpu"];
  const plain = await ort.InferenceSession.create("/torchscript.onnx", { executionProviders });
  const pack = await openPack("/tasks.eigen");
  const session = await createEigenSession(ort, "/torchscript.onnx", pack, { mode, session: { executionProviders } });
  /** @param {() => Promise<unknown>} work */
  const count = async (work) => {
    counts = { submits: 0, written: 0, coefficients: 0, sent: 0 };
    await work();
    const { written, sent } = counts;
    counts = undefined;
    return { written, sent };
  };
  const tasks = [null, "two", "three", "five", "two", null];
  const found = [];
  const bare = /** @type {any} */ (plain);
  await answer(ort, bare, feeds);
  const expected = await count(() => answer(ort, bare, feeds));
  for (const task of tasks) {
    let bytesFed = 0;
    const switched = await count(async () => ({ bytesFed } = await session.switchTask(task)));
    const answers = await answer(ort, session, feeds);
    const run = await count(() => answer(ort, session, feeds));
    found.push({ task, answers, bytesFed, switched, run });
  }
  // Runs and switches that nobody waits for.
  const all = [];
  for (let i = 0; i < 12; i++) {
    const { task, answers } = found[i % found.length];
    all.push(session.switchTask(task));
    all.push(answer(ort, session, feeds).then((now) => same(now, answers)));
  }
  const inOrder = (await Promise.all(all)).every((one) => one !== false);
  const memory = session.memory();
  const held = live;
  await session.close();
  await plain.release();
  await pack.close();
  return { found, expected, inOrder, memory, held, left: live };
}

/** Opens a new session after a lost device. @param {Feeds} feeds */
export async function again(feeds) {
  const session = await open(native);
  await session.switchTask("two");
  const found = await answer(native, session, feeds);
  await session.close();
  return found;
}

/** Head of a selection: blends need to know whose labels they have. @param {Selection} selection */
function headOf(selection) {
  return selection !== null && typeof selection === "object" ? { head: Object.keys(selection)[0] } : {};
}

/** @param {number[]} a @param {number[]} b */
function same(a, b) {
  return a.length === b.length && a.every((v, i) => Object.is(v, b[i]));
}

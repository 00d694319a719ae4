/**
 * Whole switches on a GPU: createRuntime and switchTask on a counting device, compared with the wasm backend on the
 * same pack and base, in turns; and whether the device holds the bytes that `runtime.memory()` reports.
 */
/// <reference types="@webgpu/types" />
import { createRuntime, openPack } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import { webgpu } from "eigenlora/webgpu";
import { max, median, min } from "simple-statistics";
import { decodeTensor } from "../../dist/src/tensor/dtypes.js";
import { model } from "../../examples/minilm.js";
import { f32Entry, folderOf, packOfK, safetensorsOf, smallNumbers, withAdapters } from "./adapters.js";
import { describe, noDevice, openDevice, SOFTWARE } from "./gpu-device.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {{ name: string, bytes: Uint8Array, base: import("eigenlora").BaseInput }} Case
 * @typedef {{ name: string, out: number, in: number }} Shape
 */

const TASKS = 8;
const COMPONENTS = [16, 32];
/** Modules, side and rank of the synthetic pack. */
const [MODULES, SIZE, RANK] = [24, 768, 8];

/**
 * Real adapters on the model's own f16 weights and on f32 ones; then a synthetic pack of larger modules.
 * @returns {AsyncGenerator<Case>}
 */
async function* cases() {
  const onnx = await openOnnxHost(model);
  const { modules, packs } = await withAdapters([folderOf("own-seed")], async (adapters) => ({
    modules: [...adapters[0].modules.values()],
    packs: await Promise.all(COMPONENTS.map((k) => packOfK(adapters, k))),
  }));
  for (const [i, k] of COMPONENTS.entries()) {
    const name = `${modules.length} modules of MiniLM, K ${k}`;
    yield { name: `${name}, f16`, bytes: packs[i], base: onnx };
    yield { name: `${name}, f32`, bytes: packs[i], base: await weights(modules) };
  }
  const larger = Array.from({ length: MODULES }, (_, i) => ({ name: `layer.${i}`, out: SIZE, in: SIZE }));
  const made = Array.from({ length: TASKS }, (_, i) => makeAdapter(`task-${i}`, larger, 100 * (i + 1)));
  yield {
    name: `${MODULES} modules of ${SIZE}×${SIZE}, K 32, f32`,
    bytes: await packOfK(made, 32),
    base: await weights(larger),
  };
}

/** Seeded f32 weights, in a safetensors file: the runtime keeps the folded ones. @param {readonly Shape[]} modules */
const weights = (modules) =>
  safetensorsOf(
    modules.map(({ name, out, in: inputs }, i) =>
      f32Entry(`${name}.weight`, [out, inputs], smallNumbers(out * inputs, i + 1)),
    ),
  );

/**
 * @param {string} id
 * @param {readonly Shape[]} shapes
 * @param {number} seed
 * @returns {Adapter}
 */
function makeAdapter(id, shapes, seed) {
  const modules = shapes.map(({ name, out, in: inputs }, i) => ({
    name,
    out,
    in: inputs,
    rank: RANK,
    layout: /** @type {const} */ ("out-in"),
    read: async () => ({
      rank: RANK,
      A: smallNumbers(RANK * inputs, seed + 2 * i),
      Bt: smallNumbers(RANK * out, seed + 2 * i + 1),
    }),
  }));
  const bytes = modules.reduce((sum, module) => sum + 4 * RANK * (module.in + module.out), 0);
  const rest = { saved: [], metadata: {}, warnings: [], baseModel: undefined, close: async () => undefined };
  return { id, file: id, byteLength: bytes, modules: new Map(modules.map((module) => [module.name, module])), ...rest };
}

/**
 * @typedef {import("eigenlora").Runtime} Runtime
 * @typedef {import("./gpu-device.js").Device} Device
 * @typedef {import("./report.js").Row} Row
 * @typedef {import("./report.js").Part} Part
 * @typedef {import("./report.js").Peer} Peer
 */

/** Turns of every task, on a GPU and on a software adapter. */
const [TURNS, SOFTWARE_TURNS] = [20, 2];
/** Counted and reported bytes may differ by this share where they are at least this many. */
const [MANY, MOST_APART] = [50e6, 0.02];

const QUESTION = "How long does a whole switch of resident tasks take, and what does it ask of the device?";

/** Measures switches on a device of its own. @returns {Promise<import("./report.js").Result>} */
export async function switchesOnGpu() {
  let device;
  try {
    device = await openDevice();
  } catch (error) {
    return noDevice(QUESTION, error);
  }
  const { parts, peers } = await measureSwitches(device);
  const about = describe(device);
  device.close();
  return [parts, peers, about];
}

/** @param {Device} on @returns {Promise<{ parts: Part[], peers: Peer[] }>} */
export async function measureSwitches(on) {
  const turns = on.software ? SOFTWARE_TURNS : TURNS;
  /** @type {Row[]} */
  const switches = [];
  /** @type {Row[]} */
  const memory = [];
  let peer = "";
  for await (const one of cases()) {
    const before = on.counts.live;
    const runtime = await start(one, { backend: webgpu({ device: on.device }) });
    const wasm = await start(one, { backend: "wasm" });
    peer = wasm.backend;
    switches.push({ name: one.name, ...(await measure(on, runtime, wasm, turns)) });
    await compare(runtime, wasm);
    const counted = on.counts.live - before;
    const { basis, coefficients } = runtime.pack.residentBytes;
    const reported = runtime.memory().total - basis - coefficients;
    await wasm.close();
    await runtime.close();
    const apart = Math.abs(counted - reported) / counted;
    const row = { name: one.name, countedMB: counted / 1e6, reportedMB: reported / 1e6, "apart, %": 100 * apart };
    memory.push({ ...row, bytesLeft: on.counts.live - before });
    if ((counted >= MANY && apart > MOST_APART) || on.counts.live !== before) process.exitCode = 1;
  }
  return { parts: partsOf(on, switches, memory, turns), peers: [{ name: "a switch on the CPU", version: peer }] };
}

/** @param {Device} on @param {Row[]} switches @param {Row[]} memory @param {number} turns @returns {Part[]} */
const partsOf = ({ clock, software }, switches, memory, turns) => [
  {
    question: QUESTION,
    rows: switches,
    notes: [
      `ms: from the call until the device is done, of ${turns * TASKS} switches among ${TASKS} tasks. encodeMs: until submit has`,
      `returned, all that the CPU does. gpuMs: the switch's commands by ${clock.how}, in switches of their own.`,
      "wasmMs: the same switch by the wasm backend, in turns, one thread. Median of each. Submits, dispatches and bytes",
      "over the bus: the most of any switch, counted at the device. Weights of both are compared after the last.",
      ...(software ? [SOFTWARE] : []),
    ],
  },
  {
    question: "Does the device hold what runtime.memory() reports?",
    rows: memory,
    notes: [
      "Counted: bytes of live buffers, by createBuffer and destroy. Reported: the total less the pack's own, on the CPU.",
      `Above ${MANY / 1e6} MB they may be ${100 * MOST_APART} % apart, and after close no byte may be left, or this exits 1.`,
    ],
  },
];

/** @param {Case} one @param {import("eigenlora").RuntimeOptions} options */
async function start({ bytes, base }, options) {
  const pack = await openPack(bytes);
  await pack.prefetch(pack.tasks.keys());
  return createRuntime(pack, { ...options, base });
}

/**
 * @param {Device} on
 * @param {Runtime} runtime
 * @param {Runtime} wasm
 * @param {number} turns of every task
 * @returns {Promise<Row>}
 */
async function measure({ counts, clock }, runtime, wasm, turns) {
  const tasks = [...runtime.pack.tasks.keys()].slice(0, TASKS);
  /** @type {Record<"ms" | "encode" | "gpu" | "wasm", number[]>} */
  const times = { ms: [], encode: [], gpu: [], wasm: [] };
  const most = { submits: 0, dispatches: 0, written: 0 };
  for (let i = -TASKS; i < turns * TASKS; i++) {
    const task = tasks[(i + TASKS) % TASKS];
    Object.assign(counts, { submits: 0, dispatches: 0, written: 0 });
    const called = performance.now();
    await runtime.switchTask(task);
    const done = performance.now();
    await wasm.switchTask(task);
    if (i < 0) continue;
    times.wasm.push(performance.now() - done);
    times.ms.push(done - called);
    times.encode.push(clock.submitted() - called);
    for (const what of /** @type {const} */ (["submits", "dispatches", "written"]))
      most[what] = Math.max(most[what], counts[what]);
  }
  const last = runtime.weight(runtime.pack.modules.at(-1)?.name ?? "").data;
  for (const task of tasks) {
    const seconds = await clock.time(/** @type {GPUBuffer} */ (last), () => runtime.switchTask(task));
    times.gpu.push(1e3 * seconds);
  }
  return {
    ms: median(times.ms),
    minMs: min(times.ms),
    encodeMs: median(times.encode),
    gpuMs: median(times.gpu),
    wasmMs: median(times.wasm),
    "encode ÷ wasm": median(times.encode) / median(times.wasm),
    submits: most.submits,
    dispatches: most.dispatches,
    bytesOverBus: most.written,
  };
}

/**
 * @param {Runtime} runtime
 * @param {Runtime} oracle
 * @throws Error when a folded weight is another than the oracle's
 */
async function compare(runtime, oracle) {
  await oracle.switchTask(runtime.task);
  for (const { name } of runtime.pack.modules) {
    const [a, b] = [await runtime.readWeight(name), await oracle.readWeight(name)].map(({ dtype, shape, data }) =>
      decodeTensor(/** @type {import("eigenlora").FloatDtype} */ (dtype), data, shape[0], shape[1]),
    );
    const largest = max(Array.from(b, Math.abs));
    // Sums have another order; a half may round to its neighbour.
    const tolerance = largest * (runtime.weight(name).dtype === "f32" ? 2e-6 : 2 ** -10);
    const wrong = b.findIndex((x, i) => !(Math.abs(a[i] - x) <= tolerance));
    if (wrong >= 0)
      throw new Error(`${name}: element ${wrong} is ${a[wrong]} on WebGPU, ${b[wrong]} on ${oracle.backend}`);
  }
}

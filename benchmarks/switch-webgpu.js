/**
 * The part of `fold.js --backend webgpu` about whole switches: createRuntime and switchTask on a device that counts, beside
 * the wasm backend on the same pack and base, in turns; and whether the device holds what `runtime.memory()` says.
 */
/// <reference types="@webgpu/types" />
import { createRuntime, openPack } from "eigenlora";
import { buildPack, writeSafetensors } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { decodeTensor } from "../dist/src/tensor/dtypes.js";
import { data, median, min, uniform } from "./report.js";

/**
 * @typedef {import("eigenlora").Runtime} Runtime
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("../test/counting-device.js").Counts} Counts
 * @typedef {import("./gpu-clock.js").Clock} Clock
 * @typedef {import("./report.js").Row} Row
 * @typedef {{ device: GPUDevice, counts: Counts, clock: Clock }} On
 * @typedef {{ name: string, bytes: Uint8Array, base: import("eigenlora").BaseInput }} Case
 * @typedef {{ name: string, out: number, in: number }} Shape
 */

const TASKS = 8;
/** Times that every task has its turn, on a GPU and on a software adapter. */
const [TURNS, SOFTWARE_TURNS] = [20, 2];
const COMPONENTS = [16, 32];
/** The made-up pack: modules, their side, rank. */
const [MODULES, SIZE, RANK] = [24, 768, 8];
/** Where so many bytes are held, what is counted and what is reported may differ by so much. */
const [MANY, MOST_APART] = [50e6, 0.02];

export const SOFTWARE = "A software adapter: its times say nothing about a GPU.";

/**
 * @param {On} on
 * @param {boolean} software
 * @returns {Promise<{ parts: import("./report.js").Part[], peers: import("./report.js").Peer[] }>}
 */
export async function measureSwitches(on, software) {
  const turns = software ? SOFTWARE_TURNS : TURNS;
  /** @type {Row[]} */
  const switches = [];
  /** @type {Row[]} */
  const memory = [];
  let peer = "";
  for await (const one of cases()) {
    const before = on.counts.live;
    const runtime = await start(one, { backend: "webgpu", webgpu: { device: on.device } });
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
  return {
    parts: [
      {
        question: "How long does a whole switch of resident tasks take, and what does it ask of the device?",
        rows: switches,
        notes: [
          `ms: from the call until the device is done, of ${turns * TASKS} switches among ${TASKS} tasks. encodeMs: until submit has`,
          `returned, all that the CPU does. gpuMs: the switch's commands by ${on.clock.how}, in switches of their own.`,
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
          `Above ${MANY / 1e6} MB they may be ${100 * MOST_APART} % apart, and after dispose no byte may be left, or this exits 1.`,
        ],
      },
    ],
    peers: [{ name: "a switch on the CPU", version: peer }],
  };
}

/** Real adapters on the model's own f16 weights and on f32 ones; then a made-up pack of larger modules. */
async function* cases() {
  const adapters = await readAdapters([data("adapters/own-seed")]);
  const model = await openOnnxHost(data("minilm/model_fp16.onnx"));
  /** @type {Shape[]} */
  const modules = [...(adapters[0]?.modules.values() ?? [])];
  for (const k of COMPONENTS) {
    const bytes = await pack(adapters, k);
    const name = `${modules.length} modules of MiniLM, K ${k}`;
    yield { name: `${name}, f16`, bytes, base: model };
    yield { name: `${name}, f32`, bytes, base: await weights(modules) };
  }
  for (const adapter of adapters) await adapter.close();
  const larger = Array.from({ length: MODULES }, (_, i) => ({ name: `layer.${i}`, out: SIZE, in: SIZE }));
  const made = Array.from({ length: TASKS }, (_, i) => makeAdapter(`task-${i}`, larger, 100 * (i + 1)));
  yield {
    name: `${MODULES} modules of ${SIZE}×${SIZE}, K 32, f32`,
    bytes: await pack(made, 32),
    base: await weights(larger),
  };
}

/** @param {Adapter[]} adapters @param {number} k */
async function pack(adapters, k) {
  const { chunks } = await buildPack(adapters, { select: { kind: "k", k } });
  return new Uint8Array(Buffer.concat(chunks));
}

/** Seeded f32 weights, in a safetensors file: the runtime keeps the folded ones. @param {readonly Shape[]} modules */
async function weights(modules) {
  const entries = modules.map(({ name, out, in: inputs }, i) => ({
    name: `${name}.weight`,
    dtype: "F32",
    shape: [out, inputs],
    read: () => new Uint8Array(uniform(out * inputs, i + 1).buffer),
  }));
  const chunks = [];
  for await (const chunk of writeSafetensors(entries)) chunks.push(chunk);
  return new Uint8Array(Buffer.concat(chunks));
}

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
      A: uniform(RANK * inputs, seed + 2 * i),
      Bt: uniform(RANK * out, seed + 2 * i + 1),
    }),
  }));
  const bytes = modules.reduce((sum, module) => sum + 4 * RANK * (module.in + module.out), 0);
  const rest = { saved: [], metadata: {}, warnings: [], baseModel: undefined, close: async () => undefined };
  return { id, file: id, byteLength: bytes, modules: new Map(modules.map((module) => [module.name, module])), ...rest };
}

/** @param {Case} one @param {import("eigenlora").RuntimeOptions} options */
async function start({ bytes, base }, options) {
  const pack = await openPack(bytes);
  await pack.prefetch(pack.tasks.keys());
  return createRuntime(pack, { ...options, base });
}

/**
 * @param {On} on
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
    times.encode.push(clock.submitted - called);
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
    const largest = b.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    // Sums in another order; a half may be rounded to its neighbour.
    const tolerance = largest * (runtime.weight(name).dtype === "f32" ? 2e-6 : 2 ** -10);
    const wrong = b.findIndex((x, i) => !(Math.abs(a[i] - x) <= tolerance));
    if (wrong >= 0)
      throw new Error(`${name}: element ${wrong} is ${a[wrong]} on WebGPU, ${b[wrong]} on ${oracle.backend}`);
  }
}

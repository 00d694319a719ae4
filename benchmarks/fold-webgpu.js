/**
 * `fold.js --backend webgpu`: how fast is fold on the device that there is, beside copyBufferToBuffer of the same bytes;
 * then whole switches (switch-webgpu.js). One command gives all of it on any adapter; what a device cannot do or hold is
 * left out with the reason.
 */
/// <reference types="@webgpu/types" />
import { freemem } from "node:os";
import { createJsBackend } from "../dist/src/backends/js.js";
import { createWebgpuBackend } from "../dist/src/backends/webgpu.js";
import { decodeTensor } from "../dist/src/tensor/dtypes.js";
import { encodeTensor } from "../dist/src/tensor/encode.js";
import { countingDevice } from "../test/counting-device.js";
import { createClock } from "./gpu-clock.js";
import { median, min, printParts, uniform } from "./report.js";
import { measureSwitches, SOFTWARE } from "./switch-webgpu.js";

/**
 * @typedef {import("../dist/src/backends/backend.js").Backend} Backend
 * @typedef {import("../dist/src/backends/backend.js").Block} Block
 * @typedef {import("./gpu-clock.js").Clock} Clock
 * @typedef {import("./report.js").Row} Row
 * @typedef {{ device: GPUDevice, clock: Clock, backend: Backend }} On
 * @typedef {{ type: "f32" | "f16", rank: number, size: number, matrices: number }} Job
 * @typedef {{ fold: number[], copy: number[], nothing: number, rounds: number }} Seconds of one round, run by run
 */

/** Side of the matrices that fit no cache: 24 of them are 403 MB, read and written. */
const LARGE = 2048;
const WARM_UP = 2;
/** Runs of a GPU, and of a software adapter, which takes seconds for each. */
const [RUNS, SOFTWARE_RUNS] = [30, 5];
/** A run has rounds until it takes this many seconds, and until the clock's own kernels are this share of it. */
const [LEAST_SECONDS, CLOCK_SHARE] = [2e-3, 1 / 20];
const MOST_ROUNDS = 100;
/** Seconds that the large matrices may take on a software adapter. */
const PATIENCE = 6;

/** @param {{ matrices: number, size: number, ranks: readonly number[], runs: number | undefined }} what */
export async function measureWebgpu({ matrices, size, ranks, runs: wanted }) {
  const plain = await open(false).catch((/** @type {Error} */ error) => error.message);
  const question = `How fast is fold on WebGPU, ${matrices} matrices? GB/s: read and written.`;
  if (typeof plain === "string") {
    printParts([{ question, rows: [] }], [{ name: "webgpu", reason: plain }]);
    process.exitCode = 1;
    return;
  }
  const { adapter, clock } = plain;
  const software = adapter.info.isFallbackAdapter;
  const runs = wanted ?? (software ? SOFTWARE_RUNS : RUNS);
  const halves = adapter.features.has("shader-f16") ? await open(true) : undefined;

  /** @type {Row[]} */
  const rows = [];
  let perRun = 0;
  for (const on of halves ? [plain, halves] : [plain]) {
    for (const type of /** @type {const} */ (["f32", "f16"])) {
      for (const rank of ranks) {
        const seconds = await measure(on, { type, rank, size, matrices }, runs);
        perRun = Math.max(perRun, median(seconds.fold) + median(seconds.copy));
        rows.push(rowOf(on, { type, rank, size, matrices }, seconds));
      }
    }
  }
  const large = /** @type {const} */ ({ type: "f32", rank: ranks[0], size: LARGE, matrices });
  const most = software ? Math.floor(PATIENCE / (perRun * (LARGE / size) ** 2)) - WARM_UP : Infinity;
  rows.push(await measureLarge(plain, large, Math.min(runs, most), software));

  const switches = await measureSwitches(plain, software);
  /** @type {import("./report.js").Part[]} */
  const parts = [
    {
      question,
      rows,
      notes: [
        `ms: one fold of all, min and median of the runs after ${WARM_UP} more, by ${clock.how}. Every run of fold is followed`,
        "by one of copyBufferToBuffer from the same buffers to the same, timed in the same way. ratio: min over min;",
        "ratioMedian: median of the quotients run by run. rounds: folds of all in one run. clockMs: the clock with nothing",
        "to time. Matrices have a buffer each, as in a runtime; the first and last result are held against the js backend's.",
        `${size}² may stay in a cache from round to round, of fold and of copy; ${LARGE}² does not.`,
        ...(software ? [SOFTWARE] : []),
      ],
    },
    ...switches.parts,
  ];
  const peers = [
    { name: "copyBufferToBuffer", version: "the same device, buffers and clock, in turns" },
    ...switches.peers,
  ];
  printParts(parts, peers, describe(adapter, clock));
  for (const on of [plain, halves]) {
    on?.backend.close();
    on?.close();
  }
}

/** @param {boolean} halves whether to ask for the feature shader-f16, which changes what kernels may use */
async function open(halves) {
  const counted = await countingDevice(({ features, limits: { maxBufferSize, maxStorageBufferBindingSize } }) => ({
    requiredFeatures: /** @type {GPUFeatureName[]} */ (["timestamp-query", ...(halves ? ["shader-f16"] : [])]).filter(
      (name) => features.has(name),
    ),
    // As the backend does for a device of its own.
    requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
  }));
  const { device } = counted;
  return { ...counted, clock: createClock(device), backend: await createWebgpuBackend({ device }) };
}

/**
 * @param {GPUAdapter} adapter
 * @param {Clock} clock
 * @returns {Row}
 */
function describe({ info, features, limits }, clock) {
  const has = (/** @type {string} */ name) => (features.has(name) ? "yes" : "no");
  return {
    gpu: info.description || "unnamed",
    vendor: info.vendor || "unnamed",
    architecture: info.architecture || "unnamed",
    software: info.isFallbackAdapter ? "yes" : "no",
    clock: clock.how,
    "timestamp-query": has("timestamp-query"),
    "shader-f16": has("shader-f16"),
    subgroups: has("subgroups"),
    maxBufferSize: limits.maxBufferSize,
    maxStorageBufferBindingSize: limits.maxStorageBufferBindingSize,
    minStorageBufferOffsetAlignment: limits.minStorageBufferOffsetAlignment,
    maxStorageBuffersPerShaderStage: limits.maxStorageBuffersPerShaderStage,
    maxComputeInvocationsPerWorkgroup: limits.maxComputeInvocationsPerWorkgroup,
    maxComputeWorkgroupStorageSize: limits.maxComputeWorkgroupStorageSize,
  };
}

/**
 * Fold and copy of all matrices in turns, then the check that the folds are right.
 * @param {On} on
 * @param {Job} what
 * @param {number} runs
 * @returns {Promise<Seconds>}
 */
async function measure(on, what, runs) {
  const { backend, clock } = on;
  const { type, rank, size, matrices } = what;
  const matrix = encodeTensor(type, uniform(size * size, 1), size, size);
  const factors = uniform(2 * rank * size, 2);
  /** @type {Block[]} */
  const blocks = [];
  const allocate = (
    /** @type {number} */ bytes,
    /** @type {import("../dist/src/backends/backend.js").Owner} */ owner,
  ) => {
    const block = backend.allocate(bytes, owner);
    blocks.push(block);
    return block;
  };
  try {
    const bases = Array.from({ length: matrices }, () => allocate(matrix.length, "pristine"));
    const outs = bases.map(() => allocate(matrix.length, "active"));
    const both = allocate(factors.byteLength, "scratch");
    for (const block of bases) backend.upload({ block, byteOffset: 0 }, matrix);
    backend.upload({ block: both, byteOffset: 0 }, new Uint8Array(factors.buffer));
    await backend.finish();

    const last = bufferOf(outs[matrices - 1]);
    const fold = (/** @type {number} */ rounds) =>
      clock.time(last, async () => {
        for (let i = 0; i < rounds * matrices; i++)
          foldOne(backend, what, bases[i % matrices], outs[i % matrices], both);
        await backend.finish();
      });
    const copy = (/** @type {number} */ rounds) =>
      clock.time(last, () =>
        submit(on.device, (encoder) => {
          for (let i = 0; i < rounds * matrices; i++) {
            const [from, to] = [bases[i % matrices], outs[i % matrices]].map(bufferOf);
            encoder.copyBufferToBuffer(from, 0, to, 0, matrix.length);
          }
        }),
      );
    // The first fold compiles.
    await fold(1);
    const nothing = await measureNothing(on, last);
    const once = Math.min(await fold(1), await copy(1));
    const rounds = Math.min(MOST_ROUNDS, Math.max(1, Math.ceil(Math.max(LEAST_SECONDS, nothing / CLOCK_SHARE) / once)));
    /** @type {Seconds} */
    const seconds = { fold: [], copy: [], nothing, rounds };
    for (let run = -WARM_UP; run < runs; run++) {
      const [folded, copied] = [await fold(rounds), await copy(rounds)];
      if (run < 0) continue;
      seconds.fold.push(folded / rounds);
      seconds.copy.push(copied / rounds);
    }
    await fold(1);
    await check(backend, what, [outs[0], outs[matrices - 1]], matrix, factors);
    return seconds;
  } finally {
    for (const block of blocks) backend.free(block);
  }
}

/** @param {Block} block @returns {GPUBuffer} */
const bufferOf = (block) => /** @type {GPUBuffer} */ (block.device);

/**
 * @param {Backend} backend
 * @param {Job} job
 * @param {Block} base
 * @param {Block} out
 * @param {Block} factors left, then right
 */
function foldOne(backend, { type, rank, size }, base, out, factors) {
  backend.fold({
    out: { block: out, byteOffset: 0 },
    base: { block: base, byteOffset: 0 },
    dtype: type,
    rank,
    rows: size,
    columns: size,
    stride: size,
    left: { block: factors, byteOffset: 0 },
    right: { block: factors, byteOffset: 4 * rank * size },
  });
}

/** @param {GPUDevice} device @param {(encoder: GPUCommandEncoder) => void} record */
async function submit(device, record) {
  const encoder = device.createCommandEncoder();
  record(encoder);
  device.queue.submit([encoder.finish()]);
  await device.queue.onSubmittedWorkDone();
}

/**
 * Seconds of the clock itself, the least of some.
 * @param {On} on
 * @param {GPUBuffer} buffer
 */
async function measureNothing({ device, clock }, buffer) {
  const seconds = [];
  for (let i = 0; i < 10; i++) seconds.push(await clock.time(buffer, () => submit(device, () => {})));
  return min(seconds);
}

/**
 * @param {Backend} backend
 * @param {Job} job
 * @param {Block[]} outs
 * @param {Uint8Array} matrix
 * @param {Float32Array} factors
 * @throws Error when one of `outs` is not what the js backend makes of the same
 */
async function check(backend, job, outs, matrix, factors) {
  const { type, size } = job;
  const js = createJsBackend();
  const [base, expected] = [js.allocate(matrix.length, "pristine"), js.allocate(matrix.length, "active")];
  const both = js.allocate(factors.byteLength, "scratch");
  js.upload({ block: base, byteOffset: 0 }, matrix);
  js.upload({ block: both, byteOffset: 0 }, new Uint8Array(factors.buffer));
  foldOne(js, job, base, expected, both);
  const read = async (/** @type {Backend} */ from, /** @type {Block} */ block) => {
    const at = { block, byteOffset: 0 };
    const bytes = from.view?.(at, matrix.length) ?? (await from.read?.(at, matrix.length));
    if (!bytes) throw new Error(`${from.name} has neither view nor read`);
    return decodeTensor(type, bytes, size, size);
  };
  const right = await read(js, expected);
  // Elements are below 1/8: one unit in the last place of a half, some of an f32.
  const most = type === "f32" ? 1e-7 : 2 ** -14;
  for (const out of outs) {
    const found = await read(backend, out);
    const wrong = right.findIndex((x, i) => !(Math.abs(found[i] - x) <= most));
    if (wrong < 0) continue;
    throw new Error(`${type}, rank ${job.rank}: element ${wrong} is ${found[wrong]}, should be ${right[wrong]}`);
  }
}

/**
 * @param {On} on
 * @param {Job} job
 * @param {number} runs none: there is no time
 * @param {boolean} software
 * @returns {Promise<Row>}
 */
async function measureLarge(on, job, runs, software) {
  const bytes = 2 * job.matrices * job.size ** 2 * 4;
  const left = (/** @type {string} */ reason) => ({ ...titleOf(on, job), notRun: reason });
  if (runs < 1) return left(`would take more than ${PATIENCE} s on a software adapter`);
  // A software adapter's memory is the machine's, and too much of it ends the process.
  if (software && freemem() < 2 * bytes) return left(`needs ${(bytes / 1e9).toFixed(1)} GB, half of what is free`);
  try {
    return rowOf(on, job, await measure(on, job, runs));
  } catch (error) {
    const { message } = /** @type {Error} */ (error);
    if (/memory/i.test(message)) return left(message);
    throw error;
  }
}

/** @param {On} on @param {Job} job @returns {Row} */
function titleOf({ device }, { type, rank, size }) {
  return { name: "webgpu", "shader-f16": device.features.has("shader-f16") ? "yes" : "no", size, type, rank };
}

/**
 * @param {On} on
 * @param {Job} job
 * @param {Seconds} seconds
 * @returns {Row}
 */
function rowOf(on, job, { fold, copy, nothing, rounds }) {
  const gigabytes = (2 * job.matrices * job.size ** 2 * (job.type === "f32" ? 4 : 2)) / 1e9;
  return {
    ...titleOf(on, job),
    minMs: min(fold) * 1e3,
    medianMs: median(fold) * 1e3,
    GBps: gigabytes / min(fold),
    copyMinMs: min(copy) * 1e3,
    copyMedianMs: median(copy) * 1e3,
    copyGBps: gigabytes / min(copy),
    ratio: min(fold) / min(copy),
    ratioMedian: median(fold.map((x, run) => x / copy[run])),
    runs: fold.length,
    rounds,
    clockMs: nothing * 1e3,
  };
}

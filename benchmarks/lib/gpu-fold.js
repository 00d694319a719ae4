/**
 * Times fold on the machine's device, compared with copyBufferToBuffer of the same bytes; then whole switches. One
 * command measures all of it on any adapter; cases that a device cannot do or hold are left out with the reason.
 */
/// <reference types="@webgpu/types" />
import { freemem } from "node:os";
import { median, min } from "simple-statistics";
import { MATRICES, RANKS, SIZE } from "./fold.js";
import { describe, noDevice, openDevice, SOFTWARE } from "./gpu-device.js";
import { measureSwitches } from "./gpu-switch.js";
import { measure, WARM_UP } from "./gpu-timing.js";

/**
 * @typedef {import("./gpu-device.js").Device} Device
 * @typedef {import("./gpu-timing.js").Job} Job
 * @typedef {import("./report.js").Row} Row
 */

/** Side of matrices that fit no cache: 24 of them are 403 MB, read and written. */
const LARGE = 2048;
/** Runs of a GPU, and of a software adapter, which takes seconds for each. */
const [RUNS, SOFTWARE_RUNS] = [30, 5];
/** Seconds that the large matrices may take on a software adapter. */
const PATIENCE = 6;

/**
 * @param {number} [wanted] runs
 * @returns {Promise<import("./report.js").Result>}
 */
export async function foldsOnGpu(wanted) {
  const question = `How fast is fold on WebGPU, ${MATRICES} matrices? GB/s: read and written.`;
  let plain;
  try {
    plain = await openDevice();
  } catch (error) {
    return noDevice(question, error);
  }
  const { clock, software } = plain;
  const runs = wanted ?? (software ? SOFTWARE_RUNS : RUNS);
  const rows = await measureFolds(plain, runs);
  const switches = await measureSwitches(plain);
  const folds = {
    question,
    rows,
    notes: [
      `ms: one fold of all, min and median of the runs after ${WARM_UP} more, by ${clock.how}. Every run of fold is followed`,
      "by one of copyBufferToBuffer from the same buffers to the same, timed in the same way. ratio: min over min;",
      "ratioMedian: median of the quotients run by run. rounds: folds of all in one run. clockMs: the clock with nothing",
      "to time. Matrices have a buffer each, as in a runtime; the first and last result are held against the js backend's.",
      `${SIZE}² may stay in a cache from round to round, of fold and of copy; ${LARGE}² does not.`,
      ...(software ? [SOFTWARE] : []),
    ],
  };
  const device = describe(plain);
  plain.close();
  return [
    [folds, ...switches.parts],
    [{ name: "copyBufferToBuffer", version: "the same device, buffers and clock, in turns" }, ...switches.peers],
    device,
  ];
}

/** @param {Device} plain @param {number} runs @returns {Promise<Row[]>} */
async function measureFolds(plain, runs) {
  const rows = [];
  let perRun = 0;
  for (const type of /** @type {const} */ (["f32", "f16"])) {
    for (const rank of RANKS) {
      const job = { type, rank, size: SIZE, matrices: MATRICES };
      const seconds = await measure(plain, job, runs);
      perRun = Math.max(perRun, median(seconds.fold) + median(seconds.copy));
      rows.push(rowOf(job, seconds));
    }
  }
  /** @type {Job} */
  const large = { type: "f32", rank: RANKS[0], size: LARGE, matrices: MATRICES };
  const most = plain.software ? Math.floor(PATIENCE / (perRun * (LARGE / SIZE) ** 2)) - WARM_UP : Infinity;
  return [...rows, await measureLarge(plain, large, Math.min(runs, most))];
}

/**
 * @param {Device} device
 * @param {Job} job
 * @param {number} runs below 1: there is no time
 * @returns {Promise<Row>}
 */
async function measureLarge(device, job, runs) {
  const bytes = 2 * job.matrices * job.size ** 2 * 4;
  const left = (/** @type {string} */ reason) => ({ ...titleOf(job), notRun: reason });
  if (runs < 1) return left(`would take more than ${PATIENCE} s on a software adapter`);
  // A software adapter uses the machine's memory, and too much of it ends the process.
  if (device.software && freemem() < 2 * bytes)
    return left(`needs ${(bytes / 1e9).toFixed(1)} GB, half of what is free`);
  try {
    return rowOf(job, await measure(device, job, runs));
  } catch (error) {
    const { message } = /** @type {Error} */ (error);
    if (/memory/i.test(message)) return left(message);
    throw error;
  }
}

/** @param {Job} job @returns {Row} */
function titleOf({ type, rank, size }) {
  return { name: "webgpu", size, type, rank };
}

/**
 * @param {Job} job
 * @param {import("./gpu-timing.js").Seconds} seconds
 * @returns {Row}
 */
function rowOf(job, { fold, copy, nothing, rounds }) {
  const gigabytes = (2 * job.matrices * job.size ** 2 * (job.type === "f32" ? 4 : 2)) / 1e9;
  return {
    ...titleOf(job),
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

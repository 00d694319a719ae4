/** Fold and copy of the same matrices on a device, in turns, and the check that the folds are right. */
/// <reference types="@webgpu/types" />
import { min } from "simple-statistics";
import { createJsBackend } from "../../dist/src/backends/js.js";
import { decodeTensor } from "../../dist/src/tensor/dtypes.js";
import { encodeTensor } from "../../dist/src/tensor/encode.js";
import { smallNumbers } from "./adapters.js";

/**
 * @typedef {import("../../dist/src/backends/backend.js").Backend} Backend
 * @typedef {import("../../dist/src/backends/backend.js").Block} Block
 * @typedef {import("./gpu-device.js").Device} Device
 * @typedef {{ type: "f32" | "f16", rank: number, size: number, matrices: number }} Job
 * @typedef {{ fold: number[], copy: number[], nothing: number, rounds: number }} Seconds of one round, run by run
 * @typedef {{ bases: Block[], outs: Block[], factors: Block, matrix: Uint8Array, numbers: Float32Array }} Matrices
 */

export const WARM_UP = 2;
/** A run repeats rounds until it takes this many seconds, and until the clock's own kernels are this share of it. */
const [LEAST_SECONDS, CLOCK_SHARE] = [2e-3, 1 / 20];
const MOST_ROUNDS = 100;

/**
 * @param {Device} on
 * @param {Job} job
 * @param {number} runs
 * @returns {Promise<Seconds>}
 */
export async function measure(on, job, runs) {
  const { backend } = on;
  /** @type {Block[]} */
  const blocks = [];
  try {
    return await timeTurns(on, job, await allocate(backend, job, blocks), runs);
  } finally {
    for (const block of blocks) backend.free(block);
  }
}

/**
 * @param {Backend} backend
 * @param {Job} job
 * @param {Block[]} blocks all that is allocated
 * @returns {Promise<Matrices>}
 */
async function allocate(backend, { type, rank, size, matrices }, blocks) {
  const matrix = encodeTensor(type, smallNumbers(size * size, 1), size, size);
  const numbers = smallNumbers(2 * rank * size, 2);
  /** @param {number} bytes @param {import("../../dist/src/backends/backend.js").Owner} owner */
  const take = (bytes, owner) => {
    const block = backend.allocate(bytes, owner);
    blocks.push(block);
    return block;
  };
  const bases = Array.from({ length: matrices }, () => take(matrix.length, "pristine"));
  const outs = bases.map(() => take(matrix.length, "active"));
  const factors = take(numbers.byteLength, "scratch");
  for (const block of bases) backend.upload({ block, byteOffset: 0 }, matrix);
  backend.upload({ block: factors, byteOffset: 0 }, new Uint8Array(numbers.buffer));
  await backend.finish();
  return { bases, outs, factors, matrix, numbers };
}

/** @param {Device} on @param {Job} job @param {Matrices} matrices @param {number} runs @returns {Promise<Seconds>} */
async function timeTurns(on, job, { bases, outs, factors, matrix, numbers }, runs) {
  const { backend, clock, device } = on;
  const count = job.matrices;
  const last = bufferOf(outs[count - 1]);
  const fold = (/** @type {number} */ rounds) =>
    clock.time(last, async () => {
      for (let i = 0; i < rounds * count; i++) foldOne(backend, job, bases[i % count], outs[i % count], factors);
      await backend.finish();
    });
  const copy = (/** @type {number} */ rounds) =>
    clock.time(last, () =>
      submit(device, (encoder) => {
        for (let i = 0; i < rounds * count; i++) {
          const [from, to] = [bases[i % count], outs[i % count]].map(bufferOf);
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
  await check(backend, job, [outs[0], outs[count - 1]], matrix, numbers);
  return seconds;
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

/** Seconds of the clock itself, the least of some. @param {Device} on @param {GPUBuffer} buffer */
async function measureNothing({ device, clock }, buffer) {
  const seconds = [];
  for (let i = 0; i < 10; i++) seconds.push(await clock.time(buffer, () => submit(device, () => {})));
  return min(seconds);
}

/**
 * @param {Backend} backend
 * @param {Job} job
 * @param {readonly Block[]} outs
 * @param {Uint8Array} matrix
 * @param {Float32Array} numbers of the factors
 * @throws Error when one of `outs` is not what the js backend makes of the same
 */
async function check(backend, job, outs, matrix, numbers) {
  const { type, size } = job;
  const js = createJsBackend();
  const [base, expected] = [js.allocate(matrix.length, "pristine"), js.allocate(matrix.length, "active")];
  const factors = js.allocate(numbers.byteLength, "scratch");
  js.upload({ block: base, byteOffset: 0 }, matrix);
  js.upload({ block: factors, byteOffset: 0 }, new Uint8Array(numbers.buffer));
  foldOne(js, job, base, expected, factors);
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

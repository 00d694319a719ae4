/** Fold on a CPU backend, and a copy of the same bytes. */
import { setFlagsFromString } from "node:v8";
import { median, min, sum } from "simple-statistics";
import { encodeTensor } from "../../dist/src/tensor/encode.js";
import { smallNumbers } from "./adapters.js";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway and do not know the flag.
if (process.versions.node.startsWith("20.")) setFlagsFromString("--experimental-wasm-relaxed-simd");

/**
 * @typedef {import("../../dist/src/backends/backend.js").Backend} Backend
 * @typedef {{ min: number, median: number }} Seconds the least is what the machine can do, the median what it did
 * @typedef {{ warmUp: number, runs: number }} Often
 */

export const MATRICES = 24;
export const SIZE = 768;
export const RANKS = [8, 16];

/**
 * Seconds of all parts together, each timed by itself: other programs rarely leave a machine alone for a whole run.
 * @param {(part: number) => void} run
 * @param {Often} often
 * @param {number} [parts] Default: 1
 * @returns {Seconds}
 */
function time(run, { warmUp, runs }, parts = 1) {
  /** @type {number[][]} */
  const seconds = Array.from({ length: parts }, () => []);
  for (let i = -warmUp; i < runs; i++)
    for (const [part, own] of seconds.entries()) {
      const start = performance.now();
      run(part);
      if (i >= 0) own.push((performance.now() - start) / 1000);
    }
  return { min: sum(seconds.map(min)), median: sum(seconds.map(median)) };
}

/**
 * Seconds to copy the matrices.
 * @param {number} runs
 * @returns {Seconds}
 */
export function measureCopy(runs) {
  const length = SIZE * SIZE * 4;
  const bytes = new Uint8Array(2 * MATRICES * length).fill(1);
  const copy = (/** @type {number} */ i) =>
    void bytes.copyWithin((MATRICES + i) * length, i * length, (i + 1) * length);
  return time(copy, { warmUp: 5, runs }, MATRICES);
}

/**
 * Times fold of all matrices from one block to another.
 * @param {Backend} backend
 * @param {"f32" | "f16"} dtype
 * @param {number} rank
 * @param {Often} often
 */
export function measureFold(backend, dtype, rank, often) {
  const length = SIZE * SIZE;
  const byteLength = length * (dtype === "f32" ? 4 : 2);
  const base = backend.allocate(MATRICES * byteLength, "pristine");
  const out = backend.allocate(MATRICES * byteLength, "active");
  const factors = backend.allocate(2 * rank * SIZE * 4, "scratch");
  const matrix = encodeTensor(dtype, smallNumbers(length, 1), SIZE, SIZE);
  for (let i = 0; i < MATRICES; i++) backend.upload({ block: base, byteOffset: i * byteLength }, matrix);
  backend.upload({ block: factors, byteOffset: 0 }, new Uint8Array(smallNumbers(2 * rank * SIZE, 2).buffer));
  const job = { dtype, rank, rows: SIZE, columns: SIZE, stride: SIZE };
  const left = { block: factors, byteOffset: 0 };
  const right = { block: factors, byteOffset: rank * SIZE * 4 };
  const fold = (/** @type {number} */ i) => {
    const byteOffset = i * byteLength;
    backend.fold({ out: { block: out, byteOffset }, base: { block: base, byteOffset }, ...job, left, right });
  };
  const result = time(fold, often, MATRICES);
  for (const block of [base, out, factors]) backend.free(block);
  return result;
}

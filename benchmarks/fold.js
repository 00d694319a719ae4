/**
 * How fast is fold, W = W0 + B·A, on each CPU backend? Beside memory.copy of the same bytes, beside the least time the
 * machine could take (the larger of that copy and the multiply-adds at the peak of a loop on registers), and beside
 * torch.addmm. One thread; 24 matrices of 768×768, the attention and MLP weights of a small encoder.
 * With `--backend webgpu` on a GPU instead: see `fold-webgpu.js`.
 *
 * node benchmarks/fold.js [--backend webgpu] [--json] [--runs N]      after npm run build; PYTHON=… for the peer
 */
import { setFlagsFromString } from "node:v8";
import { compile } from "../assembly/compile.mjs";
import { createJsBackend } from "../dist/src/backends/js.js";
import { createWasmBackend } from "../dist/src/backends/wasm.js";
import { WASM_VARIANTS } from "../dist/src/backends/wasm-instance.js";
import { encodeTensor } from "../dist/src/tensor/encode.js";
import { median, min, option, print, python, uniform } from "./report.js";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway and do not know the flag.
if (process.versions.node.startsWith("20.")) setFlagsFromString("--experimental-wasm-relaxed-simd");

const MATRICES = 24;
const SIZE = 768;
const RANKS = [8, 16];
/** Rounds of the peak loops: some milliseconds. */
const ROUNDS = 1_000_000;

const runs = option("runs") === undefined ? undefined : Number(option("runs"));
const measured = runs ?? 15;

/** @typedef {import("../dist/src/backends/backend.js").Backend} Backend */
/** @typedef {import("../dist/src/backends/wasm-instance.js").WasmVariant} WasmVariant */
/** @typedef {{ min: number, median: number }} Seconds */
/** @typedef {{ copy: Seconds, peak: number, peakChained: number }} Machine multiply-adds per second */

/**
 * Seconds of `run`: the least is what the machine can do, the median what it did.
 * @param {() => void} run
 * @param {{ warmUp: number, runs: number }} [options]
 * @returns {Seconds}
 */
function time(run, { warmUp, runs } = { warmUp: 5, runs: measured }) {
  const seconds = [];
  for (let i = -warmUp; i < runs; i++) {
    const start = performance.now();
    run();
    if (i >= 0) seconds.push((performance.now() - start) / 1000);
  }
  return { min: min(seconds), median: median(seconds) ?? NaN };
}

/**
 * Seconds to copy the matrices, and multiply-adds per second of the better loop on registers.
 * @param {WasmVariant} variant
 * @returns {Promise<Machine>}
 */
async function measureMachine(variant) {
  const bytes = MATRICES * SIZE * SIZE * 4;
  const memory = new WebAssembly.Memory({ initial: 1 + Math.ceil((2 * bytes) / 65536) });
  const module = await WebAssembly.compile(await compile("peak", variant));
  const { exports } = await WebAssembly.instantiate(module, { env: { memory } });
  const { copy, perRound, chained, crossed } = /** @type {Record<string, (...args: number[]) => number>} */ (
    /** @type {unknown} */ (exports)
  );
  if (!copy || !perRound || !chained || !crossed) throw new Error("assembly/peak.ts lacks an export");
  // Factors just below 1, so that sums neither overflow nor become subnormal, which would cost time of its own.
  new Float32Array(memory.buffer, 0, 10).fill(0.999);
  new Uint8Array(memory.buffer, 65536).fill(1);
  const length = bytes / MATRICES;
  const peak = [chained, crossed].map((loop) => (ROUNDS * perRound()) / time(() => loop(0, ROUNDS)).min);
  return {
    copy: time(() => {
      for (let i = 0; i < MATRICES; i++) copy(65536 + bytes + i * length, 65536 + i * length, length);
    }),
    peak: Math.max(...peak),
    peakChained: peak[0] ?? NaN,
  };
}

/**
 * Times fold of all matrices from one block to another.
 * @param {Backend} backend
 * @param {"f32" | "f16"} type
 * @param {number} rank
 */
function measureFold(backend, type, rank) {
  const length = SIZE * SIZE;
  const byteLength = length * (type === "f32" ? 4 : 2);
  const base = backend.allocate(MATRICES * byteLength, "pristine");
  const out = backend.allocate(MATRICES * byteLength, "active");
  const factors = backend.allocate(2 * rank * SIZE * 4, "scratch");
  const matrix = encodeTensor(type, uniform(length, 1), SIZE, SIZE);
  for (let i = 0; i < MATRICES; i++) backend.upload({ block: base, byteOffset: i * byteLength }, matrix);
  backend.upload({ block: factors, byteOffset: 0 }, new Uint8Array(uniform(2 * rank * SIZE, 2).buffer));
  const job = { dtype: type, rank, rows: SIZE, columns: SIZE, stride: SIZE };
  const left = { block: factors, byteOffset: 0 };
  const right = { block: factors, byteOffset: rank * SIZE * 4 };
  const result = time(
    () => {
      for (let i = 0; i < MATRICES; i++) {
        const byteOffset = i * byteLength;
        backend.fold({ out: { block: out, byteOffset }, base: { block: base, byteOffset }, ...job, left, right });
      }
    },
    backend.name === "js" ? { warmUp: 2, runs: Math.min(measured, 5) } : undefined,
  );
  for (const block of [base, out, factors]) backend.free(block);
  return result;
}

/** @type {import("./report.js").Row[]} */
const rows = [];
/** @type {import("./report.js").Peer[]} */
const peers = [];
const megabytes = (MATRICES * SIZE * SIZE * 4 * 2) / 1e6;

/**
 * @param {string} name
 * @param {number} rank
 * @param {"f32" | "f16"} type
 * @param {Seconds} seconds
 * @param {Machine} [machine]
 */
function addRow(name, rank, type, seconds, machine) {
  const multiplyAdds = MATRICES * SIZE * SIZE * rank;
  const moved = type === "f32" ? megabytes : megabytes / 2;
  /** @type {import("./report.js").Row} */
  const row = { name, type, rank, minMs: seconds.min * 1e3, medianMs: seconds.median * 1e3 };
  row["GBps"] = moved / 1e3 / seconds.min;
  if (machine && type === "f32") {
    const floor = Math.max(machine.copy.min, multiplyAdds / machine.peak);
    row["floorMs"] = floor * 1e3;
    row["ratio"] = seconds.min / floor;
    row["ratioChained"] = seconds.min / Math.max(machine.copy.min, multiplyAdds / machine.peakChained);
  }
  rows.push(row);
}

const backend = option("backend");
if (backend === "webgpu") {
  const { measureWebgpu } = await import("./fold-webgpu.js");
  await measureWebgpu({ matrices: MATRICES, size: SIZE, ranks: RANKS, runs });
} else if (backend === undefined) {
  await measureCpu();
} else {
  throw new RangeError(`--backend: expected webgpu, or none for all of the CPU's, got ${backend}`);
}

async function measureCpu() {
  for (const variant of WASM_VARIANTS) {
    /** @type {Backend} */
    let backend;
    try {
      backend = await createWasmBackend({ variant });
    } catch (error) {
      peers.push({ name: `wasm ${variant}`, reason: /** @type {Error} */ (error).message });
      continue;
    }
    const machine = await measureMachine(variant);
    addRow(`memory.copy (${variant} run)`, 0, "f32", machine.copy);
    for (const type of /** @type {const} */ (["f32", "f16"])) {
      for (const rank of RANKS) addRow(`wasm ${variant}`, rank, type, measureFold(backend, type, rank), machine);
    }
    rows.push({
      name: `peak (${variant})`,
      type: "f32",
      gigaMultiplyAdds: machine.peak / 1e9,
      gigaMultiplyAddsChained: machine.peakChained / 1e9,
    });
    backend.close();
  }
  for (const type of /** @type {const} */ (["f32", "f16"])) {
    for (const rank of RANKS) addRow("js", rank, type, measureFold(createJsBackend(), type, rank));
  }

  const peer = python("fold.py", ...[MATRICES, SIZE, measured, ...RANKS].map(String));
  if ("reason" in peer) {
    peers.push({ name: "torch.addmm", reason: peer.reason });
  } else {
    const { version, capability, seconds } = peer.figures;
    peers.push({ name: "torch.addmm, one thread", version: `${version} (${capability})` });
    for (const rank of RANKS) addRow(`torch.addmm (${capability})`, rank, "f32", seconds[rank]);
  }

  print({
    question: `How fast is fold of ${MATRICES} matrices of ${SIZE}×${SIZE}, one thread? GB/s: read and written.`,
    rows,
    peers,
    notes: [
      "floor: the larger of memory.copy of the same bytes and the multiply-adds at the rate of the faster of two loops",
      "on registers (assembly/peak.ts). ratio: min over floor. ratioChained: the same with the loop s = s·x + y alone,",
      "which waits for its own results where multiply and add are not fused.",
    ],
  });
}

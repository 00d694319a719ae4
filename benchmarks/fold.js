/**
 * Times fold, W = W0 + B·A, on each CPU backend, compared with a copy of the same bytes, which no fold can be faster
 * than, and with torch.addmm. One thread; 24 matrices of 768×768, the attention and MLP weights of a small encoder.
 * `--backend webgpu` measures a GPU instead.
 */
import { createJsBackend } from "../dist/src/backends/js.js";
import { createWasmBackend, WASM_VARIANTS } from "../dist/src/backends/wasm.js";
import { choice, number, readArguments } from "./lib/arguments.js";
import { MATRICES, measureCopy, measureFold, RANKS, SIZE } from "./lib/fold.js";
import { python } from "./lib/peers.js";
import { print } from "./lib/report.js";

/** @typedef {import("./lib/report.js").Row} Row */

const DTYPES = /** @type {const} */ (["f32", "f16"]);

const { json, runs, backend } = readArguments("How fast is fold, W = W0 + B·A?", {
  runs: number("runs of each fold. Default: 15, on a GPU 30, on a software adapter 5", undefined, 1),
  backend: choice(["webgpu"], "on a GPU instead of the CPU, and whole switches there"),
});
if (backend) print(json, ...(await (await import("./lib/gpu-fold.js")).foldsOnGpu(runs)));
else await compare(runs ?? 15);

/** @param {number} runs */
async function compare(runs) {
  /** @type {Row[]} */
  const rows = [];
  /** @type {import("./lib/report.js").Peer[]} */
  const peers = [];
  for (const variant of WASM_VARIANTS) {
    const backend = await createWasmBackend({ variant }).catch((/** @type {Error} */ { message }) => message);
    if (typeof backend === "string") {
      peers.push({ name: `wasm ${variant}`, reason: backend });
      continue;
    }
    const copy = measureCopy(runs);
    rows.push(rowOf(`copy (${variant} run)`, 0, "f32", copy));
    for (const dtype of DTYPES) {
      for (const rank of RANKS)
        rows.push(rowOf(`wasm ${variant}`, rank, dtype, measureFold(backend, dtype, rank, { warmUp: 5, runs }), copy));
    }
    backend.close();
  }
  const few = { warmUp: 2, runs: Math.min(runs, 5) };
  for (const dtype of DTYPES)
    for (const rank of RANKS) rows.push(rowOf("js", rank, dtype, measureFold(createJsBackend(), dtype, rank, few)));

  const peer = python("fold.py", [MATRICES, SIZE, runs, ...RANKS].map(String));
  if ("reason" in peer) peers.push({ name: "torch.addmm", reason: peer.reason });
  else {
    const { version, capability, seconds } = peer.figures;
    peers.push({ name: "torch.addmm, one thread", version: `${version} (${capability})` });
    for (const rank of RANKS) rows.push(rowOf(`torch.addmm (${capability})`, rank, "f32", seconds[rank]));
  }
  const question = `How fast is fold of ${MATRICES} matrices of ${SIZE}×${SIZE}, one thread? GB/s: read and written.`;
  print(json, [{ question, rows, notes: ["ratio: min over that of the copy of the same bytes."] }], peers);
}

/**
 * @param {string} name
 * @param {number} rank
 * @param {"f32" | "f16"} type
 * @param {import("./lib/fold.js").Seconds} seconds
 * @param {import("./lib/fold.js").Seconds} [copy]
 * @returns {Row}
 */
function rowOf(name, rank, type, seconds, copy) {
  const gigabytes = (MATRICES * SIZE * SIZE * 2 * (type === "f32" ? 4 : 2)) / 1e9;
  const times = { minMs: seconds.min * 1e3, medianMs: seconds.median * 1e3, GBps: gigabytes / seconds.min };
  return { name, type, rank, ...times, ...(copy && type === "f32" && { ratio: seconds.min / copy.min }) };
}

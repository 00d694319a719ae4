/**
 * Times fold, W = W0 + B·A, on each CPU backend, compared with memory.copy of the same bytes, with the least time the machine could
 * take (the larger of that copy and the multiply-adds at the peak of a loop on registers), and with torch.addmm. One thread; 24 matrices
 * of 768×768, the attention and MLP weights of a small encoder. `--backend webgpu` measures a GPU instead.
 */
import { createJsBackend } from "../dist/src/backends/js.js";
import { createWasmBackend, WASM_VARIANTS } from "../dist/src/backends/wasm.js";
import { choice, number, readArguments } from "./lib/arguments.js";
import { MATRICES, measureFold, measureMachine, RANKS, SIZE } from "./lib/fold.js";
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
    const machine = await measureMachine(variant, runs);
    rows.push(rowOf(`memory.copy (${variant} run)`, 0, "f32", machine.copy));
    for (const dtype of DTYPES) {
      for (const rank of RANKS)
        rows.push(
          rowOf(`wasm ${variant}`, rank, dtype, measureFold(backend, dtype, rank, { warmUp: 5, runs }), machine),
        );
    }
    rows.push({ name: `peak (${variant})`, type: "f32", gigaMultiplyAdds: machine.peak / 1e9 });
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
  const notes = [
    "floor: the larger of memory.copy of the same bytes and the multiply-adds at the rate of a loop on registers",
    "(assembly/peak.ts). ratio: min over floor.",
  ];
  print(json, [{ question, rows, notes }], peers);
}

/**
 * @param {string} name
 * @param {number} rank
 * @param {"f32" | "f16"} type
 * @param {import("./lib/fold.js").Seconds} seconds
 * @param {import("./lib/fold.js").Machine} [machine]
 * @returns {Row}
 */
function rowOf(name, rank, type, seconds, machine) {
  const multiplyAdds = MATRICES * SIZE * SIZE * rank;
  const gigabytes = (MATRICES * SIZE * SIZE * 2 * (type === "f32" ? 4 : 2)) / 1e9;
  const times = { minMs: seconds.min * 1e3, medianMs: seconds.median * 1e3, GBps: gigabytes / seconds.min };
  if (!machine || type !== "f32") return { name, type, rank, ...times };
  const floor = Math.max(machine.copy.min, multiplyAdds / machine.peak);
  return { name, type, rank, ...times, floorMs: floor * 1e3, ratio: seconds.min / floor };
}

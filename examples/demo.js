/**
 * The whole way on real parts: packs the bundled adapters, opens the pack, switches through all tasks on the real weights,
 * holds each against the adapter's own merge, goes back to the base and proves it bit-identical.
 *
 * Run with `npm run demo`. Everything it reads is in test/data.
 */
import { createHash } from "node:crypto";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { buildPack, readAdapters } from "eigenlora/build";
import { openOnnxHost } from "eigenlora/onnx";

/** @param {string} path */
const data = (path) => fileURLToPath(new URL(`../test/data/${path}`, import.meta.url));
/** @param {number} n */
const kB = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(2)} MB`);
/** @param {number} share */
const percent = (share) => `${(100 * share).toFixed(2)} %`;
/** @param {(string | number)[][]} rows */
const print = (rows) => {
  const widths = rows[0].map((_, c) => Math.max(...rows.map((row) => String(row[c]).length)));
  for (const row of rows) console.log(row.map((cell, c) => (c ? String(cell).padStart(widths[c]) : String(cell).padEnd(widths[c]))).join("   "));
  console.log();
};

const folder = await mkdtemp(join(tmpdir(), "eigenlora-demo-"));
try {
  const adapters = await readAdapters([data("adapters/own-seed")]);
  const base = await openOnnxHost(data("minilm/model_fp16.onnx"));
  const { chunks, report } = await buildPack(adapters, { base, select: { kind: "k", k: 32 } });
  const file = join(folder, "tasks.eigen");
  await writeFile(file, chunks);

  // The weights as f32 arrays of this program, the way an app would hold them.
  /** @type {Map<string, import("eigenlora").Tensor>} */
  const weights = new Map();
  for (const { name, shape, dtype, layout } of base.list()) {
    if (!/attention\.self\.(query|value)\.weight$/.test(name)) continue;
    const view = await base.read(name);
    const bytes = /** @type {Uint8Array} */ (view.data);
    weights.set(name, { dtype: "f32", shape, data: widen(bytes, dtype), layout });
  }
  const pristine = digest(weights);

  const pack = await openPack(file);
  const runtime = await createRuntime(pack, { base: weights });
  console.log(`${adapters.length} LoRA adapters (rank 8, MiniLM) in one pack, on the ${runtime.backend} backend\n`);

  const rows = [["task", "blob", "ΔW error, as packed", "as measured on the weights", "switch, ms"]];
  let disagreement = 0;
  for (const adapter of adapters) {
    await runtime.switchTask(adapter.id);
    await runtime.switchTask(null);
    const { milliseconds } = await runtime.switchTask(adapter.id);
    const packed = report.errors.find(({ id }) => id === adapter.id)?.mean ?? NaN;
    const measured = await errorAgainstMerge(adapter, weights, base);
    disagreement = Math.max(disagreement, Math.abs(packed - measured));
    const blob = pack.tasks.get(adapter.id)?.bytes ?? 0;
    rows.push([adapter.id, kB(blob), percent(packed), percent(measured), milliseconds.total.toFixed(2)]);
  }
  print(rows);
  await runtime.switchTask(null);
  const identical = digest(weights) === pristine;

  const blobs = [...pack.tasks.values()].map(({ bytes }) => bytes);
  const mean = (/** @type {number[]} */ v) => v.reduce((a, b) => a + b, 0) / v.length;
  print([
    ["", "adapters", "pack"],
    ["all tasks, on disk", kB(report.adapterBytes), `${kB(report.bytes)} (${report.ratio.toFixed(1)}× smaller)`],
    ["one more task", kB(mean(adapters.map((a) => a.byteLength))), kB(mean(blobs))],
    ["sharing pays from", "", `${report.breakEvenTasks} tasks on`],
  ]);
  print([["memory of", ""], ...Object.entries(runtime.memory()).map(([owner, bytes]) => [owner, kB(bytes)])]);
  console.log(`ΔW errors as packed and as measured differ by ${percent(disagreement)} at most`);
  console.log(`the base after ${3 * adapters.length + 1} switches: ${identical ? "bit-identical" : "DRIFTED"}`);
  await runtime.dispose();
  await pack.close();
  for (const adapter of adapters) await adapter.close();
  if (!identical || disagreement > 1e-4) process.exitCode = 1;
} finally {
  await rm(folder, { recursive: true });
}

/**
 * ‖W − (W0 + B·A)‖ / ‖B·A‖ with the adapter's own factors, in f64, mean over its modules.
 * @param {import("eigenlora/build").Adapter} adapter
 * @param {Map<string, import("eigenlora").Tensor>} weights
 * @param {import("eigenlora").WeightHost} base
 */
async function errorAgainstMerge(adapter, weights, base) {
  let sum = 0;
  for (const module of adapter.modules.values()) {
    const name = `${module.name}.weight`;
    const tensor = /** @type {import("eigenlora").Tensor} */ (weights.get(name));
    const view = await base.read(name);
    const w0 = widen(/** @type {Uint8Array} */ (view.data), view.dtype);
    const { A, Bt } = await module.read();
    let [off, size] = [0, 0];
    for (let o = 0; o < module.out; o++) {
      for (let i = 0; i < module.in; i++) {
        let delta = 0;
        for (let k = 0; k < module.rank; k++) delta += Bt[k * module.out + o] * A[k * module.in + i];
        const at = tensor.layout === "in-out" ? i * module.out + o : o * module.in + i;
        off += (tensor.data[at] - w0[at] - delta) ** 2;
        size += delta ** 2;
      }
    }
    sum += Math.sqrt(off / size);
  }
  return sum / adapter.modules.size;
}

/**
 * f16 (or f32) bytes as f32 values.
 * @param {Uint8Array} bytes
 * @param {string} dtype
 */
function widen(bytes, dtype) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (dtype === "f32") return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
    const half = view.getUint16(2 * i, true);
    const [exponent, fraction] = [(half >> 10) & 31, half & 1023];
    return (half & 0x8000 ? -1 : 1) * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
  });
}

/** @param {Map<string, import("eigenlora").Tensor>} weights */
function digest(weights) {
  const hash = createHash("sha256");
  for (const [name, { data }] of weights) hash.update(name).update(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return hash.digest("hex");
}

/**
 * How long does a switch of task take, beside PEFT on the same adapters and the same model shapes, one thread each?
 *
 * Real adapters (own-seed, those with 8 labels, since a PEFT model has one size of head), f32 weights of MiniLM.
 * Resident tasks only: nothing is read while the clock runs. With `--live` in a model that runs: see `live.js`.
 */
import { createRuntime, openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { data, median, min, print, python } from "./report.js";

if (process.argv.includes("--live")) await import("./live.js");
else await compare();

async function compare() {
  const all = await readAdapters([data("adapters/own-seed")]);
  const adapters = all.filter((a) => a.metadata.labels?.length === 8);
  const { chunks } = await buildPack(adapters, { select: { kind: "k", k: 32 } });
  const bytes = new Uint8Array(Buffer.concat(chunks));
  const onnx = await openOnnxHost(data("minilm/model_fp16.onnx"));

  const peer = python("switch.py", data("minilm"), ...adapters.map((a) => data(`adapters/own-seed/${a.id}`)));
  const reference = "figures" in peer ? peer.figures.median : null;

  /** @type {import("./report.js").Row[]} */
  const rows = [];
  const variants = /** @type {const} */ ([
    ["js", { backend: "js" }],
    ["wasm scalar", { backend: "wasm", wasm: { variant: "scalar" } }],
    ["wasm simd", { backend: "wasm", wasm: { variant: "simd" } }],
    ["wasm relaxed", { backend: "wasm", wasm: { variant: "relaxed-simd" } }],
  ]);
  for (const [name, backend] of variants) {
    /** @type {[string, () => Promise<import("eigenlora").RuntimeOptions>][]} */
    const ways = [
      ["folded, runtime's memory", async () => ({ base: await readOnly(onnx) })],
      ["folded, your arrays", async () => ({ base: await weights(onnx) })],
      ["factors ready", async () => ({ mode: "factors" })],
      ["core ready", async () => ({ mode: "core" })],
    ];
    for (const [how, options] of ways) {
      const pack = await openPack(bytes);
      await pack.prefetch(pack.tasks.keys());
      const made = createRuntime(pack, { ...backend, ...(await options()) });
      const runtime = await made.catch((/** @type {Error} */ e) => e.message);
      if (typeof runtime === "string") {
        if (how.startsWith("folded, r")) rows.push({ name, how: `not run: ${runtime.slice(0, 80)}` });
        continue;
      }
      const times = [];
      for (let round = 0; round < 12; round++) {
        for (const id of pack.tasks.keys()) {
          const { milliseconds, requests } = await runtime.switchTask(id);
          if (requests > 0) throw new Error("a resident task was read");
          if (round >= 4) times.push(milliseconds.total);
        }
      }
      const row = { name, how, "ms, median": median(times), "ms, min": min(times) };
      rows.push(reference === null ? row : { ...row, "× faster than PEFT": reference / median(times) });
      await runtime.close();
    }
  }
  if ("figures" in peer) {
    const { median: m, min: least } = peer.figures;
    const row = { name: "PEFT", how: "unmerge + set + merge", "ms, median": m, "ms, min": least };
    rows.push({ ...row, "× faster than PEFT": 1 });
  }
  for (const adapter of all) await adapter.close();
  print({
    question: `How long does a switch among ${adapters.length} resident tasks take (12 modules of 384×384, r 8, K 32)?`,
    rows,
    peers: [{ name: "PEFT", ...("figures" in peer ? { version: peer.figures.version } : { reason: peer.reason }) }],
  });
}

/**
 * @param {import("eigenlora").WeightHost} onnx
 * @returns {Promise<Map<string, import("eigenlora").Tensor>>}
 */
async function weights(onnx) {
  const tensors = new Map();
  for (const { name, shape, layout } of onnx.list()) {
    if (!/attention\.self\.(query|value)\.weight$/.test(name)) continue;
    // Values do not matter here, and the f32 form is what runtimes compute with.
    tensors.set(name, { dtype: "f32", shape, layout, data: new Float32Array(shape[0] * shape[1]).fill(0.01) });
  }
  return tensors;
}

/**
 * A host that hands its weights out once and cannot be written: the runtime keeps the folded ones.
 * @param {import("eigenlora").WeightHost} onnx
 */
async function readOnly(onnx) {
  const tensors = await weights(onnx);
  return {
    list: () => [...tensors].map(([name, { dtype, shape, layout }]) => ({ name, dtype, shape, layout })),
    /** @param {string} name @param {Uint8Array} [into] */
    async read(name, into) {
      const { dtype, shape, data: values } = /** @type {import("eigenlora").Tensor} */ (tensors.get(name));
      const view = new Uint8Array(values.buffer);
      into?.set(view);
      return { dtype, shape, data: into ?? view, byteOffset: 0 };
    },
  };
}

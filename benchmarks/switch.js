/**
 * Times a switch of task, compared with PEFT on the same adapters and the same model shapes, one thread each.
 *
 * Real adapters (own-seed, those with 8 labels, since a PEFT model has one size of head), f32 weights of MiniLM.
 * Resident tasks only: nothing is read while the clock runs. `--live`: in a model that runs. `--backend webgpu`: on a
 * GPU.
 */
import { createRuntime, openPack } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import { median, min } from "simple-statistics";
import { data, model } from "../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "./lib/adapters.js";
import { choice, flag, number, readArguments } from "./lib/arguments.js";
import { peerLine, python } from "./lib/peers.js";
import { print } from "./lib/report.js";

/**
 * The adapted weights of MiniLM, in the f32 form that runtimes compute with.
 * @param {import("eigenlora").WeightHost} onnx
 * @returns {Map<string, import("eigenlora").Tensor>}
 */
function weightsOf(onnx) {
  const tensors = new Map();
  for (const { name, shape, layout } of onnx.list()) {
    if (!/attention\.self\.(query|value)\.weight$/.test(name)) continue;
    tensors.set(name, { dtype: "f32", shape, layout, data: new Float32Array(shape[0] * shape[1]).fill(0.01) });
  }
  return tensors;
}

/**
 * A read-only host that returns its weights once: the runtime keeps the folded ones.
 * @param {ReadonlyMap<string, import("eigenlora").Tensor>} tensors
 * @returns {import("eigenlora").WeightHost}
 */
const readOnly = (tensors) => ({
  list: () => [...tensors].map(([name, { dtype, shape, layout }]) => ({ name, dtype, shape, layout })),
  async read(name, into) {
    const { dtype, shape, data } = /** @type {import("eigenlora").Tensor} */ (tensors.get(name));
    const view = new Uint8Array(data.buffer);
    into?.set(view);
    return { dtype, shape, data: into ?? view, byteOffset: 0 };
  },
});

/** @typedef {import("eigenlora").RuntimeOptions} RuntimeOptions */

/** @type {[string, RuntimeOptions][]} */
const BACKENDS = [
  ["js", { backend: "js" }],
  ["wasm scalar", { backend: "wasm", wasm: { variant: "scalar" } }],
  ["wasm simd", { backend: "wasm", wasm: { variant: "simd" } }],
  ["wasm relaxed", { backend: "wasm", wasm: { variant: "relaxed-simd" } }],
];
/** Turns of every task; the first ones warm up. */
const [TURNS, WARM_UP] = [12, 4];

const { json, live, backend, runs } = readArguments("How long does a switch of task take?", {
  live: flag("in a model that runs: switches, runs, creation and memory of sessions; some five minutes"),
  backend: choice(["webgpu"], "on a GPU, in addition to the CPU"),
  runs: number("with --live, runs of a kind", 11, 1),
});
if (live) print(json, ...(await (await import("./lib/live.js")).measureLive(runs)));
else if (backend) print(json, ...(await (await import("./lib/gpu-switch.js")).switchesOnGpu()));
else await compare();

async function compare() {
  const { bytes, ids } = await withAdapters([folderOf("own-seed")], async (all) => {
    const adapters = all.filter(({ metadata }) => metadata.labels?.length === 8);
    return { bytes: await packOfK(adapters, 32), ids: adapters.map(({ id }) => id) };
  });
  const peer = python("switch.py", [data("minilm"), ...ids.map((id) => folderOf("own-seed", id))]);
  const onnx = await openOnnxHost(model);
  /** Effect of each on a model's weights; PEFT's counterpart does the same. */
  /** @type {[string, "folded" | "beside", () => Promise<RuntimeOptions>][]} */
  const ways = [
    ["folded, runtime's memory", "folded", async () => ({ base: readOnly(weightsOf(onnx)) })],
    ["folded, your arrays", "folded", async () => ({ base: weightsOf(onnx) })],
    ["factors ready", "beside", async () => ({ mode: "factors" })],
    ["core ready", "beside", async () => ({ mode: "core" })],
  ];
  /** @type {import("./lib/report.js").Row[]} */
  const rows = [];
  for (const [name, on] of BACKENDS) {
    for (const [how, counterpart, options] of ways) {
      const found = await timesOf(bytes, { ...on, ...(await options()) });
      if (typeof found === "string") {
        if (how === ways[0][0]) rows.push({ name, how: `not run: ${found.slice(0, 80)}` });
        continue;
      }
      const row = { name, how, "ms, median": median(found), "ms, min": min(found) };
      const reference = "figures" in peer ? peer.figures[counterpart].median : undefined;
      rows.push(reference === undefined ? row : { ...row, "× faster than PEFT": reference / median(found) });
    }
  }
  if ("figures" in peer) {
    const { folded, beside } = peer.figures;
    for (const [how, times] of Object.entries({ "unmerge + set + merge": folded, set_adapter: beside }))
      rows.push({ name: "PEFT", how, "ms, median": times.median, "ms, min": times.min, "× faster than PEFT": 1 });
  }
  const question = `How long does a switch among ${ids.length} resident tasks take (12 modules of 384×384, r 8, K 32)?`;
  print(json, [{ question, rows }], [peerLine("PEFT", peer)]);
}

/**
 * Milliseconds of switches, all tasks in turn; the reason where there is no such runtime.
 * @param {Uint8Array} bytes of the pack
 * @param {RuntimeOptions} options
 */
async function timesOf(bytes, options) {
  const pack = await openPack(bytes);
  await pack.prefetch(pack.tasks.keys());
  const runtime = await createRuntime(pack, options).catch((/** @type {Error} */ { message }) => message);
  if (typeof runtime === "string") return runtime;
  const times = [];
  for (let turn = 0; turn < TURNS; turn++) {
    for (const id of pack.tasks.keys()) {
      const { milliseconds, requests } = await runtime.switchTask(id);
      if (requests > 0) throw new Error("a resident task was read");
      if (turn >= WARM_UP) times.push(milliseconds.total);
    }
  }
  await runtime.close();
  return times;
}

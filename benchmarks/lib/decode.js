/** Decoding steps of language models: packs, sessions and feeds. */
import { stat } from "node:fs/promises";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { openOnnxHost } from "eigenlora/onnx";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { median } from "simple-statistics";
import { withAdapters } from "./adapters.js";
import { clocked, peakMemory } from "./process.js";

/** @typedef {import("onnxruntime-common").Tensor} Tensor */

ort.env.logLevel = "error";
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1, executionProviders: ["cpu"] };
const STEPS_OF_A_ROUND = 5;

/** Number formats of components. */
export const COMPONENTS = /** @type {const} */ (["f16", "int8", "int4"]);

/**
 * A pack of all adapters in a folder, by number format of its components.
 * @param {string} folder
 * @param {number} k
 * @returns {Promise<Map<string, Uint8Array>>}
 */
export async function packsOf(folder, k) {
  return withAdapters([folder], async (adapters) => {
    const packs = new Map();
    for (const basis of COMPONENTS) {
      const dtype = /** @type {const} */ ({ basis, coefficients: "f16", head: "f16" });
      const { chunks } = await buildPack(adapters, { select: { kind: "k", k }, gauge: "balanced", dtype });
      packs.set(basis, Buffer.concat(chunks));
    }
    return packs;
  });
}

/**
 * @param {string} name of the model in rows
 * @param {string} model
 * @param {ReadonlyMap<string, string>} packs paths by number format
 * @param {{ rounds: number, past: number }} options
 */
export async function measureSteps(name, model, packs, { rounds, past }) {
  const plain = await ort.InferenceSession.create(model, ONE_THREAD);
  const first = await openPack(/** @type {string} */ (packs.get(COMPONENTS[0])));
  const feeds = feedsOf(plain, past, first.modules);
  await first.close();
  const file = await sizeOf(model);
  const ways = [...packs].map(([format, pack]) => ({ format, pack, mode: /** @type {"core" | "factors"} */ ("core") }));
  const sessions = [
    { way: "plain", run: () => plain.run(feeds), bytes: 0, numbers: 0, ratio: /** @type {number[]} */ ([]) },
  ];
  const closing = [];
  for (const { format, pack: path, mode } of [...ways, { ...ways[0], mode: /** @type {const} */ ("factors") }]) {
    const pack = await openPack(path);
    const session = await createEigenSession(ort, model, pack, { mode, session: ONE_THREAD });
    await session.switchTask([...pack.tasks.keys()][0]);
    const core = mode === "core";
    const numbers = pack.modules.reduce(
      (sum, { in: x, out, A: [A], B: [B] }) => sum + (A?.K ?? 0) * x + (B?.K ?? 0) * out,
      0,
    );
    const way = core ? `core, components in ${format}` : "factors";
    const bytes = core ? session.memory().basis : 0;
    sessions.push({ way, run: () => session.run(feeds), bytes, numbers: core ? numbers : 0, ratio: [] });
    closing.push(session, pack);
  }
  const times = sessions.map(() => /** @type {number[]} */ ([]));
  for (let round = 0; round <= rounds; round++) {
    const cpu = [];
    for (const { run } of sessions) {
      const { cpu: used } = await clocked(async () => {
        for (let i = 0; i < STEPS_OF_A_ROUND; i++) await run();
      });
      cpu.push(used / STEPS_OF_A_ROUND);
    }
    if (round === 0) continue;
    for (const [i, { ratio }] of sessions.entries()) {
      times[i].push(cpu[i]);
      ratio.push(cpu[i] / cpu[0]);
    }
  }
  for (const one of closing) await one.close();
  await plain.release();
  const weights = await matricesOf(model);
  return sessions.map(({ way, bytes, numbers, ratio }, i) => ({
    name,
    way,
    "CPU, ms": median(times[i]),
    "÷ plain": median(ratio),
    ...(numbers > 0 && { "components, MB": bytes / 1e6, "bytes ÷ file": bytes / file }),
    // Only the numbers that a quantised model has left as floats can be counted.
    ...(weights > 10 * numbers && numbers > 0 && { "numbers ÷ model": numbers / weights }),
  }));
}

/** Numbers in the model's float matrices. @param {string} model */
async function matricesOf(model) {
  const host = await openOnnxHost(model);
  let sum = 0;
  for (const { shape } of host.list()) if (shape.length === 2) sum += shape[0] * shape[1];
  await host.close?.();
  return sum;
}

/** Size of a model and its external weights. @param {string} model */
async function sizeOf(model) {
  const beside = await stat(`${model}.data`).catch(() => ({ size: 0 }));
  return (await stat(model)).size + beside.size;
}

/**
 * Feeds of a step behind `past` tokens.
 * @param {import("onnxruntime-common").InferenceSession} session
 * @param {number} past
 * @param {import("eigenlora").Pack["modules"]} modules tell the width of a head, where the model does not
 */
function feedsOf({ inputMetadata }, past, modules) {
  /** @type {Record<string, Tensor>} */
  const feeds = {};
  for (const input of inputMetadata) {
    if (!input.isTensor) continue;
    const { name, type, shape } = input;
    if (name === "input_ids") feeds[name] = new ort.Tensor("int64", [500n], [1, 1]);
    else if (name === "position_ids") feeds[name] = new ort.Tensor("int64", [BigInt(past)], [1, 1]);
    else if (name === "attention_mask")
      feeds[name] = new ort.Tensor("int64", new BigInt64Array(past + 1).fill(1n), [1, past + 1]);
    else {
      // Keys and values: [batch, heads, past, width].
      const heads = Number(shape[1]);
      const keys = modules.find(({ name }) => name.endsWith("k_proj"))?.out ?? 0;
      const dims = [1, heads, past, Number(shape[3]) || keys / heads];
      const count = dims.reduce((a, b) => a * b);
      // 0.1 as a half.
      const data = type === "float16" ? new Uint16Array(count).fill(0x2e66) : new Float32Array(count).fill(0.1);
      feeds[name] = new ort.Tensor(/** @type {any} */ (type), data, dims);
    }
  }
  return feeds;
}

/**
 * Creates a session. @returns the time, and the peak memory of this process
 * @param {string} model
 * @param {string} pack path; "" for the plain model
 */
export async function peakOfCreation(model, pack) {
  const opened = pack && (await openPack(pack));
  const { cpu } = await clocked(() =>
    opened
      ? createEigenSession(ort, model, opened, { mode: "core", session: ONE_THREAD }).then(() => undefined)
      : ort.InferenceSession.create(model, ONE_THREAD).then(() => undefined),
  );
  return { "CPU, ms": cpu, "peak, MB": (await peakMemory()) / 1e6 };
}

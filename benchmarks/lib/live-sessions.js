/** Sessions of the whole model in each runtime: time to create one, and its memory. */
import { readFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { median } from "simple-statistics";
import { model as modelPath } from "../../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "./adapters.js";
import { clocked, settledMemory } from "./process.js";
import { progress } from "./report.js";

/**
 * @typedef {typeof import("onnxruntime-common")} Ort
 * @typedef {import("onnxruntime-common").InferenceSession.SessionOptions} SessionOptions
 * @typedef {import("eigenlora/onnxruntime").EigenSession<Ort>} Session
 * @typedef {Session["mode"]} Mode
 * @typedef {{ name: string, ort: Ort, options: SessionOptions }} Provider
 * @typedef {{ on: Provider, model: Uint8Array, packs: ReadonlyMap<number, Uint8Array> }} Files packs by number of
 *   components
 */

export const PROVIDERS = ["node cpu", "web wasm"];
export const MODES = /** @type {const} */ (["core", "factors", "folded"]);
const WAYS = /** @type {const} */ (["plain", ...MODES]);
/** Components of the pack in which modes are compared. */
export const K = 32;
export const CREATIONS = 7;

/** Loads a runtime with one thread. @param {string} name of `PROVIDERS` @returns {Promise<Provider>} */
export async function loadRuntime(name) {
  if (name === "node cpu") {
    const options = { executionProviders: ["cpu"], intraOpNumThreads: 1, interOpNumThreads: 1 };
    return { name, ort: await import("onnxruntime-node"), options };
  }
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  return { name, ort, options: { executionProviders: ["wasm"] } };
}

/**
 * A session with all tasks resident.
 * @param {Files} files
 * @param {number} k
 * @param {Mode} mode
 * @returns {Promise<Session>}
 */
export async function openSession({ on, model, packs }, k, mode) {
  const pack = await openPack(/** @type {Uint8Array} */ (packs.get(k)));
  await pack.prefetch(pack.tasks.keys());
  return create(on, model, mode, pack);
}

/**
 * @param {Provider} on
 * @param {Uint8Array} model
 * @param {Mode | "plain"} way
 * @param {import("eigenlora").Pack} pack
 * @returns {Promise<any>} a `Session`, or the runtime's own where the way is plain
 */
function create({ ort, options }, model, way, pack) {
  if (way === "plain") return ort.InferenceSession.create(model, options);
  return createEigenSession(ort, model, pack, { mode: way, session: options });
}

/** Milliseconds to create a session, by way; the ways take turns. @param {Files} files */
export async function measureCreation({ on, model, packs }) {
  const times = new Map(WAYS.map((way) => [way, /** @type {number[]} */ ([])]));
  for (let round = -1; round < CREATIONS; round++) {
    progress(`${on.name}: creation ${round + 1} of ${CREATIONS}`);
    for (const [way, found] of times) {
      const pack = await openPack(/** @type {Uint8Array} */ (packs.get(K)));
      const { ms, result } = await clocked(() => create(on, model, way, pack));
      // The first round warms up.
      if (round >= 0) found.push(ms);
      await result.close();
      await pack.close();
    }
  }
  return new Map([...times].map(([way, found]) => [way, median(found)]));
}

/**
 * Growth of this process with a session.
 * @param {string} provider
 * @param {Mode | "plain"} way
 * @returns {Promise<Record<string, number>>}
 */
export async function memoryOf(provider, way) {
  const on = await loadRuntime(provider);
  const bytes = await withAdapters([folderOf("own-seed")], (adapters) => packOfK(adapters, K));
  const pack = await openPack(new Blob([bytes]));
  const before = await settledMemory();
  const session = await create(on, new Uint8Array(await readFile(modelPath)), way, pack);
  const after = await settledMemory();
  await session.close();
  return {
    "RSS, MB": (after.rss - before.rss) / 1e6,
    "external, MB": (after.external - before.external) / 1e6,
    "arrayBuffers, MB": (after.arrayBuffers - before.arrayBuffers) / 1e6,
  };
}

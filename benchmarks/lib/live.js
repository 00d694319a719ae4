/**
 * What do tasks cost in a model that runs? The whole model (MiniLM, 12 adapted modules) in onnxruntime-node and in onnxruntime-web's
 * WebAssembly, one thread each, beside a plain session of the same file in the same loops: a switch among resident tasks; a run, by
 * mode, components and shape of the batch; creation; memory.
 */
import { readFile } from "node:fs/promises";
import { median, min } from "simple-statistics";
import { model as modelPath } from "../../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "./adapters.js";
import { COMPONENTS, measureRuns } from "./live-runs.js";
import { CREATIONS, K, loadRuntime, MODES, measureCreation, openSession, PROVIDERS } from "./live-sessions.js";
import { inFreshProcess } from "./process.js";
import { progress } from "./report.js";

/** @typedef {import("./report.js").Part} Part */

const SWITCHES = 200;

/** @param {number} runs of a kind @returns {Promise<import("./report.js").Result>} */
export async function measureLive(runs) {
  const model = new Uint8Array(await readFile(modelPath));
  /** @type {Map<number, Uint8Array>} */
  const packs = new Map();
  const count = await withAdapters([folderOf("own-seed")], async (adapters) => {
    for (const k of COMPONENTS) packs.set(k, await packOfK(adapters, k));
    return adapters.length;
  });
  const [switches, running, creating] = partsOf(model.length, count, runs);
  for (const name of PROVIDERS) {
    const files = { on: await loadRuntime(name), model, packs };
    const creation = await measureCreation(files);
    const again = creation.get("plain") ?? NaN;
    for (const mode of MODES) {
      progress(`${name}: switch, ${mode}`);
      const times = await measureSwitches(files, mode);
      const row = { name: `${name}, ${mode}`, "ms, median": median(times), "ms, min": min(times) };
      switches.rows.push({ ...row, "plain create, ms": again, "create ÷ switch": again / median(times) });
    }
    running.rows.push(...(await measureRuns(files, runs)));
    for (const [way, ms] of creation) {
      progress(`${name}: memory, ${way}`);
      const row = { name: `${name}, ${way}`, "create, ms": ms, "÷ plain": ms / again };
      const memory = inFreshProcess(new URL("live-sessions.js", import.meta.url), "memoryOf", [name, way]);
      creating.rows.push({ ...row, ...memory });
    }
  }
  const peers = [{ name: "plain InferenceSession", version: "1.30.0, the same file, in the same loops" }];
  return [[switches, running, creating], peers];
}

/** @param {number} bytes of the model @param {number} tasks @param {number} runs @returns {[Part, Part, Part]} */
const partsOf = (bytes, tasks, runs) => [
  {
    question: `How long does a switch among ${tasks} resident tasks take in a live session (K ${K}, f16)?`,
    rows: [],
    notes: ["Create: a new session on the same bytes instead. Folded: that, with the task's weights in it."],
  },
  {
    question: "How much longer is a run than the plain model's in the same loop?",
    rows: [],
    notes: [
      `Batch × tokens. Each of ${runs} runs follows one of the plain model: "÷" is the median of their quotients,`,
      '"min ÷" the quotient of the fastest of each; ms the median of the plain model.',
    ],
  },
  {
    question: `What does it take to create a session from ${(bytes / 1e6).toFixed(1)} MB, and to keep it?`,
    rows: [],
    notes: [
      `Create: from bytes in memory, the probe included, median of ${CREATIONS}. Memory: growth of a fresh process`,
      "after garbage collection, with nobody but the session to hold the file's bytes; the runtime's code is in RSS.",
      "arrayBuffers is what JavaScript holds: folded keeps the file to fold from, the others have no use for it.",
    ],
  },
];

/**
 * Milliseconds of switches, all tasks in turn.
 * @param {import("./live-sessions.js").Files} files
 * @param {import("./live-sessions.js").Mode} mode
 */
async function measureSwitches(files, mode) {
  const session = await openSession(files, K, mode);
  const ids = [...session.tasks.keys()];
  const count = mode === "folded" ? CREATIONS * 2 : SWITCHES;
  const times = [];
  for (let i = -ids.length; i < count; i++) {
    const { milliseconds, requests } = await session.switchTask(ids[(i + ids.length) % ids.length]);
    if (requests > 0) throw new Error("a resident task was read");
    if (i >= 0) times.push(milliseconds.total);
  }
  await session.close();
  return times;
}

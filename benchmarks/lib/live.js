/**
 * Measures the cost of tasks in a model that runs. The whole model (MiniLM, 12 adapted modules) in onnxruntime-node and
 * in onnxruntime-web's WebAssembly, one thread each, compared with a plain session of the same file in the same loops:
 * a switch among resident tasks; a run, by mode, components and shape of the batch; creation; memory.
 */
import { readFile } from "node:fs/promises";
import { median, min } from "simple-statistics";
import { model as modelPath } from "../../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "./adapters.js";
import { CREATIONS, K, loadRuntime, MODES, measureCreation, openSession, PROVIDERS } from "./live-sessions.js";
import { clocked, inFreshProcess } from "./process.js";
import { progress } from "./report.js";

/**
 * @typedef {import("./live-sessions.js").Session} Session
 * @typedef {import("./report.js").Row} Row
 */

/** Shapes [texts, tokens of each]. */
const SHAPES = [
  [8, 8],
  [8, 32],
  [8, 128],
  [1, 32],
];
const COMPONENTS = [16, 32, 64, 128];

/**
 * A row per way to run the model: its slowdown against the plain model, by shape. All sessions take turns.
 * @param {import("./live-sessions.js").Files} files
 * @param {number} runs
 */
async function measureRuns(files, runs) {
  const { name, ort, options } = files.on;
  const plain = await ort.InferenceSession.create(files.model, options);
  /** @type {[string, Session][]} */
  const sessions = [];
  for (const k of COMPONENTS) sessions.push([`core, K ${k}`, await openSession(files, k, "core")]);
  for (const mode of MODES.slice(1)) sessions.push([mode, await openSession(files, K, mode)]);
  for (const [, session] of sessions) await session.switchTask([...session.tasks.keys()][0]);
  /** @type {Row} */
  const base = { name: `${name}, plain` };
  /** @type {Row[]} */
  const rows = sessions.map(([way]) => ({ name: `${name}, ${way}` }));
  for (const [batch, tokens] of SHAPES) {
    progress(`${name}: runs of ${batch}×${tokens}`);
    const feeds = randomFeeds(ort, batch, tokens);
    /** @type {number[]} */
    const plainTimes = [];
    const times = sessions.map(() => /** @type {number[]} */ ([]));
    const quotients = sessions.map(() => /** @type {number[]} */ ([]));
    for (let round = -2; round < runs; round++) {
      for (const [i, [, session]] of sessions.entries()) {
        // A plain run before each: other load on the machine hits both.
        const { ms: before } = await clocked(() => plain.run(feeds));
        const { ms: ours } = await clocked(() => session.run(feeds));
        if (round < 0) continue;
        plainTimes.push(before);
        times[i].push(ours);
        quotients[i].push(ours / before);
      }
    }
    base[`${batch}×${tokens}, ms`] = median(plainTimes);
    for (const [i, row] of rows.entries()) {
      row[`${batch}×${tokens}, ÷`] = median(quotients[i]);
      row[`${batch}×${tokens}, min ÷`] = min(times[i]) / min(plainTimes);
    }
  }
  for (const [, session] of sessions) await session.close();
  await plain.release();
  return [base, ...rows];
}

/**
 * Random tokens, all of them attended to.
 * @param {import("./live-sessions.js").Ort} ort
 * @param {number} batch
 * @param {number} tokens
 */
function randomFeeds(ort, batch, tokens) {
  /** @param {(i: number) => bigint} value */
  const tensor = (value) => {
    const values = BigInt64Array.from({ length: batch * tokens }, (_, i) => value(i));
    return new ort.Tensor("int64", values, [batch, tokens]);
  };
  return {
    input_ids: tensor((i) => BigInt(5 + ((i * 7919) % 8000))),
    attention_mask: tensor(() => 1n),
    token_type_ids: tensor(() => 0n),
  };
}

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

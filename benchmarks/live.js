/**
 * `switch.js --live`: what do tasks cost in a model that runs? The whole model (MiniLM, 12 adapted modules) in
 * onnxruntime-node and in onnxruntime-web's WebAssembly, one thread each, beside a plain session of the same file in
 * the same loops: a switch among resident tasks; a run, by mode, components and shape of the batch; creation; memory.
 *
 * node benchmarks/switch.js --live [--json] [--runs N]     11 runs of a kind unless said otherwise, some five minutes
 */
import { spawnSync } from "node:child_process";
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { model as modelPath } from "../examples/minilm.js";
import { data, median, min, option, printParts } from "./report.js";

/**
 * @typedef {typeof import("onnxruntime-common")} Ort
 * @typedef {import("onnxruntime-common").InferenceSession.SessionOptions} SessionOptions
 * @typedef {import("eigenlora/onnxruntime").EigenSession<Ort>} Session
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {Session["mode"]} Mode
 * @typedef {import("./report.js").Row} Row
 * @typedef {{ name: string, ort: Ort, options: SessionOptions }} Provider
 * @typedef {import("./report.js").Part} Part
 */

const PROVIDERS = ["node cpu", "web wasm"];
const MODES = /** @type {const} */ (["core", "factors", "folded"]);
const WAYS = /** @type {const} */ (["plain", ...MODES]);
/** [texts, tokens of each] */
const SHAPES = [
  [8, 8],
  [8, 32],
  [8, 128],
  [1, 32],
];
const COMPONENTS = [16, 32, 64, 128];
/** Of the pack in which modes are compared. */
const K = 32;
const CREATIONS = 7;
const SWITCHES = 200;

const RUNS = Number(option("runs") ?? 11);

const [, , what, provider = "", way = ""] = process.argv;
if (what === "--hold") await hold(provider, /** @type {Mode | "plain"} */ (way));
else await compare();

async function compare() {
  const model = new Uint8Array(await readFile(modelPath));
  /** @type {Map<number, Uint8Array>} */
  const packs = new Map();
  const adapters = await readAdapters([data("adapters/own-seed")]);
  for (const k of COMPONENTS) {
    const { chunks } = await buildPack(adapters, { select: { kind: "k", k } });
    packs.set(k, Buffer.concat(chunks));
  }
  for (const adapter of adapters) await adapter.close();

  /** @type {[Part, Part, Part]} */
  const parts = [
    {
      question: `How long does a switch among ${adapters.length} resident tasks take in a live session (K ${K}, f16)?`,
      rows: [],
      notes: ["Create: a new session on the same bytes instead. Folded: that, with the task's weights in it."],
    },
    {
      question: "How much longer is a run than the plain model's in the same loop?",
      rows: [],
      notes: [
        `Batch × tokens. Each of ${RUNS} runs follows one of the plain model: "÷" is the median of their quotients,`,
        '"min ÷" the quotient of the fastest of each; ms the median of the plain model.',
      ],
    },
    {
      question: `What does it take to create a session from ${(model.length / 1e6).toFixed(1)} MB, and to keep it?`,
      rows: [],
      notes: [
        `Create: from bytes in memory, the probe included, median of ${CREATIONS}. Memory: growth of a fresh process`,
        "after garbage collection, with nobody but the session to hold the file's bytes; the runtime's code is in RSS.",
        "arrayBuffers is what JavaScript holds: folded keeps the file to fold from, the others have no use for it.",
      ],
    },
  ];
  for (const name of PROVIDERS) {
    const on = await load(name);
    const creation = await measureCreation(on, model, packs);
    const again = creation.get("plain") ?? NaN;
    for (const mode of MODES) {
      progress(`${name}: switch, ${mode}`);
      const session = await open(on, model, packs, K, mode);
      const times = await measureSwitch(session, mode === "folded" ? CREATIONS * 2 : SWITCHES);
      await session.close();
      const row = { name: `${name}, ${mode}`, "ms, median": median(times), "ms, min": min(times) };
      parts[0].rows.push({ ...row, "plain create, ms": again, "create ÷ switch": again / median(times) });
    }
    parts[1].rows.push(...(await measureRuns(on, model, packs)));
    for (const [way, ms] of creation) {
      progress(`${name}: memory, ${way}`);
      const row = { name: `${name}, ${way}`, "create, ms": ms, "÷ plain": ms / again };
      parts[2].rows.push({ ...row, ...holdElsewhere(name, way) });
    }
  }
  const peers = [{ name: "plain InferenceSession", version: "1.30.0, the same file, in the same loops" }];
  printParts(parts, peers);
}

/** @param {string} name @returns {Promise<Provider>} */
async function load(name) {
  if (name === "node cpu") {
    const options = { executionProviders: ["cpu"], intraOpNumThreads: 1, interOpNumThreads: 1 };
    return { name, ort: await import("onnxruntime-node"), options };
  }
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  return { name, ort, options: { executionProviders: ["wasm"] } };
}

/**
 * @param {Provider} on
 * @param {Uint8Array} model
 * @param {Map<number, Uint8Array>} packs
 * @param {number} k
 * @param {Mode} mode
 * @returns {Promise<Session>}
 */
async function open(on, model, packs, k, mode) {
  const pack = await openPack(/** @type {Uint8Array} */ (packs.get(k)));
  await pack.prefetch(pack.tasks.keys());
  return create(on, model, mode, pack);
}

/**
 * @param {Provider} on
 * @param {Uint8Array} model
 * @param {Mode | "plain"} way
 * @param {Pack} pack
 * @returns {Promise<any>} a `Session`, or the runtime's own where the way is plain
 */
function create({ ort, options }, model, way, pack) {
  if (way === "plain") return ort.InferenceSession.create(model, options);
  return createEigenSession(ort, model, pack, { mode: way, session: options });
}

/**
 * Milliseconds to create a session, by way; the ways take turns.
 * @param {Provider} on
 * @param {Uint8Array} model
 * @param {Map<number, Uint8Array>} packs
 */
async function measureCreation(on, model, packs) {
  const times = new Map(WAYS.map((way) => [way, /** @type {number[]} */ ([])]));
  for (let round = -1; round < CREATIONS; round++) {
    progress(`${on.name}: creation ${round + 1} of ${CREATIONS}`);
    for (const [way, found] of times) {
      const pack = await openPack(/** @type {Uint8Array} */ (packs.get(K)));
      const started = performance.now();
      const session = await create(on, model, way, pack);
      // The first round warms up.
      if (round >= 0) found.push(performance.now() - started);
      await session.release();
      await pack.close();
    }
  }
  return new Map([...times].map(([way, found]) => [way, median(found)]));
}

/**
 * Milliseconds of switches, all tasks in turn.
 * @param {Session} session
 * @param {number} count
 */
async function measureSwitch(session, count) {
  const ids = [...session.tasks.keys()];
  const times = [];
  for (let i = -ids.length; i < count; i++) {
    const { milliseconds, requests } = await session.switchTask(ids[(i + ids.length) % ids.length]);
    if (requests > 0) throw new Error("a resident task was read");
    if (i >= 0) times.push(milliseconds.total);
  }
  return times;
}

/**
 * A row per way to run the model: how much longer than the plain model, by shape. All sessions take turns.
 * @param {Provider} on
 * @param {Uint8Array} model
 * @param {Map<number, Uint8Array>} packs
 */
async function measureRuns(on, model, packs) {
  const { name, ort, options } = on;
  const plain = await ort.InferenceSession.create(model, options);
  /** @type {[string, Session][]} */
  const sessions = [];
  for (const k of COMPONENTS) sessions.push([`core, K ${k}`, await open(on, model, packs, k, "core")]);
  for (const mode of MODES.slice(1)) sessions.push([mode, await open(on, model, packs, K, mode)]);
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
    for (let round = -2; round < RUNS; round++) {
      for (const [i, [, session]] of sessions.entries()) {
        // A plain run before each: what else the machine does hits both.
        const before = await time(() => plain.run(feeds));
        const ours = await time(() => session.run(feeds));
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
 * Any tokens, all of them attended to.
 * @param {Ort} ort
 * @param {number} batch
 * @param {number} tokens
 */
function randomFeeds(ort, batch, tokens) {
  const dims = [batch, tokens];
  const length = batch * tokens;
  /** @param {(i: number) => bigint} value */
  const tensor = (value) =>
    new ort.Tensor(
      "int64",
      BigInt64Array.from({ length }, (_, i) => value(i)),
      dims,
    );
  return {
    input_ids: tensor((i) => BigInt(5 + ((i * 7919) % 8000))),
    attention_mask: tensor(() => 1n),
    token_type_ids: tensor(() => 0n),
  };
}

/** @param {() => Promise<unknown>} run */
async function time(run) {
  const started = performance.now();
  await run();
  return performance.now() - started;
}

/**
 * Memory of a session in a process of its own.
 * @param {string} name @param {string} way
 * @returns {Row}
 */
function holdElsewhere(name, way) {
  const script = fileURLToPath(import.meta.url);
  const args = ["--expose-gc", script, "--hold", name, way];
  const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
  if (!stdout) throw new Error(stderr);
  return JSON.parse(stdout);
}

/**
 * The child's part: prints by how much the process has grown.
 * @param {string} name @param {Mode | "plain"} way
 */
async function hold(name, way) {
  const on = await load(name);
  const adapters = await readAdapters([data("adapters/own-seed")]);
  const { chunks } = await buildPack(adapters, { select: { kind: "k", k: K } });
  for (const adapter of adapters) await adapter.close();
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const before = await settled();
  const session = await create(on, new Uint8Array(await readFile(modelPath)), way, pack);
  const after = await settled();
  await session.release();
  /** @type {[string, "rss" | "external" | "arrayBuffers"][]} */
  const figures = [
    ["RSS", "rss"],
    ["external", "external"],
    ["arrayBuffers", "arrayBuffers"],
  ];
  const grown = figures.map(([name, key]) => [`${name}, MB`, (after[key] - before[key]) / 1e6]);
  console.log(JSON.stringify(Object.fromEntries(grown)));
}

async function settled() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return process.memoryUsage();
}

/** @param {string} step */
function progress(step) {
  process.stderr.write(`${step}\n`);
}

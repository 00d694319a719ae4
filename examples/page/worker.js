/**
 * The worker of the page: owns tokenizer, pack and session, and answers calls one after the other, so that the page stays
 * responsive while WASM computes. Knows nothing of the document.
 *
 * The page sends { id, call, args }; the worker answers { id, value } or { id, error } and reports { progress } meanwhile.
 */
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";

/**
 * @typedef {"wasm" | "webgpu"} Provider
 * @typedef {import("eigenlora/onnxruntime").SessionMemory} SessionMemory
 * @typedef {{ requests: number, bytes: number }} Reads
 */

/**
 * @typedef {object} Task
 * @property {string} id
 * @property {string[]} labels
 * @property {number} bytes of its blob in the pack
 */

/**
 * A task's coefficients, the numbers that the pack keeps of it.
 * @typedef {object} Coefficients
 * @property {number} width components
 * @property {number} height rows: of A and B of all modules, one below the other
 * @property {Float32Array} values [height, width]
 * @property {number} rank rows of each matrix
 */

/** Adapters were trained on lines of at most so many tokens. */
const MAX_TOKENS = 32;

/** @param {string} file */
const beside = (file) => new URL(file, self.location.href).href;

/** @type {{ tokenizer: Tokenizer, pack: import("eigenlora").Pack } | undefined} */
let files;
/** @typedef {typeof import("onnxruntime-web")} Ort */
/** @type {{ ort: Ort, session: import("eigenlora/onnxruntime").EigenSession<Ort> } | undefined} */
let running;

/** What the page may ask for. */
const calls = {
  /** Whether WebGPU can be used here; a reason in plain words where it cannot. */
  async webgpu() {
    const gpu = /** @type {{ gpu?: { requestAdapter(): Promise<any> } }} */ (navigator).gpu;
    if (!gpu) return { reason: "this browser does not offer WebGPU here" };
    const adapter = await gpu.requestAdapter().catch(() => null);
    if (!adapter) return { reason: "this browser finds no graphics adapter for WebGPU" };
    const { vendor = "", architecture = "", isFallbackAdapter } = adapter.info ?? {};
    return { adapter: [vendor, architecture, isFallbackAdapter && "software"].filter(Boolean).join(" ") };
  },

  /**
   * Loads what is not loaded yet, makes a session on the provider and switches to the task.
   * @param {Provider} provider
   * @param {string} [wanted] task; the pack's first one where there is none of that name
   */
  async start(provider, wanted) {
    const started = performance.now();
    const before = files ? { ...files.pack.reads } : { requests: 0, bytes: 0 };
    await running?.session.release();
    running = undefined;
    const [ort, model, { pack }] = await Promise.all([loadOrt(provider), fetchModel(), openFiles()]);
    progress("preparing the model");
    // Errors only: it warns that WebGPU leaves shapes to the CPU, which is as it should be.
    const options = /** @type {import("onnxruntime-common").InferenceSession.SessionOptions} */ ({ executionProviders: [provider], logSeverityLevel: 3 });
    // On the GPU the weights themselves change: no run costs more than the base's.
    const mode = provider === "webgpu" ? "folded" : "auto";
    const session = await createEigenSession(ort, model, pack, { mode, session: options });
    running = { ort, session };
    const task = wanted !== undefined && pack.tasks.has(wanted) ? wanted : [...pack.tasks.keys()][0];
    await session.switchTask(task);
    return {
      task,
      tasks: [...pack.tasks.values()].map(({ id, bytes, metadata }) => ({ id, bytes, labels: metadata.labels ?? [] })),
      resident: residentIds(pack),
      mode: session.mode,
      reason: session.reason,
      reads: since(before),
      coefficients: await coefficientsOf(task),
      memory: session.memory(),
      milliseconds: performance.now() - started,
    };
  },

  /**
   * @param {string} task
   * @param {number} strength of the task's ΔW
   */
  async switchTask(task, strength) {
    const { session } = live();
    const report = await session.switchTask(strength === 1 ? task : { [task]: strength });
    const { requests, bytesRead, milliseconds } = report;
    const coefficients = await coefficientsOf(task);
    return { requests, bytes: bytesRead, milliseconds, memory: session.memory(), coefficients };
  },

  /**
   * Reads tasks ahead.
   * @param {string[]} ids
   */
  async load(ids) {
    const { session } = live();
    const started = performance.now();
    const before = { ...session.pack.reads };
    await session.pack.prefetch(ids);
    const milliseconds = performance.now() - started;
    const coefficients = await Promise.all(ids.map(async (id) => /** @type {const} */ ([id, await coefficientsOf(id)])));
    return { ...since(before), milliseconds, memory: session.memory(), coefficients };
  },

  /**
   * What the active task says.
   * @param {string} text
   */
  async classify(text) {
    const { ort, session } = live();
    const { feeds, tokens } = tokenize(ort, text, 1);
    const started = performance.now();
    const { logits } = await session.run(feeds);
    const milliseconds = performance.now() - started;
    return { probabilities: softmax(/** @type {Float32Array} */ (logits.data)), tokens, milliseconds };
  },

  /**
   * What each of several tasks says: one run with one task per row; where tasks are folded into the weights, one run after
   * the other, and back to the active task.
   * @param {string} text
   * @param {string[]} tasks
   */
  async classifyAll(text, tasks) {
    const { session } = live();
    const started = performance.now();
    const rows = session.mode === "folded" ? await oneByOne(text, tasks) : await oneBatch(text, tasks);
    return { rows, batch: session.mode !== "folded", milliseconds: performance.now() - started };
  },
};

/** @typedef {typeof calls} Calls */

/**
 * @param {string} text
 * @param {string[]} tasks one per row
 */
async function oneBatch(text, tasks) {
  const { ort, session } = live();
  const result = await session.run(tokenize(ort, text, tasks.length).feeds, { tasks });
  const { data, dims } = result.logits;
  const valid = [.../** @type {ReadonlyMap<string, readonly number[]>} */ (result.validColumns).values()][0];
  return tasks.map((id, row) => {
    const at = row * dims[1];
    return { id, probabilities: softmax(/** @type {Float32Array} */ (data).subarray(at, at + valid[row])) };
  });
}

/**
 * @param {string} text
 * @param {string[]} tasks
 */
async function oneByOne(text, tasks) {
  const { ort, session } = live();
  const { task: active } = session;
  const { feeds } = tokenize(ort, text, 1);
  const rows = [];
  try {
    for (const id of tasks) {
      await session.switchTask(id);
      const { logits } = await session.run(feeds);
      rows.push({ id, probabilities: softmax(/** @type {Float32Array} */ (logits.data)) });
    }
  } finally {
    await session.switchTask(active);
  }
  return rows;
}

function live() {
  if (!running) throw new Error("there is no session: it is starting, or did not start");
  return running;
}

/**
 * The build that can do what is asked: the one with WebGPU is twice as large.
 * @param {Provider} provider
 * @returns {Promise<Ort>}
 */
async function loadOrt(provider) {
  const webgpu = provider === "webgpu";
  const ort = webgpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  // More threads need a cross-origin isolated page, which plain static hosts do not give.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: beside(`ort-wasm-simd-threaded${webgpu ? ".asyncify" : ""}.wasm`) };
  return ort;
}

/** Tokenizer and pack, which outlive a session. */
async function openFiles() {
  if (files) return files;
  const json = ["tokenizer.json", "tokenizer_config.json"].map(getJson);
  const [pack, tokens, config] = await Promise.all([openPack(beside("tasks.eigen")), ...json]);
  return (files = { pack, tokenizer: new Tokenizer(tokens, config) });
}

/** @param {string} file */
async function getJson(file) {
  return (await get(file)).json();
}

/** @param {string} file */
async function get(file) {
  const response = await fetch(beside(file)).catch((cause) => {
    throw new Error(`${file} cannot be fetched (${cause.message}): is the server still there?`, { cause });
  });
  if (!response.ok) throw new Error(`${file}: the server answered ${response.status}; build the page again`);
  return response;
}

/** The model's bytes. Not kept: a second start finds them in the browser's cache. */
async function fetchModel() {
  const response = await get("model_fp16.onnx");
  const total = Number(response.headers.get("content-length"));
  // Some hosts compress on the way and cannot say how long it will be.
  const known = response.body && total && !response.headers.has("content-encoding");
  if (!response.body || !known) return new Uint8Array(await response.arrayBuffer());
  const bytes = new Uint8Array(total);
  let done = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done: end } = await reader.read();
    if (end) break;
    bytes.set(value, done);
    done += value.length;
    progress("loading the model", done, total);
  }
  if (done !== total) throw new Error(`model_fp16.onnx ended after ${done} of ${total} bytes; reload the page`);
  return bytes;
}

/**
 * @param {string} what
 * @param {number} [done]
 * @param {number} [total]
 */
function progress(what, done, total) {
  self.postMessage({ progress: { what, done, total } });
}

/**
 * The same line in each row of a batch.
 * @param {Ort} ort
 * @param {string} text
 * @param {number} rows
 */
function tokenize(ort, text, rows) {
  const { tokenizer } = /** @type {NonNullable<typeof files>} */ (files);
  const { ids } = tokenizer.encode(text);
  if (ids.length > MAX_TOKENS) ids.splice(MAX_TOKENS - 1, ids.length - MAX_TOKENS);
  const dims = [rows, ids.length];
  /** @param {(i: number) => number} value */
  const tensor = (value) => {
    const data = BigInt64Array.from({ length: rows * ids.length }, (_, i) => BigInt(value(i % ids.length)));
    return new ort.Tensor("int64", data, dims);
  };
  const feeds = { input_ids: tensor((i) => ids[i]), attention_mask: tensor(() => 1), token_type_ids: tensor(() => 0) };
  return { feeds, tokens: ids.length };
}

/** @param {Float32Array} logits */
function softmax(logits) {
  const top = Math.max(...logits);
  const exps = Array.from(logits, (v) => Math.exp(v - top));
  const sum = exps.reduce((a, b) => a + b);
  return exps.map((v) => v / sum);
}

/** @param {Reads} before */
function since({ requests, bytes }) {
  const { reads } = live().session.pack;
  return { requests: reads.requests - requests, bytes: reads.bytes - bytes };
}

/** @param {import("eigenlora").Pack} pack */
function residentIds(pack) {
  return [...pack.tasks.values()].filter(({ resident }) => resident).map(({ id }) => id);
}

/**
 * Read for the picture of a task; f16 as build.js packs it.
 * @param {string} id of a resident task
 * @returns {Promise<Coefficients>}
 */
async function coefficientsOf(id) {
  const { terms, bytes } = await live().session.pack.load(id);
  const tensors = terms.flatMap(({ A, B }) => [A, B].flatMap((side) => (side ? [side.tensor] : [])));
  const width = Math.max(...tensors.map((tensor) => tensor.width));
  const height = tensors.reduce((sum, { rows }) => sum + rows, 0);
  const values = new Float32Array(width * height);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let row = 0;
  for (const tensor of tensors) {
    for (let r = 0; r < tensor.rows; r++, row++) {
      for (let k = 0; k < tensor.width; k++) {
        values[row * width + k] = half(view.getUint16(tensor.byteOffset + 2 * (r * tensor.width + k), true));
      }
    }
  }
  return { width, height, values, rank: tensors[0].rows };
}

/** @param {number} bits of a finite f16 */
function half(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  return (bits & 0x8000 ? -1 : 1) * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

/** @type {Promise<unknown>} */
let queue = Promise.resolve();
self.onmessage = ({ data: { id, call, args } }) => {
  const run = /** @type {Record<string, (...args: unknown[]) => Promise<unknown>>} */ (/** @type {unknown} */ (calls))[call];
  queue = queue.then(async () => {
    try {
      const value = await run(...args);
      self.postMessage({ id, value });
    } catch (error) {
      const { message, tag } = /** @type {Error & { tag?: string }} */ (error);
      self.postMessage({ id, error: { message, tag } });
    }
  });
};

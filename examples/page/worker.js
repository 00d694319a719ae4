/**
 * The worker of the page: owns tokenizer, pack, session and trainer, and answers calls one after the other, so the page
 * stays responsive while WASM computes. Knows nothing of the document.
 *
 * Teaching does not block the queue of calls: they are answered between two of its steps.
 */
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack, readTensor } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import {
  addressOf,
  answerCalls,
  findWebGpu,
  get,
  getJson,
  inQueue,
  isOfTask,
  loadOrt,
  progress,
  report,
  turn,
} from "./worker-kit.js";

/**
 * @typedef {import("./worker-kit.js").Provider} Provider
 * @typedef {import("./worker-kit.js").Ort} Ort
 * @typedef {import("./worker-kit.js").Reads} Reads
 * @typedef {import("./worker-kit.js").SessionOptions} SessionOptions
 * @typedef {import("eigenlora/onnxruntime").MemoryReport} MemoryReport
 */

/**
 * @typedef {object} Task
 * @property {string} id
 * @property {readonly string[]} labels
 * @property {number} bytes of its blob in the pack
 * @property {boolean} own taught or opened here, not from the pack's file
 */

/** @typedef {{ text: string, label: string }} Example */
/** @typedef {{ step: number, steps: number, loss: number }} Step */
/**
 * @typedef {{ trainer: { init?: import("eigenlora/train").Start, modules?: string[] }, fit:
 *   import("eigenlora/train").FitOptions }} Lessons
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

/** Settings for a handful of examples (docs/research/learning.md). @type {Lessons} */
const TEACHING = {
  trainer: { init: "mean" },
  fit: { batch: 16, steps: 20, learningRates: { terms: 0.005, head: 0.02 } },
};

/** @type {{ tokenizer: Tokenizer, pack: import("eigenlora").Pack, model: Blob } | undefined} */
let files;
/** Files of tasks taught or opened here. @type {Map<string, Uint8Array<ArrayBuffer>>} */
const own = new Map();
/** Ends the teaching under way. @type {AbortController | undefined} */
let teaching;
/**
 * @type {{ ort: Ort, session: import("eigenlora/onnxruntime").EigenSession<Ort>, options: SessionOptions } | undefined}
 */
let running;

/** Calls of the page. */
const calls = {
  webgpu: findWebGpu,

  /**
   * Loads what is not loaded yet, makes a session on the provider and switches to the task.
   * @param {Provider} provider
   * @param {string} [wanted] task; the pack's first one where there is none of that name
   */
  async start(provider, wanted) {
    const started = performance.now();
    const before = files ? { ...files.pack.reads } : { requests: 0, bytes: 0 };
    await running?.session.close();
    running = undefined;
    const [ort, { pack, model }] = await Promise.all([loadOrt(provider), openFiles()]);
    progress("preparing the model");
    // Errors only: it warns that WebGPU leaves shapes to the CPU, which is as it should be.
    const options = /** @type {SessionOptions} */ ({ executionProviders: [provider], logSeverityLevel: 3 });
    // The weights themselves change on the GPU: no run costs more than the base's.
    const mode = provider === "webgpu" ? "folded" : "auto";
    const session = await createEigenSession(ort, model, pack, { mode, session: options });
    running = { ort, session, options };
    const task = wanted !== undefined && pack.tasks.has(wanted) ? wanted : [...pack.tasks.keys()][0];
    const { bytesRead, milliseconds } = await session.switchTask(task);
    return {
      task,
      switched: { milliseconds: milliseconds.total, bytes: bytesRead },
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
    return { requests, bytes: bytesRead, milliseconds: milliseconds.total, memory: session.memory(), coefficients };
  },

  /**
   * Reads tasks ahead. Those that are damaged are named; a server that fails is an error.
   * @param {string[]} ids
   */
  async load(ids) {
    const { session } = live();
    const started = performance.now();
    const before = { ...session.pack.reads };
    const read = await Promise.allSettled(ids.map((id) => session.pack.load(id)));
    const milliseconds = performance.now() - started;
    const unreadable = read.flatMap((result, i) => {
      if (result.status === "fulfilled") return [];
      if (!isOfTask(result.reason)) throw result.reason;
      return [{ id: ids[i], why: String(result.reason.message) }];
    });
    const good = ids.filter((_, i) => read[i].status === "fulfilled");
    const coefficients = await Promise.all(
      good.map(async (id) => /** @type {const} */ ([id, await coefficientsOf(id)])),
    );
    return { ...since(before), milliseconds, memory: session.memory(), coefficients, unreadable };
  },

  /**
   * Classifies a text by the active task.
   * @param {string} text
   */
  async classify(text) {
    const { ort, session } = live();
    const { feeds, tokens } = tokenize(ort, [text]);
    const started = performance.now();
    const { logits } = await session.run(feeds);
    const milliseconds = performance.now() - started;
    return { probabilities: softmax(/** @type {Float32Array} */ (logits.data)), tokens, milliseconds };
  },

  /**
   * Classifies a text by each of several tasks: one run with one task per row; where tasks are folded into the weights,
   * one run after the other, and back to the active task.
   * @param {string} text
   * @param {string[]} tasks
   */
  async classifyAll(text, tasks) {
    const { session } = live();
    const started = performance.now();
    const rows = await usable(session.mode === "folded" ? oneByOne : oneBatch, text, tasks);
    return { rows, batch: session.mode !== "folded", milliseconds: performance.now() - started };
  },

  /**
   * Learns a task from a handful of examples and makes it active, in place of one of that name that was taught before.
   * Reports each step. When it is stopped, what was learned until then counts; before the first step that is nothing.
   * @param {string} id
   * @param {string[]} labels
   * @param {Example[]} examples
   * @param {Lessons} [lessons] otherwise than usual, to compare with
   */
  async teach(id, labels, examples, lessons = TEACHING) {
    if (teaching) throw new Error("a task is being taught; stop that first");
    const { ort, session, options } = live();
    if (session.tasks.has(id) && !own.has(id)) throw new Error(`a task "${id}" already exists; choose another name`);
    const started = performance.now();
    const before = { ...session.pack.reads };
    const { signal } = (teaching = new AbortController());
    let school;
    try {
      // A separate session, closed afterwards: the other one keeps its mode and costs nothing extra.
      school = await createEigenSession(ort, /** @type {NonNullable<typeof files>} */ (files).model, session.pack, {
        trainable: true,
        session: options,
      });
      const encode = (/** @type {string[]} */ texts) => tokenize(ort, texts).feeds;
      const trainer = await createTrainer(school, { ...lessons.trainer, labels, encode });
      let last = { step: 0, steps: 0, loss: NaN };
      try {
        const fit = trainer.fit(examples, { ...lessons.fit, signal });
        for await (const { step, steps, loss } of fit) {
          report("step", (last = { step, steps, loss }));
          // Between two steps the worker looks for a new request.
          await turn();
        }
      } catch (error) {
        if (!signal.aborted) throw error;
      }
      if (last.step === 0) return undefined;
      const file = await trainer.task({ id });
      const added = await inQueue(() => addOwn(id, file));
      return { ...added, ...last, ...since(before), milliseconds: performance.now() - started };
    } finally {
      teaching = undefined;
      await school?.close();
    }
  },

  /** Ends the teaching after the step under way. */
  async stop() {
    teaching?.abort();
  },

  /**
   * Adds a task that was taught elsewhere, and makes it active. Nothing is added when it cannot be used.
   * @param {string} id
   * @param {File} file
   */
  async open(id, file) {
    const { session } = live();
    const active = session.task;
    const bytes = new Uint8Array(await file.arrayBuffer());
    await session.addTask(id, file);
    try {
      if (!session.tasks.get(id)?.metadata.labels?.length)
        throw Object.assign(new Error(`${file.name} has no labels`), { tag: "task" });
      return await adopt(id, bytes);
    } catch (error) {
      own.delete(id);
      await session.switchTask(active);
      session.removeTask(id);
      throw error;
    }
  },

  /**
   * The file of a task that was taught or opened here.
   * @param {string} id
   */
  async file(id) {
    return /** @type {Uint8Array<ArrayBuffer>} */ (own.get(id));
  },

  /**
   * Forgets a task that was taught or opened here and is not active.
   * @param {string} id
   */
  async forget(id) {
    // A switch away from it may have been refused, or be yet to come.
    if (live().session.task === id) await live().session.switchTask(null);
    live().session.removeTask(id);
    own.delete(id);
  },
};

/** @typedef {typeof calls} Calls */

/** @param {import("eigenlora").TaskInfo | undefined} info @returns {Task} */
function taskOf(info) {
  const { id, bytes, metadata } = /** @type {import("eigenlora").TaskInfo} */ (info);
  return { id, bytes: own.get(id)?.length ?? bytes, labels: metadata.labels ?? [], own: own.has(id) };
}

/**
 * @param {string} id of none that the pack's file has
 * @param {Uint8Array<ArrayBuffer>} file
 */
async function addOwn(id, file) {
  const { session } = live();
  if (own.has(id)) {
    // An active task cannot be removed.
    await session.switchTask(null);
    session.removeTask(id);
  }
  await session.addTask(id, file);
  return adopt(id, file);
}

/**
 * Makes a task that was added active, and reports it to the page: a trainer reads all tasks, to begin at their mean.
 * @param {string} id
 * @param {Uint8Array<ArrayBuffer>} file
 */
async function adopt(id, file) {
  const { session } = live();
  own.set(id, file);
  await session.switchTask(id);
  const read = residentIds(session.pack).map(async (one) => /** @type {const} */ ([one, await coefficientsOf(one)]));
  return { task: taskOf(session.tasks.get(id)), coefficients: await Promise.all(read), memory: session.memory() };
}

/** @typedef {{ id: string, probabilities: number[], unusable?: string }} Row */

/**
 * Answers of tasks. A task that cannot be used is reported with its reason, and does not silence the others.
 * @param {(text: string, tasks: string[]) => Promise<Row[]>} answer
 * @param {string} text
 * @param {string[]} tasks
 * @returns {Promise<Row[]>}
 */
async function usable(answer, text, tasks) {
  try {
    return await answer(text, tasks);
  } catch (error) {
    if (!isOfTask(error)) throw error;
    const { message } = /** @type {Error} */ (error);
    if (tasks.length === 1) return [{ id: tasks[0], probabilities: [], unusable: message }];
    const rows = [];
    for (const task of tasks) rows.push(...(await usable(answer, text, [task])));
    return rows;
  }
}

/**
 * @param {string} text
 * @param {string[]} tasks one per row
 */
async function oneBatch(text, tasks) {
  const { ort, session } = live();
  const result = await session.run(
    tokenize(
      ort,
      tasks.map(() => text),
    ).feeds,
    { tasks },
  );
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
  const { feeds } = tokenize(ort, [text]);
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

/** Tokenizer, pack and model, which outlive a session. */
async function openFiles() {
  if (files) return files;
  const json = ["tokenizer.json", "tokenizer_config.json"].map(getJson);
  // The page can name the tasks while the model is still on its way.
  const opening = openPack(addressOf("tasks.eigen")).then((pack) => {
    report("opened", [...pack.tasks.values()].map(taskOf));
    return pack;
  });
  const [pack, model, tokens, config] = await Promise.all([opening, fetchModel(), ...json]);
  return (files = { pack, model, tokenizer: new Tokenizer(tokens, config) });
}

/** The model's file. A trainer reads it again; as a blob it need not stay in memory until then. */
async function fetchModel() {
  const response = await get("model_fp16.onnx");
  const total = Number(response.headers.get("content-length"));
  // Some hosts compress on the way and cannot say how long it will be.
  const known = response.body && total && !response.headers.has("content-encoding");
  if (!response.body || !known) return response.blob();
  const parts = [];
  let done = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done: end } = await reader.read();
    if (end) break;
    parts.push(value);
    done += value.length;
    progress("loading the model", done, total);
  }
  if (done !== total) throw new Error(`model_fp16.onnx ended after ${done} of ${total} bytes; reload the page`);
  return new Blob(parts);
}

/**
 * A text a row, padded to the longest.
 * @param {Ort} ort
 * @param {readonly string[]} texts
 */
function tokenize(ort, texts) {
  const { tokenizer } = /** @type {NonNullable<typeof files>} */ (files);
  const rows = texts.map((text) => {
    const { ids } = tokenizer.encode(text);
    if (ids.length > MAX_TOKENS) ids.splice(MAX_TOKENS - 1, ids.length - MAX_TOKENS);
    return ids;
  });
  const tokens = Math.max(...rows.map(({ length }) => length));
  /** @param {(id: number | undefined) => number} value */
  const tensor = (value) => {
    const data = rows.flatMap((ids) => Array.from({ length: tokens }, (_, i) => BigInt(value(ids[i]))));
    return new ort.Tensor("int64", BigInt64Array.from(data), [rows.length, tokens]);
  };
  const feeds = {
    input_ids: tensor((id = 0) => id),
    attention_mask: tensor((id) => Number(id !== undefined)),
    token_type_ids: tensor(() => 0),
  };
  return { feeds, tokens };
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
 * Read for the picture of a task. build.js packs them as f16; of tasks that come in another format there is no picture.
 * @param {string} id of a resident task
 * @returns {Promise<Coefficients>}
 */
async function coefficientsOf(id) {
  const { terms, bytes } = await live().session.pack.load(id);
  const tensors = terms.flatMap(({ A, B }) => [A, B].flatMap((side) => (side ? [side.tensor] : [])));
  const width = Math.max(0, ...tensors.map((tensor) => tensor.width));
  const height = tensors.reduce((sum, { rows }) => sum + rows, 0);
  const values = new Float32Array(width * height);
  let row = 0;
  for (const tensor of tensors) {
    const own = readTensor(bytes, tensor);
    // A matrix with fewer components than others leaves the rest of its rows empty.
    for (let r = 0; r < tensor.rows; r++, row++)
      values.set(own.subarray(r * tensor.width, (r + 1) * tensor.width), row * width);
  }
  // A task may be a head alone.
  return { width, height, values, rank: tensors.at(-1)?.rows ?? 0 };
}

answerCalls(calls, ["teach", "stop"]);

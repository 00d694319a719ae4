/**
 * The worker of the page with a language model: owns tokenizer, pack, session and trainer, and answers calls one after
 * the other. Text arrives in events, token by token. Teaching does not block the queue of calls: they are answered
 * between two of its steps. Knows nothing of the document.
 *
 * A skill is a task of the pack and the words around what the visitor writes: those of the pack's tasks are in
 * facts.json, those of tasks made here travel in the metadata of their files.
 */
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
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
} from "../worker-kit.js";
import { decode } from "./decode.js";

/**
 * @typedef {import("../worker-kit.js").Provider} Provider
 * @typedef {import("../worker-kit.js").Ort} Ort
 * @typedef {import("eigenlora/onnxruntime").MemoryReport} MemoryReport
 * @typedef {{ before: string, after: string }} Prompt words before and after what the visitor writes
 */

/**
 * @typedef {object} Skill
 * @property {string} id
 * @property {string} what it does, in a few words
 * @property {Prompt} prompt
 * @property {number} bytes of its blob in the pack
 * @property {boolean} own taught or opened here, not from the pack's file
 */

/** @typedef {{ text: string, answer: string }} Example */
/** @typedef {{ step: number, steps: number, loss: number }} Step */

/** Facts that the page was built with (build.js). @typedef {import("./build.js").Facts} Facts */

/**
 * Settings for a dozen examples: the tasks' mean knows already that an answer is short and ends. A step of more
 * examples would teach a little better, and take longer.
 */
const TEACHING = { init: /** @type {const} */ ("mean"), fit: { batch: 4, steps: 12, learningRates: { terms: 0.02 } } };

/** Skills that answer at a time where all do: few, so that the first answers come soon. */
const ROWS = 5;
/** Most tokens of what a visitor writes. */
const MOST_TOKENS = 48;
/** Most characters of the words around it. */
const MOST_WORDS = 40;
/** Prompt of skills without one. @type {(id: string) => Prompt} */
const usualPrompt = (id) => ({ before: `${id}: `, after: " →" });

/** @type {{ facts: Facts, tokenizer: Tokenizer, pack: import("eigenlora").Pack, model: Blob } | undefined} */
let files;
/** Files of skills taught or opened here. @type {Map<string, Uint8Array<ArrayBuffer>>} */
const own = new Map();
/** @typedef {import("../worker-kit.js").SessionOptions} SessionOptions */
/**
 * @type {{ ort: Ort, session: import("eigenlora/onnxruntime").EigenSession<Ort>, options: SessionOptions } | undefined}
 */
let running;
/** Ends the teaching under way. @type {AbortController | undefined} */
let teaching;
/** The request that the visitor waits for. Answers to an older one stop after the token under way. */
let wanted = 0;

/** Calls of the page. */
const calls = {
  webgpu: findWebGpu,

  /**
   * Loads what is not loaded yet, makes a session on the provider and switches to the skill.
   * @param {Provider} provider
   * @param {string} [skill] the pack's first one where there is none of that name
   */
  async start(provider, skill) {
    const started = performance.now();
    const before = files ? { ...files.pack.reads } : { requests: 0, bytes: 0 };
    await running?.session.close();
    running = undefined;
    const [ort, { pack, model }] = await Promise.all([loadOrt(provider), openFiles()]);
    progress("preparing the model");
    // Errors only: it warns that WebGPU leaves shapes to the CPU, which is as it should be.
    const options = /** @type {SessionOptions} */ ({ executionProviders: [provider], logSeverityLevel: 3 });
    const session = await createEigenSession(ort, model, pack, { session: options });
    running = { ort, session, options };
    const id = skill !== undefined && pack.tasks.has(skill) ? skill : [...pack.tasks.keys()][0];
    const { milliseconds } = await session.switchTask(id);
    return {
      skill: id,
      switched: milliseconds.total,
      mode: session.mode,
      reason: session.reason,
      reads: since(before),
      memory: session.memory(),
      milliseconds: performance.now() - started,
    };
  },

  /**
   * Reads skills ahead. Those that are damaged are named; a server that fails is an error.
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
    return { ...since(before), milliseconds, memory: session.memory(), unreadable };
  },

  /**
   * Makes this request the one that the visitor waits for; earlier ones stop.
   * @param {number} request
   */
  async wish(request) {
    wanted = request;
  },

  /**
   * Answers as one skill.
   * @param {number} request
   * @param {string} id
   * @param {string} text
   */
  async answer(request, id, text) {
    const { session } = live();
    const before = { ...session.pack.reads };
    const switched = session.task === id ? undefined : (await session.switchTask(id)).milliseconds.total;
    const { texts, ...rest } = await stream(request, [id], text);
    return { ...rest, ...since(before), text: texts[0], switch: switched, memory: session.memory() };
  },

  /**
   * Answers as each of several skills: batches with one task per row. Where tasks are folded into the weights, one
   * after the other.
   * @param {number} request
   * @param {string[]} ids
   * @param {string} text
   */
  async answerAll(request, ids, text) {
    const { session } = live();
    const { task } = session;
    const batch = session.mode !== "folded";
    const rows = batch ? ROWS : 1;
    /** @type {Awaited<ReturnType<typeof stream>>[]} */
    const all = [];
    for (let at = 0; at < ids.length && request === wanted; at += rows) {
      const some = ids.slice(at, at + rows);
      if (!batch) await session.switchTask(some[0]);
      all.push(await stream(request, some, text, batch ? { tasks: some } : undefined));
    }
    if (!batch) await session.switchTask(task);
    const sum = (/** @type {"tokens" | "milliseconds"} */ what) => all.reduce((total, one) => total + one[what], 0);
    return {
      texts: all.flatMap((one) => one.texts),
      first: all[0]?.first ?? NaN,
      tokens: sum("tokens"),
      milliseconds: sum("milliseconds"),
      stopped: request !== wanted,
      batch,
    };
  },

  /**
   * Learns a skill from a dozen examples and makes it active, in place of one of that name that was taught before.
   * Reports each step. When it is stopped, what was learned until then counts; before the first step that is nothing.
   * @param {string} id
   * @param {Prompt} prompt
   * @param {Example[]} examples
   */
  async teach(id, prompt, examples) {
    if (teaching) throw new Error("a skill is being taught; stop that first");
    const { ort, session, options } = live();
    const started = performance.now();
    const { signal } = (teaching = new AbortController());
    let school;
    try {
      // A separate session, closed afterwards: the other one keeps its mode and costs nothing extra.
      school = await createEigenSession(ort, opened().model, session.pack, { trainable: true, session: options });
      const trainer = await createTrainer(school, { init: TEACHING.init, encode: encoderOf(ort), end: endOf() });
      const { before, after } = prompt;
      const lessons = examples.map(({ text, answer }) => ({
        prompt: `${before}${text}${after}`,
        completion: ` ${answer}`,
      }));
      let last = { step: 0, steps: 0, loss: NaN };
      try {
        for await (const { step, steps, loss } of trainer.fit(lessons, { ...TEACHING.fit, signal })) {
          report("step", (last = { step, steps, loss }));
          // Between two steps the worker looks for a new request.
          await turn();
        }
      } catch (error) {
        if (!signal.aborted) throw error;
      }
      if (last.step === 0) return undefined;
      const file = await trainer.task({
        id,
        metadata: { template: `${before}{input}${after} {output}${endOf() ?? ""}` },
      });
      const added = await inQueue(() => addOwn(id, file));
      return { ...added, ...last, milliseconds: performance.now() - started };
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
   * Adds a skill that was taught elsewhere. Nothing is added when it cannot be used.
   * @param {string} id
   * @param {File} file
   */
  async open(id, file) {
    return addOwn(id, new Uint8Array(await file.arrayBuffer()));
  },

  /**
   * The file of a skill that was taught or opened here.
   * @param {string} id
   */
  async file(id) {
    return /** @type {Uint8Array<ArrayBuffer>} */ (own.get(id));
  },

  /**
   * Forgets a skill that was taught or opened here and is not active.
   * @param {string} id
   */
  async forget(id) {
    // A switch away from it may have been refused, or be yet to come.
    if (live().session.task === id) await live().session.switchTask(null);
    live().session.removeTask(id);
    own.delete(id);
    return live().session.memory();
  },
};

/** @typedef {typeof calls} Calls */

/**
 * @param {string} id
 * @param {Pick<NonNullable<typeof files>, "facts" | "pack">} of
 * @returns {Skill}
 */
function skillOf(id, { facts, pack } = opened()) {
  const { bytes, metadata } = /** @type {import("eigenlora").TaskInfo} */ (pack.tasks.get(id));
  const file = own.get(id);
  const known = file ? undefined : facts.skills[id];
  const prompt = known?.prompt ?? promptIn(metadata) ?? usualPrompt(id);
  return { id, what: known?.what ?? "", prompt, bytes: file?.length ?? bytes, own: file !== undefined };
}

/**
 * The words of a skill's `template`.
 * @param {import("eigenlora").TaskMetadata} metadata
 * @returns {Prompt | undefined}
 */
function promptIn({ template, ...facts }) {
  if (typeof template !== "string") return undefined;
  const [asked = ""] = template.split("{output}");
  const filled = asked.replace(/\{(\w+)\}/g, (name, key) => (typeof facts[key] === "string" ? facts[key] : name));
  const [before, after, ...others] = filled.trimEnd().split("{input}");
  return isShort(before) && isShort(after) && others.length === 0 ? { before, after } : undefined;
}

/** Files may come from anybody. @param {unknown} words @returns {words is string} */
function isShort(words) {
  return typeof words === "string" && words.length <= MOST_WORDS;
}

/**
 * Adds a skill in place of one of that name that was made here before, and makes it active. Leaves everything as it was
 * when the skill cannot be used.
 * @param {string} id of none that the pack's file has
 * @param {Uint8Array<ArrayBuffer>} file
 */
async function addOwn(id, file) {
  const { session } = live();
  const active = session.task === id ? null : session.task;
  if (own.has(id)) {
    // An active task cannot be removed.
    await session.switchTask(active);
    session.removeTask(id);
  }
  await session.addTask(id, file);
  try {
    await session.switchTask(id);
  } catch (error) {
    await session.switchTask(active);
    session.removeTask(id);
    throw error;
  }
  own.set(id, file);
  return { skill: skillOf(id), memory: session.memory() };
}

/**
 * Answers of several skills to one text, a row each, reported as they grow.
 * @param {number} request
 * @param {string[]} ids
 * @param {string} text
 * @param {{ tasks?: string[] }} [options] of the runs
 */
async function stream(request, ids, text, options) {
  const { ort, session } = live();
  const { facts } = opened();
  /** @type {number[][]} */
  const answers = ids.map(() => []);
  const prompts = ids.map((id) => tokensOf(skillOf(id).prompt, text));
  const started = performance.now();
  let first = NaN;
  const spent = () => performance.now() - started;
  if (request === wanted) {
    for await (const tokens of decode(ort, session, prompts, facts, options)) {
      if (Number.isNaN(first)) first = spent();
      tokens.forEach((token, row) => token !== undefined && answers[row].push(token));
      report("text", { request, texts: ids.map((id, row) => [id, textOf(answers[row])]) });
      // Between two tokens the worker looks for a new request.
      await turn();
      if (request !== wanted) break;
    }
  }
  const tokens = answers.reduce((sum, { length }) => sum + length, 0);
  const longest = Math.max(...answers.map(({ length }) => length));
  // One more run found the end.
  const steps = Math.min(longest + 1, facts.most);
  return { texts: answers.map(textOf), tokens, steps, first, milliseconds: spent(), stopped: request !== wanted };
}

/**
 * @param {Prompt} prompt
 * @param {string} text
 */
function tokensOf({ before, after }, text) {
  const { tokenizer } = opened();
  const tokens = (/** @type {string} */ part) => tokenizer.encode(part, { add_special_tokens: false }).ids;
  const whole = tokens(`${before}${text}${after}`);
  // A text that is too long is cut at its end; the skill's own words stay.
  if (whole.length <= MOST_TOKENS) return whole;
  const end = tokens(after);
  return [...whole.slice(0, MOST_TOKENS - end.length), ...end];
}

/** Input of learning: the same tokens as in answering. @param {Ort} ort */
function encoderOf(ort) {
  const { tokenizer } = opened();
  return (/** @type {readonly string[]} */ texts) => {
    const rows = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids);
    const columns = Math.max(...rows.map(({ length }) => length));
    const tensor = (/** @type {(id: number | undefined) => number} */ value) =>
      new ort.Tensor(
        "int64",
        BigInt64Array.from(rows.flatMap((ids) => Array.from({ length: columns }, (_, i) => BigInt(value(ids[i]))))),
        [rows.length, columns],
      );
    return { input_ids: tensor((id = 0) => id), attention_mask: tensor((id) => Number(id !== undefined)) };
  };
}

/** End of an answer, as the tokenizer writes it. */
function endOf() {
  const { facts, tokenizer } = opened();
  return tokenizer.decode([facts.end[0]], { skip_special_tokens: false });
}

/** @param {number[]} tokens */
function textOf(tokens) {
  // A character of several tokens is unknown until the last of them.
  return opened()
    .tokenizer.decode(tokens, { skip_special_tokens: true })
    .replace(/\uFFFD+$/, "")
    .trim();
}

function live() {
  if (!running) throw new Error("there is no session: it is starting, or did not start");
  return running;
}

function opened() {
  return /** @type {NonNullable<typeof files>} */ (files);
}

/** Tokenizer, pack and model, which outlive a session. */
async function openFiles() {
  if (files) return files;
  /** @type {Facts} */
  const facts = await getJson("facts.json");
  const json = ["tokenizer.json", "tokenizer_config.json"].map(getJson);
  // The page can name the skills while the model is still on its way.
  const opening = openPack(addressOf("tasks.eigen")).then((pack) => {
    report(
      "opened",
      [...pack.tasks.keys()].map((id) => skillOf(id, { facts, pack })),
    );
    return pack;
  });
  const [pack, model, tokens, config] = await Promise.all([opening, fetchModel(facts), ...json]);
  return (files = { facts, pack, model, tokenizer: new Tokenizer(tokens, config) });
}

/** The model's file, which comes in parts: as a blob it need not stay in the worker's memory. @param {Facts} facts */
async function fetchModel({ model, parts }) {
  const blobs = [];
  let done = 0;
  for (const part of parts) {
    const blob = await (await get(part)).blob();
    blobs.push(blob);
    done += blob.size;
    progress("loading the model", done, model);
  }
  if (done !== model) throw new Error(`the model has ${done} of ${model} bytes; build the page again`);
  return new Blob(blobs);
}

/** @param {import("../worker-kit.js").Reads} before */
function since({ requests, bytes }) {
  const { reads } = live().session.pack;
  return { requests: reads.requests - requests, bytes: reads.bytes - bytes };
}

answerCalls(calls, ["wish", "teach", "stop"]);

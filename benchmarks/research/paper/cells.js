/**
 * One cell of a table: a method on a left-out task, at one rate and seed. Cells are kept as JSON lines, so that a run can be cut
 * off and goes on, and tables can be made of what there is.
 */

import { openPack } from "eigenlora";
import { encodeTaskFile, projectAdapters } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer, distill } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import { uniform } from "../../../dist/src/tensor/random.js";
import { splitHoldout } from "../../../dist/src/train/examples.js";
import { createEncoder, labelOf, model, runBatches, toBatches } from "../../../examples/minilm.js";
import { folderOf, packOf, withAdapters } from "../../lib/adapters.js";
import { Rows } from "../../lib/rows.js";
import { domainOf } from "./data.js";
import { headTrainer, readFeatures } from "./frozen.js";
import { runPeer } from "./peers.js";
import { zeroShotTask } from "./zero-shot.js";

/**
 * @typedef {{ task: string, method: Method, k?: number | undefined, within?: boolean | undefined, rates: Rates, seed: number }} Cell
 *   within: only tasks of the same domain are donors
 * @typedef {{ terms: number, head: number }} Rates of the head and of what is trained beside it
 * @typedef {object} Result
 * @property {number} trained numbers that change beside the head
 * @property {number} head numbers of the head that change
 * @property {number[]} loss of training, means over consecutive tenths of the steps
 * @property {{ loss: number, accuracy: number }} validation on the rows held back
 * @property {string} answers label of every test row, a digit each
 * @property {number} seconds
 * @property {string} [peer] versions and day, where Python trained
 * @typedef {Cell & Result} Row
 * @typedef {"coefficients" | "lora" | "lora r 1" | "lora init" | "flat" | "analytical" | "distilled" | "head" | "mean adapter" | "zero-shot" | "zero-shot flat" | "LoRA" | "VeRA" | "PiSSA"} Method
 * @typedef {{ text: string, label: number }} Example
 * @typedef {import("./data.js").Task} Task
 * @typedef {object} Subject what learns
 * @property {string} model file of the inference export
 * @property {import("../../../examples/minilm.js").Encoder<ort.Tensor>} encode rows, by their text or name, as the model's inputs
 * @property {number} width how many numbers enter the head
 * @property {number} steps the same for every method, as is the batch
 * @property {number} batch
 * @property {(job: object) => ReturnType<typeof runPeer>} askPeer
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("eigenlora/onnxruntime").EigenSession<typeof ort>} Session
 */

/** Steps of training: 2048 texts, one pass over the largest tasks. */
export const STEPS = 256;
const BATCH = 8;
/** Rows of a task's training set that are held back to choose rates by: this share of each label, with a maximum. */
const HELD = 0.15;
const MOST_HELD = 256;
const RANK = 8;
/** Number of means of the loss that are kept. */
const CURVE = 16;
/** Number formats that round nothing. */
const DTYPES = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });
/** Options with one thread: seeds then give the same numbers, and the machine stays usable. */
const SESSION = { intraOpNumThreads: 1, interOpNumThreads: 1 };

/** Methods that train a head alone. @type {ReadonlySet<Method>} */
const FROZEN = new Set(/** @type {const} */ (["head", "mean adapter", "zero-shot", "zero-shot flat"]));

/** Methods of random coefficients. @type {ReadonlySet<Method>} */
const ZERO_SHOT = new Set(/** @type {const} */ (["zero-shot", "zero-shot flat"]));

/** Methods on flat components: one vector of coefficients for a whole factor. @type {ReadonlySet<Method>} */
const FLAT = new Set(/** @type {const} */ (["flat", "zero-shot flat"]));

/** Methods that begin with the given adapter of the left-out task, and keep its head. @type {ReadonlySet<Method>} */
const GIVEN = new Set(/** @type {const} */ (["analytical", "distilled"]));

/** Methods that PEFT trains in Python. @type {ReadonlySet<Method>} */
export const PEERS = new Set(/** @type {const} */ (["LoRA", "VeRA", "PiSSA"]));

/** @param {Cell} cell */
export const keyOf = ({ task, method, k, within, rates, seed }) =>
  [
    task,
    method,
    ...(k ? [`K ${k}`] : []),
    ...(within ? ["donors of its domain"] : []),
    `rates ${rates.terms} and ${rates.head}`,
    `seed ${seed}`,
  ].join(", ");

/** Measurements so far, by key. @extends {Rows<Row, Cell>} */
export class Results extends Rows {
  /** @param {string | URL} file */
  constructor(file) {
    super(file, keyOf);
  }

  /** @param {string | URL} file */
  static open(file) {
    return new Results(file).load();
  }
}

/** Runs cells. The tokenizer is read once. */
export class Bench {
  /** Inputs of the head, of the last frozen model. @type {{ key: string, table: Map<string, Float32Array> } | undefined} */
  #features;

  /** @param {ReadonlyMap<string, Task>} tasks @param {Record<string, import("./data.js").Experiment>} experiments */
  static async create(tasks, experiments) {
    ort.env.logLevel = "error";
    const encode = await createEncoder(ort);
    return new Bench(tasks, experiments, {
      ...{ model, encode, width: 384, steps: STEPS, batch: BATCH, askPeer: runPeer },
    });
  }

  /**
   * @param {ReadonlyMap<string, Task>} tasks
   * @param {Record<string, import("./data.js").Experiment>} experiments
   * @param {Subject} subject
   */
  constructor(tasks, experiments, subject) {
    this.tasks = tasks;
    this.experiments = experiments;
    this.subject = subject;
    this.encode = subject.encode;
  }

  /**
   * @param {Cell} cell
   * @returns {Promise<Row>}
   */
  async run(cell) {
    const started = performance.now();
    const { labels, train, test } = /** @type {Task} */ (this.tasks.get(cell.task));
    const examples = train.map(([text, label]) => ({ text, label }));
    const split = splitHoldout(examples, Math.min(HELD, MOST_HELD / train.length), uniform(1));
    const texts = [...test.map(([text]) => text), ...split.holdout.map(({ text }) => text)];
    const { logits, ...result } = await this.#learn(cell, labels, split.train, texts);
    const answers = logits.slice(0, test.length).map(labelOf).join("");
    const validation = judge(logits.slice(test.length), split.holdout);
    return { ...cell, ...result, validation, answers, seconds: Math.round((performance.now() - started) / 100) / 10 };
  }

  /**
   * @param {Cell} cell
   * @param {readonly string[]} labels
   * @param {readonly Example[]} examples
   * @param {readonly string[]} texts to answer
   */
  #learn(cell, labels, examples, texts) {
    if (PEERS.has(cell.method)) return this.#askPeer(cell, labels, examples, texts);
    if (GIVEN.has(cell.method)) return this.#project(cell, examples, texts);
    return FROZEN.has(cell.method)
      ? this.#trainHead(cell, labels, examples, texts)
      : this.#train(cell, labels, examples, texts);
  }

  /**
   * @param {Cell} cell
   * @param {readonly string[]} labels
   * @param {readonly Example[]} examples
   * @param {readonly string[]} texts to answer
   */
  async #askPeer({ method, rates, seed }, labels, examples, texts) {
    const train = examples.map(({ text, label }) => [text, label]);
    const { steps, batch } = this.subject;
    const job = { method, ...rates, seed, steps, batch, labels, train, texts };
    const { version, trained, head, loss, logits } = await this.subject.askPeer(job);
    const date = new Date().toISOString().slice(0, 10);
    return {
      trained,
      head,
      loss: curveOf(loss),
      logits: logits.map((row) => Float32Array.from(row)),
      peer: `${version}, ${date}`,
    };
  }

  /**
   * The given adapter on the donors' components: as projected, or distilled on the task's training texts without their labels.
   * @param {Cell} cell
   * @param {readonly Example[]} examples
   * @param {readonly string[]} texts to answer
   */
  #project(cell, examples, texts) {
    const given = folderOf(this.experiments[domainOf(cell.task)].suite, cell.task);
    const work = async (/** @type {Session} */ session, /** @type {Adapter} */ adapter) => {
      const { pack } = session;
      const [{ entry, blob }] = await projectAdapters(pack, [adapter], DTYPES, { maxLoss: 1 });
      await session.addTask(cell.task, encodeTaskFile(entry, pack.basisId, blob));
      let task = cell.task;
      if (cell.method === "distilled") {
        const encode = (/** @type {string[]} */ some) => this.encode(some);
        const { file } = await distill(session, {
          adapter,
          texts: examples.map(({ text }) => text),
          encode,
          seed: cell.seed,
          learningRates: cell.rates,
        });
        await session.addTask((task = "distilled"), file);
      }
      await session.switchTask(task);
      const logits = await runBatches(session, toBatches(this.encode, texts));
      const coefficients = pack.modules.reduce(
        (sum, { A: [A], B: [B] }) => sum + RANK * ((A?.K ?? 0) + (B?.K ?? 0)),
        0,
      );
      return { trained: cell.method === "distilled" ? coefficients : 0, head: 0, loss: [], logits };
    };
    return this.#withSession(cell, (session) => withAdapters([given], ([adapter]) => work(session, adapter)));
  }

  /**
   * A session on a pack of the donors, whole unless a number of components is given.
   * @template T
   * @param {Cell} cell
   * @param {(session: Session) => Promise<T>} work
   */
  async #withSession({ task, method, k, within }, work) {
    const { domain, suite, donors } = this.experiments[domainOf(task)];
    const ids = donors(task).filter((id) => !within || domainOf(id) === domain);
    /** @type {import("eigenlora/build").BuildOptions} */
    const options = {
      mode: FLAT.has(method) ? "flat" : "column",
      gauge: "balanced",
      select: k ? { kind: "k", k } : { kind: "energy", share: 1 },
      dtype: DTYPES,
    };
    const folders = ids.map((id) => folderOf(suite, id));
    const bytes = await withAdapters(folders, (adapters) => packOf(adapters, options));
    const session = await createEigenSession(ort, this.subject.model, await openPack(bytes), {
      trainable: !FROZEN.has(method),
      session: SESSION,
    });
    try {
      return await work(session);
    } finally {
      await session.close();
      await session.pack.close();
    }
  }

  /**
   * @param {Cell} cell
   * @param {readonly string[]} labels
   * @param {readonly Example[]} examples
   * @param {readonly string[]} texts to answer
   */
  #train(cell, labels, examples, texts) {
    return this.#withSession(cell, async (session) => {
      const { method, rates, seed } = cell;
      const lora = method !== "coefficients" && method !== "flat";
      const fresh = method === "lora" || method === "lora r 1";
      /** @type {import("eigenlora/train").Start} */
      const init = fresh ? "fresh" : this.experiments[domainOf(cell.task)].start;
      const options = { labels, encode: this.encode, seed, init, rank: method === "lora r 1" ? 1 : RANK };
      const trainer = await createTrainer(session, { ...options, train: lora ? "lora" : "coefficients" });
      const loss = await this.#fit(trainer, examples, rates);
      const { terms, head } = trainer.size;
      await session.addTask("new", await trainer.task({ dtype: { coefficients: "f32", head: "f32" } }));
      await session.switchTask("new");
      return { trained: terms, head, loss, logits: await runBatches(session, toBatches(this.encode, texts)) };
    });
  }

  /**
   * @param {Cell} cell
   * @param {readonly string[]} labels
   * @param {readonly Example[]} examples
   * @param {readonly string[]} texts to answer
   */
  async #trainHead(cell, labels, examples, texts) {
    const { task, method, k, rates, seed } = cell;
    const key = [task, method, k, ZERO_SHOT.has(method) ? seed : ""].join();
    if (this.#features?.key !== key) {
      const all = [...examples.map(({ text }) => text), ...texts];
      const table = await this.#withSession(cell, async (session) => {
        const ids = [...session.tasks.keys()];
        /** @type {Record<string, number>} */
        let blend = {};
        if (method === "mean adapter") blend = Object.fromEntries(ids.map((id) => [id, 1 / ids.length]));
        if (ZERO_SHOT.has(method)) {
          await session.addTask("zero-shot", await zeroShotTask(session.pack, { seed, rank: RANK }));
          blend = { "zero-shot": 1 };
        }
        return readFeatures(session, this.encode, all, blend, this.subject.width);
      });
      this.#features = { key, table };
    }
    const trainer = headTrainer(this.#features.table, { labels, seed });
    const loss = await this.#fit(trainer, examples, rates);
    const found = await trainer.predict(texts.map((text) => ({ text })));
    return {
      trained: 0,
      head: trainer.size.head,
      loss,
      logits: found.map((probabilities) => probabilities.map(Math.log)),
    };
  }

  /**
   * @param {Pick<import("eigenlora/train").Trainer<any>, "fit">} trainer
   * @param {readonly Example[]} examples
   * @param {Rates} rates
   */
  async #fit(trainer, examples, rates) {
    const { steps, batch } = this.subject;
    /** @type {number[]} */
    const losses = [];
    for await (const { loss } of trainer.fit(examples, { steps, batch, learningRates: rates })) losses.push(loss);
    return curveOf(losses);
  }
}

/** @param {readonly Float32Array[]} logits @param {readonly { label: number }[]} rows */
function judge(logits, rows) {
  const loss = logits.reduce(
    (sum, z, i) => sum + Math.log(z.reduce((total, value) => total + Math.exp(value - z[rows[i].label]), 0)),
    0,
  );
  const right = logits.filter((z, i) => labelOf(z) === rows[i].label).length;
  return { loss: rounded(loss / rows.length), accuracy: rounded(right / rows.length) };
}

/** Means of equal stretches. @param {readonly number[]} losses */
function curveOf(losses) {
  const length = losses.length / CURVE;
  return Array.from({ length: CURVE }, (_, i) => {
    const part = losses.slice(Math.round(i * length), Math.round((i + 1) * length));
    return rounded(mean(part));
  });
}

/** @param {number} value */
const rounded = (value) => Math.round(value * 1e4) / 1e4;

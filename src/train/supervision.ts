/**
 * Supervision: how examples become rows with targets for the model's logits. There is one kind for models that give one label for each
 * text (here) and one for models that give a class at each of some positions, such as the next token (token-supervision.ts).
 */

import { checkList, nearest } from "../arguments.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { Engine, EngineTensor } from "../session/engine.ts";
import { type BatchFeeds, encoderOf, type Tokenizer } from "../session/tokens.ts";
import { shuffle } from "../tensor/random.ts";

/** Targets for the logits of one run, in the form that the training graph takes: rows sum to their weight. */
export interface Targets {
  /** Values [rows, width]. */
  readonly values: Float32Array<ArrayBuffer>;
  /** Rows of logits: one for each text, or for each position that is asked. */
  readonly rows: number;
  /** Classes of the values [rows, width]. Undefined: all classes in order. */
  readonly classes?: BigInt64Array<ArrayBuffer> | undefined;
  readonly features?: Features | undefined;
}

/** Wanted inputs of the head's last layer. */
export interface Features {
  /** Values [rows, width]. */
  readonly values: readonly Float32Array[];
  /** Weight in the loss of half the squared distance of a row. */
  readonly weight: number;
}

/** Rows of a batch that run together; their gradients are added up. */
export interface MicroBatch {
  readonly rows: readonly Row[];
  readonly targets: Targets;
  /** Share of the batch's rows of logits, since the loss of a micro-batch is a mean. */
  readonly share: number;
}

/** Quality of answers. */
export interface Score {
  /** Mean cross entropy, in nats. */
  readonly loss: number;
  /** Share of examples with the right answer: the label, or every token of the completion. */
  readonly accuracy: number;
}

/** Turns examples into rows, and rows into inputs and targets. */
export interface Supervision {
  /** True for a model that answers at every position. */
  readonly tokens: boolean;
  /** Checks examples to learn from. @throws RangeError, TypeError when an example cannot be learned from */
  check(examples: readonly Example[]): Promise<Row[]>;
  /** Checks examples that are only asked; targets are ignored. */
  ask(examples: readonly Example[], where: string): Promise<Row[]>;
  /** Splits off a hold-out. */
  split(rows: readonly Row[], share: number, random: () => number): { train: Row[]; holdout: Row[] };
  /** Lengths of rows: batches take rows of similar lengths. */
  lengths(rows: readonly Row[]): Promise<ReadonlyMap<Row, number>>;
  /** Cuts a batch into micro-batches that fit into memory. */
  microBatches(rows: readonly Row[]): MicroBatch[];
  /** Makes the model's inputs for rows that run together. */
  feeds(rows: readonly Row[]): Promise<BatchFeeds>;
  /** Wanted answers of a row, one for each of its rows of logits. */
  wanted(row: Row): readonly Distribution[];
  /** Returns the row with these answers as targets. */
  answered(row: Row, answers: readonly Distribution[]): Row;
  /** Turns logits into a distribution small enough to keep. */
  distribution(logits: Float32Array): Distribution;
}

/** Most rows that run together: gradients need kept values of each row, so memory grows with their number. */
const MOST_ROWS = 16;

/** @param labels of the task, in order */
export function labelSupervision(inputs: Batcher, labels: readonly string[]): Supervision {
  return {
    tokens: false,
    check: async (examples) => checkExamples(examples, labels, inputs.encodes),
    ask: async (examples, where) => examples.map((example, i) => unanswered(example, `${where}: example ${i}`)),
    split: splitHoldout,
    lengths: (rows) => inputs.lengths(rows),
    microBatches(rows) {
      const targets = targetsOf(rows, labels.length);
      const targetOf = (row: number): Float32Array => targets.subarray(row * labels.length, (row + 1) * labels.length);
      return rowsRunTogether(rows, inputs).map((run) => {
        const values = new Float32Array(run.length * labels.length);
        for (const [i, row] of run.entries()) values.set(targetOf(row), i * labels.length);
        const some = run.map((row) => rows[row]!);
        return { rows: some, targets: { values, rows: run.length }, share: run.length / rows.length };
      });
    },
    feeds: (rows) => inputs.batch(rows),
    wanted: ({ label, target }) => [{ probabilities: target ?? labels.map((_, i) => Number(i === label)) }],
    answered: (row, [{ probabilities }]: readonly [Distribution]) => ({
      ...row,
      target: probabilities,
      label: largest(probabilities),
    }),
    distribution: (logits) => ({ probabilities: softmax(logits) }),
  };
}

/** Groups rows that can run together. @returns their indices */
function rowsRunTogether(rows: readonly Row[], inputs: Batcher): number[][] {
  const runs: number[][] = [];
  /** The last group of each key, which may have room. */
  const open = new Map<string, number[]>();
  for (const [i, row] of rows.entries()) {
    const alike = inputs.alike(row);
    let run = open.get(alike);
    if (!run || run.length === MOST_ROWS) {
      run = [];
      runs.push(run);
      open.set(alike, run);
    }
    run.push(i);
  }
  return runs;
}

/** Takes an example as a question. @throws TypeError for one without text and feeds */
function unanswered({ text, feeds }: Example, at: string): Row {
  if (text === undefined && feeds === undefined)
    throw new TypeError(`${at}: the model answers each text with one row of logits: expected \`text\` or \`feeds\``);
  return { text, feeds, label: 0, weight: 1 };
}

// Examples as batches of a model's inputs. The tokenizer pads each batch: reading its texts again takes a hundredth of a step.

/** Puts rows into batches. `Feeds` are one batch of a model's inputs. */
interface Batcher {
  readonly encodes: boolean;
  /** Measures rows, in any unit. Rows are padded to the longest of their batch, so batches take rows of similar lengths. */
  lengths<R extends Unlabelled>(rows: readonly R[]): Promise<ReadonlyMap<R, number>>;
  /** Key of rows that fit into one batch. Texts are padded; feeds of callers must have the same dimensions. */
  alike(row: Unlabelled): string;
  /** @throws TypeError when the rows cannot be put into one batch */
  batch(rows: readonly Unlabelled[]): Promise<BatchFeeds>;
}

/**
 * @param names of the model's inputs; other outputs of a tokenizer are dropped
 * @param short those that take int32
 */
export function createBatcher(
  tokenizer: Tokenizer | undefined,
  names: readonly string[],
  short: ReadonlySet<string> = new Set(),
): Batcher {
  const encodeTexts = tokenizer && encoderOf(tokenizer, names);
  const encode = async (texts: string[]): Promise<BatchFeeds> => {
    const feeds = await encodeTexts!(texts);
    const taken = Object.entries(feeds).filter(([name]) => names.includes(name));
    return Object.fromEntries(
      taken.map(([name, feed]) => {
        if (!short.has(name)) return [name, feed];
        return [name, { ...feed, type: "int32", data: Int32Array.from(feed.data as BigInt64Array, Number) }];
      }),
    );
  };
  /** Numbers of tokens, by text. */
  const known = new Map<string, number>();
  return {
    encodes: encodeTexts !== undefined,

    async lengths(rows) {
      for (const { text } of rows)
        if (text !== undefined && !known.has(text)) known.set(text, sizeOf(await encode([text])));
      return new Map(rows.map((row) => [row, row.feeds ? sizeOf(row.feeds) : known.get(row.text!)!]));
    },

    alike: ({ feeds }) => (feeds ? shapesOf(feeds) : ""),

    async batch(rows) {
      const texts = rows.flatMap(({ text }) => text ?? []);
      if (texts.length === 0) return joinFeeds(rows.map(({ feeds }) => feeds!));
      if (texts.length < rows.length)
        throw new TypeError("a batch of texts and feeds together; give all examples in one way");
      return texts.length === 1 ? encode(texts) : encode(texts).catch(refuseUnpadded);
    },
  };
}

function refuseUnpadded(cause: unknown): never {
  throw new TypeError(
    "encode: texts of different lengths were not encoded together; pass the tokenizer itself (encode: tokenizer), or have it pad: " +
      `tokenizer(texts, { padding: true, truncation: true }). It said: ${(cause as Error).message}`,
    { cause },
  );
}

function sizeOf(feeds: BatchFeeds): number {
  return Math.max(...Object.values(feeds).map(({ dims }) => dims.reduce((a, b) => a * b, 1)));
}

// Training examples: checked before anything runs, split into training set and hold-out, cut into batches with targets. Knows no model.

/** One message of a chat, in the form that chat templates take. */
export interface Message {
  readonly role: string;
  readonly content: string;
}

/**
 * One training example. `Feeds` are a runtime's inputs for it, a batch of one.
 *
 * - Models that give a row of logits for each text: `text` or `feeds`, with a `label` or a `target`.
 * - Language models: `prompt` and `completion`; or `messages`; or `text`, with every token learned; or `feeds` and `classes`.
 * - Models that label tokens: `words` and `labels`; or `feeds` and `classes`.
 */
export interface Example {
  /** Input of the trainer's `encode`. */
  readonly text?: string | undefined;
  /** Input of a language model; not learned. */
  readonly prompt?: string | undefined;
  /** Continuation of the prompt: learned, together with its end. */
  readonly completion?: string | undefined;
  /** A chat, written by the tokenizer's template. The last message, the assistant's, is learned. */
  readonly messages?: readonly Message[] | undefined;
  /** Words; the first token of each has a label. */
  readonly words?: readonly string[] | undefined;
  /** Labels of the words; null: none. */
  readonly labels?: readonly (string | null)[] | undefined;
  /** Class of each position of `feeds`: for a language model, the next token. -1: none. */
  readonly classes?: ArrayLike<number> | undefined;
  /** Model inputs instead of a text. */
  readonly feeds?: BatchFeeds | undefined;
  /** A label by name, or its number. */
  readonly label?: string | number | undefined;
  /** Probability of each label, for instance another model's answer, instead of a label. */
  readonly target?: ArrayLike<number> | undefined;
  /** Weight in the loss. Default: 1. */
  readonly weight?: number | undefined;
}

/** Question to a classifier. */
export type Unlabelled = Pick<Example, "text" | "feeds">;

/** Token ids, the positions where the model is asked, and the answers wanted there. */
export interface Tokens {
  /** Token ids; those of the decoder where there is one. */
  readonly ids: readonly number[];
  /** Token ids of the encoder, where there is one. */
  readonly source?: readonly number[] | undefined;
  /** Positions of answers, in order. */
  readonly at: readonly number[];
  /** Wanted answer at each position. */
  readonly wanted: readonly Distribution[];
}

/** A checked example. */
export interface Row {
  readonly tokens?: Tokens | undefined;
  readonly text: string | undefined;
  readonly feeds: BatchFeeds | undefined;
  /** Number of the label; the most probable one of a target. */
  readonly label: number;
  readonly target?: ArrayLike<number> | undefined;
  /** Wanted inputs of the head's last layer. */
  readonly features?: Float32Array | undefined;
  readonly weight: number;
}

/**
 * Checks examples of a classifier.
 * @param encodes whether texts can be encoded
 * @throws RangeError for an unknown label, invalid probabilities, one label only, an empty text, an invalid weight
 * @throws TypeError for an example without text or feeds, or without label or target, and for texts where nothing encodes them
 */
export function checkExamples(examples: readonly Example[], labels: readonly string[], encodes: boolean): Row[] {
  checkList("fit", examples, "examples");
  const rows = examples.map(({ text, feeds, label, target, weight = 1 }, i): Row => {
    const at = `example ${i}`;
    if ((label === undefined) === (target === undefined))
      throw new TypeError(`${at}: expected a label or a target, got ${target ? "both" : "neither"}`);
    if (target) checkTarget(target, labels.length, at);
    const number = target ? largest(target) : typeof label === "number" ? label : labels.indexOf(label!);
    if (labels[number] === undefined) {
      const [close] = nearest(label as string, labels);
      const advice = close === undefined ? `they are ${labels.join(", ")}` : `did you mean ${close}?`;
      throw new RangeError(`${at}: the label ${JSON.stringify(label)} is none of the trainer's; ${advice}`);
    }
    if (text === undefined && feeds === undefined) throw new TypeError(`${at}: has neither text nor feeds`);
    if (feeds === undefined && text!.trim() === "") throw new RangeError(`${at}: its text is empty`);
    if (feeds === undefined && !encodes) throw new TypeError(`${at}: is a text, and the trainer has no \`encode\``);
    if (!(weight >= 0 && weight < Infinity))
      throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
    return { text: feeds === undefined ? text : undefined, feeds, label: number, target, weight };
  });
  const seen = new Set(rows.filter(({ weight }) => weight > 0).map(({ label }) => label));
  // Targets differ between texts even where one label is the most probable in all of them.
  if (seen.size < 2 && !rows.some(({ target, weight }) => target && weight > 0)) {
    const which = seen.size === 0 ? "no label" : `one label only, "${labels[[...seen][0]!]}"`;
    throw new RangeError(`the ${rows.length} examples have ${which}; at least two labels are needed`);
  }
  return rows;
}

function checkTarget(target: ArrayLike<number>, labels: number, at: string): void {
  if (target.length !== labels)
    throw new RangeError(`${at}: its target has ${target.length} probabilities, there are ${labels} labels`);
  const values = Array.from(target);
  const bad = values.find((value) => !(value >= 0 && value < Infinity));
  if (bad !== undefined) throw new RangeError(`${at}: its target has the probability ${bad}, expected numbers ≥ 0`);
  const sum = values.reduce((a, b) => a + b, 0);
  if (Math.abs(sum - 1) > 1e-3)
    throw new RangeError(`${at}: the probabilities of its target sum to ${sum}, expected 1`);
}

/**
 * Takes a share of every label's examples as hold-out, but leaves at least two of each label.
 * @param share from 0 to less than 1
 */
export function splitHoldout<T extends { label: number }>(
  rows: readonly T[],
  share: number,
  random: () => number,
): { train: T[]; holdout: T[] } {
  const train: T[] = [];
  const holdout: T[] = [];
  for (const label of [...new Set(rows.map((row) => row.label))].sort((a, b) => a - b)) {
    const of = rows.filter((row) => row.label === label);
    const count = Math.max(0, Math.min(Math.round(of.length * share), of.length - 2));
    const shuffled = shuffle(of, random);
    holdout.push(...shuffled.slice(0, count));
    train.push(...shuffled.slice(count));
  }
  return { train, holdout };
}

/** Batches that are cut from rows sorted by length: few, so that chance remains; enough to pad little. */
const SORTED = 8;

/** Cuts all rows into shuffled batches of rows with similar lengths. */
export function toBatches<T>(
  rows: readonly T[],
  size: number,
  lengths: ReadonlyMap<T, number>,
  random: () => number,
): T[][] {
  const order = shuffle([...rows], random);
  const batches: T[][] = [];
  for (let from = 0; from < order.length; from += SORTED * size) {
    const some = order.slice(from, from + SORTED * size).sort((a, b) => lengths.get(a)! - lengths.get(b)!);
    for (let at = 0; at < some.length; at += size) batches.push(some.slice(at, at + size));
  }
  return shuffle(batches, random);
}

/**
 * Targets [rows, labels] of a batch. A row sums to its weight. Weights are relative: those
 * of a batch have the mean 1.
 */
export function targetsOf(
  rows: readonly Pick<Row, "label" | "target" | "weight">[],
  labels: number,
): Float32Array<ArrayBuffer> {
  const targets = new Float32Array(rows.length * labels);
  const mean = rows.reduce((sum, { weight }) => sum + weight, 0) / rows.length || 1;
  for (const [i, { label, target, weight }] of rows.entries()) {
    const all = weight / mean;
    for (let c = 0; c < labels; c++) {
      const wanted = target ? target[c]! : Number(c === label);
      targets[i * labels + c] = all * wanted;
    }
  }
  return targets;
}

// A model's inputs for a batch: converted to an engine's tensors, joined, and completed from token ids. Whatever else models with
// one answer per position take follows from the ids: masks, positions, an empty cache.

/** @throws TypeError naming the input that is no tensor */
export function batchTensors(engine: Engine, batch: BatchFeeds): Record<string, EngineTensor> {
  const entries = Object.entries(batch).map(([name, { type, dims, data }]) => {
    if (ArrayBuffer.isView(data) && Array.isArray(dims)) return [name, engine.tensor(data as Float32Array, dims, type)];
    throw new TypeError(`the input "${name}" of a batch is no tensor: expected { dims, data }`);
  });
  return Object.fromEntries(entries);
}

/** Dimensions of each input behind the first, as a string: feeds of one batch must agree in them. */
export function shapesOf(feeds: BatchFeeds): string {
  return JSON.stringify(Object.entries(feeds).map(([name, { dims }]) => [name, ...dims.slice(1)]));
}

/**
 * Joins the feeds of several examples along the first dimension.
 * @throws TypeError when their other dimensions differ
 */
export function joinFeeds(all: readonly BatchFeeds[]): BatchFeeds {
  const [first] = all;
  if (all.length === 1) return first!;
  const joined: Record<string, BatchFeeds[string]> = {};
  for (const [name, { type, dims }] of Object.entries(first!)) {
    const parts = all.map((feeds, i) => {
      const part = feeds[name];
      if (part && part.dims.slice(1).join() === dims.slice(1).join()) return part;
      throw new TypeError(
        `the input "${name}" of example ${i} is [${part?.dims.join(", ") ?? "missing"}], another one's [${dims.join(", ")}]: pad them alike, or take batches of 1`,
      );
    });
    const arrays = parts.map(({ data }) => data as Float32Array);
    const data = new (arrays[0]!.constructor as Float32ArrayConstructor)(
      arrays.reduce((sum, { length }) => sum + length, 0),
    );
    let at = 0;
    for (const array of arrays) {
      data.set(array, at);
      at += array.length;
    }
    joined[name] = {
      ...(type === undefined ? {} : { type }),
      dims: [parts.reduce((sum, part) => sum + part.dims[0]!, 0), ...dims.slice(1)],
      data,
    };
  }
  return joined;
}

/** Value of an input at a token, by the token's id and place. Padding is 0. */
const OF_TOKENS = new Map<string, (id: number, place: number) => number>([
  ["input_ids", (id) => id],
  ["decoder_input_ids", (id) => id],
  ["attention_mask", () => 1],
  ["decoder_attention_mask", () => 1],
  ["position_ids", (_, place) => place],
  ["token_type_ids", () => 0],
]);

/** Inputs with one value in every run: no cache, logits of all positions. */
const ZERO = /^(use_cache_branch|num_logits_to_keep|logits_to_keep)$/;

/**
 * Makes a model's inputs from token ids.
 * @param example made-up values of the model's inputs, for types and dimensions
 * @param names of the model's inputs
 * @throws TypeError for an input that does not follow from ids
 */
export function fillInputs(
  example: ReadonlyMap<string, Feed> | undefined,
  names: readonly string[],
  all: readonly Pick<Tokens, "ids" | "source">[],
): BatchFeeds {
  const decodes = names.includes("decoder_input_ids");
  const feeds: Record<string, BatchFeeds[string]> = {};
  for (const name of names) {
    const of = OF_TOKENS.get(name);
    const given = example?.get(name);
    if (of) {
      const side = decodes && !name.startsWith("decoder_") ? "source" : "ids";
      feeds[name] = rowsOf(
        all.map((one) => one[side]!.map(of)),
        given?.data instanceof Int32Array,
      );
    } else if (given && (given.data.length === 0 || ZERO.test(name))) {
      const dims =
        given.data.length === 0 ? given.dims.map((size, axis) => (axis === 0 ? all.length : size)) : given.dims;
      feeds[name] = { dims, data: given.data.slice().fill(0 as never) };
    } else {
      throw new TypeError(
        `the model takes "${name}", which tokens do not tell: give examples as \`feeds\` and \`classes\`, with all inputs`,
      );
    }
  }
  return feeds;
}

/** Tells whether an input follows from the tokens, or is the same in every run. */
export function followsFromTokens(name: string): boolean {
  return OF_TOKENS.has(name) || ZERO.test(name) || /past/.test(name);
}

/**
 * Adds inputs that the tokenizer did not give, and drops what the model does not take.
 * @param feeds hold at least "input_ids" [batch, length] where something is missing
 * @throws TypeError as `fillInputs`
 */
export function completeInputs(
  example: ReadonlyMap<string, Feed> | undefined,
  names: readonly string[],
  feeds: BatchFeeds,
): BatchFeeds {
  const missing = names.filter((name) => !(name in feeds));
  const taken = Object.fromEntries(Object.entries(feeds).filter(([name]) => names.includes(name)));
  const { dims, data } = feeds["input_ids"] ?? {};
  if (missing.length === 0 || !dims || !data) return taken;
  const [rows, width] = dims as [number, number];
  const ids = Array.from(data as ArrayLike<bigint | number>, Number);
  const all = Array.from({ length: rows }, (_, row) => ({ ids: ids.slice(row * width, (row + 1) * width) }));
  return { ...fillInputs(example, missing, all), ...taken };
}

/** Pads rows with 0 to the longest. @param short whether the model takes int32 instead of int64 */
function rowsOf(rows: readonly (readonly number[])[], short: boolean): BatchFeeds[string] {
  const width = Math.max(...rows.map(({ length }) => length));
  const filled = rows.flatMap((row) => [...row, ...Array<number>(width - row.length).fill(0)]);
  return { dims: [rows.length, width], data: short ? Int32Array.from(filled) : BigInt64Array.from(filled, BigInt) };
}

// Probabilities of labels: from logits, sharpened, compared.

/** Probabilities at one position: of all classes in order, or of the likeliest ones, given in `classes`. */
export interface Distribution {
  readonly probabilities: ArrayLike<number>;
  readonly classes?: ArrayLike<number> | undefined;
}

/** log Σ exp(logits). */
export function logSumExp(logits: Float32Array): number {
  let top = -Infinity;
  for (let i = 0; i < logits.length; i++) top = Math.max(top, logits[i]!);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - top);
  return top + Math.log(sum);
}

export function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

/** Index of the largest value; the first one of equals. */
export function largest(values: ArrayLike<number>): number {
  let at = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[at]!) at = i;
  return at;
}

/** The probabilities of the same logits divided by a temperature. */
export function tempered(probabilities: ArrayLike<number>, temperature: number): Float32Array {
  const values = Array.from(probabilities);
  const top = Math.max(...values);
  const powers = values.map((p) => (p / top) ** (1 / temperature));
  const total = powers.reduce((a, b) => a + b, 0);
  return Float32Array.from(powers, (value) => value / total);
}

const SURE = 0.9;
const COLDEST = 0.05;

/** The temperature at which the mean of the largest probabilities is 0.9; from 0.05 to 1. */
export function sureTemperature(answers: readonly Float32Array[]): number {
  const sure = (temperature: number): boolean =>
    answers.reduce((sum, one) => sum + Math.max(...tempered(one, temperature)), 0) >= SURE * answers.length;
  if (sure(1)) return 1;
  let [low, high] = [COLDEST, 1];
  // Halved on a scale of logarithms, to a hundredth of a percent.
  for (let i = 0; i < 15; i++) {
    const middle = Math.sqrt(low * high);
    if (sure(middle)) low = middle;
    else high = middle;
  }
  return low;
}

/** −Σ p · log softmax(logits), in nats. */
export function crossEntropy({ probabilities, classes }: Distribution, logits: Float32Array): number {
  const total = logSumExp(logits);
  let sum = 0;
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    if (p > 0) sum += p * (total - logits[classes ? classes[i]! : i]!);
  }
  return sum;
}

/** KL(distribution ‖ softmax(logits)), in nats. Classes that the distribution leaves out count as one: a lower bound of the whole. */
export function divergence({ probabilities, classes }: Distribution, logits: Float32Array): number {
  const total = logSumExp(logits);
  let [sum, restP, restQ] = [0, 1, 1];
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    const log = logits[classes ? classes[i]! : i]! - total;
    if (p > 0) sum += p * (Math.log(p) - log);
    restP -= p;
    restQ -= Math.exp(log);
  }
  if (classes && restP > 1e-6) sum += restP * Math.log(restP / Math.max(restQ, 1e-12));
  return sum;
}

/** The largest probability less the second. */
function marginOf(probabilities: ArrayLike<number>): number {
  let [first, second] = [0, 0];
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    if (p > first) [first, second] = [p, first];
    else if (p > second) second = p;
  }
  return first - second;
}

/** Class with the largest probability. */
export function likeliest({ probabilities, classes }: Distribution): number {
  let best = 0;
  for (let i = 1; i < probabilities.length; i++) if (probabilities[i]! > probabilities[best]!) best = i;
  return classes ? classes[best]! : best;
}

/** Draws one class with its probability. */
export function drawnFrom({ probabilities, classes }: Distribution, random: () => number): Distribution {
  const total = Array.from(probabilities).reduce((sum, p) => sum + p, 0);
  let [left, at] = [random() * total, 0];
  while (at < probabilities.length - 1 && (left -= probabilities[at]!) > 0) at++;
  if (classes) return { probabilities: [1], classes: [classes[at]!] };
  return { probabilities: Array.from(probabilities, (_, i) => Number(i === at)) };
}

/**
 * Distance of answers from those wanted, over all that is added: the mean KL(distribution ‖ softmax(logits)) in nats, and the share with
 * the same likeliest class, each counted by how much likelier that is than the second. It keeps no logits, which are too large over a
 * vocabulary.
 */
export class MeanDivergence {
  #sum = 0;
  #count = 0;
  #same = 0;
  #sure = 0;

  add(wanted: readonly Distribution[], logits: readonly Float32Array[]): void {
    for (const [i, one] of wanted.entries()) {
      this.#sum += divergence(one, logits[i]!);
      const margin = marginOf(one.probabilities);
      this.#sure += margin;
      if (likeliest(one) === largest(logits[i]!)) this.#same += margin;
    }
    this.#count += wanted.length;
  }

  get agreement(): number {
    return this.#sure > 0 ? this.#same / this.#sure : 1;
  }

  get mean(): number {
    // Rounding can make the mean of equal probabilities slightly negative.
    return Math.max(0, this.#sum / this.#count);
  }
}

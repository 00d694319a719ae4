/**
 * Supervision: how examples become rows with wanted answers, and rows a model's inputs and targets. Models that give a
 * row of logits for each text learn labels. Models that answer at every position learn the tokens of completions, or
 * the labels of words: their logits are computed only at positions with something to learn, since a vocabulary has tens
 * of thousands of classes.
 */

import { checkList, nearest } from "../errors.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { Engine, EngineTensor } from "../session/engine.ts";
import type { Session } from "../session/session.ts";
import { type BatchFeeds, encoderOf, endOf, type Tokenizer } from "../session/tokens.ts";
import { elementsOf, sum } from "../tensor/dtypes.ts";
import { shuffle } from "../tensor/random.ts";

/** Targets for the logits of one run, in the form that the training graph takes: rows sum to their weight. */
export interface Targets {
  readonly values: Float32Array<ArrayBuffer>;
  /** Rows of logits: one for each text, or for each position that is asked. */
  readonly rows: number;
  /** Classes of the values [rows, width]. Undefined: all classes in order. */
  readonly classes?: BigInt64Array<ArrayBuffer> | undefined;
  readonly features?: Features | undefined;
}

/** Wanted inputs of the head's last layer. */
export interface Features {
  readonly values: readonly Float32Array[];
  readonly weight: number;
}

/** Rows of a batch that run together; their gradients are added up. */
interface MicroBatch {
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
  /** Checks examples that are only asked; wanted answers are ignored. */
  ask(examples: readonly Example[], where: string): Promise<Row[]>;
  /** Lengths of rows: batches take rows of similar lengths. */
  lengths(rows: readonly Row[]): Promise<ReadonlyMap<Row, number>>;
  /** Cuts a batch into micro-batches that fit into memory. */
  microBatches(rows: readonly Row[]): MicroBatch[];
  /** Makes the model's inputs for rows that run together. */
  feeds(rows: readonly Row[]): Promise<BatchFeeds>;
  /** Turns logits into a distribution small enough to keep. */
  distribution(logits: Float32Array): Distribution;
}

/** Options of examples that a language model learns token by token. */
export interface SequenceOptions {
  /** Text at the end of a completion. Default: the tokenizer's `eos_token`. false: none. */
  readonly end?: string | false | undefined;
  /** First token of an encoder-decoder's decoder. Default: 0. */
  readonly decoderStart?: number | undefined;
}

interface SupervisionOptions extends SequenceOptions {
  readonly encode?: Tokenizer | undefined;
  /** Class names of texts, or of words; none for language models. */
  readonly labels?: readonly string[] | undefined;
}

/** Chooses the supervision that fits the model's answers: labels of texts, or classes of tokens. */
export function supervisionOf(session: Session, options: SupervisionOptions): Supervision {
  const { graph, example } = session.trainable!;
  const names = session.inputNames;
  if (graph.tokens) return tokenSupervision(options, names, example, graph.tokens.positions);
  const short = [...(example ?? [])].flatMap(([name, { data }]) => (data instanceof Int32Array ? [name] : []));
  return labelSupervision(options.encode, names, new Set(short), options.labels ?? []);
}

/** Most rows that run together: gradients need kept values of each row, so memory grows with their number. */
const MOST_ROWS = 16;

/**
 * Texts, or feeds of callers, one row of logits each. The tokenizer pads each batch: reading its texts again takes a
 * hundredth of a step.
 * @param names of the model's inputs; other outputs of a tokenizer are dropped
 * @param short those that take int32
 * @param labels of the task, in order
 */
export function labelSupervision(
  tokenizer: Tokenizer | undefined,
  names: readonly string[],
  short: ReadonlySet<string>,
  labels: readonly string[],
): Supervision {
  const encodeTexts = tokenizer && encoderOf(tokenizer, names);
  const encode = async (texts: string[]): Promise<BatchFeeds> => {
    const feeds = Object.entries(await encodeTexts!(texts)).filter(([name]) => names.includes(name));
    const given = ([name, feed]: (typeof feeds)[number]) =>
      short.has(name) ? { ...feed, type: "int32", data: Int32Array.from(feed.data as BigInt64Array, Number) } : feed;
    return Object.fromEntries(feeds.map((entry) => [entry[0], given(entry)]));
  };
  const known = new Map<string, number>();
  return {
    tokens: false,
    check: async (examples) => checkExamples(examples, labels, encodeTexts !== undefined),
    ask: async (examples, where) => examples.map((example, i) => unanswered(example, `${where}: example ${i}`)),
    async lengths(rows) {
      checkShapes(rows.flatMap(({ feeds }) => (feeds ? [feeds] : [])));
      for (const { text } of rows)
        if (text !== undefined && !known.has(text)) known.set(text, sizeOf(await encode([text])));
      return new Map(rows.map((row) => [row, row.feeds ? sizeOf(row.feeds) : known.get(row.text!)!]));
    },
    microBatches(rows) {
      const runs: Row[][] = [];
      /** The last run of each kind, which may have room: texts are padded, feeds must have the same dimensions. */
      const open = new Map<string, Row[]>();
      for (const row of rows) {
        const alike = row.feeds ? shapesOf(row.feeds) : "";
        let run = open.get(alike);
        if (!run || run.length === MOST_ROWS) {
          run = [];
          runs.push(run);
          open.set(alike, run);
        }
        run.push(row);
      }
      return microBatchesOf(runs);
    },
    async feeds(rows) {
      const texts = rows.flatMap(({ text }) => text ?? []);
      if (texts.length === 0) return joinFeeds(rows.map(({ feeds }) => feeds!));
      return texts.length === 1 ? encode(texts) : encode(texts).catch(refuseUnpadded);
    },
    distribution: (logits) => ({ probabilities: softmax(logits) }),
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
  return Math.max(...Object.values(feeds).map(({ dims }) => elementsOf(dims)));
}

/** Takes an example as a question. @throws TypeError for one without text and feeds */
function unanswered({ text, feeds }: Example, at: string): Row {
  if (text === undefined && feeds === undefined)
    throw new TypeError(`${at}: the model answers each text with one row of logits: expected \`text\` or \`feeds\``);
  return { text, feeds, wanted: [{ probabilities: [] }], weight: 1 };
}

/** Most tokens of one run, padding included: gradients need kept values of each. */
const MOST_TOKENS = 512;
/** Most positions of one run: each has a row as wide as the vocabulary. */
const MOST_POSITIONS = 128;
/** Classes of an answer that are kept: nearly all the probability of a language model. */
const MOST_CLASSES = 64;

/**
 * @param names of the model's inputs
 * @param example synthetic values of the model's inputs
 * @param positions name of the input that takes positions
 */
function tokenSupervision(
  options: SupervisionOptions,
  names: readonly string[],
  example: ReadonlyMap<string, Feed> | undefined,
  positions: string,
): Supervision {
  const read = sequenceReader(options, names);
  const lengthOf = ({ tokens, feeds }: Row): number =>
    feeds ? MOST_TOKENS : Math.max(tokens!.ids.length, tokens!.source?.length ?? 0);
  const readAll = async (examples: readonly Example[], where: string): Promise<Row[]> => {
    const rows: Row[] = [];
    for (const [i, example] of examples.entries()) rows.push(await read(example, `${where}example ${i}`));
    return rows;
  };
  return {
    tokens: true,
    async check(examples) {
      checkList("fit", examples, "examples");
      return readAll(examples, "");
    },
    ask: (examples, where) => readAll(examples, `${where}: `),
    lengths: async (rows) => new Map(rows.map((row) => [row, lengthOf(row)])),
    microBatches(rows) {
      const runs: Row[][] = [];
      let width = 0;
      let count = 0;
      for (const row of rows) {
        const run = runs.at(-1);
        width = Math.max(width, lengthOf(row));
        count += row.wanted.length;
        if (run && width * (run.length + 1) <= MOST_TOKENS && count <= MOST_POSITIONS) run.push(row);
        else {
          runs.push([row]);
          width = lengthOf(row);
          count = row.wanted.length;
        }
      }
      return microBatchesOf(runs);
    },
    async feeds(rows) {
      const all = rows.map(({ tokens }) => tokens!);
      // Feeds of callers run one by one.
      const feeds = rows[0]!.feeds ?? fillInputs(example, names, all);
      const width = Math.max(...all.map(({ ids }) => ids.length));
      const places = all.flatMap(({ at }, row) => at.map((position) => BigInt(row * width + position)));
      return { ...feeds, [positions]: { type: "int64", dims: [places.length], data: BigInt64Array.from(places) } };
    },
    distribution: likeliestOf,
  };
}

/** Targets of runs. Weights are relative: those of a batch have the mean 1, by rows of logits. */
function microBatchesOf(runs: readonly (readonly Row[])[]): MicroBatch[] {
  const rows = runs.flat();
  const total = sum(rows, ({ wanted }) => wanted.length);
  const mean = sum(rows, ({ weight, wanted }) => weight * wanted.length) / total || 1;
  return runs.map((run) => {
    const targets = targetsOf(run, mean);
    return { rows: run, targets, share: targets.rows / total };
  });
}

/** Targets [rows of logits, k]. Where classes are named, shorter rows are filled up with other classes at 0. */
function targetsOf(rows: readonly Row[], mean: number): Targets {
  const all = rows.flatMap(({ wanted, weight }) => wanted.map((answer) => ({ ...answer, weight: weight / mean })));
  const width = Math.max(...all.map(({ probabilities }) => probabilities.length));
  const values = new Float32Array(all.length * width);
  for (const [row, { probabilities, weight }] of all.entries())
    for (let i = 0; i < probabilities.length; i++) values[row * width + i] = weight * probabilities[i]!;
  if (!all[0]!.classes) return { values, rows: all.length };
  const classes = all.flatMap(({ classes }) => {
    const named = new Set(Array.from(classes!));
    for (let free = 0; named.size < width; free++) named.add(free);
    return [...named];
  });
  return { values, rows: all.length, classes: BigInt64Array.from(classes, BigInt) };
}

/** The likeliest classes of one row of logits, with their share of all probability. */
function likeliestOf(logits: Float32Array): Distribution {
  const count = Math.min(MOST_CLASSES, logits.length);
  // Sorted by logit, the smallest last.
  const kept: number[] = [];
  for (let c = 0; c < logits.length; c++) {
    if (kept.length === count && logits[c]! <= logits[kept.at(-1)!]!) continue;
    let at = kept.length;
    while (at > 0 && logits[kept[at - 1]!]! < logits[c]!) at--;
    kept.splice(at, 0, c);
    if (kept.length > count) kept.pop();
  }
  const total = logSumExp(logits);
  return { classes: kept, probabilities: kept.map((c) => Math.exp(logits[c]! - total)) };
}

// Training examples: checked before anything runs, split into training set and hold-out, cut into batches with targets.
// Knows no model.

/** One message of a chat, in the form that chat templates take. */
export interface Message {
  readonly role: string;
  readonly content: string;
}

/**
 * One training example. `Feeds` are a runtime's inputs for it, a batch of one.
 *
 * - Models that give a row of logits for each text: `text` or `feeds`, with a `label`.
 * - Language models: `prompt` and `completion`; or `messages`; or `text`, with every token learned; or `feeds` and
 *   `classes`.
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
  /** Weight in the loss. Default: 1. */
  readonly weight?: number | undefined;
}

/** Question to a classifier. */
export type Unlabelled = Pick<Example, "text" | "feeds">;

/** Token ids, and the positions where the model is asked. */
export interface Tokens {
  /** Token ids; those of the decoder where there is one. */
  readonly ids: readonly number[];
  /** Token ids of the encoder, where there is one. */
  readonly source?: readonly number[] | undefined;
  /** Positions of answers, in order. */
  readonly at: readonly number[];
}

/** A checked example. */
export interface Row {
  /** Undefined for a row that answers once for its text or feeds. */
  readonly tokens?: Tokens | undefined;
  readonly text: string | undefined;
  readonly feeds: BatchFeeds | undefined;
  /** Wanted answers, one for each row of logits. */
  readonly wanted: readonly Distribution[];
  /** Wanted inputs of the head's last layer. */
  readonly features?: Float32Array | undefined;
  readonly weight: number;
}

/** @throws RangeError for a weight that is no number from 0 on */
function checkWeight(weight: number, at: string): void {
  if (!(weight >= 0 && weight < Infinity))
    throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
}

/**
 * Checks examples of a classifier.
 * @param encodes true where texts can be encoded
 * @throws RangeError for an unknown label, one label only, an empty text, an invalid weight
 * @throws TypeError for an example without text or feeds, or without a label, and for texts where nothing encodes them
 */
function checkExamples(examples: readonly Example[], labels: readonly string[], encodes: boolean): Row[] {
  checkList("fit", examples, "examples");
  const rows = examples.map(({ text, feeds, label, weight = 1 }, i): Row => {
    const at = `example ${i}`;
    if (label === undefined) throw new TypeError(`${at}: has no label`);
    const number = typeof label === "number" ? label : labels.indexOf(label);
    if (labels[number] === undefined) {
      const [close] = nearest(label as string, labels);
      const advice = close === undefined ? `they are ${labels.join(", ")}` : `did you mean ${close}?`;
      throw new RangeError(`${at}: the label ${JSON.stringify(label)} is none of the trainer's; ${advice}`);
    }
    if (text === undefined && feeds === undefined) throw new TypeError(`${at}: has neither text nor feeds`);
    if (feeds === undefined && text!.trim() === "") throw new RangeError(`${at}: its text is empty`);
    if (feeds === undefined && !encodes) throw new TypeError(`${at}: is a text, and the trainer has no \`encode\``);
    checkWeight(weight, at);
    const probabilities = labels.map((_, i) => Number(i === number));
    return { text: feeds === undefined ? text : undefined, feeds, wanted: [{ probabilities }], weight };
  });
  const seen = new Set(rows.flatMap(({ wanted, weight }) => (weight > 0 ? likeliest(wanted[0]!) : [])));
  if (seen.size < 2) {
    const which = seen.size === 0 ? "no label" : `one label only, "${labels[[...seen][0]!]}"`;
    throw new RangeError(`the ${rows.length} examples have ${which}; at least two labels are needed`);
  }
  return rows;
}

/**
 * Takes a share of the rows of every label as hold-out, but leaves at least two of each label.
 * @param share from 0 to less than 1
 */
export function splitHoldout<T>(
  rows: readonly T[],
  labelOf: (row: T) => number,
  share: number,
  random: () => number,
): { train: T[]; holdout: T[] } {
  const train: T[] = [];
  const holdout: T[] = [];
  for (const label of [...new Set(rows.map(labelOf))].sort((a, b) => a - b)) {
    const own = rows.filter((row) => labelOf(row) === label);
    const shuffled = shuffle(own, random);
    const count = Math.max(0, Math.min(Math.round(shuffled.length * share), shuffled.length - 2));
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

// Examples as token ids, with the positions where something is learned. A prompt is encoded exactly as when the model
// is asked, so that the learned tokens are those that generation will need.

interface Templated {
  readonly apply_chat_template?: (messages: readonly Message[], options: object) => unknown;
}

/** Token ids of an example, and the answers wanted at their positions. */
interface Sequence {
  readonly tokens: Tokens;
  readonly wanted: readonly Distribution[];
}

/** Makes a reader of examples. @param names of the model's inputs */
function sequenceReader(options: SupervisionOptions, names: readonly string[]) {
  const { encode: tokenizer, labels: classes = [], decoderStart = 0 } = options;
  const encode = tokenizer && encoderOf(tokenizer, names);
  const known = new Map<string, readonly number[]>();

  /** @param special false: without the tokenizer's special tokens */
  async function idsOf(text: string, special: boolean): Promise<readonly number[]> {
    const key = `${special}:${text}`;
    const before = known.get(key);
    if (before) return before;
    if (!encode) throw new TypeError("texts need `encode`, a tokenizer");
    const { input_ids } = text === "" ? {} : await encode([text], special);
    const ids = Array.from((input_ids?.data ?? []) as ArrayLike<number | bigint>, Number);
    known.set(key, ids);
    return ids;
  }

  function endOfAnswer(at: string): string {
    const { end = endOf(tokenizer) } = options;
    if (end !== undefined) return end === false ? "" : end;
    throw new TypeError(
      `${at}: what ends a completion is not known: the tokenizer has no \`eos_token\`; pass \`end\`, such as "</s>", or false`,
    );
  }

  /** @param special false for a chat template, which has written special tokens already */
  async function answer(prompt: string, whole: string, special: boolean, at: string): Promise<Sequence> {
    if (names.includes("decoder_input_ids")) {
      const source = await idsOf(prompt, true);
      const { tokens, wanted } = nextTokens([decoderStart, ...(await idsOf(whole.slice(prompt.length), false))], 1);
      return { tokens: { ...tokens, source }, wanted };
    }
    const before = await idsOf(prompt, special);
    const all = await idsOf(whole, special);
    if (before.length === 0)
      throw new RangeError(`${at}: its prompt is empty: a language model needs a token to begin with`);
    // Generation never gives a token that spans prompt and completion, so the two are encoded separately then.
    const isJoined = before.every((id, i) => id === all[i]);
    const ids = isJoined ? all : [...before, ...(await idsOf(whole.slice(prompt.length), false))];
    // A text that the tokenizer cuts has the same tokens without its last character.
    const shorter = isJoined ? await idsOf(whole.trimEnd().slice(0, -1), special) : [];
    if (isJoined && shorter.length === all.length && shorter.every((id, i) => id === all[i]))
      throw new RangeError(
        `${at}: its completion was cut off by the tokenizer: make the prompt shorter, or allow more tokens`,
      );
    if (ids.length <= before.length) throw new RangeError(`${at}: its completion has no tokens, or was cut off`);
    return nextTokens(ids, before.length);
  }

  async function chat(messages: readonly Message[], at: string): Promise<Sequence> {
    const { apply_chat_template: template } = (tokenizer ?? {}) as Templated;
    if (!template)
      throw new TypeError(`${at}: messages need a tokenizer with a chat template; give \`prompt\` and \`completion\``);
    const last = messages.at(-1);
    if (last?.role !== "assistant")
      throw new RangeError(`${at}: expected the assistant's message at the end, got ${JSON.stringify(last?.role)}`);
    const written = async (part: readonly Message[], more: boolean): Promise<string> =>
      String(await template.call(tokenizer, part, { tokenize: false, add_generation_prompt: more }));
    const prompt = await written(messages.slice(0, -1), true);
    const whole = await written(messages, false);
    if (!whole.startsWith(prompt))
      throw new RangeError(`${at}: the chat template does not put the answer behind the messages before it`);
    const end = endOfAnswer(at);
    // Text that the template writes behind the answer's end is never generated.
    const cut = end === "" ? -1 : whole.lastIndexOf(end);
    return answer(prompt, cut < prompt.length ? whole : whole.slice(0, cut + end.length), false, at);
  }

  async function labelled({ words = [], labels = [] }: Example, at: string): Promise<Sequence> {
    if (words.length === 0 || words.length !== labels.length)
      throw new RangeError(`${at}: has ${words.length} words and ${labels.length} labels, expected one for each word`);
    const whole = await idsOf("a", true);
    const alone = await idsOf("a", false);
    const before = whole.findIndex((_, i) => alone.every((id, j) => id === whole[i + j]));
    const ids = whole.slice(0, Math.max(0, before));
    const places: number[] = [];
    const wanted: Distribution[] = [];
    for (const [i, word] of words.entries()) {
      const tokens = await idsOf(i === 0 ? word : ` ${word}`, false);
      const label = labels[i];
      if (label !== null && tokens.length > 0) {
        const number = classes.indexOf(label!);
        if (number < 0)
          throw new RangeError(
            `${at}: the label ${JSON.stringify(label)} of "${word}" is none of ${classes.join(", ")}`,
          );
        places.push(ids.length);
        wanted.push(certain(number));
      }
      ids.push(...tokens);
    }
    if (places.length === 0) throw new RangeError(`${at}: none of its words has a label`);
    return { tokens: { ids: [...ids, ...whole.slice(before + alone.length)], at: places }, wanted };
  }

  async function sequence(example: Example, at: string): Promise<Sequence> {
    const { feeds, messages, words, prompt, completion, text, label } = example;
    if (feeds) return classified(example.classes, at);
    if (classes.length > 0) {
      if (words) return labelled(example, at);
      throw new TypeError(
        `${at}: the model labels tokens: expected \`words\` and \`labels\`, or \`feeds\` and \`classes\``,
      );
    }
    if (messages) return chat(messages, at);
    if (prompt !== undefined) {
      if (typeof prompt !== "string" || typeof completion !== "string")
        throw new TypeError(`${at}: expected \`prompt\` and \`completion\`, both strings`);
      if (completion.trim() === "") throw new RangeError(`${at}: its completion is empty`);
      return answer(prompt, prompt + completion + endOfAnswer(at), true, at);
    }
    if (text !== undefined && label === undefined && !names.includes("decoder_input_ids")) {
      const ids = await idsOf(text, true);
      if (ids.length < 2) throw new RangeError(`${at}: its text has ${ids.length} tokens, two at least are needed`);
      return nextTokens(ids, 1);
    }
    throw new TypeError(
      `${at}: the model answers token by token: expected \`prompt\` and \`completion\`, or \`messages\``,
    );
  }

  /** @param at names the example in messages */
  return async (example: Example, at: string): Promise<Row> => {
    const { feeds, weight = 1 } = example;
    checkWeight(weight, at);
    return { text: undefined, feeds, weight, ...(await sequence(example, at)) };
  };
}

/** The answer that is sure of a class. */
export function certain(id: number): Distribution {
  return { probabilities: [1], classes: [id] };
}

function classified(classes: ArrayLike<number> | undefined, at: string): Sequence {
  const ids = Array.from(classes ?? []);
  const places = ids.flatMap((value, i) => (value >= 0 ? [i] : []));
  if (places.length === 0)
    throw new TypeError(
      `${at}: feeds need \`classes\`, the class of each position, -1 where there is nothing to learn`,
    );
  return { tokens: { ids, at: places }, wanted: places.map((i) => certain(ids[i]!)) };
}

/** Learns the ids from `from` on: each position predicts the next id. */
function nextTokens(ids: readonly number[], from: number): Sequence {
  const at = Array.from({ length: ids.length - from }, (_, i) => from - 1 + i);
  return { tokens: { ids: ids.slice(0, -1), at }, wanted: at.map((position) => certain(ids[position + 1]!)) };
}

// A model's inputs for a batch: converted to an engine's tensors, joined, and completed from token ids. Whatever else
// models with one answer per position take follows from the ids: masks, positions, an empty cache.

/** @throws TypeError naming the input that is no tensor */
export function batchTensors(engine: Engine, batch: BatchFeeds): Record<string, EngineTensor> {
  const entries = Object.entries(batch).map(([name, { type, dims, data }]) => {
    if (ArrayBuffer.isView(data) && Array.isArray(dims)) return [name, engine.tensor(data as Float32Array, dims, type)];
    throw new TypeError(`the input "${name}" of a batch is no tensor: expected { dims, data }`);
  });
  return Object.fromEntries(entries);
}

/** Dimensions of each input behind the first, as a string: feeds of one batch must agree in them. */
function shapesOf(feeds: BatchFeeds): string {
  return JSON.stringify(Object.entries(feeds).map(([name, { dims }]) => [name, ...dims.slice(1)]));
}

/**
 * Checks that inputs of one shape within an example are of one shape in all. Lengths may differ between examples.
 * @throws TypeError naming the input that differs
 */
function checkShapes(all: readonly BatchFeeds[]): void {
  const shape = (feeds: BatchFeeds, name: string): string | undefined => feeds[name]?.dims.slice(1).join(", ");
  const [first] = all;
  const names = Object.keys(first ?? {});
  for (const [i, feeds] of all.entries()) {
    for (const name of names) {
      const other = names.find((like) => shape(first!, like) === shape(first!, name))!;
      if (shape(feeds, name) === shape(feeds, other) && feeds[name]) continue;
      const changed = shape(feeds, other) === shape(first!, other) ? name : other;
      throw new TypeError(
        `the input "${changed}" of example ${i} is [${feeds[changed]?.dims.join(", ") ?? "missing"}], another one's [${first![changed]!.dims.join(", ")}], but not all of its inputs differ: give each example inputs that belong together`,
      );
    }
  }
}

/** Joins the feeds of several examples, which differ in no other dimension, along the first. */
function joinFeeds(all: readonly BatchFeeds[]): BatchFeeds {
  const [first] = all;
  if (all.length === 1) return first!;
  const joined = Object.entries(first!).map(([name, { type, dims }]) => {
    const parts = all.map((feeds) => feeds[name]!);
    const arrays = parts.map(({ data }) => data as Float32Array);
    const length = sum(arrays, (array) => array.length);
    const data = new (arrays[0]!.constructor as Float32ArrayConstructor)(length);
    let at = 0;
    for (const array of arrays) {
      data.set(array, at);
      at += array.length;
    }
    const rows = sum(parts, (part) => part.dims[0]!);
    return [name, { ...(type !== undefined && { type }), dims: [rows, ...dims.slice(1)], data }] as const;
  });
  return Object.fromEntries(joined);
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
 * @param example synthetic values of the model's inputs, for types and dimensions
 * @param names of the model's inputs
 * @throws TypeError for an input that does not follow from ids
 */
function fillInputs(
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
      const rows = all.map((tokens) => tokens[side]!.map(of));
      feeds[name] = rowsOf(rows, given?.data instanceof Int32Array);
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

/** Pads rows with 0 to the longest. @param short true for a model that takes int32 instead of int64 */
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

function logSumExp(logits: Float32Array): number {
  let top = -Infinity;
  for (let i = 0; i < logits.length; i++) top = Math.max(top, logits[i]!);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - top);
  return top + Math.log(sum);
}

export function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = sum(powers);
  return powers.map((value) => value / total);
}

/** Index of the largest value; the first one of equals. */
export function largest(values: ArrayLike<number>): number {
  let at = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[at]!) at = i;
  return at;
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

/**
 * KL(distribution ‖ softmax(logits)), in nats. Classes that the distribution leaves out count as one: a lower bound of
 * the whole.
 */
export function divergence({ probabilities, classes }: Distribution, logits: Float32Array): number {
  const total = logSumExp(logits);
  let sum = 0;
  let restP = 1;
  let restQ = 1;
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

function marginOf(probabilities: ArrayLike<number>): number {
  const [first = 0, second = 0] = Array.from(probabilities).sort((a, b) => b - a);
  return first - second;
}

/** Class with the largest probability. */
export function likeliest({ probabilities, classes }: Distribution): number {
  const best = largest(probabilities);
  return classes ? classes[best]! : best;
}

/** Draws one class with its probability. */
export function drawnFrom({ probabilities, classes }: Distribution, random: () => number): Distribution {
  let left = random() * sum(Array.from(probabilities));
  let at = 0;
  while (at < probabilities.length - 1 && (left -= probabilities[at]!) > 0) at++;
  if (classes) return certain(classes[at]!);
  return { probabilities: Array.from(probabilities, (_, i) => Number(i === at)) };
}

/**
 * Distance of answers from those wanted, over all that is added: the mean KL(distribution ‖ softmax(logits)) in nats,
 * and the share with the same likeliest class, each counted by how much likelier that is than the second. It keeps no
 * logits, which are too large over a vocabulary.
 */
export class MeanDivergence {
  #sum = 0;
  #count = 0;
  #same = 0;
  #sure = 0;

  add(wanted: readonly Distribution[], logits: readonly Float32Array[]): void {
    for (const [i, answer] of wanted.entries()) {
      this.#sum += divergence(answer, logits[i]!);
      const margin = marginOf(answer.probabilities);
      this.#sure += margin;
      if (likeliest(answer) === largest(logits[i]!)) this.#same += margin;
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

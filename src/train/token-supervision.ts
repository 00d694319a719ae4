/**
 * Supervision of models that answer at every position: language models learn the tokens of completions, token classifiers the labels of
 * words. Logits are computed only at positions with something to learn, since a vocabulary has tens of thousands of classes.
 */

import { checkList } from "../arguments.ts";
import type { Feed } from "../onnx/feeds.ts";
import { type EncodeTexts, encoderOf, endOf, type Tokenizer } from "../session/tokens.ts";
import { shuffle } from "../tensor/random.ts";
import {
  type Distribution,
  type Example,
  fillInputs,
  joinFeeds,
  logSumExp,
  type Message,
  type MicroBatch,
  type Row,
  type Supervision,
  type Targets,
  type Tokens,
} from "./supervision.ts";

export interface TokenSupervisionOptions extends SequenceOptions {
  readonly encode: Tokenizer | undefined;
  /** Names of the model's inputs. */
  readonly names: readonly string[];
  readonly example: ReadonlyMap<string, Feed> | undefined;
  /** Labels of words; empty for language models. */
  readonly labels: readonly string[];
  /** Name of the input that takes positions. */
  readonly positions: string;
}

/** Most tokens of one run, padding included: gradients need kept values of each. */
const MOST_TOKENS = 512;
/** Most positions of one run: each has a row as wide as the vocabulary. */
const MOST_POSITIONS = 128;
/** Classes of an answer that are kept: nearly all the probability of a language model. */
const MOST_CLASSES = 64;

type TokenRow = Row & { readonly tokens: Tokens };

export function tokenSupervision(options: TokenSupervisionOptions): Supervision {
  const { names, example, positions } = options;
  const read = reader(options);
  // BatchFeeds of callers run one by one.
  const lengthOf = ({ tokens, feeds }: TokenRow): number =>
    feeds ? MOST_TOKENS : Math.max(tokens.ids.length, tokens.source?.length ?? 0);
  const readAll = async (examples: readonly Example[], where: string): Promise<TokenRow[]> => {
    const rows: TokenRow[] = [];
    for (const [i, one] of examples.entries()) rows.push(await read(one, `${where}example ${i}`));
    return rows;
  };
  return {
    tokens: true,
    async check(examples) {
      checkList("fit", examples, "examples");
      return readAll(examples, "");
    },
    ask: (examples, where) => readAll(examples, `${where}: `),
    split(rows, share, random) {
      const count = Math.max(0, Math.min(Math.round(rows.length * share), rows.length - 2));
      const order = shuffle([...rows], random);
      return { holdout: order.slice(0, count), train: order.slice(count) };
    },
    lengths: async (rows) => new Map((rows as TokenRow[]).map((row) => [row, lengthOf(row)])),
    microBatches: (rows) => microBatchesOf(rows as TokenRow[], lengthOf),
    async feeds(rows) {
      const all = (rows as TokenRow[]).map(({ tokens }) => tokens);
      const feeds = rows[0]!.feeds ? joinFeeds(rows.map(({ feeds }) => feeds!)) : fillInputs(example, names, all);
      const width = Math.max(...all.map(({ ids }) => ids.length));
      const places = all.flatMap(({ at }, row) => at.map((position) => BigInt(row * width + position)));
      return { ...feeds, [positions]: { type: "int64", dims: [places.length], data: BigInt64Array.from(places) } };
    },
    wanted: (row) => (row as TokenRow).tokens.wanted,
    answered: (row, answers) => ({ ...row, tokens: { ...(row as TokenRow).tokens, wanted: answers } }),
    distribution: likeliestOf,
  };
}

/** Makes a reader of examples of all kinds. */
function reader({ encode, names, labels, ...options }: TokenSupervisionOptions) {
  const sequences = new Sequences(encode, names, options);
  const tokensOf = (example: Example, at: string): Tokens | Promise<Tokens> => {
    const { feeds, classes, messages, words, prompt, text, label } = example;
    if (feeds) return given(classes, at);
    if (labels.length > 0) {
      if (words) return sequences.words(example, labels, at);
      throw new TypeError(
        `${at}: the model labels tokens: expected \`words\` and \`labels\`, or \`feeds\` and \`classes\``,
      );
    }
    if (messages) return sequences.chat(messages, at);
    if (prompt !== undefined) return sequences.completion(example, at);
    if (text !== undefined && label === undefined && !names.includes("decoder_input_ids"))
      return sequences.text(text, at);
    throw new TypeError(
      `${at}: the model answers token by token: expected \`prompt\` and \`completion\`, or \`messages\``,
    );
  };
  return async (example: Example, at: string): Promise<TokenRow> => {
    const { feeds, weight = 1 } = example;
    if (!(weight >= 0 && weight < Infinity))
      throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
    return { text: undefined, feeds, label: 0, weight, tokens: await tokensOf(example, at) };
  };
}

/** Takes the classes of feeds as the wanted answers. */
function given(classes: ArrayLike<number> | undefined, at: string): Tokens {
  const all = Array.from(classes ?? []);
  const places = all.flatMap((value, i) => (value >= 0 ? [i] : []));
  if (places.length === 0)
    throw new TypeError(
      `${at}: feeds need \`classes\`, the class of each position, -1 where there is nothing to learn`,
    );
  return { ids: all, at: places, wanted: places.map((i) => ({ probabilities: [1], classes: [all[i]!] })) };
}

function microBatchesOf(rows: readonly TokenRow[], lengthOf: (row: TokenRow) => number): MicroBatch[] {
  const parts: TokenRow[][] = [];
  let [width, count] = [0, 0];
  for (const row of rows) {
    const part = parts.at(-1);
    width = Math.max(width, lengthOf(row));
    count += row.tokens.at.length;
    if (part && width * (part.length + 1) <= MOST_TOKENS && count <= MOST_POSITIONS) part.push(row);
    else {
      parts.push([row]);
      [width, count] = [lengthOf(row), row.tokens.at.length];
    }
  }
  const total = rows.reduce((sum, { tokens }) => sum + tokens.at.length, 0);
  // Weights are relative: those of a batch have the mean 1, by positions.
  const mean = rows.reduce((sum, { weight, tokens }) => sum + weight * tokens.at.length, 0) / total || 1;
  return parts.map((some) => {
    const targets = targetsOf(some, mean);
    return { rows: some, targets, share: targets.rows / total };
  });
}

/** Targets [positions, k] over the named classes; shorter rows are filled up with other classes at 0. */
function targetsOf(rows: readonly TokenRow[], mean: number): Targets {
  const all = rows.flatMap(({ tokens, weight }) => tokens.wanted.map((one) => ({ ...one, weight: weight / mean })));
  const width = Math.max(...all.map(({ probabilities }) => probabilities.length));
  const values = new Float32Array(all.length * width);
  const classes = new BigInt64Array(all.length * width);
  for (const [row, { probabilities, classes: own, weight }] of all.entries()) {
    const taken = new Set<number>();
    let free = 0;
    for (let i = 0; i < width; i++) {
      const at = row * width + i;
      if (i < probabilities.length) {
        taken.add(own![i]!);
        classes[at] = BigInt(own![i]!);
        values[at] = weight * probabilities[i]!;
        continue;
      }
      while (taken.has(free)) free++;
      taken.add(free);
      classes[at] = BigInt(free);
    }
  }
  return { values, rows: all.length, classes };
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

// Examples as token ids, with the positions where something is learned. A prompt is encoded exactly as when the model is asked, so that
// the learned tokens are those that generation will need.

interface Templated {
  readonly apply_chat_template?: (messages: readonly Message[], options: object) => unknown;
}

/** Options of examples that a language model learns token by token. */
export interface SequenceOptions {
  /** Text at the end of a completion. Default: the tokenizer's `eos_token`. false: none. */
  readonly end?: string | false | undefined;
  /** First token of an encoder-decoder's decoder. Default: 0. */
  readonly decoderStart?: number | undefined;
}

/** Encodes examples. */
class Sequences {
  readonly #tokenizer: Tokenizer | undefined;
  readonly #encode: EncodeTexts | undefined;
  readonly #names: readonly string[];
  readonly #options: SequenceOptions;
  readonly #known = new Map<string, readonly number[]>();

  /** @param names of the model's inputs */
  constructor(tokenizer: Tokenizer | undefined, names: readonly string[], options: SequenceOptions) {
    this.#tokenizer = tokenizer;
    this.#encode = tokenizer && encoderOf(tokenizer, names);
    this.#names = names;
    this.#options = options;
  }

  /** Encodes a prompt and its completion. @throws TypeError, RangeError when one of them is missing or empty */
  async completion({ prompt, completion }: Example, at: string): Promise<Tokens> {
    if (typeof prompt !== "string" || typeof completion !== "string")
      throw new TypeError(`${at}: expected \`prompt\` and \`completion\`, both strings`);
    if (completion.trim() === "") throw new RangeError(`${at}: its completion is empty`);
    return this.#answer(prompt, prompt + completion + this.#end(at), true, at);
  }

  /**
   * Encodes a chat to learn its last message.
   * @throws TypeError without a template, RangeError when the last message is not the assistant's
   */
  async chat(messages: readonly Message[], at: string): Promise<Tokens> {
    const { apply_chat_template: template } = (this.#tokenizer ?? {}) as Templated;
    if (!template)
      throw new TypeError(`${at}: messages need a tokenizer with a chat template; give \`prompt\` and \`completion\``);
    const last = messages.at(-1);
    if (last?.role !== "assistant")
      throw new RangeError(`${at}: expected the assistant's message at the end, got ${JSON.stringify(last?.role)}`);
    const written = async (some: readonly Message[], more: boolean): Promise<string> =>
      String(await template.call(this.#tokenizer, some, { tokenize: false, add_generation_prompt: more }));
    const [prompt, whole] = [await written(messages.slice(0, -1), true), await written(messages, false)];
    if (!whole.startsWith(prompt))
      throw new RangeError(`${at}: the chat template does not put the answer behind the messages before it`);
    const end = this.#end(at);
    // Text that the template writes behind the answer's end is never generated.
    const cut = end === "" ? -1 : whole.lastIndexOf(end);
    return this.#answer(prompt, cut < prompt.length ? whole : whole.slice(0, cut + end.length), false, at);
  }

  /** Encodes a text to learn every token but the first. @throws RangeError for fewer than two tokens */
  async text(text: string, at: string): Promise<Tokens> {
    const ids = await this.#ids(text, true);
    if (ids.length < 2) throw new RangeError(`${at}: its text has ${ids.length} tokens, two at least are needed`);
    return nextTokens(ids, 1);
  }

  /**
   * Encodes words to learn the label of each word's first token.
   * @param classes names of the labels
   */
  async words({ words = [], labels = [] }: Example, classes: readonly string[], at: string): Promise<Tokens> {
    if (words.length === 0 || words.length !== labels.length)
      throw new RangeError(`${at}: has ${words.length} words and ${labels.length} labels, expected one for each word`);
    const [whole, alone] = [await this.#ids("a", true), await this.#ids("a", false)];
    const before = whole.findIndex((_, i) => alone.every((id, j) => id === whole[i + j]));
    const ids = whole.slice(0, Math.max(0, before));
    const tokens: { at: number[]; wanted: Distribution[] } = { at: [], wanted: [] };
    for (const [i, word] of words.entries()) {
      const own = await this.#ids(i === 0 ? word : ` ${word}`, false);
      const label = labels[i];
      if (label !== null && own.length > 0) {
        const found = classes.indexOf(label!);
        if (found < 0)
          throw new RangeError(
            `${at}: the label ${JSON.stringify(label)} of "${word}" is none of ${classes.join(", ")}`,
          );
        tokens.at.push(ids.length);
        tokens.wanted.push({ probabilities: [1], classes: [found] });
      }
      ids.push(...own);
    }
    if (tokens.at.length === 0) throw new RangeError(`${at}: none of its words has a label`);
    return { ...tokens, ids: [...ids, ...whole.slice(before + alone.length)] };
  }

  /** @param special whether the tokenizer adds its special tokens; a chat template has written them already */
  async #answer(prompt: string, whole: string, special: boolean, at: string): Promise<Tokens> {
    if (this.#names.includes("decoder_input_ids")) return this.#decoded(prompt, whole.slice(prompt.length));
    const [before, all] = [await this.#ids(prompt, special), await this.#ids(whole, special)];
    if (before.length === 0)
      throw new RangeError(`${at}: its prompt is empty: a language model needs a token to begin with`);
    // Generation never gives a token that spans prompt and completion, so the two are encoded apart then.
    const joined = before.every((id, i) => id === all[i]);
    const ids = joined ? all : [...before, ...(await this.#ids(whole.slice(prompt.length), false))];
    if (joined && (await this.#isCut(whole, special)))
      throw new RangeError(
        `${at}: its completion was cut off by the tokenizer: make the prompt shorter, or allow more tokens`,
      );
    if (ids.length <= before.length) throw new RangeError(`${at}: its completion has no tokens, or was cut off`);
    return nextTokens(ids, before.length);
  }

  async #decoded(prompt: string, completion: string): Promise<Tokens> {
    const { decoderStart = 0 } = this.#options;
    const [source, answer] = [await this.#ids(prompt, true), await this.#ids(completion, false)];
    return { ...nextTokens([decoderStart, ...answer], 1), source };
  }

  #end(at: string): string {
    const { end } = this.#options;
    if (end !== undefined) return end === false ? "" : end;
    const token = endOf(this.#tokenizer);
    if (token !== undefined) return token;
    throw new TypeError(
      `${at}: what ends a completion is not known: the tokenizer has no \`eos_token\`; pass \`end\`, such as "</s>", or false`,
    );
  }

  /** Tells whether the tokenizer cut a text: without its last character it then has the same tokens. */
  async #isCut(text: string, special: boolean): Promise<boolean> {
    const [all, shorter] = [await this.#ids(text, special), await this.#ids(text.trimEnd().slice(0, -1), special)];
    return shorter.length === all.length && shorter.every((id, i) => id === all[i]);
  }

  async #ids(text: string, special: boolean): Promise<readonly number[]> {
    const key = `${special}:${text}`;
    const known = this.#known.get(key);
    if (known) return known;
    if (!this.#encode) throw new TypeError("texts need `encode`, a tokenizer");
    const { input_ids: found } = text === "" ? {} : await this.#encode([text], special);
    const ids = Array.from((found?.data ?? []) as ArrayLike<number | bigint>, Number);
    this.#known.set(key, ids);
    return ids;
  }
}

/** Learns the ids from `from` on: each position predicts the next id. */
function nextTokens(ids: readonly number[], from: number): Tokens {
  const at = Array.from({ length: ids.length - from }, (_, i) => from - 1 + i);
  return {
    ids: ids.slice(0, -1),
    at,
    wanted: at.map((position) => ({ probabilities: [1], classes: [ids[position + 1]!] })),
  };
}

/**
 * Examples as token ids, with the positions where something is learned. A prompt is encoded exactly as when the model is asked, so that
 * the learned tokens are those that generation will need.
 */

import { type EncodeTexts, encoderOf, endOf, type Tokenizer } from "../session/tokens.ts";
import type { Example, Message, Tokens } from "./examples.ts";
import type { Distribution } from "./probabilities.ts";

/** What a tokenizer of transformers.js does beside encoding. */
interface Templated {
  readonly apply_chat_template?: (messages: readonly Message[], options: object) => unknown;
}

/** How the examples of a language model become tokens. */
export interface SequenceOptions {
  /** Text at the end of a completion. Default: the tokenizer's `eos_token`. false: none. */
  readonly end?: string | false | undefined;
  /** First token of a decoder beside an encoder. Default: 0. */
  readonly decoderStart?: number | undefined;
}

/** Encodes examples. */
export class Sequences {
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

  /** Whether the tokenizer leaves out the end of a text: without its last character it has the same tokens then. */
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

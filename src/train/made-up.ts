/**
 * Questions that the program makes, where a user gives no text: words of the tokenizer's vocabulary in no order, among them those of the
 * names of tasks and labels. Most of a classifier's are crossed, round by round, from the lines whose answers came closest to each label,
 * since lines at random hardly reach some. Those of a language model: `made-up-tokens.ts`.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import { shuffle } from "../tensor/random.ts";
import { type AdapterAnswer, type AskOptions, adapterWeights } from "./answers.ts";
import type { Example, Row } from "./examples.ts";
import { tokenQuestions } from "./made-up-tokens.ts";
import { answers } from "./objective.ts";
import type { Distribution } from "./probabilities.ts";

/** A tokenizer of transformers.js or of @huggingface/tokenizers, as far as words are read from it. */
interface Vocabulary {
  get_vocab?(withAdded?: boolean): ReadonlyMap<string, number> | Readonly<Record<string, number>>;
  decode?(ids: number[]): string;
}

/** Words to make questions of. */
export interface Words {
  /** Whole words of the vocabulary, by number: vocabularies are made from frequent words to rare ones. */
  readonly all: readonly string[];
  /** Words of names. */
  readonly names: readonly string[];
}

/** Words of a line. */
const [SHORTEST, LONGEST] = [3, 12];
/**
 * A word of rank r is drawn in proportion to 1 ÷ (r + FREQUENT): as in text (B. Mandelbrot, 1953), but less steeply, so that lines are not
 * made of articles and prepositions.
 */
const FREQUENT = 30;
/** The share of words that are taken from names. */
const NAMED = 0.1;
/** The share of a crossed line's words that are drawn anew. */
const DRAWN = 0.3;
/** Lines that are crossed for a label: those that came closest to it. */
const CLOSEST = 12;
/**
 * A classifier's lines: the share that is drawn at random, and the rounds in which the others are crossed from all lines before. Chosen with
 * their length and number by KL on test rows of eight tasks of own-seed and of hub, among twelve settings.
 */
const AT_RANDOM = 0.2;
const ROUNDS = 8;
/**
 * Words of a tokenizer, and of the names of tasks and their labels.
 * @throws TypeError for a tokenizer that does not tell its vocabulary
 */
export function wordsOf(where: string, encode: unknown, known: readonly Pick<Adapter, "id" | "metadata">[]): Words {
  const all = vocabularies.get(encode as object) ?? wholeWords(where, encode);
  vocabularies.set(encode as object, all);
  const names = known.flatMap(({ id, metadata }) => [id, ...labelsOf(metadata)]);
  return { all, names: [...new Set(names.flatMap((name) => name.match(/\p{Lu}?[\p{Ll}\p{Lo}]+|\p{Lu}{2,}/gu) ?? []))] };
}

/** Words by tokenizer: each adapter of a pack asks for them. */
const vocabularies = new WeakMap<object, readonly string[]>();

function wholeWords(where: string, encode: unknown): string[] {
  const { get_vocab, decode } = (encode ?? {}) as Vocabulary;
  if (!get_vocab || !decode)
    throw new TypeError(
      `${where}: expected texts, feeds or examples, or a tokenizer with get_vocab and decode in \`encode\`, to make texts from its words`,
    );
  const found = get_vocab.call(encode, false);
  const tokens = found instanceof Map ? [...found] : Object.entries(found as Readonly<Record<string, number>>);
  tokens.sort(([, a], [, b]) => a - b);
  // Byte-level and SentencePiece vocabularies mark where a word begins.
  const marked = tokens.filter(([token]) => /^[Ġ▁]/.test(token));
  const whole = marked.length > 0 ? marked : tokens;
  const all = whole.flatMap(([token, id]) => {
    if (!/\p{L}{2}/u.test(token)) return [];
    const word = decode.call(encode, [id]).trim();
    return /^[\p{L}\p{M}]{2,}$/u.test(word) ? [word] : [];
  });
  if (all.length === 0) throw new TypeError(`${where}: the vocabulary of \`encode\` has no words; give texts`);
  return all;
}

function labelsOf({ labels }: { readonly labels?: unknown }): string[] {
  return Array.isArray(labels) ? labels.filter((label) => typeof label === "string") : [];
}

/** Lines of words. @param length how many words a line has */
export function madeUpTexts(
  words: Words,
  count: number,
  random: () => number,
  length: (random: () => number) => number = lengthOf,
): string[] {
  return Array.from({ length: count }, () =>
    Array.from({ length: length(random) }, () => draw(words, random)).join(" "),
  );
}

function draw({ all, names }: Words, random: () => number): string {
  if (names.length > 0 && random() < NAMED) return pick(names, random);
  // The inverse of the distribution: log(rank + FREQUENT) is uniform.
  const rank = FREQUENT * ((all.length + FREQUENT) / FREQUENT) ** random() - FREQUENT;
  return all[Math.min(all.length - 1, Math.floor(rank))]!;
}

function pick<T>(all: readonly T[], random: () => number): T {
  return all[Math.floor(random() * all.length)]!;
}

function lengthOf(random: () => number): number {
  return SHORTEST + Math.floor(random() * (LONGEST - SHORTEST + 1));
}

/**
 * Makes questions for an adapter, with its answers.
 * @param head the layers that the adapter brings
 */
export async function madeUpQuestions(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
  { words, count, random }: { readonly words: Words; readonly count: number; readonly random: () => number },
  { where, supervision, ...how }: AskOptions & { readonly features?: boolean | undefined },
): Promise<Map<Row<BatchFeeds>, AdapterAnswer>> {
  const { model, weights } = await adapterWeights(session, adapter, head);
  const found = new Map<Row<BatchFeeds>, AdapterAnswer>();
  const ask = async (rows: readonly Row<BatchFeeds>[]): Promise<void> => {
    for await (const { row, logits, features } of answers({ model, supervision }, rows, weights, how))
      found.set(row, { distributions: logits.map(supervision.distribution), features });
  };
  const rowsOf = (texts: readonly string[]): Promise<Row<BatchFeeds>[]> =>
    supervision.ask(
      texts.map((text): Example<BatchFeeds> => ({ text })),
      where,
    );
  if (session.inputNames.includes("decoder_input_ids"))
    throw new TypeError(
      `${where}: no text can be made for a model with a decoder of its own: give prompts and completions`,
    );
  if (supervision.tokens) {
    async function* next(rows: readonly Row<BatchFeeds>[]): AsyncGenerator<[Row<BatchFeeds>, Distribution]> {
      for await (const { row, logits } of answers({ model, supervision }, rows, weights, how))
        yield [row, supervision.distribution(logits[0]!)];
    }
    await ask(await tokenQuestions(words, count, adapter.metadata, { rowsOf, next, random }));
    return found;
  }
  await ask(await rowsOf(madeUpTexts(words, Math.ceil(count * AT_RANDOM), random)));
  for (let round = 0; round < ROUNDS; round++) {
    const lines = Math.ceil((count - found.size) / (ROUNDS - round));
    await ask(await rowsOf(crossed(found, words, lines, random)));
  }
  return found;
}

/** Lines for each label in turn, crossed from two of those whose answers came closest to it. */
function crossed(
  asked: ReadonlyMap<Row<BatchFeeds>, AdapterAnswer>,
  words: Words,
  count: number,
  random: () => number,
): string[] {
  const all = [...asked].map(([{ text }, { distributions }]) => ({
    text: text!,
    probabilities: distributions[0]!.probabilities,
  }));
  const labels = all[0]!.probabilities.length;
  const closest = Array.from({ length: labels }, (_, label) =>
    [...all].sort((a, b) => b.probabilities[label]! - a.probabilities[label]!).slice(0, CLOSEST),
  );
  return Array.from({ length: count }, (_, i) => {
    const near = closest[i % labels]!;
    const both = [pick(near, random), pick(near, random)].flatMap(({ text }) => text.split(" "));
    const mixed = shuffle(
      both.map((word) => (random() < DRAWN ? draw(words, random) : word)),
      random,
    );
    return mixed.slice(0, lengthOf(random)).join(" ");
  });
}

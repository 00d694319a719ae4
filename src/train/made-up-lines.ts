/** Lines of words in no order: of the tokenizer's vocabulary, and of the names of tasks and labels. */
import type { Adapter } from "../adapters/adapter.ts";

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
      `${where}: expected texts or examples, or a tokenizer with get_vocab and decode in \`encode\`, to make texts from its words`,
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

export function draw({ all, names }: Words, random: () => number): string {
  if (names.length > 0 && random() < NAMED) return pick(names, random);
  // The inverse of the distribution: log(rank + FREQUENT) is uniform.
  const rank = FREQUENT * ((all.length + FREQUENT) / FREQUENT) ** random() - FREQUENT;
  return all[Math.min(all.length - 1, Math.floor(rank))]!;
}

export function pick<T>(all: readonly T[], random: () => number): T {
  return all[Math.floor(random() * all.length)]!;
}

export function lengthOf(random: () => number): number {
  return SHORTEST + Math.floor(random() * (LONGEST - SHORTEST + 1));
}

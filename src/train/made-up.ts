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
import { draw, lengthOf, madeUpTexts, pick, type Words } from "./made-up-lines.ts";
import { tokenQuestions } from "./made-up-tokens.ts";
import { answers } from "./objective.ts";
import type { Distribution } from "./probabilities.ts";

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

/** Lines for each label in turn, going on from the round before, crossed from two of those whose answers came closest to it. */
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
    const near = closest[(asked.size + i) % labels]!;
    const both = [pick(near, random), pick(near, random)].flatMap(({ text }) => text.split(" "));
    const mixed = shuffle(
      both.map((word) => (random() < DRAWN ? draw(words, random) : word)),
      random,
    );
    return mixed.slice(0, lengthOf(random)).join(" ");
  });
}

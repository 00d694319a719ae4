/**
 * Lessons of models that answer at every position: language models learn the tokens of completions, models that label tokens the
 * labels of words. Only positions with something to learn meet the classes, of which a vocabulary has tens of thousands.
 */
import { checkList } from "../arguments.ts";
import type { Feed } from "../onnx/feeds.ts";
import { shuffle } from "../tensor/random.ts";
import { type BatchFeeds, joinFeeds } from "./batch.ts";
import type { Example, Row, Tokens } from "./examples.ts";
import { fillInputs } from "./fill.ts";
import type { Encode } from "./inputs.ts";
import type { Lessons, Part, Targets } from "./lessons.ts";
import { type Distribution, logSumExp } from "./probabilities.ts";
import { type SequenceOptions, Sequences } from "./sequences.ts";

export interface TokenLessonsOptions extends SequenceOptions {
  readonly encode: Encode | undefined;
  /** Of the model's inputs. */
  readonly names: readonly string[];
  readonly example: ReadonlyMap<string, Feed> | undefined;
  /** Of words; empty for language models. */
  readonly labels: readonly string[];
  /** The input that takes positions. */
  readonly positions: string;
}

/** Of one run, padding counted: gradients need values that are kept of all of them. */
const MOST_TOKENS = 512;
/** Of one run: each has a row as wide as a vocabulary. */
const MOST_POSITIONS = 128;
/** So many classes are kept of an answer: of language models, nearly all that is likely. */
const MOST_CLASSES = 64;

type Lesson = Row<BatchFeeds> & { readonly tokens: Tokens };

export function tokenLessons(options: TokenLessonsOptions): Lessons<BatchFeeds> {
  const { names, example, positions } = options;
  const read = reader(options);
  // The caller's own feeds run one by one.
  const lengthOf = ({ tokens, feeds }: Lesson): number =>
    feeds ? MOST_TOKENS : Math.max(tokens.ids.length, tokens.source?.length ?? 0);
  const readAll = async (examples: readonly Example<BatchFeeds>[], where: string): Promise<Lesson[]> => {
    const rows: Lesson[] = [];
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
    lengths: async (rows) => new Map((rows as Lesson[]).map((row) => [row, lengthOf(row)])),
    parts(rows, smoothing) {
      if (smoothing > 0)
        throw new RangeError("fit: smoothing spreads a target over all labels; of tokens it cannot be done");
      return partsOf(rows as Lesson[], lengthOf);
    },
    async batch(rows) {
      const all = (rows as Lesson[]).map(({ tokens }) => tokens);
      const feeds = rows[0]!.feeds ? joinFeeds(rows.map(({ feeds }) => feeds!)) : fillInputs(example, names, all);
      const width = Math.max(...all.map(({ ids }) => ids.length));
      const places = all.flatMap(({ at }, row) => at.map((position) => BigInt(row * width + position)));
      return { ...feeds, [positions]: { type: "int64", dims: [places.length], data: BigInt64Array.from(places) } };
    },
    wanted: (row) => (row as Lesson).tokens.wanted,
    answered: (row, answers) => ({ ...row, tokens: { ...(row as Lesson).tokens, wanted: answers } }),
    distribution: likeliestOf,
  };
}

/** Reads one example, of whichever kind it is. */
function reader({ encode, names, labels, ...options }: TokenLessonsOptions) {
  const sequences = new Sequences(encode, names, options);
  const tokensOf = (example: Example<BatchFeeds>, at: string): Tokens | Promise<Tokens> => {
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
  return async (example: Example<BatchFeeds>, at: string): Promise<Lesson> => {
    const { feeds, weight = 1 } = example;
    if (!(weight >= 0 && weight < Infinity))
      throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
    return { text: undefined, feeds, label: 0, weight, tokens: await tokensOf(example, at) };
  };
}

/** What the caller's own feeds are to learn. */
function given(classes: ArrayLike<number> | undefined, at: string): Tokens {
  const all = Array.from(classes ?? []);
  const places = all.flatMap((value, i) => (value >= 0 ? [i] : []));
  if (places.length === 0)
    throw new TypeError(
      `${at}: feeds need \`classes\`, the class of each position, -1 where there is nothing to learn`,
    );
  return { ids: all, at: places, wanted: places.map((i) => ({ probabilities: [1], classes: [all[i]!] })) };
}

function partsOf(rows: readonly Lesson[], lengthOf: (row: Lesson) => number): Part<BatchFeeds>[] {
  const parts: Lesson[][] = [];
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

/** Targets [positions, k], of the classes that are named; what is short is filled up with others at 0. */
function targetsOf(rows: readonly Lesson[], mean: number): Targets {
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

/** The likeliest classes of one row of logits, with probabilities of all. */
function likeliestOf(logits: Float32Array): Distribution {
  const count = Math.min(MOST_CLASSES, logits.length);
  // The smallest of those kept is at the end.
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

/**
 * Supervision of models that answer at every position: language models learn the tokens of completions, token classifiers the labels of
 * words. Logits are computed only at positions with something to learn, since a vocabulary has tens of thousands of classes.
 */
import { checkList } from "../arguments.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { BatchFeeds, Tokenizer } from "../session/tokens.ts";
import { shuffle } from "../tensor/random.ts";
import { fillInputs, joinFeeds } from "./batch-feeds.ts";
import type { Example, Row, Tokens } from "./examples.ts";
import { type Distribution, logSumExp } from "./probabilities.ts";
import { type SequenceOptions, Sequences } from "./sequences.ts";
import type { MicroBatch, Supervision, Targets } from "./supervision.ts";

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

type TokenRow = Row<BatchFeeds> & { readonly tokens: Tokens };

export function tokenSupervision(options: TokenSupervisionOptions): Supervision<BatchFeeds> {
  const { names, example, positions } = options;
  const read = reader(options);
  // Feeds of callers run one by one.
  const lengthOf = ({ tokens, feeds }: TokenRow): number =>
    feeds ? MOST_TOKENS : Math.max(tokens.ids.length, tokens.source?.length ?? 0);
  const readAll = async (examples: readonly Example<BatchFeeds>[], where: string): Promise<TokenRow[]> => {
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
    microBatches(rows, smoothing) {
      if (smoothing > 0)
        throw new RangeError(
          "fit: smoothing spreads a target over all labels: models that answer token by token cannot use it",
        );
      return microBatchesOf(rows as TokenRow[], lengthOf);
    },
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
  return async (example: Example<BatchFeeds>, at: string): Promise<TokenRow> => {
    const { feeds, weight = 1 } = example;
    if (!(weight >= 0 && weight < Infinity))
      throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
    return { text: undefined, feeds, label: 0, weight, tokens: await tokensOf(example, at) };
  };
}

/** Takes classes given beside feeds as the wanted answers. */
function given(classes: ArrayLike<number> | undefined, at: string): Tokens {
  const all = Array.from(classes ?? []);
  const places = all.flatMap((value, i) => (value >= 0 ? [i] : []));
  if (places.length === 0)
    throw new TypeError(
      `${at}: feeds need \`classes\`, the class of each position, -1 where there is nothing to learn`,
    );
  return { ids: all, at: places, wanted: places.map((i) => ({ probabilities: [1], classes: [all[i]!] })) };
}

function microBatchesOf(rows: readonly TokenRow[], lengthOf: (row: TokenRow) => number): MicroBatch<BatchFeeds>[] {
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

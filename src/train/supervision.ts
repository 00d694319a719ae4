/**
 * Supervision: how examples become rows with targets for the model's logits. There is one kind for models that give one label for each
 * text (here) and one for models that give a class at each of some positions, such as the next token (token-supervision.ts).
 */

import { type BatchFeeds, encoderOf, type Tokenizer } from "../session/tokens.ts";
import { checkShapes, joinFeeds, shapesOf } from "./batch-feeds.ts";
import { checkExamples, type Example, type Row, splitHoldout, targetsOf, type Unlabelled } from "./examples.ts";
import { type Distribution, largest, softmax } from "./probabilities.ts";

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

/** Wanted inputs of the head's last layer, beside the logits. */
export interface Features {
  /** Values [rows, width]. */
  readonly values: readonly Float32Array[];
  /** What half the squared distance of a row counts in the loss. */
  readonly weight: number;
}

/** Rows of a batch that run together; their gradients are added up. */
export interface MicroBatch<Feeds> {
  readonly rows: readonly Row<Feeds>[];
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
export interface Supervision<Feeds> {
  /** Whether the model answers at every position. */
  readonly tokens: boolean;
  /** Checks examples to learn from. @throws RangeError, TypeError when an example cannot be learned from */
  check(examples: readonly Example<Feeds>[]): Promise<Row<Feeds>[]>;
  /** Checks examples that are only asked; targets are ignored. */
  ask(examples: readonly Example<Feeds>[], where: string): Promise<Row<Feeds>[]>;
  /** Splits off a hold-out. */
  split(
    rows: readonly Row<Feeds>[],
    share: number,
    random: () => number,
  ): { train: Row<Feeds>[]; holdout: Row<Feeds>[] };
  /** Lengths of rows: batches take rows of similar lengths. */
  lengths(rows: readonly Row<Feeds>[]): Promise<ReadonlyMap<Row<Feeds>, number>>;
  /** Cuts a batch into micro-batches that fit into memory. */
  microBatches(rows: readonly Row<Feeds>[], smoothing: number): MicroBatch<Feeds>[];
  /** Makes the model's inputs for rows that run together. */
  feeds(rows: readonly Row<Feeds>[]): Promise<Feeds>;
  /** Wanted answers of a row, one for each of its rows of logits. */
  wanted(row: Row<Feeds>): readonly Distribution[];
  /** Returns the row with these answers as targets. */
  answered(row: Row<Feeds>, answers: readonly Distribution[]): Row<Feeds>;
  /** Turns logits into a distribution small enough to keep. */
  distribution(logits: Float32Array): Distribution;
}

/** Most rows that run together: gradients need kept values of each row, so memory grows with their number. */
const MOST_ROWS = 16;

/** @param labels of the task, in order */
export function labelSupervision<Feeds>(inputs: Batcher<Feeds>, labels: readonly string[]): Supervision<Feeds> {
  return {
    tokens: false,
    check: async (examples) => checkExamples(examples, labels, inputs.encodes),
    ask: async (examples, where) => examples.map((example, i) => unanswered(example, `${where}: example ${i}`)),
    split: splitHoldout,
    lengths: (rows) => inputs.lengths(rows),
    microBatches(rows, smoothing) {
      const targets = targetsOf(rows, labels.length, smoothing);
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
function rowsRunTogether<Feeds>(rows: readonly Row<Feeds>[], inputs: Batcher<Feeds>): number[][] {
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
function unanswered<Feeds>({ text, feeds }: Example<Feeds>, at: string): Row<Feeds> {
  if (text === undefined && feeds === undefined)
    throw new TypeError(`${at}: the model answers each text with one row of logits: expected \`text\` or \`feeds\``);
  return { text, feeds, label: 0, weight: 1 };
}

// Examples as batches of a model's inputs. Each text is tokenised once; batches are put together from these rows, padded as the tokenizer
// pads. Its padding is learned from the shortest and the longest text, encoded together. Where one value does not explain the padding
// (positions that go on through it, say), batches are encoded by the tokenizer as they come.

/** Puts rows into batches. `Feeds` are one batch of a model's inputs. */
interface Batcher<Feeds> {
  /** Whether texts can be encoded. */
  readonly encodes: boolean;
  /**
   * Encodes rows for later batches and measures their lengths, in any unit. Rows are padded to the longest of their batch, so batches
   * take rows of similar lengths.
   */
  lengths<R extends Unlabelled<Feeds>>(rows: readonly R[]): Promise<ReadonlyMap<R, number>>;
  /** Key of rows that fit into one batch. Texts are padded; feeds of callers must have the same dimensions. */
  alike(row: Unlabelled<Feeds>): string;
  /** @throws TypeError when the rows cannot be put into one batch */
  batch(rows: readonly Unlabelled<Feeds>[]): Promise<Feeds>;
}

/** Padding in front of a row or behind it, with one value for each input. */
interface Padding {
  readonly front: boolean;
  readonly values: ReadonlyMap<string, number>;
}

/**
 * @param names of the model's inputs; other outputs of a tokenizer are dropped
 * @param short those that take int32
 */
export function createBatcher(
  tokenizer: Tokenizer | undefined,
  names: readonly string[],
  short: ReadonlySet<string> = new Set(),
): Batcher<BatchFeeds> {
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
  /** Encoded texts, as batches of one. */
  const encoded = new Map<string, BatchFeeds>();
  let padding: Padding | undefined;
  /** Largest number of padded places seen so far. */
  let seen = 0;

  const learnPadding = async (short: string, long: string): Promise<void> => {
    const [a, b] = [encoded.get(short)!, encoded.get(long)!];
    const gap = sizeOf(b) - sizeOf(a);
    if (gap <= seen) return;
    seen = gap;
    padding = paddingOf(a, b, await encode([short, long]).catch(refuseUnpadded));
  };

  return {
    encodes: encodeTexts !== undefined,

    async lengths(rows) {
      checkShapes(rows.flatMap(({ feeds }) => (feeds ? [feeds] : [])));
      for (const { text } of rows) {
        if (text !== undefined && !encoded.has(text)) encoded.set(text, await encode([text]));
      }
      const lengths = new Map(rows.map((row) => [row, sizeOf(row.feeds ?? encoded.get(row.text!)!)]));
      const texts = rows.filter(({ text }) => text !== undefined).sort((a, b) => lengths.get(a)! - lengths.get(b)!);
      if (texts.length > 0) await learnPadding(texts[0]!.text!, texts.at(-1)!.text!);
      return lengths;
    },

    alike: ({ feeds }) => (feeds ? shapesOf(feeds) : ""),

    async batch(rows) {
      const texts = rows.flatMap(({ text }) => text ?? []);
      if (texts.length === 0) return joinFeeds(rows.map(({ feeds }) => feeds!));
      if (texts.length < rows.length)
        throw new TypeError("a batch of texts and feeds together; give all examples in one way");
      const known = texts.map((text) => encoded.get(text)).filter((one) => one !== undefined);
      const padded = known.length === texts.length ? padAlike(known, padding) : undefined;
      return padded ? joinFeeds(padded) : encode(texts);
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

/** Explains how `pair`, `short` and `long` encoded together, is padded; undefined where one value for each input does not explain it. */
function paddingOf(short: BatchFeeds, long: BatchFeeds, pair: BatchFeeds): Padding | undefined {
  const same = ([name, { dims, data }]: [string, BatchFeeds[string]], other: BatchFeeds): boolean =>
    dims.join() === other[name]!.dims.join() && String(data) === String(other[name]!.data);
  for (const front of [false, true]) {
    const values = new Map<string, number>();
    for (const [name, { dims, data }] of Object.entries(pair)) {
      const [own, width] = [short[name]?.dims.at(-1), dims.at(-1)!];
      if (own !== width) values.set(name, (data as Float32Array)[front ? 0 : width - 1]!);
    }
    const made = padAlike([short, long], { front, values });
    if (made && Object.entries(joinFeeds(made)).every((one) => same(one, pair))) return { front, values };
  }
  return undefined;
}

/** Pads batches of one so that each input is as long as the longest; undefined where that is impossible. */
function padAlike(all: readonly BatchFeeds[], padding: Padding | undefined): BatchFeeds[] | undefined {
  const padded = all.map((): Record<string, BatchFeeds[string]> => ({}));
  for (const name of Object.keys(all[0]!)) {
    const width = Math.max(...all.map((feeds) => feeds[name]?.dims.at(-1) ?? NaN));
    const longest = all.find((feeds) => feeds[name]?.dims.at(-1) === width)?.[name]?.dims.join();
    for (const [i, feeds] of all.entries()) {
      const one = feeds[name];
      padded[i]![name] = one!;
      if (one && one.dims.join() === longest) continue;
      const value = padding?.values.get(name);
      if (one?.dims.slice(0, -1).join() !== "1" || value === undefined || !ArrayBuffer.isView(one.data))
        return undefined;
      const own = one.data as unknown as Float32Array;
      const data = new (own.constructor as Float32ArrayConstructor)(width).fill(value);
      data.set(own, padding!.front ? width - own.length : 0);
      padded[i]![name] = { ...(one.type === undefined ? {} : { type: one.type }), dims: [1, width], data };
    }
  }
  return padded;
}

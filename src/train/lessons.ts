/**
 * What is learned from, whatever a model answers: one label for each text (labelled.ts), or a class at each of some positions
 * (tokens.ts), such as the next token. A trainer sees rows, runs of rows, and what their logits ought to be.
 */
import type { Example, Row } from "./examples.ts";
import type { Distribution } from "./probabilities.ts";

/** What logits of a run ought to be, as the training graph takes it: rows sum to their weight. */
export interface Targets {
  /** [rows, width] */
  readonly values: Float32Array<ArrayBuffer>;
  /** Rows of logits: one for each text, or for each position that is asked for. */
  readonly rows: number;
  /** [rows, width]: of which classes. Undefined: of all, in order. */
  readonly classes?: BigInt64Array<ArrayBuffer> | undefined;
}

/** Rows that run together. */
export interface Part<Feeds> {
  readonly rows: readonly Row<Feeds>[];
  readonly targets: Targets;
  /** Of the batch: each part is a mean over its own rows of logits. */
  readonly share: number;
}

/** How good answers are. */
export interface Score {
  /** Mean cross entropy, in nats. */
  readonly loss: number;
  /** Share of examples that are answered right: the label, or every token of the completion. */
  readonly accuracy: number;
}

export interface Lessons<Feeds> {
  /** Whether the model answers at every position. */
  readonly tokens: boolean;
  /** @throws RangeError, TypeError when an example cannot be learned from */
  check(examples: readonly Example<Feeds>[]): Promise<Row<Feeds>[]>;
  /** What is only asked: rows whose targets do not count. */
  ask(examples: readonly Example<Feeds>[], where: string): Promise<Row<Feeds>[]>;
  /** Some rows as a hold-out. */
  split(
    rows: readonly Row<Feeds>[],
    share: number,
    random: () => number,
  ): { train: Row<Feeds>[]; holdout: Row<Feeds>[] };
  /** How long each row is: those of like lengths go into one batch. */
  lengths(rows: readonly Row<Feeds>[]): Promise<ReadonlyMap<Row<Feeds>, number>>;
  /** A batch in parts that fit into memory. */
  parts(rows: readonly Row<Feeds>[], smoothing: number): Part<Feeds>[];
  /** The inputs of rows that run together. */
  batch(rows: readonly Row<Feeds>[]): Promise<Feeds>;
  /** What each row of logits of a row ought to be. */
  wanted(row: Row<Feeds>): readonly Distribution[];
  /** The same row, whose answers ought to be these. */
  answered(row: Row<Feeds>, answers: readonly Distribution[]): Row<Feeds>;
  /** What logits say, as far as it is worth keeping. */
  distribution(logits: Float32Array): Distribution;
}

/** The logits of each row of a run, by its rows. */
export function logitsOf<Feeds>(
  lessons: Lessons<Feeds>,
  rows: readonly Row<Feeds>[],
  logits: Float32Array,
): Float32Array[][] {
  const counts = rows.map((row) => lessons.wanted(row).length);
  const width = logits.length / counts.reduce((a, b) => a + b, 0);
  let at = 0;
  return counts.map((count) => Array.from({ length: count }, () => logits.subarray(at * width, ++at * width)));
}

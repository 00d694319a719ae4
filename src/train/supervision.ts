/**
 * Supervision: how examples become rows with targets for the model's logits. There is one kind for models that give one label for each
 * text (here) and one for models that give a class at each of some positions, such as the next token (token-supervision.ts).
 */

import type { Batcher } from "./encoding.ts";
import { checkExamples, type Example, type Row, splitHoldout, targetsOf } from "./examples.ts";
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

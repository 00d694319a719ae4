/**
 * Lessons of models that give one row of logits for each text: its label.
 */
import { checkExamples, type Example, type Row, splitHoldout, targetsOf } from "./examples.ts";
import type { Inputs } from "./inputs.ts";
import type { Lessons } from "./lessons.ts";
import { type Distribution, largest, softmax } from "./probabilities.ts";

/** Rows that run together at most: gradients need values that are kept of all of them, so that memory grows with their number. */
const MOST_ROWS = 16;

/** @param labels of the task, in order */
export function labelledLessons<Feeds>(inputs: Inputs<Feeds>, labels: readonly string[]): Lessons<Feeds> {
  return {
    tokens: false,
    check: async (examples) => checkExamples(examples, labels, inputs.encodes),
    ask: async (examples, where) => examples.map((example, i) => unanswered(example, `${where}: example ${i}`)),
    split: splitHoldout,
    lengths: (rows) => inputs.lengths(rows),
    parts(rows, smoothing) {
      const targets = targetsOf(rows, labels.length, smoothing);
      const targetOf = (row: number): Float32Array => targets.subarray(row * labels.length, (row + 1) * labels.length);
      return runsOf(rows, inputs).map((run) => {
        const values = new Float32Array(run.length * labels.length);
        for (const [i, row] of run.entries()) values.set(targetOf(row), i * labels.length);
        const some = run.map((row) => rows[row]!);
        return { rows: some, targets: { values, rows: run.length }, share: run.length / rows.length };
      });
    },
    batch: (rows) => inputs.batch(rows),
    wanted: ({ label, target }) => [{ probabilities: target ?? labels.map((_, i) => Number(i === label)) }],
    answered: (row, [{ probabilities }]: readonly [Distribution]) => ({
      ...row,
      target: probabilities,
      label: largest(probabilities),
    }),
    distribution: (logits) => ({ probabilities: softmax(logits) }),
  };
}

/** Which rows run together, by their places. */
function runsOf<Feeds>(rows: readonly Row<Feeds>[], inputs: Inputs<Feeds>): number[][] {
  const runs: number[][] = [];
  /** Those that have room, by what their rows have alike. */
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

/** @throws TypeError for what is no text, nor feeds */
function unanswered<Feeds>({ text, feeds }: Example<Feeds>, at: string): Row<Feeds> {
  if (text === undefined && feeds === undefined)
    throw new TypeError(`${at}: the model answers each text with one row of logits: expected \`text\` or \`feeds\``);
  return { text, feeds, label: 0, weight: 1 };
}

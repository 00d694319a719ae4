/**
 * Lessons of models that give one row of logits for each text: its label.
 */
import { checkExamples, type Example, type Row, splitHoldout, targetsOf } from "./examples.ts";
import type { Inputs } from "./inputs.ts";
import type { Lessons, Part } from "./lessons.ts";
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
      const parts: Part<Feeds>[] = [];
      for (let at = 0; at < rows.length; at += MOST_ROWS) {
        const some = rows.slice(at, at + MOST_ROWS);
        const values = targets.slice(at * labels.length, (at + some.length) * labels.length);
        parts.push({ rows: some, targets: { values, rows: some.length }, share: some.length / rows.length });
      }
      return parts;
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

/** @throws TypeError for what is no text, nor feeds */
function unanswered<Feeds>({ text, feeds }: Example<Feeds>, at: string): Row<Feeds> {
  if (text === undefined && feeds === undefined)
    throw new TypeError(`${at}: the model answers each text with one row of logits: expected \`text\` or \`feeds\``);
  return { text, feeds, label: 0, weight: 1 };
}

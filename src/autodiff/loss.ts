/**
 * Cross entropy between the softmax of the logits and numeric targets: labels, smoothed or weighted ones, rows of zeros for padding,
 * answers of another model. Columns that are marked hold features instead, which are compared by squares. N rows, C classes:
 *
 *     loss = −1/N · Σ targets · log softmax(logits) + 1/2N · Σ (features − targets)²
 *     dloss/dlogits = (softmax(logits) · Σ_C targets − targets) / N
 *     dloss/dfeatures = (features − targets) / N
 *
 * A row counts by the sum of its targets; a row of zeros counts only in N.
 */
import type { Emitter } from "./emit.ts";

/** Takes a column out of a softmax. */
const NEVER = 1e30;

/**
 * @param logits [… , C + features], all leading dimensions are rows
 * @param targets f32 [N, C + features]
 * @param squares f32 [1, C + features]: 1 for features, 0 for classes; [1, 1] where all are alike
 */
export function crossEntropy(
  emit: Emitter,
  logits: string,
  targets: string,
  squares: string,
): { loss: string; gradient: string } {
  const rows = emit.rows(logits);
  const classes = emit.sub(emit.float(1), squares);
  const among = emit.sub(emit.mul(rows, classes), emit.mul(squares, emit.float(NEVER)));
  const wanted = emit.mul(targets, classes);
  // The maximum is subtracted first, so that no exponential overflows.
  const shifted = emit.sub(among, emit.max(among, [1]));
  const powers = emit.op("Exp", [shifted]);
  const total = emit.sum(powers, [1], true);
  const logs = emit.sub(shifted, emit.op("Log", [total]));
  const count = emit.toFloat(emit.size(rows, 0));
  const off = emit.mul(emit.sub(rows, targets), squares);
  const entropy = emit.neg(emit.div(emit.sum(emit.mul(wanted, logs), [0, 1], false), count));
  const halves = emit.div(emit.sum(emit.mul(off, off), [0, 1], false), emit.mul(count, emit.float(2)));
  const weights = emit.sum(wanted, [1], true);
  const expected = emit.mul(emit.div(powers, total), weights);
  const beyond = emit.add(emit.sub(expected, wanted), off);
  const gradient = emit.reshapeAs(emit.div(beyond, count), logits);
  return { loss: emit.add(entropy, halves), gradient };
}

/**
 * Cross entropy over many classes, such as a vocabulary, with targets for a few of them.
 * @param classes int64 [N, k], the classes of the targets; those of a row all differ
 * @param targets f32 [N, k]
 */
export function sparseCrossEntropy(
  emit: Emitter,
  logits: string,
  classes: string,
  targets: string,
): { loss: string; gradient: string } {
  const rows = emit.rows(logits);
  const shifted = emit.sub(rows, emit.max(rows, [1]));
  const at = (values: string): string => emit.op("GatherElements", [values, classes], { axis: 1 });
  const powers = emit.op("Exp", [shifted]);
  const total = emit.sum(powers, [1], true);
  // Only logarithms of the few targets: a table of all would be as large as the logits.
  const logs = emit.sub(at(shifted), emit.op("Log", [total]));
  const count = emit.toFloat(emit.size(rows, 0));
  const loss = emit.neg(emit.div(emit.sum(emit.mul(targets, logs), [0, 1], false), count));
  const weights = emit.sum(targets, [1], true);
  const expected = emit.mul(powers, emit.div(weights, emit.mul(total, count)));
  const wanted = emit.sub(at(expected), emit.div(targets, count));
  const rest = emit.op("ScatterElements", [expected, classes, wanted], { axis: 1 });
  return { loss, gradient: emit.reshapeAs(rest, logits) };
}

/**
 * Cross entropy between the softmax of the logits and numeric targets: labels, smoothed or weighted ones, rows of zeros for padding,
 * answers of another model. N rows, C classes:
 *
 *     loss = −1/N · Σ targets · log softmax(logits)
 *     dloss/dlogits = (softmax(logits) · Σ_C targets − targets) / N
 *
 * A row counts by the sum of its targets; a row of zeros counts only in N.
 */
import type { Emitter } from "./emit.ts";

/**
 * @param logits [… , C], all leading dimensions are rows
 * @param targets f32 [N, C]
 */
export function crossEntropy(emit: Emitter, logits: string, targets: string): { loss: string; gradient: string } {
  const rows = emit.rows(logits);
  // The maximum is subtracted first, so that no exponential overflows.
  const shifted = emit.sub(rows, emit.max(rows, [1]));
  const powers = emit.op("Exp", [shifted]);
  const total = emit.sum(powers, [1], true);
  const logs = emit.sub(shifted, emit.op("Log", [total]));
  const count = emit.toFloat(emit.size(rows, 0));
  const loss = emit.neg(emit.div(emit.sum(emit.mul(targets, logs), [0, 1], false), count));
  const weights = emit.sum(targets, [1], true);
  const expected = emit.mul(emit.div(powers, total), weights);
  const gradient = emit.reshapeAs(emit.div(emit.sub(expected, targets), count), logits);
  return { loss, gradient };
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

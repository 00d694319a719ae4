/**
 * Parameters of a task that are more than bytes of its blob: heads of several tasks as one, biases and token rows as differences
 * from the base's. Loaded when a selection has some.
 */

import { sameShape, type View } from "../base/host.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import { readTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { decodeTensor } from "../tensor/dtypes.ts";
import type { Change } from "./parameters.ts";

/**
 * values = Σ share · task's values, where `values` are the first task's.
 * @throws TaskError when labels or shapes differ, or the strengths add up to nothing
 */
export function blendHeads(name: string, values: Float32Array, changes: readonly Change[], { tasks }: Pack): void {
  const first = changes[0]!;
  const labels = ({ part }: Change): string => JSON.stringify(tasks.get(part.id)?.metadata.labels ?? null);
  for (const change of changes) {
    if (labels(change) === labels(first) && sameShape(change.parameter.shape, first.parameter.shape)) continue;
    throw new TaskError(
      `"${first.part.id}" and "${change.part.id}" have different labels: say whose "${name}" to use, ` +
        `{ head: "${first.part.id}" }`,
      { task: change.part.id },
    );
  }
  const total = changes.reduce((s, c) => s + c.part.strength, 0);
  if (!(total > 0)) {
    throw new TaskError(`the strengths add up to ${total}: say whose "${name}" to use, { head: id }`, {
      task: first.part.id,
    });
  }
  for (let i = 0; i < values.length; i++) values[i]! *= first.part.strength / total;
  for (const change of changes.slice(1)) {
    decodeParameter(change).forEach((v, i) => (values[i]! += (change.part.strength / total) * v));
  }
}

/**
 * Biases and token rows: base + Σ strength · (task − base); exactly the task's values for one task at strength 1.
 * @param base the pristine parameter, where there is a base
 * @throws BaseMismatchError when a task's parameter does not fit the base's
 */
export function addDifferences(
  name: string,
  changes: readonly Change[],
  base: (View & { data: Uint8Array }) | undefined,
): { values: Float32Array; shape: readonly number[] } {
  const shape = base?.shape ?? changes[0]!.parameter.shape;
  const count = shape.reduce((a, b) => a * b, 1);
  const width = shape[shape.length - 1]!;
  const original = base ? decodeTensor(base.dtype, viewBytes(base), 1, count) : new Float32Array(count);
  const values = original.slice();
  for (const change of changes) {
    const { part, parameter } = change;
    const { indices } = parameter;
    const fits = indices
      ? parameter.shape[1] === width && shape.length === 2 && indices[indices.length - 1]! < shape[0]!
      : sameShape(parameter.shape, shape);
    if (!fits) {
      throw new BaseMismatchError(
        `task "${part.id}" brings "${name}" (${parameter.role}) of [${parameter.shape}], the base's is [${shape}]`,
        { module: name, expected: shape, found: parameter.shape },
      );
    }
    decodeParameter(change).forEach((v, i) => {
      const at = indices ? indices[Math.floor(i / width)]! * width + (i % width) : i;
      if (parameter.role === "bias-delta") values[at]! += part.strength * v;
      else if (part.strength === 1 && changes.length === 1) values[at] = v;
      else values[at]! += part.strength * (v - original[at]!);
    });
  }
  return { values, shape };
}

/** In new memory. */
function decodeParameter({ part, parameter: { tensor } }: Change): Float32Array {
  return readTensor(part.blob.bytes, tensor);
}

/** The bytes of a view, padded to a multiple of 4 for the decoder where they are not. */
export function viewBytes(view: View & { data: Uint8Array }): Uint8Array {
  const bytes = view.data.subarray(view.byteOffset);
  if (bytes.length % 4 === 0) return bytes;
  const padded = new Uint8Array(bytes.length + (4 - (bytes.length % 4)));
  padded.set(bytes);
  return padded;
}

/**
 * The rest of a task: classifier heads, biases and token rows, whole parameters that change with the task without being
 * adapted modules. Computed in plain JS, since they are small; the result is the list of parameters that differ from the
 * base. Loaded when a task brings some.
 */

import { type CpuView, sameShape, type View, viewValues, type WeightHost } from "../base/host.ts";
import type { Locator } from "../base/locate.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import type { TaskParameter } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { encodeFloats, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";
import type { SwitchOptions } from "./selection.ts";
import type { ActiveTask } from "./stage.ts";

/** A parameter of the active task that differs from the base's. */
export interface Replacement {
  readonly view: View & { readonly data: Uint8Array<ArrayBuffer> };
  /** The base has no such parameter. */
  readonly added: boolean;
}

/** A task's version of a parameter. */
interface Change {
  readonly part: ActiveTask;
  readonly parameter: TaskParameter;
}

/** The changes of a selection by the base's names; of saved modules those of `head` alone, where it is given. */
function changesOf(
  parts: readonly ActiveTask[],
  head: string | undefined,
  nameOf: (change: Change) => string,
): Map<string, Change[]> {
  const changes = new Map<string, Change[]>();
  for (const part of parts) {
    for (const parameter of part.blob.parameters) {
      if (parameter.role === "saved" && head !== undefined && head !== part.id) continue;
      const name = nameOf({ part, parameter });
      changes.set(name, [...(changes.get(name) ?? []), { part, parameter }]);
    }
  }
  return changes;
}

/**
 * Saved modules of a selection as they are, whatever the base: f32 in new memory, by the pack's names.
 * @param head whose to take, where several tasks have some
 * @throws TaskError when they cannot be blended
 */
export function savedModules(
  parts: readonly ActiveTask[],
  pack: Pack,
  head: string | undefined,
): Map<string, { readonly shape: readonly number[]; readonly values: Float32Array }> {
  const saved = parts.map((part) => {
    const parameters = part.blob.parameters.filter(({ role }) => role === "saved");
    return { ...part, blob: { ...part.blob, parameters } };
  });
  const modules = new Map<string, { shape: readonly number[]; values: Float32Array }>();
  for (const [name, changes] of changesOf(saved, head, ({ parameter }) => parameter.name)) {
    const values = blendHeads(name, decode(changes[0]!), changes, pack);
    modules.set(name, { shape: changes[0]!.parameter.shape, values });
  }
  return modules;
}

/** Parameters of the base that tasks touch, pristine, and the active task's versions of them. */
export class Parameters {
  /** Parameters of the active task, by the base's names. */
  active: ReadonlyMap<string, Replacement> = new Map();
  /** Bytes of new memory since the last `activate`. */
  allocated = 0;
  /** Memory of earlier tasks' parameters, by length: what `resolve` fills while the active ones must stay whole. */
  readonly #pool = new Map<number, Uint8Array<ArrayBuffer>[]>();
  /** Decoded values on their way from a blob to a parameter. */
  #values = new Float32Array(0);
  readonly #base: Locator;
  readonly #pristine = new Map<string, CpuView>();

  constructor(base: Locator) {
    this.#base = base;
  }

  /** Makes what `resolve` returned the active parameters. */
  activate(replacements: ReadonlyMap<string, Replacement>): void {
    for (const { view } of this.active.values()) {
      const { data } = view;
      this.#pool.set(data.length, [...(this.#pool.get(data.length) ?? []), data]);
    }
    this.active = replacements;
    this.allocated = 0;
  }

  /** The base's value of a parameter that a task has touched. */
  pristine(name: string): CpuView | undefined {
    return this.#pristine.get(name);
  }

  /** The values of a parameter of the active task. */
  values(name: string): Float32Array | undefined {
    const view = this.active.get(name)?.view;
    return view && viewValues(view);
  }

  get pristineBytes(): number {
    let bytes = 0;
    for (const { data } of this.#pristine.values()) bytes += data.length;
    return bytes;
  }

  get activeBytes(): number {
    let bytes = this.#values.byteLength;
    for (const [length, pooled] of this.#pool) bytes += length * pooled.length;
    for (const { view } of this.active.values()) bytes += view.data.length;
    return bytes;
  }

  /**
   * The replacements that make `parts` active; nothing changes until they are given to `activate`.
   * @param host where the base's values are read
   * @throws TaskError when heads cannot be blended, BaseMismatchError when a parameter does not fit the base
   */
  async resolve(
    parts: readonly ActiveTask[],
    pack: Pack,
    host: WeightHost | undefined,
    { head, signal }: SwitchOptions,
  ): Promise<Map<string, Replacement>> {
    const alone = parts.length === 1 && parts[0]!.strength === 1;
    const changes = changesOf(parts, head, ({ part, parameter }) =>
      this.#baseName(parameter, part.id, alone, host !== undefined),
    );
    const out = new Map<string, Replacement>();
    for (const [name, list] of changes) {
      const known = this.#base.parameters.get(name);
      if (known && !this.#pristine.has(name)) {
        const view = (await host!.read(name, undefined, { signal })) as CpuView;
        // A writable host reads its live memory: what is pristine now must be copied.
        this.#pristine.set(name, host!.begin ? { ...view, data: view.data.slice() } : view);
      }
      const saved = list.filter(({ parameter }) => parameter.role === "saved");
      const [first] = saved;
      if (first) {
        const values = blendHeads(name, this.#decode(first), saved, pack);
        out.set(name, this.#replacement(name, values, first.parameter.shape, known?.dtype ?? "f32", !known));
        continue;
      }
      const pristine = this.#pristine.get(name);
      const { values, shape } = addDifferences(name, list, pristine);
      out.set(name, this.#replacement(name, values, shape, pristine?.dtype ?? "f32", false));
    }
    return out;
  }

  /** @param alone whether the task is the only one, at strength 1: then a whole bias needs no base */
  #baseName(parameter: TaskParameter, task: string, alone: boolean, based: boolean): string {
    const { name, role } = parameter;
    const found = this.#base.names.find(name);
    if ("name" in found) return found.name;
    if (role === "saved" && !found.ambiguous) return name;
    if (!based && role === "bias" && alone) return name;
    if (!based) {
      throw new TaskError(`task "${task}" changes "${name}" (${role}), which needs the base's values: pass \`base\``, {
        task,
      });
    }
    throw new BaseMismatchError(
      `task "${task}" changes the parameter "${name}" (${role}), which ` +
        (found.ambiguous ? "several parameters of the base match" : "the base does not have") +
        `; candidates: ${found.candidates.join(", ") || "none"}`,
      { module: name, candidates: found.candidates },
    );
  }

  /** In memory that the next call uses again. */
  #decode(change: Change): Float32Array {
    const { rows, width } = change.parameter.tensor;
    if (this.#values.length < rows * width) {
      this.#values = new Float32Array(rows * width);
      this.allocated += this.#values.byteLength;
    }
    return decode(change, this.#values).subarray(0, rows * width);
  }

  #replacement(
    name: string,
    values: Float32Array,
    shape: readonly number[],
    dtype: FloatDtype,
    added: boolean,
  ): Replacement {
    try {
      const length = rowBytes(dtype, values.length);
      const pooled = this.#pool.get(length)?.pop();
      if (!pooled) this.allocated += length;
      return { view: { dtype, shape, data: encodeFloats(dtype, values, pooled), byteOffset: 0 }, added };
    } catch (cause) {
      throw new TaskError(`"${name}" does not fit the base's ${dtype}: ${(cause as Error).message}`, {
        task: name,
        cause,
      });
    }
  }
}

/**
 * A saved module: one task's, or the weighted mean of several with the same labels. Strength alone never scales a head.
 * @param values the first task's; overwritten
 * @throws TaskError when labels or shapes differ, or the strengths add up to nothing
 */
function blendHeads(name: string, values: Float32Array, changes: readonly Change[], { tasks }: Pack): Float32Array {
  const first = changes[0]!;
  if (changes.length === 1) return values;
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
    decode(change).forEach((v, i) => (values[i]! += (change.part.strength / total) * v));
  }
  return values;
}

/**
 * Biases and token rows: base + Σ strength · (task − base); exactly the task's values for one task at strength 1.
 * @param base the pristine parameter, where there is a base
 * @throws BaseMismatchError when a task's parameter does not fit the base's
 */
function addDifferences(
  name: string,
  changes: readonly Change[],
  base: CpuView | undefined,
): { values: Float32Array; shape: readonly number[] } {
  const shape = base?.shape ?? changes[0]!.parameter.shape;
  const count = shape.reduce((a, b) => a * b, 1);
  const width = shape[shape.length - 1]!;
  const original = base ? viewValues(base) : new Float32Array(count);
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
    decode(change).forEach((v, i) => {
      const at = indices ? indices[Math.floor(i / width)]! * width + (i % width) : i;
      if (parameter.role === "bias-delta") values[at]! += part.strength * v;
      else if (part.strength === 1 && changes.length === 1) values[at] = v;
      else values[at]! += part.strength * (v - original[at]!);
    });
  }
  return { values, shape };
}

function decode({ part, parameter: { tensor } }: Change, out?: Float32Array): Float32Array {
  return readTensor(part.blob.bytes, tensor, out);
}

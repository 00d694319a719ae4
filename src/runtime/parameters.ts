/**
 * The rest of a task: classifier heads, biases and token rows, whole parameters that change with the task without being
 * adapted modules. Computed in plain JS, since they are small; the result is the list of parameters that differ from the
 * base.
 */

import type { View, WeightHost } from "../base/host.ts";
import type { Locator } from "../base/locate.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import type { TaskParameter } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { encodeFloats, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";
import type { ActiveTask } from "./stage.ts";

/** A parameter of the active task that differs from the base's. */
export interface Replacement {
  view: View & { data: Uint8Array<ArrayBuffer> };
  /** The base has no such parameter. */
  added: boolean;
}

/** A task's version of a parameter. */
export interface Change {
  part: ActiveTask;
  parameter: TaskParameter;
}

/** Parameters of the base that tasks touch, pristine, and the active task's versions of them. */
export class Parameters {
  /** Bytes of new memory since the last `activate`. */
  allocated = 0;
  #active = new Map<string, Replacement>();
  /** Memory of earlier tasks' parameters, by length: what `resolve` fills while the active ones must stay whole. */
  readonly #pool = new Map<number, Uint8Array<ArrayBuffer>[]>();
  /** Decoded values on their way from a blob to a parameter. */
  #values = new Float32Array(0);
  /** Where the base's values are read. */
  host: WeightHost | undefined;
  readonly #base: Locator;
  readonly #pristine = new Map<string, View & { data: Uint8Array }>();

  constructor(host: WeightHost | undefined, base: Locator) {
    this.host = host;
    this.#base = base;
  }

  /** Parameters of the active task, by the base's names. */
  get active(): ReadonlyMap<string, Replacement> {
    return this.#active;
  }

  /** Makes what `resolve` returned the active parameters. */
  activate(replacements: Map<string, Replacement>): void {
    for (const { view } of this.#active.values()) {
      const { data } = view;
      this.#pool.set(data.length, [...(this.#pool.get(data.length) ?? []), data]);
    }
    this.#active = replacements;
    this.allocated = 0;
  }

  /** The base's value of a parameter that a task has touched. */
  pristine(name: string): (View & { data: Uint8Array }) | undefined {
    return this.#pristine.get(name);
  }

  get pristineBytes(): number {
    let bytes = 0;
    for (const { data } of this.#pristine.values()) bytes += data.length;
    return bytes;
  }

  get activeBytes(): number {
    let bytes = this.#values.byteLength;
    for (const [length, pooled] of this.#pool) bytes += length * pooled.length;
    for (const { view } of this.#active.values()) bytes += view.data.length;
    return bytes;
  }

  /**
   * The replacements that make `parts` active; nothing changes until they are given to `activate`.
   * @param head whose saved modules to take, where several tasks have some
   * @throws TaskError when heads cannot be blended, BaseMismatchError when a parameter does not fit the base
   */
  async resolve(
    parts: readonly ActiveTask[],
    pack: Pack,
    head: string | undefined,
    signal: AbortSignal | undefined,
  ): Promise<Map<string, Replacement>> {
    const changes = new Map<string, Change[]>();
    for (const part of parts) {
      for (const parameter of part.blob.parameters) {
        if (parameter.role === "saved" && head !== undefined && head !== part.id) continue;
        const name = this.#baseName(parameter, part.id, parts.length === 1 && part.strength === 1);
        const list = changes.get(name);
        if (list) list.push({ part, parameter });
        else changes.set(name, [{ part, parameter }]);
      }
    }
    const out = new Map<string, Replacement>();
    for (const [name, list] of changes) {
      const base = this.#base.parameters.get(name);
      if (base && !this.#pristine.has(name)) {
        const view = await this.host!.read(name, undefined, { signal });
        // A writable host reads its live memory: what is pristine now must be copied.
        const data = this.host!.begin ? (view.data as Uint8Array).slice() : (view.data as Uint8Array);
        this.#pristine.set(name, { ...view, data });
      }
      const saved = list.filter((c) => c.parameter.role === "saved");
      if (saved.length > 0) out.set(name, await this.#saved(name, saved, pack));
      else {
        const pristine = this.#pristine.get(name);
        // Biases and token rows.
        const { values, shape } = (await import("./mixed.ts")).addDifferences(name, list, pristine);
        out.set(name, this.#replacement(name, values, shape, pristine?.dtype ?? "f32", false));
      }
    }
    return out;
  }

  /** @param alone whether the task is the only one, at strength 1: then a whole bias needs no base */
  #baseName(parameter: TaskParameter, task: string, alone: boolean): string {
    const { name, role } = parameter;
    const found = this.#base.names.find(name);
    if ("name" in found) return found.name;
    if (role === "saved" && !found.ambiguous) return name;
    if (!this.host && role === "bias" && alone) return name;
    if (!this.host) {
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

  /** A saved module: one task's, or the weighted mean of several with the same labels. Strength never scales a head. */
  async #saved(name: string, changes: readonly Change[], pack: Pack): Promise<Replacement> {
    const first = changes[0]!;
    const values = this.#decode(first);
    if (changes.length > 1) (await import("./mixed.ts")).blendHeads(name, values, changes, pack);
    const base = this.#base.parameters.get(name);
    return this.#replacement(name, values, first.parameter.shape, base?.dtype ?? "f32", !base);
  }

  /** In memory that the next call uses again. */
  #decode({ part, parameter: { tensor } }: Change): Float32Array {
    const { rows, width } = tensor;
    if (this.#values.length < rows * width) {
      this.#values = new Float32Array(rows * width);
      this.allocated += this.#values.byteLength;
    }
    readTensor(part.blob.bytes, tensor, this.#values);
    return this.#values.subarray(0, rows * width);
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

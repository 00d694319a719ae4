/**
 * The rest of a task: classifier heads, biases and token rows, whole parameters that change with the task without being
 * adapted modules. Computed in plain JS, since they are small; the result is the list of parameters that differ from the
 * base. Loaded when a task brings some.
 */

import { at } from "../backends/backend.ts";
import { type CpuView, type Parameter, sameShape, type View, viewValues, type WeightHost } from "../base/host.ts";
import type { Locator } from "../base/locate.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import type { TaskParameter, TaskTerm } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { encodeFloats, rowBytes } from "../tensor/dtypes.ts";
import { readWeight, type Slot } from "./slots.ts";
import type { ActiveTask } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

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

/**
 * Tasks as they go together: what one brings whole, none of the others changes. A task by itself never does both (SPEC.md, section
 * 6.2), and PEFT has no two such adapters on one model.
 * @param head the task of a blend whose saved modules are used: those of the others go, and what the others do to its own
 * @throws TaskError for a blend without `head` in which tasks do both
 */
export function settle(parts: readonly ActiveTask[], pack: Pack, head: string | undefined): ActiveTask[] {
  const weightOf = ({ module }: TaskTerm): string => `${pack.modules[module]!.name}.weight`;
  const owners = new Map<string, string>();
  for (const { id, blob } of parts) {
    if (head !== undefined && head !== id) continue;
    for (const { name, role } of blob.parameters) if (role === "saved" && !owners.has(name)) owners.set(name, id);
  }
  return parts.map((part) => {
    const { id, blob } = part;
    const stays = (name: string): boolean => {
      const owner = owners.get(name);
      if (owner !== undefined && head === undefined) {
        const message =
          `"${owner}" brings "${name}" whole and "${id}" changes the base's: say whose to use, ` +
          `{ head: "${owner}" } or { head: "${id}" }`;
        throw new TaskError(message, { task: id });
      }
      return owner === undefined;
    };
    const parameters = blob.parameters.filter(({ name, role }) =>
      role === "saved" ? head === undefined || head === id : stays(name),
    );
    const terms = blob.terms.filter((term) => stays(weightOf(term)));
    // The same array where nothing goes: what is made of it need not be made again.
    return { ...part, blob: { ...blob, parameters, terms: terms.length === blob.terms.length ? blob.terms : terms } };
  });
}

/** The changes of a selection by name. */
function changesOf(parts: readonly ActiveTask[], nameOf: (change: Change) => string): Map<string, Change[]> {
  const changes = new Map<string, Change[]>();
  for (const part of parts) {
    for (const parameter of part.blob.parameters) {
      const name = nameOf({ part, parameter });
      changes.set(name, [...(changes.get(name) ?? []), { part, parameter }]);
    }
  }
  return changes;
}

/** A parameter as tasks have it, in new memory. */
export interface Merged {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/**
 * What tasks bring, by the pack's names, without the base: saved modules as they are. Of the others the caller has the base's
 * values.
 * @throws TaskError when saved modules cannot be blended
 */
export function mergeAll(
  parts: readonly ActiveTask[],
  pack: Pack,
  base: (name: string) => Merged | undefined,
): Map<string, Merged> {
  const merged = new Map<string, Merged>();
  for (const [name, changes] of changesOf(parts, ({ parameter }) => parameter.name)) {
    const [{ parameter }] = changes as [Change];
    if (parameter.role === "saved")
      merged.set(name, { shape: parameter.shape, values: blendHeads(name, decode(changes[0]!), changes, pack) });
    else {
      const original = base(name);
      if (original) merged.set(name, addDifferences(name, changes, original));
    }
  }
  return merged;
}

/** What the tasks of a selection put in the place of the base's parameters. */
export interface Resolved {
  /** By the base's names. */
  readonly parameters: ReadonlyMap<string, Replacement>;
  /** Adapted weights, by module, where they are folded. Where they are not, they are among `parameters`. */
  readonly weights: ReadonlyMap<number, Replacement>;
}

/** Where the base's values are. */
export interface BaseValues {
  readonly host: WeightHost | undefined;
  readonly bench: Workbench;
  readonly folded: boolean;
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
  readonly #slots: readonly Slot[];
  /** Of parameters beside the adapted weights, whose pristine values the slots have. */
  readonly #pristine = new Map<string, CpuView>();

  constructor(base: Locator, slots: readonly Slot[]) {
    this.#base = base;
    this.#slots = slots;
  }

  /** Makes what `resolve` returned the active parameters. */
  activate({ parameters, weights }: Resolved): void {
    for (const { view } of [...this.active.values(), ...weights.values()]) {
      const { data } = view;
      this.#pool.set(data.length, [...(this.#pool.get(data.length) ?? []), data]);
    }
    this.active = parameters;
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
   * What makes `parts` active; nothing changes until it is given to `activate`.
   * @param parts as `settle` gives them
   * @throws TaskError when heads cannot be blended, BaseMismatchError when a parameter does not fit the base
   */
  async resolve(
    parts: readonly ActiveTask[],
    pack: Pack,
    base: BaseValues,
    signal: AbortSignal | undefined,
  ): Promise<Resolved> {
    const alone = parts.length === 1 && parts[0]!.strength === 1;
    const changes = changesOf(parts, ({ part, parameter }) =>
      this.#baseName(parameter, part.id, alone, base.host !== undefined),
    );
    const parameters = new Map<string, Replacement>();
    const weights = new Map<number, Replacement>();
    for (const [name, list] of changes) {
      const index = this.#slots.findIndex(({ weight }) => weight.name === name);
      const slot = this.#slots[index];
      const known = this.#base.parameters.get(name);
      const whole = isWhole(name, list);
      const original = slot && whole ? undefined : await this.#original(name, slot, base, signal);
      const merged = whole
        ? { shape: list[0]!.parameter.shape, values: blendHeads(name, this.#decode(list[0]!), list, pack) }
        : addDifferences(name, list, original && { shape: original.shape, values: viewValues(original) });
      const replacement = this.#replacement(name, slot ? asStored(slot, list, merged) : merged, known);
      if (slot && base.folded) weights.set(index, replacement);
      else parameters.set(name, replacement);
    }
    return { parameters, weights };
  }

  /** The base's value of a parameter; undefined where it has none. */
  async #original(
    name: string,
    slot: Slot | undefined,
    { host, bench: { backend } }: BaseValues,
    signal: AbortSignal | undefined,
  ): Promise<CpuView | undefined> {
    if (slot) {
      const { pristine, weight } = slot;
      const data = pristine
        ? (backend.view?.(at(pristine), weight.byteLength) ?? (await backend.read!(at(pristine), weight.byteLength)))
        : await readWeight(host!, slot, undefined, { signal });
      return { ...weight, data, byteOffset: 0 };
    }
    if (this.#base.parameters.has(name) && !this.#pristine.has(name)) {
      const view = (await host!.read(name, undefined, { signal })) as CpuView;
      // A writable host reads its live memory: what is pristine now must be copied.
      this.#pristine.set(name, host!.begin ? { ...view, data: view.data.slice() } : view);
    }
    return this.#pristine.get(name);
  }

  /** @param alone whether the task is the only one, at strength 1: then a whole bias needs no base */
  #baseName(parameter: TaskParameter, task: string, alone: boolean, based: boolean): string {
    const { name, role } = parameter;
    // The weight of an adapted module is where the module was found, perhaps by hand.
    const slot = this.#slots.find(({ module }) => `${module.name}.weight` === name);
    const found = slot ? { name: slot.weight.name } : this.#base.names.find(name);
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

  #replacement(name: string, { shape, values }: Merged, known: Parameter | undefined): Replacement {
    const { dtype } = known ?? { dtype: "f32" };
    try {
      const length = rowBytes(dtype, values.length);
      const pooled = this.#pool.get(length)?.pop();
      if (!pooled) this.allocated += length;
      return { view: { dtype, shape, data: encodeFloats(dtype, values, pooled), byteOffset: 0 }, added: !known };
    } catch (cause) {
      throw new TaskError(`"${name}" does not fit the base's ${dtype}: ${(cause as Error).message}`, {
        task: name,
        cause,
      });
    }
  }
}

/** Whether tasks bring a parameter whole. @throws BaseMismatchError when some do, under one name, and others change it under another */
function isWhole(name: string, changes: readonly Change[]): boolean {
  const [first] = changes as [Change];
  const whole = first.parameter.role === "saved";
  const other = changes.find(({ parameter }) => (parameter.role === "saved") !== whole);
  if (!other) return whole;
  const names = [first, other].map(({ part, parameter }) => `task "${part.id}" calls it "${parameter.name}"`);
  throw new BaseMismatchError(`"${name}": ${names.join(", ")}; pack the adapters under one name`, { module: name });
}

/**
 * A changed adapted weight the way round that the base stores it.
 * @throws BaseMismatchError when it is not the weight that the module's other tasks adapt
 */
function asStored({ module, weight }: Slot, changes: readonly Change[], { shape, values }: Merged): Merged {
  const refuse = (task: string, why: string): BaseMismatchError => {
    const message = `task "${task}" brings "${weight.name}", which other tasks adapt as the module "${module.name}": ${why}`;
    return new BaseMismatchError(message, { module: module.name, expected: weight.shape, found: shape });
  };
  const alias = changes.find(({ parameter }) => parameter.name !== `${module.name}.weight`);
  if (alias) {
    const why = `its own name is "${alias.parameter.name}"; pack the adapters under one name`;
    throw refuse(alias.part.id, why);
  }
  const { part, parameter } = changes[0]!;
  const turned = weight.transposed !== (module.layout === "in-out" || module.layout === "embedding");
  if (turned && parameter.role === "rows") throw refuse(part.id, "rows need it stored as [rows, width]");
  const [rows = 0, columns = 0] = shape;
  const stored = turned ? [...shape].reverse() : shape;
  if (!sameShape(stored, weight.shape)) {
    const why = `it is [${stored.join(", ")}], the base's [${weight.shape.join(", ")}]; leave it out with \`ignore\``;
    throw refuse(part.id, why);
  }
  if (!turned) return { shape, values };
  const turnedValues = Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]!);
  return { shape: stored, values: turnedValues };
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
function addDifferences(name: string, changes: readonly Change[], base: Merged | undefined): Merged {
  const shape = base?.shape ?? changes[0]!.parameter.shape;
  const width = shape[shape.length - 1]!;
  const original = base?.values ?? new Float32Array(shape.reduce((a, b) => a * b, 1));
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

/**
 * Merges parameters that tasks override apart from their terms: selects a task's parameter, or blends heads, biases and
 * token rows. Uses names and numbers, no base.
 */

import { BaseMismatchError, described, isPlain, TaskError } from "../errors.ts";
import { readTensor, type TaskParameter } from "../format/format.ts";
import { elementsOf, sum } from "../tensor/dtypes.ts";
import { sameShape } from "./base.ts";
import type { ActiveTask } from "./kernel-session.ts";
import type { PackView } from "./part.ts";

/** A task's version of a parameter. */
export interface ParameterChange {
  readonly part: ActiveTask;
  readonly parameter: TaskParameter;
}

/** The strengths of a blend by id. @throws TypeError, RangeError for what is none */
export function strengthsOf(selection: Readonly<Record<string, number>>): [string, number][] {
  if (!isPlain(selection)) {
    throw new TypeError(`task: expected an id, null for the base, or strengths by id, got ${described(selection)}`);
  }
  const strengths = Object.entries(selection);
  if (strengths.length === 0) throw new RangeError("a blend without tasks; use null for the base");
  for (const [id, strength] of strengths) {
    if (Number.isFinite(strength)) continue;
    throw new RangeError(`the strength of "${id}": expected a finite number, got ${described(strength)}`);
  }
  return strengths;
}

/**
 * @param which modules, by index, whose magnitudes cannot be used
 * @throws TaskError for a task that uses DoRA on one of them
 */
export function refuseMagnitudes(
  parts: readonly ActiveTask[],
  pack: PackView,
  which: (module: number) => boolean,
  why: string,
): void {
  for (const { id, blob } of parts) {
    const scaled = blob.terms.find((term) => term.magnitude && which(term.module));
    if (!scaled) continue;
    throw new TaskError(`task "${id}" uses DoRA on "${pack.modules[scaled.module]!.name}": ${why}`, { task: id });
  }
}

/**
 * Makes tasks compatible: none changes a parameter that another replaces. A task by itself never does both (SPEC.md,
 * section 6.2), and PEFT has no two such adapters on one model.
 * @param head the task of a blend whose saved modules are used: those of the others go, and what the others do to its
 *   own
 * @throws TaskError for a blend without `head` in which tasks do both, a head that is none of the tasks, a blend or
 *   strength with DoRA
 */
export function reconcile(parts: readonly ActiveTask[], pack: PackView, head: string | undefined): ActiveTask[] {
  if (head !== undefined && !parts.some(({ id }) => id === head))
    throw new TaskError(`head "${head}" is not one of the tasks switched to`, { task: head });
  if (parts.length !== 1 || parts[0]!.strength !== 1)
    refuseMagnitudes(parts, pack, () => true, "it cannot be blended or scaled, since its change is not additive");
  if (!parts.some(({ blob }) => blob.parameters.length > 0)) return [...parts];
  const owners = new Map<string, string>();
  const isUsed = (id: string): boolean => head === undefined || head === id;
  for (const { id, blob } of parts)
    for (const { name, role } of isUsed(id) ? blob.parameters : [])
      if (role === "saved" && !owners.has(name)) owners.set(name, id);
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
    const parameters = blob.parameters.filter(({ name, role }) => (role === "saved" ? isUsed(id) : stays(name)));
    const terms = blob.terms.filter(({ module }) => stays(`${pack.modules[module]!.name}.weight`));
    // The same array where nothing goes: what is made of it need not be made again.
    return { ...part, blob: { ...blob, parameters, terms: terms.length === blob.terms.length ? blob.terms : terms } };
  });
}

/** The changes of a selection by name. */
export function changesOf(
  parts: readonly ActiveTask[],
  nameOf: (change: ParameterChange) => string,
): Map<string, ParameterChange[]> {
  const changes = new Map<string, ParameterChange[]>();
  for (const part of parts) {
    for (const parameter of part.blob.parameters) {
      const change = { part, parameter };
      const name = nameOf(change);
      changes.set(name, [...(changes.get(name) ?? []), change]);
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
 * A saved module: one task's, or the weighted mean of several with the same labels. Strength alone never scales a head.
 * @param values the first task's; overwritten
 * @throws TaskError when labels or shapes differ, or the strengths add up to nothing
 */
export function blendHeads(
  name: string,
  values: Float32Array,
  changes: readonly ParameterChange[],
  { tasks }: PackView,
): Float32Array {
  const first = changes[0]!;
  if (changes.length === 1) return values;
  const labels = ({ part }: ParameterChange): string => JSON.stringify(tasks.get(part.id)?.metadata.labels ?? null);
  for (const change of changes) {
    if (labels(change) === labels(first) && sameShape(change.parameter.shape, first.parameter.shape)) continue;
    throw new TaskError(
      `"${first.part.id}" and "${change.part.id}" have different labels: say whose "${name}" to use, ` +
        `{ head: "${first.part.id}" }`,
      { task: change.part.id },
    );
  }
  const total = sum(changes, ({ part }) => part.strength);
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
 * Biases and token rows: base + Σ strength · (task − base), and differences of biases behind that; exactly the task's
 * values, and its difference, for one task at strength 1.
 * @param base the pristine parameter, where there is a base
 * @throws BaseMismatchError when a task's parameter does not fit the base's
 */
export function addDifferences(name: string, changes: readonly ParameterChange[], base: Merged | undefined): Merged {
  const shape = base?.shape ?? changes[0]!.parameter.shape;
  const width = shape[shape.length - 1]!;
  const original = base?.values ?? new Float32Array(elementsOf(shape));
  const values = original.slice();
  const isDelta = ({ parameter }: ParameterChange): boolean => parameter.role === "bias-delta";
  const others = changes.filter((change) => !isDelta(change));
  for (const change of [...others, ...changes.filter(isDelta)]) {
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
      if (isDelta(change)) values[at]! += part.strength * v;
      else if (part.strength === 1 && others.length === 1) values[at] = v;
      else values[at]! += part.strength * (v - original[at]!);
    });
  }
  return { values, shape };
}

/** The values of a task's version. @param out Default: new memory */
export function decode({ part, parameter: { tensor } }: ParameterChange, out?: Float32Array): Float32Array {
  return readTensor(part.blob.bytes, tensor, out);
}

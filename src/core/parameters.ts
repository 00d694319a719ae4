/**
 * The rest of a task: classifier heads, biases and token rows, whole parameters that change with the task without being
 * adapted modules. Computed in plain JS, since they are small; the result is the list of parameters that differ from
 * the base. Loaded when a task overrides some.
 */

import { at } from "../backends/backend.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import type { TaskParameter } from "../format/format.ts";
import { encodeFloats, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";
import { type CpuView, type Parameter, sameShape, viewValues } from "./base.ts";
import type { ActiveTask } from "./kernel-session.ts";
import { addDifferences, blendHeads, changesOf, decode, type Merged, type ParameterChange } from "./merge.ts";
import { type TiedBase, tieRows } from "./mismatch.ts";
import { type Resolved, type RuntimeContext, readWeight, type WeightBinding } from "./weights.ts";

/** Parameters of the base that tasks touch, pristine, and the active task's versions of them. */
export class Parameters {
  /** Parameters of the active task, by the base's names. */
  active: ReadonlyMap<string, CpuView> = new Map();
  /** Bytes of new memory since the last `activate`. */
  allocated = 0;
  readonly #context: RuntimeContext;
  /** Memory of earlier tasks' parameters, by length: what `resolve` fills while the active ones must stay whole. */
  readonly #pool = new Map<number, Uint8Array[]>();
  /** Decoded values on their way from a blob to a parameter. */
  #values = new Float32Array(0);
  /** Pristine values of parameters; those of adapted weights are in the bindings. */
  readonly #pristine = new Map<string, CpuView>();
  /** Names of parameters that are tied to an embedding, by its name. */
  readonly #tied = new Map<string, readonly string[]>();

  constructor(context: RuntimeContext) {
    this.#context = context;
  }

  /** Makes what `resolve` returned the active parameters. */
  activate({ parameters, weights }: Resolved): void {
    const views = [...this.active.values()];
    for (const data of [...views.map(({ data }) => data), ...weights.values()])
      this.#pool.set(data.length, [...(this.#pool.get(data.length) ?? []), data]);
    this.active = parameters;
    this.allocated = 0;
  }

  /** The base's value of a parameter that a task has touched. */
  pristine(name: string): CpuView | undefined {
    return this.#pristine.get(name);
  }

  /** The values of a parameter of the active task. */
  values(name: string): Float32Array | undefined {
    const view = this.active.get(name);
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
    for (const { data } of this.active.values()) bytes += data.length;
    return bytes;
  }

  /**
   * Prepares what tasks override; nothing changes until the result is given to `activate`.
   * @param tasks as `reconcile` gives them
   * @throws TaskError when heads cannot be blended, BaseMismatchError when a parameter does not fit the base
   */
  async resolve(tasks: readonly ActiveTask[], signal: AbortSignal | undefined): Promise<Resolved> {
    const { bindings, resolver, mode, view } = this.#context;
    const known = resolver?.parameters;
    const alone = tasks.length === 1 && tasks[0]!.strength === 1;
    const changes = changesOf(tasks, ({ part, parameter }) => this.#baseName(parameter, part.id, alone));
    const tables = [...changes.values()].flat().some(({ parameter }) => parameter.role === "rows")
      ? await tieRows(changes, this.#tiedBase(signal))
      : new Set<string>();
    const parameters = new Map<string, CpuView>();
    const weights = new Map<number, Uint8Array>();
    for (const [name, list] of changes) {
      const binding = this.#binding(name);
      const parameter = known?.get(name);
      const whole = isWhole(name, list);
      // A head is read too: the next task may put it back.
      const original = whole && binding ? undefined : await this.#original(name, signal);
      const values = whole
        ? { shape: list[0]!.parameter.shape, values: blendHeads(name, this.#decode(list[0]!), list, view) }
        : this.#changed(name, binding, list, original);
      const stored = binding
        ? asStored(binding, list, values)
        : whole && parameter
          ? headAsStored(parameter, list[0]!, values)
          : values;
      const replacement = this.#encoded(name, stored, parameter?.dtype ?? "f32");
      if (binding && mode === "folded") weights.set(bindings.indexOf(binding), replacement.data);
      else parameters.set(name, replacement);
    }
    const names = [...changes.keys()];
    const added = names.filter((name) => !known?.has(name));
    return { parameters, weights, tables, added, replaced: names.filter((name) => known?.has(name)) };
  }

  /** The base's values with what tasks change of them; rows of a weight that is stored as [in, out] are its columns. */
  #changed(
    name: string,
    binding: WeightBinding | undefined,
    list: readonly ParameterChange[],
    original: CpuView | undefined,
  ): Merged {
    const base = original && { shape: original.shape, values: viewValues(original) };
    const { layout = binding?.module.layout } = binding?.weight ?? this.#context.resolver?.parameters.get(name) ?? {};
    const across = base && layout === "in-out" && list.some(({ parameter }) => parameter.role === "rows");
    return across ? turn(addDifferences(name, list, turn(base))) : addDifferences(name, list, base);
  }

  /** The base, for a search for what is tied in it. */
  #tiedBase(signal: AbortSignal | undefined): TiedBase {
    const { host, ignored, resolver } = this.#context;
    const original = async (name: string): Promise<CpuView> => (await this.#original(name, signal))!;
    const isKept = (name: string): boolean => this.#pristine.has(name) || this.#binding(name) !== undefined;
    return {
      ...{ parameters: resolver!.parameters, host, ignored, tied: this.#tied },
      moduleOf: (name) => this.#binding(name)?.module.name,
      table: original,
      read: async (name) =>
        isKept(name) ? original(name) : ((await host!.read(name, undefined, { signal })) as CpuView),
    };
  }

  /** The adapted weight that a parameter is. */
  #binding(name: string): WeightBinding | undefined {
    return this.#context.bindings.find(({ weight }) => weight.name === name);
  }

  /** The base's value of a parameter; undefined where it has none. */
  async #original(name: string, signal: AbortSignal | undefined): Promise<CpuView | undefined> {
    const { host, kernels, resolver } = this.#context;
    const binding = this.#binding(name);
    if (binding) {
      const { pristine, weight } = binding;
      const data = pristine
        ? await kernels.bytesAt(at(pristine), weight.byteLength)
        : await readWeight(host!, binding, undefined, { signal });
      return { ...weight, data, byteOffset: 0 };
    }
    if (resolver?.parameters.has(name) && !this.#pristine.has(name)) {
      const view = (await host!.read(name, undefined, { signal })) as CpuView;
      // A writable host reads its live memory: what is pristine now must be copied.
      this.#pristine.set(name, host!.begin ? { ...view, data: view.data.slice() } : view);
    }
    return this.#pristine.get(name);
  }

  /** @param alone whether the task is the only one, at strength 1: then a whole bias needs no base */
  #baseName({ name, role }: TaskParameter, task: string, alone: boolean): string {
    const { resolver } = this.#context;
    if (!resolver) {
      if (role === "saved" || (role === "bias" && alone)) return name;
      const message = `task "${task}" changes "${name}" (${role}), which needs the base's values: pass \`base\``;
      throw new TaskError(message, { task });
    }
    const module = name.replace(/\.weight$/, "");
    // A name that is mapped by hand must be found: no other may take its place.
    if (resolver.byHand?.has(module)) resolver.nameOf(module);
    const found = resolver.find(name);
    if ("name" in found) return found.name;
    if (role === "saved" && !found.ambiguous) return name;
    throw new BaseMismatchError(
      `task "${task}" changes the parameter "${name}" (${role}), which ` +
        (found.ambiguous ? "several parameters of the base match" : "the base does not have") +
        `; candidates: ${found.candidates().join(", ") || "none"}`,
      { module: name, candidates: found.candidates() },
    );
  }

  /** Decodes into memory that the next call uses again. */
  #decode(change: ParameterChange): Float32Array {
    const { rows, width } = change.parameter.tensor;
    if (this.#values.length < rows * width) {
      this.#values = new Float32Array(rows * width);
      this.allocated += this.#values.byteLength;
    }
    return decode(change, this.#values).subarray(0, rows * width);
  }

  /** Values as the base's type, in memory of an earlier task where there is some. */
  #encoded(name: string, { shape, values }: Merged, dtype: FloatDtype): CpuView {
    try {
      const length = rowBytes(dtype, values.length);
      const pooled = this.#pool.get(length)?.pop();
      if (!pooled) this.allocated += length;
      return { dtype, shape, data: encodeFloats(dtype, values, pooled as Uint8Array<ArrayBuffer>), byteOffset: 0 };
    } catch (cause) {
      throw new TaskError(`"${name}" does not fit the base's ${dtype}: ${(cause as Error).message}`, {
        task: name,
        cause,
      });
    }
  }
}

/**
 * Says whether tasks bring a parameter whole.
 * @throws BaseMismatchError when some do, and others change it under another name; or when two names of one task mean
 *   it, in one role
 */
function isWhole(name: string, changes: readonly ParameterChange[]): boolean {
  const [first] = changes as [ParameterChange];
  const whole = first.parameter.role === "saved";
  const other = changes.find(({ part, parameter: { role } }, i) => {
    const again = changes.slice(0, i).some((one) => one.part === part && one.parameter.role === role);
    return again || (role === "saved") !== whole;
  });
  if (!other) return whole;
  const names = [first, other].map(({ part, parameter }) => `task "${part.id}" calls it "${parameter.name}"`);
  throw new BaseMismatchError(`"${name}": ${names.join(", ")}; pack the adapters under one name`, { module: name });
}

/**
 * A changed adapted weight the way round that the base stores it.
 * @throws BaseMismatchError when it is not the weight that the module's other tasks adapt
 */
function asStored(
  { module, weight }: WeightBinding,
  changes: readonly ParameterChange[],
  { shape, values }: Merged,
): Merged {
  const alias = changes.find(({ parameter }) => parameter.name !== `${module.name}.weight`);
  const { part, parameter } = alias ?? changes[0]!;
  const turned =
    parameter.role !== "rows" && weight.transposed !== (module.layout === "in-out" || module.layout === "embedding");
  const stored = turned ? [...shape].reverse() : shape;
  if (!alias && sameShape(stored, weight.shape)) return turned ? turn({ shape, values }) : { shape, values };
  const why = alias
    ? `it calls it "${parameter.name}"; pack the adapters under one name`
    : `it is [${stored.join(", ")}], the base's [${weight.shape.join(", ")}]; leave it out with \`ignore\``;
  throw new BaseMismatchError(
    `task "${part.id}" brings "${weight.name}", which other tasks adapt as the module "${module.name}": ${why}`,
    { module: module.name, expected: weight.shape, found: shape },
  );
}

/**
 * A head the way round that the base stores it: checkpoints have [out, in], or [out, in, 1, 1] for a convolution. It
 * may have another number of labels than the base's.
 * @throws BaseMismatchError when it takes other inputs than the base's
 */
function headAsStored({ name, shape: stored, layout }: Parameter, { part }: ParameterChange, head: Merged): Merged {
  const [out = 0, inputs = 0, ...window] = head.shape;
  const sameWayRound = out !== inputs && sameShape(head.shape, stored);
  if (layout !== "in-out" || head.shape.length < 2 || window.some((n) => n > 1) || sameWayRound) return head;
  if (inputs === stored[0]) return turn(head);
  const message =
    `task "${part.id}" brings "${name}" as [out ${out}, in ${inputs}], but the base's is [${stored.join(", ")}] ` +
    "(stored as [in, out]); leave it out with `ignore`";
  throw new BaseMismatchError(message, { module: name, expected: stored, found: head.shape });
}

/** A matrix, transposed. */
function turn({ shape: [rows = 0, columns = 0], values }: Merged): Merged {
  const turned = Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]!);
  return { shape: [columns, rows], values: turned };
}

/**
 * What a task gives to each input of a grafted model: coefficients in, arrays out, for one task or for one task per row of
 * a batch. No model runtime here.
 */

import { BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import type { TaskInput } from "../onnx/graft.ts";
import type { Pack } from "../pack/pack.ts";
import { savedModules } from "../runtime/parameters.ts";
import { loadParts, type Selection } from "../runtime/selection.ts";
import { type ActiveTask, stage } from "../runtime/stage.ts";
import { type PristineWeight, unfold } from "../runtime/unfold.ts";
import type { Workbench } from "../runtime/workbench.ts";
import type { Term } from "../tensor/term.ts";
import { type BaseValues, broughtBy, moduleOf, turn } from "./plan.ts";

/** The value of one input for one task, without the leading dimension `tasks`. */
export interface InputValue {
  readonly dims: readonly number[];
  readonly data: Float32Array | BigInt64Array;
}

/** The values of all inputs, by name, and how many columns each head has. */
export interface TaskValues {
  readonly inputs: ReadonlyMap<string, InputValue>;
  /** By module name. */
  readonly labels: ReadonlyMap<string, number>;
}

/** Stands where a task's head has fewer columns than its neighbours': no maximum, and nothing after a softmax. */
const NO_LABEL = -3.4028234663852886e38;

/** Makes the values of a plan's inputs. */
export class TaskEvaluator {
  readonly #pack: Pack;
  readonly #base: BaseValues;
  readonly #inputs: readonly TaskInput[];
  readonly #bench: Workbench;
  readonly #modules = new Map<string, { index: number; module: PackModule }>();
  /** What there are inputs for, as packs say what a task brings. */
  readonly #ready: ReadonlySet<string>;

  constructor(pack: Pack, base: BaseValues, inputs: readonly TaskInput[], bench: Workbench) {
    this.#pack = pack;
    this.#base = base;
    this.#inputs = inputs;
    this.#bench = bench;
    for (const [index, module] of pack.modules.entries()) this.#modules.set(module.name, { index, module });
    const prefix = new Map([
      ["scale", "magnitude "],
      ["A", "private "],
    ]);
    const telling = inputs.filter(({ kind }) => kind !== "core" && kind !== "B");
    this.#ready = new Set(telling.map(({ of, kind }) => (prefix.get(kind) ?? "") + of));
  }

  /**
   * @throws TaskError for an unknown id, a blend that cannot be; SourceError, FormatError when a task cannot be read
   * @throws BaseMismatchError when a task changes what the model was not prepared for
   */
  async evaluate(
    selection: Selection,
    options: { head?: string | undefined; signal?: AbortSignal | undefined },
  ): Promise<TaskValues> {
    const { head, signal } = options;
    const parts = await loadParts(this.#pack, selection, options, this.#base.ignored);
    this.#refuseUnprepared(parts);
    // In memory of its own each time: values of earlier switches may still be on their way into a run.
    const heads = new Map<string, InputValue>();
    for (const [name, { shape, values: data }] of savedModules(parts, this.#pack, head))
      heads.set(name, { dims: shape, data });
    signal?.throwIfAborted();
    const terms = this.#base.mode === "folded" ? new Map<number, Term>() : this.#terms(parts);
    const inputs = new Map<string, InputValue>();
    const labels = new Map<string, number>();
    for (const input of this.#inputs) inputs.set(input.name, this.#value(input, parts, terms, heads));
    for (const { kind, name, of } of this.#inputs)
      if (kind === "headWeight") labels.set(of, inputs.get(name)!.dims[1]!);
    return { inputs, labels };
  }

  /** A task that was added to the pack after the model was prepared may change more than the others. */
  #refuseUnprepared(parts: readonly ActiveTask[]): void {
    const { mode, heads } = this.#base;
    if (mode === "folded") return;
    for (const { id, blob } of parts) {
      for (const brought of broughtBy(blob, this.#pack.modules)) {
        const [role, name] = [brought.slice(0, brought.indexOf(" ")), brought.slice(brought.indexOf(" ") + 1)];
        if (this.#ready.has(brought) || this.#ready.has(name) || heads.has(moduleOf(name))) continue;
        const hint = role === "private" ? " with privateTerms: true" : "";
        const message = `task "${id}" brings "${name}" (${role}), which no task did when this session was made; make a new one${hint}`;
        throw new BaseMismatchError(message, { module: name });
      }
    }
  }

  #terms(parts: readonly ActiveTask[]): Map<number, Term> {
    const { modules } = this.#pack;
    const plans = stage(parts, modules, this.#bench.staging);
    const weightOf = (index: number): PristineWeight => {
      const { name, in: inputs, out } = modules[index]!;
      const { buffer, byteOffset, byteLength } = this.#base.weights.get(name)!;
      const data = new Uint8Array(buffer, byteOffset, byteLength);
      return { dtype: "f32", shape: [out, inputs], data, byteOffset: 0 };
    };
    return unfold(plans, this.#bench, this.#base.mode === "core" ? "core" : "factors", weightOf);
  }

  #value(
    { of, kind, dims }: TaskInput,
    parts: readonly ActiveTask[],
    terms: ReadonlyMap<number, Term>,
    heads: ReadonlyMap<string, InputValue>,
  ): InputValue {
    const found = this.#modules.get(of);
    const term = found && terms.get(found.index);
    const own = dims.slice(1);
    const zeros = (): InputValue => {
      const fixed = own.map((d) => (typeof d === "number" ? d : 1));
      return { dims: fixed, data: new Float32Array(fixed.reduce((a, b) => a * b, 1)) };
    };
    switch (kind) {
      case "core":
        return term?.core ? { dims: own as number[], data: term.core } : zeros();
      case "A":
        return term ? { dims: [found.module.in, term.rank], data: turn(term.A, term.rank, found.module.in) } : zeros();
      case "B":
        return term ? { dims: [term.rank, found.module.out], data: term.Bt } : zeros();
      case "scale":
        return { dims: own as number[], data: term?.rowScale ?? new Float32Array(found!.module.out).fill(1) };
      case "bias":
        return { dims: own as number[], data: this.#change(of, parts, own[1] as number) };
      case "indices":
      case "rows":
        return this.#rows(of, kind, parts, zeros());
      case "headWeight": {
        const base = this.#base.heads.get(of)!;
        const head = heads.get(`${of}.weight`);
        const inputs = own[0] as number;
        if (!head) return { dims: [inputs, base.labels], data: base.weight };
        const [out = 0, width] = head.dims;
        if (width !== inputs) throw this.#misfit(`${of}.weight`, head.dims, ["labels", inputs]);
        return { dims: [inputs, out], data: turn(head.data as Float32Array, out, inputs) };
      }
      case "headBias": {
        const base = this.#base.heads.get(of)!;
        const head = heads.get(`${of}.bias`);
        return { dims: [1, head?.dims[0] ?? base.labels], data: head?.data ?? base.bias! };
      }
    }
  }

  /** Σ strength · (the task's bias − the base's) */
  #change(name: string, parts: readonly ActiveTask[], size: number): Float32Array {
    const base = this.#base.biases.get(name)!;
    const change = new Float32Array(size);
    for (const { strength, blob } of parts) {
      for (const parameter of blob.parameters) {
        if (parameter.name !== name) continue;
        if (parameter.shape.length !== 1 || parameter.shape[0] !== size)
          throw this.#misfit(name, parameter.shape, [size]);
        readTensor(blob.bytes, parameter.tensor).forEach(
          (v, i) => (change[i]! += strength * (parameter.role === "bias-delta" ? v : v - base[i]!)),
        );
      }
    }
    return change;
  }

  /** Indices that embeddings never see where there is no row; each row ends with its strength. */
  #rows(name: string, kind: "indices" | "rows", parts: readonly ActiveTask[], none: InputValue): InputValue {
    const width = (kind === "rows" ? none.dims[1]! : 0) - 1;
    const indices: bigint[] = [];
    const values: Float32Array[] = [];
    for (const { strength, blob } of parts) {
      for (const parameter of blob.parameters) {
        if (parameter.name !== name || !parameter.indices) continue;
        indices.push(...parameter.indices.map(BigInt));
        if (kind === "rows") {
          if (parameter.shape[1] !== width) throw this.#misfit(name, parameter.shape, ["rows", width]);
          values.push(
            readTensor(blob.bytes, parameter.tensor).map((v) => strength * v),
            new Float32Array([strength]),
          );
        }
      }
    }
    if (kind === "indices") {
      const data = BigInt64Array.from(indices.length > 0 ? indices : [-1n]);
      return { dims: [1, data.length], data };
    }
    if (indices.length === 0) return none;
    const data = new Float32Array(indices.length * (width + 1));
    let row = 0;
    for (let i = 0; i < values.length; i += 2) {
      const [block, strength] = [values[i]!, values[i + 1]![0]!];
      for (let at = 0; at < block.length; at += width, row++) {
        data.set(block.subarray(at, at + width), row * (width + 1));
        data[row * (width + 1) + width] = strength;
      }
    }
    return { dims: [indices.length, width + 1], data };
  }

  #misfit(name: string, found: readonly number[], expected: readonly (string | number)[]): BaseMismatchError {
    const message = `a task brings "${name}" of [${found.join(", ")}], the model's needs [${expected.join(", ")}]`;
    return new BaseMismatchError(message, { module: name, expected, found });
  }
}

/** A value as an input takes it: one task, or several one below the other, padded to the largest. */
export function stackValues(input: TaskInput, rows: readonly InputValue[]): InputValue {
  const [first] = rows;
  if (rows.length === 1) return { dims: [1, ...first!.dims], data: first!.data };
  const dims = first!.dims.map((_, i) => Math.max(...rows.map((row) => row.dims[i]!)));
  const [height = 1, width = 1] = dims;
  const size = height * width;
  if (input.kind === "indices") {
    const data = new BigInt64Array(rows.length * size).fill(-1n);
    rows.forEach((row, t) => data.set(row.data as BigInt64Array, t * size));
    return { dims: [rows.length, ...dims], data };
  }
  const data = new Float32Array(rows.length * size);
  if (input.kind === "headBias") data.fill(NO_LABEL);
  rows.forEach((row, t) => {
    const [h = 1, w = 1] = row.dims;
    const values = row.data as Float32Array;
    for (let i = 0; i < h; i++) data.set(values.subarray(i * w, (i + 1) * w), t * size + i * width);
  });
  return { dims: [rows.length, ...dims], data };
}

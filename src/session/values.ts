/**
 * What a task gives to each input of a prepared model: coefficients in, arrays out, for one task or for one task per row of a
 * batch. No engine here.
 */

import { type Merged, mergeAll } from "../core/merge.ts";
import { loadParts, type Selection, type SwitchOptions } from "../core/selection.ts";
import { type ActiveTask, hasCore, type ModulePlan, reuse, stage, writeCore } from "../core/stage.ts";
import type { PristineWeight } from "../core/terms.ts";
import type { Workbench } from "../core/workbench.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import type { TaskBlob, TaskParameter } from "../format/format.ts";
import { bringsOf, isOfModule, moduleOf, needsFactors, parseBrought, readTensor } from "../format/format.ts";
import { misfitLabels } from "../format/heads.ts";
import type { CoreBlock, TaskInput } from "../onnx/adapted.ts";
import { pacer } from "../pace.ts";
import { transpose } from "../tensor/derived.ts";
import type { Term } from "../tensor/term.ts";
import type { PreparedModel } from "./prepare.ts";

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

/** What a selection is made of, while its inputs are computed. */
interface Evaluation {
  readonly tasks: readonly ActiveTask[];
  /** By module name: cores are written where they go, and terms are what there is beside them, A as [in, rank]. */
  readonly cores: ReadonlyMap<string, WriteCore>;
  readonly terms: ReadonlyMap<string, Term>;
  /** Saved modules and biases as the tasks have them, by name. */
  readonly merged: ReadonlyMap<string, Merged>;
  /** What may be written over. */
  readonly old: TaskValues["inputs"] | undefined;
}

/** Writes a core [K_A, K_B] among others: its first number to `at`, its rows `stride` apart. */
export type WriteCore = (out: Float32Array, at: number, stride: number) => void;

/** Stands where a task's head has fewer columns than its neighbours': no maximum, and nothing after a softmax. */
const NO_LABEL = -3.4028234663852886e38;

/** What an input of a kind is told by, before the name of its module. */
const READY: Readonly<Record<string, string>> = { scale: "magnitude ", A: "private " };

/** Makes the values of a prepared model's inputs. */
export class TaskEvaluator {
  readonly #model: Pick<PreparedModel, "view" | "mode" | "base" | "inputs">;
  readonly #bench: Workbench | undefined;
  /** What there are inputs for, as packs say what a task brings. */
  readonly #ready: ReadonlySet<string>;
  /** The bench works for one selection at a time, and has pauses. */
  #queue: Promise<unknown> = Promise.resolve();

  /** @param bench expands terms; not needed in mode "folded", whose inputs are heads alone */
  constructor({ view, mode, base, inputs }: PreparedModel, bench: Workbench | undefined) {
    // Not all of the prepared model: its modules know the graph, and so the model's whole file.
    this.#model = { view, mode, base, inputs };
    this.#bench = bench;
    const telling = inputs.filter(({ kind }) => kind !== "core" && kind !== "B");
    this.#ready = new Set(telling.map(({ of, kind }) => (READY[kind] ?? "") + of));
  }

  /**
   * Reads the tasks of a selection.
   * @throws TaskError for an unknown id, a blend that cannot be; SourceError, FormatError when a task cannot be read
   * @throws BaseMismatchError when a task changes what the model was not prepared for
   * @throws TaskError when a task's labels are more or fewer than the rows of its head
   */
  async load(selection: Selection, options: SwitchOptions = {}): Promise<ActiveTask[]> {
    const { view: pack, base } = this.#model;
    const tasks = await loadParts(pack, selection, options, base.ignored);
    this.#refuseUnprepared(tasks);
    for (const { id, blob } of tasks) {
      const misfit = misfitLabels(pack.tasks.get(id)?.metadata.labels, blob.parameters);
      if (misfit === undefined) continue;
      throw new TaskError(`task "${id}" cannot be used: ${misfit}; pack its adapter again with a name for each row`, {
        task: id,
      });
    }
    options.signal?.throwIfAborted();
    return tasks;
  }

  /** The values of a selection that is read here and now. @throws as `load` and `evaluate` */
  async read(selection: Selection): Promise<TaskValues> {
    return this.evaluate(await this.load(selection));
  }

  /**
   * In memory of its own each time, since values of earlier switches may still be on their way into a run; but where there are `old`
   * values that nothing reads any more, cores and factors are written over those.
   * @param tasks as `load` gives them
   * @throws TaskError for heads that cannot be blended; the reason of `signal`, once it is aborted
   */
  evaluate(tasks: readonly ActiveTask[], signal?: AbortSignal, old?: TaskValues["inputs"]): Promise<TaskValues> {
    const values = this.#queue.then(() => this.#evaluate(tasks, signal, old));
    this.#queue = values.catch(() => undefined);
    return values;
  }

  async #evaluate(
    tasks: readonly ActiveTask[],
    signal: AbortSignal | undefined,
    old: TaskValues["inputs"] | undefined,
  ): Promise<TaskValues> {
    const { view: pack, inputs, base } = this.#model;
    const merged = mergeAll(tasks, pack, (name) => {
      const values =
        base.biases.get(name) ?? (name.endsWith(".bias") ? base.heads.get(moduleOf(name))?.bias : undefined);
      return values && { shape: [values.length], values };
    });
    const evaluation = { tasks, merged, old, ...(await this.#terms(tasks, signal, old)) };
    const values = new Map<string, InputValue>();
    const pause = pacer(signal);
    for (const input of inputs) {
      values.set(input.name, this.#value(input, evaluation));
      const turn = pause();
      if (turn) await turn;
    }
    const heads = inputs.filter(({ kind }) => kind === "headWeight");
    return { inputs: values, labels: new Map(heads.map(({ of, name }) => [of, values.get(name)!.dims[1]!])) };
  }

  /** A task that was added to the pack after the model was prepared may change more than the others. */
  #refuseUnprepared(tasks: readonly ActiveTask[]): void {
    const { mode, base, view: pack } = this.#model;
    for (const { id, blob } of tasks) {
      for (const brought of bringsOf(blob, pack.modules)) {
        const { role, name } = parseBrought(brought);
        const head = base.heads.get(moduleOf(name));
        if (this.#ready.has(needsFactors(role) ? READY["A"] + name : brought) || this.#ready.has(name)) continue;
        const folds = mode === "folded" && (isOfModule(role) || base.wanted.has(name));
        if (head ? head.bias || !name.endsWith(".bias") : folds) continue;
        const hint = needsFactors(role) ? " with reserve: { privateTerms: true }" : "";
        const message = `task "${id}" brings "${name}" (${role}), which no task did when this session was made; make a new one${hint}`;
        throw new BaseMismatchError(message, { module: name });
      }
    }
  }

  async #terms(
    tasks: readonly ActiveTask[],
    signal: AbortSignal | undefined,
    old: TaskValues["inputs"] | undefined,
  ): Promise<Pick<Evaluation, "cores" | "terms">> {
    const { view: pack, mode, base } = this.#model;
    const [cores, terms] = [new Map<string, WriteCore>(), new Map<string, Term>()];
    const bench = this.#bench;
    if (mode === "folded" || !bench) return { cores, terms };
    const others: ModulePlan[] = [];
    for (const plan of stage(tasks, pack.modules, bench.staging)) {
      const core = hasCore(plan, mode);
      if (core) cores.set(pack.modules[plan.module]!.name, (...to) => writeCore(plan, bench.staging.values, ...to));
      if (!core || plan.A.private.length > 0 || plan.magnitude !== undefined) others.push(plan);
    }
    const weightOf = (index: number): PristineWeight => {
      const { name, in: inputs, out } = pack.modules[index]!;
      const { buffer, byteOffset, byteLength } = base.weights.get(name)!;
      const data = new Uint8Array(buffer, byteOffset, byteLength);
      return { dtype: "f32", shape: [out, inputs], data, byteOffset: 0 };
    };
    if (others.length > 0) {
      const { unfold } = await import("../core/terms.ts");
      const options = { old: old && this.#oldFactors(old), turned: true, signal };
      for (const [index, term] of await unfold(others, bench, mode, weightOf, options))
        terms.set(pack.modules[index]!.name, term);
    }
    return { cores, terms };
  }

  /** By module, the arrays of factors that inputs had. */
  #oldFactors(old: TaskValues["inputs"]): Map<number, Pick<Term, "A" | "Bt">> {
    const { view: pack, inputs } = this.#model;
    const places = new Map(pack.modules.map(({ name }, index) => [name, index]));
    const found = new Map<number, { A: Float32Array<ArrayBuffer>; Bt: Float32Array<ArrayBuffer> }>();
    const none = new Float32Array(0);
    for (const { name, of, kind } of inputs) {
      if (kind !== "A" && kind !== "B") continue;
      const index = places.get(of)!;
      const factors = found.get(index) ?? { A: none, Bt: none };
      factors[kind === "A" ? "A" : "Bt"] = (old.get(name)?.data ?? none) as Float32Array<ArrayBuffer>;
      found.set(index, factors);
    }
    return found;
  }

  #value(input: TaskInput, { tasks, cores, terms, merged, old }: Evaluation): InputValue {
    const { of, kind, dims } = input;
    const term = terms.get(of);
    const own = dims.slice(1);
    const fixed = own.map((d) => (typeof d === "number" ? d : 1));
    const [height = 1, width = 1] = fixed;
    const zeros = (): InputValue => ({ dims: fixed, data: new Float32Array(height * width) });
    switch (kind) {
      case "core":
        return coreOf(input, ({ module }) => cores.get(module), old?.get(input.name));
      case "A":
        return term ? { dims: [height, term.rank], data: term.A } : zeros();
      case "B":
        return term ? { dims: [term.rank, width], data: term.Bt } : zeros();
      case "scale":
        return { dims: fixed, data: term?.rowScale ?? new Float32Array(width).fill(1) };
      case "bias":
        return { dims: fixed, data: this.#change(of, merged, width) };
      case "indices":
        return indicesOf(broughtRows(of, tasks));
      case "rows":
        return rowsOf(of, broughtRows(of, tasks), width - 1) ?? zeros();
      case "headWeight":
        return this.#headWeight(of, merged, height);
      case "headBias": {
        const base = this.#model.base.heads.get(of)!;
        const head = merged.get(`${of}.bias`);
        return { dims: [1, head?.shape[0] ?? base.labels], data: head?.values ?? base.bias! };
      }
    }
  }

  #headWeight(of: string, merged: Evaluation["merged"], inputs: number): InputValue {
    const { weight, labels, adapted } = this.#model.base.heads.get(of)!;
    const head = merged.get(`${of}.weight`);
    if (!head) return { dims: [inputs, labels], data: weight };
    const [out = 0, width] = head.shape;
    // Other tasks add their terms to the layer's result.
    if (width !== inputs || (adapted && out !== labels))
      throw misfit(`${of}.weight`, head.shape, [adapted ? labels : "labels", inputs]);
    return { dims: [inputs, out], data: transpose(head.values, out, inputs) };
  }

  /** The tasks' bias minus the base's. */
  #change(name: string, merged: Evaluation["merged"], size: number): Float32Array {
    const base = this.#model.base.biases.get(name)!;
    const bias = merged.get(name);
    if (!bias) return new Float32Array(size);
    if (bias.shape.length !== 1 || bias.shape[0] !== size) throw misfit(name, bias.shape, [size]);
    return bias.values.map((value, i) => value - base[i]!);
  }
}

/**
 * The value of an input for cores.
 * @param of gives what writes the core of a module; undefined where the task has none
 * @param old a value of the same input that may be written over: what lies beside its cores is 0
 */
export function coreOf(
  { dims, cores = [] }: TaskInput,
  of: (block: CoreBlock) => WriteCore | undefined,
  old?: InputValue,
): InputValue {
  const [, height, width] = dims as [string, number, number];
  const data = reuse(old?.data as Float32Array | undefined, height * width);
  let at = 0;
  for (const block of cores) {
    const { KA, KB, scalesA, scalesB } = block;
    const write = of(block);
    write?.(data, at, width);
    for (let a = 0; (scalesA || scalesB || !write) && a < KA; a++) {
      for (let b = 0; b < KB; b++) {
        const place = at + a * width + b;
        data[place] = write ? (scalesA?.[a] ?? 1) * (scalesB?.[b] ?? 1) * data[place]! : 0;
      }
    }
    at += KA * width + KB;
  }
  return { dims: [height, width], data };
}

/** Rows of an embedding that a task brings. */
interface BroughtRows {
  readonly strength: number;
  readonly blob: TaskBlob;
  readonly parameter: TaskParameter;
  readonly indices: readonly number[];
}

function broughtRows(name: string, tasks: readonly ActiveTask[]): BroughtRows[] {
  return tasks.flatMap(({ strength, blob }) =>
    blob.parameters.flatMap((parameter) => {
      const { indices } = parameter;
      return parameter.name === name && indices ? [{ strength, blob, parameter, indices }] : [];
    }),
  );
}

/** Where there is no row, an index that embeddings never see. */
function indicesOf(brought: readonly BroughtRows[]): InputValue {
  const indices = brought.flatMap((one) => one.indices.map(BigInt));
  const data = BigInt64Array.from(indices.length > 0 ? indices : [-1n]);
  return { dims: [1, data.length], data };
}

/** Each row ends with its strength, which its values are multiplied with. */
function rowsOf(name: string, brought: readonly BroughtRows[], width: number): InputValue | undefined {
  const count = brought.reduce((sum, { indices }) => sum + indices.length, 0);
  if (count === 0) return undefined;
  const data = new Float32Array(count * (width + 1)).fill(1);
  let row = 0;
  for (const { strength, blob, parameter, indices } of brought) {
    if (parameter.shape[1] !== width) throw misfit(name, parameter.shape, ["rows", width]);
    const values = readTensor(blob.bytes, parameter.tensor);
    for (let i = 0; i < indices.length; i++, row++) {
      const out = data.subarray(row * (width + 1), (row + 1) * (width + 1));
      out.set(values.subarray(i * width, (i + 1) * width));
      for (let j = 0; j <= width; j++) out[j]! *= strength;
    }
  }
  return { dims: [count, width + 1], data };
}

function misfit(name: string, found: readonly number[], expected: readonly (string | number)[]): BaseMismatchError {
  const message = `a task brings "${name}" of [${found.join(", ")}], the model's needs [${expected.join(", ")}]`;
  return new BaseMismatchError(message, { module: name, expected, found });
}

/** A value as an input takes it: one task, or several one below the other, padded to the largest. */
export function stackValues(input: TaskInput, rows: readonly InputValue[]): InputValue {
  const [first] = rows;
  if (rows.length === 1) return { dims: [1, ...first!.dims], data: first!.data };
  const dims = first!.dims.map((_, i) => Math.max(...rows.map((row) => row.dims[i]!)));
  const [height = 1, width = 1] = dims;
  const size = height * width;
  const stacked = [rows.length, ...dims];
  if (input.kind === "indices") {
    const data = new BigInt64Array(rows.length * size).fill(-1n);
    rows.forEach((row, t) => data.set(row.data as BigInt64Array, t * size));
    return { dims: stacked, data };
  }
  const data = new Float32Array(rows.length * size);
  if (input.kind === "headBias") data.fill(NO_LABEL);
  rows.forEach((row, t) => {
    const [h = 1, w = 1] = row.dims;
    const values = row.data as Float32Array;
    for (let i = 0; i < h; i++) data.set(values.subarray(i * w, (i + 1) * w), t * size + i * width);
  });
  return { dims: stacked, data };
}

/**
 * Values of a prepared model's inputs: a selection in, arrays out, for one task or for one task per row of a batch. A
 * selection is read once and its tasks are put together; from that come cores, factors and parameters for the graph,
 * and in mode "folded" weights.
 */

import type { View } from "../core/base.ts";
import {
  type ActiveTask,
  createBackend,
  hasCore,
  KernelSession,
  type ModulePlan,
  planTasks,
  writeCore,
} from "../core/kernel-session.ts";
import { addDifferences, blendHeads, changesOf, decode, type Merged, type ParameterChange } from "../core/merge.ts";
import type { PackView } from "../core/part.ts";
import type { Runtime, RuntimeOptions } from "../core/runtime.ts";
import { type LoadedTasks, loadParts, memoryReport, type Selection, type SwitchOptions } from "../core/selection.ts";
import type { PristineWeight } from "../core/terms.ts";
import { BaseMismatchError, TaskError } from "../errors.ts";
import {
  bringsOf,
  isOfModule,
  misfitLabels,
  moduleOf,
  needsFactors,
  parseBrought,
  readTensor,
  type TaskBlob,
  type TaskParameter,
} from "../format/format.ts";
import type { CoreBlock, TaskInput } from "../onnx/inject.ts";
import { Changes, paced, pacer, throwIfAborted } from "../pace.ts";
import { sum } from "../tensor/dtypes.ts";
import { type Term, transpose } from "../tensor/term.ts";
import type { Engine, Tensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";

/** The value of one input for one task, without the leading dimension `tasks`. */
export interface InputValue {
  readonly dims: readonly number[];
  readonly data: Float32Array | BigInt64Array;
}

export type InputValues = ReadonlyMap<string, InputValue>;

/** The values of all inputs, and how many columns each head has. */
export interface TaskValues {
  readonly inputs: InputValues;
  /** Columns by module name. */
  readonly labels: ReadonlyMap<string, number>;
}

/**
 * Modes "core" and "factors" have kernels; mode "folded" a runtime that writes weights, and parameters that are inputs
 * all the same.
 */
interface Parts {
  readonly kernels?: KernelSession;
  readonly folding?: { readonly runtime: Runtime; readonly inputs: ReadonlySet<string> };
}

interface Evaluation {
  readonly tasks: LoadedTasks["tasks"];
  readonly cores: InputValues;
  /** Factors apart from cores, by module name. A is [in, rank], as models take it. */
  readonly factors: ReadonlyMap<string, Term>;
  /** Saved modules and biases as the tasks have them, by name. */
  readonly merged: ReadonlyMap<string, Merged>;
}

/** Pads a head with fewer columns than its neighbours: never the maximum, and 0 after a softmax. */
const NO_LABEL = -3.4028234663852886e38;

/**
 * Entries of a task's `brings` that a model with these inputs is ready for: rows of a side need an input of whole rows.
 */
function readyFor(inputs: readonly TaskInput[], modules: PreparedModel["modules"]): Set<string> {
  const ready = new Set<string>();
  for (const { of, kind, over } of inputs) {
    if (kind === "scale") ready.add(`magnitude ${of}`);
    else if (kind === "A" || kind === "B") {
      if (!over) ready.add(`own-${kind} ${of}`);
    } else if (kind === "bias") ready.add(of);
    else if (kind === "rows") ready.add(`rows ${of}`);
  }
  for (const { of } of inputs) if (ready.has(`own-A ${of}`) && ready.has(`own-B ${of}`)) ready.add(`private ${of}`);
  // Rows on one side need those that coefficients make on the other.
  for (const { name, components, expands } of modules)
    if (components && !expands) for (const side of ["A", "B"]) ready.delete(`own-${side} ${name}`);
  return ready;
}

/** Made by `unfoldingEvaluator` or `foldingEvaluator`. */
export class TaskEvaluator {
  readonly #model: Pick<PreparedModel, "view" | "mode" | "base" | "inputs">;
  readonly #parts: Parts;
  /** The kernel session serves one selection at a time, and long work has pauses. */
  readonly #queue = new Changes();
  /** Modules and parameters that have inputs, in the form of a task's `brings`. */
  readonly #ready: ReadonlySet<string>;
  /** Sides of modules whose factors lie over components. */
  readonly #over: ReadonlyMap<string, ReadonlySet<"A" | "B">>;

  constructor({ view, mode, base, modules, inputs }: PreparedModel, parts: Parts) {
    // Not all of the prepared model: its layers know the graph, and so the model's whole file.
    this.#model = { view, mode, base, inputs };
    this.#parts = parts;
    this.#ready = readyFor(inputs, modules);
    const over = new Map<string, Set<"A" | "B">>();
    for (const input of inputs)
      if (input.over) over.set(input.of, (over.get(input.of) ?? new Set()).add(input.kind as "A" | "B"));
    this.#over = over;
  }

  /**
   * Reads the tasks of a selection.
   * @throws TaskError for an unknown id, a blend that cannot be; SourceError, FormatError when a task cannot be read
   * @throws BaseMismatchError when a task changes what the model was not prepared for
   * @throws TaskError when a task's labels are more or fewer than the rows of its head
   */
  async load(selection: Selection, options: SwitchOptions = {}): Promise<LoadedTasks> {
    const { view, base } = this.#model;
    const tasks = await loadParts(view, selection, options, base.ignored);
    const loaded = { selection, head: options.head, tasks };
    this.#refuseUnprepared(loaded);
    for (const { id, blob } of tasks) {
      const misfit = misfitLabels(view.tasks.get(id)?.metadata.labels, blob.parameters);
      if (misfit === undefined) continue;
      throw new TaskError(`task "${id}" cannot be used: ${misfit}; pack its adapter again with a name for each row`, {
        task: id,
      });
    }
    throwIfAborted(options.signal);
    return loaded;
  }

  /** The values of a selection that is read here and now. @throws as `load` and `evaluate` */
  async read(selection: Selection): Promise<TaskValues> {
    return this.evaluate(await this.load(selection));
  }

  /**
   * Computes the values of all inputs, in new memory: earlier ones may be on their way into a run.
   * @param old values that nothing reads any more: cores and factors are written over them
   * @throws TaskError for heads that cannot be blended; the reason of `signal`, once it is aborted
   */
  async evaluate(loaded: LoadedTasks, signal?: AbortSignal, old?: InputValues): Promise<TaskValues> {
    const { inputs, base, view } = this.#model;
    const { folding } = this.#parts;
    const tasks = folding ? withParameters(loaded.tasks, (name) => folding.inputs.has(name)) : loaded.tasks;
    const merged = mergeAll(tasks, view, (name) => {
      const values =
        base.biases.get(name) ?? (name.endsWith(".bias") ? base.heads.get(moduleOf(name))?.bias : undefined);
      return values && { shape: [values.length], values };
    });
    const terms = await this.#queue.change(() => this.#terms(loaded.tasks, signal, old));
    const evaluation = { tasks: loaded.tasks, merged, ...terms };
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
  #refuseUnprepared({ tasks }: LoadedTasks): void {
    const { mode, base, view: pack } = this.#model;
    for (const { id, blob } of tasks) {
      for (const brought of bringsOf(blob, pack.modules)) {
        const { role, name } = parseBrought(brought);
        const head = isOfModule(role) ? undefined : base.heads.get(moduleOf(name));
        if (this.#ready.has(brought) || this.#ready.has(name)) continue;
        const folds = mode === "folded" && (isOfModule(role) || base.wanted.has(name));
        if (head ? role !== "rows" && (head.bias || !name.endsWith(".bias")) : folds) continue;
        const hint = needsFactors(role) ? " with reserve: { privateTerms: true }" : "";
        const message = `task "${id}" brings "${name}" (${role}), which no task did when this session was made; make a new one${hint}`;
        throw new BaseMismatchError(message, { module: name });
      }
    }
  }

  /**
   * Makes the weights those of the tasks, in mode "folded". When it fails, they are put back.
   * @returns all parameters that differ from the base, by the base's names; valid until the next fold
   * @throws as `Runtime.switchTask`
   */
  async fold(loaded: LoadedTasks, signal?: AbortSignal): Promise<ReadonlyMap<string, View>> {
    const { runtime, inputs } = this.#parts.folding!;
    const tasks = withParameters(loaded.tasks, (name) => !inputs.has(name));
    await runtime.activate({ ...loaded, tasks }, signal);
    return runtime.changes();
  }

  /** @throws BackendError while the weights are no task's */
  check(): void {
    this.#parts.folding?.runtime.check();
  }

  /** Resident bytes: of what expands or folds, and of pristine weights. */
  memory(): { readonly scratch: number; readonly pristine: number } {
    const { kernels, folding } = this.#parts;
    if (folding) {
      const { total, coefficients, pristine } = folding.runtime.memory();
      return { scratch: total - coefficients - pristine, pristine };
    }
    const scratch = kernels ? memoryReport(kernels.backend.memory()).total + kernels.buffer.values.byteLength : 0;
    return { scratch, pristine: 0 };
  }

  async close(): Promise<void> {
    this.#parts.kernels?.backend.close();
    await this.#parts.folding?.runtime.close();
  }

  async #terms(
    tasks: readonly ActiveTask[],
    signal: AbortSignal | undefined,
    old: InputValues | undefined,
  ): Promise<Pick<Evaluation, "cores" | "factors">> {
    const { kernels } = this.#parts;
    if (!kernels) return { cores: new Map(), factors: new Map() };
    const mode = this.#model.mode as "core" | "factors";
    const spaces = this.#model.inputs.flatMap((input) =>
      input.kind === "core" ? [new CoreSpace(input, old?.get(input.name))] : [],
    );
    const targets = new Map(spaces.flatMap(({ targets }) => targets));
    const written = new Set<string>();
    const others: ModulePlan[] = [];
    const { modules, buffer } = kernels;
    const pause = pacer(signal);
    buffer.used = 0;
    for (const plan of planTasks(tasks, modules, buffer, true)) {
      const { name } = modules[plan.module]!;
      const core = hasCore(plan, mode);
      const target = core && targets.get(name);
      if (target) {
        const turn = paced(writeCore(plan, buffer.values, target.out, target.at, target.stride), pause);
        if (turn) await turn;
        written.add(name);
      }
      if (!core || plan.A.residual.length > 0 || plan.magnitude !== undefined) others.push(plan);
    }
    const cores = new Map(spaces.map((space) => [space.name, space.value((module) => written.has(module))]));
    const factors = others.length > 0 ? await this.#factors(others, kernels, mode, signal, old) : new Map();
    return { cores, factors };
  }

  async #factors(
    plans: readonly ModulePlan[],
    kernels: KernelSession,
    mode: "core" | "factors",
    signal: AbortSignal | undefined,
    old: InputValues | undefined,
  ): Promise<Evaluation["factors"]> {
    const { modules } = kernels;
    const weightOf = (module: number): PristineWeight => {
      const { name, in: inputs, out } = modules[module]!;
      const { buffer, byteOffset, byteLength } = this.#model.base.weights.get(name)!;
      const data = new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength);
      return { dtype: "f32", shape: [out, inputs], data, byteOffset: 0 };
    };
    const arrays = old && this.#oldFactors(old);
    const { unfold } = await import("../core/terms.ts");
    const terms = await unfold(plans, kernels, mode, weightOf, {
      old: (module) => arrays?.get(modules[module]!.name),
      over: (module) => this.#over.get(modules[module]!.name),
      turned: true,
      signal,
    });
    return new Map([...terms].map(([module, term]) => [modules[module]!.name, term]));
  }

  /** Arrays of factors that inputs had, by module name. */
  #oldFactors(old: InputValues): Map<string, Pick<Term, "A" | "Bt">> {
    const found = new Map<string, Pick<Term, "A" | "Bt">>();
    const none = { A: new Float32Array(0), Bt: new Float32Array(0) };
    for (const { name, of, kind } of this.#model.inputs) {
      const data = kind === "A" || kind === "B" ? (old.get(name)?.data as Float32Array<ArrayBuffer>) : undefined;
      if (data) found.set(of, { ...(found.get(of) ?? none), [kind === "A" ? "A" : "Bt"]: data });
    }
    return found;
  }

  #value({ name, of, kind, dims, over }: TaskInput, { tasks, cores, factors, merged }: Evaluation): InputValue {
    const term = factors.get(of);
    const own = dims.slice(1);
    const fixed = own.map((d) => (typeof d === "number" ? d : 1));
    const [height = 1, width = 1] = fixed;
    const zeros = (): InputValue => ({ dims: fixed, data: new Float32Array(height * width) });
    switch (kind) {
      case "core":
        return cores.get(name)!;
      case "A":
        return term ? scaled({ dims: [height, term.rank], data: term.A }, over?.scales, term.rank, height) : zeros();
      case "B":
        return term ? scaled({ dims: [term.rank, width], data: term.Bt }, over?.scales, 1, width) : zeros();
      case "scale":
        return { dims: fixed, data: term?.rowScale ?? new Float32Array(width).fill(1) };
      case "bias":
        return { dims: fixed, data: this.#change(of, merged, width) };
      case "indices":
        return indicesOf(this.#rows(of, tasks));
      case "rows":
        return rowsOf(of, this.#rows(of, tasks), width - 1) ?? zeros();
      case "headWeight":
        return this.#headWeight(of, merged, height);
      case "headBias": {
        const base = this.#model.base.heads.get(of)!;
        const head = merged.get(`${of}.bias`);
        return { dims: [1, head?.shape[0] ?? base.labels], data: head?.values ?? base.bias! };
      }
    }
  }

  /** Rows of a parameter, or of what it is tied to: by task, since one may have rows of its own for both. */
  #rows(of: string, tasks: LoadedTasks["tasks"]): TaskRows[] {
    const follows = this.#model.base.tied.get(of);
    return tasks.flatMap(({ strength, blob }) => {
      const rowsOf = (name: string | undefined): TaskParameter[] =>
        blob.parameters.filter((parameter) => parameter.name === name && parameter.indices);
      const direct = rowsOf(of);
      return (direct.length > 0 ? direct : rowsOf(follows)).map((parameter) => ({ strength, blob, parameter }));
    });
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

  /** Subtracts the base's bias from the tasks'. */
  #change(name: string, merged: Evaluation["merged"], size: number): Float32Array {
    const base = this.#model.base.biases.get(name)!;
    const bias = merged.get(name);
    if (!bias) return new Float32Array(size);
    if (bias.shape.length !== 1 || bias.shape[0] !== size) throw misfit(name, bias.shape, [size]);
    return bias.values.map((value, i) => value - base[i]!);
  }
}

/** Makes the evaluator of modes "core" and "factors". @param bases of the pack */
export async function unfoldingEvaluator(model: PreparedModel, bases: Uint8Array): Promise<TaskEvaluator> {
  // Cores consist of coefficients alone.
  const expands = model.base.weights.size > 0 || model.modules.some((module) => module.expands);
  const { backend } = await createBackend(expands ? {} : { backend: "js" });
  try {
    const kernels = new KernelSession(backend, model.view.modules, expands ? bases : new Uint8Array(0));
    return new TaskEvaluator(model, { kernels });
  } catch (error) {
    backend.close();
    throw error;
  }
}

/** Makes the evaluator of mode "folded". @param options base and device @throws as `startRuntime` */
export async function foldingEvaluator(model: PreparedModel, options: RuntimeOptions): Promise<TaskEvaluator> {
  const { pack, names, keep, base } = model;
  const heads = [...base.heads.keys()].flatMap((head) => [`${head}.weight`, `${head}.bias`]);
  const inputs = new Set([...heads, ...base.biases.keys()]);
  const { startRuntime } = await import("../core/runtime.ts");
  const how = { ...options, names, ...(keep && { modules: keep }), ignore: [...base.ignored, ...inputs] };
  const runtime = await startRuntime(pack, { ...how, anyBase: true });
  return new TaskEvaluator(model, { folding: { runtime, inputs } });
}

function withParameters(tasks: readonly ActiveTask[], keep: (name: string) => boolean): ActiveTask[] {
  return tasks.map(({ blob, ...task }) => {
    return { ...task, blob: { ...blob, parameters: blob.parameters.filter(({ name }) => keep(name)) } };
  });
}

/** Rows of an embedding that a task replaces. */
interface TaskRows {
  readonly strength: number;
  readonly blob: TaskBlob;
  /** One with indices. */
  readonly parameter: TaskParameter;
}

/** Indices of all rows; where there is no row, an index that embeddings never see. */
function indicesOf(rows: readonly TaskRows[]): InputValue {
  const indices = rows.flatMap(({ parameter }) => parameter.indices!.map(BigInt));
  const data = BigInt64Array.from(indices.length > 0 ? indices : [-1n]);
  return { dims: [1, data.length], data };
}

/** Each row ends with its strength, which its values are multiplied with. */
function rowsOf(name: string, rows: readonly TaskRows[], width: number): InputValue | undefined {
  const count = sum(rows, ({ parameter }) => parameter.indices!.length);
  if (count === 0) return undefined;
  const data = new Float32Array(count * (width + 1));
  let at = 0;
  for (const { strength, blob, parameter } of rows) {
    if (parameter.shape[1] !== width) throw misfit(name, parameter.shape, ["rows", width]);
    const values = readTensor(blob.bytes, parameter.tensor);
    for (let from = 0; from < values.length; from += width) {
      for (let j = 0; j < width; j++) data[at++] = values[from + j]! * strength;
      data[at++] = strength;
    }
  }
  return { dims: [count, width + 1], data };
}

/** The error for a parameter of another shape than the model's. */
export function misfit(
  name: string,
  found: readonly number[],
  expected: readonly (string | number)[],
): BaseMismatchError {
  const message = `a task brings "${name}" of [${found.join(", ")}], the model's needs [${expected.join(", ")}]`;
  return new BaseMismatchError(message, { module: name, expected, found });
}

/** Gives a value its leading dimension: one task, or several one below the other, padded to the largest. */
export function stackValues(input: TaskInput, rows: readonly InputValue[]): InputValue {
  const [first] = rows;
  if (rows.length === 1) return { dims: [1, ...first!.dims], data: first!.data };
  const dims = first!.dims.map((_, i) => Math.max(...rows.map((row) => row.dims[i]!)));
  const [height = 1, width = 1] = dims;
  const size = height * width;
  const length = rows.length * size;
  const data =
    input.kind === "indices"
      ? new BigInt64Array(length).fill(-1n)
      : new Float32Array(length).fill(input.kind === "headBias" ? NO_LABEL : 0);
  rows.forEach((row, t) => {
    const [h = 1, w = 1] = row.dims;
    for (let i = 0; i < h; i++) data.set(row.data.subarray(i * w, (i + 1) * w) as never, t * size + i * width);
  });
  return { dims: [rows.length, ...dims], data };
}

/** True if an input holds a task's core or factors, whose arrays the next selection is written into. */
export function isTerm({ kind }: TaskInput): boolean {
  return kind === "core" || kind === "A" || kind === "B";
}

/** Tensors of the inputs for one task or one per row, and the bytes of their arrays; terms may fill theirs in part. */
export function toFeeds(
  engine: Engine,
  inputs: readonly TaskInput[],
  rows: readonly InputValues[],
): { feeds: Tensors; bytes: number } {
  const feeds: Record<string, Tensors[string]> = {};
  let bytes = 0;
  for (const input of inputs) {
    const { dims, data } = stackValues(
      input,
      rows.map((row) => row.get(input.name)!),
    );
    feeds[input.name] = engine.tensor(data, dims);
    bytes += isTerm(input) ? data.buffer.byteLength : data.byteLength;
  }
  return { feeds, bytes };
}

/** The value of an input for cores while it is filled: each core of a module has its place. */
export class CoreSpace {
  readonly name: string;
  /** Modules by block, and where the core of each lies: the index of its first number, and the distance of its rows. */
  readonly targets: readonly [
    module: string,
    { readonly out: Float32Array; readonly at: number; readonly stride: number },
  ][];
  readonly #dims: readonly [height: number, width: number];
  readonly #data: Float32Array;
  readonly #blocks: readonly CoreBlock[];

  /** @param old a value of the same input that may be written over: its numbers outside of cores are 0 */
  constructor({ name, dims, cores = [] }: TaskInput, old?: InputValue) {
    const [, height, width] = dims as [string, number, number];
    this.name = name;
    this.#dims = [height, width];
    this.#blocks = cores;
    const data = old?.data as Float32Array | undefined;
    this.#data = data?.length === height * width ? data : new Float32Array(height * width);
    this.targets = cores.map(({ module, row, column }) => {
      return [module, { out: this.#data, at: row * width + column, stride: width }];
    });
  }

  /** The value once cores are written. @param isWritten tells if a module's is: the others become zeros */
  value(isWritten: (module: string) => boolean): InputValue {
    const data = this.#data;
    for (const [i, { module, KA, KB, scalesA, scalesB }] of this.#blocks.entries()) {
      const { at, stride } = this.targets[i]![1];
      const written = isWritten(module);
      if (written && !scalesA && !scalesB) continue;
      const across = written && (scalesB ?? new Float32Array(KB).fill(1));
      for (let a = 0, from = at; a < KA; a++, from += stride) {
        const scale = scalesA?.[a] ?? 1;
        if (!across) data.fill(0, from, from + KB);
        else for (let b = 0; b < KB; b++) data[from + b]! *= scale * across[b]!;
      }
    }
    return { dims: this.#dims, data };
  }
}

/**
 * Multiplies coefficients with the scales of their components, in place.
 * @param every count of numbers in a row that have one scale
 * @param count of scales, which then begin again
 */
export function scaled(
  value: InputValue & { readonly data: Float32Array },
  scales: Float32Array | undefined,
  every: number,
  count: number,
): InputValue {
  const { data } = value;
  for (let i = 0; scales && i < data.length; i++) data[i]! *= scales[Math.floor(i / every) % count]!;
  return value;
}

/**
 * Parameters that tasks bring, by the pack's names. Saved modules stay as they are; the others are added to the base's
 * values.
 * @param base the base's value of a parameter; undefined leaves it out
 * @throws TaskError when saved modules cannot be blended
 */
function mergeAll(
  parts: readonly ActiveTask[],
  pack: PackView,
  base: (name: string) => Merged | undefined,
): Map<string, Merged> {
  const merged = new Map<string, Merged>();
  for (const [name, changes] of changesOf(parts, ({ parameter }) => parameter.name)) {
    const [{ parameter }] = changes as [ParameterChange];
    if (parameter.role === "saved")
      merged.set(name, { shape: parameter.shape, values: blendHeads(name, decode(changes[0]!), changes, pack) });
    else {
      const original = base(name);
      if (original) merged.set(name, addDifferences(name, changes, original));
    }
  }
  return merged;
}

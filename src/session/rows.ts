/**
 * Runs with one task per row of the batch. Task inputs meet a layer's rows in order, so the batch must come first in
 * the values that enter the layer; where it does not, or where a layer sees only some tokens of each row, as in a
 * mixture of experts, tasks would be mixed without a word. The graph cannot show this, so the first batched run is
 * verified. Loaded by that run.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import type { TaskInput } from "../onnx/inject.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { syntheticTask } from "./delivery.ts";
import { dataOf, type Engine, type EngineTensor, type LoadedModel, type Tensors, toTensors } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { type InputValues, type TaskEvaluator, type TaskValues, toFeeds } from "./values.ts";

/** A loaded model on which rows of a batch may have a task each. */
export type RowModel = Pick<PreparedModel, "inputs" | "outputNames" | "forms" | "sharesRanges" | "feedsOfRows"> & {
  readonly engine: Engine;
  readonly model: LoadedModel;
  readonly idle: Tensors;
};

/** Values of a task, and its entry in the pack, which is an object of its own for each task that ever came. */
interface RowValues {
  readonly entry: TaskInfo["metadata"] | undefined;
  readonly values: TaskValues;
}

export class RowTasks {
  readonly #pack: Pick<Pack, "tasks">;
  readonly #evaluator: TaskEvaluator;
  readonly #model: RowModel;
  /** Values of the tasks of the last run: the next one usually asks for the same. */
  #last: ReadonlyMap<string | null, RowValues> = new Map();
  /** Set once a task per row is known to reach its row. */
  #verified = false;
  #verifiedBySynthetic: Promise<boolean> | undefined;

  constructor(pack: Pick<Pack, "tasks">, evaluator: TaskEvaluator, model: RowModel) {
    this.#pack = pack;
    this.#evaluator = evaluator;
    this.#model = model;
  }

  /** Arrays that are held from one run to the next. */
  get arrays(): readonly { readonly byteLength: number }[] {
    return [...this.#last.values()].flatMap(({ values }) => [...values.inputs.values()].map(({ data }) => data));
  }

  /**
   * @returns feeds of the task inputs, and the valid columns of each row by head
   * @throws TypeError, BackendError as `Session.run`
   */
  async feeds(
    tasks: readonly (string | null)[],
    own: Tensors,
  ): Promise<{ feeds: Tensors; valid: ReadonlyMap<string, readonly number[]> }> {
    const batches = Object.values(own).flatMap(({ dims }) => dims[0] ?? []);
    if (tasks.length === 0 || !batches.includes(tasks.length))
      throw new TypeError(`run: ${tasks.length} tasks for a batch of ${batches[0]}; give one per row`);
    // Together, as they are now: a task can be removed and another one added under its name.
    const values = new Map(
      await Promise.all([...new Set(tasks)].map(async (task) => [task, await this.#read(task)] as const)),
    );
    if (tasks.length > 1 && !this.#verified) await this.#verify(own, tasks.length);
    this.#last = values;
    const rows = tasks.map((task) => values.get(task)!.values);
    const { engine, inputs } = this.#model;
    const { feeds } = toFeeds(
      engine,
      inputs,
      rows.map((row) => row.inputs),
    );
    const heads = [...rows[0]!.labels.keys()];
    return { feeds, valid: new Map(heads.map((head) => [head, rows.map(({ labels }) => labels.get(head)!)])) };
  }

  async #read(task: string | null): Promise<RowValues> {
    const entry = this.#pack.tasks.get(task!)?.metadata;
    const last = this.#last.get(task);
    return last?.entry === entry && last ? last : { entry, values: await this.#evaluator.read(task) };
  }

  /**
   * Verifies on synthetic feeds, or on the batch where the model does not run on those.
   * @throws BackendError as `checkRows`
   */
  async #verify(own: Tensors, rows: number): Promise<void> {
    // Values of the base are computed again: all sessions would keep them, and few verify.
    const base = (await this.#evaluator.read(null)).inputs;
    this.#verifiedBySynthetic ??= checkSynthetic(this.#model, base);
    this.#verified = (await this.#verifiedBySynthetic) || (await checkRows(this.#model, base, own, rows, true));
  }
}

const WHY =
  "the batch is not the first dimension of some adapted layer, or the layer sees some tokens only, as in a mixture of experts, " +
  "or, in 8 bits, what enters it is quantised by a range that all rows share";

/**
 * @returns false also when the model does not run on synthetic feeds, or takes them for another batch: they prove
 *   nothing then
 */
async function checkSynthetic(model: RowModel, base: InputValues): Promise<boolean> {
  const values = model.feedsOfRows();
  const feeds = values && toTensors(model.engine, values);
  const rows = feeds && Object.values(feeds)[0]?.dims[0];
  if (!feeds || !rows || rows < 2) return false;
  return checkRows(model, base, feeds, rows, false).catch((error: unknown) => {
    if (error instanceof BackendError && error.backend === "session") throw error;
    return false;
  });
}

/**
 * Runs a batch with a synthetic task in all rows, in none, and in every second: each row must be as it is alone. Heads,
 * linear layers and convolutions are changed one after the other: a large effect of one would hide mixing in another.
 * @param own true if the feeds are the caller's own, which the model takes as they are meant
 * @returns true if a task was seen to reach its rows alone; false where tasks change no output, or no two rows differ
 * @throws BackendError when tasks are mixed, or no output of the caller's own batch tells
 */
async function checkRows(
  { engine, model, inputs, outputNames, idle, forms, sharesRanges }: RowModel,
  base: InputValues,
  feeds: Tensors,
  rows: number,
  own: boolean,
): Promise<boolean> {
  const run = async (tasks: readonly InputValues[], fetches: readonly string[]): Promise<Tensors> => {
    return engine.run(model, { ...idle, ...feeds, ...toFeeds(engine, inputs, tasks).feeds }, fetches);
  };
  const results = await run([base], outputNames);
  const output =
    outputNames.find((name) => isOfRows(results[name], rows)) ??
    outputNames.find((name) => own && isOfRows(results[name], rows, true));
  if (output === undefined && !own) return false;
  if (output === undefined) {
    const none = `none of the outputs ${outputNames.join(", ")} has the batch first`;
    throw mixed(`${none}, so there is no telling which row got which`);
  }
  const without = await numbersOf(results[output]!);
  const look = async (group: readonly TaskInput[], size: number) => {
    const task = syntheticTask(base, group, size);
    const alone = (await run([task], [output]))[output]!;
    const mixture = Array.from({ length: rows }, (_, row) => (row % 2 === 0 ? task : base));
    const both = await run(mixture, [output]).catch((cause: unknown) => {
      throw mixed(`the model runs on one task and not on several: ${WHY}`, cause);
    });
    const values = [without, await numbersOf(alone), await numbersOf(both[output]!)] as const;
    return compareRows(values, rows, sharesRanges ? (alone.dims.at(-1) ?? 1) : undefined);
  };
  let seen = false;
  for (const group of groupsOf(inputs, forms)) {
    let result = await look(group, 0.1);
    seen ||= result.effect > 0;
    // Rows of quantised models influence each other a little whatever their tasks; a larger task stands out against
    // that.
    if (!result.separate) result = await look(group, 1);
    if (!result.separate) throw mixed(`tasks get into each other's rows of "${output}": ${WHY}`);
  }
  return seen && (await differ(feeds, rows));
}

/** Fewest values from which a task's share can be estimated despite other changes. */
const MANY = 64;
/** Outputs of this width and above are those of a vocabulary: each position is compared by itself. */
const VOCABULARY = 1024;

/**
 * @param values of all rows without a task, with it, and with it in every second row
 * @param last dimension of the output, where rows share ranges: these change values too, so the task's share of such
 *   vectors is compared
 * @returns the effect of the task; `separate` if its rows are as they are alone, and the others as without it
 */
function compareRows(
  [without, alone, found]: readonly [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>],
  rows: number,
  last: number | undefined,
) {
  const width = found.length / rows;
  let effect = 0;
  let off = 0;
  for (let i = 0; i < found.length; i++) {
    effect = Math.max(effect, distance(alone[i]!, without[i]!));
    off = Math.max(off, distance(found[i]!, (Math.floor(i / width) % 2 === 0 ? alone : without)[i]!));
  }
  if (effect === 0 || off < effect / 4) return { effect, separate: true };
  const size = last !== undefined && last >= VOCABULARY ? last : width;
  if (last === undefined || size < MANY) return { effect, separate: false };
  const shares: [share: number, length: number, expected: number][] = [];
  for (let start = 0; start < found.length; start += size) {
    let product = 0;
    let length = 0;
    for (let i = start; i < start + size; i++) {
      const change = alone[i]! - without[i]!;
      if (!Number.isFinite(change) || !Number.isFinite(found[i]!)) continue;
      product += change * (found[i]! - without[i]!);
      length += change * change;
    }
    shares.push([product / length, length, Math.floor(start / width) % 2 === 0 ? 1 : 0]);
  }
  const longest = Math.max(...shares.map(([, length]) => length));
  // A vector that the task hardly changes tells nothing.
  const looked = shares.filter(([, length]) => length > longest / 1e4);
  return { effect, separate: looked.every(([share, , expected]) => Math.abs(share - expected) < 1 / 4) };
}

/** Inputs that are changed together. */
function groupsOf(inputs: readonly TaskInput[], forms: RowModel["forms"]): TaskInput[][] {
  const groups = new Map<string, TaskInput[]>();
  for (const input of inputs) {
    const { kind, of } = input;
    const key = /^head/.test(kind) ? "head" : (forms.get(of) ?? "");
    groups.set(key, [...(groups.get(key) ?? []), input]);
  }
  return [...groups.values()];
}

function mixed(why: string, cause?: unknown): BackendError {
  const message = `one task per row: ${why}; run them one by one`;
  return new BackendError(message, { backend: "session", ...(cause === undefined ? {} : { cause }) });
}

/** @param joined true if rows may be joined with the dimension behind them */
function isOfRows(tensor: EngineTensor | undefined, rows: number, joined = false): boolean {
  const first = tensor?.dims[0] ?? 0;
  return /^float(16|32)$/.test(tensor?.type ?? "") && (first === rows || (joined && first > 0 && first % rows === 0));
}

async function numbersOf(tensor: EngineTensor): Promise<ArrayLike<number>> {
  const data = (await dataOf(tensor)) as Float32Array | Uint16Array;
  return data instanceof Uint16Array ? Float32Array.from(data, f16ToF32) : data;
}

/** Masked logits are infinite, and equal. */
function distance(a: number, b: number): number {
  return a === b || Number.isNaN(a - b) ? 0 : Math.abs(a - b);
}

/** True if the rows of some input are not all the same. */
async function differ(feeds: Tensors, rows: number): Promise<boolean> {
  for (const tensor of Object.values(feeds)) {
    if (tensor.dims[0] !== rows) continue;
    const data = (await dataOf(tensor)) as ArrayLike<number>;
    const width = data.length / rows;
    for (let i = width; i < data.length; i++) if (data[i] !== data[i % width]) return true;
  }
  return false;
}

/**
 * Runs with one task per row of the batch. Task inputs meet a layer's rows in order, so the batch must come first in the values that
 * enter the layer; where it does not, or where a layer sees only some tokens of each row, as in a mixture of experts, tasks would be
 * mixed without a word. The graph does not tell; a run on rows that differ does. Loaded by the first such run.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import type { TaskInput } from "../onnx/inject.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import type { Delivery, RowModel } from "./delivery.ts";
import { dataOf, type EngineTensor, type Tensors, toTensors } from "./engine.ts";
import { madeUpCores } from "./probe.ts";
import { type InputValues, type TaskValues, toFeeds } from "./values.ts";

/** Values of a task, and its entry in the pack, which is an object of its own for each task that ever came. */
interface RowValues {
  readonly entry: TaskInfo["metadata"] | undefined;
  readonly values: TaskValues;
}

export class RowTasks {
  readonly #pack: Pick<Pack, "tasks">;
  readonly #delivery: Pick<Delivery, "rows" | "evaluator">;
  /** Values of the tasks of the last run: the next one usually asks for the same. */
  #known: ReadonlyMap<string | null, RowValues> = new Map();
  /** True if a task per row is known to reach its row. */
  #sure = false;
  #check: ReturnType<typeof rowCheck> | undefined;

  constructor(pack: Pick<Pack, "tasks">, delivery: Pick<Delivery, "rows" | "evaluator">) {
    this.#pack = pack;
    this.#delivery = delivery;
  }

  /** Arrays that are held from one run to the next. */
  get arrays(): readonly { readonly byteLength: number }[] {
    return [...this.#known.values()].flatMap(({ values }) => [...values.inputs.values()].map(({ data }) => data));
  }

  /**
   * @param own feeds of the batch
   * @returns feeds of the task inputs, and the valid columns of each row by head
   * @throws TypeError, BackendError as `Session.run`
   */
  async feeds(
    tasks: readonly (string | null)[],
    own: Tensors,
  ): Promise<{ feeds: Tensors; valid: ReadonlyMap<string, readonly number[]> }> {
    const model = this.#delivery.rows;
    if (!model) throw new TypeError('run: one task per row needs mode "core" or "factors"; this session is "folded"');
    const values = await this.#values(tasks, own, model);
    const valid = [...values[0]!.labels.keys()].map(
      (head) => [head, values.map(({ labels }) => labels.get(head)!)] as const,
    );
    const { feeds } = toFeeds(
      model.engine,
      model.inputs,
      values.map(({ inputs }) => inputs),
    );
    return { feeds, valid: new Map(valid) };
  }

  /** Values for each row of a batch; those of a task are computed once as long as runs go on asking for it. */
  async #values(tasks: readonly (string | null)[], feeds: Tensors, model: RowModel): Promise<TaskValues[]> {
    const batches = Object.values(feeds).flatMap(({ dims }) => dims[0] ?? []);
    if (tasks.length === 0 || !batches.includes(tasks.length)) {
      throw new TypeError(`run: ${tasks.length} tasks for a batch of ${batches[0]}; give one per row`);
    }
    const { evaluator } = this.#delivery;
    const valuesOf = async (task: string | null): Promise<RowValues> => {
      const entry = this.#pack.tasks.get(task!)?.metadata;
      const known = this.#known.get(task);
      if (known && known.entry === entry) return known;
      return { entry, values: await evaluator.read(task) };
    };
    // Together, as they are now: a task can be removed and another one added under its name.
    const wanted = new Map(
      await Promise.all([...new Set(tasks)].map(async (task) => [task, await valuesOf(task)] as const)),
    );
    if (tasks.length > 1 && !this.#sure) {
      // Values of the base are made again: all sessions would keep them, and few check.
      this.#check ??= rowCheck(model, (await evaluator.read(null)).inputs);
      this.#sure = await this.#check(feeds, tasks.length);
    }
    this.#known = wanted;
    return tasks.map((task) => wanted.get(task)!.values);
  }
}

const WHY =
  "the batch is not the first dimension of some adapted layer, or the layer sees some tokens only, as in a mixture of experts, " +
  "or, in 8 bits, what enters it is quantised by a range that all rows share";

/**
 * @param base values of the task inputs without a task
 * @returns a check that is called with the feeds of each batch until it is sure. It takes made-up feeds first, and the batch itself where
 *   the model does not run on those
 * @throws BackendError when tasks are mixed, or no output tells
 */
function rowCheck(model: RowModel, base: InputValues): (own: Tensors, rows: number) => Promise<boolean> {
  let onMadeUp: Promise<boolean> | undefined;
  return async (own, rows) => {
    onMadeUp ??= checkMadeUp(model, base);
    return (await onMadeUp) || checkRows(model, base, own, rows, true);
  };
}

/** @returns false also when the model does not run on made-up feeds, or takes them for another batch: they prove nothing then */
async function checkMadeUp(model: RowModel, base: InputValues): Promise<boolean> {
  const values = model.made();
  const feeds = values && toTensors(model.engine, values);
  const rows = feeds && Object.values(feeds)[0]?.dims[0];
  if (!feeds || !rows || rows < 2) return false;
  return checkRows(model, base, feeds, rows, false).catch((error: unknown) => {
    if (error instanceof BackendError && error.backend === "session") throw error;
    return false;
  });
}

/**
 * Runs a batch with a made-up task in all rows, in none, and in every second: each row must be as it is alone. Heads, linear layers and
 * convolutions are changed one after the other: a large effect of one would hide mixing in another.
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
  const look = async (group: readonly TaskInput[], size: number): Promise<Seen> => {
    const task = changed(base, group, size);
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
    let found = await look(group, 0.1);
    seen ||= found.effect > 0;
    // Rows of quantised models influence each other a little whatever their tasks; a larger task stands out against that.
    if (!found.apart) found = await look(group, 1);
    if (!found.apart) throw mixed(`tasks get into each other's rows of "${output}": ${WHY}`);
  }
  return seen && (await differ(feeds, rows));
}

/** The effect of a made-up task; `apart` if its rows are as they are alone, and the others as without it. */
interface Seen {
  readonly effect: number;
  readonly apart: boolean;
}

/** Fewest values from which a task's share can be estimated despite other changes. */
const MANY = 64;
/** Outputs of this width and above are those of a vocabulary: each position is compared by itself. */
const VOCABULARY = 1024;

/**
 * @param values of all rows without a task, with it, and with it in every second row
 * @param last dimension of the output, where rows share ranges: these change values too, so only the task's share of a vector of this
 *   length is compared
 */
export function compareRows(
  [without, alone, found]: readonly [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>],
  rows: number,
  last: number | undefined,
): Seen {
  const width = found.length / rows;
  let [effect, off] = [0, 0];
  for (let i = 0; i < found.length; i++) {
    effect = Math.max(effect, apart(alone[i]!, without[i]!));
    off = Math.max(off, apart(found[i]!, (Math.floor(i / width) % 2 === 0 ? alone : without)[i]!));
  }
  if (effect === 0 || off < effect / 4) return { effect, apart: true };
  const size = last !== undefined && last >= VOCABULARY ? last : width;
  if (last === undefined || size < MANY) return { effect, apart: false };
  const shares: [share: number, length: number, expected: number][] = [];
  for (let start = 0; start < found.length; start += size) {
    let [product, length] = [0, 0];
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
  return { effect, apart: looked.every(([share, , expected]) => Math.abs(share - expected) < 1 / 4) };
}

/** InputValues that are looked at together. */
function groupsOf(inputs: readonly TaskInput[], forms: RowModel["forms"]): TaskInput[][] {
  const groups = new Map<string, TaskInput[]>();
  for (const input of inputs) {
    const { kind, of } = input;
    const key = /^head/.test(kind) ? "head" : (forms.get(of) ?? "");
    groups.set(key, [...(groups.get(key) ?? []), input]);
  }
  return [...groups.values()];
}

/** Makes up a task: other numbers in all its inputs but rows of tables, which meet the model's own input. */
function changed(base: InputValues, inputs: readonly TaskInput[], size: number): InputValues {
  const values = new Map(base);
  for (const input of inputs) {
    const { name, kind } = input;
    const { dims, data } = base.get(name)!;
    if (kind === "core") values.set(name, madeUpCores(input, size));
    if (kind === "core" || kind === "rows" || !(data instanceof Float32Array)) continue;
    values.set(name, { dims, data: data.map((value, i) => value + size * Math.sin(1 + 1.7 * i)) });
  }
  return values;
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
function apart(a: number, b: number): number {
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

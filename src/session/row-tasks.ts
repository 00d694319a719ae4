/**
 * Runs with one task per row of the batch: the values of each row, and how many columns of a head are its own. Loaded by the first
 * such run.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import type { TaskInput } from "../onnx/adapted.ts";
import type { Mode } from "./base-values.ts";
import { type Carrier, toFeeds } from "./carrier.ts";
import type { Engine, Tensors } from "./engine.ts";
import type { TaskValues } from "./values.ts";

/** Values of a task, and its entry in the pack, which is an object of its own for each task that ever came. */
interface RowValues {
  readonly entry: TaskInfo["metadata"] | undefined;
  readonly values: TaskValues;
}

/** What a session gives to such runs. */
export interface RowParts {
  readonly engine: Engine;
  readonly pack: Pick<Pack, "tasks">;
  readonly mode: Mode;
  readonly inputs: readonly TaskInput[];
  /** Names of the heads. */
  readonly heads: Iterable<string>;
  readonly carrier: Pick<Carrier, "checkRows" | "evaluator">;
}

export class RowTasks {
  readonly #parts: RowParts;
  /** Values of the tasks of the last run: the next one usually asks for the same. */
  #known: ReadonlyMap<string | null, RowValues> = new Map();
  /** Whether a task per row is known to reach its row. */
  #sure = false;

  constructor(parts: RowParts) {
    this.#parts = parts;
  }

  /** What is held from one run to the next. */
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
    const { engine, inputs, heads } = this.#parts;
    const values = await this.#values(tasks, own);
    const valid = [...heads].map((head) => [head, values.map(({ labels }) => labels.get(head)!)] as const);
    return { feeds: toFeeds(engine, inputs, values).feeds, valid: new Map(valid) };
  }

  /** Values for each row of a batch; those of a task are computed once as long as runs go on asking for it. */
  async #values(tasks: readonly (string | null)[], feeds: Tensors): Promise<TaskValues[]> {
    const { mode, pack, carrier } = this.#parts;
    if (mode === "folded") {
      throw new TypeError('run: one task per row needs mode "core" or "factors"; this session is "folded"');
    }
    const batch = Object.values(feeds).find(({ dims }) => dims.length > 0)?.dims[0];
    if (tasks.length === 0 || tasks.length !== batch) {
      throw new TypeError(`run: ${tasks.length} tasks for a batch of ${batch}; give one per row`);
    }
    const valuesOf = async (task: string | null): Promise<RowValues> => {
      const entry = pack.tasks.get(task!)?.metadata;
      const known = this.#known.get(task);
      if (known && known.entry === entry) return known;
      const { evaluator } = carrier;
      return { entry, values: await evaluator.evaluate(await evaluator.load(task)) };
    };
    // All in one go, as they are now: a task can be removed and another one added under its name.
    const wanted = new Map(
      await Promise.all([...new Set(tasks)].map(async (task) => [task, await valuesOf(task)] as const)),
    );
    if (tasks.length > 1) this.#sure ||= (await carrier.checkRows?.(feeds, tasks.length)) ?? true;
    this.#known = wanted;
    return tasks.map((task) => wanted.get(task)!.values);
  }
}

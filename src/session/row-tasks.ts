/**
 * Runs with one task per row of the batch: the values of each row, and how many columns of a head are its own. Loaded by the first
 * such run.
 */
import type { TaskInput } from "../onnx/adapted.ts";
import type { Pack } from "../pack/pack.ts";
import type { Mode } from "./base-values.ts";
import { type Carrier, toFeeds } from "./carrier.ts";
import type { Engine, Tensors } from "./engine.ts";
import type { TaskValues } from "./values.ts";

/** Values by task, with the blob that they were made of. */
type RowValues = Map<string | null, { readonly bytes: Uint8Array | undefined; readonly values: TaskValues }>;

/** What a session gives to such runs. */
export interface RowParts {
  readonly engine: Engine;
  readonly pack: Pick<Pack, "load">;
  readonly mode: Mode;
  readonly inputs: readonly TaskInput[];
  /** Names of the heads. */
  readonly heads: Iterable<string>;
  readonly carrier: Pick<Carrier, "checkRows" | "evaluator">;
}

export class RowTasks {
  readonly #parts: RowParts;
  /** Values of the tasks of the last run: the next one usually asks for the same. */
  #known: RowValues = new Map();
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
    if (tasks.length > 1) this.#sure ||= (await carrier.checkRows?.(feeds, tasks.length)) ?? true;
    const wanted: RowValues = new Map();
    for (const task of new Set(tasks)) {
      // A task can be removed and another one added under its name.
      const bytes = task === null ? undefined : (await pack.load(task)).bytes;
      const known = this.#known.get(task);
      const values = known?.bytes === bytes && known ? known.values : await carrier.evaluator.read(task);
      wanted.set(task, { bytes, values });
    }
    this.#known = wanted;
    return tasks.map((task) => wanted.get(task)!.values);
  }
}

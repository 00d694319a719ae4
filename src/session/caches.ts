/**
 * Notes which task made which cache of keys and values. A cache holds results of layers for a text under one task; fed
 * to a run under another it would mix the two without a word. Loaded by sessions on models that have caches.
 *
 * A cache is known by its tensor and by the memory behind it, not by its numbers: a copy of them has no known task. One
 * layer stands for all, since they go from run to run together: a step of a model with thirty layers would take
 * noticeably longer if all were noted.
 */
import type { Pack } from "../core/pack.ts";
import type { Selection } from "../core/selection.ts";
import { TaskError } from "../errors.ts";
import type { EngineTensor, Tensors } from "./engine.ts";
import type { SessionSwitchOptions } from "./options.ts";

/** The task or blend that a run, or a row of one, belongs to. */
export interface CacheState {
  /** The same for states that may take each other's caches, with the same entries of tasks in their packs. */
  readonly key: string;
  /** An entry is an object of its own for each task that ever came under an id. */
  readonly entries: readonly unknown[];
  readonly name: string;
  /** The first task of it. */
  readonly task: string;
  /** True if runs take caches of any other state. */
  readonly keeps?: boolean | undefined;
}

const BASE: CacheState = { key: "", entries: [], name: "the base", task: "" };

/**
 * States of rows by tensors and memory that hold caches, for all sessions: one file makes the cache that another goes
 * on with.
 */
const makers = new WeakMap<object, readonly CacheState[]>();

export class CacheWatch {
  readonly #pack: Pick<Pack, "tasks">;
  /** Inputs and outputs of the first layer: keys, values, and what else it has. */
  readonly #past: readonly string[];
  readonly #present: readonly string[];

  /** @param inputNames of the model, as `outputNames` */
  constructor(pack: Pick<Pack, "tasks">, inputNames: readonly string[], outputNames: readonly string[]) {
    this.#pack = pack;
    this.#past = firstOfEach(inputNames, "past");
    this.#present = firstOfEach(outputNames, "present");
  }

  /** Call it before the tasks are read: later there may be others under their ids. */
  stateOf(selection: Selection, { head, keepCache }: SessionSwitchOptions = {}): CacheState {
    const all = typeof selection === "string" ? { [selection]: 1 } : (selection ?? {});
    const shares = Object.entries(all).sort(([a], [b]) => (a < b ? -1 : 1));
    const [first, second] = shares;
    if (!first) return { ...BASE, keeps: keepCache };
    // The saved modules of a blend are those of its head: one of them may be an embedding.
    const whose = head === undefined ? "" : `, head "${head}"`;
    const blend = `the blend ${shares.map(([id, strength]) => `"${id}" × ${strength}`).join(" + ")}${whose}`;
    return {
      key: JSON.stringify([shares, head]),
      entries: shares.map(([id]) => this.#pack.tasks.get(id)?.metadata),
      name: !second && first[1] === 1 ? `task "${first[0]}"` : blend,
      task: first[0],
      keeps: keepCache,
    };
  }

  /**
   * @param active state of the session. Default: the base, with which it begins
   * @param keep true if this run takes caches of any other state
   * @returns a function to call with the results of the run, and with its fetches
   * @throws TaskError when a cache among the feeds was made under another state
   */
  check(
    feeds: Tensors,
    active: CacheState = BASE,
    tasks?: readonly (string | null)[],
    keep: boolean | undefined = !tasks && active.keeps,
  ): (results: Tensors, fetches?: unknown) => void {
    const states = tasks ? Array.from(tasks, (task) => this.stateOf(task)) : [active];
    for (const name of keep ? [] : this.#past) {
      const tensor = feeds[name];
      const found = holdsSome(tensor) ? (makers.get(tensor) ?? makers.get(memoryOf(tensor))) : undefined;
      for (let row = 0; found && row < Math.max(found.length, states.length); row++) {
        const there = ofRow(found, row);
        const here = ofRow(states, row);
        if (there.key !== here.key || there.entries.some((entry, i) => entry !== here.entries[i]))
          throw refusal(name, row, there, here, found.length + states.length > 2);
      }
    }
    return (results, fetches) => {
      // Results that are written into tensors of the caller's are there as well.
      for (const tensors of [results, fetches as Tensors | undefined]) {
        for (const name of this.#present) {
          const tensor = tensors?.[name];
          if (holdsSome(tensor)) makers.set(tensor, states).set(memoryOf(tensor), states);
        }
      }
    };
  }
}

/** Names of the first layer's caches, as exporters and transformers.js call them. */
function firstOfEach(names: readonly string[], prefix: "past" | "present"): string[] {
  const first = new Map<string, string>();
  for (const name of names) {
    if (!name.startsWith(prefix)) continue;
    const kind = name.replace(/\d+/g, "#");
    const other = first.get(kind);
    // The lower number, in any order.
    if (other === undefined || (name.length - other.length || (name < other ? -1 : 1)) < 0) first.set(kind, name);
  }
  return [...first.values()];
}

/** A tensor without elements belongs to no task. */
function holdsSome(tensor: EngineTensor | null | undefined): tensor is EngineTensor {
  return tensor?.dims !== undefined && !tensor.dims.includes(0);
}

/** The memory that holds a tensor's numbers. Another tensor may be made of the same memory. */
function memoryOf(tensor: EngineTensor): object {
  const placed = tensor as EngineTensor & { readonly location?: string; readonly gpuBuffer: object };
  // Getters throw for what is elsewhere.
  if (placed.location === "gpu-buffer") return placed.gpuBuffer;
  const data = placed.location?.startsWith("cpu") === false ? undefined : placed.data;
  return ArrayBuffer.isView(data) ? data.buffer : tensor;
}

function ofRow(states: readonly CacheState[], row: number): CacheState {
  return states[states.length === 1 ? 0 : row] ?? BASE;
}

function refusal(name: string, row: number, there: CacheState, here: CacheState, several: boolean): TaskError {
  const maker = there.name === here.name ? `${there.name} (replaced since, or of another open pack)` : there.name;
  const message =
    `feeds: "${name}"${several ? `, row ${row},` : ""} was made under ${maker}, and this run is under ${here.name}: its answer ` +
    "would mix the two. Start with an empty cache, or, if that is wanted, pass keepCache: true to switchTask or to this run";
  return new TaskError(message, { task: here.task || there.task });
}

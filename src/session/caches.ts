/**
 * Notes which task made which cache of keys and values. A cache holds results of layers for a text under one task; fed to a run under
 * another it would mix the two without a word. Loaded by sessions on models that have caches.
 *
 * A cache is known by its tensor and by the memory behind it, not by its numbers: a copy of them has no known task. One layer stands for
 * all, since they go from run to run together: a step of a model with thirty layers would take noticeably longer if all were noted.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import type { Selection } from "../core/selection.ts";
import { TaskError } from "../errors.ts";
import type { EngineTensor, Tensors } from "./engine.ts";
import type { SessionSwitchOptions } from "./options.ts";

/** One task of a selection, as it was then: another task may come under its id. */
interface TaskShare {
  readonly id: string;
  readonly strength: number;
  /** The entry of the task in its pack, which is an object of its own for each task that ever came. */
  readonly entry: TaskInfo["metadata"] | undefined;
}

/** The task or blend that a run, or a row of one, belongs to. */
export interface CacheState {
  /** Name for messages. */
  readonly name: string;
  /** Tasks in the order of their ids. */
  readonly parts: readonly TaskShare[];
  /** The task whose saved modules a blend uses: one of them may be an embedding. */
  readonly head?: string | undefined;
  /** Whether runs take caches of any other state. */
  readonly keeps?: boolean | undefined;
}

const BASE: CacheState = { name: "the base", parts: [] };

/**
 * States of rows, or one for all of them, by tensors and memory that hold caches. Shared by all sessions, since one file may make
 * the cache that another one goes on with.
 */
const made = new WeakMap<object, readonly CacheState[]>();

/** Watches the runs of one session. */
export class CacheWatch {
  readonly #pack: Pick<Pack, "tasks">;
  /** Inputs and outputs of the first layer: keys, values, and what else it has. */
  readonly #past: readonly string[];
  readonly #present: readonly string[];
  /** States of rows, kept so that a step's are those of the step before. */
  readonly #rows = new Map<string | null, CacheState>([[null, BASE]]);

  /** @param names of the model's inputs and outputs */
  constructor(pack: Pick<Pack, "tasks">, inputNames: readonly string[], outputNames: readonly string[]) {
    this.#pack = pack;
    this.#past = firstOfEach(inputNames, "past");
    this.#present = firstOfEach(outputNames, "present");
  }

  /** Call it before the tasks are read: later there may be others under their ids. */
  stateOf(selection: Selection, { head, keepCache }: SessionSwitchOptions = {}): CacheState {
    const strengths =
      typeof selection === "string" ? [[selection, 1] as const] : Object.entries(selection ?? {}).sort(byId);
    const parts = strengths.map(([id, strength]): TaskShare => ({ id, strength, entry: this.#entry(id) }));
    return { name: nameOf(parts, head), parts, head, keeps: keepCache };
  }

  #entry(id: string): TaskShare["entry"] {
    return this.#pack.tasks.get(id)?.metadata;
  }

  #row(task: string | null): CacheState {
    const known = this.#rows.get(task);
    if (known && (task === null || known.parts[0]?.entry === this.#entry(task))) return known;
    const state = this.stateOf(task);
    this.#rows.set(task, state);
    return state;
  }

  /**
   * @param active state of the session; undefined for the base that it begins with
   * @param tasks of the rows, where they have tasks of their own
   * @param keep whether this run takes caches of any other state
   * @returns what to call with the results of the run, and with its fetches
   * @throws TaskError when a cache among the feeds was made under another state
   */
  check(
    feeds: Tensors,
    active: CacheState = BASE,
    tasks?: readonly (string | null)[],
    keep: boolean | undefined = !tasks && active.keeps,
  ): (results: Tensors, fetches?: unknown) => void {
    const states = tasks ? Array.from(tasks, (task) => this.#row(task)) : [active];
    for (const name of keep ? [] : this.#past) {
      const tensor = feeds[name];
      const found = holdsSome(tensor) ? (made.get(tensor) ?? made.get(memoryOf(tensor))) : undefined;
      const row = found ? differingRow(found, states) : -1;
      if (found && row >= 0) throw refusal(name, row, found, states);
    }
    return (results, fetches) => {
      // Results that are written into tensors of the caller's are there as well.
      for (const tensors of [results, fetches as Tensors | undefined]) {
        for (const name of this.#present) {
          const tensor = tensors?.[name];
          if (holdsSome(tensor)) made.set(tensor, states).set(memoryOf(tensor), states);
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

function byId([a]: readonly [string, unknown], [b]: readonly [string, unknown]): number {
  return a < b ? -1 : 1;
}

function nameOf(parts: readonly TaskShare[], head: string | undefined): string {
  const [first, ...others] = parts;
  if (!first) return BASE.name;
  if (others.length === 0 && first.strength === 1) return `task "${first.id}"`;
  const whose = head === undefined ? "" : `, head "${head}"`;
  return `the blend ${parts.map(({ id, strength }) => `"${id}" × ${strength}`).join(" + ")}${whose}`;
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

/** @returns the first row of two states that is not the same; -1 where all are */
function differingRow(found: readonly CacheState[], states: readonly CacheState[]): number {
  const rows = Math.max(found.length, states.length);
  for (let row = 0; row < rows; row++) {
    const [there, here] = [ofRow(found, row), ofRow(states, row)];
    if (!there || !here || !isSame(there, here)) return row;
  }
  return -1;
}

function ofRow(states: readonly CacheState[], row: number): CacheState | undefined {
  return states.length === 1 ? states[0] : states[row];
}

function isSame(a: CacheState, b: CacheState): boolean {
  if (a === b) return true;
  if (a.head !== b.head || a.parts.length !== b.parts.length) return false;
  return a.parts.every(({ id, strength, entry }, i) => {
    const other = b.parts[i]!;
    return id === other.id && strength === other.strength && entry === other.entry;
  });
}

function refusal(name: string, row: number, found: readonly CacheState[], states: readonly CacheState[]): TaskError {
  const several = Math.max(found.length, states.length) > 1;
  const [there, here] = [ofRow(found, row) ?? BASE, ofRow(states, row) ?? BASE];
  const maker = there.name === here.name ? `${there.name} (replaced since, or of another open pack)` : there.name;
  const message =
    `feeds: "${name}"${several ? `, row ${row},` : ""} was made under ${maker}, and this run is under ${here.name}: its answer ` +
    "would mix the two. Start with an empty cache, or, if that is wanted, pass keepCache: true to switchTask or to this run";
  return new TaskError(message, { task: (here.parts[0] ?? there.parts[0])?.id ?? "" });
}

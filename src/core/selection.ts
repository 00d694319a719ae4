/**
 * Selection of a caller, the task blobs that make it up, and the report of a switch: one shape for the runtime and for
 * sessions.
 */

import type { Owner } from "../backends/backend.ts";
import { BackendError, isPlain } from "../errors.ts";
import { Observable } from "../events.ts";
import { sum } from "../tensor/dtypes.ts";
import type { ActiveTask } from "./kernel-session.ts";
import type { PackView } from "./part.ts";

/** Active selection: a task, null for the pristine base, or tasks with strengths. */
export type Selection = string | null | Readonly<Record<string, number>>;

/** Options of `switchTask`. */
export interface SwitchOptions {
  readonly signal?: AbortSignal | undefined;
  /**
   * The task whose saved modules (classifier) a blend uses. Saved modules of the other tasks, and their changes to
   * these modules, are left out.
   */
  readonly head?: string | undefined;
}

/** A selection as it was when it was read. */
export interface LoadedTasks {
  readonly selection: Selection;
  readonly head: string | undefined;
  /** Tasks with strengths; none for the base. */
  readonly tasks: readonly ActiveTask[];
}

/** A defensive copy of a selection. */
export function copySelection(selection: Selection): Selection {
  return isPlain(selection) ? { ...selection } : selection;
}

/**
 * Reads the tasks of a selection, as they go together.
 * @param ignored parameters that are left out of the tasks, by the pack's names
 * @throws TaskError for an unknown id, a head that is none of the tasks, a blend or strength with DoRA, tasks that
 *   bring and change the same parameter
 */
export async function loadParts(
  pack: PackView,
  selection: Selection,
  { head, signal }: SwitchOptions = {},
  ignored: ReadonlySet<string> = new Set(),
): Promise<ActiveTask[]> {
  const blend = selection !== null && typeof selection !== "string";
  const strengths: [string, number][] =
    selection === null ? [] : blend ? (await import("./merge.ts")).strengthsOf(selection) : [[selection, 1]];
  const parts: ActiveTask[] = await Promise.all(
    strengths.map(async ([id, strength]) => {
      const blob = await pack.load(id, { signal });
      const parameters = blob.parameters.filter(({ name }) => !ignored.has(name));
      return { id, strength, blob: { ...blob, parameters } };
    }),
  );
  if (!blend && head === undefined && !parts[0]?.blob.parameters.length) return parts;
  return (await import("./merge.ts")).reconcile(parts, pack, head);
}

/** Fields of every report of a switch. */
export interface SwitchReport {
  /** Active selection. */
  readonly task: Selection;
  /** Read from the pack for this switch. */
  readonly bytesRead: number;
  readonly requests: number;
  /** `read` until all bytes are there, `compute` from then on. */
  readonly milliseconds: { readonly read: number; readonly compute: number; readonly total: number };
}

/** Resident bytes by owner. */
export interface MemoryReport extends Readonly<Record<Owner, number>> {
  /** Held by the backend beyond what is in use. */
  readonly reserved: number;
  readonly total: number;
}

/** The bytes by owner, and their sum. */
export function memoryReport(bytes: Record<Owner | "reserved", number>): MemoryReport {
  return { ...bytes, total: sum(Object.values(bytes)) };
}

/** Effects and costs of a switch. */
export interface RuntimeSwitchReport extends SwitchReport {
  /** Adapted modules written: those of the new task and those put back to the base. */
  readonly modules: number;
  /** Operations handed to the backend. */
  readonly dispatches: number;
  /** Bytes of new memory for weights, factors and parameters; 0 once warm. */
  readonly allocated: number;
  /** Parameters of the task that the base lacks. */
  readonly added: readonly string[];
  /** Parameters replaced whole: heads, biases, token rows. */
  readonly replaced: readonly string[];
}

/**
 * Error of a switch that failed and could not be undone.
 * @param first why it failed
 * @param second why what was there before could not be put back
 * @param backend that runs
 */
export function cannotPutBack(first: unknown, second: unknown, backend: string): BackendError {
  const [why, then] = [first, second].map((error) => (error instanceof Error ? error.message : String(error)));
  const message = `${why}; and the previous task could not be put back: ${then}. Switch again: null writes the base's weights`;
  return new BackendError(message, { backend, cause: new AggregateError([first, second], why) });
}

// Events of what switches tasks: runtimes, sessions, pipelines.

/** Events of what switches tasks. */
export interface SwitchEvents<Report extends SwitchReport = SwitchReport> {
  /** A switch begins: those asked for before are done. */
  readonly switchstart: { readonly task: Selection };
  /** A switch has ended. `task` is what was asked for; `error` says why that is not active. */
  readonly switchend: { readonly task: Selection; readonly report?: Report; readonly error?: unknown };
  /** The device that the model runs on is gone. */
  readonly devicelost: { readonly message: string };
}

/** Base of what switches tasks. */
export abstract class Switching<Report extends SwitchReport = SwitchReport> extends Observable<SwitchEvents<Report>> {
  abstract close(): Promise<void>;

  /** Closes it at the end of a block, with `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** @internal Tells of a switch while it is made. */
  async switching(task: Selection, make: () => Promise<Report>): Promise<Report> {
    this.tell("switchstart", { task });
    try {
      const report = await make();
      this.tell("switchend", { task, report });
      return report;
    } catch (error) {
      this.tell("switchend", { task, error });
      throw error;
    }
  }
}

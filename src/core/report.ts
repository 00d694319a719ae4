/**
 * What a switch did and what memory is held: one shape for the runtime and for sessions of model runtimes.
 */
import type { Owner } from "../backends/backend.ts";
import type { Selection } from "./selection.ts";

/** What every switch says of itself. */
export interface SwitchReport {
  /** What is active now. */
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
  return { ...bytes, total: Object.values(bytes).reduce((a, b) => a + b, 0) };
}

/** What a switch did and what it cost. */
export interface RuntimeSwitchReport extends SwitchReport {
  /** Adapted modules written: those of the new task and those put back to the base. */
  readonly modules: number;
  /** Operations handed to the backend. */
  readonly dispatches: number;
  /** Bytes of new memory for weights, factors and parameters; 0 once warm. */
  readonly allocated: number;
  /** Parameters the task brings that the base lacks. */
  readonly added: readonly string[];
  /** Parameters replaced whole: heads, biases, token rows. */
  readonly replaced: readonly string[];
}
